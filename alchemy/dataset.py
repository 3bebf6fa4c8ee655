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
from .images import Size
from .schedule import Schedule
from .sdxl import SDXL, Conditioning, to_device

View = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class TrainingImage:
    """One encoded photo, on the CPU.

    views: (mean, std, loss_mask) of the photo, and of the mirrored photo where mirroring is on:
        the posterior's mean and std (4,h,w), and the weight of each latent (1,h,w) in the loss.
    original: (H,W) in pixels before scaling.
    """

    views: tuple[View, ...]
    original: Size
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

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; the timesteps stay on the CPU, where the schedule is."""
        moved = {}
        for name in ("x_0", "eps", "target", "loss_mask", "time_ids"):
            moved[name] = to_device(getattr(self, name), device)
        return replace(self, **moved)


GetBatch = Callable[[int, int], Batch]  # (step, micro_step) -> Batch


def concat(*batches: Batch) -> Batch:
    """The samples of all, in this order."""
    joined = {}
    for field in fields(Batch):
        parts = [getattr(batch, field.name) for batch in batches]
        if field.name == "prompts":
            joined[field.name] = sum(parts, [])
        else:
            joined[field.name] = torch.cat(parts)
    return Batch(**joined)


@torch.no_grad()
def encode_image(
    sdxl: SDXL,
    path: str | Path,
    size: Size,
    prompt: str | None,
    mirror: bool = False,
    mask: Image.Image | None = None,
) -> TrainingImage:
    """Encode one photo. size: (H,W) of the crops that training will take from it.

    mask: PIL of mode "L" and of the photo's size, white where the loss counts in full (None:
    everywhere).
    """
    photo = images.read(path)
    original = photo.height, photo.width
    scale = max(size[0] / photo.height, size[1] / photo.width)
    height = max(round(scale * photo.height), size[0])
    width = max(round(scale * photo.width), size[1])
    photo = photo.resize((width, height), Image.LANCZOS)
    if mask is None:
        mask = Image.new("L", (width, height), 255)
    mask = mask.resize((width, height), Image.BOX)

    views = [encode_view(sdxl, photo, mask)]
    if mirror:
        views.append(encode_view(sdxl, ImageOps.mirror(photo), ImageOps.mirror(mask)))
    return TrainingImage(tuple(views), original, prompt)


def encode_view(sdxl: SDXL, photo: Image.Image, mask: Image.Image) -> View:
    """(mean, std, loss_mask) of a photo and its mask, on the CPU."""
    # Cut the remainder of less than one latent right and below, so that the place of a crop counts
    # from the corner of what is seen.
    f = sdxl.vae_scale_factor
    box = (0, 0, photo.width // f * f, photo.height // f * f)
    pixels = images.to_tensor(photo.crop(box))
    mean, std = sdxl.vae.encode(pixels.to(sdxl.device))
    weights = images.mask_to_tensor(mask.crop(box))
    loss_mask = F.avg_pool2d(weights[None], f)
    return mean[0].cpu(), std[0].cpu(), loss_mask


def encode_prompts(
    sdxl: SDXL, prompts: Sequence[str], size: Size
) -> dict[str | None, Conditioning]:
    """{prompt: Conditioning of one} on the CPU, where thousands have room; None is included."""
    encoded = {}
    for prompt in (*prompts, None):
        encoded[prompt] = sdxl.encode_prompt([prompt], size).to("cpu")
    return encoded


class EncodeEveryStep:
    """encode[prompt] is its Conditioning, encoded anew each time: for runs that train a text
    encoder or its embeddings, so that gradients reach them."""

    def __init__(self, sdxl: SDXL, size: Size):
        self.sdxl = sdxl
        self.size = size

    def __getitem__(self, prompt: str | None) -> Conditioning:
        return self.sdxl.encode_prompt([prompt], self.size)


def generator(*numbers: int) -> torch.Generator:
    """A generator determined by these numbers; neighbours are independent."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> 1))


def get_sample(
    photos: Sequence[TrainingImage],
    schedule: Schedule,
    size: Size,
    factor: int,
    seed: int,
    step: int,
    index: int,
) -> Batch:
    """Sample `index` of the whole run, drawn at `step`: a Batch of one, on the CPU.

    Every photo is used once before one is used twice. factor: pixels per latent along a side.
    """
    epoch, position = divmod(index, len(photos))
    order = torch.randperm(len(photos), generator=generator(seed, 1, epoch))
    photo = photos[order[position]]
    rng = generator(seed, 2, step, index)

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=rng))

    # Choose the view and the crop.
    view = photo.views[draw(len(photo.views))]
    _, height, width = view[0].shape
    h, w = size[0] // factor, size[1] // factor
    top = draw(height - h + 1)
    left = draw(width - w + 1)
    rows, columns = slice(top, top + h), slice(left, left + w)
    mean, std, loss_mask = (part[None, :, rows, columns] for part in view)

    # A fresh sample of the posterior each time, then the noise and the timestep.
    x_0 = mean + std * torch.randn(mean.shape, generator=rng)
    eps = torch.randn(mean.shape, generator=rng)
    t = torch.tensor([draw(len(schedule.alpha_bar))])
    time_ids = [*photo.original, top * factor, left * factor, *size]
    time_ids = torch.tensor([time_ids], dtype=torch.float32)
    target = schedule.target(x_0, eps, t)
    return Batch(x_0, eps, target, loss_mask, t, time_ids, [photo.prompt])


def make_batcher(
    sdxl: SDXL,
    photos: Sequence[TrainingImage],
    size: Size,
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

    def get_batch(step: int, micro_step: int) -> Batch:
        first = ((step * accumulation + micro_step) * world + rank) * batch_size
        samples = []
        for index in range(first, first + batch_size):
            sample = get_sample(
                photos, sdxl.schedule, size, sdxl.vae_scale_factor, seed, step, index
            )
            samples.append(sample)
        return concat(*samples).to(sdxl.device)

    return get_batch
