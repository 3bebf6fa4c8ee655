"""Count the most bytes that SDXL's full-size networks take beside their weights, without a GPU.

    python tests/bench/peak_bytes.py          # the figures of alchemy/extras/memory.py, in GB
    python tests/bench/peak_bytes.py readme   # its estimates: the rows of the README's table

Everything runs on torch's meta device, in bfloat16, with attention as a fused kernel keeps it.
"""

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[index]) for index in (1, 2)]
from helpers.counting import peak, run_backward  # noqa: E402

from alchemy import lora, sampling  # noqa: E402
from alchemy.dataset import Batch  # noqa: E402
from alchemy.extras import memory  # noqa: E402
from alchemy.extras.optimizations import cached_steps  # noqa: E402
from alchemy.formats.checkpoint import BASE, CONFIGS, build_on_meta  # noqa: E402
from alchemy.schedule import Schedule  # noqa: E402
from alchemy.sdxl import Conditioning  # noqa: E402
from alchemy.segmentation import AttentionMaps  # noqa: E402
from alchemy.training import denoising_loss  # noqa: E402

DTYPE, RANK = torch.bfloat16, 16
README = {  # row of the README's table: flags of train.py beside its defaults
    "generating an image": {"method": None},
    "LoRA of rank 16, with prior preservation": {},
    "the same with `--checkpointing`": {"checkpointing": True},
    "... and `--prior-weight 0 --preview-every 0`": {
        "checkpointing": True,
        "prior_weight": 0,
        "preview_every": 0,
    },
}


def network(name: str, dtype: torch.dtype = DTYPE) -> torch.nn.Module:
    config = CONFIGS[name].from_config(BASE[name])
    return build_on_meta(name, config).to(dtype).requires_grad_(False)


def model(rank: int = 0, dtype: torch.dtype = DTYPE) -> SimpleNamespace:
    """What stands for an SDXL in the loops: its UNet, with a LoRA if rank is not 0."""
    unet, schedule = network("unet", dtype), Schedule.from_config({})
    sdxl = SimpleNamespace(unet=unet, schedule=schedule, device=torch.device("meta"), dtype=DTYPE)
    if rank:
        lora.add_lora(sdxl, rank)
    return sdxl


def conditioning() -> Conditioning:
    """Of one prompt."""
    with torch.device("meta"):
        context, pooled = torch.empty(1, 77, 2048, dtype=DTYPE), torch.empty(1, 1280, dtype=DTYPE)
        return Conditioning(context, pooled, torch.empty(1, 6))


class Encoded(dict):
    """Prompts that are encoded when they are asked for, with gradients to their embeddings."""

    def __init__(self):
        super().__init__()
        self.encoders = [network("text_encoder"), network("text_encoder_2")]
        for encoder in self.encoders:
            embedding = encoder.get_submodule("text_model.embeddings.token_embedding")
            embedding.register_forward_hook(lambda *args: args[-1].requires_grad_())

    def __missing__(self, prompt: str) -> Conditioning:
        ids = torch.zeros(1, 77, dtype=torch.long, device="meta")
        (first, _), (second, pooled) = (encoder(ids) for encoder in self.encoders)
        return Conditioning(torch.cat([first, second], -1), pooled, conditioning().time_ids)


def latents(height: int, width: int, batch: int = 1) -> torch.Tensor:
    return torch.empty(batch, 4, height // 8, width // 8, device="meta")


@torch.no_grad()
def decode(height: int, width: int) -> float:
    """GB of decoding an image."""
    vae, x = network("vae"), latents(height, width)
    return peak(lambda: vae.decode(x)) / 1e9


@torch.no_grad()
def denoise(height: int, width: int, rank: int = 0, record: bool = False) -> float:
    """GB of two guided steps with keys, values and adapters cached; record: a word's attention."""
    sdxl, x = model(rank), latents(height, width)
    steps = sampling.denoise(sdxl, x, conditioning(), conditioning(), steps=2)
    maps = AttentionMaps(sdxl.unet, [5], x.shape[-2:])
    steps = maps.follow(steps) if record else steps
    return peak(lambda: list(cached_steps(sdxl.unet, steps))) / 1e9


def train_step(method: str, images: int, checkpointing: bool) -> float:
    """GB of activations and gradients of a training step on so many images at 1024 x 1024."""
    is_full = method == "full"
    sdxl = model(RANK if method == "lora" else 0, torch.float32 if is_full else DTYPE)
    for name, parameter in sdxl.unet.named_parameters():
        parameter.requires_grad_(is_full or ".lora." in name)
    sdxl.unet.checkpointing = checkpointing
    names = [f"image {index}" for index in range(images)]
    prompts = Encoded() if method == "textual-inversion" else dict.fromkeys(names, conditioning())
    x, t = latents(1024, 1024, images), torch.zeros(images, dtype=torch.long)
    batch = Batch(x, x, x, x[:, :1], t, torch.empty(images, 6, device="meta"), names)

    def step():
        with lora.cast_adapters(sdxl.unet, DTYPE):
            run_backward(denoising_loss(sdxl, batch, prompts).mean())

    return peak(step, DTYPE if is_full else None) / 1e9


def readme_rows() -> list[str]:
    """The estimates of the README's table, in Markdown."""
    sdxl = SimpleNamespace(defaults={"size": 1024}, size=(1024, 1024), dtype=DTYPE)
    flags = dict(size=None, batch=1, rank=RANK, captions=False, text_encoders=False)
    flags |= dict(method="lora", prior_weight=1.0, preview_every=100, checkpointing=False)
    rows = []
    for title, changes in README.items():
        sizes = []
        for fp8 in (False, True):
            args = Namespace(**flags | changes, fp8_base=fp8)
            sizes.append(f"{memory.estimate(args, sdxl) / memory.GB:.1f}")
        rows.append(f"| {title} | {sizes[0]} | {sizes[1]} |")
    return rows


def main() -> None:
    if sys.argv[1:] == ["readme"]:
        print(*readme_rows(), sep="\n")
        return
    for side in (1024, 2048):
        print(f"decode {side} x {side:<34} {decode(side, side):6.3f}", flush=True)
    for size in ((1024, 1024), (1024, 2048)):
        for name, options in (
            ("", {}),
            (" a LoRA", {"rank": RANK}),
            (" recorded", {"record": True}),
        ):
            what = f"guided steps at {size[0]} x {size[1]}{name}"
            print(f"{what:<48} {denoise(*size, **options):6.3f}", flush=True)
    for method in ("lora", "textual-inversion", "full"):
        for checkpointing in (False, True):
            first, both = (train_step(method, images, checkpointing) for images in (1, 2))
            what = f"{method}{', checkpointing' * checkpointing}: first, further image"
            print(f"{what:<48} {first:6.3f} {both - first:6.3f}", flush=True)


if __name__ == "__main__":
    main()
