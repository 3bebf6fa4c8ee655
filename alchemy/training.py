"""The loss, the training loop, and the state from which an interrupted run continues.

    loss = w_t · ‖target − prediction(x_t, t, prompt)‖² + λ · (the same on the prior batch)

The first term teaches the subject. The second is prior preservation (DreamBooth, Ruiz et al. 2023,
eq. 2): it keeps the meaning of the class word. A batch carries its own target and loss mask, so
the loss does not know where the prior batch comes from (see methods/prior.py).
"""

import json
import math
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from . import lora
from .dataset import Batch, concat
from .files import save_tensors
from .schedule import Schedule
from .sdxl import SDXL, Conditioning, to_device

MAX_BAD_STEPS = 5  # steps in a row that may be lost to NaN or infinity
Prompts = Mapping[str | None, Conditioning]
GetLoss = Callable[[int, int], Tensor]  # (step, micro_step) -> scalar


@dataclass(frozen=True)
class TrainingTask:
    """What is trained on: get_batches(step, micro_step) returns a batch and its prior batch (or
    None); prompts: encoded."""

    get_batches: Callable[[int, int], tuple[Batch, Batch | None]]
    prompts: Prompts
    preview_prompts: list[str]


# The loss


def min_snr(schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """Weight of each sample (B,), float64. Hang et al. 2023, section 3.4.

    epsilon: min(γ, SNR) / SNR        v: min(γ, SNR) / (SNR + 1)        γ = 0: 1
    """
    snr = schedule.snr(t)
    if not gamma:
        return torch.ones_like(snr)
    divisor = snr if schedule.prediction == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor


def masked_mse(difference: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean square of (B,4,h,w) weighted by loss_mask (B,1,h,w): (B,)."""
    total = (loss_mask * difference.square()).mean((1, 2, 3))
    return total / loss_mask.mean((1, 2, 3)).clamp(min=1e-6)


def gather_conditioning(batch: Batch, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
    """Context, pooled vector and time ids of a batch, on its device."""
    # Each prompt is looked up once: it may be encoded when asked for.
    encoded = {prompt: prompts[prompt] for prompt in dict.fromkeys(batch.prompts)}
    cond = Conditioning.cat([encoded[prompt] for prompt in batch.prompts])
    device = batch.x_0.device
    return to_device(cond.context, device), to_device(cond.pooled, device), batch.time_ids


def denoising_loss(sdxl: SDXL, batch: Batch, prompts: Prompts, gamma: float = 5.0) -> Tensor:
    """w_t · ‖target − prediction‖² of each sample: (B,)."""
    x_t = sdxl.schedule.add_noise(batch.x_0, batch.eps, batch.t)
    t = to_device(batch.t, x_t.device)
    prediction = sdxl.unet(x_t, t, *gather_conditioning(batch, prompts))
    weight = min_snr(sdxl.schedule, batch.t, gamma).to(x_t.dtype)
    return to_device(weight, x_t.device) * masked_mse(prediction - batch.target, batch.loss_mask)


def loss(
    sdxl: SDXL,
    batch: Batch,
    prior: Batch | None,
    prompts: Prompts,
    prior_weight: float = 1.0,
    gamma: float = 5.0,
) -> Tensor:
    """DreamBooth (Ruiz et al. 2023), eq. 2: subject + λ · class, in one UNet call. A scalar.

    Both terms are means, so λ does not depend on the two batch sizes.
    """
    if prior is None:
        return denoising_loss(sdxl, batch, prompts, gamma).mean()
    both = denoising_loss(sdxl, concat(batch, prior), prompts, gamma)
    subject, class_ = both.split([len(batch.t), len(prior.t)])
    return subject.mean() + prior_weight * class_.mean()


# The loop


@dataclass
class TrainState:
    """What a run continues from. losses: one per step so far, NaN where it was not applied."""

    parameters: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    learning_rate: float
    step: int = 0
    losses: list[float] = field(default_factory=list)

    @classmethod
    def create(
        cls,
        parameters: dict[str, Tensor],
        learning_rate: float,
        dtype: torch.dtype = torch.float32,
    ) -> "TrainState":
        """A fresh state. Raises ValueError where a parameter is not float32 (see lora.Adapter)."""
        for name, p in parameters.items():
            if p.dtype != torch.float32:
                raise ValueError(f"{name} is not float32; trained parameters have to be")
        device = next(iter(parameters.values())).device.type
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=learning_rate, weight_decay=0.01, fused=device == "cuda"
        )
        # Small float16 gradients would underflow: scale the loss up and the gradients down.
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        return cls(parameters, optimizer, scaler, learning_rate)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Weights, moments and losses; the rest in the header, with a checksum of everything."""
        tensors = dict(self.parameters)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        for name, p in self.parameters.items():
            for moment, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{moment}:{name}"] = value
        header = metadata | {
            "step": str(self.step),
            "scaler": json.dumps(self.scaler.state_dict()),
            "threads": str(torch.get_num_threads()),
        }
        header["checksum"] = checksum(header, sorted(tensors.items()))
        save_tensors(tensors, path, header)

    @torch.no_grad()
    def restore(self, saved: Any, steps: int) -> None:
        """Continue from an open safetensors file. Raises ValueError, with nothing changed, where
        it is damaged or belongs to a run with other layers."""
        # Check all of it first.
        header, names = saved.metadata() or {}, sorted(saved.keys())
        for name, p in self.parameters.items():
            if name not in names or tuple(saved.get_slice(name).get_shape()) != p.shape:
                raise ValueError(
                    "the state is of another kind of run (other layers or rank); "
                    "resume with its settings, or --overwrite it"
                )
        tensors = ((name, saved.get_tensor(name)) for name in names)
        if header.get("checksum") != checksum(header, tensors):
            raise ValueError(
                "the state is damaged (its checksum differs); --overwrite starts again"
            )
        for name, p in self.parameters.items():
            shapes = {name: p.shape}
            if f"step:{name}" in names:  # else it has not had a gradient yet
                shapes |= {f"exp_avg:{name}": p.shape, f"exp_avg_sq:{name}": p.shape}
                shapes[f"step:{name}"] = torch.Size()
            for key, shape in shapes.items():
                value = saved.get_tensor(key)
                is_sound = value.dtype == torch.float32 and value.shape == shape
                if not is_sound or not value.isfinite().all():
                    raise ValueError(f"the state is damaged ({key}); --overwrite starts again")
        losses, step = saved.get_tensor("losses").tolist(), header["step"]
        step = int(step) if step.isdecimal() else -1
        if step < 0 or saved.get_slice("losses").get_shape() != [step]:
            raise ValueError("the state is damaged (its step); --overwrite starts again")
        if step > steps:
            raise ValueError(f"the state is at step {step}, after the last; raise --steps")

        # Take it over.
        for name, p in self.parameters.items():
            p.copy_(saved.get_tensor(name))
            if f"step:{name}" in names:
                self.optimizer.state[p] = self.read_moments(saved, name, p)
        self.losses = losses
        self.step = step
        if self.scaler.is_enabled() and header["scaler"] != "{}":
            self.scaler.load_state_dict(json.loads(header["scaler"]))

    def read_moments(self, saved: Any, name: str, p: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a parameter."""
        # Fused AdamW counts its steps on the device, the plain one on the CPU.
        fused = self.optimizer.defaults["fused"]
        moments = {"step": saved.get_tensor(f"step:{name}").to(p.device if fused else "cpu")}
        for moment in ("exp_avg", "exp_avg_sq"):
            # In p's memory format (channels_last) too, on which fused AdamW relies.
            value = saved.get_tensor(f"{moment}:{name}")
            moments[moment] = torch.empty_like(p).copy_(value)
        return moments


def checksum(header: dict[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """CRC-32 of a header, without its own entry, and of named tensors, one at a time."""
    entries = dict(sorted(header.items()))
    entries.pop("checksum", None)
    crc = zlib.crc32(json.dumps(list(entries.items())).encode())
    for name, tensor in tensors:
        values = tensor.detach().cpu().contiguous().reshape(-1)
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(values.view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str = "constant") -> float:
    """Factor of the learning rate at a step from 0 on: linear warm-up, then constant or cosine."""
    factor = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return factor


def autocast_to_dtype(sdxl: SDXL, enabled: bool) -> torch.autocast:
    """Compute in sdxl.dtype, where the network's own weights are float32 (--method full)."""
    enabled = enabled and sdxl.dtype != torch.float32
    return torch.autocast(sdxl.device.type, sdxl.dtype, enabled=enabled)


def train(
    sdxl: SDXL,
    state: TrainState,
    get_loss: GetLoss,
    *,
    steps: int,
    accumulation: int = 1,
    warmup: int = 0,
    schedule: str = "constant",
    autocast: bool = False,
) -> Iterator[tuple[int, float]]:
    """Yield (step, loss) after each optimizer step, from state.step to steps; the state is then
    whole and may be saved.

    get_loss(step, micro_step): a function of these two numbers alone.
    autocast: see autocast_to_dtype.
    A step whose loss or gradient is not finite is not applied, and its loss is NaN;
    FloatingPointError after more than MAX_BAD_STEPS of them in a row, in float16 only where the
    loss itself is not finite or the loss scale has fallen to 1.
    """
    optimizer, scaler = state.optimizer, state.scaler
    lower_precision = autocast_to_dtype(sdxl, autocast)
    adapters = lora.adapters(sdxl.unet)
    for step in range(state.step, steps):
        # Accumulate the gradients of the micro-steps.
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro_step in range(accumulation):
            with lora.cast_adapters(adapters, sdxl.dtype):
                with lower_precision:
                    value = get_loss(step, micro_step) / accumulation
                scaler.scale(value).backward()
            total += value.item()

        # Update the weights if everything is finite.
        factor = learning_rate_factor(step, steps, warmup, schedule)
        for group in optimizer.param_groups:
            group["lr"] = state.learning_rate * factor
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(state.parameters.values(), 1.0).item()
        applied = math.isfinite(total) and math.isfinite(norm)
        if applied:
            scaler.step(optimizer)
        scaler.update()
        state.step = step + 1
        state.losses.append(total if applied else math.nan)

        # Stop if the last steps, those before an interruption too, were all lost.
        recent = state.losses[-MAX_BAD_STEPS - 1 :]
        # A float16 run starts with a loss scale that overflows; each time, it is halved.
        if math.isfinite(total) and scaler.is_enabled() and scaler.get_scale() > 1:
            recent = []
        if len(recent) > MAX_BAD_STEPS and all(math.isnan(value) for value in recent):
            raise FloatingPointError(
                f"loss or gradient was not finite in {len(recent)} steps in a row, "
                f"the last is step {state.step}; lower --learning-rate"
            )
        yield state.step, state.losses[-1]


class StopSignal:
    """Inside, SIGINT and SIGTERM set .number, and the run ends after the step under way; a second
    one ends it at once."""

    def __enter__(self) -> "StopSignal":
        self.number = 0
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self.note)
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
