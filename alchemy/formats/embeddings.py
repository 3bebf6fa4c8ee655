"""Files of Textual Inversion embeddings.

kohya, A1111 and ComfyUI have one file with clip_l (n,768) and clip_g (n,1280); diffusers has two
files in a folder, each with the rows of one text encoder under the token. OneTrainer can bundle
embeddings with a LoRA, as bundle_emb.TOKEN.clip_l and bundle_emb.TOKEN.clip_g.
"""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ..files import save_tensors
from ..methods.textual_inversion import add_word, tables
from ..sdxl import SDXL
from .tensors import first_names, open_safetensors, read_tensor
from .text import shorten

KEYS = ("clip_l", "clip_g")
DIFFUSERS_FILES = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")
BUNDLE = "bundle_emb."
FORMATS = ("kohya", "diffusers")
METADATA = "alchemy."  # the prefix of our own keys in a header
TOKEN = METADATA + "token"


def save_embedding(
    sdxl: SDXL, path: str | Path, token: str, format: str = "kohya", metadata: dict | None = None
) -> list[Path]:
    """Write the rows of a token of sdxl; see write_embedding."""
    rows = []
    for tokenizer, table in zip(sdxl.tokenizers, tables(sdxl), strict=True):
        rows.append(table.extra[[i - table.first for i, _ in tokenizer.tokens(token)]])
    return write_embedding(path, token, rows, format, metadata)


def write_embedding(
    path: str | Path,
    token: str,
    rows: list[Tensor],
    format: str = "kohya",
    metadata: dict | None = None,
) -> list[Path]:
    """Write an embedding's rows, [(n,768), (n,1280)]; return the paths.

    format: "kohya", one .safetensors file, or "diffusers", a folder with two.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format of an embedding is {format!r}; known are {', '.join(FORMATS)}")
    if format == "kohya" and path.suffix != ".safetensors":
        raise ValueError(f"{path}: an embedding is a file whose name ends in .safetensors")
    if format == "diffusers" and path.suffix == ".safetensors":
        raise ValueError(f"{path}: for diffusers, an embedding is a folder of two files")
    header = {METADATA + key: value for key, value in (metadata or {}).items()}
    header |= {TOKEN: token, "format": "pt"}
    if format == "kohya":
        contents = {path: dict(zip(KEYS, rows, strict=True))}
    else:
        contents = {}
        for name, tensor in zip(DIFFUSERS_FILES, rows, strict=True):
            contents[path / name] = {token: tensor}
    for file, tensors in contents.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, file, header)
    return list(contents)


def is_embedding(path: str | Path) -> bool:
    """Whether a file holds an embedding, by its content; a folder is assumed to be diffusers'."""
    return Path(path).is_dir() or set(open_safetensors(path).keys()) == set(KEYS)


def read_embedding(path: str | Path) -> tuple[str, list[Tensor], dict[str, str]]:
    """(token, [clip_l's rows (n,D), clip_g's (n,D)], header) of a file or of diffusers' folder.

    The token is the one in the header or, of diffusers, the tensor's name, else the file's name.
    Raises ValueError if it is not an embedding.
    """
    path = Path(path)
    is_folder, files = path.is_dir(), []
    for file in [path / name for name in DIFFUSERS_FILES] if is_folder else [path]:
        if is_folder and not file.exists():
            raise ValueError(
                f"{path}: neither an embedding, which has {' and '.join(DIFFUSERS_FILES)}, "
                "nor a LoRA file"
            )
        files.append(open_safetensors(file))
    names = []
    for file in files:
        names += sorted(file.keys(), reverse=True)  # clip_l before clip_g
    is_pair = len(names) == 2 and names[0] == names[1] if is_folder else names == [*KEYS]
    if not is_pair and "lora" in " ".join(names[:3]):
        raise ValueError(f"{path}: no SDXL embedding, but a LoRA: give it as --lora")
    if not is_pair:
        raise ValueError(
            f"{path}: no SDXL embedding: it has {first_names(names) or 'nothing'} instead of "
            f"{' and '.join(KEYS)}; of diffusers' two files, give the folder"
        )
    try:
        rows = read_rows(files if is_folder else files * 2, names)
    except ValueError as error:
        raise ValueError(f"{path}: no SDXL embedding: {error}") from None
    header = files[0].metadata() or {}
    token = header.get(TOKEN) or (names[0] if is_folder else path.stem)
    return token, rows, header


def read_rows(files: list[safe_open], keys: list[str]) -> list[Tensor]:
    """Both encoders' tensors, a key of a file each, as float32 rows (n, D) of one n."""
    rows = []
    for file, key in zip(files, keys, strict=True):
        tensor = read_tensor(file, key)
        if tensor.ndim not in (1, 2) or not tensor.numel():
            raise ValueError(
                f"{shorten(key)} has shape {tuple(tensor.shape)}, not (vectors, width)"
            )
        rows.append(tensor[None] if tensor.ndim == 1 else tensor)
    first, second = rows
    if len(first) != len(second):
        raise ValueError(f"{tuple(first.shape)} and {tuple(second.shape)} are not as many vectors")
    return rows


def load_embedding(sdxl: SDXL, path: str | Path, token: str | None = None) -> str:
    """Add the embedding in a file, or in diffusers' folder, to sdxl; return its token.

    token: to use instead of the file's. Raises ValueError if it is not an embedding, was made for
    other text encoders, or the token exists already.
    """
    file_token, rows, header = read_embedding(path)
    try:
        add_word(sdxl, token or file_token, rows)
    except ValueError as error:
        named_by_file = not (token or Path(path).is_dir() or TOKEN in header)
        advice = ""
        if named_by_file and "choose" in str(error):
            advice = "; the file's name is its token, rename it"
        raise ValueError(f"{path}: {error}{advice}") from None
    return token or file_token


def bundled_embeddings(path: str | Path) -> dict[str, list[Tensor]]:
    """{token: [clip_l's rows (n,D), clip_g's (n,D)]} of the embeddings bundled with a LoRA."""
    file, bundle, found = open_safetensors(path), {}, {}
    for key in file.keys():  # noqa: SIM118
        if key.startswith(BUNDLE):
            token, _, part = key.removeprefix(BUNDLE).rpartition(".")
            bundle.setdefault(token, {})[part] = key
    for token, parts in bundle.items():
        if parts.keys() != {*KEYS}:
            raise ValueError(
                f"{path}: the bundled embedding {shorten(token)!r} has {first_names(parts)}, "
                f"not {' and '.join(KEYS)}"
            )
        try:
            found[token] = read_rows([file, file], [parts[part] for part in KEYS])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return found


def load_bundle(sdxl: SDXL, path: str | Path) -> None:
    """Add the embeddings that a LoRA is bundled with to sdxl; see load_embedding."""
    for token, rows in bundled_embeddings(path).items():
        try:
            add_word(sdxl, token, rows)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
