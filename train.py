"""Teach SDXL a subject from 3 to 5 photos, or pictures with captions.

python train.py SUBJECT_DIR --class-word dog --token sks --out out/my-dog
python train.py FOLDER --captions --out out/my-style       metadata.jsonl in it, or a .txt beside each picture
python train.py                      the example subject, on the miniature that ships
torchrun --nproc-per-node 4 train.py ...                   on several GPUs, --batch on each
"""

from pathlib import Path

from alchemy import cli
from alchemy.command import inspecting, together
from alchemy.command.results import read_settings, result, spare


def parser():
    p = cli.parser(__doc__)
    p.add_argument(
        "photos",
        nargs="?",
        metavar="SUBJECT_DIR",
        help="folder of JPEG, PNG or WebP photos (default: the example subject)",
    )
    p.add_argument(
        "--class-word",
        metavar="WORD",
        help="what the subject is: dog, backpack (default: bear, with the example)",
    )
    p.add_argument(
        "--token",
        metavar="WORD",
        help="a rare word that will name the subject (default: sks), or the new word of textual-inversion (default: <subject>)",
    )
    p.add_argument(
        "--caption",
        default="a photo of a {}",
        metavar="TEXT",
        help='of each photo, {} is token and class word (default: "a photo of a {}")',
    )
    p.add_argument(
        "--captions",
        action="store_true",
        help="the pictures have captions of their own; there is no subject and no class",
    )
    p.add_argument(
        "--mask",
        metavar="alpha|segment|FOLDER",
        help="what of each photo is learned: its alpha channel, what the class word names, or masks of the photos' names (default: all)",
    )
    p.add_argument(
        "--out",
        metavar="FOLDER",
        help="where all is written (default: out/ and the name of SUBJECT_DIR)",
    )
    g = p.add_mutually_exclusive_group()
    g.add_argument("--overwrite", action="store_true", help="start again where --out holds a run")
    g.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, with its settings"
    )
    g = p.add_argument_group("training")
    g.add_argument(
        "--method",
        default="lora",
        choices=("lora", "full", "textual-inversion"),
        help="what learns: a LoRA on the attention, all of the UNet, as DreamBooth has it, or a new word alone (default: lora)",
    )
    g.add_argument(
        "--steps",
        type=cli.COUNT,
        metavar="N",
        help=cli.by_checkpoint("training_steps", "optimizer steps"),
    )
    g.add_argument(
        "--learning-rate",
        type=cli.POSITIVE,
        metavar="X",
        help=", ".join(
            cli.by_checkpoint(*of)
            for of in (
                ("learning_rate", "of AdamW"),
                ("full_rate", "with --method full"),
                ("word_rate", "with textual-inversion"),
            )
        ),
    )
    g.add_argument(
        "--warmup",
        type=cli.WHOLE,
        default=0,
        metavar="N",
        help="steps over which the learning rate rises (default: 0)",
    )
    g.add_argument(
        "--batch",
        type=cli.COUNT,
        metavar="N",
        help=cli.by_checkpoint("batch", "photos per batch"),
    )
    g.add_argument(
        "--accumulation",
        type=cli.COUNT,
        default=1,
        metavar="N",
        help="batches per step (default: 1)",
    )
    g.add_argument(
        "--size", type=cli.size, metavar="N|WxH", help=cli.by_checkpoint("size", "pixels")
    )
    g.add_argument(
        "--rank", type=cli.COUNT, metavar="N", help=cli.by_checkpoint("rank", "of the LoRA")
    )
    g.add_argument(
        "--alpha",
        type=cli.POSITIVE,
        metavar="X",
        help="the LoRA is scaled by alpha/rank (default: rank)",
    )
    g.add_argument(
        "--text-encoders",
        action="store_true",
        help="with --method full: both text encoders learn too",
    )
    g.add_argument(
        "--prior-weight",
        type=cli.WEIGHT,
        default=1.0,
        metavar="X",
        help="how much the class word is held to what it was; 0 halves the time (default: 1)",
    )
    g.add_argument(
        "--class-pictures",
        type=cli.WHOLE,
        metavar="N",
        help="hold the class to so many pictures of it, which are drawn first, instead of to the model's own prediction (default: 0, and 100 with --method full)",
    )
    g.add_argument(
        "--class-folder",
        metavar="FOLDER",
        help="where they are kept, to be used again (default: class/ in --out)",
    )
    g.add_argument(
        "--caption-dropout",
        type=cli.SHARE,
        default=0.1,
        metavar="X",
        help="share of captions that are left out, with --captions (default: 0.1)",
    )
    g.add_argument(
        "--vectors",
        type=cli.COUNT,
        default=2,
        metavar="N",
        help="rows of the new word in each text encoder (default: 2)",
    )
    g.add_argument(
        "--init-word",
        metavar="WORD",
        help="what the new word starts from (default: the class word)",
    )
    g.add_argument("--style", action="store_true", help="the new word is a style, not a thing")
    g.add_argument(
        "--snr-gamma",
        type=cli.WEIGHT,
        default=5.0,
        metavar="X",
        help="min-SNR weighting; 0 is none (default: 5)",
    )
    g.add_argument(
        "--mirror",
        action=cli.BooleanOptionalAction,
        default=False,
        help="photos mirrored too; not for what has writing on it",
    )
    g.add_argument(
        "--checkpointing",
        action=cli.BooleanOptionalAction,
        default=None,
        help="less memory, a third more time (default: by a GPU's free memory; elsewhere for SDXL)",
    )
    g.add_argument("--seed", type=cli.SEED, default=0, metavar="N", help="(default: 0)")
    g = p.add_argument_group("files")
    g.add_argument(
        "--check",
        action="store_true",
        help="look at the pictures, write check.png, time one step, and stop there",
    )
    g.add_argument(
        "--format",
        default="kohya",
        choices=("kohya", "diffusers", "peft"),
        help="names in lora.safetensors (default: kohya, which all tools read)",
    )
    g.add_argument(
        "--preview-every",
        type=cli.WHOLE,
        metavar="N",
        help="steps between previews; 0 is none (default: a quarter of the steps)",
    )
    g.add_argument(
        "--save-every",
        type=cli.COUNT,
        metavar="N",
        help="steps between states to resume from (default: 100; with --method full, whose states are large, one at the end or an interruption)",
    )
    cli.add_checkpoint(p)
    inspecting.add_flags(p)
    return p


def read_flags(argv):
    """The flags; with --resume, over the settings of the run in --out."""
    p = parser()
    args = p.parse_args(argv)
    args.out = args.out or str(Path("out") / Path(args.photos or cli.SUBJECT).resolve().name)
    run, stopped = (Path(args.out) / name for name in ("settings.json", "state.safetensors"))
    if args.resume:
        saved = read_settings(run, args)
        if wrong := p.misfits(saved):
            raise ValueError(
                f"{run}: not the settings of a run: {wrong[0]} is {saved[wrong[0]]!r}; --overwrite starts again"
            )
        p.set_defaults(**saved | {"out": args.out, "resume": True, "overwrite": False})
        args = p.parse_args(argv)
        if args.method != saved.get("method", args.method):
            raise ValueError(
                f"--method {args.method} is not that of the run in {args.out}, {saved['method']}: leave it out, or name another --out"
            )
    if args.captions and args.photos is None:
        raise ValueError("--captions needs the folder of the pictures")
    if args.photos is None:
        args.photos, args.class_word = (
            str(cli.SUBJECT),
            args.class_word or cli.EXAMPLE["class_word"],
        )
    together.training(args, parser().get_default)
    if args.resume and result(args).exists() and not stopped.exists():
        raise ValueError(
            f"{args.out}: this run is finished; --overwrite starts again, --out names another folder"
        )
    if (
        not args.resume
        and (run.exists() or result(args).exists())
        and not args.overwrite
        and not args.check
    ):
        raise ValueError(
            f"{args.out} holds a run already: --resume goes on with it, --overwrite starts again, --out names another folder"
        )
    if not (args.resume or args.check):
        spare(args)
    return args


def main(argv=None):
    args = read_flags(argv)
    from alchemy.command import training

    training.main(args)


if __name__ == "__main__":
    cli.run(main)
