"""Count the GPU kernels of SDXL's UNet at full size, without a GPU.

    python tests/bench/kernel_counts.py

The network runs on torch's meta device; each operator that is not a view or an allocation counts
as one kernel, fused attention as one in each direction, and a foreach operator as one per 64
tensors. diffusers with peft is counted beside ours where both are installed.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from alchemy import lora  # noqa: E402
from alchemy.extras.optimizations import cache_prompt_kv  # noqa: E402
from alchemy.unet import UNet  # noqa: E402

DTYPE = torch.bfloat16
TENSORS_PER_LAUNCH = 64  # of a foreach copy: ATen/native/cuda/MultiTensorApply.cuh, depth 2
# Operators that launch nothing, apart from those whose schema says that they return a view.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "_unsafe_view", "detach", "new_empty"}


class FusedAttention(torch.autograd.Function):
    """One operator forward and one backward, in place of scaled dot product attention."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.neg(q)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        return torch.neg(q), torch.empty_like(k), torch.empty_like(v)


class Fuse(TorchFunctionMode):
    """The meta device would split attention into its steps."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            named = [kwargs[name] for name in ("query", "key", "value") if name in kwargs]
            return FusedAttention.apply(*args[:3], *named)
        return func(*args, **kwargs)


class KernelCount(TorchDispatchMode):
    """`kernels`: a Counter by name of the operator."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler at the first call, which takes seconds

    def __init__(self):
        super().__init__()
        self.kernels = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if name.startswith("_foreach"):
            self.kernels[name] += math.ceil(len(args[0]) / TENSORS_PER_LAUNCH)
        elif not is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def count(function: Callable[[], object]) -> Counter:
    with Fuse(), KernelCount() as counter:
        function()
    return counter.kernels


def inputs(batch: int = 2) -> list[torch.Tensor]:
    """The UNet's inputs at 1024 x 1024."""
    with torch.device("meta"):
        context = torch.empty(batch, 77, 2048, dtype=DTYPE)
        pooled = torch.empty(batch, 1280, dtype=DTYPE)
        return [
            torch.empty(batch, 4, 128, 128),
            torch.empty(batch),
            context,
            pooled,
            torch.empty(batch, 6),
        ]


def our_unet(rank: int = 0) -> UNet:
    """SDXL's UNet on the meta device, with a LoRA of that rank if it is not 0."""
    with torch.device("meta"):
        net = UNet().to(DTYPE).requires_grad_(False)
    if rank:
        for layer in lora.attention_layers(net).values():
            down = torch.empty(rank, layer.in_features, device="meta")
            up = torch.empty(layer.out_features, rank, device="meta")
            lora.add_adapter(layer, "default", down, up, rank)
    return net


def sampling_forward(rank: int = 0) -> Counter:
    """One of the later forwards of a sampling: keys, values and adapters are cached."""
    net, given = our_unet(rank), inputs()
    with torch.no_grad(), cache_prompt_kv(net), lora.cast_adapters(net, DTYPE):
        net(*given)
        return count(lambda: net(*given))


def lora_step(rank: int = 16) -> Counter:
    """Cast the adapters, one forward and backward of the UNet; without the optimizer."""
    net, given = our_unet(rank), inputs()

    def step():
        with lora.cast_adapters(net, DTYPE):
            net(*given).square().mean().backward()

    return count(step)


def diffusers_counts() -> list[tuple[str, int]]:
    """The same of diffusers with peft, eager, as its training script runs it; [] without them."""
    try:
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig
    except ImportError:
        return []
    config = Path(__file__).resolve().parents[2] / "weights" / "mini" / "unet" / "config.json"
    full = dict(
        block_out_channels=[320, 640, 1280],
        attention_head_dim=[5, 10, 20],
        transformer_layers_per_block=[1, 2, 10],
        cross_attention_dim=2048,
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        layers_per_block=2,
        norm_num_groups=32,
    )
    with torch.device("meta"):
        net = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config) | full).to(
            DTYPE
        )
    net.requires_grad_(False)
    latents, t, context, pooled, time_ids = inputs()

    def forward():
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return net(latents.to(DTYPE), t, context, added_cond_kwargs=added).sample

    with torch.no_grad():
        rows = [("diffusers, forward", count(forward).total())]
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    with torch.device("meta"):
        net.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    with torch.no_grad():
        rows.append(("diffusers with peft, forward with a LoRA", count(forward).total()))
    step = count(lambda: forward().float().square().mean().backward()).total()
    return [*rows, ("diffusers with peft, LoRA step without autocast", step)]


def main() -> None:
    rows = [
        ("ours, forward with cached keys and values", sampling_forward().total()),
        ("ours, the same with a LoRA beside the weights", sampling_forward(16).total()),
        ("ours, LoRA step", lora_step().total()),
        *diffusers_counts(),
    ]
    for name, kernels in rows:
        print(f"{name:<52} {kernels:>7}")


if __name__ == "__main__":
    main()
