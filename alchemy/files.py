"""Files written so that a crash, a full disk or a kill leaves the old one or the whole new one, never half of it."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

MASK = os.umask(0o077)  # the only way to ask is to set it
os.umask(MASK)


def replace(path, write):
    """write(path of a new file beside it), sync, rename: path is the old file or the whole new one, whatever happens."""
    path = Path(path)
    new = path.with_name(f".{path.name}.new")
    try:
        write(new)
        new.chmod(0o666 & ~MASK)  # safetensors makes files that only their owner can read
        with open(new, "rb+") as f:
            os.fsync(f.fileno())
        new.replace(path)
    except (
        OSError,
        SafetensorError,
    ) as error:  # the second is how safetensors says that the disk is full
        raise OSError(
            f"{path}: could not be written ({getattr(error, 'strerror', None) or error})"
        ) from None
    finally:
        new.unlink(missing_ok=True)


def save_tensors(tensors, path, facts):
    """{name: tensor} to safetensors, with facts (a dict) in its header: strings as they are, all else as JSON."""
    header = {
        k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in facts.items()
    }

    def write(new):
        save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, new, header)
        with open(
            new, "rb+"
        ) as f:  # safetensors shuffles the facts; put back in order, equal runs write equal files
            size = int.from_bytes(f.read(8), "little")
            ordered = json.loads(f.read(size)) | {"__metadata__": header}
            f.seek(8)
            f.write(
                json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
            )

    replace(path, write)


def save_json(value, path):
    replace(
        path,
        lambda new: new.write_text(
            json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        ),
    )
