"""The flags of train.py that depend on each other, and on the checkpoint. Imports no torch."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from .. import cli
from ..extras import distributed

# A method's name, as messages describe it.
METHODS = {
    "lora": "--method lora",
    "full": "--method full",
    "textual-inversion": "--method textual-inversion",
    "captions": "--captions",
    "subject": "photos of one subject (--method lora or full, without --captions)",
}
# The methods that a flag belongs to; flags that are not listed belong to all.
APPLIES_TO = {
    "captions": ("lora", "full"),
    "rank": ("lora",),
    "alpha": ("lora",),
    "init_lora": ("lora",),
    "format": ("lora", "textual-inversion"),
    "text_encoders": ("full",),
    "single_file": ("full",),
    "class_word": ("subject", "textual-inversion"),
    "token": ("subject", "textual-inversion"),
    "caption": ("subject",),
    "prior_weight": ("subject",),
    "class_images": ("subject",),
    "class_folder": ("subject",),
    "caption_dropout": ("captions",),
    "validate": ("subject", "textual-inversion"),
    "vectors": ("textual-inversion",),
    "init_word": ("textual-inversion",),
    "style": ("textual-inversion",),
}
DEFAULT_RATE = {"lora": "learning_rate", "full": "full_rate", "textual-inversion": "word_rate"}


def validate_flags(args: Namespace, default: Callable[[str], object]) -> None:
    """Raise ValueError for flags that do not apply or are missing, and complete those that depend
    on others. default(name): a flag's value where it is not given."""
    inversion = args.method == "textual-inversion"
    kind = "subject"
    if args.captions:
        kind = "captions"
    elif inversion:
        kind = "textual-inversion"
    if args.check and distributed.world() > 1:
        raise ValueError("--check looks at what one process would do; run it without torchrun")
    if args.out.endswith(".safetensors"):
        raise ValueError(f"--out {args.out}: name a folder; --single-file writes one file into it")
    cli.check_not_empty(args, "class_word", "token", "init_word")
    for name, methods in APPLIES_TO.items():
        if getattr(args, name) != default(name) and not {args.method, kind} & set(methods):
            flag, known = name.replace("_", "-"), " or ".join(METHODS[m] for m in methods)
            raise ValueError(f"--{flag} does not apply to this run; it belongs to {known}")
    is_file = Path(args.weights).is_file()
    if args.method == "full" and is_file and not (args.model_config or args.single_file):
        raise ValueError(
            f"{args.weights}: --method full writes a folder, and a single file brings no "
            "configurations; give --single-file, or --model-config FOLDER"
        )
    if args.fp8_base and args.method == "full":
        raise ValueError("--fp8-base does not apply to --method full, which trains these weights")
    if args.validate and (args.preview_prompt or args.preview_every == 0):
        raise ValueError(
            "--validate scores the previews of subject and class; "
            "it goes without --preview-prompt and --preview-every 0"
        )
    if args.dino and not args.validate:
        raise ValueError("--dino has no effect without --validate")
    if kind == "captions" and args.mask == "segment":
        raise ValueError(
            "--mask segment needs a class word, and --captions has none; "
            "give --mask alpha or a folder"
        )
    if inversion:
        validate_inversion(args)
    elif kind == "subject":
        validate_subject(args)


def validate_inversion(args: Namespace) -> None:
    if args.format == "peft":
        raise ValueError("--format peft is for a LoRA; an embedding has kohya or diffusers")
    if not (args.class_word or args.init_word):
        raise ValueError("--init-word (or --class-word) is missing: the new token starts from it")
    args.token = args.token or "<subject>"
    if args.token.split() != [args.token]:
        raise ValueError(
            f"--token {args.token!r} contains white space; give one word, like <my-dog>"
        )


def validate_subject(args: Namespace) -> None:
    if not args.class_word:
        raise ValueError("--class-word is missing: what is the subject? dog, backpack, ...")
    if "{}" not in args.caption:
        raise ValueError(f"--caption {args.caption!r} has no {{}} for the subject's name")
    args.token = args.token or "sks"
    if args.class_images is None:
        args.class_images = 100 if args.method == "full" and args.prior_weight else 0
    if args.class_images and not args.prior_weight:
        raise ValueError("--class-images has no effect with --prior-weight 0")
    if args.class_folder and not args.class_images:
        raise ValueError("--class-folder does not apply to this run; it belongs to --class-images")
    if args.method == "full" and args.prior_weight and not args.class_images:
        raise ValueError(
            "--method full changes the model that prior preservation would compare with; "
            "give --class-images, or --prior-weight 0"
        )


def complete(args: Namespace, sdxl) -> None:
    """Set the checkpoint's defaults for flags that were not given. Raises ValueError for a --size
    that does not fit."""
    defaults = sdxl.defaults
    rate = DEFAULT_RATE[args.method]
    for name, key in (("steps", "training_steps"), ("learning_rate", rate), ("batch", "batch")):
        if getattr(args, name) is None:
            setattr(args, name, defaults[key])
    if args.method == "lora":
        args.rank = args.rank or defaults["rank"]
        args.alpha = float(args.rank if args.alpha is None else args.alpha)
    args.size = args.size or sdxl.size
    f = sdxl.vae_scale_factor
    if args.size[0] % f or args.size[1] % f:
        raise ValueError(
            f"--size {args.size[1]}x{args.size[0]}: both sides must be multiples of {f}"
        )
    if args.preview_every is None:
        args.preview_every = -(-args.steps // 4)
