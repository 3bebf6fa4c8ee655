"""What train.py does once it has its flags."""
import signal
import sys
import time
from pathlib import Path

import torch

import alchemy

from .. import command, lora, loop
from ..formats import png
from ..formats.tensors import open_safetensors
from ..formats.embeddings import KEYS, save_embedding
from ..formats.folder import save_checkpoint
from ..files import save_json
from ..methods import dreambooth, textual_inversion
from ..report import preflight, sheets
from ..train import start, train
from . import results
from .lessons import captioned, inversion, subject

class Stop:
    """SIGINT and SIGTERM end the run after the step under way; a second one ends it at once."""

    def __init__(self):
        self.signal = None
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, _):
        self.signal = number
        self.release()

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def complete(args, sdxl):
    """Put the checkpoint's defaults where no flag was given."""
    rate = {"lora": "learning_rate", "full": "full_rate", "textual-inversion": "word_rate"}[args.method]
    for flag, default in (("steps", "training_steps"), ("learning_rate", rate), ("batch", "batch"), ("rank", "rank")):
        if getattr(args, flag) is None:
            setattr(args, flag, sdxl.defaults[default])
    args.alpha = float(args.rank if args.alpha is None else args.alpha)
    args.size = args.size or sdxl.size
    if any(side % sdxl.factor for side in args.size):
        raise ValueError(f"--size {args.size[1]}x{args.size[0]} does not fit: both sides must be multiples of {sdxl.factor}")
    args.preview_every = -(-args.steps // 4) if args.preview_every is None else args.preview_every
    args.checkpointing = sdxl.size[0] >= 1024 if args.checkpointing is None else args.checkpointing


def check(args, out, sdxl, lesson):
    """Say what is odd about pictures and token; with --check, draw the pictures and their crops too."""
    lines, page = preflight.look(sdxl, lesson.pictures, args.size, args.captions)
    counts = [] if args.captions else preflight.pieces(sdxl, args.token)
    if any(count > 3 for count in counts):
        lines.append(f"{args.token!r} has {counts[0]} and {counts[1]} pieces in the two tokenizers: a short rare word, such as sks, is learned more easily")
    for line in lines:
        command.say(line)
    if args.check:
        if counts:
            command.say(f"{args.token!r} has {counts[0]} and {counts[1]} pieces in the two tokenizers")
        png.save(page, out / "check.png", command.settings_of(args))
        command.wrote(out / "check.png")


def time_a_step(args, sdxl, lesson):
    """What a step costs, by taking one without its update."""
    with torch.autocast(sdxl.device.type, sdxl.dtype, enabled=sdxl.dtype != torch.float32):
        start = time.time()
        for part in range(args.accumulation):
            lesson.loss_of(0, part).backward()
    seconds = time.time() - start
    command.say(f"a step takes {seconds:.1f} s, {args.steps} of them {args.steps * seconds / 60:.0f} minutes; " + (
        f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB of the GPU at most" if sdxl.device.type == "cuda" else "memory is not measured here"))


def preview(args, sdxl, lesson, step):
    """A row of (label, picture): subject, class and an unrelated prompt, always of the same seeds."""
    options = {k: sdxl.defaults[k] for k in ("sampler", "steps", "guidance")}
    row = [(f"step {step}: {prompt}", loop.sample(sdxl, told, lesson.unconditional, args.seed, args.size, **options)) for prompt, told in lesson.prompts.items()]
    sdxl.free("vae")
    return row


def main(args):
    out = command.folder(args.out)
    sdxl = command.load(args)
    complete(args, sdxl)
    if args.method == "full" and Path(args.weights).is_file() and not args.config:
        raise ValueError(f"{args.weights}: --method full writes a whole folder, and a single file brings no configurations: give --config FOLDER")
    saved = open_safetensors(out / "state.safetensors") if args.resume and (out / "state.safetensors").exists() else None
    facts = saved and saved.metadata() or {}
    torch.set_num_threads(int(facts.get("threads", torch.get_num_threads())))  # before any sum: it decides the order of additions
    lesson = (captioned if args.captions else inversion if args.method == "textual-inversion" else subject)(args, sdxl)
    if args.method != "textual-inversion":
        sdxl.free("text_encoders")
    sdxl.free("vae")

    # What learns, its optimizer, and where an interrupted run had come to.
    if args.method == "lora":
        alchemy.add_lora(sdxl, args.rank, args.alpha, seed=args.seed)
        parameters = {name: p for name, p in sdxl.unet.named_parameters() if ".lora." in name}
    elif args.method == "textual-inversion":
        parameters = {f"{n}.extra": table.extra.requires_grad_(True) for n, table in zip(KEYS, textual_inversion.tables(sdxl))}
    else:
        parameters = dreambooth.whole_unet(sdxl)
        command.say(f"all of the UNet learns: weights, gradients and optimizer take {dreambooth.memory(parameters) / 1e9:.2g} GB, activations come on top")
    sdxl.unet.checkpointing = args.checkpointing
    state = start(parameters, args.learning_rate, sdxl.dtype)
    if saved:
        state.restore(saved, facts)
        command.say(f"resuming at step {state.step} of {args.steps}")

    check(args, out, sdxl, lesson)
    if args.check:
        return time_a_step(args, sdxl, lesson)

    # All that was asked for can be had: what was here before may go.
    if not args.resume:
        results.clear(args)
    save_json(command.settings_of(args), out / "settings.json")
    ended = steps(args, out, sdxl, lesson, state)
    if ended:
        command.say(f"stopped after step {state.step}; the same command with --resume goes on")
        sys.exit(128 + ended)
    finish(args, out, sdxl, lesson, state)


def steps(args, out, sdxl, lesson, state):
    """The loop with its bar, previews and states. Returns the signal that ended it, or None."""
    stop, rows, path = Stop(), [], out / "state.safetensors"
    running = train(sdxl, state, lesson.loss_of, steps=args.steps, accumulation=args.accumulation, warmup=args.warmup)
    if not path.exists():
        state.save(path, {"kind": args.method})  # so that there is a good one, whatever comes
    try:
        for step, _ in command.progress(running, args.steps - state.step, "training", lambda item: f"loss {item[1]:.4f}"):
            if stop.signal or step == args.steps or step % args.save_every == 0:
                state.save(path, {"kind": args.method})
            if stop.signal:
                return stop.signal
            if args.preview_every and (step % args.preview_every == 0 or step == args.steps):
                if not rows and (out / "preview.png").exists():  # of before a stop: the sheet starts anew, that one stays beside it
                    (out / "preview.png").rename(command.free_path(out / "preview.png"))
                rows.append(preview(args, sdxl, lesson, step))
                page = sheets.sheet(rows + [[("loss", sheets.curve(state.losses))]])
                png.save(page, out / "preview.png", command.settings_of(args))
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; --resume goes on from {path}") from None  # not from now: the steps before NaN went astray
    finally:
        stop.release()
    return None


def finish(args, out, sdxl, lesson, state):
    """The LoRA with its facts, or the whole checkpoint; the loss curve; the state goes last."""
    facts = {"base": Path(args.weights).name, "prompt": list(lesson.prompts)[0], "class_word": args.class_word, "token": args.token,
             "steps": args.steps, "seed": args.seed, "targets": list(lora.ATTENTION), "name": Path(args.out).name}
    if args.method == "lora":
        written = [results.result(args)]
        alchemy.save_lora(sdxl, *written, format=args.format, facts=facts)
    elif args.method == "textual-inversion":
        written = save_embedding(sdxl, results.result(args), args.token, "diffusers" if args.format == "diffusers" else "kohya", facts)
    else:
        written = save_checkpoint(sdxl, results.result(args), {f"alchemy.{key}": value for key, value in facts.items()},
                                  torch.float16 if sdxl.dtype.itemsize == 2 else None)  # bfloat16 would round away most of small steps
    png.save(sheets.curve(state.losses), out / "loss.png", facts)
    (out / "state.safetensors").unlink(missing_ok=True)
    written += [out / name for name in ("preview.png", "loss.png", "settings.json")]
    command.wrote(*(path for path in written if path.exists()))
