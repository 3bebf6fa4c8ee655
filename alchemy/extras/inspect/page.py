"""The page: one HTML file that holds its images and data; beside it, on demand, the arrays."""

import html
import json
import math
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from PIL import Image
from torch import Tensor

from ... import cli, pipeline, samplers
from ...arguments import checked, resolve_seed
from ...files import save_tensors, save_text
from ...images import Size
from ...pipeline import Progress
from ...samplers import Sampler
from ...sampling import Hook
from ...sdxl import SDXL
from . import stage
from .record import Recorder
from .sprites import fit_colors

PARTS = Path(__file__).with_name("page")
SCRIPTS = ("base.js", "stage.js", "attention.js", "insertion.js", "training.js", "start.js")


@checked
def inspect(
    sdxl: SDXL,
    prompt: str,
    folder: str | PathLike,
    *,
    size: int | Size | None = None,
    seed: int | None = 0,
    negative_prompt: str | None = None,
    full: bool = False,
    hook: Hook | None = None,
    progress: Progress | None = None,
    sampler: str | Sampler | None = None,
    spacing: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    eta: float | None = None,
) -> tuple[Image.Image, list[Path]]:
    """Generate an image and write a page that shows every step of it.

    folder: where; if it is not empty, the next free name (page-1, page-2).
    full: write all arrays too, as safetensors. The rest: see alchemy.text_to_image.
    Returns the image and the paths written, index.html last.
    """
    size, seed = pipeline.resolve_size(sdxl, size), resolve_seed(seed)
    options = pipeline.resolve_options(
        sdxl, sampler=sampler, spacing=spacing, steps=steps, guidance=guidance, eta=eta
    )
    timesteps = samplers.find_sampler(options["sampler"]).timesteps(
        sdxl.schedule, options["steps"], spacing
    )
    recorder = Recorder(
        sdxl, prompt, len(timesteps), negative_prompt=negative_prompt, full=full, **options
    )
    recorder.modifier = "hook" if hook else None

    def follow(steps):
        return progress(recorder.follow(steps)) if progress else recorder.follow(steps)

    common = {"seed": seed, "size": size, "negative_prompt": negative_prompt} | options
    image = pipeline.text_to_image(sdxl, prompt, hook=hook, progress=follow, **common)
    with cli.output_folder(cli.free_folder(folder, "folder"), "folder") as folder:
        stages = [("", recorder, image)]
        return image, write_page(folder, prompt, stages, {"prompt": prompt} | common)


def write_page(
    folder: str | PathLike,
    title: str,
    stages: Sequence[tuple[str, Recorder, Image.Image]],
    metadata: dict,
    extra: dict | None = None,
    arrays: dict[str, dict[str, Tensor]] | None = None,
) -> list[Path]:
    """Write the page of some stages, (name, recorder, image) each; returns the paths.

    extra: more for page/start.js. arrays: {file: tensors}, beside those of recorders with
    full=True.
    """
    folder, arrays = Path(folder), dict(arrays or {})
    folder.mkdir(parents=True, exist_ok=True)

    # One map to colours for all stages, fitted to what their latents decode to.
    decoded = [stage.decode_steps(recorder) for _, recorder, _ in stages]
    pairs = []
    for (_, recorder, _), images in zip(stages, decoded, strict=True):
        pairs += [(recorder.latents["x_0"][k], image) for k, image in images.items()]
    colors = fit_colors(pairs)

    data = {"title": title, "metadata": metadata, "stages": []} | (extra or {})
    for number, (name, recorder, image) in enumerate(stages):
        data["stages"].append(stage.describe(recorder, name, image, decoded[number], colors))
        if recorder.full:
            file = "steps" if len(stages) == 1 else f"stage-{number + 1}"
            arrays[f"{file}.safetensors"] = recorder.arrays()
    if stages:
        alpha_bars = stages[0][1].sdxl.schedule.alpha_bar[::10].tolist()
        data["alpha_bar"] = [round(ab, 6) for ab in alpha_bars]
    for file, tensors in arrays.items():
        save_tensors(tensors, folder / file, metadata)
    text = render(title, data)
    save_text(text, folder / "index.html")
    return [folder / file for file in (*arrays, "index.html")]


def finite(data: object) -> object:
    """The data with None for NaN and infinity, which JSON lacks."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def render(title: str, data: dict) -> str:
    """The parts of page/ and the data as one HTML text."""

    def part(name: str) -> str:
        return (PARTS / name).read_text(encoding="utf-8")

    text = json.dumps(finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    parts = {
        "title": html.escape(title),
        "style": part("style.css"),
        "data": text.replace("<", "\\u003c"),  # no prompt can end the script element
        "script": "\n".join(part(name) for name in SCRIPTS),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], part("index.html"))
