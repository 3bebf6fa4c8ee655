"""The flags of train.py: what they mean, which apply together, and those of a resumed run.

Imports no torch, so that --help answers at once.
"""

import re
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import cli, files
from ..extras import distributed
from ..files import encodable, resolve
from . import outputs

if TYPE_CHECKING:
    from ..sdxl import SDXL

# A method's name, as messages describe it.
METHODS = {
    "lora": "--method lora",
    "full": "--method full",
    "textual-inversion": "--method textual-inversion",
    "captions": "--captions",
    "subject": "photos of one subject (--method lora or full, without --captions)",
}
# Which methods some flags belong to; the others belong to all.
APPLIES_TO = {
    ("lora",): ("rank", "alpha", "init_lora"),
    ("full",): ("text_encoders",),
    ("lora", "full"): ("captions",),
    ("lora", "textual-inversion"): ("format",),
    ("subject",): ("caption", "prior_weight", "class_images", "class_folder"),
    ("captions",): ("caption_dropout",),
    ("textual-inversion",): ("vectors", "init_word", "style"),
    ("subject", "textual-inversion"): ("class_word", "token", "validate"),
}
DEFAULT_RATE = {"lora": "learning_rate", "full": "full_rate", "textual-inversion": "word_rate"}


# Declaration


def parser(description: str) -> cli.Parser:
    p = cli.parser(description)
    add_subject(p)
    add_training(p)
    add_files(p)
    cli.add_checkpoint(p)
    cli.add_inspect(p)
    return p


def add_subject(p: cli.Parser) -> None:
    add = p.group("")
    text = "folder of photos, or one with 10_sks dog/ inside (default: the example subject)"
    add("photos", text, nargs="?", metavar="SUBJECT_DIR")
    text = "what the subject is: dog, backpack (default: flower, with the example)"
    add("--class-word", text, metavar="WORD")
    text = "rare word for the subject (default: sks; <subject> with textual-inversion)"
    add("--token", text, metavar="WORD")
    text = 'prompt of each photo, {} is token and class word (default: "a photo of a {}")'
    add("--caption", text, default="a photo of a {}", metavar="TEXT")
    add("--captions", "train on images with captions, not on one subject", action="store_true")
    text = "train on a part of each photo: its alpha channel, the class word's region, or masks "
    text += "with the photos' names (default: all of it)"
    add("--mask", text, metavar="alpha|segment|FOLDER")
    text = "folder for all results (default: out/ and the name of SUBJECT_DIR), or a .safetensors "
    text += "file for the weights and a folder of its name for the rest"
    add("--out", text, metavar="PATH")
    start = p.add_mutually_exclusive_group().add_argument
    start("--overwrite", action="store_true", help="start again where --out holds a run")
    text = "continue the run in --out, with its settings; a finished one with more --steps"
    start("--resume", action="store_true", help=text)


def add_training(p: cli.Parser) -> None:
    add = p.group("training")
    text = "train a LoRA on the attention layers, the whole UNet (as DreamBooth), or the embedding "
    text += "of a new token (default: lora)"
    add("--method", text, default="lora", choices=tuple(DEFAULT_RATE))
    text = cli.by_checkpoint("training_steps", "optimizer steps")
    add("--steps", text, type=cli.COUNT, metavar="N")
    text = cli.by_checkpoint("learning_rate", "learning rate of AdamW") + ", "
    text += cli.by_checkpoint("full_rate", "with --method full") + ", "
    text += cli.by_checkpoint("word_rate", "with textual-inversion")
    add("--learning-rate", text, type=cli.POSITIVE, metavar="X")
    text = "course of the learning rate after the warm-up; cosine ends at 0 (default: constant)"
    add("--schedule", text, default="constant", choices=("constant", "cosine"))
    add(
        "--warmup",
        "steps over which the learning rate rises (default: 0)",
        type=cli.WHOLE,
        default=0,
        metavar="N",
    )
    add("--batch", cli.by_checkpoint("batch", "photos per batch"), type=cli.COUNT, metavar="N")
    add("--accumulation", "batches per step (default: 1)", type=cli.COUNT, default=1, metavar="N")
    add("--size", cli.by_checkpoint("size", "size in pixels"), type=cli.size, metavar="N|WxH")
    text = cli.by_checkpoint("rank", "rank of the LoRA")
    add("--rank", text, type=cli.number(int, 1, 4096), metavar="N")
    add("--alpha", "scales the LoRA by alpha/rank (default: rank)", type=cli.POSITIVE, metavar="X")
    add("--init-lora", "continue training this LoRA (default: a new one)", metavar="FILE")
    add("--text-encoders", "with --method full: train both encoders too", action="store_true")
    text = (
        "weight of prior preservation, which keeps the class word's meaning; 0 is none (default: 1)"
    )
    add("--prior-weight", text, type=cli.WEIGHT, default=1.0, metavar="X")
    text = "prior preservation with N class images, generated first, instead of the model's own "
    text += "prediction (default: 0; 100 with --method full)"
    add("--class-images", text, type=cli.WHOLE, metavar="N")
    add(
        "--class-folder",
        "where the class images are kept (default: class/ in --out)",
        metavar="FOLDER",
    )
    text = "share of captions that are dropped, with --captions (default: 0.1)"
    add("--caption-dropout", text, type=cli.SHARE, default=0.1, metavar="X")
    text = "vectors of the new token in each text encoder (default: 2)"
    add("--vectors", text, type=cli.number(int, 1, 75), default=2, metavar="N")
    add(
        "--init-word",
        "word that the new token starts from (default: the class word)",
        metavar="WORD",
    )
    add("--style", "the new token is a style, not an object", action="store_true")
    text = "min-SNR weighting of the loss; 0 is none (default: 5)"
    add("--snr-gamma", text, type=cli.WEIGHT, default=5.0, metavar="X")
    text = "mirror the photos at random; not for subjects with text on them"
    add("--mirror", text, action=cli.BooleanOptionalAction, default=False)
    text = "less memory, a third more time (default: by free GPU memory; on a CPU for SDXL)"
    add("--checkpointing", text, action=cli.BooleanOptionalAction)
    add(
        "--seed",
        "seed of everything random; -1 draws one (default: 0)",
        type=cli.SEED,
        default=0,
        metavar="N",
    )


def add_files(p: cli.Parser) -> None:
    add = p.group("files")
    add(
        "--check", "check the photos, write check.png, time one step, and stop", action="store_true"
    )
    text = "key names in lora.safetensors (default: kohya, which all tools read)"
    add("--format", text, default="kohya", choices=("kohya", "diffusers", "peft"))
    text = "steps between previews; 0 is none (default: a quarter of the steps)"
    add("--preview-every", text, type=cli.WHOLE, metavar="N")
    text = "prompt of the previews; may be repeated (default: subject, class, something unrelated)"
    add("--preview-prompt", text, action="append", metavar="TEXT")
    text = "score each preview: likeness of the subject to the photos, and of the class to the "
    text += "base model's; the best step is named at the end"
    add("--validate", text, action="store_true")
    text = "DINO ViT-S/16 for --validate (default: Hub; offline on the miniature)"
    add("--dino", text, metavar="PATH|ID")
    text = "steps between saved states (default: 100; with --method full only at the end)"
    add("--save-every", text, type=cli.COUNT, metavar="N")


# Reading


def read_args(p: cli.Parser, argv: list[str] | None) -> Namespace:
    """The flags; with --resume, over the settings of the run in --out."""
    args = cli.parse(p, argv)
    args.out = args.out or str(Path("out") / resolve(args.photos or cli.EXAMPLE_PHOTOS).name)
    if args.resume:
        args = read_resumed(p, argv, args)
    if args.captions and args.photos is None:
        raise ValueError("--captions needs the folder of the images")
    if args.photos is None:
        args.photos = str(cli.EXAMPLE_PHOTOS)
        args.class_word = args.class_word or cli.EXAMPLE_CLASS
    name_subject(args, p)
    validate_flags(args, p)
    if args.init_lora:
        args.init_lora = str(files.lora_of_run(args.init_lora, "--init-lora"))
        if not Path(args.init_lora).is_file():
            raise ValueError(f"--init-lora {args.init_lora}: no such file")
    if not (args.resume or args.check):
        outputs.check_no_overwrite(args, p)
    cli.choose_seed(args)
    return args


def read_resumed(p: cli.Parser, argv: list[str] | None, given: Namespace) -> Namespace:
    """The flags over the settings of the run in --out, which may have been moved."""
    out = outputs.run_folder(given)
    path = out / outputs.SETTINGS
    if not path.exists():
        raise ValueError(
            f"{out}: no run to resume ({path.name} is missing); leave out --resume to start one"
        )
    saved = cli.read_settings(path, p)
    suffix = ".safetensors" if (saved.get("out") or "").endswith(".safetensors") else ""
    fixed = {"out": f"{out}{suffix}", "resume": True, "overwrite": False}
    args = p.parse_over(argv, saved | fixed)
    args.out = fixed["out"]
    if args.method != saved.get("method"):
        raise ValueError(
            f"the run in {out} is one of --method {saved.get('method')}, which --method "
            f"{args.method} cannot continue; leave it out, or name another --out"
        )
    return args


def kohya_folders(folder: str | Path) -> list[tuple[int, str, Path]]:
    """(repeats, prompt, path) of subfolders such as "10_sks dog", kohya's layout; [] for others."""
    found = []
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        match = re.fullmatch(r"(\d{1,4})_(.*\S)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2], path))
    return found


def name_subject(args: Namespace, p: cli.Parser) -> None:
    """Take token, class word and prompt from the name "10_sks dog" where none is given."""
    folders = kohya_folders(args.photos)
    given = args.class_word or args.token or args.captions or args.method == "textual-inversion"
    if not folders or given:
        return
    prompts = sorted({prompt for _, prompt, _ in folders})
    words = prompts[0].split()
    if len(prompts) > 1 or len(words) < 2:
        raise ValueError(
            f"{args.photos}: {', '.join(prompts)} is not one token and class word; "
            "give --token and --class-word, or --captions for a prompt per folder"
        )
    args.token, args.class_word = words[0], " ".join(words[1:])
    args.caption = "{}" if args.caption == p.get_default("caption") else args.caption


# Which flags go together


def validate_flags(args: Namespace, p: cli.Parser) -> None:
    """Raise ValueError for flags that do not apply or are missing; complete those that depend on
    others."""
    kind = "subject" if args.method != "textual-inversion" else args.method
    kind = "captions" if args.captions else kind
    cli.check_not_empty(args, "class_word", "token", "init_word")
    for methods, names in APPLIES_TO.items():
        for name in names:
            if getattr(args, name) != p.get_default(name) and not {args.method, kind} & {*methods}:
                known = " or ".join(METHODS[method] for method in methods)
                raise ValueError(
                    f"{cli.flag_of(name)} does not apply to this run; it belongs to {known}"
                )
    if args.check and distributed.world() > 1:
        raise ValueError("--check looks at what one process would do; run it without torchrun")
    if encodable(args.out) != args.out:
        raise ValueError(f"--out {args.out} is not UTF-8, which safetensors needs; name another")
    one_file, is_file = args.out.endswith(".safetensors"), Path(args.weights).is_file()
    if args.method == "full" and is_file and not (one_file or args.model_config):
        raise ValueError(
            f"{args.weights}: --method full writes a folder, and a single file has no "
            "configurations for it; give --out FILE.safetensors, or --model-config FOLDER"
        )
    if args.fp8_base and args.method == "full":
        raise ValueError("--fp8-base does not apply to --method full, which trains these weights")
    if args.validate and (args.preview_prompt or args.preview_every == 0):
        raise ValueError(
            "--validate scores the previews of subject and class; "
            "leave out --preview-prompt and --preview-every 0"
        )
    if args.dino and not args.validate:
        raise ValueError("--dino has no effect without --validate")
    if kind == "captions" and args.mask == "segment":
        raise ValueError("--mask segment needs a class word, and --captions has none")
    if kind == "textual-inversion":
        validate_inversion(args, one_file)
    elif kind == "subject":
        validate_subject(args)


def validate_inversion(args: Namespace, one_file: bool) -> None:
    if args.format == "peft":
        raise ValueError("--format peft is for a LoRA; of an embedding it is kohya or diffusers")
    if args.format == "diffusers" and one_file:
        raise ValueError(f"--out {args.out}: --format diffusers writes a folder; name one")
    if not (args.class_word or args.init_word):
        raise ValueError("--init-word (or --class-word) is missing: the new token starts from it")
    args.token = args.token or "<subject>"
    if args.token.split() != [args.token]:
        raise ValueError(f"--token {args.token!r} contains white space; give one, like <my-dog>")


def validate_subject(args: Namespace) -> None:
    if not args.class_word:
        raise ValueError("--class-word is missing: what is the subject? dog, backpack, ...")
    if "{}" not in args.caption:
        raise ValueError(f"--caption {args.caption!r} has no {{}} for the subject's name")
    args.token = cli.single_token(args.token or "sks", args.class_word)
    if args.class_images is None:
        args.class_images = 100 if args.method == "full" and args.prior_weight else 0
    if args.class_images and not args.prior_weight:
        raise ValueError("--class-images has no effect with --prior-weight 0")
    if args.class_folder and not args.class_images:
        raise ValueError("--class-folder does not apply to this run; it belongs to --class-images")
    if args.method == "full" and args.prior_weight and not args.class_images:
        raise ValueError(
            "--method full changes the model, so that it cannot be its own prior; "
            "give --class-images, or --prior-weight 0"
        )


def complete(args: Namespace, sdxl: "SDXL") -> None:
    """Set the checkpoint's defaults for flags that were not given. Raises ValueError for a --size
    that does not fit."""
    defaults, rate = sdxl.defaults, DEFAULT_RATE[args.method]
    for name, key in (("steps", "training_steps"), ("learning_rate", rate), ("batch", "batch")):
        if getattr(args, name) is None:
            setattr(args, name, defaults[key])
    if args.method == "lora":
        args.rank = args.rank or defaults["rank"]
        args.alpha = float(args.rank if args.alpha is None else args.alpha)
    args.size = args.size or sdxl.size
    (height, width), f = args.size, sdxl.vae_scale_factor
    if height % f or width % f:
        raise ValueError(f"--size {width}x{height}: both sides must be multiples of {f}")
    if args.preview_every is None:
        args.preview_every = -(-args.steps // 4)
