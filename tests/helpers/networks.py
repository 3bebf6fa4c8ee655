"""Inputs of the reference UNets, small linear layers, and LoRAs with values that matter."""

from types import SimpleNamespace

import torch

from alchemy import lora

ORDER = ("latents", "t", "context", "pooled", "time_ids")
FLOATING = ("latents", "context", "pooled")  # t and time_ids keep their dtype


def unet_inputs(stored, call=0, dtype=torch.float64):
    """The UNet's five inputs from a reference file; copies."""
    given = stored.group(f"inputs/{call}/")
    return [given[k].to(dtype if k in FLOATING else given[k].dtype, copy=True) for k in ORDER]


def linear(c_in=5, c_out=7, dtype=torch.float64):
    torch.manual_seed(0)
    return lora.LoRALinear(c_in, c_out, dtype=dtype).requires_grad_(False)


def down_up(c_in=5, c_out=7, rank=2, seed=1, dtype=torch.float64):
    """Random down (rank, in) and up (out, rank)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rank, c_in), (c_out, rank)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def random_lora(net, rank=2, std=0.2):
    """Add a LoRA whose up is not zero; return its parameters."""
    parameters = lora.add_lora(SimpleNamespace(unet=net), rank)
    for seed, p in enumerate(parameters):
        p.data = std * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return parameters
