"""The page: one HTML file that holds its images and data; beside it contact sheets and arrays."""

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
from ...files import replace, save_tensors
from ...formats import png
from ...pipeline import Progress
from ...sampling import Hook
from ...sdxl import SDXL
from . import stage
from .record import Recorder
from .sheets import sheet
from .sprites import fit_colors

PARTS = Path(__file__).with_name("page")
SCRIPTS = ("base.js", "stage.js", "attention.js", "insertion.js", "training.js", "start.js")


def inspect(
    sdxl: SDXL,
    prompt: str,
    folder: str | PathLike,
    *,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    negative_prompt: str | None = None,
    full: bool = False,
    hook: Hook | None = None,
    progress: Progress | None = None,
    sampler: str | None = None,
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
    size = pipeline.resolve_size(sdxl, size)
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
    rows: list | None = None,
    arrays: dict[str, dict[str, Tensor]] | None = None,
) -> list[Path]:
    """Write the page of some stages, (name, recorder, image) each; returns the paths.

    extra: more for page/start.js. rows: of overview.png, a further contact sheet.
    arrays: {file: tensors}, beside those of recorders with full=True.
    """
    folder, arrays = Path(folder), dict(arrays or {})
    folder.mkdir(parents=True, exist_ok=True)

    # One map to colours for all stages, fitted to what their latents decode to.
    decoded = [stage.decode_steps(recorder) for _, recorder, _ in stages]
    pairs = []
    for (_, recorder, _), images in zip(stages, decoded, strict=True):
        pairs += [(recorder.latents["x_0"][k], image) for k, image in images.items()]
    colors = fit_colors(pairs)

    data, sheets = [], {}
    for number, (name, recorder, image) in enumerate(stages, 1):
        images = decoded[number - 1]
        shown, levels = stage.frames(recorder, colors), stage.attention_levels(recorder)
        data.append(stage.describe(recorder, name, image, images, shown, levels))
        file = "steps" if len(stages) == 1 else f"stage-{number}"
        sheets[f"{file}.png"] = stage.contact_rows(recorder, images, shown, levels)
        if recorder.full:
            arrays[f"{file}.safetensors"] = recorder.arrays()
    if rows:
        sheets["overview.png"] = rows

    for file, content in sheets.items():
        png.save(sheet(content, least=128), folder / file, metadata)
    for file, tensors in arrays.items():
        save_tensors(tensors, folder / file, metadata)
    data = {"title": title, "metadata": metadata, "stages": data} | (extra or {})
    if stages:
        alpha_bars = stages[0][1].sdxl.schedule.alpha_bar[::10].tolist()
        data["alpha_bar"] = [round(ab, 6) for ab in alpha_bars]
    text = render(title, data)
    replace(folder / "index.html", lambda path: path.write_text(text, encoding="utf-8"))
    return [folder / file for file in (*sheets, *arrays, "index.html")]


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
