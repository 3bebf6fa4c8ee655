"""What train.py does once it has its flags."""
import signal
import sys
from pathlib import Path

import torch

import alchemy

from .. import command, data, images, lora, loop
from ..formats.checkpoint import open_safetensors
from ..files import save_json
from ..report import sheets
from ..train import start, train

UNRELATED = "a photo of a car"


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
    for flag, default in (("steps", "training_steps"), ("learning_rate", "learning_rate"), ("batch", "batch"), ("rank", "rank")):
        if getattr(args, flag) is None:
            setattr(args, flag, sdxl.defaults[default])
    args.alpha = float(args.rank if args.alpha is None else args.alpha)
    args.size = args.size or sdxl.size
    if any(side % sdxl.factor for side in args.size):
        raise ValueError(f"--size {args.size[1]}x{args.size[0]} does not fit: both sides must be multiples of {sdxl.factor}")
    args.preview_every = -(-args.steps // 4) if args.preview_every is None else args.preview_every
    args.checkpointing = sdxl.size[0] >= 1024 if args.checkpointing is None else args.checkpointing


def encode(args, sdxl):
    """Photos and prompts to latents and Conditioning, once; then the encoders are freed."""
    found, skipped = data.find_photos(args.photos)
    for name in skipped:
        command.say(f"skipped {name}: not a JPEG, PNG or WebP")
    subject, of_class = (args.caption.replace("{}", name) for name in (f"{args.token} {args.class_word}", args.class_word))
    photos = list(command.progress((data.encode(sdxl, path, args.size, subject, args.mirror) for path in found), len(found), "encoding"))
    prompts = {prompt: sdxl.encode_prompt([prompt], args.size) for prompt in (subject, of_class, UNRELATED)}
    unconditional = sdxl.encode_prompt([None], args.size)
    sdxl.free("text_encoders")
    sdxl.free("vae")
    command.say(f"{len(photos)} photos, {subject!r}, kept apart from {of_class!r} with weight {args.prior_weight:g}")
    return photos, prompts, unconditional


def preview(args, sdxl, prompts, unconditional, step):
    """A row of (label, picture): subject, class and an unrelated prompt, always of the same seeds."""
    options = {k: sdxl.defaults[k] for k in ("sampler", "steps", "guidance")}
    row = [(f"step {step}: {prompt}", loop.sample(sdxl, told, unconditional, args.seed, args.size, **options)) for prompt, told in prompts.items()]
    sdxl.free("vae")
    return row


def main(args):
    out = command.folder(args.out)
    sdxl = command.load(args)
    complete(args, sdxl)
    saved = open_safetensors(out / "state.safetensors") if args.resume and (out / "state.safetensors").exists() else None
    facts = saved and saved.metadata() or {}
    torch.set_num_threads(int(facts.get("threads", torch.get_num_threads())))  # before any sum: it decides the order of additions
    photos, prompts, unconditional = encode(args, sdxl)

    # The adapter, its optimizer, and where an interrupted run had come to.
    alchemy.add_lora(sdxl, args.rank, args.alpha, seed=args.seed)
    sdxl.unet.checkpointing = args.checkpointing
    parameters = {name: p for name, p in sdxl.unet.named_parameters() if ".lora." in name}
    state = start(parameters, args.learning_rate, sdxl.dtype)
    if saved:
        state.restore(saved, facts)
        command.say(f"resuming at step {state.step} of {args.steps}")

    # All that was asked for can be had: what was here before may go.
    for old in () if args.resume else ("lora.safetensors", "state.safetensors", "preview.png", "loss.png"):
        (out / old).unlink(missing_ok=True)
    save_json(command.settings_of(args), out / "settings.json")
    ended = steps(args, out, sdxl, photos, prompts, unconditional, state)
    if ended:
        command.say(f"stopped after step {state.step}; the same command with --resume goes on")
        sys.exit(128 + ended)
    finish(args, out, sdxl, prompts, state)


def steps(args, out, sdxl, photos, prompts, unconditional, state):
    """The loop with its bar, previews and states. Returns the signal that ended it, or None."""
    stop, rows, path = Stop(), [], out / "state.safetensors"
    running = train(sdxl, photos, prompts, state, steps=args.steps, size=args.size, batch=args.batch, accumulation=args.accumulation,
                    warmup=args.warmup, class_prompt=list(prompts)[1], prior_weight=args.prior_weight, gamma=args.snr_gamma, seed=args.seed)
    if not path.exists():
        state.save(path, {"kind": "lora"})  # so that there is a good one, whatever comes
    try:
        for step, loss in command.progress(running, args.steps - state.step, "training", lambda item: f"loss {item[1]:.4f}"):
            if stop.signal or step == args.steps or step % args.save_every == 0:
                state.save(path, {"kind": "lora"})
            if stop.signal:
                return stop.signal
            if args.preview_every and (step % args.preview_every == 0 or step == args.steps):
                if not rows and (out / "preview.png").exists():  # of before a stop: the sheet starts anew, that one stays beside it
                    (out / "preview.png").rename(command.free_path(out / "preview.png"))
                rows.append(preview(args, sdxl, prompts, unconditional, step))
                page = sheets.sheet(rows + [[("loss", sheets.curve(state.losses))]])
                images.save_png(page, out / "preview.png", command.settings_of(args))
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; --resume goes on from {path}") from None  # not from now: the steps before NaN went astray
    finally:
        stop.release()
    return None


def finish(args, out, sdxl, prompts, state):
    """The LoRA with its facts, the loss curve; the state goes last."""
    facts = {"base": Path(args.weights).name, "prompt": list(prompts)[0], "class_word": args.class_word, "token": args.token,
             "steps": args.steps, "seed": args.seed, "targets": list(lora.ATTENTION), "name": Path(args.out).name}
    alchemy.save_lora(sdxl, out / "lora.safetensors", format=args.format, facts=facts)
    images.save_png(sheets.curve(state.losses), out / "loss.png", facts)
    (out / "state.safetensors").unlink(missing_ok=True)
    written = [out / name for name in ("lora.safetensors", "preview.png", "loss.png", "settings.json")]
    command.wrote(*(path for path in written if path.exists()))
