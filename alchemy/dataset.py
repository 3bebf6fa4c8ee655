"""A folder of photos to latents, each encoded once; and what one training sample is made of, as a function of (seed, step, sample).

A photo is scaled until it covers the training size and encoded whole. A sample is a crop of those latents, so the crop may differ
every time, and its place, which the UNet is told (Podell et al. 2023, 2.2), is the true one.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from . import images
from .sdxl import to_device


@dataclass(frozen=True)
class TrainingImage:
    """latents: (mean, std, weight), two of (4,h,w) and one of (1,h,w), which says how much each place counts; three more of the mirrored
    photo where mirroring is wanted. original: (H,W) before it was scaled."""

    latents: tuple
    original: tuple
    prompt: str


@dataclass(frozen=True)
class Batch:
    """x_0, eps (B,4,h,w), weight (B,1,h,w), t (B,) integers on the CPU, time_ids (B,6) float32, prompts: a list of B."""

    x_0: torch.Tensor
    eps: torch.Tensor
    weight: torch.Tensor
    t: torch.Tensor
    time_ids: torch.Tensor
    prompts: list


@torch.no_grad()
def encode(sdxl, path, size, prompt, mirror=False, mask=None):
    """One photo to latents on the CPU. size (H,W): of the crops that training will take from it. mask: PIL of mode L and of the photo's
    size, white where it counts in full (None: everywhere)."""
    picture = images.read(path)
    scale = max(size[0] / picture.height, size[1] / picture.width)
    h, w = (max(round(scale * side), least) for side, least in zip(picture.size[::-1], size))
    counts = Image.new("L", (w, h), 255) if mask is None else mask.resize((w, h), Image.BOX)
    scaled = Image.merge("RGBA", (*picture.resize((w, h), Image.LANCZOS).split(), counts))
    # Less than one latent is cut off, right and below, so that a crop's place counts from the photo's own corner, mirrored or not.
    views = [
        view.crop(
            (
                0,
                0,
                w // sdxl.vae_scale_factor * sdxl.vae_scale_factor,
                h // sdxl.vae_scale_factor * sdxl.vae_scale_factor,
            )
        )
        for view in ((scaled, ImageOps.mirror(scaled)) if mirror else (scaled,))
    ]
    latents = tuple(
        (
            *(part[0].cpu() for part in sdxl.vae.encode(images.to_tensor(view).to(sdxl.device))),
            F.avg_pool2d(
                torch.from_numpy(np.array(view)[None, :, :, 3]).float() / 255, sdxl.vae_scale_factor
            ),
        )
        for view in views
    )
    return TrainingImage(latents, picture.size[::-1], prompt)


def generator(*numbers):
    """A generator that is a function of these numbers alone: neighbours in them share nothing."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    )


def sample(photos, size, factor, T, seed, step, index):
    """Sample `index` of the whole run, drawn at `step`: (x_0, eps, weight, t, time_ids, prompt). Each photo comes once before one comes twice."""
    order = torch.randperm(len(photos), generator=generator(seed, 1, index // len(photos)))
    photo, rng = photos[order[index % len(photos)]], generator(seed, 2, step, index)
    parts = photo.latents[torch.randint(len(photo.latents), (), generator=rng)]
    h, w = size[0] // factor, size[1] // factor
    top, left = (
        int(torch.randint(room + 1, (), generator=rng))
        for room in (parts[0].shape[1] - h, parts[0].shape[2] - w)
    )
    mean, std, weight = (part[:, top : top + h, left : left + w] for part in parts)
    x_0 = mean + std * torch.randn(
        mean.shape, generator=rng
    )  # a fresh sample of the posterior each time
    eps, t = torch.randn(mean.shape, generator=rng), torch.randint(T, (), generator=rng)
    return (
        x_0,
        eps,
        weight,
        t,
        torch.tensor([*photo.original, top * factor, left * factor, *size], dtype=torch.float32),
        photo.prompt,
    )


def batch(photos, size, factor, T, seed, step, indices, device):
    """The samples of the indices as a Batch on the device."""
    *tensors, prompts = zip(*(sample(photos, size, factor, T, seed, step, i) for i in indices))
    x_0, eps, weight, t, time_ids = map(torch.stack, tensors)
    return Batch(
        *(to_device(x, device) for x in (x_0, eps, weight)),
        t,
        to_device(time_ids, device),
        list(prompts),
    )


def make_batcher(sdxl, photos, size, seed, count, accumulation=1, rank=0, world=1):
    """A function (step, part) to the Batch of `count` samples that belongs there; a step has `accumulation` parts, a part `world` batches."""

    def draw(step, part):
        first = ((step * accumulation + part) * world + rank) * count
        return batch(
            photos,
            size,
            sdxl.vae_scale_factor,
            len(sdxl.schedule.alpha_bar),
            seed,
            step,
            range(first, first + count),
            sdxl.device,
        )

    return draw
