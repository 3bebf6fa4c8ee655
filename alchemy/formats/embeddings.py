"""Learned words (Textual Inversion) as files: one with clip_l and clip_g, as kohya, A1111 and ComfyUI have it, or diffusers' two."""

from pathlib import Path

from ..files import save_tensors
from ..methods.textual_inversion import add_word, tables
from .tensors import EMBEDDING as KEYS, open_safetensors

TWO = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")
FORMATS = ("kohya", "diffusers")


def save_embedding(sdxl, path, token, format="kohya", facts=None):
    """Write the rows of a token of sdxl (see write_embedding); returns the paths."""
    rows = [
        table.extra[[i - table.first for i, _ in tokenizer.tokens(token)]]
        for tokenizer, table in zip(sdxl.tokenizers, tables(sdxl))
    ]
    return write_embedding(path, token, rows, format, facts)


def write_embedding(path, token, rows, format="kohya", facts=None):
    """Write clip_l's rows (n,768) and clip_g's (n,1280): "kohya", one file, or "diffusers", a folder with two. Returns the paths."""
    if format not in FORMATS:
        raise ValueError(f"format of an embedding is {format!r}; known are {', '.join(FORMATS)}")
    path = Path(path)
    if (path.suffix == ".safetensors") != (format == "kohya"):
        form = (
            "a file, whose name has to end in .safetensors"
            if format == "kohya"
            else "for diffusers a folder of two files"
        )
        raise ValueError(f"{path}: an embedding is {form}")
    header = {f"alchemy.{k}": v for k, v in (facts or {}).items()} | {
        "alchemy.token": token,
        "format": "pt",
    }
    if format == "kohya":
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(dict(zip(KEYS, rows)), path, header)
        return [path]
    path.mkdir(parents=True, exist_ok=True)
    for name, r in zip(TWO, rows):
        save_tensors({token: r}, path / name, header)
    return [path / name for name in TWO]


def is_embedding(path):
    """Whether a file, by what is in it, is such an embedding; a folder is taken for diffusers' two."""
    return Path(path).is_dir() or set(open_safetensors(path).keys()) == set(KEYS)


def read_embedding(path):
    """(token, [clip_l's rows (n,D), clip_g's (n,D)], header) of a file, or a folder with diffusers' two; the token is its own, or its name.

    Raises ValueError where it is no such file."""
    path = Path(path)
    if path.is_dir() and not all((path / name).exists() for name in TWO):
        raise ValueError(
            f"{path}: neither an embedding, which has {' and '.join(TWO)}, nor a LoRA file"
        )
    files = (
        [open_safetensors(path / name) for name in TWO]
        if path.is_dir()
        else [open_safetensors(path)]
    )
    keys = [sorted(file.keys(), reverse=True) for file in files]  # clip_l before clip_g
    if keys != [[*KEYS]] and [len(k) for k in keys] != [1, 1]:
        first = ", ".join(sum(keys, [])[:3])
        if "lora" in first:
            raise ValueError(f"{path}: no SDXL embedding, but a LoRA: give it as --lora")
        raise ValueError(
            f"{path}: no SDXL embedding: it has {first} instead of {' and '.join(KEYS)}; of diffusers' two, give the folder"
        )
    rows = [file.get_tensor(key).float() for file, names in zip(files, keys) for key in names]
    rows = [r[None] if r.ndim == 1 else r for r in rows]
    if any(r.ndim != 2 or not r.numel() or not r.isfinite().all() for r in rows) or len(
        rows[0]
    ) != len(rows[1]):
        shapes = " and ".join(str(tuple(r.shape)) for r in rows)
        raise ValueError(
            f"{path}: no SDXL embedding: {shapes} are not as many rows of finite numbers for either text encoder"
        )
    header = files[0].metadata() or {}
    return (
        header.get("alchemy.token") or (keys[0][0] if len(files) == 2 else path.stem),
        rows,
        header,
    )


def load_embedding(sdxl, path, token=None):
    """Teach sdxl the word of a file, or of a folder with diffusers' two; returns the token: the given one, or that of read_embedding.

    Raises ValueError where it is no such file, was made for other text encoders, or the token exists already.
    """
    told, rows, header = read_embedding(path)
    try:
        add_word(sdxl, token or told, rows)
    except ValueError as error:
        unnamed = not (token or Path(path).is_dir() or "alchemy.token" in header)
        raise ValueError(
            f"{path}: {error}"
            + (
                "; the file's name is its word, rename it"
                if unnamed and "choose" in str(error)
                else ""
            )
        ) from None
    return token or told
