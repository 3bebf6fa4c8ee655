"""The noise schedule: alpha_bar, the grids of timesteps over it, and what a network's prediction means.

    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε          DDPM (Ho et al. 2020), eq. 4

A Schedule never changes after it is made. The noise level is often quoted as σ = √((1 − ᾱ)/ᾱ), the ratio of noise to picture.
"""

from dataclasses import dataclass

import numpy as np
import torch

SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class Schedule:
    """alpha_bar (T,) float64 on the CPU, falling; `prediction` is "epsilon" or "v_prediction"."""

    alpha_bar: torch.Tensor
    prediction: str = "epsilon"
    spacing: str = "leading"
    steps_offset: int = 1

    @classmethod
    def from_config(cls, config):
        """Read a scheduler_config.json's dict; {} is SDXL base. Raises ValueError for a value not known here."""
        T, first, last = (
            config.get(k, d)
            for k, d in (
                ("num_train_timesteps", 1000),
                ("beta_start", 0.00085),
                ("beta_end", 0.012),
            )
        )
        prediction, spacing = (
            config.get("prediction_type", "epsilon"),
            config.get("timestep_spacing", "leading"),
        )
        shape = config.get("beta_schedule", "scaled_linear")
        for name, value, known in (
            ("prediction_type", prediction, ("epsilon", "v_prediction")),
            ("timestep_spacing", spacing, SPACINGS),
            ("beta_schedule", shape, ("scaled_linear", "linear")),
        ):
            if value not in known:
                raise ValueError(
                    f"scheduler_config.json: {name} is {value!r}; known are {', '.join(known)}"
                )
        power = 2 if shape == "scaled_linear" else 1  # scaled_linear: √β is what grows evenly
        beta = (
            torch.linspace(first ** (1 / power), last ** (1 / power), T, dtype=torch.float64)
            ** power
        )
        schedule = cls(
            torch.cumprod(1 - beta, 0), prediction, spacing, config.get("steps_offset", 1)
        )
        return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule

    def __post_init__(self):
        if self.alpha_bar[-1] == 0 and self.prediction == "epsilon":
            raise ValueError(
                "a schedule with zero terminal SNR needs v-prediction: from pure noise, epsilon says nothing of x_0"
            )

    def zero_terminal_snr(self):
        """The same schedule with √ᾱ shifted and scaled so that its last is 0 and its first stays (Lin et al. 2023, algorithm 1)."""
        root = self.alpha_bar.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return Schedule(root**2, self.prediction, self.spacing, self.steps_offset)

    def alpha_bar_at(self, t):
        """ᾱ at timestep t as a float. Between two timesteps σ is interpolated linearly (Euler's linspace grid asks for that)."""
        low = int(t)
        if low == t:
            return float(self.alpha_bar[low])
        sigma_low, sigma_high = (
            ((1 - ab) / ab) ** 0.5 for ab in self.alpha_bar[low : low + 2].tolist()
        )
        sigma = sigma_low + (t - low) * (sigma_high - sigma_low)
        return 1 / (1 + sigma**2)

    def timesteps(self, steps, spacing=None, strength=1.0, fractional=False):
        """Pairs (t, t_prev) from the noisiest to the cleanest; t_prev is always the next grid point, None behind the last.

        spacing: where T timesteps are thinned to `steps`; None is the checkpoint's own. strength in (0, 1] keeps the last
        steps · strength of them (Img2Img). fractional leaves linspace's timesteps unrounded.
        """
        T, spacing = len(self.alpha_bar), spacing or self.spacing
        most = 50 if spacing == "lcm" else T
        if not 1 <= steps <= most:
            raise ValueError(f"steps is {steps}; it must be between 1 and {most}")
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; it must be above 0 and at most 1")
        if spacing == "leading":
            stride = T // steps
            offset = min(
                self.steps_offset, T - 1 - (steps - 1) * stride
            )  # a full grid has no room for the offset
            ts = [i * stride + offset for i in reversed(range(steps))]
        elif spacing == "trailing":
            ts = [round(T - i * (T / steps)) - 1 for i in range(steps)]
        elif spacing == "linspace":
            ts = np.linspace(0, T - 1, steps, dtype=np.float32 if fractional else None)[
                ::-1
            ]  # float32 as Euler is published
            ts = ts.tolist() if fractional else [int(t) for t in ts.round()]
        elif (
            spacing == "lcm"
        ):  # of the 50 timesteps that latent consistency models are distilled at
            ts = [(50 - 50 * i // steps) * (T // 50) - 1 for i in range(steps)]
        else:
            raise ValueError(f"grid is {spacing!r}; known are {', '.join(SPACINGS)}")
        kept = int(steps * strength + 1e-6)  # 50 · 0.58 is 28.999999999999996 in binary
        if kept == 0:
            raise ValueError(
                f"strength {strength} of {steps} steps is no step at all; raise one of them"
            )
        return list(zip(ts, ts[1:] + [None]))[steps - kept :]

    def to_x0_eps(self, prediction, x_t, alpha_bar):
        """The network's prediction as the pair (x_0, ε), all of x_t's shape. v = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho 2022)."""
        a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.prediction == "epsilon":
            return (x_t - s * prediction) / a, prediction
        return a * x_t - s * prediction, a * prediction + s * x_t

    def target(self, x_0, eps, t):
        """What the network is trained to predict for clean latents x_0 and noise eps (B, ...) at integer timesteps t (B,)."""
        if self.prediction == "epsilon":
            return eps
        a, s = self.sqrt_alpha_bars(t, x_0)
        return a * eps - s * x_0

    def add_noise(self, x_0, eps, t):
        """x_t for a batch of integer timesteps t (B,)."""
        a, s = self.sqrt_alpha_bars(t, x_0)
        return a * x_0 + s * eps

    def sqrt_alpha_bars(self, t, like):
        """√ᾱ_t and √(1−ᾱ_t) as (B, 1, 1, 1) tensors of like's dtype and device; the roots are taken in float64."""
        ab = self.alpha_bar[t.cpu()].view(-1, 1, 1, 1)
        return tuple(
            root.to(like.dtype).to(like.device, non_blocking=True)
            for root in (ab.sqrt(), (1 - ab).sqrt())
        )

    def snr(self, t):
        """ᾱ/(1−ᾱ) (B,) float64 at integer timesteps t (B,)."""
        ab = self.alpha_bar[t.cpu()]
        return ab / (1 - ab)
