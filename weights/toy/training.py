"""The training loop of the recipe and the state it resumes from: weights, EMA, moments, time."""

import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by the names of torch


class State:
    """Modules under training with their EMA and optimizer, saved as one safetensors file."""

    def __init__(self, modules: dict[str, nn.Module], path: Path, decay: float):
        self.modules, self.path, self.decay = modules, Path(path), decay
        self.step, self.seconds = 0, 0.0
        self.parameters = {}
        for name, module in modules.items():
            for key, parameter in module.named_parameters():
                self.parameters[f"{name}.{key}"] = parameter
        self.ema = {key: p.detach().clone() for key, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        if self.path.exists():
            self.load()

    def update(self, loss: Tensor, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
        new = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.ema.values()), new, 1 - keep)

    @torch.no_grad()
    def use_ema(self) -> None:
        """Set the weights to their EMA."""
        for key, parameter in self.parameters.items():
            parameter.copy_(self.ema[key])

    def save(self) -> None:
        """Write the file under a new name, then replace the old one."""
        tensors = {}
        for key, parameter in self.parameters.items():
            tensors[f"weights.{key}"] = parameter.detach()
            tensors[f"ema.{key}"] = self.ema[key]
            for moment in MOMENTS:
                if moment in self.optimizer.state.get(parameter, {}):
                    tensors[f"{moment}.{key}"] = self.optimizer.state[parameter][moment]
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        new = self.path.with_suffix(".new")
        save_file(tensors, new, {"step": str(self.step), "seconds": str(self.seconds)})
        new.replace(self.path)

    @torch.no_grad()
    def load(self) -> None:
        tensors, header = load_file(self.path), metadata(self.path)
        self.step, self.seconds = int(header["step"]), float(header["seconds"])
        for key, p in self.parameters.items():
            p.copy_(tensors[f"weights.{key}"])
            self.ema[key].copy_(tensors[f"ema.{key}"])
            if f"exp_avg.{key}" not in tensors:
                continue
            # The fused optimizer needs the moments in the memory layout of the parameter.
            moments = {m: torch.empty_like(p).copy_(tensors[f"{m}.{key}"]) for m in MOMENTS}
            self.optimizer.state[p] = moments | {"step": torch.tensor(float(self.step))}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as f:
        return f.metadata()


def ema_of(path: Path, name: str) -> dict[str, Tensor]:
    """The EMA of one module in a state file, by the names of its own parameters."""
    prefix = f"ema.{name}."
    tensors = load_file(path)
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def learning_rate(state: State, total: float, peak: float, flat: float) -> float:
    """200 steps of warm-up, the peak for the share `flat` of the time, then a linear decay."""
    decay = (total - state.seconds) / ((1 - flat) * total)
    return peak * min(1.0, (1 + state.step) / 200, max(0.02, decay))


def train(
    state: State,
    minutes: float,
    peak: float,
    flat: float,
    loss_of: Callable[[int], Tensor],
    log: Callable[[str], None],
    clock: Callable[[], float] = time.time,
) -> None:
    """Train until the time is spent. loss_of(step) returns a scalar. Saves every 4 minutes and
    when interrupted. Raises FloatingPointError where the loss is not finite."""
    total, before, mean = 60 * minutes, state.seconds, None
    start, saved = clock(), time.time()
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as from the keyboard
    try:
        while state.seconds < total:
            loss = loss_of(state.step)
            if not loss.isfinite():
                raise FloatingPointError(f"loss is not finite at step {state.step}")
            state.update(loss, learning_rate(state, total, peak, flat))
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            state.seconds = before + clock() - start
            if state.step % 100 == 0:
                log(f"step {state.step} loss {mean:.4f} at {state.seconds:.0f} of {total:.0f} s")
            if time.time() - saved > 240:
                state.save()
                saved = time.time()
    except KeyboardInterrupt:
        log(f"interrupted at step {state.step}; the same command continues")
        state.save()
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, handler)
    state.save()
    log(f"done at step {state.step}, {state.seconds:.0f} s")


@contextmanager
def bfloat16(device: torch.device):
    """Autocast to bfloat16 where the processor has it.

    On a CPU attention is written out: the fused one is several times slower backward there.
    """
    if device.type != "cpu":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        yield  # such a processor would only emulate it
        return
    fused = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if is_causal:  # the text encoders
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v

    try:
        F.scaled_dot_product_attention = attention
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        F.scaled_dot_product_attention = fused
