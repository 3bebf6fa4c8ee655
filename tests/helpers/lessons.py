"""What the tests of training share: a tiny model with a LoRA, a model of one layer, photos and prompts without pictures and words."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import alchemy
from alchemy import dataset, lora
from alchemy.schedule import Schedule
from alchemy.sdxl import Conditioning
from alchemy.training import loss, train

SIZE = (
    32,
    32,
)  # below, self-attention has but one place to look at at the lowest level, and to_q and to_k no gradient
PROMPTS = ("a photo of a sks dog", "a photo of a dog")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def model(tiny):
    """model(dtype): the tiny checkpoint with a LoRA whose both halves are random, unless it is to be fresh."""

    def make(dtype=torch.float32, fresh=False, alpha=3.0, prediction="epsilon"):
        sdxl = alchemy.load(tiny, "cpu", dtype)
        sdxl.schedule = replace(sdxl.schedule, prediction=prediction)
        alchemy.add_lora(sdxl, 2, alpha)
        if not fresh:
            for i, layer in enumerate(lora.attention_layers(sdxl.unet).values()):
                layer.lora["default"].up.data = 0.1 * draw(layer.out_features, 2, seed=i).float()
        return sdxl

    return make


def told(sdxl):
    """{prompt: Conditioning}, drawn and not encoded: it takes no text encoder."""
    dtype = torch.promote_types(sdxl.dtype, torch.float32)
    return {
        p: Conditioning(
            draw(1, 77, 20, seed=i).to(dtype), draw(1, 10, seed=i + 9).to(dtype), torch.zeros(1, 6)
        )
        for i, p in enumerate(PROMPTS)
    }


def batch(count=3, dtype=torch.float64):
    ids = torch.tensor([[40.0 + i, 44, i, 4, *SIZE] for i in range(count)])
    return dataset.Batch(
        draw(count, 4, 8, 8).to(dtype),
        draw(count, 4, 8, 8, seed=1).to(dtype),
        torch.ones(count, 1, 8, 8, dtype=dtype),
        torch.tensor([3, 420, 981])[:count],
        ids,
        [PROMPTS[0]] * count,
    )


def encoded(count=2, std=0.3):
    """Photos as dataset.encode makes them."""
    return [
        dataset.TrainingImage(
            (
                (
                    draw(4, 10, 10, seed=i).float(),
                    torch.full((4, 10, 10), std),
                    torch.ones(1, 10, 10),
                ),
            ),
            (40, 40),
            PROMPTS[0],
        )
        for i in range(count)
    ]


def parameters(sdxl):
    return {name: p for name, p in sdxl.unet.named_parameters() if ".lora." in name}


def run(sdxl, state, steps, **options):
    """(step, loss) of each step; settings are small."""
    return list(
        train(
            sdxl,
            state,
            losses(sdxl, **options),
            steps=steps,
            accumulation=options.get("accumulation", 1),
            warmup=options.get("warmup", 0),
        )
    )


def losses(
    sdxl,
    photos=None,
    batch=1,
    accumulation=1,
    seed=0,
    class_prompt=PROMPTS[1],
    prior_weight=1.0,
    gamma=5.0,
    **_,
):
    """loss_of, as train.py makes it."""
    draw, prompts = (
        dataset.make_batcher(sdxl, photos or encoded(), SIZE, seed, batch, accumulation),
        told(sdxl),
    )
    return lambda step, part: loss(
        sdxl, draw(step, part), prompts, class_prompt, prior_weight, gamma
    )


class OneLayer(torch.nn.Module):
    """The least that can be trained, for what the network has no part in."""

    def __init__(self):
        super().__init__()
        self.layer = lora.LoRALinear(4, 4)
        self.layer.requires_grad_(False)
        lora.add_adapter(self.layer, "default", draw(2, 4).float(), draw(4, 2, seed=1).float(), 2)

    def forward(self, x, *_):
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


def small():
    torch.manual_seed(0)
    return SimpleNamespace(
        unet=OneLayer(),
        schedule=Schedule.from_config({}),
        vae_scale_factor=4,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


class Spoiled:
    """A UNet whose predictions are not finite at the calls of these numbers."""

    def __init__(self, unet, calls, value=float("nan")):
        self.unet, self.calls, self.value, self.count = unet, calls, value, 0

    def __call__(self, *inputs):
        self.count += 1
        out = self.unet(*inputs)
        return out * self.value if self.count in self.calls else out

    def modules(self):
        return self.unet.modules()

    def named_modules(self):
        return self.unet.named_modules()


def spoiled(sdxl, calls, value=float("nan")):
    return SimpleNamespace(
        unet=Spoiled(sdxl.unet, calls, value),
        schedule=sdxl.schedule,
        vae_scale_factor=sdxl.vae_scale_factor,
        device=sdxl.device,
        dtype=sdxl.dtype,
    )
