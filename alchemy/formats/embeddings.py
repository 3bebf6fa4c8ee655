"""Files of Textual Inversion embeddings.

kohya, A1111 and ComfyUI have one file with clip_l (n,768) and clip_g (n,1280); diffusers has two
files in a folder, each with the rows of one text encoder under the token.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..files import save_tensors
from ..methods.textual_inversion import add_word, tables
from .tensors import EMBEDDING as KEYS
from .tensors import first_names, open_safetensors

DIFFUSERS_FILES = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")
FORMATS = ("kohya", "diffusers")
TOKEN = "alchemy.token"  # in the header


def save_embedding(
    sdxl, path: str | Path, token: str, format: str = "kohya", metadata: dict | None = None
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
    if format not in FORMATS:
        raise ValueError(f"format of an embedding is {format!r}; known are {', '.join(FORMATS)}")
    path = Path(path)
    if format == "kohya" and path.suffix != ".safetensors":
        raise ValueError(f"{path}: an embedding is a file whose name ends in .safetensors")
    if format == "diffusers" and path.suffix == ".safetensors":
        raise ValueError(f"{path}: for diffusers, an embedding is a folder of two files")
    header = {f"alchemy.{key}": value for key, value in (metadata or {}).items()}
    header |= {TOKEN: token, "format": "pt"}
    if format == "kohya":
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(dict(zip(KEYS, rows, strict=True)), path, header)
        return [path]
    path.mkdir(parents=True, exist_ok=True)
    paths = [path / name for name in DIFFUSERS_FILES]
    for file, tensor in zip(paths, rows, strict=True):
        save_tensors({token: tensor}, file, header)
    return paths


def is_embedding(path: str | Path) -> bool:
    """Whether a file holds an embedding, by its content; a folder is assumed to be diffusers'."""
    return Path(path).is_dir() or set(open_safetensors(path).keys()) == set(KEYS)


def read_embedding(path: str | Path) -> tuple[str, list[Tensor], dict[str, str]]:
    """(token, [clip_l's rows (n,D), clip_g's (n,D)], header) of a file or of diffusers' folder.

    The token is the one in the header or, of diffusers, the tensor's name, else the file's name.
    Raises ValueError if it is not an embedding.
    """
    path = Path(path)
    paths = [path / name for name in DIFFUSERS_FILES] if path.is_dir() else [path]
    if path.is_dir() and not all(file.exists() for file in paths):
        raise ValueError(
            f"{path}: neither an embedding, which has {' and '.join(DIFFUSERS_FILES)}, "
            "nor a LoRA file"
        )
    rows, names = [], []
    files = [open_safetensors(file) for file in paths]
    for file in files:
        keys = sorted(file.keys(), reverse=True)  # clip_l before clip_g
        names += keys
        if len(names) <= 2:
            rows += [file.get_tensor(key) for key in keys]
    expected = len(set(names)) == 1 if path.is_dir() else names == [*KEYS]
    if not expected or len(rows) != 2:
        if any("lora" in name for name in names[:3]):
            raise ValueError(f"{path}: no SDXL embedding, but a LoRA: give it as --lora")
        raise ValueError(
            f"{path}: no SDXL embedding: it has {first_names(names) or 'nothing'} instead of "
            f"{' and '.join(KEYS)}; of diffusers' two files, give the folder"
        )
    header = files[0].metadata() or {}
    token = header.get(TOKEN) or (names[0] if path.is_dir() else path.stem)
    return token, check_rows(path, rows), header


def check_rows(path: Path, rows: list[Tensor]) -> list[Tensor]:
    """The two tensors as float32 rows (n, D). Raises ValueError for anything else."""
    shapes = [tuple(tensor.shape) for tensor in rows]
    problem = ValueError(
        f"{path}: no SDXL embedding: {shapes[0]} and {shapes[1]} are not as many rows of finite "
        "numbers for either text encoder"
    )
    checked = []
    for tensor in rows:
        if tensor.ndim not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
            raise problem
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise problem
        checked.append(tensor[None] if tensor.ndim == 1 else tensor)
    if len(checked[0]) != len(checked[1]):
        raise problem
    return checked


def load_embedding(sdxl, path: str | Path, token: str | None = None) -> str:
    """Add the embedding in a file, or in diffusers' folder, to sdxl; return its token.

    token: to use instead of the file's. Raises ValueError if it is not an embedding, was made for
    other text encoders, or the token exists already.
    """
    own_token, rows, header = read_embedding(path)
    try:
        add_word(sdxl, token or own_token, rows)
    except ValueError as error:
        named_by_file = not (token or Path(path).is_dir() or TOKEN in header)
        advice = ""
        if named_by_file and "choose" in str(error):
            advice = "; the file's name is its token, rename it"
        raise ValueError(f"{path}: {error}{advice}") from None
    return token or own_token
