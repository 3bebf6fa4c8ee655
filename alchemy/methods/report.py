"""What a training run shows and leaves: log, previews, loss curve, scores, page, and results."""

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import cli, pipeline
from ..extras import distributed
from ..extras.inspect import sheets
from ..extras.optimizations import cached_steps
from ..files import free_path, save_json
from ..formats import png
from ..formats.lora import save_lora
from ..sdxl import SDXL
from ..training import TrainingTask, TrainState, autocast_to_dtype
from . import outputs

Row = list[tuple[str, Image.Image]]


@dataclass
class Report:
    """Follows a run and writes its files, all but the state; rank 0 alone does."""

    args: Namespace
    out: Path
    page: Path | None
    sdxl: SDXL
    task: TrainingTask
    state: TrainState

    def __post_init__(self):
        self.is_main = not distributed.rank()
        self.rows, self.log = [], None
        self.preview_seconds = 0.0  # what a row of previews takes; 0 if none was generated yet
        self.recorder = self.validation = None
        if self.page:
            from ..extras.inspect.training_page import TrainingRecorder

            self.recorder = TrainingRecorder(self.sdxl, self.args.steps, self.state.step)
        if self.args.validate and self.is_main:
            from ..extras.validation import Validation

            self.validation = Validation.create(self.args, self.sdxl, self.out)

    def begin(self, p: cli.Parser) -> None:
        """Remove the results of an earlier run, and write the settings of this one."""
        distributed.barrier()
        if not self.is_main:
            return
        outputs.remove_unfinished(self.out)
        if not self.args.resume:
            outputs.remove_old(self.args, p)
        save_json(cli.settings(self.args), self.out / outputs.SETTINGS)
        scores = outputs.SCORES if self.args.validate else ()
        self.log = outputs.Log(self.out, self.state.step, scores)
        if self.validation:
            self.validation.begin(self.log)

    def follow(self, steps: Iterator[tuple[int, float]]) -> Iterator[tuple[int, float]]:
        """The steps, logged and recorded for the page."""
        last = time.monotonic()
        for step, loss in self.recorder.follow(steps) if self.recorder else steps:
            now = time.monotonic()
            if self.log:
                rate = self.state.optimizer.param_groups[0]["lr"]
                self.log.add(step, loss, rate, round(now - last, 4))
            last = now
            yield step, loss

    def estimate(self) -> cli.Estimate:
        """How long the steps and previews that are left will take."""
        left, every = self.args.steps - self.state.step, self.args.preview_every
        what = cli.count_of(left, "step")
        if not every:
            return cli.Estimate(left, what)
        steps = range(self.state.step + 1, self.args.steps + 1)
        count = sum(step % every == 0 or step == self.args.steps for step in steps)
        known = "and" if self.preview_seconds else "without"
        what = f"{what} {known} {cli.count_of(count, 'preview')}"
        return cli.Estimate(left, what, count * self.preview_seconds)

    def is_preview_due(self) -> bool:
        every, step = self.args.preview_every, self.state.step
        return bool(every) and (step % every == 0 or step == self.args.steps)

    def has_previews(self) -> bool:
        """Whether those of this step exist: a run may end between its state and its previews."""
        path, step = self.out / "preview.png", None
        if self.is_main and path.exists():
            with suppress(ValueError):  # not an image of ours
                step = png.read_metadata(path).get("preview_step")
        return bool(distributed.all_reduce_max(step == self.state.step))

    def add_previews(self) -> None:
        """A row of preview.png, and the LoRA of this step beside it."""
        start = time.monotonic()
        step, path = self.state.step, self.out / "preview.png"
        row = preview(self.args, self.sdxl, self.task, step)
        if not self.is_main:
            return
        if self.validation:
            self.validation.add(step, subject=row[0][1], class_=row[1][1])
        if not self.rows and path.exists():  # of the run before it was interrupted
            kept = free_path(path)
            path.rename(kept)
            cli.log(f"{path}, with the previews so far, is {kept} now")
        self.rows.append(row)
        if self.recorder:
            self.recorder.previews[step] = row
        sheet = sheets.sheet([*self.rows, [("loss", self.curve())]])
        png.save(sheet, path, cli.metadata(self.args) | {"preview_step": step})
        if self.args.method == "lora" and step:
            lora = self.out / "previews" / f"step-{step:06d}.safetensors"
            lora.parent.mkdir(exist_ok=True)
            save_lora(self.sdxl, lora, format=self.args.format)
        self.preview_seconds = time.monotonic() - start

    def curve(self) -> Image.Image:
        """The loss, and the scores of --validate, over the steps."""
        curve = sheets.curve(self.state.losses)
        return self.validation.draw(curve, self.state.step) if self.validation else curve

    def finish(self) -> None:
        """Save the results. The mark comes last, so that a run killed here can be resumed."""
        title, out = self.task.preview_prompts[0], self.out
        metadata = outputs.metadata_of(self.args, title)
        if self.validation:
            self.validation.log_best()
        png.save(self.curve(), out / "loss.png", {k: v for k, v in metadata.items() if k != "name"})
        written = outputs.save_result(self.args, self.sdxl, metadata)
        names = ("preview.png", "loss.png", "log.csv", outputs.SETTINGS)
        written += [out / name for name in names if (out / name).exists()]
        if self.page:
            from ..extras.inspect.training_page import write_training_page

            about, losses = cli.metadata(self.args), self.state.losses
            written += write_training_page(
                self.page, self.recorder, losses, title, about, self.args.inspect_full
            )
        outputs.mark_finished(self.args)
        sheet = out / "preview.png"
        cli.log_written(*written, main=sheet if sheet.exists() else out / "loss.png")


@torch.no_grad()
def preview(args: Namespace, sdxl: SDXL, task: TrainingTask, step: int) -> Row:
    """(label, image) of each preview prompt, always of the same seeds; the ranks share the work.

    Computed in the training dtype. Raises FloatingPointError where an image is not finite.
    """
    prompts, (height, width) = task.preview_prompts, args.size
    options = {name: sdxl.defaults[name] for name in ("sampler", "steps", "guidance")}
    pixels = torch.zeros(len(prompts), height, width, 3, dtype=torch.uint8)
    failure = None

    def follow(steps):
        # The UNet alone: the VAE may need float32.
        with autocast_to_dtype(sdxl, args.method == "full"):
            yield from cached_steps(sdxl.unet, steps)

    try:
        for index in range(len(prompts))[distributed.rank_slice()]:
            cond = task.prompts[prompts[index]].to(sdxl.device)
            uncond = task.prompts[None].to(sdxl.device)
            image = pipeline.sample(
                sdxl, cond, uncond, args.seed, args.size, progress=follow, **options
            )
            pixels[index] = torch.from_numpy(np.array(image))
    except FloatingPointError as error:
        failure = error
    sdxl.free("vae")
    if distributed.all_reduce_max(bool(failure)):
        if failure and not step:
            raise failure  # training cannot be the reason
        raise FloatingPointError(
            f"the preview at step {step} became NaN or infinite: training diverged; "
            "lower --learning-rate"
        )
    row = []
    for prompt, image in zip(prompts, distributed.all_reduce_sum(pixels), strict=True):
        row.append((f"step {step}: {prompt}", Image.fromarray(image.numpy())))
    return row
