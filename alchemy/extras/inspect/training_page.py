"""The page of train.py: loss, loss by timestep, how far each layer has moved, previews."""

import math
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ... import lora
from ...sdxl import SDXL
from ..fp8 import weight_of
from . import sheets
from .page import write_page
from .sprites import data_uri, even_indices, to_uint8

RECORDED_STEPS = 24  # the LoRA's norms are measured after so many steps, ...
LOSS_STEPS = 5  # ... and after so many of them the loss by timestep, ...
LOSS_TIMESTEPS = 12  # ... at so many timesteps
PREVIEW_SIDE = 384  # pixels; larger ones are reduced


class TrainingRecorder:
    """Records a training run, from step `begin` to step `steps`.

    loss_at(t): the unweighted loss of one batch, always the same, at timestep t.

    recorded_steps: the steps after which something was measured. norms: {layer: ‖ΔW‖/‖W‖ at each
    of them}. loss_by_timestep: {step: loss at each of timesteps}. previews: {step: row of
    (label, image)}, filled by the caller.
    """

    def __init__(
        self, sdxl: SDXL, loss_at: Callable[[int], float], steps: int, begin: int = 0
    ) -> None:
        self.sdxl, self.loss_at, self.begin = sdxl, loss_at, begin
        num_timesteps = len(sdxl.schedule.alpha_bar)
        self.timesteps = [int((k + 0.5) * num_timesteps / LOSS_TIMESTEPS) for k in range(12)]
        planned = [begin + k for k in even_indices(steps - begin + 1, RECORDED_STEPS)]
        self.planned = planned
        self.loss_steps = [planned[k] for k in even_indices(len(planned), LOSS_STEPS)]
        self.recorded_steps: list[int] = []
        self.norms: dict[str, list[float]] = {}
        self.loss_by_timestep: dict[int, list[float]] = {}
        self.previews: dict[int, list[tuple[str, Image.Image]]] = {}

    def follow(self, steps: Iterable[tuple[int, float]]) -> Iterator[tuple[int, float]]:
        """Yield the (step, loss) of a training loop, and measure before the first and at times."""
        self.measure(self.begin)
        for step, loss in steps:
            if step in self.planned:
                self.measure(step)
            yield step, loss

    @torch.no_grad()
    def measure(self, step: int) -> None:
        sdxl = self.sdxl
        self.recorded_steps.append(step)
        for name, layer in lora.attention_layers(sdxl.unet).items():
            for adapter in layer.lora.values():
                norm = float(adapter.delta().norm() / weight_of(layer).norm())
                self.norms.setdefault(name, []).append(norm)
        if step in self.loss_steps:
            with torch.autocast(sdxl.device.type, sdxl.dtype, enabled=sdxl.dtype != torch.float32):
                self.loss_by_timestep[step] = [self.loss_at(t) for t in self.timesteps]

    def arrays(self, losses: list[float]) -> dict[str, Tensor]:
        """Everything as {name: tensor}, for a file."""
        values = {f"norm.{name}": norms for name, norms in self.norms.items()}
        for step, row in self.loss_by_timestep.items():
            values[f"loss_by_timestep.step_{step}"] = row
        arrays = {key: torch.tensor(x, dtype=torch.float64) for key, x in values.items()}
        arrays["losses"] = torch.tensor(losses, dtype=torch.float64)
        arrays["recorded_steps"] = torch.tensor(self.recorded_steps)
        return arrays | {"timesteps": torch.tensor(self.timesteps)}


def group_by_block(norms: dict[str, list[float]]) -> list[tuple[str, dict[str, list[float]]]]:
    """[(transformer block, {"attn1.to_q": norms, ...}), ...] in the order of the network."""
    blocks: dict[str, dict[str, list[float]]] = {}
    for part in ("down_blocks", "mid_block", "up_blocks"):
        for name, values in norms.items():
            if name.startswith(part):
                block, _, rest = name.rpartition(".attn")
                row = f"attn{rest}".removesuffix(".0")
                blocks.setdefault(block, {})[row] = [round(x, 6) for x in values]
    return list(blocks.items())


def write_training_page(
    folder: str | PathLike,
    recorder: TrainingRecorder,
    losses: list[float],
    title: str,
    metadata: dict,
    full: bool = False,
) -> list[Path]:
    """Write the page of a training run; returns the paths.

    losses: of every step since step 0, NaN where none was applied. full: write the arrays too.
    """
    previews = []
    for step, row in recorder.previews.items():
        cells = [[label.partition(": ")[2], data_uri(shrink(image))] for label, image in row]
        previews.append([step, cells])
    blocks = group_by_block(recorder.norms)
    by_timestep = recorder.loss_by_timestep.items()
    shown = {
        "losses": [round(x, 5) if math.isfinite(x) else None for x in losses],
        "means": sheets.running_mean(losses),
        "num_timesteps": len(recorder.sdxl.schedule.alpha_bar),
        "timesteps": recorder.timesteps,
        "loss_by_timestep": [[step, [round(x, 5) for x in row]] for step, row in by_timestep],
        "recorded_steps": recorder.recorded_steps,
        "network": blocks,
        "previews": previews,
    }
    row = [("loss", sheets.curve(losses))]
    if blocks:
        row.append(("norm of each layer's LoRA", heat_map(blocks)))
    rows = [row, *recorder.previews.values()]
    arrays = {"training.safetensors": recorder.arrays(losses)} if full else None
    extra = {"kind": "How the subject was trained", "training": shown}
    return write_page(folder, title, [], metadata, extra, rows, arrays)


def shrink(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return image


def heat_map(blocks: list[tuple[str, dict[str, list[float]]]]) -> Image.Image:
    """The last norms as a grey image: a column per block, a row per projection."""
    names = list(dict.fromkeys(name for _, rows in blocks for name in rows))
    grid = torch.zeros(len(names), len(blocks))
    for column, (_, rows) in enumerate(blocks):
        for name, norms in rows.items():
            grid[names.index(name), column] = norms[-1]
    pixels = to_uint8(grid, 0, float(grid.max()))
    return Image.fromarray(np.kron(pixels, np.ones((16, 16), dtype=np.uint8)))
