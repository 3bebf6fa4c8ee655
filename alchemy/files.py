"""Files that a crash, a full disk or a kill leaves as they were or whole; a lock on a folder."""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

UMASK = os.umask(0o077)  # the only way to read it is to set it
os.umask(UMASK)
# What a run's LoRA is called: here, by diffusers, and by peft.
LORA_FILES = ("lora.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
TEMPORARY = ".tmp-"  # folders that hold one unfinished file; a kill leaves them behind
STALE = 3600  # seconds after which no process can still be writing such a file


def replace(path: str | Path, write: Callable[[Path], object]) -> Path:
    """write(a new file), sync it, rename it to path: path is the old file or the whole new one.

    The new file is in a private folder beside it, so that two processes never share one.
    """
    write_and_move(Path(path), write, os.replace)
    return Path(path)


def lora_of_run(path: str | Path, flag: str = "") -> Path:
    """The path of a LoRA file; of the folder of a run, the file in it.

    flag: which names it, for messages. Raises ValueError for a folder without one.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in LORA_FILES:
        if (path / name).exists():
            return path / name
    name = f"{flag} {path}".strip()
    raise ValueError(f"{name}: no LoRA in this folder ({', '.join(LORA_FILES)})")


def create(path: str | Path, write: Callable[[Path], object]) -> Path:
    """The same, but over no file: beach.png, or else beach-1.png, beach-2.png, ... Returns it."""

    def move(new, _):
        for candidate in numbered(Path(path)):
            with contextlib.suppress(FileExistsError):
                move_exclusive(new, candidate)
                return candidate

    return write_and_move(free_path(path), write, move)


def write_and_move(
    path: Path, write: Callable[[Path], object], move: Callable[[Path, Path], Path]
) -> Path:
    """Write a new file in a private folder beside path, sync it, and move(it, path)."""
    try:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as folder:
            new = Path(folder) / path.name
            write(new)
            new.chmod(0o666 & ~UMASK)  # safetensors makes files that only their owner can read
            with open(new, "rb+") as file:
                os.fsync(file.fileno())
            moved = move(new, path)
        sync_folder(path.parent)
        return moved
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path}: could not be written ({reason})") from None


def move_exclusive(new: Path, path: Path) -> None:
    """Rename; FileExistsError where there is such a file."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(new, path)


def resolve(path: str | Path) -> Path:
    """The absolute path without links and ~; links in a circle, an error of Path's, stay."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def check_no_pipe(path: str | Path) -> None:
    """Raise ValueError for a pipe or device among the files of a folder: opening it could wait for
    ever. Those below /dev are what a user means, as in --prompts <(command)."""
    path = Path(path)
    is_known = path.is_file() or path.is_dir() or path.is_relative_to("/dev")
    if path.exists() and not is_known:
        raise ValueError(f"{path}: a pipe or a device, not a file")


def sync_folder(folder: Path) -> None:
    """Write the folder itself to the disk, or a power cut may lose the rename."""
    with contextlib.suppress(OSError):  # Windows cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path, age: float = 0) -> None:
    """Remove what killed processes left unfinished in a folder.

    age: least seconds since it was made. 0 is for a folder that is locked; elsewhere another
    process may just be writing.
    """
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):  # removed by another process
            if time.time() - path.stat().st_mtime >= age:
                shutil.rmtree(path, ignore_errors=True)


def numbered(path: Path) -> Iterator[Path]:
    """beach.png, beach-1.png, beach-2.png, ..., or, of a folder, v1.5, v1.5-1, ..."""
    yield path
    path = resolve(path) if path.name in ("", "..") else path
    suffix = path.suffix if path.suffix.lower() == ".png" else ""
    for count in itertools.count(1):
        yield path.with_name(f"{path.name.removesuffix(suffix)}-{count}{suffix}")


def free_path(path: str | Path) -> Path:
    """The first of the numbered names that does not exist, or is too long to exist."""
    return next(candidate for candidate in numbered(Path(path)) if not os.path.exists(candidate))


def save_tensors(tensors: dict, path: str | Path, metadata: dict) -> None:
    """{name: tensor} to safetensors, with metadata in its header: strings as they are, the rest
    as JSON. Equal contents give equal bytes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = {}
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        header[key] = encodable(text)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}

    def write(new):
        try:
            save_file(tensors, new, header)
        except SafetensorError as error:  # what it raises where the disk is full
            raise OSError(str(error)) from None
        # safetensors shuffles the metadata; put it back in order.
        with open(new, "rb+") as file:
            size = int.from_bytes(file.read(8), "little")
            ordered = json.loads(file.read(size)) | {"__metadata__": header}
            text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))
            file.seek(8)
            file.write(text.encode().ljust(size))

    replace(path, write)


def save_json(value: object, path: str | Path) -> None:
    save_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def save_text(text: str, path: str | Path) -> None:
    replace(path, lambda new: new.write_text(encodable(text), encoding="utf-8"))


def encodable(text: str) -> str:
    """The text, with \\udcff for what UTF-8 cannot hold, such as a byte of a file name in another
    encoding. In JSON that is its escape, so that it is read back as it was."""
    return text.encode(errors="backslashreplace").decode()


class FolderInUseError(ValueError):
    """Another run has locked the folder."""


@contextlib.contextmanager
def lock_folder(folder: str | Path, flag: str = "--out") -> Iterator[None]:
    """Keep other runs out of a folder; the operating system releases the lock of a killed process.

    Raises FolderInUseError, a ValueError, where another run holds it.
    """
    path = Path(folder) / ".lock"
    check_no_pipe(path)
    while True:
        file = open(path, "a")  # noqa: SIM115  closed below
        if not try_lock(file):
            file.close()
            raise FolderInUseError(
                f"{flag} {folder}: another run is writing there; wait, or name another folder"
            )
        # The run that held it may have removed the file between open and lock.
        with contextlib.suppress(FileNotFoundError):
            if same_file(file, path):
                break
        file.close()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        file.close()


def same_file(file: IO, path: Path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


def try_lock(file: IO) -> bool:
    """False where another process holds the lock. A file system without locks counts as free."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
