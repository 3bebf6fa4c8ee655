"""What train.py does once it has its flags."""

import signal
import sys
import time
import warnings
from pathlib import Path

import torch

import alchemy

from .. import cli, lora
from ..formats import png
from ..formats.tensors import open_safetensors
from ..formats.embeddings import KEYS, save_embedding
from ..formats.folder import save_checkpoint
from ..files import save_json
from ..methods import dreambooth, masks, textual_inversion
from ..extras.inspect import preflight, sheets
from ..extras.compile import report_compile_time
from ..training import start, train
from . import fitting, inspecting, results
from ..extras import distributed
from .lessons import captioned, inversion, listed, live, subject
from .previews import show
from .states import restore, save_state


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
    rate = {"lora": "learning_rate", "full": "full_rate", "textual-inversion": "word_rate"}[
        args.method
    ]
    for flag, default in (("steps", "training_steps"), ("learning_rate", rate), ("batch", "batch")):
        if getattr(args, flag) is None:
            setattr(args, flag, sdxl.defaults[default])
    if args.method == "lora":
        args.rank = args.rank or sdxl.defaults["rank"]
        args.alpha = float(args.rank if args.alpha is None else args.alpha)
    args.size = args.size or sdxl.size
    if any(side % sdxl.vae_scale_factor for side in args.size):
        raise ValueError(
            f"--size {args.size[1]}x{args.size[0]} does not fit: both sides must be multiples of {sdxl.vae_scale_factor}"
        )
    args.preview_every = -(-args.steps // 4) if args.preview_every is None else args.preview_every
    if (
        args.checkpointing is None and fitting.free(sdxl.device) is None
    ):  # else the free memory decides (fitting.settle)
        args.checkpointing = sdxl.size[0] >= 1024


def look(args, out, sdxl, pictures):
    """Say what is odd about pictures and token, before anything is computed; with --check, draw the pictures and their crops too."""

    def mask_of(
        path,
    ):  # which refuses one that is missing or does not fit; to segment takes the model, and so one stands for all
        if args.mask and (args.mask != "segment" or args.check and path == pictures[0][0]):
            return masks.mask_of(args.mask, path, sdxl, args.class_word or args.init_word)

    lines, page = preflight.look(sdxl, pictures, args.size, args.captions, mask_of)
    counts = (
        preflight.pieces(sdxl, args.token)
        if args.token and args.method != "textual-inversion"
        else [0]
    )  # a new word has rows, no pieces
    if args.check and any(counts) or max(counts) > 3:
        lines.append(
            f"{args.token!r} has {counts[0]} and {counts[1]} pieces in the two tokenizers"
            + (
                ": a short rare word, such as sks, is learned more easily"
                if max(counts) > 3
                else ""
            )
        )
    for line in lines:
        cli.say(line)
    warnings.filterwarnings("ignore", "prompt too long")  # said just now, with the picture's name
    if args.check:
        png.save(page, out / "check.png", results.facts_of(args))


def time_a_step(args, sdxl, state, lesson):
    """What a step costs: of two, the second; the first warms up, and makes the optimizer's moments. What they taught is not kept."""
    ends = []
    for _ in train(
        sdxl,
        state,
        lesson.loss_of,
        steps=state.step + 2,
        accumulation=args.accumulation,
        warmup=args.warmup,
    ):
        if sdxl.device.type == "cuda":
            torch.cuda.synchronize(sdxl.device)
        ends.append(time.perf_counter())
    cli.say(
        f"a step takes {ends[1] - ends[0]:.1f} s, {args.steps} of them {args.steps * (ends[1] - ends[0]) / 60:.0f} minutes"
    )
    fitting.measured(sdxl)


def samples(args):
    """How many a step has, those of all ranks."""
    return args.batch * args.accumulation * distributed.world()


def networks(args):
    """The names of those that learn as a whole."""
    return (
        ("unet", *(dreambooth.TEXT_ENCODERS if args.text_encoders else ()))
        if args.method == "full"
        else ()
    )


def learners(args, sdxl):
    """{name: parameter} of what learns, put there."""
    if args.method == "lora":
        alchemy.add_lora(sdxl, args.rank, args.alpha, seed=args.seed)
        return {name: p for name, p in sdxl.unet.named_parameters() if ".lora." in name}
    if args.method == "textual-inversion":
        return {
            f"{n}.extra": table.extra.requires_grad_(True)
            for n, table in zip(KEYS, textual_inversion.tables(sdxl))
        }
    return dreambooth.whole(sdxl, networks(args))


def resumed(args, path):
    """The state that an interrupted run left, an open file, and its header; None and {} where there is none."""
    saved = (
        open_safetensors(path, "--overwrite starts again")
        if args.resume and path.exists()
        else None
    )
    facts = saved and saved.metadata() or {}
    if saved and facts.get("kind") != args.method:
        raise ValueError(
            f"{path}: the state is of another kind of run (--method {facts.get('kind', 'unknown')}, not {args.method}): "
            "resume with its settings, or --overwrite it"
        )
    return saved, facts


def go_on(args, state, saved, facts, path):
    """Put that state into this one."""
    try:
        restore(state, saved, facts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    cli.say(f"resuming at step {state.step} of {args.steps}")
    if facts.get("batch", str(samples(args))) != str(samples(args)):
        cli.say(
            f"warning: up to there a step had {facts['batch']} samples, now it has {samples(args)}: they are other ones than an unbroken run's"
        )


def main(args):
    out, page = (
        cli.folder(args.out),
        None if args.check or distributed.rank() else inspecting.page_folder(args, args.out),
    )
    sdxl = cli.load(args)
    complete(args, sdxl)
    if args.method == "full" and Path(args.weights).is_file() and not args.config:
        raise ValueError(
            f"{args.weights}: --method full writes a whole folder, and a single file brings no configurations: give --config FOLDER"
        )
    saved, facts = resumed(args, out / "state.safetensors")
    torch.set_num_threads(
        int(facts.get("threads", torch.get_num_threads()))
    )  # before any sum: it decides the order of additions
    if networks(args):
        cli.say(f"all of {', '.join(networks(args))} learns")
    fitting.settle(args, sdxl, foretell=args.check or networks(args))
    if distributed.world() > 1:
        cli.say(
            f"{distributed.world()} ranks of --batch {args.batch}: {samples(args)} samples a step"
        )
    pictures = listed(args)
    look(args, out, sdxl, pictures)
    lesson = (
        captioned if args.captions else inversion if args.method == "textual-inversion" else subject
    )(args, sdxl, pictures)
    if not live(args):
        sdxl.free("text_encoders")
    sdxl.free("vae")

    # What learns, its optimizer, and where an interrupted run had come to.
    state = start(learners(args, sdxl), args.learning_rate, sdxl.dtype)
    sdxl.unet.checkpointing = args.checkpointing
    if saved:
        go_on(args, state, saved, facts, out / "state.safetensors")
    if args.check:
        time_a_step(args, sdxl, state, lesson)
        return cli.wrote(out / "check.png")

    # All that was asked for can be had, on every rank: what was here before may go.
    distributed.barrier()
    if not distributed.rank():
        if not args.resume:
            results.clear(args)
        save_json(results.settings_of(args), out / "settings.json")
    ended = teach(args, out, page, sdxl, lesson, state)
    fitting.measured(sdxl)
    if ended:
        cli.say(f"stopped after step {state.step}; the same command with --resume goes on")
        distributed.barrier()  # torchrun ends them all when one has ended
        sys.exit(128 + ended)


def teach(args, out, page, sdxl, lesson, state):
    """All steps, then what they made, and the page where one is wanted. Returns the signal that ended it, or None."""
    watcher = None
    if page:
        from ..extras.inspect import teaching

        watcher = teaching.Watcher(sdxl, lesson.error_at, args.steps, state.step)
    ended = steps(args, out, sdxl, lesson, state, watcher)
    if ended or distributed.rank():
        return ended
    finish(args, out, sdxl, lesson, state)
    if page:
        cli.wrote(
            *teaching.write_page(
                page,
                watcher,
                state.losses,
                lesson.shown[0],
                results.facts_of(args),
                args.inspect_full,
            )
        )
    return None


def steps(args, out, sdxl, lesson, state, watcher=None):
    """The loop with its bar, previews and states. Returns the signal that ended it, or None."""
    stop, rows, path = Stop(), [], out / "state.safetensors"
    loss_of = distributed.mean_over_ranks(
        lesson.loss_of, state.parameters.values(), args.accumulation, args.text_encoders
    )
    running = train(
        sdxl, state, loss_of, steps=args.steps, accumulation=args.accumulation, warmup=args.warmup
    )
    running = report_compile_time(running, cli.say) if args.compile else running
    running = watcher.follow(running) if watcher else running
    every = args.save_every or (
        None if args.method == "full" else 100
    )  # of SDXL's whole UNet, a state has 31 GB

    def save():
        if not distributed.rank():
            save_state(state, path, {"kind": args.method, "batch": str(samples(args))})

    if every and not path.exists():
        save()  # so that there is a good one, whatever comes
    try:
        if args.preview_every and not state.step:
            show(
                args, out, sdxl, lesson, state, rows, watcher
            )  # what the model draws before anything is taught
        for step, _ in cli.progress(
            running, args.steps - state.step, "training", lambda item: f"loss {item[1]:.4f}"
        ):
            ended = distributed.all_reduce_max(
                stop.signal or 0
            )  # they stop together, whichever of them has been told to
            if ended or step == args.steps or every and step % every == 0:
                save()
                distributed.barrier()  # on the CPU, where waiting has no end: a gradient would be waited for ten minutes, and 31 GB may take longer
            if ended:
                return ended
            if args.preview_every and (step % args.preview_every == 0 or step == args.steps):
                show(args, out, sdxl, lesson, state, rows, watcher)
    except FloatingPointError as error:
        if not path.exists():  # else the older one is better: the steps before NaN went astray
            save()  # of finite weights, since no other step was applied
        distributed.barrier()
        raise FloatingPointError(f"{error}; --resume goes on from {path}") from None
    finally:
        stop.release()
    return None


def finish(args, out, sdxl, lesson, state):
    """The LoRA with its facts, or the whole checkpoint; the loss curve; the state goes last."""
    facts = {
        "base": Path(args.weights).name,
        "steps": args.steps,
        "seed": args.seed,
        "name": Path(args.out).name,
    }
    facts |= {} if args.captions else {"prompt": lesson.shown[0], "token": args.token}
    facts |= {"class_word": args.class_word} if args.class_word else {}
    if args.method == "lora":
        written = [results.result(args)]
        alchemy.save_lora(
            sdxl, *written, format=args.format, metadata=facts | {"targets": list(lora.ATTENTION)}
        )
    elif args.method == "textual-inversion":
        written = save_embedding(
            sdxl,
            results.result(args),
            args.token,
            "diffusers" if args.format == "diffusers" else "kohya",
            facts,
        )
    else:
        written = save_checkpoint(
            sdxl,
            results.result(args),
            {f"alchemy.{key}": value for key, value in facts.items()},
            torch.float16 if sdxl.dtype.itemsize == 2 else None,
        )  # bfloat16 would round away most of small steps
    png.save(
        sheets.curve(state.losses),
        out / "loss.png",
        {k: v for k, v in facts.items() if k != "name"},
    )
    (out / "state.safetensors").unlink(missing_ok=True)
    written += [out / name for name in ("preview.png", "loss.png", "settings.json")]
    cli.wrote(*(path for path in written if path.exists()))
