"""What the three scripts share: argument types and flag groups, progress, one-line errors,
output folders. Imports no torch, so that --help answers at once.
"""

import argparse
import errno
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from argparse import BooleanOptionalAction  # noqa: F401  for the scripts
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from . import samplers
from .defaults import TABLE
from .extras import distributed, other_tools
from .samplers import SAMPLERS

if TYPE_CHECKING:
    from .sampling import Step
    from .schedule import Schedule
    from .sdxl import SDXL

Item = TypeVar("Item")
ROOT = Path(__file__).resolve().parents[1]
MINI = "weights/mini"  # relative to the repository, wherever the script is called from

# The example: a subject that the miniature has never seen.
EXAMPLE_PHOTOS = ROOT / "weights" / "subjects" / "flower-sunflower"
EXAMPLE_CLASS, EXAMPLE_TOKEN, EXAMPLE_SCENE = "flower", "sks", "on grass"
TRAINED_LORA = Path("out") / EXAMPLE_PHOTOS.name / "lora.safetensors"  # train.py's default output
BUNDLED_LORA = ROOT / "weights" / "example.safetensors"

MAX_SIDE = 16384  # pixels
MAX_MESSAGE = 380  # characters
MAX_HINTS = 5  # of unknown flags in a message
SAMPLING_OPTIONS = ("sampler", "spacing", "steps", "guidance", "eta")  # of alchemy.denoise
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")  # CUDA, CPU, cuBLAS


# Parsing


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line, hints for other tools' flags, and values from JSON."""

    def group(self, title: str) -> Callable[..., None]:
        """A function add(flag, help, **options) for the flags of a group of --help."""
        group = self.add_argument_group(title) if title else self

        def add(flag: str, text: str, **options: Any) -> None:
            group.add_argument(flag, help=text, **options)

        return add

    def parse_args(self, argv: list[str] | None = None, namespace: Any = None) -> Any:
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            self.error(self.explain_unknown(unknown))
        return args

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}{self.value_hint(message)} (--help shows every flag)")

    def explain_unknown(self, arguments: list[str]) -> str:
        """Name the flags among arguments that no flag of this script takes, with their names here
        where they are known."""
        flags = []
        for argument in arguments:
            if re.match("--?[A-Za-z]", argument):
                flags.append(argument.partition("=")[0])
        flags = list(dict.fromkeys(flags))
        if not flags:
            words = quoted(" ".join(arguments))
            return f"more arguments than expected: {words}; put a text of several words in quotes"
        answers = []
        for flag in flags[:MAX_HINTS]:
            here = self.flag_hint(flag)
            answers.append(f"{flag} ({here})" if here else flag)
        rest = len(flags) - len(answers)
        more = f", and {rest} more (the table is in alchemy/CLI.md)" if rest else ""
        return f"unknown flag{'s' if len(flags) > 1 else ''} {', '.join(answers)}{more}"

    def flag_hint(self, flag: str) -> str:
        """What another tool's flag, or one with a typing error, is called here; or ""."""
        name, known = flag.lstrip("-").lower().replace("_", "-"), self._option_string_actions
        here = f"--{name}" if f"--{name}" in known else other_tools.flag_here(name, known)
        elsewhere = other_tools.flag_here(name)
        if not here and elsewhere:
            return f"not of this script; in another it is {elsewhere}"
        if not here:
            import difflib

            here = " ".join(difflib.get_close_matches(f"--{name}", known, 1, 0.8))
        return here if here.startswith("not ") or not here else f"here it is {here}"

    def value_hint(self, message: str) -> str:
        """The value here for another tool's that argparse refused, if it is known."""
        match = re.search(r"invalid choice: '(.*?)' \(choose from (.*)", message)
        if not match:
            return ""
        here = other_tools.value_here(match[1].lower().replace(" ", "_"))
        fits = any(word in match[2] for word in here.replace(",", "").split())
        if not fits:
            return ""
        return f"; {here}" if here.startswith("not ") else f"; here it is {here}"

    def from_json(self, name: str, value: object) -> object:
        """A flag's value as JSON has it, checked as on the command line; ValueError if refused."""
        action = next(action for action in self._actions if action.dest == name)
        is_list = isinstance(action, argparse._AppendAction)
        if value is None and action.default is None:
            return None
        if action.nargs == 0 and type(value) is bool:  # a switch
            return value
        if action.nargs == 0 or is_list and not isinstance(value, list):
            raise ValueError(f"{name} is {quoted(value)}")
        if is_list:
            return [self.item_from_json(action, item) for item in value]
        return self.item_from_json(action, value)

    def item_from_json(self, action: argparse.Action, value: object) -> object:
        """Read the value as the text that the command line would have, and compare."""
        text, expected = str(value), value
        if isinstance(value, list):  # a size [H, W], or a file and its scale
            parts = value[::-1] if action.type is size else value
            text, expected = ("x" if action.type is size else ":").join(map(str, parts)), (*value,)
        try:
            result = self._get_value(action, text)
        except argparse.ArgumentError as error:
            raise ValueError(f"{action.dest}: {error.message}") from None
        if result != expected or action.choices and result not in action.choices:
            raise ValueError(f"{action.dest} is {quoted(value)}")
        return result

    def parse_over(self, argv: list[str] | None, values: dict) -> argparse.Namespace:
        """Parse with `values` as the defaults. A flag that may be repeated replaces them."""
        given = self.parse_args(argv)
        defaults = {name: self.get_default(name) for name in values}
        self.set_defaults(**values)
        args = self.parse_args(argv)
        self.set_defaults(**defaults)
        for action in self._actions:
            if isinstance(action, argparse._AppendAction) and getattr(given, action.dest):
                setattr(args, action.dest, getattr(given, action.dest))
        return args


def parser(description: str) -> Parser:
    """The parser of a script; its docstring is the description."""
    p = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--traceback", action="store_true", help=argparse.SUPPRESS)  # see run()
    return p


def read_settings(path: str | Path, p: Parser) -> dict:
    """The flags in a JSON file such as a run's settings.json, each checked as on the command line.

    Raises ValueError that names the file where it is not a JSON object or a value is refused.
    """
    from . import files

    files.check_no_pipe(path)
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not a JSON file") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: not the settings of a run (a JSON object)")
    flags = {action.dest for action in p._actions} - {"help", "traceback", "config"}
    try:
        return {name: p.from_json(name, saved[name]) for name in saved.keys() & flags}
    except ValueError as error:
        raise ValueError(f"{path}: not the settings of a run: {error}") from None


def parse(p: Parser, argv: list[str] | None) -> argparse.Namespace:
    """The flags of a script, over the file of --config, and with a seed where --seed is -1."""
    args = p.parse_args(argv)
    if args.config:
        args = p.parse_over(argv, read_settings(args.config, p))
    return args


def choose_seed(args: argparse.Namespace) -> None:
    """--seed -1: draw a seed and log it, so that the run can be repeated."""
    if args.seed == -1:
        import secrets

        if distributed.world() > 1:
            raise ValueError("--seed -1: each process would draw its own; give a seed")
        args.seed = secrets.randbelow(2**32)
        log(f"seed {args.seed}")


# Argument types


def quoted(value: object) -> str:
    """repr, cut to a length that fits into a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}..."


def number(kind: type, low: float, high: float, above: bool = False) -> Callable:
    """An argument type: int or float in [low, high], or in (low, high] with above=True."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not a {whole}number") from None
        is_low = value <= low if above else value < low
        if is_low or value > high or value != value:
            limit = f"{'above' if above else 'at least'} {low} and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{quoted(text)} is out of range; it must be {limit}")
        return value

    return read


COUNT, WHOLE = number(int, 1, 10**6), number(int, 0, 10**6)
SEED = number(int, -1, 2**63 - 1)
POSITIVE, WEIGHT = number(float, 0, 1e6, above=True), number(float, 0, 1e6)
STRENGTH, SHARE = number(float, 0, 1, above=True), number(float, 0, 1)


def size(text: str) -> tuple[int, int]:
    """ "1024" or "WIDTHxHEIGHT" to (H, W) in pixels."""
    match = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", text.lower())
    width, height = (int(side or match[1]) for side in match.groups()) if match else (0, 0)
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} is not a size; give 1024, or WIDTHxHEIGHT, of 1 to {MAX_SIDE}"
        )
    return height, width


def scaled_file(text: str) -> tuple[str, float | None]:
    """ "FILE" or "FILE:0.8" to (path, scale); None where no scale is given (find_loras)."""
    path, colon, end = text.rpartition(":")
    try:
        scale = float(end)
    except ValueError:
        return text, None  # the colon belongs to the path
    if not colon:
        return text, None
    if not abs(scale) <= 1e6:
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} has no finite scale; give FILE, or FILE:0.8"
        )
    return path, scale


# Flag groups


def by_checkpoint(name: str, text: str) -> str:
    """A flag's help with the two defaults of defaults.TABLE."""
    mini, sdxl = next(row[1:3] for row in TABLE if row[0] == name)
    if mini == sdxl:
        return f"{text} (default: {mini})"
    return f"{text} (default: {mini} for the miniature, {sdxl} for SDXL)"


def add_checkpoint(p: Parser) -> None:
    """The flags that say which checkpoint, where it runs, and how fast."""
    add = p.group("checkpoint")
    text = "folder, .safetensors file or Hub id of an SDXL checkpoint (default: the miniature)"
    add("--weights", text, default=MINI, metavar="PATH|ID")
    add("--vae", "VAE to use instead of the checkpoint's", metavar="PATH|ID")
    text = "configurations for --weights that is a single file (default: SDXL base's)"
    add("--model-config", text, metavar="FOLDER")
    add("--revision", "branch, tag or commit on the Hub", metavar="NAME")
    add("--device", "auto, cuda, mps or cpu (default: auto, the fastest there is)", default="auto")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    text = "number format of the networks (default: auto, which is float32 on a CPU)"
    add("--dtype", text, default="auto", choices=dtypes)
    text = (
        "JSON file with flags, such as a run's settings.json; flags on the command line override it"
    )
    add("--config", text, metavar="FILE")
    add = p.group("speed and memory")
    text = "store the UNet's linear layers in 8 bits: half of bfloat16's memory (default: no)"
    add("--fp8-base", text, action=BooleanOptionalAction, default=None)
    text = "compile the UNet's blocks: faster steps, but minutes before the first (default: no)"
    add("--compile", text, action=BooleanOptionalAction, default=None)


def add_sampling(p: Parser) -> None:
    """The flags of denoising, of sample.py and insert.py."""
    add = p.group("sampling")
    text = "LoRA file, or the folder of a run; may be repeated"
    add("--lora", text, type=scaled_file, action="append", metavar="FILE[:SCALE]")
    text = "textual-inversion file, used by its token (the log says which); may be repeated"
    add("--embedding", text, action="append", metavar="FILE")
    text = "what the image should not show (default: zeros, as SDXL was trained)"
    add("--negative-prompt", text, metavar="TEXT")
    text = by_checkpoint("sampler", ", ".join(SAMPLERS))
    add("--sampler", text, choices=tuple(SAMPLERS), metavar="NAME")
    spacings = ("leading", "trailing", "linspace")
    text = "how the timesteps are spaced (default: by the checkpoint; lcm has its own)"
    add("--timestep-spacing", text, dest="spacing", choices=spacings)
    add("--steps", by_checkpoint("steps", "denoising steps"), type=COUNT, metavar="N")
    text = by_checkpoint("guidance", "scale of classifier-free guidance; 1 is none")
    add("--guidance", text, type=WEIGHT, metavar="G")
    text = "share of fresh noise at each step, 0 to 1 (default: the sampler's)"
    add("--eta", text, type=SHARE, metavar="E")
    add("--size", by_checkpoint("size", "size in pixels"), type=size, metavar="N|WxH")
    text = "seed of the noise; the same seed gives the same image; -1 draws one (default: 0)"
    add("--seed", text, type=SEED, default=0, metavar="N")


def add_inspect(p: Parser) -> None:
    add = p.group("inspection")
    text = "folder for an HTML page that shows every step; if not empty, the next free number"
    add("--inspect", text, metavar="FOLDER")
    text = "with --inspect: write all arrays too, as safetensors beside the page"
    add("--inspect-full", text, action="store_true")


def sampling_options(args: argparse.Namespace) -> dict:
    """The options of alchemy.denoise among the flags."""
    return {name: getattr(args, name) for name in SAMPLING_OPTIONS}


def check_sampling(args: argparse.Namespace) -> None:
    """Raise ValueError for flags of sample.py and insert.py that would have no effect."""
    if getattr(args, "merge", False) and args.fp8_base:
        raise ValueError(
            "--merge with --fp8-base: rounded to 8 bits, most of a LoRA would be lost; "
            "leave out one of them"
        )
    check_not_empty(args, "token", "class_word")
    if args.eta and args.sampler == "dpmpp_2m":
        raise ValueError(
            "--eta has no effect with --sampler dpmpp_2m, which adds no noise; "
            "leave it out, or choose another sampler"
        )
    if args.negative_prompt and args.guidance == 1:
        raise ValueError(
            "--negative-prompt has no effect with --guidance 1; raise the guidance, "
            "or leave the negative prompt out"
        )


def check_not_empty(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name, None)
        if value is not None and not value.strip():
            raise ValueError(f"{flag_of(name)} is empty; give a word, or leave it out")


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def settings(args: argparse.Namespace) -> dict:
    """The flags as JSON, for settings.json: what is made, not how the run was started."""
    skipped = ("inspect", "inspect_full", "config", "resume", "overwrite", "traceback")
    values = {name: value for name, value in vars(args).items() if name not in skipped}
    return json.loads(json.dumps(values, default=str))


def metadata(args: argparse.Namespace) -> dict:
    """The settings that an image carries: no folders of this machine that it was not made from."""
    folders = ("out", "class_folder", "like", "prompts")
    return {name: value for name, value in settings(args).items() if name not in folders}


# Loading


def load(args: argparse.Namespace) -> "SDXL":
    """The checkpoint of the flags. Its networks are read on first use."""
    import alchemy

    from .extras import optimizations
    from .formats.tensors import open_safetensors

    # Look at the small files before gigabytes are read.
    if getattr(args, "lora", None):
        find_loras(args)
        for path, _ in args.lora:
            open_safetensors(path)
    weights = ROOT / MINI if args.weights == MINI else args.weights
    check_weights(args, Path(weights))
    sdxl = alchemy.load(
        weights,
        args.device,
        args.dtype,
        config=args.model_config,
        vae=args.vae,
        revision=args.revision,
    )
    if sdxl.device.type == "cpu" and sdxl.size[0] >= 512:
        log("warning: SDXL on a CPU takes minutes for each step; a GPU is used where torch has one")
    if args.fp8_base or args.compile:
        optimizations.prepare(sdxl, args.fp8_base, args.compile)
    return sdxl


def check_weights(args: argparse.Namespace, weights: Path) -> None:
    """Raise ValueError for a --weights, --revision or --device that cannot work."""
    if distributed.world() > 1 and ":" in args.device:
        raise ValueError(
            f"--device {args.device} is one GPU, and torchrun gives each process its own; "
            "leave it out, or set CUDA_VISIBLE_DEVICES"
        )
    if args.revision and weights.exists():
        raise ValueError(f"--revision is for a checkpoint on the Hub; {weights} is a local path")
    # What --method full has written: into the folder of the run, or beside it.
    for written in (weights / "checkpoint" / "model_index.json", Path(f"{weights}.safetensors")):
        if weights.is_dir() and written.exists() and not (weights / "model_index.json").exists():
            meant = written.parent if written.suffix == ".json" else written
            raise ValueError(f"--weights {weights}: no checkpoint; did you mean {meant}?")


def find_loras(args: argparse.Namespace) -> None:
    """Replace the folder of a run by its lora.safetensors, and a scale that is not given by 1."""
    from . import files

    for i, (path, scale) in enumerate(args.lora):
        args.lora[i] = (str(files.lora_of_run(path, "--lora")), 1.0 if scale is None else scale)


def single_token(token: str, class_word: str) -> str:
    """The token without the class word, which some write behind it; several words are refused."""
    words = token.split()
    if len(words) > 1 and " ".join(words[1:]).lower() == class_word.lower():
        log(f"--token is {words[0]!r}: {class_word!r} is the class word")
        return words[0]
    if len(words) > 1:
        raise ValueError(f"--token {token!r} is several words; the token is one, such as sks")
    return token


def default_lora() -> list[tuple[str, float]]:
    """The LoRA of train.py's default run, or, if there is none yet, the bundled one."""
    return [(str(TRAINED_LORA if TRAINED_LORA.exists() else BUNDLED_LORA), 1.0)]


def apply_loras(
    sdxl: "SDXL",
    loras: list[tuple[str, float]] | None,
    embeddings: list[str] | None = None,
    prompts: list[str | None] | None = None,
    merge: bool = False,
) -> list[str]:
    """Add the LoRA and embedding files to the model; returns the embeddings' tokens.

    Warns of an embedding whose token is in none of the prompts. merge: fold the LoRAs into the
    weights, which makes sampling faster.
    """
    import alchemy

    from . import lora
    from .formats.embeddings import bundled_embeddings, load_embedding

    tokens = []
    for path in embeddings or ():
        token = load_embedding(sdxl, path)
        tokens.append(token)
        log(f"{path}: its token is {token!r}")
        if prompts and not any(token.lower() in (prompt or "").lower() for prompt in prompts):
            log(f"warning: {token!r} is in no prompt, so {path} has no effect")
    for path, scale in loras or ():
        alchemy.load_lora(sdxl, path, scale)
        for token in bundled_embeddings(path):
            log(f"{path}: an embedding is bundled with it; its token is {token!r}")
    if merge:
        lora.merge(sdxl)
    return tokens


# Progress and messages


def describe(sdxl: "SDXL", args: argparse.Namespace) -> str:
    """Where a run takes place: "cpu, float32, weights/mini"."""
    return f"{sdxl.device}, {str(sdxl.dtype).removeprefix('torch.')}, {args.weights}"


def timesteps(
    args: argparse.Namespace, sdxl: "SDXL", options: dict, strength: float
) -> list[tuple[float, float]]:
    """The (t, t_prev) of each step that will run."""
    found = samplers.find_sampler(options["sampler"])
    return found.timesteps(sdxl.schedule, options["steps"], args.spacing, strength)


def describe_steps(schedule: "Schedule", timesteps: list, steps: int) -> str:
    """What really runs, in a line: "29 of 50 steps, first t 561 (sigma 3.02)"."""
    t = timesteps[0][0]
    alpha_bar = schedule.alpha_bar_at(t)
    sigma = f"{((1 - alpha_bar) / alpha_bar) ** 0.5:.2f}" if alpha_bar else "infinite"
    return f"{len(timesteps)} of {steps} steps, first t {t:g} (sigma {sigma})"


class Estimate:
    """Logs once, a second after the first step, how long a run of `total` steps takes.

    what: what is counted, for the message. The first step, which warms up, is not measured.
    extra: seconds that come on top of the steps that are left; may be changed until the log.
    """

    def __init__(self, total: int, what: str, extra: float = 0.0):
        self.total, self.what, self.extra = total, what, extra
        self.start = time.monotonic()
        self.first: float | None = None  # when the first step ended
        self.count = 0
        self.logged = False

    def follow(self, steps: Iterable[Item]) -> Iterator[Item]:
        """The steps. Several iterators, such as those of several images, may be followed."""
        for step in steps:
            self.count += 1
            self.log_once(time.monotonic())
            yield step

    def log_once(self, now: float) -> None:
        if self.first is None:
            self.first = now
        if self.logged or self.count < 2 or now - self.first < 1:
            return
        pace = (now - self.first) / (self.count - 1)
        left = pace * (self.total - self.count) + self.extra
        log(f"about {duration(now - self.start + left)} in all, for {self.what}")
        self.logged = True


def progress(
    items: Iterable[Item], total: int, name: str, describe: Callable[[Item], str] | None = None
) -> Iterator[Item]:
    """Yield the items beside a progress bar, or, without a terminal, a line every 10 seconds.

    describe(item): what else to show. A line has the time left.
    """
    bar = None
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(total=total, desc=name, dynamic_ncols=True)
    start = reported = time.monotonic()
    with bar or nullcontext():
        for count, item in enumerate(items, 1):
            now, text = time.monotonic(), describe(item) if describe else ""
            if bar:
                bar.set_postfix_str(text, refresh=False)
                bar.update()
            elif now - reported > 10 or count == total:
                rate = count / max(now - start, 1e-9)
                left = f", about {duration((total - count) / rate)} left" if count < total else ""
                log(f"{name}: {count}/{total}, {rate:.2f}/s{left} {text}".rstrip())
                reported = now
            yield item


def follow_steps(
    args: argparse.Namespace,
    sdxl: "SDXL",
    steps: Iterable["Step"],
    *,
    total: int,
    name: str,
    recorder: Any = None,
    estimate: Estimate | None = None,
) -> Iterator["Step"]:
    """The Steps of one image with progress, recorded for --inspect, with cached keys and values.

    estimate: of the whole run, if it is to be logged.
    """
    from .extras import compile, optimizations

    steps = recorder.follow(steps) if recorder else steps
    steps = optimizations.cached_steps(sdxl.unet, steps)
    steps = compile.report_compile_time(steps, log) if args.compile else steps
    steps = estimate.follow(steps) if estimate else steps
    return progress(steps, total, name)


def duration(seconds: float) -> str:
    """ "8 s", "3 min" or "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count_of(number: int, noun: str) -> str:
    """ "1 image", "3 images"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped."""
    if text.isprintable():
        return text
    characters = []
    for c in text:
        characters.append(c if c.isprintable() else c.encode("unicode_escape").decode())
    return "".join(characters)


def log(text: str) -> None:
    """A message on stderr, above a progress bar; line breaks stay. Where nobody can read it, as
    of a closed terminal or a pipe whose reader has ended, the run continues."""
    text = "\n".join(map(printable, text.split("\n")))
    tqdm = sys.modules.get("tqdm")
    with suppress(OSError), tqdm.tqdm.external_write_mode(sys.stderr) if tqdm else nullcontext():
        print(text, file=sys.stderr, flush=True)


def log_error(text: str) -> None:
    """One line on stderr that begins with "error: ", cut to a length that a terminal shows."""
    log_line(f"error: {text}")


def log_line(text: str) -> None:
    text = printable(" ".join(text.split()))
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"
    log(text)


def log_written(*paths: Path, main: Path | None = None) -> None:
    """Report the written files on stdout; `main`, the one to open, on the last line."""
    print("wrote " + " ".join(printable(str(path)) for path in paths), flush=True)
    if main is not None:
        log_main(main)


def log_main(path: Path) -> None:
    """Say on stdout, on the last line, which of the written files to open."""
    print(f"open {printable(str(path))}", flush=True)


# Where the results go


def is_image_path(path: Path) -> bool:
    """Whether --out names a file, not a folder. Raises ValueError for a format other than PNG."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"--out {path}: the name is too long; choose a shorter one") from None
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ValueError(f"--out {path}: images are written as .png, with their settings in them")
    if path.suffix.lower() == ".safetensors":
        raise ValueError(
            f"--out {path}: images are written here; to merge a LoRA into a checkpoint: "
            "python -m alchemy.formats LORA OUT --merge --weights CHECKPOINT"
        )
    return path.suffix.lower() == ".png"


@contextmanager
def output_folder(path: str | Path, flag: str = "--out", lock: bool = True) -> Iterator[Path]:
    """The folder, made if need be, proved writable before the work begins, and locked.

    At the end, folders that were made and are still empty are removed. Rank 0 alone does this.
    lock=False: several processes may write there at once. Raises ValueError.
    """
    import tempfile

    from . import files

    path = Path(path)
    if distributed.rank():
        yield path
        return
    with ExitStack() as stack:
        try:
            missing = [p for p in (path, *path.parents) if not p.exists()]
            stack.callback(remove_empty, missing)
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
            files.remove_leftovers(path, files.STALE)
        except OSError as error:
            raise ValueError(
                f"{flag} {path}: cannot write there ({error.strerror}); name another folder"
            ) from None
        if lock:
            stack.enter_context(files.lock_folder(path, flag))
        yield path


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def free_folder(wanted: str | Path, flag: str, *taken: Path) -> Path:
    """The folder, or the next of its name (page-1, page-2) that is new or empty and not taken."""
    from . import files

    used = [files.resolve(folder) for folder in taken]
    try:
        if not str(wanted) or Path(wanted).is_file():
            raise ValueError(f"{flag} {str(wanted)!r} is not a folder; name one")
        for path in files.numbered(Path(wanted)):
            empty = not path.exists() or path.is_dir() and not any(path.iterdir())
            if empty and files.resolve(path) not in used:
                return path
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ValueError(
            f"{flag} {wanted}: cannot write there ({error.strerror}); name another folder"
        ) from None


@contextmanager
def numbered_folder(out: Path, names: tuple[str, ...], main: str) -> Iterator[tuple[Path, Path]]:
    """(path of the main result, folder of the rest) of a run that writes several files.

    A folder that holds one of the names, or that another run is writing to, is passed over for
    the next number. Where out is an image path, the rest goes to a folder of its name beside it.
    """
    from . import files

    with ExitStack() as stack:
        for candidate in files.numbered(out):
            image = is_image_path(out)
            folder = candidate.with_suffix("") if image else candidate
            result = candidate if image else folder / main
            if result.exists() or any((folder / name).exists() for name in names):
                continue
            try:
                stack.enter_context(output_folder(folder))
                break
            except files.FolderInUseError:
                continue
        yield result, folder


@contextmanager
def page_folder(args: argparse.Namespace, out: Path) -> Iterator[Path | None]:
    """The folder for the page of --inspect, or None. out: the folder of the results."""
    if args.inspect_full and not args.inspect:
        raise ValueError("--inspect-full goes with --inspect FOLDER")
    if args.inspect is None:
        yield None
        return
    with output_folder(free_folder(args.inspect, "--inspect", out), "--inspect") as page:
        yield page


# Errors


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(sign in str(error).lower() for sign in OUT_OF_MEMORY)
    )


@contextmanager
def suggest_when_out_of_memory(suggest: Callable[[], str | None]) -> Iterator[None]:
    """Inside, running out of memory ends in a line with the flags that suggest() names."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(suggest() or "") from error


def message_of(error: BaseException) -> str:
    """What the user reads of an exception."""
    if is_out_of_memory(error):
        hint = str(error) if isinstance(error, MemoryError) else ""
        advice = "use a smaller --size or --batch, or --dtype bfloat16"
        return f"out of memory: {hint or advice}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error} (unexpected; --traceback shows where)"


def run(main: Callable[[], None]) -> None:
    """Call main() as a script does: an error ends in one line on stderr and exit status 2."""
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which the scripts took away
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: log_line(f"warning: {message}")
    with distributed.rank_zero_output():
        try:
            main()
        except KeyboardInterrupt:
            log("interrupted")
            sys.exit(130)
        except Exception as error:
            unexpected = not isinstance(error, (ValueError, OSError, FloatingPointError))
            debugged = "--traceback" in sys.argv or distributed.launched()
            if unexpected and debugged and not is_out_of_memory(error):
                raise
            log_error(message_of(error))
            sys.exit(2)
