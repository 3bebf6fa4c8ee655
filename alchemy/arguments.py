"""Checks of the arguments of the public functions: what is wrong with one is said in one line.

    @checked
    def text_to_image(sdxl, prompt, *, steps=None, ...)

RULES says by its name what an argument has to be. None passes where the type hint allows it.
"""

import inspect
import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from numbers import Integral, Real
from os import PathLike
from typing import Any, TypeVar, get_args

Function = TypeVar("Function", bound=Callable[..., Any])
Rule = Callable[[Any], bool]


def is_path(value: Any) -> bool:
    return isinstance(value, (str, PathLike)) and bool(str(value).strip())


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return len(value) == 2 and all(is_whole(side) and side > 0 for side in value)
    return is_whole(value) and value > 0


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_seed(value: Any) -> bool:
    return is_whole(value) and 0 <= value < 2**63


def is_model(value: Any) -> bool:
    return not isinstance(value, (str, PathLike, type(None)))


def has_parts(value: Any) -> bool:
    return hasattr(value, "parts")


def is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def is_sampler(value: Any) -> bool:
    from .samplers import Sampler

    return isinstance(value, (str, Sampler))


def are_photos(value: Any) -> bool:
    if is_path(value):
        return True
    if isinstance(value, (list, tuple)):
        return all(is_path(photo) for photo in value)
    return isinstance(value, Iterable) and not isinstance(value, str)  # folder.glob("*.jpg")


def is_shape(value: Any) -> bool:
    return is_sequence(value) and all(is_whole(side) and side > 0 for side in value)


def are_seeds(value: Any) -> bool:
    """Whole numbers, or what stands for a torch.Generator."""
    if not is_sequence(value) or not len(value):
        return False
    return not any(isinstance(item, (str, float, bool)) for item in value)


def is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def whole(low: int, high: int) -> tuple[Rule, str]:
    """A rule for a whole number in [low, high]."""
    return lambda x: is_whole(x) and low <= x <= high, f"a whole number from {low} to {high}"


def number(low: float, high: float, above: bool = False) -> tuple[Rule, str]:
    """A rule for a number in [low, high], or in (low, high] with above=True."""

    def holds(x: Any) -> bool:
        return is_number(x) and low <= x <= high and not (above and x == low)

    limit = f"above {low} and at most" if above else f"from {low} to"
    return holds, f"a number {limit} {high}"


TEXT = (is_text, "one text; call once per prompt")
WORD = (is_word, "a word, not empty")
PATH = (is_path, "a path")
CONDITIONING = (has_parts, "a Conditioning; sdxl.encode_prompt([...]) returns one")
SHARE = number(0, 1)

# {name: (whether a value is right, what it has to be)}
RULES: dict[str, tuple[Rule, str]] = {
    "sdxl": (is_model, "a checkpoint; alchemy.load(...) returns one"),
    "model": (is_model, "a network or a checkpoint; alchemy.load(...) returns one"),
    "noise": (is_tensor, "a tensor (B, 4, H, W); alchemy.noise(...) returns one"),
    "conditioning": CONDITIONING,
    "unconditional": CONDITIONING,
    "prompt": TEXT,
    "negative_prompt": TEXT,
    "word": WORD,
    "class_word": WORD,
    "token": WORD,
    "path": PATH,
    "folder": PATH,
    "source": (is_path, "the folder, file or Hub id of a checkpoint"),
    "photos": (are_photos, "a folder, or a list of paths of images"),
    "size": (is_size, "a whole number of pixels, or (height, width)"),
    "seed": (is_seed, "a whole number from 0 on, or None to draw one"),
    "seeds": (are_seeds, "a list of whole numbers from 0 on, or of torch.Generators"),
    "shape": (is_shape, "the four whole numbers (B, 4, H, W) of latents"),
    "sampler": (is_sampler, "the name of a sampler, or a Sampler"),
    "spacing": (is_text, "leading, trailing or linspace"),
    "steps": whole(1, 10**6),
    "rank": whole(1, 4096),
    "walk_iterations": whole(0, 1000),
    "strength": number(0, 1, above=True),
    "guidance": number(0, 10**6),
    "learning_rate": number(0, 1, above=True),
    "alpha": number(0, 10**6, above=True),
    "scale": number(-(10**6), 10**6),
    "eta": SHARE,
    "threshold": SHARE,
    "dilate": SHARE,
    "noise_level": SHARE,
}


def check(name: str, value: Any) -> None:
    """Raise ValueError if a value breaks the rule of its name."""
    holds, wanted = RULES[name]
    if not holds(value):
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"a {type(value).__name__}"
        raise ValueError(f"{name} is {shown}; it must be {wanted}")


def checked(function: Function) -> Function:
    """The function, with its arguments checked when it is called, that of a generator too.

    An argument that it does not have is a TypeError, with the name here of diffusers' argument.
    """
    signature = inspect.signature(function)
    ruled = {}
    for name, parameter in signature.parameters.items():
        if name in RULES:
            ruled[name] = type(None) in get_args(parameter.annotation)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            hint = hint_for(signature, kwargs)
            raise TypeError(f"{function.__name__}(): {error}{hint}") from None
        for name, value in bound.arguments.items():
            if name in ruled and not (value is None and ruled[name]):
                check(name, value)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def hint_for(signature: inspect.Signature, arguments: dict[str, Any]) -> str:
    """What an argument of another tool is called here: "; here it is guidance"; or ""."""
    from .extras import other_tools

    known = {f"--{name.replace('_', '-')}" for name in signature.parameters}
    for name in arguments.keys() - signature.parameters.keys():
        here = other_tools.flag_here(name.replace("_", "-"), known)
        if here.startswith("--"):
            return f"; here it is {here.split()[0].lstrip('-').replace('-', '_')}"
    return ""


def resolve_seed(seed: int | None) -> int:
    """The seed; one that is drawn for None."""
    return secrets.randbits(31) if seed is None else int(seed)
