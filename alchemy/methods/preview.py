"""Images during training, and --check: a look at the photos and one timed step before it."""

import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import cli, pipeline
from ..extras import distributed
from ..extras.inspect import preflight
from ..extras.optimizations import cached_steps
from ..formats import png
from ..sdxl import SDXL, Conditioning
from ..training import TrainingTask, TrainState, train
from . import masks

Row = list[tuple[str, Image.Image]]


@torch.no_grad()
def preview(args: Namespace, sdxl: SDXL, task: TrainingTask, step: int) -> Row:
    """(label, image) of each preview prompt, always of the same seeds; the ranks share the work.

    Computed in the training dtype. Raises FloatingPointError where an image is not finite.
    """

    def encoded(prompt):
        parts = task.prompts[prompt].parts()
        return Conditioning(*(part.to(sdxl.device) for part in parts))

    prompts, (height, width) = task.preview_prompts, args.size
    options = {name: sdxl.defaults[name] for name in ("sampler", "steps", "guidance")}
    pixels = torch.zeros(len(prompts), height, width, 3, dtype=torch.uint8)
    failure = None
    lower = torch.autocast(
        sdxl.device.type, sdxl.dtype, enabled=args.method == "full" and sdxl.dtype != torch.float32
    )

    def follow(steps):
        with lower:  # the UNet alone: the VAE may need float32
            yield from cached_steps(sdxl.unet, steps)

    try:
        for index in range(len(prompts))[distributed.rank_slice()]:
            cond, uncond = encoded(prompts[index]), encoded(None)
            image = pipeline.sample(
                sdxl, cond, uncond, args.seed, args.size, progress=follow, **options
            )
            pixels[index] = torch.from_numpy(np.array(image))
    except FloatingPointError as error:
        failure = error
    sdxl.free("vae")
    if distributed.all_reduce_max(bool(failure)):
        if failure and not step:
            raise failure  # training cannot be the reason
        raise FloatingPointError(
            f"the preview at step {step} became NaN or infinite: training diverged; "
            "lower --learning-rate"
        )
    row = []
    for prompt, image in zip(prompts, distributed.all_reduce_sum(pixels), strict=True):
        row.append((f"step {step}: {prompt}", Image.fromarray(image.numpy())))
    return row


def inspect_photos(args: Namespace, sdxl: SDXL, examples: Sequence, out: Path) -> None:
    """Log what is odd about photos and token, before anything is computed; with --check, write
    the photos and their crops to check.png."""

    def mask_of(path):
        # Raises where a mask is missing. Segmenting takes the model: one photo stands for all.
        first = args.check and path == examples[0][0]
        if args.mask and (args.mask != "segment" or first):
            return masks.mask_of(args.mask, path, sdxl, args.class_word or args.init_word)
        return None

    lines, sheet = preflight.look(sdxl, examples, args.size, args.captions, mask_of)
    counts = (0, 0)
    if args.token and args.method != "textual-inversion":
        counts = tuple(len(tokenizer.tokens(args.token)) for tokenizer in sdxl.tokenizers)
    if args.check and any(counts) or max(counts) > 3:
        line = f"{args.token!r} has {counts[0]} and {counts[1]} tokens in the two tokenizers"
        if max(counts) > 3:
            line += "; a short rare word, such as sks, is learned more easily"
        lines.append(line)
    for line in lines:
        cli.log(line)
    warnings.filterwarnings("ignore", "prompt too long")  # logged above, with the photo's name
    if args.check:
        png.save(sheet, out / "check.png", cli.metadata(args))


def time_step(args: Namespace, sdxl: SDXL, state: TrainState, get_loss: Callable) -> None:
    """Log what a step costs: of two, the second; the first warms up and makes the moments."""
    ends = []
    for _ in train(sdxl, state, get_loss, steps=state.step + 2, accumulation=args.accumulation):
        ends.append(time.perf_counter())
    seconds = ends[1] - ends[0]
    total = cli.duration(args.steps * seconds)
    cli.log(f"a step takes {seconds:.1f} s, {cli.count_of(args.steps, 'step')} {total}")
