"""Photos to latents, each encoded once; and training samples, determined by (seed, step, index).

A photo is scaled until it covers the training size and encoded whole. A sample is a crop of those
latents, so the crop may differ every time, and the crop's place, which the UNet receives as its
time ids (Podell et al. 2023, 2.2), is the true one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from . import images
from .sdxl import SDXL, Conditioning, to_device


@dataclass(frozen=True)
class TrainingImage:
    """One encoded photo, on the CPU.

    views: (mean, std, loss_mask) of the photo, and of the mirrored photo where mirroring is on:
        the posterior's mean and std (4,h,w), and the weight of each latent (1,h,w) in the loss.
    original: (H,W) in pixels before scaling.
    """

    views: tuple[tuple[Tensor, Tensor, Tensor], ...]
    original: tuple[int, int]
    prompt: str | None


@dataclass(frozen=True)
class Batch:
    """B training samples, each with its own target and loss mask.

    x_0, eps, target: (B,4,h,w); loss_mask: (B,1,h,w); t: (B,) integers on the CPU;
    time_ids: (B,6) float32; prompts: B keys of the encoded prompts.
    """

    x_0: Tensor
    eps: Tensor
    target: Tensor
    loss_mask: Tensor
    t: Tensor
    time_ids: Tensor
    prompts: list[str | None]

    def at_timestep(self, schedule, t: int) -> "Batch":
        """The same samples, all at timestep t."""
        t = torch.full_like(self.t, t)
        return replace(self, t=t, target=schedule.target(self.x_0, self.eps, t))


GetBatch = Callable[[int, int], Batch]  # (step, micro_step) -> Batch


def concat(first: Batch, second: Batch) -> Batch:
    """The samples of both, in this order."""
    joined = {}
    for field in fields(Batch):
        a, b = getattr(first, field.name), getattr(second, field.name)
        joined[field.name] = a + b if isinstance(a, list) else torch.cat([a, b])
    return Batch(**joined)


@torch.no_grad()
def encode_image(
    sdxl: SDXL,
    path: str | Path,
    size: tuple[int, int],
    prompt: str | None,
    mirror: bool = False,
    mask: Image.Image | None = None,
) -> TrainingImage:
    """Encode one photo. size: (H,W) of the crops that training will take from it.

    mask: PIL of mode "L" and of the photo's size, white where the loss counts in full (None:
    everywhere).
    """
    photo = images.read(path)
    f = sdxl.vae_scale_factor
    scale = max(size[0] / photo.height, size[1] / photo.width)
    height = max(round(scale * photo.height), size[0])
    width = max(round(scale * photo.width), size[1])
    if mask is None:
        mask = Image.new("L", (width, height), 255)
    else:
        mask = mask.resize((width, height), Image.BOX)
    pair = (photo.resize((width, height), Image.LANCZOS), mask)
    pairs = [pair]
    if mirror:
        pairs.append(tuple(ImageOps.mirror(image) for image in pair))

    # Cut the remainder of less than one latent right and below (after mirroring), so that the
    # place of a crop counts from the corner of what is seen.
    box = (0, 0, width // f * f, height // f * f)
    views = []
    for scaled, scaled_mask in pairs:
        pixels = images.to_tensor(scaled.crop(box)).to(sdxl.device)
        mean, std = sdxl.vae.encode(pixels)
        weights = torch.from_numpy(np.array(scaled_mask.crop(box))[None]).float() / 255
        views.append((mean[0].cpu(), std[0].cpu(), F.avg_pool2d(weights, f)))
    return TrainingImage(tuple(views), (photo.height, photo.width), prompt)


def encode_prompts(
    sdxl: SDXL, prompts: Sequence[str], size: tuple[int, int]
) -> dict[str | None, Conditioning]:
    """{prompt: Conditioning of one} on the CPU, where thousands have room; None is included."""
    encoded = {}
    for prompt in (*prompts, None):
        parts = sdxl.encode_prompt([prompt], size).parts()
        encoded[prompt] = Conditioning(*(part.cpu() for part in parts))
    return encoded


class EncodeEveryStep:
    """encode[prompt] is its Conditioning, encoded anew each time: for runs that train a text
    encoder or its embeddings, so that gradients reach them."""

    def __init__(self, sdxl: SDXL, size: tuple[int, int]):
        self.sdxl, self.size = sdxl, size

    def __getitem__(self, prompt: str | None) -> Conditioning:
        return self.sdxl.encode_prompt([prompt], self.size)


def generator(*numbers: int) -> torch.Generator:
    """A generator determined by these numbers; neighbours are independent."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def get_sample(
    photos: Sequence[TrainingImage],
    size: tuple[int, int],
    factor: int,
    num_timesteps: int,
    seed: int,
    step: int,
    index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, str | None]:
    """Sample `index` of the whole run, drawn at `step`.

    Returns (x_0, eps, loss_mask, t, time_ids, prompt). Every photo is used once before one is
    used twice. factor: pixels per latent along a side.
    """
    order = torch.randperm(len(photos), generator=generator(seed, 1, index // len(photos)))
    photo = photos[order[index % len(photos)]]
    rng = generator(seed, 2, step, index)

    # Choose the view and the crop.
    view = photo.views[torch.randint(len(photo.views), (), generator=rng)]
    h, w = size[0] // factor, size[1] // factor
    top = int(torch.randint(view[0].shape[1] - h + 1, (), generator=rng))
    left = int(torch.randint(view[0].shape[2] - w + 1, (), generator=rng))
    mean, std, loss_mask = (part[:, top : top + h, left : left + w] for part in view)

    # A fresh sample of the posterior each time, then the noise and the timestep.
    x_0 = mean + std * torch.randn(mean.shape, generator=rng)
    eps = torch.randn(mean.shape, generator=rng)
    t = torch.randint(num_timesteps, (), generator=rng)
    time_ids = torch.tensor([*photo.original, top * factor, left * factor, *size]).float()
    return x_0, eps, loss_mask, t, time_ids, photo.prompt


def make_batcher(
    sdxl: SDXL,
    photos: Sequence[TrainingImage],
    size: tuple[int, int],
    seed: int,
    batch_size: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
) -> GetBatch:
    """get_batch(step, micro_step) of this rank: batch_size samples on the device.

    A step has `accumulation` micro-steps, and a micro-step `world` batches; together they are the
    samples that one process with a larger batch would see.
    """
    f, num_timesteps = sdxl.vae_scale_factor, len(sdxl.schedule.alpha_bar)

    def get_batch(step: int, micro_step: int) -> Batch:
        first = ((step * accumulation + micro_step) * world + rank) * batch_size
        samples = []
        for index in range(first, first + batch_size):
            samples.append(get_sample(photos, size, f, num_timesteps, seed, step, index))
        *tensors, prompts = zip(*samples, strict=True)
        x_0, eps, loss_mask, t, time_ids = (torch.stack(column) for column in tensors)
        x_0, eps = to_device(x_0, sdxl.device), to_device(eps, sdxl.device)
        return Batch(
            x_0,
            eps,
            sdxl.schedule.target(x_0, eps, t),
            to_device(loss_mask, sdxl.device),
            t,
            to_device(time_ids, sdxl.device),
            list(prompts),
        )

    return get_batch
