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
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from alchemy import cli
from alchemy.extras import distributed
from alchemy.methods import flags, outputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from alchemy.lora import Adapter
    from alchemy.methods.report import Report
    from alchemy.sdxl import SDXL
    from alchemy.training import GetLoss


def parser() -> cli.Parser:
    return flags.parser(__doc__)


def main(argv: list[str] | None = None) -> None:
    args = flags.read_args(parser(), argv)
    if not Path(args.photos).is_dir():  # before a checkpoint is downloaded
        raise ValueError(f"{args.photos}: no such folder")
    with ExitStack() as stack:
        out = stack.enter_context(cli.output_folder(outputs.run_folder(args)))
        if args.class_folder:
            folder = cli.output_folder(args.class_folder, "--class-folder", lock=False)
            stack.enter_context(folder)
        page = None
        if not (args.check or distributed.rank()):
            page = stack.enter_context(cli.page_folder(args, out))
        stopped = run(args, out, page)
    if stopped:
        sys.exit(128 + stopped)


def run(args: Namespace, out: Path, page: Path | None) -> int:
    """Train, from the checkpoint to the results; returns the number of the signal that stopped the
    run, or 0."""
    from alchemy.extras import memory
    from alchemy.methods import task as tasks
    from alchemy.methods.report import Report
    from alchemy.training import TrainState, loss

    # Load the checkpoint; networks are read on first use.
    sdxl = cli.load(args)
    flags.complete(args, sdxl)
    saved = outputs.open_state(args)
    memory.choose_memory_mode(args, sdxl)
    images = cli.count_of(outputs.samples_per_step(args), "image")
    ranks = f", {distributed.world()} ranks" if distributed.world() > 1 else ""
    steps = f"{cli.count_of(args.steps, 'step')} of {images}{ranks}"
    cli.log(f"{cli.describe(sdxl, args)}: --method {args.method}, {steps}")

    with cli.suggest_when_out_of_memory(lambda: memory.suggest_flags(args, sdxl)):
        # Encode photos and prompts once, then free the encoders.
        examples = tasks.list_examples(args)
        tasks.inspect_photos(args, sdxl, list(dict.fromkeys(examples)), out)
        task = tasks.prepare(args, sdxl, examples, out)
        if not tasks.encode_every_step(args):
            sdxl.free("text_encoders")
        sdxl.free("vae")

        # The loss of a step: on the photos, and on the prior that keeps the class word.
        def get_loss(step: int, micro_step: int) -> "Tensor":
            batch, prior = task.get_batches(step, micro_step)
            return loss(sdxl, batch, prior, task.prompts, args.prior_weight, args.snr_gamma)

        # Add the parameters that are trained, and continue where a run was interrupted.
        parameters = trainable_parameters(args, sdxl)
        state = TrainState.create(parameters, args.learning_rate, sdxl.dtype)
        sdxl.unet.checkpointing = args.checkpointing
        if saved:
            outputs.restore(args, state, saved)
        if args.check:
            tasks.time_step(args, sdxl, state, get_loss)
            cli.log_written(out / "check.png", main=out / "check.png")
            stopped = 0
        else:
            stopped = train_and_save(Report(args, out, page, sdxl, task, state), get_loss)
    memory.log_peak(sdxl)
    return stopped


def trainable_parameters(args: Namespace, sdxl: "SDXL") -> dict[str, "Tensor"]:
    """{name: float32 parameter}, added to the networks where need be."""
    import alchemy
    from alchemy import lora
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
        check_init_lora(args, lora.adapters(sdxl))
    else:
        alchemy.add_lora(sdxl, args.rank, args.alpha, seed=args.seed)
    return {name: p for name, p in sdxl.unet.named_parameters() if ".lora." in name}


def check_init_lora(args: Namespace, adapters: "list[Adapter]") -> None:
    """Raise ValueError, before the first step, for what could not be written after the last."""
    from alchemy.formats.updates import FullAdapter

    if any(isinstance(adapter, FullAdapter) for adapter in adapters):
        raise ValueError(
            f"--init-lora {args.init_lora}: an update of full rank (LoHa, LoKr or .diff), which "
            "cannot be trained further"
        )
    if any((len(adapter.down), adapter.alpha) != (args.rank, args.alpha) for adapter in adapters):
        cli.log(f"rank and alpha are those of {args.init_lora}")


def training_steps(report: "Report", get_loss: "GetLoss") -> "Iterator[tuple[int, float]]":
    """The loop: a generator of (step, loss), logged and with a progress bar."""
    from alchemy.extras.compile import report_compile_time
    from alchemy.training import train

    args, state = report.args, report.state
    parameters = state.parameters.values()
    steps = train(
        report.sdxl,
        state,
        distributed.mean_over_ranks(get_loss, parameters, args.accumulation, args.text_encoders),
        steps=args.steps,
        accumulation=args.accumulation,
        warmup=args.warmup,
        schedule=args.schedule,
        autocast=args.method == "full",
    )
    steps = report_compile_time(steps, cli.log) if args.compile else steps
    steps = report.follow(report.estimate().follow(steps))
    return cli.progress(steps, args.steps - state.step, "training", show_loss)


def train_and_save(report: "Report", get_loss: "GetLoss") -> int:
    """All steps, with previews and saved states, then the results. Returns the number of the
    signal that stopped it, or 0."""
    from alchemy.training import StopSignal

    # Everything that was asked for can be done: earlier results may go.
    report.begin(parser())
    args, state, path = report.args, report.state, report.out / outputs.STATE

    def save_state(replace: bool = True) -> None:
        # Only rank 0 writes and removes files, and another may look too early: all decide.
        if not distributed.all_reduce_max(replace or not path.exists()):
            return
        if not distributed.rank():
            batch = str(outputs.samples_per_step(args))
            state.save(path, {"kind": args.method, "batch": batch})
        distributed.barrier()

    # The state of a whole SDXL UNet has 31 GB.
    save_every = args.save_every or (None if args.method == "full" else 100)
    if save_every:
        save_state(replace=False)  # from the beginning there is one to resume from

    # Train.
    stopped = 0
    with StopSignal() as stop:
        try:
            # At step 0, or where an earlier run ended between its state and its previews.
            if report.is_preview_due() and not report.has_previews():
                report.add_previews()
            for step, _ in training_steps(report, get_loss):
                stopped = distributed.all_reduce_max(stop.number)  # all ranks stop together
                if stopped or step == args.steps or save_every and step % save_every == 0:
                    save_state()
                if stopped:
                    break
                if report.is_preview_due():
                    report.add_previews()
        except FloatingPointError as error:
            save_state(replace=False)  # an older one is better: the last steps led to this
            raise FloatingPointError(f"{error}; --resume continues from {path}") from None

    # Save the results.
    if stopped:
        cli.log(f"stopped after step {state.step}; the same command with --resume continues")
        distributed.barrier()  # torchrun ends all ranks when one ends
    elif not distributed.rank():
        report.finish()
    return stopped


def show_loss(item: tuple[int, float]) -> str:
    return f"loss {item[1]:.4f}"


if __name__ == "__main__":
    cli.run(main)
