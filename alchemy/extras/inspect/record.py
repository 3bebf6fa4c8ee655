"""The recorder: it wraps the denoising loop, records every Step and the attention, changes nothing.

    recorder = Recorder(sdxl, prompt, total=30)
    alchemy.text_to_image(sdxl, prompt, steps=30, progress=recorder.follow)

The records are on the CPU, in half precision or 8 bits; page.py makes a page of them.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ... import attention, samplers
from ...sampling import Step
from ...sdxl import SDXL
from ...segmentation import AttentionMaps
from .sprites import even_indices, to_uint8

MAX_STEPS = 100  # of a longer run, so many are recorded
MAX_SELF_POSITIONS = 1024  # self-attention is N x N: recorded up to 32 x 32 positions, ...
SELF_STEPS = 5  # ... at so many steps
QUANTITIES = ("x_t", "eps_uncond", "eps_cond", "eps", "x_0", "x_prev")
NUMBERS = ("t", "alpha_bar", "alpha_bar_prev", "sigma")


class Recorder:
    """Records the Steps of one image (of a batch, the last).

    total: how many Steps will come. full: keep float32, for a file (default: float16).
    sampler, guidance, eta: those of the run; further options of denoise are ignored.

    steps: numbers of each recorded step. latents: {quantity: [(4,h,w), ...]}.
    cross: for each step {N: (N, tokens)}, the mean over heads and layers at the level with N
        positions. self_attention: {step: {N: (N,N) uint8, each row scaled to its maximum}}.
    layer_counts: {N: number of cross-attention layers}. latent_size: (h, w).
    modifier: what else changes x_prev, "mask" or "hook". focus: the token to show first.
    """

    def __init__(
        self,
        sdxl: SDXL,
        prompt: str,
        total: int,
        *,
        negative_prompt: str | None = None,
        full: bool = False,
        sampler: str = "euler",
        guidance: float = 5.0,
        eta: float | None = None,
        **_: object,
    ):
        self.sdxl = sdxl
        self.prompt = prompt
        self.negative_prompt = negative_prompt
        self.sampler = sampler
        self.guidance = guidance
        self.full = full
        self.total = total
        self.eta = samplers.find_sampler(sampler).eta if eta is None else eta
        self.modifier: str | None = None
        self.focus: int | None = None
        self.latent_size: tuple[int, int] | None = None

        self.recorded = even_indices(total, MAX_STEPS)
        self.self_steps = set()
        for wanted in even_indices(total, SELF_STEPS):
            self.self_steps.add(min(self.recorded, key=lambda k: abs(k - wanted)))
        self.num_tokens = min(75, len(sdxl.tokenizers[0].tokens(prompt))) + 2  # with start and end

        self.steps: list[dict] = []
        self.latents: dict[str, list[Tensor]] = {}
        self.cross: list[dict[int, Tensor]] = []
        self.self_attention: dict[int, dict[int, Tensor]] = {}
        self.layer_counts: dict[int, int] = {}
        self.sums: dict[tuple[str, int], tuple[Tensor, int]] = {}  # of the step under way

    def follow(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Yield the steps. Attention is recorded only during the steps that are kept."""
        steps, index = iter(steps), 0
        while True:
            with self.recording(index):
                step = next(steps, None)
            if step is None:
                return
            if index in self.recorded:
                self.add(step)
            yield step
            index += 1

    @contextmanager
    def recording(self, index: int) -> Iterator[None]:
        """Record the attention of step `index`, from the UNet's first call on."""
        with ExitStack() as stack:

            def begin(unet, inputs):
                handle.remove()
                self.latent_size = tuple(inputs[0].shape[-2:])
                stack.enter_context(
                    attention.record_attention(unet, self.layers(index), self.accumulate, True)
                )

            handle = self.sdxl.unet.register_forward_pre_hook(begin)
            stack.callback(handle.remove)
            yield

    def layers(self, index: int) -> list[str]:
        """The attention layers to record at step `index`."""
        if index not in self.recorded:
            return []
        shape = AttentionMaps(self.sdxl.unet, [], self.latent_size).layer_size
        names = []
        for name in attention.attentions(self.sdxl.unet):
            coarse = math.prod(shape(name)) <= MAX_SELF_POSITIONS
            if name.endswith("attn2") or (index in self.self_steps and coarse):
                names.append(name)
        return names

    def accumulate(self, name: str, probabilities: Tensor) -> None:
        """Add a layer's (B, heads, N, M). With guidance, the last row of the batch is cond."""
        p = probabilities[-1].mean(0)
        kind = name.rpartition(".")[2]
        p = p[:, : self.num_tokens] if kind == "attn2" else p
        total, count = self.sums.get((kind, len(p)), (0, 0))
        self.sums[kind, len(p)] = total + p, count + 1

    def add(self, step: Step) -> None:
        """Keep a Step and the attention accumulated since the last one."""
        numbers = {key: getattr(step, key) for key in ("index", "t", "t_prev")}
        numbers |= {"alpha_bar": step.alpha_bar, "alpha_bar_prev": step.alpha_bar_prev}
        self.steps.append(numbers | {"sigma": self.new_noise(step)})
        for name in QUANTITIES:
            x = getattr(step, name)
            if x is None:
                continue
            x = x[-1].detach().to("cpu", torch.float32, copy=True)
            fits = x.abs().max() <= torch.finfo(torch.float16).max
            if fits and not self.full:
                x = x.half()
            self.latents.setdefault(name, []).append(x)

        cross, self_attention = {}, {}
        for (kind, n), (total, count) in self.sums.items():
            mean = total / count
            if kind == "attn2":
                cross[n] = mean.half().cpu()
                self.layer_counts[n] = count
            else:
                scaled = mean / mean.amax(1, keepdim=True)
                self_attention[n] = torch.from_numpy(to_uint8(scaled, 0, 1))
        self.cross.append(cross)
        if self_attention:
            self.self_attention[len(self.steps) - 1] = self_attention
        self.sums = {}

    def new_noise(self, step: Step) -> float:
        """The standard deviation σ of the noise that the sampler draws anew in a step."""
        if self.sampler == "lcm":
            return self.eta * (1 - step.alpha_bar_prev) ** 0.5
        return samplers.ddim_sigma(step.alpha_bar, step.alpha_bar_prev, self.eta)

    def level_shape(self, positions: int) -> tuple[int, int]:
        """(h, w) of the level with so many positions: the latents' sides, halved k times."""
        h, w = self.latent_size
        while h * w > positions:
            h, w = -(-h // 2), -(-w // 2)
        return h, w

    def stacked(self, name: str) -> Tensor:
        """A quantity at all recorded steps: (n,4,h,w) float32."""
        return torch.stack([x.float() for x in self.latents[name]])

    def arrays(self) -> dict[str, Tensor]:
        """Everything as {name: tensor}, for a file."""
        arrays = {name: torch.stack(latents) for name, latents in self.latents.items()}
        for n in self.cross[0] if self.cross else ():
            arrays[f"cross_attention.{n}"] = torch.stack([step[n] for step in self.cross])
        for k, levels in self.self_attention.items():
            for n, p in levels.items():
                arrays[f"self_attention.{n}.step_{k}"] = p
        for key in NUMBERS:
            arrays[key] = torch.tensor([step[key] for step in self.steps], dtype=torch.float64)
        return arrays
