"""Fine-tune SDXL on a subject from 3 to 5 photos, or on images with captions.

python train.py SUBJECT_DIR --class-word dog --token sks --out out/my-dog
python train.py FOLDER --captions --out out/my-style     metadata.jsonl, or a .txt beside each image
python train.py                          the example subject, on the miniature that ships
torchrun --nproc-per-node 4 train.py ...                 on several GPUs, --batch on each
"""

import _signal

if __name__ == "__main__":  # Ctrl-C during the imports, that of signal too: no traceback
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import sys
import time
from contextlib import ExitStack
from pathlib import Path

from alchemy import cli
from alchemy.extras import distributed
from alchemy.methods import flags, outputs


def parser() -> cli.Parser:
    p = cli.parser(__doc__)
    text = "folder of JPEG, PNG or WebP photos (default: the example subject)"
    p.add_argument("photos", nargs="?", metavar="SUBJECT_DIR", help=text)
    text = "what the subject is: dog, backpack (default: bear, with the example)"
    p.add_argument("--class-word", metavar="WORD", help=text)
    text = "rare word that will name the subject (default: sks), or the new token of "
    text += "textual-inversion (default: <subject>)"
    p.add_argument("--token", metavar="WORD", help=text)
    text = 'prompt of each photo, {} is token and class word (default: "a photo of a {}")'
    p.add_argument("--caption", default="a photo of a {}", metavar="TEXT", help=text)
    text = "the images have captions of their own; there is no subject and no class"
    p.add_argument("--captions", action="store_true", help=text)
    text = "train on a part of each photo: its alpha channel, the class word's region, or masks "
    text += "with the photos' names (default: all of it)"
    p.add_argument("--mask", metavar="alpha|segment|FOLDER", help=text)
    text = "folder for all results (default: out/ and the name of SUBJECT_DIR)"
    p.add_argument("--out", metavar="FOLDER", help=text)
    add = p.add_mutually_exclusive_group().add_argument
    add("--overwrite", action="store_true", help="start again where --out holds a run")
    text = "continue the interrupted run in --out, with its settings"
    add("--resume", action="store_true", help=text)

    add = p.add_argument_group("training").add_argument
    methods = ("lora", "full", "textual-inversion")
    text = "train a LoRA on the attention layers, the whole UNet (as DreamBooth), or the embedding "
    text += "of a new token (default: lora)"
    add("--method", default="lora", choices=methods, help=text)
    text = cli.by_checkpoint("training_steps", "optimizer steps")
    add("--steps", type=cli.COUNT, metavar="N", help=text)
    rates = (
        cli.by_checkpoint("learning_rate", "of AdamW"),
        cli.by_checkpoint("full_rate", "with --method full"),
        cli.by_checkpoint("word_rate", "with textual-inversion"),
    )
    add("--learning-rate", type=cli.POSITIVE, metavar="X", help=", ".join(rates))
    text = "learning rate after the warm-up: constant, or cosine down to 0 (default: constant)"
    add("--schedule", default="constant", choices=("constant", "cosine"), help=text)
    text = "steps over which the learning rate rises (default: 0)"
    add("--warmup", type=cli.WHOLE, default=0, metavar="N", help=text)
    text = cli.by_checkpoint("batch", "photos per batch")
    add("--batch", type=cli.COUNT, metavar="N", help=text)
    text = "batches per optimizer step (default: 1)"
    add("--accumulation", type=cli.COUNT, default=1, metavar="N", help=text)
    add("--size", type=cli.size, metavar="N|WxH", help=cli.by_checkpoint("size", "pixels"))
    rank = cli.number(int, 1, 4096)
    add("--rank", type=rank, metavar="N", help=cli.by_checkpoint("rank", "of the LoRA"))
    text = "the LoRA is scaled by alpha/rank (default: rank)"
    add("--alpha", type=cli.POSITIVE, metavar="X", help=text)
    add("--init-lora", metavar="FILE", help="continue training this LoRA (default: a new one)")
    text = "with --method full: train both text encoders too"
    add("--text-encoders", action="store_true", help=text)
    text = "with --method full: write checkpoint.safetensors, one file in the original layout"
    add("--single-file", action="store_true", help=text)
    text = "weight of prior preservation, which keeps the class word; 0 is none (default: 1)"
    add("--prior-weight", type=cli.WEIGHT, default=1.0, metavar="X", help=text)
    text = "prior preservation with N class images, generated first, instead of the model's own "
    text += "prediction (default: 0; 100 with --method full)"
    add("--class-images", type=cli.WHOLE, metavar="N", help=text)
    text = "where they are kept, to be used again (default: class/ in --out)"
    add("--class-folder", metavar="FOLDER", help=text)
    text = "share of captions that are dropped, with --captions (default: 0.1)"
    add("--caption-dropout", type=cli.SHARE, default=0.1, metavar="X", help=text)
    text = "vectors of the new token in each text encoder (default: 2)"
    add("--vectors", type=cli.number(int, 1, 75), default=2, metavar="N", help=text)
    text = "word that the new token starts from (default: the class word)"
    add("--init-word", metavar="WORD", help=text)
    add("--style", action="store_true", help="the new token is a style, not an object")
    text = "min-SNR weighting of the loss; 0 is none (default: 5)"
    add("--snr-gamma", type=cli.WEIGHT, default=5.0, metavar="X", help=text)
    text = "mirror the photos at random; not for subjects with text on them"
    add("--mirror", action=cli.BooleanOptionalAction, default=False, help=text)
    text = "less memory, a third more time (default: by free GPU memory; on a CPU for SDXL)"
    add("--checkpointing", action=cli.BooleanOptionalAction, default=None, help=text)
    text = "of crops, noise and timesteps; -1 draws one (default: 0)"
    add("--seed", type=cli.SEED, default=0, metavar="N", help=text)

    add = p.add_argument_group("files").add_argument
    text = "look at the photos, write check.png, time one step, and stop"
    add("--check", action="store_true", help=text)
    text = "key names in lora.safetensors (default: kohya, which all tools read)"
    add("--format", default="kohya", choices=("kohya", "diffusers", "peft"), help=text)
    text = "steps between previews; 0 is none (default: a quarter of the steps)"
    add("--preview-every", type=cli.WHOLE, metavar="N", help=text)
    text = "prompt of the previews; may be repeated (default: subject, class, something unrelated)"
    add("--preview-prompt", action="append", metavar="TEXT", help=text)
    text = "score each preview: likeness of the subject to the photos, and of the class to the "
    text += "base model's; the best step is named at the end"
    add("--validate", action="store_true", help=text)
    text = "folder or Hub id of DINO ViT-S/16 for --validate (default: facebook/dino-vits16; on "
    text += "the miniature its toy classifier, offline)"
    add("--dino", metavar="PATH|ID", help=text)
    text = "steps between saved states (default: 100; with --method full only at the end)"
    add("--save-every", type=cli.COUNT, metavar="N", help=text)
    cli.add_checkpoint(p)
    cli.add_inspect(p)
    return p


def read_args(argv: list[str] | None):
    """The flags; with --resume, over the settings of the run in --out."""
    p = parser()
    args = cli.parse(p, argv)
    args.out = args.out or str(Path("out") / Path(args.photos or cli.EXAMPLE_PHOTOS).resolve().name)
    out = Path(args.out)
    if args.resume:
        args = read_resumed(p, argv, out)
    if args.captions and args.photos is None:
        raise ValueError("--captions needs the folder of the images")
    if args.photos is None:
        args.photos = str(cli.EXAMPLE_PHOTOS)
        args.class_word = args.class_word or cli.EXAMPLE_CLASS
    flags.validate_flags(args, parser().get_default)
    if args.resume and outputs.result_path(args).exists() and not (out / outputs.STATE).exists():
        raise ValueError(
            f"{out}: this run is finished; --init-lora continues its LoRA in another --out, "
            "--overwrite starts again"
        )
    if not (args.resume or args.check):
        outputs.check_no_overwrite(args, parser())
    cli.choose_seed(args)
    return args


def read_resumed(p: cli.Parser, argv: list[str] | None, out: Path):
    if not (out / outputs.SETTINGS).exists():
        raise ValueError(
            f"{out}: no run to resume, it has no {outputs.SETTINGS}; without --resume, one starts"
        )
    saved = cli.read_settings(out / outputs.SETTINGS, p)
    method = saved.get("method")
    args = p.parse_over(argv, saved | {"out": str(out), "resume": True, "overwrite": False})
    if args.method != method:
        raise ValueError(
            f"--method {args.method} is not that of the run in {out}, {method}; "
            "leave it out, or name another --out"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = read_args(argv)
    with ExitStack() as stack:
        out = stack.enter_context(cli.output_folder(args.out))
        if args.class_folder:
            folder = cli.output_folder(args.class_folder, "--class-folder", lock=False)
            stack.enter_context(folder)
        page = None
        if not (args.check or distributed.rank()):
            page = stack.enter_context(cli.page_folder(args, out))
        stopped = run(args, out, page)
    if stopped:
        sys.exit(128 + stopped)


def run(args, out: Path, page: Path | None) -> int:
    """The whole of it; returns the number of the signal that stopped the run, or 0."""
    import torch

    from alchemy.extras import memory
    from alchemy.methods.preview import inspect_photos, time_step
    from alchemy.methods.task import encode_every_step, list_examples, prepare
    from alchemy.training import TrainState, loss

    # Load the checkpoint; networks are read on first use.
    sdxl = cli.load(args)
    flags.complete(args, sdxl)
    saved, header = outputs.open_state(args)
    # The order of additions, and so the last bit, depends on the number of threads.
    torch.set_num_threads(int(header.get("threads", torch.get_num_threads())))
    memory.choose_memory_mode(args, sdxl)
    images = cli.count_of(outputs.samples_per_step(args), "image")
    ranks = f", {distributed.world()} ranks" if distributed.world() > 1 else ""
    steps = f"{cli.count_of(args.steps, 'step')} of {images}{ranks}"
    cli.log(f"{cli.describe(sdxl, args)}: --method {args.method}, {steps}")

    with cli.suggest_when_out_of_memory(lambda: memory.suggest_flags(args, sdxl)):
        # Encode photos and prompts once, then free the encoders.
        examples = list_examples(args)
        inspect_photos(args, sdxl, list(dict.fromkeys(examples)), out)
        task = prepare(args, sdxl, examples, out)
        if not encode_every_step(args):
            sdxl.free("text_encoders")
        sdxl.free("vae")

        def get_loss(step: int, micro_step: int) -> torch.Tensor:
            batch = task.get_batch(step, micro_step)
            prior = task.get_prior(batch, step, micro_step)
            return loss(sdxl, batch, prior, task.prompts, args.prior_weight, args.snr_gamma)

        # Add the parameters that are trained, and continue where a run was interrupted.
        parameters = trainable_parameters(args, sdxl)
        state = TrainState.create(parameters, args.learning_rate, sdxl.dtype)
        sdxl.unet.checkpointing = args.checkpointing
        if saved:
            outputs.restore(args, state, saved, header)
        if args.check:
            time_step(args, sdxl, state, get_loss)
            memory.log_peak(sdxl)
            cli.log_written(out / "check.png")
            return 0
        stopped = train_and_save(args, out, page, sdxl, task, state, get_loss)
    memory.log_peak(sdxl)
    return stopped


# What is trained


def trainable_parameters(args, sdxl) -> dict:
    """{name: float32 parameter}, added to the networks where need be."""
    import alchemy
    from alchemy.formats.embeddings import KEYS
    from alchemy.methods import dreambooth, textual_inversion

    if args.method == "full":
        names = ("unet", *(dreambooth.TEXT_ENCODERS if args.text_encoders else ()))
        return dreambooth.train_whole(sdxl, names)
    if args.method == "textual-inversion":
        parameters = {}
        for key, table in zip(KEYS, textual_inversion.tables(sdxl), strict=True):
            parameters[f"{key}.extra"] = table.extra.requires_grad_(True)
        return parameters
    if args.init_lora:
        alchemy.load_lora(sdxl, args.init_lora, name="default")
    else:
        alchemy.add_lora(sdxl, args.rank, args.alpha, seed=args.seed)
    return {name: p for name, p in sdxl.unet.named_parameters() if ".lora." in name}


# The loop


def train_and_save(args, out, page, sdxl, task, state, get_loss) -> int:
    """All steps, with previews and saved states, then the results. Returns the number of the
    signal that stopped it, or 0."""
    from alchemy.files import save_json
    from alchemy.methods.preview import Previews
    from alchemy.training import StopSignal

    is_main = not distributed.rank()  # only rank 0 writes files
    validation = None
    if args.validate and is_main:
        from alchemy.extras.validation import Validation

        validation = Validation.create(args, sdxl, out)

    # Everything that was asked for can be done: earlier results may go.
    distributed.barrier()
    path = out / outputs.STATE
    if is_main:
        outputs.remove_unfinished(out)
        if not args.resume:
            outputs.remove_old(args, parser())
        save_json(cli.settings(args), out / outputs.SETTINGS)
    log = None
    if is_main:
        log = outputs.Log(out, state.step, outputs.SCORES if args.validate else ())
    if validation:
        validation.begin(log)

    def save_state():
        if is_main:
            state.save(path, {"kind": args.method, "batch": str(outputs.samples_per_step(args))})
        distributed.barrier()

    watcher, steps = None, iterate(args, sdxl, state, get_loss)
    if page:
        from alchemy.extras.inspect.training_page import TrainingRecorder

        watcher = TrainingRecorder(sdxl, args.steps, state.step)
        steps = watcher.follow(steps)
    previews = Previews(args, out, sdxl, task, state, watcher, validation)
    # The state of a whole SDXL UNet has 31 GB.
    save_every = args.save_every or (None if args.method == "full" else 100)
    if save_every and not path.exists():
        save_state()  # from the beginning there is one to resume from
    stopped = 0
    with StopSignal() as stop:
        try:
            if args.preview_every and not state.step:
                previews.add()
            last = time.monotonic()
            for step, value in cli.progress(steps, args.steps - state.step, "training", show_loss):
                now = time.monotonic()
                if is_main:
                    rate = state.optimizer.param_groups[0]["lr"]
                    log.add(step, value, rate, round(now - last, 4))
                last = now
                stopped = distributed.all_reduce_max(stop.number)  # all ranks stop together
                if stopped or step == args.steps or save_every and step % save_every == 0:
                    save_state()
                if stopped:
                    break
                if args.preview_every and (step % args.preview_every == 0 or step == args.steps):
                    previews.add()
        except FloatingPointError as error:
            if not path.exists():  # an older one is better: the last steps led to this
                save_state()
            raise FloatingPointError(f"{error}; --resume continues from {path}") from None
    if stopped:
        cli.log(f"stopped after step {state.step}; the same command with --resume continues")
        distributed.barrier()  # torchrun ends all ranks when one ends
    if stopped or not is_main:
        return stopped

    finish(args, out, page, sdxl, task, state, watcher, validation)
    return 0


def finish(args, out, page, sdxl, task, state, watcher, validation) -> None:
    """Save the results; the state goes last, so that a run killed here can be resumed."""
    from alchemy.extras.inspect import sheets
    from alchemy.extras.inspect.training_page import write_training_page
    from alchemy.formats import png

    title = task.preview_prompts[0]
    metadata = outputs.metadata_of(args, title)
    facts = {key: value for key, value in metadata.items() if key != "name"}
    curve = sheets.curve(state.losses)
    if validation:
        curve = validation.draw(curve, state.step)
        validation.log_best()
    png.save(curve, out / "loss.png", facts)
    written = outputs.save_result(args, sdxl, outputs.result_path(args), metadata)
    (out / outputs.STATE).unlink(missing_ok=True)
    outputs.remove_unfinished(out)
    names = ("preview.png", "loss.png", "log.csv", outputs.SETTINGS)
    written += [out / name for name in names if (out / name).exists()]
    if page:
        about = cli.metadata(args)
        written += write_training_page(page, watcher, state.losses, title, about, args.inspect_full)
    sheet = out / "preview.png"
    cli.log_written(*written, main=sheet if sheet.exists() else out / "loss.png")


def show_loss(item: tuple[int, float]) -> str:
    return f"loss {item[1]:.4f}"


def iterate(args, sdxl, state, get_loss):
    """The training loop: yields (step, loss)."""
    from alchemy.extras.compile import report_compile_time
    from alchemy.training import train

    parameters = state.parameters.values()
    get_loss = distributed.mean_over_ranks(
        get_loss, parameters, args.accumulation, args.text_encoders
    )
    steps = train(
        sdxl,
        state,
        get_loss,
        steps=args.steps,
        accumulation=args.accumulation,
        warmup=args.warmup,
        schedule=args.schedule,
        autocast=args.method == "full",
    )
    return report_compile_time(steps, cli.log) if args.compile else steps


if __name__ == "__main__":
    cli.run(main)
