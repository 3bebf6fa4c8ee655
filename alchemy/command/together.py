"""Which flags go together: one that would have no part in a run is refused, in a line that says what it goes with. Imports no torch."""

from ..samplers import SAMPLERS
from ..extras import distributed

WAYS = {
    "lora": "--method lora",
    "full": "--method full",
    "textual-inversion": "--method textual-inversion",
    "captions": "--captions",
    "subject": "photos of one subject and its class (--method lora or full, without --captions)",
}
ONLY = {  # a flag of train.py: the ways to teach that it has a part in; all others have one in each
    "captions": ("lora", "full"),
    "rank": ("lora",),
    "alpha": ("lora",),
    "format": ("lora", "textual-inversion"),
    "text_encoders": ("full",),
    "class_word": ("subject", "textual-inversion"),
    "token": ("subject", "textual-inversion"),
    "caption": ("subject",),
    "prior_weight": ("subject",),
    "class_pictures": ("subject",),
    "class_folder": ("subject",),
    "caption_dropout": ("captions",),
    "vectors": ("textual-inversion",),
    "init_word": ("textual-inversion",),
    "style": ("textual-inversion",),
}


def training(args, default):
    """Refuse train.py's flags that have no part, ask for those that are missing, and fill in what hangs on others. default(name): a
    flag's value where it is not given."""
    word = args.method == "textual-inversion"
    if args.check and distributed.world() > 1:
        raise ValueError("--check looks at what one process would do: leave torchrun away")
    not_empty(args, "class_word", "token", "init_word")
    ways = {args.method, "captions" if args.captions else "word" if word else "subject"}
    for flag, goes_with in ONLY.items():
        if getattr(args, flag) != default(flag) and ways.isdisjoint(goes_with):
            raise ValueError(
                f"--{flag.replace('_', '-')} has no part in this run: it goes with {' or '.join(WAYS[way] for way in goes_with)}"
            )
    if args.fp8_base and args.method == "full":
        raise ValueError(
            "--fp8-base has no part in this run: with --method full, the very weights learn that it would round"
        )
    if word and args.format == "peft":
        raise ValueError(
            "--format peft is of a LoRA; a new word is written as kohya's tools read it, or with --format diffusers"
        )
    if args.captions and args.mask == "segment":
        raise ValueError(
            "--mask segment needs a class to look for, and --captions has none: give --mask alpha or a folder"
        )
    if word and not (args.class_word or args.init_word):
        raise ValueError(
            "--init-word (or --class-word) is missing: what is the new word to start from?"
        )
    if word:
        args.token = args.token or "<subject>"
        if args.token.split() != [args.token]:
            raise ValueError(
                f"--token {args.token!r} has white space in it: a new word is one word, such as <my-dog>"
            )
    elif not args.captions:
        subject(args)


def not_empty(args, *flags):
    for flag in flags:
        if getattr(args, flag, None) is not None and not getattr(args, flag).strip():
            raise ValueError(
                f"--{flag.replace('_', '-')} is empty: give it a word, or leave it out"
            )


def subject(args):
    """The same, of photos of one subject and its class."""
    if not args.class_word:
        raise ValueError("--class-word is missing: what is the subject? dog, backpack, ...")
    if "{}" not in args.caption:
        raise ValueError(f"--caption {args.caption!r} has no {{}} for the subject's name")
    args.token = args.token or "sks"
    if args.class_pictures is None:
        args.class_pictures = 100 if args.method == "full" and args.prior_weight else 0
    if args.class_pictures and not args.prior_weight:
        raise ValueError(
            "--class-pictures has no part in this run: with --prior-weight 0 nothing is held to them"
        )
    if args.class_folder and not args.class_pictures:
        raise ValueError("--class-folder has no part in this run: it goes with --class-pictures")
    if args.method == "full" and args.prior_weight and not args.class_pictures:
        raise ValueError(
            "--method full changes the very model that the class would be held to: give --class-pictures, or --prior-weight 0"
        )


def drawing(args):
    """Refuse flags of sample.py and insert.py that have no part in what is drawn."""
    if getattr(args, "merge", False) and args.fp8_base:
        raise ValueError(
            "--merge has no part in --fp8-base: added to weights of 8 bits, most of a LoRA would be rounded away; leave out one of them"
        )
    not_empty(args, "token")
    if args.eta and args.sampler and args.sampler == "dpmpp_2m":
        raise ValueError(
            f"--eta has no part in --sampler {args.sampler}, which draws no noise: leave it out, or name another sampler"
        )
    if args.negative_prompt and args.guidance == 1:
        raise ValueError(
            "--negative-prompt has no part at --guidance 1, which leads away from nothing: raise it, or leave the prompt out"
        )
