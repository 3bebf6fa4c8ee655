"""The training loop: a generator that yields after each optimizer step, so that bars, previews and files are its caller's business.

    loss = w_t · ‖target − prediction(x_t, t, prompt)‖² + λ · w_t · ‖prediction_base(x_t, t, class) − prediction(x_t, t, class)‖²

The first term teaches the subject. The second keeps the class word what it was: on the class prompt, the model with the adapter is
held to its own prediction without it. It needs no class pictures (DreamBooth's prior preservation, Ruiz et al. 2023, eq. 2, does).
"""

import math
from dataclasses import dataclass, field

import torch

from . import lora
from .sdxl import Conditioning, to_device

MAX_BAD_STEPS = 5  # steps in a row that may be lost to NaN or infinity


@dataclass
class State:
    """What a run goes on from. parameters: {name: float32 tensor}; losses: one per step so far (NaN where it was not applied), but for
    those that are still on their way from the device: unread, (scalar on the CPU, event of its arrival or None) each."""

    parameters: dict
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    losses: list = field(default_factory=list)
    unread: list = field(default_factory=list)

    late = property(
        lambda self: self.optimizer.defaults["fused"],
        doc="whether the device decides about a step, and its loss is read later",
    )

    def read(self, but=0):
        """Wait for the losses that are on their way, but for the last few."""
        while len(self.unread) > but:
            loss, arrived = self.unread.pop(0)
            if arrived:
                arrived.synchronize()
            self.losses.append(float(loss))


def start(parameters, learning_rate, dtype=torch.float32):
    """A fresh State. parameters: {name: tensor}; all must be float32 (see lora.Adapter)."""
    wrong = [name for name, p in parameters.items() if p.dtype != torch.float32]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is not float32: trained parameters have to be, whatever the base is"
        )
    # A moment of float16 gradients would underflow: where only that is to be had, the loss is scaled up, the gradients down again.
    device = next(iter(parameters.values())).device.type
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=learning_rate, weight_decay=0.01, fused=device == "cuda"
    )
    return State(
        parameters, optimizer, torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    )


def min_snr(schedule, t, gamma):
    """The weight of each sample (B,): min(γ, SNR)/SNR for epsilon, min(γ, SNR)/(SNR + 1) for v. Hang et al. 2023, 3.4."""
    snr = schedule.snr(t)
    if not gamma:
        return torch.ones_like(snr)
    return snr.clamp(max=gamma) / (snr if schedule.prediction == "epsilon" else snr + 1)


def masked_mse(difference, weight):
    """(B,4,h,w) to (B,), each place counted by weight (B,1,h,w)."""
    return (weight * difference.square()).mean((1, 2, 3)) / weight.mean((1, 2, 3)).clamp(min=1e-6)


def tell(batch, prompts, names):
    """What the UNet is told of a batch under these prompts. prompts: {prompt: Conditioning of one}."""
    known = {
        name: prompts[name] for name in dict.fromkeys(names)
    }  # each once: they may be encoded when asked for
    told = Conditioning.cat([known[name] for name in names])
    return (
        to_device(told.context, batch.x_0.device),
        to_device(told.pooled, batch.x_0.device),
        batch.time_ids,
    )


def denoising_loss(sdxl, batch, prompts, gamma=5.0):
    """The first term above of each sample: (B,)."""
    x_t = sdxl.schedule.add_noise(batch.x_0, batch.eps, batch.t)
    target = sdxl.schedule.target(batch.x_0, batch.eps, batch.t)
    prediction = sdxl.unet(
        x_t, to_device(batch.t, x_t.device), *tell(batch, prompts, batch.prompts)
    )
    return to_device(min_snr(sdxl.schedule, batch.t, gamma).to(x_t.dtype), x_t.device) * masked_mse(
        prediction - target, batch.weight
    )


def loss(sdxl, batch, prompts, class_prompt=None, prior_weight=1.0, gamma=5.0):
    """The loss above, a scalar. class_prompt: a key of prompts, or None for no prior."""
    if class_prompt is None or not prior_weight:
        return denoising_loss(sdxl, batch, prompts, gamma).mean()
    schedule, unet, t, of_class = (
        sdxl.schedule,
        sdxl.unet,
        batch.t,
        tell(batch, prompts, [class_prompt] * len(batch.t)),
    )
    x_t = schedule.add_noise(batch.x_0, batch.eps, t)
    with torch.no_grad(), lora.lora_scale(unet, 0):
        kept = unet(x_t, to_device(t, x_t.device), *of_class)
    # Subject and class go through the network together: one batch of 2B. Of the class, every place counts.
    both = [torch.cat(pair) for pair in zip(tell(batch, prompts, batch.prompts), of_class)]
    target = torch.cat([schedule.target(batch.x_0, batch.eps, t), kept])
    weight = torch.cat([batch.weight, torch.ones_like(batch.weight)])
    error = masked_mse(
        unet(torch.cat([x_t, x_t]), to_device(torch.cat([t, t]), x_t.device), *both) - target,
        weight,
    )
    subject, prior = (
        to_device(min_snr(schedule, t, gamma).to(x_t.dtype), x_t.device).repeat(2) * error
    ).chunk(2)
    return subject.mean() + prior_weight * prior.mean()


def train(sdxl, state, loss_of, *, steps, accumulation=1, warmup=0):
    """Yield (step, loss) after each optimizer step, from state.step to steps; the state is then whole and may be saved.

    loss_of(step, part): the loss of one of the accumulation parts of a step, a function of these two numbers alone. A step whose loss or
    gradient is not finite is not applied, and its loss is NaN; FloatingPointError after MAX_BAD_STEPS of them in a row. On CUDA, where the next
    step need not wait for it, the loss that is yielded is that of the step before (not so of the first and the last).
    """
    rates = [
        group.setdefault("full_lr", group["lr"]) for group in state.optimizer.param_groups
    ]  # "lr" itself warms up
    autocast = torch.autocast(sdxl.device.type, sdxl.dtype, enabled=sdxl.dtype != torch.float32)
    for step in range(state.step, steps):
        # Accumulate gradients over the parts.
        state.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in range(accumulation):
            with autocast:
                value = loss_of(step, part) / accumulation
            state.scaler.scale(value).backward()
            total += value.detach()

        # Update the weights, if all is finite.
        for group, rate in zip(state.optimizer.param_groups, rates):
            group["lr"] = rate * min(1.0, (step + 1) / (warmup + 1))
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(state.parameters.values(), 1.0)
        total = torch.where(torch.isfinite(norm) & torch.isfinite(total), total, torch.nan)
        if state.late:  # the device decides: fused AdamW leaves all as it was where found_inf is 1
            state.optimizer.found_inf = total.isnan().float()
        if state.late or total.isfinite():
            state.optimizer.step()
        state.scaler.update()
        state.step = step + 1
        arriving = total.to("cpu", non_blocking=state.late)
        state.unread.append(
            (
                arriving,
                torch.cuda.current_stream(total.device).record_event() if total.is_cuda else None,
            )
        )
        state.read(but=int(state.late and state.step not in (1, steps)))
        last = state.losses[-MAX_BAD_STEPS - 1 :]
        if len(last) > MAX_BAD_STEPS and all(map(math.isnan, last)):
            raise FloatingPointError(
                f"loss or gradient was not finite in {len(last)} steps in a row, the last is {len(state.losses)}; lower --learning-rate"
            )
        yield state.step, last[-1]
