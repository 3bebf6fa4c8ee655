"""What a run of a script tells of itself, and what one of train.py leaves in its folder. Imports no torch."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

TAKEN = ("lora", "state")  # other files there
PLACES = (
    "out",
    "class_folder",
    "like",
    "prompts",
)  # flags that name places of this machine, and nothing of how a picture is made


def settings_of(args):
    """The flags as JSON knows them, but those that have no part in what is made."""
    return json.loads(
        json.dumps(
            {k: v for k, v in vars(args).items() if not k.startswith("inspect")}, default=str
        )
    )


def facts_of(args):
    """The settings that a picture carries: none that names where files lie which it was not made of."""
    return {k: v for k, v in settings_of(args).items() if k not in PLACES}


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
    return Path(args.out) / (
        "embedding" if args.format == "diffusers" else f"{file_name(str(args.token))}.safetensors"
    )


def read_settings(path, args):
    """The flags that settings_of wrote to a file, as far as there are such flags."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {
            k: tuple(v) if k == "size" and v else v for k, v in saved.items() if k in vars(args)
        }
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent}: no run to resume, it has no {path.name}; without --resume, one starts"
        ) from None
    except (ValueError, AttributeError, TypeError):
        raise ValueError(
            f"{path}: not the settings of a run, which train.py writes; --overwrite starts again"
        ) from None


def earlier(args):
    """The paths of what an earlier run has left in the folder, as its settings tell, and of what this one is going to write."""
    out, before = Path(args.out), args
    try:
        before = Namespace(
            **vars(args) | read_settings(out / "settings.json", args) | {"out": args.out}
        )
    except (ValueError, OSError):
        pass  # no settings that can be read: they are written anew
    return (
        result(before),
        result(args),
        *(out / name for name in ("state.safetensors", "preview.png", "loss.png")),
    )


def spare(args):
    """Raise ValueError where what the run reads or keeps lies in what it would take away."""
    for flag in ("photos", "weights", "vae", "config", "mask", "class_folder"):
        given = Path(getattr(args, flag) or "").resolve()
        for path in earlier(args) if getattr(args, flag) else ():
            if path.resolve() in (given, *given.parents):
                name = "SUBJECT_DIR" if flag == "photos" else f"--{flag.replace('_', '-')}"
                raise ValueError(
                    f"{name} {getattr(args, flag)}: this run would take it away, as a result of one in --out {args.out}: "
                    "name another --out"
                )


def clear(args):
    """Take away what an earlier run has left, and what this one is going to write."""
    for path in earlier(args):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
