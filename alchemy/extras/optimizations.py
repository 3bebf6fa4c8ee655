"""Options that make the UNet smaller or faster, and what is constant during a sampling.

prepare: fp8 weights (fp8.py) and compiled blocks (compile.py). cached_steps: keys and values of the
prompt and cast adapters, computed once per sampling.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Attention, attentions
from ..lora import LoRALayer, cast_adapters
from ..sdxl import SDXL
from .compile import compile_blocks
from .fp8 import store_fp8


def missing_for_fp8(device: torch.device, compile: bool = False) -> str | None:
    """Why the device cannot store weights in fp8 and what to do, or None."""
    if device.type == "mps":
        return "--fp8-base does not work on mps, where torch has no 8-bit floats: leave it out"
    # Triton has no e4m3 on older cards (pytorch issue 167082); without it, torch itself converts.
    if compile and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return (
            "--fp8-base with --compile needs a card of compute capability 8.9 or newer "
            "(RTX 40, L4, H100): leave out one of them"
        )
    return None


def prepare(sdxl: SDXL, fp8: bool = False, compile: bool = False) -> None:
    """Store the UNet of sdxl in fp8, compile its blocks, or both; also when it is read again.

    A layer is stored in fp8 as soon as it is read, so the whole is never in memory. Raises
    ValueError if the device cannot do it.
    """
    problem = missing_for_fp8(sdxl.device, compile) if fp8 else None
    if problem:
        raise ValueError(problem)

    def ready(module: nn.Module) -> None:
        if fp8:
            store_fp8(module)
        if compile:
            compile_blocks(module)

    sdxl.read = replace(sdxl.read, ready=ready)
    if "unet" in sdxl.loaded:
        ready(sdxl.unet)


def layer_state(layer: LoRALayer) -> tuple[Any, ...]:
    """All that the output of a linear layer depends on, apart from its input."""
    tensors = [(id(p), p._version) for p in layer.parameters()]
    scales = [(adapter.scale, adapter.alpha) for adapter in layer.lora.values()]
    return tensors, scales, layer.base_weight is None


def cached_project_kv(layer: Attention) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """layer.project_kv that recomputes only for another context tensor, or if anything changed.

    Nothing is kept while gradients are wanted.
    """
    project_kv = layer.project_kv
    kept_for, kept = None, None
    kept_context = None  # referenced, so that no other tensor can have its id

    def cached(context: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal kept_for, kept, kept_context
        if torch.is_grad_enabled():
            return project_kv(context)
        now = id(context), context._version, layer_state(layer.to_k), layer_state(layer.to_v)
        if now != kept_for:
            kept_for, kept, kept_context = now, project_kv(context), context
        return kept

    return cached


@contextmanager
def cache_prompt_kv(unet: nn.Module) -> Iterator[None]:
    """Inside, cross-attention computes keys and values once per prompt; bit-equal results."""
    cross_attentions = [m for name, m in attentions(unet).items() if name.endswith("attn2")]
    for layer in cross_attentions:
        layer.project_kv = cached_project_kv(layer)
    try:
        yield
    finally:
        for layer in cross_attentions:
            del layer.project_kv


def cached_steps(unet: nn.Module, steps: Iterable[Any]) -> Iterator[Any]:
    """Yield the Steps of a sampling; keys and values of the prompt, and the adapters in the dtype
    of the network, are computed once. Results are bit-equal.
    """
    with cache_prompt_kv(unet), cast_adapters(unet, unet.conv_in.weight.dtype):
        yield from steps
