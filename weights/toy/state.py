"""What the recipe trains and goes on from: weights, their EMA, the optimizer's moments, the time spent."""

import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .checkpoint import header_of


class State:
    """Modules under training with their EMA and optimizer; saved as safetensors, the old file replaced in one rename."""

    def __init__(self, modules, path, lr, decay):
        self.modules, self.path, self.decay, self.step, self.seconds = (
            modules,
            Path(path),
            decay,
            0,
            0.0,
        )
        self.parameters = {
            f"{n}.{k}": p for n, m in modules.items() for k, p in m.named_parameters()
        }
        self.ema = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        if self.path.exists():
            self.load()

    def update(self, loss, lr):
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - keep
        )

    @torch.no_grad()
    def use_ema(self):
        """The weights become their EMA."""
        for k, p in self.parameters.items():
            p.copy_(self.ema[k])

    def save(self):
        tensors = {f"weights.{k}": p.detach() for k, p in self.parameters.items()} | {
            f"ema.{k}": v for k, v in self.ema.items()
        }
        for k, p in self.parameters.items():
            moments = self.optimizer.state.get(p, {})
            tensors |= {f"{m}.{k}": moments[m] for m in ("exp_avg", "exp_avg_sq") if m in moments}
        tensors = {k: v.contiguous() for k, v in tensors.items()}  # channels_last is not for files
        new = self.path.with_suffix(".new")
        save_file(tensors, new, {"step": str(self.step), "seconds": str(self.seconds)})
        new.replace(self.path)

    @torch.no_grad()
    def load(self):
        tensors, header = load_file(self.path), header_of(self.path)
        self.step, self.seconds = int(header["step"]), float(header["seconds"])
        for k, p in self.parameters.items():
            p.copy_(tensors[f"weights.{k}"])
            self.ema[k].copy_(tensors[f"ema.{k}"])
            if f"exp_avg.{k}" in tensors:
                # In the strides of the parameter: the fused optimizer walks over the memory of both side by side.
                moments = {
                    m: torch.empty_like(p).copy_(tensors[f"{m}.{k}"])
                    for m in ("exp_avg", "exp_avg_sq")
                }
                self.optimizer.state[p] = moments | {"step": torch.tensor(float(self.step))}


FLAT = 0.6  # of the time the learning rate stays at its peak, then it falls linearly


def learning_rate(seconds, total, peak, warmup=60):
    return peak * min(
        1.0, (1 + seconds) / warmup, max(0.02, (total - seconds) / ((1 - FLAT) * total))
    )


def train(state, minutes, peak, loss_of, log):
    """Until the time is spent: loss_of(step) -> a scalar; a line every 50 updates, a state every 5 minutes and when interrupted."""
    total, before, mean = 60 * minutes, state.seconds, None
    start = saved = time.time()
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as from the keyboard
    try:
        while state.seconds < total:
            loss = loss_of(state.step)
            if not loss.isfinite():
                raise FloatingPointError(
                    f"loss is not finite at step {state.step}; the last good state is {state.path}"
                )
            state.update(loss, learning_rate(state.seconds, total, peak))
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            state.seconds = before + time.time() - start
            if state.step % 50 == 0:
                log(f"step {state.step} loss {mean:.4f} at {state.seconds:.0f} of {total:.0f} s")
            if time.time() - saved > 300:
                state.save()
                saved = time.time()
    except (
        KeyboardInterrupt
    ):  # it may have come in the middle of an update, which EMA and Adam forgive
        log(f"interrupted at step {state.step}; the same command goes on")
        state.save()
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, handler)
    state.save()
    log(f"done at step {state.step}, {state.seconds:.0f} s")
