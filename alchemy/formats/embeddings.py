"""Learned words (Textual Inversion) as files: one with clip_l and clip_g, as A1111 and ComfyUI read, or two as diffusers has them."""
from pathlib import Path

from ..files import save_tensors
from ..methods.textual_inversion import add_word, tables
from .checkpoint import open_safetensors

KEYS = ("clip_l", "clip_g")
TWO = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")


def save_embedding(sdxl, path, token, format="a1111", facts=None):
    """Write the rows of a token: "a1111", a file with clip_l (n,768) and clip_g (n,1280), or "diffusers", a folder with a file for each. Returns the paths."""
    rows = []
    for tokenizer, table in zip(sdxl.tokenizers, tables(sdxl)):
        rows.append(table.extra[[i - table.first for i, _ in tokenizer.pieces(token)]])
    path = Path(path)
    header = {f"alchemy.{k}": v for k, v in (facts or {}).items()} | {"alchemy.token": token, "format": "pt"}
    if format == "diffusers":
        path.mkdir(parents=True, exist_ok=True)
        for name, r in zip(TWO, rows):
            save_tensors({token: r}, path / name, header)
        return [path / name for name in TWO]
    if format != "a1111":
        raise ValueError(f"format is {format!r}; known are a1111, diffusers")
    save_tensors(dict(zip(KEYS, rows)), path, header)
    return [path]


def load_embedding(sdxl, path, token=None):
    """Teach sdxl the word of a file, or of a folder with diffusers' two; returns the token: the given one, the file's own, or its name.

    Raises ValueError where it is no such file, was made for other text encoders, or the token exists already.
    """
    path = Path(path)
    files = [open_safetensors(path / name) for name in TWO] if path.is_dir() else [open_safetensors(path)]
    keys = [key for file in files for key in file.keys()]
    if len(files) == 1 and set(keys) != set(KEYS) or len(files) == 2 and len(keys) != 2:
        raise ValueError(f"{path}: no SDXL embedding: it has {', '.join(keys[:3])} instead of {' and '.join(KEYS)}")
    rows = [file.get_tensor(key) for file, key in ((files[0], KEYS[0]), (files[0], KEYS[1]))] if len(files) == 1 else [
        file.get_tensor(key) for file, key in zip(files, keys)]
    rows = [r[None] if r.ndim == 1 else r for r in rows]
    told = (files[0].metadata() or {}).get("alchemy.token") or (keys[0] if len(files) == 2 else path.stem)
    try:
        add_word(sdxl, token or told, rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return token or told
