"""Compile the UNet's blocks, each kind once for all its layers (regional compilation).

This takes seconds where compiling the whole network takes minutes.
"""

import importlib.util
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..attention import TransformerBlock
from ..blocks import ResnetBlock
from ..unet import UNet

# Variants of a kind of block: sizes, adapters, batches. Above torch's default of 8, a block would
# silently run uncompiled.
MAX_VARIANTS = 64


def missing(device: torch.device) -> str | None:
    """What torch.compile needs and does not find, or None."""
    if device.type == "cuda":
        compilers = [os.environ.get("CC", "cc"), "gcc", "clang"]
        has_triton = importlib.util.find_spec("triton") is not None
        found = has_triton and any(map(shutil.which, compilers))
        return None if found else "triton and a C compiler (gcc)"
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]
    return None if any(map(shutil.which, compilers)) else "a C++ compiler (g++)"


def compile_blocks(module: nn.Module) -> nn.Module:
    """Compile the transformer blocks and resnets of a UNet in place; other modules are unchanged.

    The compiler runs at the first call of a block, and again for other sizes. A block whose
    attention is recorded runs uncompiled. Raises ValueError if there is no compiler.
    """
    if not isinstance(module, UNet):
        return module
    tool = missing(module.conv_in.weight.device)
    if tool:
        raise ValueError(
            f"--compile needs {tool}, which was not found: install it, or leave out --compile"
        )
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, MAX_VARIANTS)
    config.optimize_ddp = False  # it would split the blocks, which are small already
    for kind in (TransformerBlock, ResnetBlock):
        compiled = torch.compile(kind.forward, dynamic=False)
        for block in module.modules():
            if isinstance(block, kind):
                block.forward = choose_forward(block, compiled)
    return module


def choose_forward(block: nn.Module, compiled: Callable) -> Callable:
    """The forward of a block: compiled, except while its attention is recorded."""
    attention = [getattr(block, name) for name in ("attn1", "attn2") if hasattr(block, name)]

    def forward(*inputs):
        is_recorded = any(layer.callbacks for layer in attention)
        return (type(block).forward if is_recorded else compiled)(block, *inputs)

    return forward


def report_compile_time(steps: Iterable[Any], log: Callable[[str], None]) -> Iterator[Any]:
    """Yield the steps; log how long compiling took, if the first took a second more than others."""
    seconds = []
    before = time.perf_counter()
    for step in steps:
        seconds.append(time.perf_counter() - before)
        yield step
        before = time.perf_counter()
    if len(seconds) < 2:
        return
    usual = statistics.median(seconds[1:])
    if seconds[0] - usual > 1:
        log(
            f"compiled in {seconds[0] - usual:.0f} s: the first step took {seconds[0]:.1f} s, "
            f"the others {usual:.3g} s"
        )
