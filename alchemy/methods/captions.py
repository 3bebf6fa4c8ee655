"""Images with captions: a folder with metadata.jsonl, or with a .txt beside each image.

Images of several shapes are trained in buckets: each at the size, of about the training area,
whose aspect ratio is nearest to its own, so that little is cropped (Podell et al. 2023, 2.3).
Some captions are dropped, so that the model stays usable with guidance.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from .. import cli, dataset, images
from ..dataset import GetBatch, TrainingImage
from ..files import resolve
from ..formats.text import read_text
from ..sdxl import SDXL
from . import flags

Example = tuple[Path, str]  # an image and its caption


def find_photos(folder: str | Path) -> tuple[list[Path], list[str]]:
    """The images in a folder, sorted by name, and the names of skipped files. Raises ValueError
    where there is no image."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    photos, skipped = [], []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.suffix.lower() in images.SUFFIXES:
            photos.append(path)
        else:
            skipped.append(path.name)
    if not photos:
        suffixes = ", ".join(images.SUFFIXES)
        raise ValueError(f"{folder}: no images found ({suffixes} are read); check the path")
    return photos, skipped


def read(folder: str | Path) -> list[Example]:
    """(path, caption) of the images in a folder, sorted. Raises ValueError that names the line or
    the image where something is missing."""
    folder = Path(folder)
    table = folder / "metadata.jsonl"
    if table.exists():
        return read_table(folder, table)
    repeats = kohya_folders(folder)
    if repeats:
        return repeats
    photos, _ = find_photos(folder)
    examples, missing = [], []
    for path in photos:
        caption = read_caption(path)
        if caption:
            examples.append((path, caption))
        else:
            missing.append(path.name)
    if missing:
        raise ValueError(
            f"{folder}: no caption for {len(missing)} of {len(photos)} images "
            f"({', '.join(missing[:3])}); write metadata.jsonl, or a .txt beside each"
        )
    return examples


def read_caption(path: Path) -> str:
    """The text beside an image, .txt or .caption, without line breaks; "" where there is none."""
    for suffix in (".txt", ".caption"):
        beside = path.with_suffix(suffix)
        if os.path.isfile(beside):  # Path.is_file raises for a name that is too long
            return " ".join(read_text(beside).split())
    return ""


def kohya_folders(folder: Path) -> list[Example]:
    """The images of kohya's layout, subfolders named REPEATS_PROMPT such as "10_sks dog": each
    REPEATS times, with its own caption or else the folder's prompt. Empty for other layouts."""
    examples = []
    for repeats, prompt, inner in flags.kohya_folders(folder):
        for path in find_photos(inner)[0]:
            examples += [(path, read_caption(path) or prompt)] * repeats
    return examples


def read_table(folder: Path, table: Path) -> list[Example]:
    examples = []
    for number, line in enumerate(read_text(table).split("\n"), 1):
        if line.strip():
            examples.append(read_row(folder, f"{table}, line {number}", line))
    if not examples:
        raise ValueError(f"{table}: it is empty")
    examples.sort()
    for (path, _), (following, _) in pairwise(examples):
        if path == following:
            raise ValueError(f"{table}: {path.name} is in it twice; leave out one of the lines")
    return examples


def read_row(folder: Path, where: str, line: str) -> Example:
    """One line of metadata.jsonl, {"file_name": ..., "text": ...}."""
    try:
        row = json.loads(line)
        name, caption = row["file_name"], row["text"]
        path = folder / name
    except (ValueError, KeyError, TypeError, RecursionError):
        expected = '{"file_name": "a.jpg", "text": "a dog"}'
        raise ValueError(f"{where}: not like {expected}") from None
    if not isinstance(caption, str):
        raise ValueError(f"{where}: its text is not a string")
    if Path(name).anchor or ".." in Path(name).parts:
        raise ValueError(f"{where}: {cli.quoted(name)} is outside the folder; put a link into it")
    if not os.path.isfile(path):
        raise ValueError(f"{where}: {path.name[:80]}: no such file")
    if not caption.strip():
        raise ValueError(
            f"{where}: the text of {path.name} is empty; write one, or take the line out"
        )
    return path, caption


def unlisted(folder: str | Path, examples: Sequence[Example]) -> list[str]:
    """The names of the images in a folder that are not among the examples."""
    known = {resolve(path) for path, _ in examples}
    names = []
    for path in sorted(Path(folder).iterdir()):
        is_image = path.suffix.lower() in images.SUFFIXES and not path.name.startswith(".")
        if is_image and resolve(path) not in known:
            names.append(path.name)
    return names


def bucket(image_size: tuple[int, int], area: int, cell: int) -> tuple[int, int]:
    """The training size (H,W) of an image of image_size (H,W) in pixels.

    Both sides are multiples of cell, the area is 3/4 of `area` to all of it, and the aspect ratio
    is the nearest to the image's, at most 4:1.
    """
    cells = area // cell**2
    if not cells:
        raise ValueError(f"--size is smaller than {cell}x{cell}, the least with --captions")
    aspect = math.log(image_size[0] / image_size[1])
    best, best_key = None, None
    for h in range(1, cells + 1):
        for w in range(-(-3 * cells // (4 * h)), cells // h + 1):
            if not h <= 4 * w <= 16 * h:
                continue
            key = abs(math.log(h / w) - aspect), -h * w
            if best is None or key < best_key:
                best, best_key = (h, w), key
    return best[0] * cell, best[1] * cell


def make_batcher(
    sdxl: SDXL,
    buckets: dict[tuple[int, int], list[TrainingImage]],
    seed: int,
    batch_size: int,
    accumulation: int = 1,
    dropout: float = 0.1,
    rank: int = 0,
    world: int = 1,
) -> GetBatch:
    """get_batch(step, micro_step) of one bucket, the same on all ranks (see dataset.make_batcher).

    buckets: {(H,W): images}; each comes as often as it has images. A dropped caption is None.
    """
    sizes = sorted(buckets)
    shares = torch.tensor([len(buckets[size]) for size in sizes], dtype=torch.float64)
    batchers = []
    for size in sizes:
        of_size = (sdxl, buckets[size], size, seed, batch_size, accumulation, rank, world)
        batchers.append(dataset.make_batcher(*of_size))

    def get_batch(step, micro_step):
        rng = dataset.generator(seed, 3, step, micro_step)
        chosen = int(torch.multinomial(shares, 1, generator=rng))
        batch = batchers[chosen](step, micro_step)
        lots = torch.rand(world * batch_size, generator=rng).tolist()[rank * batch_size :]
        prompts = []
        for prompt, lot in zip(batch.prompts, lots, strict=False):
            prompts.append(None if lot < dropout else prompt)
        return replace(batch, prompts=prompts)

    return get_batch
