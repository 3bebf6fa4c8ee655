"""The page: one HTML file with all its pictures and data in it, opened from disk; beside it contact sheets and, if wanted, the arrays."""

import html
import json
import math
import re
from pathlib import Path

from ... import pipeline, sampling, samplers
from ...command.inspecting import free_folder
from ...files import replace, save_tensors
from ...formats import png
from . import stage
from .pictures import fit
from .record import Recorder
from .sheets import sheet

PARTS = Path(__file__).with_name("page")
SCRIPTS = ("base.js", "stage.js", "attention.js", "insertion.js", "training.js", "start.js")


def inspect(
    sdxl,
    prompt,
    folder,
    *,
    size=None,
    seed=0,
    negative_prompt=None,
    full=False,
    hook=None,
    progress=None,
    sampler=None,
    spacing=None,
    steps=None,
    guidance=None,
    eta=None,
):
    """Draw a prompt's picture and write the page of how it came about: (PIL picture, paths written, index.html the last).

    folder: as --inspect's, the next free one where it is not empty. full: the arrays too, as safetensors. The rest: see
    alchemy.text_to_image.
    """
    folder = free_folder(folder, "folder")
    size, _, options = pipeline.resolve_options(
        sdxl,
        negative_prompt,
        size,
        dict(sampler=sampler, spacing=spacing, steps=steps, guidance=guidance, eta=eta),
    )
    row = samplers.find_sampler(options["sampler"])
    pairs = row.timesteps(sdxl.schedule, options["steps"], spacing)
    recorder = Recorder(
        sdxl, prompt, len(pairs), negative_prompt=negative_prompt, full=full, **options
    )
    recorder.changed = "hook" if hook else None

    def follow(steps):
        return progress(recorder.follow(steps)) if progress else recorder.follow(steps)

    picture = pipeline.text_to_image(
        sdxl,
        prompt,
        size=size,
        seed=seed,
        negative_prompt=negative_prompt,
        hook=hook,
        progress=follow,
        **options,
    )
    facts = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "size": size,
    } | options
    return picture, write(folder, prompt, [("", recorder, picture)], facts)


def write(folder, title, stages, facts, more=None, rows=None, arrays=None):
    """The page of some stages, (name, Recorder, picture) each, in a folder; returns the paths. more: what else page/start.js reads;
    rows: of a further contact sheet; arrays: {file: tensors} beside those that the Recorders were to keep in full."""
    folder, data, sheets, arrays = Path(folder), [], {}, dict(arrays or {})
    folder.mkdir(parents=True, exist_ok=True)
    decoded = [stage.decoded(recorder) for _, recorder, _ in stages]
    colours = (
        fit(
            [
                (stages[i][1].latents["x_0"][k], x)
                for i, made in enumerate(decoded)
                for k, x in made.items()
            ]
        )
        if stages
        else None
    )
    for number, ((name, recorder, picture), made) in enumerate(zip(stages, decoded), 1):
        shown, levels = stage.frames(recorder, colours), stage.maps(recorder)
        data.append(stage.describe(recorder, name, picture, made, shown, levels))
        file = "steps" if len(stages) == 1 else f"stage-{number}"
        sheets[f"{file}.png"] = stage.contact(recorder, made, shown, levels)
        if recorder.full:
            arrays[f"{file}.safetensors"] = recorder.arrays()
    sheets |= {"overview.png": rows} if rows else {}
    for file, rows in sheets.items():
        png.save(sheet(rows, least=128), folder / file, facts)
    for file, tensors in arrays.items():
        save_tensors(tensors, folder / file, facts)
    whole = page_of(
        title,
        {"title": title, "facts": facts, "stages": data, "alpha_bar": curve(stages)} | (more or {}),
    )
    replace(folder / "index.html", lambda new: new.write_text(whole, encoding="utf-8"))
    return [folder / file for file in (*sheets, *arrays, "index.html")]


def curve(stages):
    """alpha_bar at every tenth timestep."""
    return (
        [round(x, 6) for x in stages[0][1].sdxl.schedule.alpha_bar[::10].tolist()] if stages else []
    )


def finite(data):
    """The data with None for every number that JSON has no word for."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def page_of(title, data):
    """The parts of page/ and the data in one text. In it no "<" of the data is left, so that none can end the script it stands in."""
    parts = {
        "title": html.escape(title),
        "style": (PARTS / "style.css").read_text(encoding="utf-8"),
        "data": json.dumps(
            finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False
        ).replace("<", "\\u003c"),
        "script": "\n".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    return re.sub(
        r"\{\{(\w+)\}\}", lambda m: parts[m[1]], (PARTS / "index.html").read_text(encoding="utf-8")
    )
