"""The page of train.py: loss, how far each layer has moved, previews."""

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ... import lora
from ...sdxl import SDXL
from ..fp8 import weight_of
from . import sheets
from .page import write_page
from .sprites import data_uri, even_indices

RECORDED_STEPS = 24  # the LoRA's norms are measured after so many steps
PREVIEW_SIDE = 384  # pixels; larger ones are reduced


class TrainingRecorder:
    """Records a training run, from step `begin` to step `steps`.

    recorded_steps: the steps after which something was measured. norms: {layer: ‖ΔW‖/‖W‖ at each
    of them}. previews: {step: row of (label, image)}, filled by the caller.
    """

    def __init__(self, sdxl: SDXL, steps: int, begin: int = 0):
        self.sdxl, self.begin = sdxl, begin
        self.planned = [begin + k for k in even_indices(steps - begin + 1, RECORDED_STEPS)]
        self.recorded_steps: list[int] = []
        self.norms: dict[str, list[float]] = {}
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
        self.recorded_steps.append(step)
        for name, layer in lora.attention_layers(self.sdxl.unet).items():
            for adapter in layer.lora.values():
                norm = float(adapter.delta().norm() / weight_of(layer).norm())
                self.norms.setdefault(name, []).append(norm)

    def arrays(self, losses: list[float]) -> dict[str, Tensor]:
        """Everything as {name: tensor}, for a file."""
        values = {f"norm.{name}": norms for name, norms in self.norms.items()}
        values |= {"losses": losses, "recorded_steps": self.recorded_steps}
        return {key: torch.tensor(x, dtype=torch.float64) for key, x in values.items()}


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
        cells = []
        for label, image in row:
            image = image.copy()
            image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
            cells.append([label.partition(": ")[2], data_uri(image)])
        previews.append([step, cells])
    arrays = {}
    if full:
        arrays["training.safetensors"] = recorder.arrays(losses)
    shown = {
        "losses": [round(x, 5) for x in losses],  # page.finite leaves out NaN
        "means": sheets.running_mean(losses),
        "recorded_steps": recorder.recorded_steps,
        "network": group_by_block(recorder.norms),
        "previews": previews,
    }
    extra = {"kind": "How the subject was trained", "training": shown}
    return write_page(folder, title, [], metadata, extra, arrays)
