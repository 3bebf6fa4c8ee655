"""The UNet's blocks compiled, each kind once for all of its layers (regional compilation): seconds where the whole takes minutes."""

import importlib.util
import os
import shutil
import statistics
import time

import torch

from ..attention import TransformerBlock
from ..blocks import ResnetBlock
from ..unet import UNet

VARIANTS = (
    64  # of a kind of block: sizes, adapters, pictures; past torch's own 8, it would run uncompiled
)


def missing(device):
    """What torch.compile needs and is not here, or None: a C++ compiler, and for CUDA triton and a C compiler."""
    if device.type == "cuda":
        there = importlib.util.find_spec("triton") and any(
            map(shutil.which, [os.environ.get("CC", "cc"), "gcc", "clang"])
        )
        return None if there else "triton and a C compiler (gcc)"
    return (
        None
        if any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]))
        else "a C++ compiler (g++)"
    )


def compiled(module):
    """Compile the transformer blocks and the resnets of a UNet in place; its names stay. Anything but a UNet stays as it is.

    The compiler runs when a block is first called, and again for other sizes. A block whose attention is watched runs as it is written.
    Raises ValueError where there is no compiler.
    """
    if isinstance(module, UNet):
        if lacking := missing(module.conv_in.weight.device):
            raise ValueError(
                f"--compile needs {lacking}, which is not here: install it, or leave out --compile"
            )
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, VARIANTS)
        torch._dynamo.config.optimize_ddp = False  # would take a block apart where its parameters fill a bucket: it is small enough as it is
        for kind in (TransformerBlock, ResnetBlock):
            quick = torch.compile(kind.forward, dynamic=False)
            for block in (m for m in module.modules() if isinstance(m, kind)):
                block.forward = choosing(block, quick)
    return module


def choosing(block, quick):
    """The forward of a block: the quick one of its kind, or, where it is watched, the one that is written there."""
    layers = [getattr(block, name) for name in ("attn1", "attn2") if hasattr(block, name)]

    def forward(*inputs):
        return (type(block).forward if any(layer.watch for layer in layers) else quick)(
            block, *inputs
        )

    return forward


def timed(steps, say):
    """Yield the steps; at the end say, if the first took longer by a second or more, how long that was: then something was compiled."""
    seconds, before = [], time.perf_counter()
    for step in steps:
        seconds.append(time.perf_counter() - before)
        yield step
        before = time.perf_counter()
    if len(seconds) > 1 and seconds[0] - statistics.median(seconds[1:]) > 1:
        say(
            f"compiled in {seconds[0] - statistics.median(seconds[1:]):.0f} s: the first step took {seconds[0]:.1f} s, "
            f"the others {statistics.median(seconds[1:]):.3g} s"
        )
