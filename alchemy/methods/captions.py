"""Pictures with captions of their own: a folder with metadata.jsonl, or with a .txt beside each picture.

Pictures of several shapes are trained in buckets: each in the size, of about the area that is trained at, whose aspect ratio is nearest to
its own, so that little is cut off (Podell et al. 2023, 2.3). Now and then a caption is dropped, so that guidance keeps what it leads away from.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from .. import dataset, images
from ..formats.text import read_text


def find_photos(folder):
    """The pictures in a folder, sorted by name, and the names of what was skipped. Raises ValueError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    photos = [p for p in files if p.suffix.lower() in images.SUFFIXES]
    if not photos:
        raise ValueError(
            f"{folder}: no pictures in it ({', '.join(images.SUFFIXES)} are read); put 3 to 5 photos of the subject there"
        )
    return photos, [p.name for p in files if p not in photos]


def read(folder):
    """[(path, caption)] of a folder, sorted. Raises ValueError that names the line or the picture where something is missing."""
    folder = Path(folder)
    table = folder / "metadata.jsonl"
    if table.exists():
        rows = sorted(
            row(folder, number, line)
            for number, line in enumerate(read_text(table).split("\n"), 1)
            if line.strip()
        )
        if not rows:
            raise ValueError(f"{table}: no line in it")
        if twice := [path.name for (path, _), (other, _) in zip(rows, rows[1:]) if path == other]:
            raise ValueError(f"{table}: {twice[0]} stands in it twice; leave one of the lines")
        return rows
    found, _ = find_photos(folder)
    texts = [
        " ".join(read_text(text).split()) if text.exists() else ""
        for text in (path.with_suffix(".txt") for path in found)
    ]
    if silent := [path.name for path, text in zip(found, texts) if not text]:
        raise ValueError(
            f"{folder}: no caption for {len(silent)} of {len(found)} pictures ({', '.join(silent[:3])}): write metadata.jsonl, or a .txt beside each"
        )
    return list(zip(found, texts))


def unlisted(folder, pictures):
    """The names of the pictures in a folder that are not among these (path, caption)."""
    known = {path.resolve() for path, _ in pictures}
    return sorted(
        p.name
        for p in Path(folder).iterdir()
        if p.suffix.lower() in images.SUFFIXES and p.name[0] != "." and p.resolve() not in known
    )


def row(folder, number, line):
    """One line of metadata.jsonl, {"file_name": ..., "text": ...}, to (path, caption)."""
    where = f"{folder / 'metadata.jsonl'}, line {number}"
    try:
        entry = json.loads(line)
        path, caption = folder / entry["file_name"], entry["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f'{where}: not like {{"file_name": "a.jpg", "text": "a dog"}}') from None
    if not isinstance(caption, str) or not path.is_file():
        raise ValueError(
            f"{where}: {path.name}: no such file"
            if isinstance(caption, str)
            else f"{where}: its text is not a string"
        )
    if not caption.strip():
        raise ValueError(
            f"{where}: the text of {path.name} is empty: write one, or take the line out"
        )
    return path, caption


def bucket(picture_size, area, cell):
    """The (H,W), multiples of cell, of three quarters of area to all of it, whose aspect ratio is nearest to that of a picture of (H,W)."""
    most = area // cell**2
    if not most:
        raise ValueError(
            f"the size to train at is smaller than {cell}x{cell}, the least that a picture with a caption can have"
        )
    sizes = [
        (h, w)
        for h in range(1, most + 1)
        for w in range(-(-3 * most // (4 * h)), most // h + 1)
        if h <= 4 * w <= 16 * h
    ]
    wanted = math.log(picture_size[0] / picture_size[1])
    h, w = min(
        sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - wanted), -size[0] * size[1])
    )
    return h * cell, w * cell


def make_batcher(sdxl, buckets, seed, count, accumulation=1, dropout=0.1, rank=0, world=1):
    """A function (step, part) to a Batch of `count` samples of one bucket, which all ranks take (see dataset.make_batcher); None stands for a
    dropped caption.

    buckets: {(H,W): photos of dataset.encode}; each comes as often as it has photos.
    """
    sizes = sorted(buckets)
    shares = torch.tensor([len(buckets[size]) for size in sizes], dtype=torch.float64)
    draws = {
        size: dataset.make_batcher(
            sdxl, buckets[size], size, seed, count, accumulation, rank, world
        )
        for size in sizes
    }

    def draw(step, part):
        rng = dataset.generator(seed, 3, step, part)
        batch = draws[sizes[int(torch.multinomial(shares, 1, generator=rng))]](step, part)
        lots = torch.rand(world * count, generator=rng).tolist()[rank * count :]
        return replace(
            batch,
            prompts=[None if lot < dropout else prompt for prompt, lot in zip(batch.prompts, lots)],
        )

    return draw
