"""What train.py --inspect records: the loss, the loss by timestep, how far each layer has moved, previews."""

import math

import numpy as np
import torch
from PIL import Image

from ... import lora
from ..fp8 import weight_of
from . import sheets
from .page import write
from .pictures import bytes_of, spread, uri

MOMENTS, MEASURED, LEVELS = (
    24,
    5,
    12,
)  # moments of a run that are kept; of them with the loss by timestep; timesteps of that


class Watcher:
    """Stands between the training loop and whoever follows it. error_at(t): the plain error of one batch, always the same, at timestep t.

    moments: steps; norms: {layer: ‖ΔW‖/‖W‖ at each moment}; by_t: {step: error at each of timesteps}; previews: {step: row of
    (label, picture)}.
    """

    def __init__(self, sdxl, error_at, steps, begin=0):
        self.sdxl, self.error_at, self.begin = sdxl, error_at, begin
        T = len(sdxl.schedule.alpha_bar)
        self.timesteps = [int((k + 0.5) * T / LEVELS) for k in range(LEVELS)]
        self.wanted = [begin + k for k in spread(steps - begin + 1, MOMENTS)]
        self.measured = [self.wanted[k] for k in spread(len(self.wanted), MEASURED)]
        self.moments, self.norms, self.by_t, self.previews = [], {}, {}, {}

    def follow(self, running):
        """Yield what running yields, (step, loss) each, and look before the first and at a few moments."""
        self.look(self.begin)
        for step, loss in running:
            if step in self.wanted:
                self.look(step)
            yield step, loss

    @torch.no_grad()
    def look(self, step):
        sdxl = self.sdxl
        self.moments.append(step)
        for name, layer in lora.attention_layers(sdxl.unet).items():
            for adapter in layer.lora.values():
                self.norms.setdefault(name, []).append(
                    float(adapter.delta().norm() / weight_of(layer).norm())
                )
        if step in self.measured:
            with torch.autocast(sdxl.device.type, sdxl.dtype, enabled=sdxl.dtype != torch.float32):
                self.by_t[step] = [self.error_at(t) for t in self.timesteps]

    def arrays(self, losses):
        """Everything as {name: tensor}, for a file."""
        made = {
            f"norm.{name}": torch.tensor(norms, dtype=torch.float64)
            for name, norms in self.norms.items()
        }
        made |= {
            f"error_by_timestep.step_{step}": torch.tensor(row, dtype=torch.float64)
            for step, row in self.by_t.items()
        }
        return made | {
            "losses": torch.tensor(losses, dtype=torch.float64),
            "moments": torch.tensor(self.moments),
            "timesteps": torch.tensor(self.timesteps),
        }


def running_mean(losses):
    """The mean of what came so far, the last 20 or so counting most; None before the first."""
    total = weight = 0.0
    means = []
    for loss in losses:
        total, weight = (
            (0.95 * total + loss, 0.95 * weight + 1) if math.isfinite(loss) else (total, weight)
        )
        means.append(total / weight if weight else None)
    return means


def network(norms):
    """The layers in the order in which the network runs them: [[block, {"attn1.to_q": norms at each moment, ...}], ...]."""
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    blocks = {}
    for name in sorted(norms, key=lambda name: order[name.split(".")[0]]):
        block, _, rest = name.rpartition(".attn")
        blocks.setdefault(block, {})[f"attn{rest}".removesuffix(".0")] = [
            round(x, 6) for x in norms[name]
        ]
    return [[block, rows] for block, rows in blocks.items()]


def write_page(folder, watcher, losses, title, facts, full=False):
    """The page of a training run; returns the paths. losses: one per step since the very first, NaN where one was not applied; full: the
    arrays too."""
    shown = [
        [step, [[label.partition(": ")[2], uri(small(picture))] for label, picture in row]]
        for step, row in watcher.previews.items()
    ]
    blocks = network(watcher.norms)
    told = {
        "losses": [round(x, 5) if math.isfinite(x) else None for x in losses],
        "means": [x and round(x, 5) for x in running_mean(losses)],
        "T": len(watcher.sdxl.schedule.alpha_bar),
        "timesteps": watcher.timesteps,
        "by_t": [[step, [round(x, 5) for x in row]] for step, row in watcher.by_t.items()],
        "moments": watcher.moments,
        "network": blocks,
        "previews": shown,
    }
    rows = [
        [("loss", sheets.curve(losses))]
        + ([("norm of each layer's LoRA", heat(blocks))] if blocks else [])
    ]
    rows += [[(label, picture) for label, picture in row] for row in watcher.previews.values()]
    arrays = {"training.safetensors": watcher.arrays(losses)} if full else None
    return write(
        folder,
        title,
        [],
        facts,
        {"kind": "How the subject was learned", "training": told},
        rows,
        arrays,
    )


def small(picture, most=384):
    """No larger than it is looked at."""
    picture = picture.copy()
    picture.thumbnail((most, most))
    return picture


def heat(blocks):
    """The last norms as a grey picture: a column a block, a row a projection, the largest white."""
    names = list(dict.fromkeys(name for _, rows in blocks for name in rows))
    grid = torch.tensor([[rows.get(name, [0.0])[-1] for _, rows in blocks] for name in names])
    return Image.fromarray(
        np.kron(bytes_of(grid, 0, float(grid.max())), np.ones((16, 16), dtype=np.uint8))
    )
