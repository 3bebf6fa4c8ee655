"""Safetensors files, open; what is none is named as what it is."""

from pathlib import Path

from safetensors import SafetensorError, safe_open


EMBEDDING = ("clip_l", "clip_g")  # what an SDXL embedding's file holds


def names_in(paths):
    """{tensor name: the open file that holds it}; a tensor is read by get_tensor, one at a time."""
    return {key: file for file in map(open_safetensors, paths) for key in file.keys()}


def open_safetensors(path, advice="download it again"):
    """A safetensors file, open. Raises ValueError that names the file and what is wrong with it: missing, a pickle, truncated (with advice)."""
    try:
        return safe_open(path, "pt")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        with open(path, "rb") as f:
            start = f.read(2)
        if (
            Path(path).suffix in (".ckpt", ".pt", ".pth", ".bin", ".pkl")
            or start == b"PK"
            or start[:1] == b"\x80"
            and start[1:] < b"\x06"
        ):
            raise ValueError(
                f"{path}: a pickle, which can run any code when it is read; only safetensors files are read here"
            ) from None
        raise ValueError(f"{path}: not a whole safetensors file ({error}); {advice}") from None
