"""A data set of sample.py --prompts that goes on where it stopped: what decides a picture, and whether it is there."""

import hashlib
import json
from pathlib import Path

from ..files import replace
from ..formats import png
from ..formats.text import read_text

DECIDE = (
    "prompt",
    "seed",
    "size",
    "sampler",
    "spacing",
    "steps",
    "guidance",
    "eta",
    "negative_prompt",
    "weights",
    "vae",
    "config",
    "revision",
    "dtype",
    "fp8_base",
    "lora",
    "embedding",
    "image",
    "strength",
    "digests",
)


def check_list(folder, jobs):
    """Raise ValueError where the folder's metadata.jsonl tells of pictures that are not of these jobs, (prompt, seed, path) each."""
    path = folder / "metadata.jsonl"
    try:
        listed = (
            {
                str(json.loads(line)["file_name"])
                for line in read_text(path).split("\n")
                if line.strip()
            }
            if path.exists()
            else set()
        )
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{path}: not a list of pictures with captions: name another folder"
        ) from None
    if others := sorted(listed - {path.name for *_, path in jobs}):
        raise ValueError(
            f"{folder}: its metadata.jsonl tells of other pictures ({others[0]}): name another folder"
        )


def write_list(folder, jobs):
    """metadata.jsonl of the pictures that are there, as train.py --captions reads it; its path."""
    rows = [
        json.dumps({"file_name": path.name, "text": prompt}, ensure_ascii=False)
        for prompt, _, path in jobs
        if path.exists()
    ]
    replace(
        folder / "metadata.jsonl",
        lambda new: new.write_text("\n".join(rows) + "\n", encoding="utf-8"),
    )
    return folder / "metadata.jsonl"


def keeping_list(folder, jobs, missing):
    """Yield the missing jobs; when the next is asked for, the list has the one before, so that what is drawn can be used whatever comes."""
    for job in missing:
        yield job
        write_list(folder, jobs)


def digests(args):
    """The first digits of SHA-256 of each file that is put on or started from: it may be another one of the same name."""
    names = (
        [path for path, _ in args.lora or ()]
        + (args.embedding or [])
        + ([args.image] if args.image else [])
    )
    files = [
        sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else [Path(name)]
        for name in names
    ]
    return [
        hashlib.sha256(b"".join(file.read_bytes() for file in those)).hexdigest()[:16]
        for those in files
    ]


def is_there(path, facts):
    """Whether a picture is drawn already. Raises ValueError where the file is another one."""
    if path.exists():
        png.check(path, {name: facts.get(name) for name in DECIDE})
    return path.exists()
