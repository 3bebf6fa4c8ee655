"""What a run of train.py leaves in its folder. Imports no torch."""
import re
import shutil
from argparse import Namespace
from pathlib import Path

from .. import command

TAKEN = ("lora", "state")  # other files there


def file_name(token):
    """A token as a file's name, since A1111 and ComfyUI call an embedding by that: "<my-dog>" is my-dog."""
    name = re.sub(r"[^\w.-]+", "-", token).strip("-._")[:100] or "embedding"
    return name + "-embedding" if name.lower() in TAKEN else name


def result(args):
    """The file or folder that holds what a run of these flags has taught."""
    if args.method == "lora":
        return Path(args.out) / "lora.safetensors"
    if args.method == "full":
        return Path(args.out) / "checkpoint"
    return Path(args.out) / ("embedding" if args.format == "diffusers" else f"{file_name(str(args.token))}.safetensors")


def clear(args):
    """Take away what an earlier run has left in the folder, as its settings tell, and what this one is going to write."""
    out, earlier = Path(args.out), args
    try:
        earlier = Namespace(**vars(args) | command.read_settings(out / "settings.json", args) | {"out": args.out})
    except ValueError:
        pass  # no settings that can be read: they are written anew
    for path in (result(earlier), result(args), *(out / name for name in ("state.safetensors", "preview.png", "loss.png"))):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
