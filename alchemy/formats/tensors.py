"""Open safetensors files; a message for every file that is not one."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import check_no_pipe, encodable
from .text import shorten

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


def names_in(paths: Iterable[str | Path]) -> dict[str, safe_open]:
    """{tensor name: the open file that holds it}; get_tensor reads one tensor at a time."""
    names = {}
    for file in map(open_safetensors, paths):
        names |= dict.fromkeys(file.keys(), file)
    return names


def first_names(names: Iterable[str], count: int = 3) -> str:
    """The first names of many, each shortened, for a message."""
    return ", ".join(shorten(name) for name in list(names)[:count])


def open_safetensors(path: str | Path, advice: str = "download it again") -> safe_open:
    """A safetensors file, open and mapped; no tensor is read yet.

    Raises ValueError that names the file and what is wrong: missing, a pickle, or incomplete, with
    the advice what to do then. A pickle is recognized, never read.
    """
    check_no_pipe(path)
    if encodable(str(path)) != str(path):
        raise ValueError(f"{path}: its name is not UTF-8, which safetensors needs; rename it")
    try:
        return safe_open(path, "pt")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        if is_pickle(Path(path)):
            raise ValueError(
                f"{path}: a pickle, which can run any code when it is read; "
                "only safetensors files are read here"
            ) from None
        reason = shorten(error)
        raise ValueError(f"{path}: not a whole safetensors file ({reason}); {advice}") from None


def is_pickle(path: Path) -> bool:
    """Whether a file that is not safetensors is a pickle, plain or in torch.save's zip archive."""
    with open(path, "rb") as file:
        start = file.read(2)
    plain = start[:1] == b"\x80" and start[1:] < b"\x06"  # the protocol's number, 2 to 5
    return path.suffix in PICKLES or start == b"PK" or plain


def read_tensor(file: safe_open, key: str) -> Tensor:
    """A tensor of a LoRA or an embedding as float32. Raises ValueError for numbers it cannot be."""
    tensor = file.get_tensor(key)
    # diffusers writes integer alphas; integer weights would be quantized ones.
    integer_alpha = key.endswith(".alpha") and tensor.dtype in (torch.int32, torch.int64)
    if not tensor.is_floating_point() and not integer_alpha:
        raise ValueError(f"{shorten(key)} is {tensor.dtype}, not floating point")
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(f"{shorten(key)} has values that are not finite; the file is damaged")
    return tensor
