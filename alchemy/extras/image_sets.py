"""Sets of images (sample.py --prompts), continued where they stopped; sample.py --like."""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from .. import cli
from ..files import free_path, save_text
from ..formats import png
from ..formats.text import read_text

# --like takes these settings from an image. It never opens or downloads what the image names.
LIKE_SETTINGS = ("prompt", "seed", "size", *cli.SAMPLING_OPTIONS, "negative_prompt", "strength")
LIKE_FILES = ("weights", "vae", "model_config", "revision", "lora", "embedding", "image")
# What determines an image: a file with another value is not of this set.
IDENTITY = (*LIKE_SETTINGS, *LIKE_FILES, "dtype", "fp8_base", "digests")


@dataclass(frozen=True)
class Job:
    """One image to generate: its prompt, its seed, and its file (or, if that exists, the next)."""

    prompt: str
    seed: int
    path: Path


def list_jobs(args: argparse.Namespace) -> list[Job]:
    """All images of the flags; with --prompts, also those that exist already."""
    out, seeds = Path(args.out), range(args.seed, args.seed + args.count)
    if args.prompts:
        prompts = []
        for line in read_text(args.prompts).split("\n"):
            prompts += [line.strip()] * (args.count if line.strip() else 0)
        if not prompts:
            raise ValueError(f"{args.prompts}: no prompt in it; write one per line")
        seeds = range(args.seed, args.seed + len(prompts))
        paths = [out / f"{i:05d}.png" for i in range(len(prompts))]
        return list(map(Job, prompts, seeds, paths))
    if not cli.is_image_path(out):
        return [Job(args.prompt, seed, out / f"{seed:04d}.png") for seed in seeds]
    if args.count == 1:
        jobs = [Job(args.prompt, args.seed, out)]
    else:
        stem = out.stem
        jobs = [Job(args.prompt, seed, out.with_name(f"{stem}-{seed}.png")) for seed in seeds]
    # The longest name, which may get a number too, is tried before the work.
    cli.is_image_path(free_path(jobs[-1].path))
    return jobs


def check_list(folder: Path, jobs: list[Job]) -> None:
    """Raise ValueError where the folder's metadata.jsonl lists images of no job."""
    path = folder / "metadata.jsonl"
    if not path.exists():
        return
    listed = set()
    try:
        for line in read_text(path).split("\n"):
            if line.strip():
                listed.add(str(json.loads(line)["file_name"]))
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{path}: not a list of images with captions; name another folder"
        ) from None
    others = sorted(listed - {job.path.name for job in jobs})
    if others:
        raise ValueError(
            f"{path} lists other images ({cli.quoted(others[0])}); name another folder"
        )


def write_list(folder: Path, jobs: list[Job]) -> Path:
    """Write metadata.jsonl of the images that exist, as train.py --captions reads it."""
    rows = []
    for job in jobs:
        if job.path.exists():
            row = {"file_name": job.path.name, "text": job.prompt}
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    save_text("".join(rows), folder / "metadata.jsonl")
    return folder / "metadata.jsonl"


def used_files(settings: dict) -> list[str]:
    """The LoRAs, embeddings and start image among the flags or in the metadata of an image."""
    names = [path for path, _ in settings["lora"] or ()] + (settings["embedding"] or [])
    return [*names, settings["image"]] if settings["image"] else names


def file_digests(args: argparse.Namespace) -> list[str]:
    """The start of the SHA-256 of each of used_files: names can stay the same."""
    digests = []
    for name in used_files(vars(args)):
        path = Path(name)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        digests.append(digest.hexdigest()[:16])
    return digests


def warn_of_changed_files(args: argparse.Namespace, digests: list[str]) -> None:
    """Log each file that has another content than when the image of --like was made.

    digests: of the files now. Images of earlier versions hold none.
    """
    metadata = png.read_metadata(args.like)
    stored = {"lora": None, "embedding": None, "image": None} | metadata
    names, before = used_files(stored), metadata.get("digests")
    if not isinstance(before, list) or len(before) != len(names):
        return
    then = dict(zip(names, before, strict=True))
    now = dict(zip(used_files(vars(args)), digests, strict=True))
    for name, digest in now.items():
        if then.get(name, digest) != digest:
            cli.log(f"warning: {name} has changed since {args.like} was made")


def is_done(job: Job, metadata: dict) -> bool:
    """Whether an image of the set exists. Raises ValueError where it has other settings."""
    if not job.path.exists():
        return False
    metadata = metadata | {"prompt": job.prompt, "seed": job.seed}
    png.check(job.path, {name: metadata.get(name) for name in IDENTITY})
    return True


def read_like(path: str, p: cli.Parser, args: argparse.Namespace) -> dict:
    """The flags of --like: the settings in an image by sample.py, each checked as a flag is.

    Weights, LoRAs, embeddings and the start image that it names have to be given as flags, unless
    they are the defaults: an image from elsewhere must not decide what is opened or downloaded.
    """
    metadata = png.read_metadata(path)
    if not isinstance(metadata, dict) or metadata.get("script") != "sample.py":
        raise ValueError(f"--like {path}: sample.py did not write this image")
    values = {}
    try:
        for name in LIKE_SETTINGS:
            if name in metadata and (name != "strength" or args.image):
                values[name] = p.from_json(name, metadata[name])
        if not isinstance(values.get("prompt"), str) or values.get("seed", 0) < 0:
            raise ValueError("no prompt, or no seed")
        for name in LIKE_FILES:
            wanted = p.from_json(name, metadata.get(name))
            values |= like_file(path, p, args, name, wanted)
    except ValueError as error:
        raise ValueError(f"--like {path}: {error}") from None
    return values


def like_file(
    path: str, p: cli.Parser, args: argparse.Namespace, name: str, wanted: object
) -> dict:
    """The value of --like for a flag that names a file; see read_like."""
    given = getattr(args, name)
    if name == "lora" and [file for file, _ in given or ()] == [file for file, _ in wanted or ()]:
        # The same files; where no scale is given, it is the image's.
        values = []
        for (file, scale), (_, image_scale) in zip(given or (), wanted or (), strict=True):
            values.append((file, image_scale if scale is None else scale))
        return {name: values or None}
    if given != p.get_default(name) or not wanted or wanted == p.get_default(name):
        return {}
    if name == "lora" and wanted == cli.default_lora():
        return {name: wanted}
    shown = wanted[0] if isinstance(wanted, list) else wanted
    shown = shown[0] if isinstance(shown, tuple) else shown
    flag = f"--{name.replace('_', '-')}"
    raise ValueError(f"it was made with {flag} {shown}; give {flag} too, that file or another")
