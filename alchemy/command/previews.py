"""Pictures while it learns: the subject, its class, and what has nothing to do with either."""

from functools import partial

import numpy as np
import torch
from PIL import Image

from .. import cli, pipeline, sampling
from ..formats import png
from ..extras.inspect import sheets
from ..extras.optimizations import cached_steps
from ..sdxl import Conditioning
from . import results
from ..extras import distributed


@torch.no_grad()
def preview(args, sdxl, lesson, step):
    """A row of (label, picture): subject, class and an unrelated prompt, always of the same seeds; each drawn by one of the ranks."""

    def told(prompt):
        return Conditioning(*(part.to(sdxl.device) for part in lesson.prompts[prompt].parts()))

    options = {k: sdxl.defaults[k] for k in ("sampler", "steps", "guidance")}
    pixels, astray = torch.zeros(len(lesson.shown), *args.size, 3, dtype=torch.uint8), None
    try:
        for k in range(len(pixels))[distributed.rank_slice()]:
            pixels[k] = torch.from_numpy(
                np.array(
                    pipeline.sample(
                        sdxl,
                        told(lesson.shown[k]),
                        told(None),
                        args.seed,
                        args.size,
                        progress=partial(cached_steps, sdxl.unet),
                        **options,
                    )
                )
            )
    except FloatingPointError as error:
        astray = error
    if distributed.all_reduce_max(bool(astray)):
        if astray and not step:
            raise astray  # nothing is taught yet that could be to blame
        raise FloatingPointError(
            f"the preview at step {step} became NaN or infinite: what is taught went astray; lower --learning-rate"
        )
    sdxl.free("vae")
    return [
        (f"step {step}: {prompt}", Image.fromarray(drawn.numpy()))
        for prompt, drawn in zip(lesson.shown, distributed.all_reduce_sum(pixels))
    ]


def show(args, out, sdxl, lesson, state, rows, watcher):
    """Draw a further row, and preview.png with all that are there, and the loss."""
    rows.append(preview(args, sdxl, lesson, state.step))
    if distributed.rank():
        return
    if (
        len(rows) == 1 and (out / "preview.png").exists()
    ):  # of before a stop: the sheet starts anew, that one stays beside it
        (out / "preview.png").rename(cli.free_path(out / "preview.png"))
    if watcher:
        watcher.previews[state.step] = rows[-1]
    page = sheets.sheet(rows + [[("loss", sheets.curve(state.losses))]])
    png.save(page, out / "preview.png", results.facts_of(args))
