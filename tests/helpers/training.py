"""Shared by the tests of training: a tiny model with a LoRA, a model of one layer, batches and
prompts without images and text, folders of photos, and a run that is interrupted."""

import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import alchemy
from alchemy import dataset, lora
from alchemy.methods.prior import teacher_batch
from alchemy.schedule import Schedule
from alchemy.sdxl import Conditioning
from alchemy.training import loss, train
from helpers.running import call, picture

# Smaller, and self-attention at the lowest level would have one position and no gradient.
SIZE = (32, 32)
PROMPTS = ("a photo of a sks dog", "a photo of a dog")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def model(tiny):
    """model(dtype): the tiny checkpoint with a LoRA, random in both factors unless fresh."""

    def make(dtype=torch.float32, fresh=False, alpha=3.0, prediction="epsilon"):
        sdxl = alchemy.load(tiny, "cpu", dtype)
        sdxl.schedule = replace(sdxl.schedule, prediction=prediction)
        alchemy.add_lora(sdxl, 2, alpha)
        if not fresh:
            for i, layer in enumerate(lora.attention_layers(sdxl.unet).values()):
                layer.lora["default"].up.data = 0.1 * draw(layer.out_features, 2, seed=i).float()
        return sdxl

    return make


def encoded_prompts(sdxl):
    """{prompt: Conditioning}, random and without a text encoder."""
    dtype = torch.promote_types(sdxl.dtype, torch.float32)
    prompts = {}
    for i, prompt in enumerate(PROMPTS):
        context, pooled = draw(1, 77, 20, seed=i), draw(1, 10, seed=i + 9)
        prompts[prompt] = Conditioning(context.to(dtype), pooled.to(dtype), torch.zeros(1, 6))
    return prompts


def make_batch(schedule, count=3, dtype=torch.float64, prompt=PROMPTS[0], offset=0.0, t=None):
    """A batch of random latents at timesteps 3, 420 and 981, every position counted."""
    x_0 = draw(3, 4, 8, 8).to(dtype)[:count] + offset
    eps = draw(3, 4, 8, 8, seed=1).to(dtype)[:count]
    t = torch.tensor([3, 420, 981])[:count]
    time_ids = torch.tensor([[40.0 + i, 44, i, 4, *SIZE] for i in range(count)])
    loss_mask = torch.ones(count, 1, 8, 8, dtype=dtype)
    target = schedule.target(x_0, eps, t)
    return dataset.Batch(x_0, eps, target, loss_mask, t, time_ids, [prompt] * count)


def encoded_photos(count=2, std=0.3):
    """Photos as dataset.encode_image makes them."""
    photos = []
    for i in range(count):
        view = draw(4, 10, 10, seed=i).float(), torch.full((4, 10, 10), std), torch.ones(1, 10, 10)
        photos.append(dataset.TrainingImage((view,), (40, 40), PROMPTS[0]))
    return photos


def parameters(sdxl):
    return {name: p for name, p in sdxl.unet.named_parameters() if ".lora." in name}


def make_get_loss(
    sdxl, batch=1, accumulation=1, seed=0, class_prompt=PROMPTS[1], prior_weight=1.0, **_
):
    """get_loss(step, micro_step) as train.py makes it, with a teacher batch as the prior."""
    get_batch = dataset.make_batcher(sdxl, encoded_photos(), SIZE, seed, batch, accumulation)
    prompts = encoded_prompts(sdxl)

    def get_loss(step, micro_step):
        one = get_batch(step, micro_step)
        prior = teacher_batch(sdxl, one, prompts, class_prompt) if class_prompt else None
        return loss(sdxl, one, prior, prompts, prior_weight)

    return get_loss


def run(sdxl, state, steps, **options):
    """[(step, loss)] of a small training run."""
    names = ("accumulation", "warmup", "autocast")
    training = {name: options[name] for name in names if name in options}
    return list(train(sdxl, state, make_get_loss(sdxl, **options), steps=steps, **training))


class OneLayer(torch.nn.Module):
    """The smallest trainable network, for tests that do not depend on the network."""

    def __init__(self):
        super().__init__()
        self.layer = lora.LoRALinear(4, 4)
        self.layer.requires_grad_(False)
        lora.add_adapter(self.layer, "default", draw(2, 4).float(), draw(4, 2, seed=1).float(), 2)

    def forward(self, x, *_):
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


def small(unet=None):
    torch.manual_seed(0)
    return SimpleNamespace(
        unet=unet or OneLayer(),
        schedule=Schedule.from_config({}),
        vae_scale_factor=4,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def spoiled(sdxl, calls, value=float("nan")):
    """The same with a UNet whose predictions are not finite at the calls of these numbers."""
    count = 0

    def unet(*inputs):
        nonlocal count
        count += 1
        prediction = sdxl.unet(*inputs)
        return prediction * value if count in calls else prediction

    return small(unet)


def captioned(folder, sizes=((40, 40), (24, 48), (48, 24), (40, 40)), table=True):
    """A folder of images of (H,W) with captions, in metadata.jsonl or in .txt files."""
    folder.mkdir()
    rows = []
    for k, (height, width) in enumerate(sizes):
        picture(height, width, k).save(folder / f"{k}.png")
        rows.append(json.dumps({"file_name": f"{k}.png", "text": f"a picture of {k}"}))
        if not table:
            (folder / f"{k}.txt").write_text(f"a picture\n of {k}\n")
    if table:
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n\n")
    return folder


def left_half(height, width):
    """A mask, white on the left."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : width // 2] = 255
    return Image.fromarray(pixels)


@pytest.fixture
def stopped(monkeypatch):
    """stopped(argv, signal, step, times): run a script; the signal comes while `step` computes."""

    def interrupt(argv, which=signal.SIGTERM, step=0, times=1):
        get_sample, left = dataset.get_sample, [times]

        def interrupting(*args):
            while args[5] == step and left[0]:
                left[0] -= 1
                signal.raise_signal(which)
            return get_sample(*args)

        with monkeypatch.context() as patch:
            patch.setattr(dataset, "get_sample", interrupting)
            return call(*argv)

    return interrupt


def same_tensors(first, second):
    """Whether two {name: tensor} are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
