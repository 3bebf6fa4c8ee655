"""What the three scripts share: flags of one spelling, progress, errors in one line, where files go. Imports no torch."""

import argparse
from argparse import BooleanOptionalAction  # noqa: F401  for the scripts
import math
import sys
import time
import warnings
from pathlib import Path

from .defaults import TABLE
from .samplers import SAMPLERS
from .extras import distributed

ROOT = Path(__file__).resolve().parents[1]
MINI = "weights/mini"  # wherever the repository lies and the script is called from
SUBJECT = ROOT / "weights" / "subjects" / "bear-panda"  # no training image shows it
TAUGHT = Path("out") / "bear-panda" / "lora.safetensors"  # what train.py's defaults write
SHIPPED = ROOT / "weights" / "example.safetensors"  # the same, before anything is taught
EXAMPLE = dict(class_word="bear", token="sks")
PLACE = "on grass"
MADE = []  # the folders that this run had to make, the innermost first
FULL = (
    "out of memory",
    "can't allocate memory",
    "alloc_failed",
)  # what CUDA, a CPU, and cuBLAS and cuDNN say where there is no room
LEANER = []  # a function that says, or None, which flags would have fitted the device (fitting.leaner)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, as every other error; argparse would print the usage too."""
        say(f"error: {message} (--help shows every flag)")
        sys.exit(2)

    def misfits(self, values):
        """The names of those values, {flag: value as JSON has it}, that the flags cannot have."""
        return [
            a.dest for a in self._actions if a.dest in values and not self.fits(a, values[a.dest])
        ]

    def fits(self, action, value):
        if value is None or action.nargs == 0:
            return (
                value is None
                and action.default is None
                or type(value) is bool
                and action.nargs == 0
            )
        if action.type is None:
            return isinstance(value, str) and value in (action.choices or [value])
        try:
            return (
                action.type(
                    "x".join(map(str, value[::-1])) if isinstance(value, tuple) else str(value)
                )
                == value
            )
        except argparse.ArgumentTypeError:
            return False


def parser(description):
    return Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def by_checkpoint(name, help):
    """A flag's help with the two defaults of defaults.TABLE."""
    mini, sdxl = next(row[1:3] for row in TABLE if row[0] == name)
    return (
        f"{help} (default: {mini})"
        if mini == sdxl
        else f"{help} (default: {mini} for the miniature, {sdxl} for SDXL)"
    )


def number(kind, low, high=math.inf, above=False):
    """A flag's type: int or float in [low, high], or in (low, high] if it must be above low."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {'whole ' if kind is int else ''}number"
            ) from None
        if (
            not (low < value or low == value and not above)
            or not value <= high
            or value == math.inf
        ):
            limit = f"{'above' if above else 'at least'} {low}" + (
                "" if high == math.inf else f" and at most {high}"
            )
            raise argparse.ArgumentTypeError(f"{text} is out of range; it must be {limit}")
        return value

    return read


COUNT, WHOLE, SEED = number(int, 1), number(int, 0), number(int, 0, 2**63 - 1)
POSITIVE, WEIGHT = number(float, 0, above=True), number(float, 0)
STRENGTH, SHARE = number(float, 0, 1, above=True), number(float, 0, 1)


def size(text):
    """ "1024" or "WIDTHxHEIGHT" to (H, W)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(
        side.isascii() and side.isdigit() and int(side) > 0 for side in sides
    ):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give 1024, or WIDTHxHEIGHT")
    return int(sides[-1]), int(sides[0])


def scaled_file(text):
    """ "FILE" or "FILE:0.8" to (path, scale)."""
    path, colon, scale = text.rpartition(":")
    try:
        path, scale = (path, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0  # the colon belongs to the path
    if not math.isfinite(scale):
        raise argparse.ArgumentTypeError(f"{text!r} has no finite scale; give FILE, or FILE:0.8")
    return path, scale


def add_checkpoint(p):
    g = p.add_argument_group("checkpoint")
    g.add_argument(
        "--weights",
        default=MINI,
        metavar="PATH|ID",
        help="folder, .safetensors file or Hub id of an SDXL checkpoint (default: the miniature that ships)",
    )
    g.add_argument("--vae", metavar="PATH|ID", help="another VAE")
    g.add_argument(
        "--config", metavar="FOLDER", help="configurations for a single file (default: SDXL base's)"
    )
    g.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    g.add_argument("--device", default="auto", help="auto, cuda, mps, cpu (default: auto)")
    g.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the networks (default: auto, float32 on the CPU)",
    )
    from .command.pace import add_flags

    add_flags(p)


def add_drawing(p):
    g = p.add_argument_group("drawing")
    g.add_argument(
        "--lora",
        type=scaled_file,
        action="append",
        metavar="FILE[:SCALE]",
        help="a LoRA file, several times for several",
    )
    g.add_argument(
        "--embedding",
        action="append",
        metavar="FILE",
        help="a learned word (Textual Inversion), several times for several; its token is the file's own, or its name",
    )
    g.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="what guidance leads away from (default: zeros, as SDXL was trained)",
    )
    g.add_argument(
        "--sampler",
        metavar="NAME",
        choices=tuple(SAMPLERS),
        help=by_checkpoint("sampler", ", ".join(SAMPLERS)),
    )
    g.add_argument(
        "--grid",
        metavar="NAME",
        choices=("leading", "trailing", "linspace"),
        help="timesteps: leading, trailing or linspace (default: the checkpoint's; lcm has its own)",
    )
    g.add_argument(
        "--steps", type=COUNT, metavar="N", help=by_checkpoint("steps", "denoising steps")
    )
    g.add_argument(
        "--guidance",
        type=WEIGHT,
        metavar="G",
        help=by_checkpoint("guidance", "classifier-free guidance; 1 is none"),
    )
    g.add_argument(
        "--eta",
        type=SHARE,
        metavar="E",
        help="share of the noise drawn anew at each step, 0 to 1 (default: the sampler's)",
    )
    g.add_argument("--size", type=size, metavar="N|WxH", help=by_checkpoint("size", "pixels"))
    g.add_argument(
        "--seed",
        type=SEED,
        default=0,
        metavar="N",
        help="of the noise: equal seeds draw equal pictures (default: 0)",
    )


def drawing(args):
    """The options of alchemy.denoise among the flags."""
    return {name: getattr(args, name) for name in ("sampler", "grid", "steps", "guidance", "eta")}


def load(args):
    """The checkpoint of the flags. Its adapters are put on by put_loras; here their files are only looked at, before gigabytes are read."""
    import alchemy
    from .formats.tensors import open_safetensors

    for path, _ in getattr(args, "lora", None) or ():
        open_safetensors(path)
    weights = ROOT / MINI if args.weights == MINI else args.weights
    if distributed.world() > 1 and ":" in args.device:
        raise ValueError(
            f"--device {args.device} is one GPU, and torchrun gives each process its own: leave it out, or give CUDA_VISIBLE_DEVICES"
        )
    if args.revision and Path(weights).exists():
        raise ValueError(
            f"--revision is of a checkpoint on the Hub; {args.weights} is a place on this machine"
        )
    from .command.pace import ready

    return ready(
        args,
        alchemy.load(
            weights,
            args.device,
            args.dtype,
            config=args.config,
            vae=args.vae,
            revision=args.revision,
        ),
    )


def default_lora():
    """The LoRA that train.py's defaults wrote, or, before that, the one that ships; as a list for --lora."""
    return [(str(TAUGHT if TAUGHT.exists() else SHIPPED), 1.0)]


def put_loras(sdxl, loras, embeddings=None, prompts=None, merge=False):
    """Put the files of the flags on, merged into the weights if wanted; returns the words that the embeddings are. One that stands in
    none of the prompts is warned of."""
    import alchemy

    words = []
    if embeddings:
        from .formats.embeddings import load_embedding

        for path in embeddings:
            words.append(load_embedding(sdxl, path))
            say(f"{path} is {words[-1]!r} in a prompt")
            if prompts and not any(
                words[-1].lower() in (prompt or "").lower() for prompt in prompts
            ):
                say(f"warning: {words[-1]!r} is in no prompt, and has no part in what is drawn")
    for path, scale in loras or ():
        alchemy.load_lora(sdxl, path, scale)
    if merge:
        from . import lora

        lora.merge(sdxl)
    return words


def progress(iterable, total, name, shown=lambda item: ""):
    """Yield what iterable yields beside a bar with rate and remaining time, or, without a terminal, a line every so often."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=name, dynamic_ncols=True) as bar:
            for item in iterable:
                bar.set_postfix_str(shown(item), refresh=False)
                bar.update()
                yield item
        return
    start = said = time.monotonic()
    for count, item in enumerate(iterable, 1):
        now = time.monotonic()
        if now - said > 10 or count == total:
            rate = count / max(now - start, 1e-9)
            print(
                f"{name}: {count}/{total}, {rate:.2f}/s, {(total - count) / rate:.0f} s left {shown(item)}".rstrip(),
                file=sys.stderr,
                flush=True,
            )
            said = now
        yield item


def is_picture(path):
    """Whether --out names a file, and not a folder. Raises ValueError for a picture that is no PNG."""
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ValueError(
            f"--out {path}: pictures are written as .png, which keeps how they were made"
        )
    return path.suffix.lower() == ".png"


def free_path(path):
    """path, or, where it exists, its name with the next free number: beach.png, beach-1.png, ..."""
    path, number = Path(path), 0
    free = path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def folder(path, flag="--out"):
    """The folder, made if need be and proved writable before the work begins."""
    import tempfile

    path = Path(path)
    if distributed.rank():
        return path  # rank 0 makes it
    try:
        MADE.extend(p for p in (path, *path.parents) if not p.exists())
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(
            f"{flag} {path}: cannot write there ({error.strerror}); name another folder"
        ) from None


def say(text):
    print(text, file=sys.stderr, flush=True)


def wrote(*paths):
    """The last line of every run: the files it wrote, on stdout."""
    print("wrote " + " ".join(str(p) for p in paths), flush=True)


@distributed.one_voice()
def run(main):
    """Call main() as a script does: bad input, a full disk or too little memory end in one line and status 2."""
    MADE.clear(), LEANER.clear()
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    try:
        return main()
    except (ValueError, OSError, FloatingPointError) as error:
        said = (
            f"{error.filename}: {error.strerror}"
            if isinstance(error, OSError) and error.filename
            else str(error) or type(error).__name__
        )
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(
            sign in str(error).lower() for sign in FULL
        ):
            raise
        said = "out of memory: " + (
            LEANER and LEANER[0]() or "use a smaller --size or --batch, or --dtype bfloat16"
        )
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    for path in (p for p in MADE if p.is_dir() and not any(p.iterdir())):
        path.rmdir()
    say("error: " + " ".join(said.split()))
    sys.exit(2)
