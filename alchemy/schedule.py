"""The noise schedule: ᾱ, the timesteps of a sampler, and the meaning of a network's prediction.

    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε          DDPM (Ho et al. 2020), eq. 4

A Schedule has no mutable state. The noise level is often given as σ = √((1 − ᾱ)/ᾱ), the ratio of
noise to signal.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("scaled_linear", "linear")
LCM_TIMESTEPS = 50  # latent consistency models are distilled at 50 of the timesteps


def noise_ratio(alpha_bar: float) -> float:
    """σ = √((1 − ᾱ)/ᾱ), the ratio of noise to signal; infinite at ᾱ = 0."""
    return ((1 - alpha_bar) / alpha_bar) ** 0.5 if alpha_bar else float("inf")


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a checkpoint.

    alpha_bar: ᾱ (T,) float64 on the CPU, decreasing. prediction: "epsilon" or "v_prediction".
    spacing, steps_offset: how `timesteps` chooses among the T timesteps by default.
    """

    alpha_bar: Tensor
    prediction: str = "epsilon"
    spacing: str = "leading"
    steps_offset: int = 1

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """Build the schedule of a scheduler_config.json; {} is SDXL base.

        Raises ValueError for a schedule that is not supported.
        """
        check_config(config)
        count = config.get("num_train_timesteps", 1000)
        first = config.get("beta_start", 0.00085)
        last = config.get("beta_end", 0.012)
        if config.get("beta_schedule", "scaled_linear") == "linear":
            beta = torch.linspace(first, last, count, dtype=torch.float64)
        else:  # scaled_linear: √β grows linearly, not β
            beta = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64) ** 2
        schedule = cls(
            torch.cumprod(1 - beta, 0),
            config.get("prediction_type", "epsilon"),
            config.get("timestep_spacing", "leading"),
            config.get("steps_offset", 1),
        )
        return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule

    def __post_init__(self):
        if self.alpha_bar[-1] == 0 and self.prediction == "epsilon":
            raise ValueError(
                "a schedule with zero terminal SNR needs v-prediction: "
                "at pure noise, ε does not determine x_0"
            )

    def zero_terminal_snr(self) -> "Schedule":
        """The same schedule with √ᾱ shifted and scaled so that its last value is 0.

        Lin et al. 2023, algorithm 1; the first value stays.
        """
        root = self.alpha_bar.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return replace(self, alpha_bar=root**2)

    def alpha_bar_at(self, t: float) -> float:
        """ᾱ at timestep t. Between two timesteps σ is interpolated linearly, as Euler needs it."""
        low = int(t)
        if low == t:
            return float(self.alpha_bar[low])
        sigma_low = noise_ratio(float(self.alpha_bar[low]))
        sigma_high = noise_ratio(float(self.alpha_bar[low + 1]))
        sigma = sigma_low + (t - low) * (sigma_high - sigma_low)
        return 1 / (1 + sigma**2)

    def timesteps(
        self,
        steps: int,
        spacing: str | None = None,
        strength: float = 1.0,
        fractional: bool = False,
    ) -> list[tuple[float, float | None]]:
        """Pairs (t, t_prev) from the noisiest to the cleanest; t_prev is None in the last pair.

        spacing: "leading", "trailing" or "linspace" (Lin et al. 2023, table 2), or "lcm";
            None is the checkpoint's own.
        strength: in (0, 1]; Img2Img runs only the last steps · strength of the pairs.
        fractional: do not round the timesteps of "linspace".

        Raises ValueError for values out of range, or where no step is left.
        """
        spacing = spacing or self.spacing
        most = LCM_TIMESTEPS if spacing == "lcm" else len(self.alpha_bar)
        if not 1 <= steps <= most:
            raise ValueError(f"steps is {steps}; it must be between 1 and {most}")
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; it must be above 0 and at most 1")
        count = int(steps * strength + 1e-6)  # 50 · 0.58 is 28.999999999999996 in binary
        if count == 0:
            raise ValueError(f"strength {strength} of {steps} steps is no step; raise one of them")
        ts = self.spaced(steps, spacing, fractional)
        pairs = list(zip(ts, ts[1:] + [None], strict=True))
        return pairs[steps - count :]

    def spaced(self, steps: int, spacing: str, fractional: bool) -> list[float]:
        """The timesteps alone, decreasing."""
        total = len(self.alpha_bar)
        if spacing == "leading":
            stride = total // steps
            room = total - 1 - (steps - 1) * stride  # with steps = T there is none
            offset = min(self.steps_offset, room)
            return [i * stride + offset for i in reversed(range(steps))]
        if spacing == "trailing":
            return [round(total - i * (total / steps)) - 1 for i in range(steps)]
        if spacing == "linspace" and fractional:  # float32, as Euler is published
            ts = np.linspace(0, total - 1, steps, dtype=np.float32)[::-1]
            return ts.tolist()
        if spacing == "linspace":
            ts = np.linspace(0, total - 1, steps)[::-1]
            return [int(t) for t in ts.round()]
        if spacing == "lcm":
            stride = total // LCM_TIMESTEPS
            indices = [LCM_TIMESTEPS - LCM_TIMESTEPS * i // steps for i in range(steps)]
            return [index * stride - 1 for index in indices]
        raise ValueError(f"timestep spacing is {spacing!r}; known are {', '.join(SPACINGS)}")

    def to_x0_eps(self, prediction: Tensor, x_t: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor]:
        """The network's prediction as the pair (x_0, ε), both of x_t's shape.

        v = √ᾱ ε − √(1−ᾱ) x_0          Salimans & Ho 2022, section 4
        """
        a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.prediction == "epsilon":
            return (x_t - s * prediction) / a, prediction
        return a * x_t - s * prediction, a * prediction + s * x_t

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to predict from x_t, (B,4,h,w): ε or v. t: integers (B,)."""
        if self.prediction == "epsilon":
            return eps
        a, s = self.sqrt_alpha_bars(t, x_0)
        return a * eps - s * x_0

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (B,4,h,w) from clean latents x_0, noise eps, and integer timesteps t (B,)."""
        a, s = self.sqrt_alpha_bars(t, x_0)
        return a * x_0 + s * eps

    def sqrt_alpha_bars(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1−ᾱ_t) (B,1,1,1) in the dtype and on the device of `like`."""
        ab = self.alpha_bar[t.cpu()].view(-1, 1, 1, 1)
        a = ab.sqrt().to(like.dtype)  # the root in float64, then cast
        s = (1 - ab).sqrt().to(like.dtype)
        a = a.to(like.device, non_blocking=True)
        s = s.to(like.device, non_blocking=True)
        return a, s

    def snr(self, t: Tensor) -> Tensor:
        """ᾱ/(1−ᾱ) (B,) float64 at integer timesteps t (B,)."""
        ab = self.alpha_bar[t.cpu()]
        return ab / (1 - ab)


def check_config(config: dict) -> None:
    """Raise ValueError for a scheduler_config.json that Schedule does not implement."""
    if config.get("trained_betas") is not None:
        raise ValueError("scheduler_config.json: trained_betas are not supported")
    kind = f"{config.get('_class_name')} {config.get('prediction_type')}"
    if "flow" in kind.lower() or config.get("use_flow_sigmas"):
        raise ValueError("scheduler_config.json: flow matching is not supported; SDXL predicts ε")
    for name, known in (
        ("prediction_type", PREDICTIONS),
        ("timestep_spacing", SPACINGS),
        ("beta_schedule", BETA_SCHEDULES),
    ):
        if config.get(name, known[0]) not in known:
            known = ", ".join(known)
            raise ValueError(
                f"scheduler_config.json: {name} is {config[name]!r}; known are {known}"
            )
