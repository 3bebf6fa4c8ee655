"""Prior preservation: the batch that keeps the meaning of the class word (see training.loss).

Two kinds. With class images (DreamBooth, Ruiz et al. 2023, eq. 2), it holds images of the class
that the model generated before training. The teacher batch needs no images: its target is the
prediction of the model without the LoRA, on the subject's own latents with the class prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from .. import lora, pipeline
from ..dataset import Batch
from ..extras.optimizations import cached_steps
from ..formats import png
from ..sdxl import SDXL, to_device
from ..training import Prompts, gather_conditioning

FIRST_SEED = 10**6  # of the class images, so that previews have other seeds
SAMPLING = ("sampler", "steps", "guidance")
Job = tuple[Path, dict]  # an image's path and metadata


@torch.no_grad()
def teacher_batch(sdxl: SDXL, batch: Batch, prompts: Prompts, class_prompt: str) -> Batch:
    """The batch's latents under the class prompt; the target is the prediction without the LoRA."""
    batch = replace(batch, prompts=[class_prompt] * len(batch.t))
    x_t = sdxl.schedule.add_noise(batch.x_0, batch.eps, batch.t)
    with lora.lora_scale(sdxl.unet, 0):
        t = to_device(batch.t, x_t.device)
        target = sdxl.unet(x_t, t, *gather_conditioning(batch, prompts))
    return replace(batch, target=target, loss_mask=torch.ones_like(batch.loss_mask))


def keep_outside(batch: Batch, teacher: Batch) -> Batch:
    """The batch, with the teacher's target where its loss mask is 0.

    A mask alone leaves the rest of the image free to change, and it drifts away: of masked photos
    on one background, the class was then right in 8 % of the miniature's images.
    """
    target = torch.lerp(teacher.target, batch.target, batch.loss_mask)
    return replace(batch, target=target, loss_mask=teacher.loss_mask)


def class_image_jobs(
    sdxl: SDXL,
    prompt: str,
    folder: Path,
    count: int,
    size: tuple[int, int] | None = None,
    metadata: dict | None = None,
) -> list[Job]:
    """(path, metadata) of `count` class images in a folder, 0000.png and on; some may exist.

    metadata: what else determines the images. Raises ValueError where an image in the folder was
    generated with other settings.
    """
    common = {"prompt": prompt, "weights": str(sdxl.source), "size": size or sdxl.size}
    common |= {name: sdxl.defaults[name] for name in SAMPLING}
    common |= metadata or {}
    jobs = []
    for index in range(count):
        job = folder / f"{index:04d}.png", common | {"seed": FIRST_SEED + index}
        if job[0].exists():
            png.check(*job)
        jobs.append(job)
    return jobs


def generate_class_images(sdxl: SDXL, jobs: Sequence[Job]) -> Iterator[Path]:
    """Generate the images of class_image_jobs, whether they exist or not; yields each path."""
    cond = uncond = None
    for path, metadata in jobs:
        if cond is None:
            cond = sdxl.encode_prompt([metadata["prompt"]], metadata["size"])
            uncond = sdxl.encode_prompt([None], metadata["size"])
        sdxl.free("text_encoders")  # the UNet can use the memory
        image = pipeline.sample(
            sdxl,
            cond,
            uncond,
            metadata["seed"],
            metadata["size"],
            progress=partial(cached_steps, sdxl.unet),
            **{name: metadata[name] for name in SAMPLING},
        )
        png.save(image, path, metadata)
        yield path
