"""A data set of sample.py --prompts that goes on where it stopped: what decides a picture, and whether it is there."""
import hashlib
from pathlib import Path

from ..formats import png

DECIDE = ("prompt", "seed", "size", "sampler", "grid", "steps", "guidance", "eta", "negative_prompt", "weights", "vae", "config", "revision", "dtype",
          "lora", "embedding", "image", "strength", "digests")


def digests(args):
    """The first digits of SHA-256 of each file that is put on or started from: it may be another one of the same name."""
    names = [path for path, _ in args.lora or ()] + (args.embedding or []) + ([args.image] if args.image else [])
    files = [sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else [Path(name)] for name in names]
    return [hashlib.sha256(b"".join(file.read_bytes() for file in those)).hexdigest()[:16] for those in files]


def is_there(path, facts):
    """Whether a picture is drawn already. Raises ValueError where the file is another one."""
    if path.exists():
        png.check(path, {name: facts.get(name) for name in DECIDE})
    return path.exists()
