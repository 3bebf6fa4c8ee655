"""The recorder: it stands between the denoising loop and its end, looks at every Step and at the attention, and changes nothing.

    recorder = Recorder(sdxl, prompt, total=30, **settings)
    pipeline.text_to_image(..., progress=recorder.follow)

What it keeps is on the CPU, in half precision or 8 bits; a page and sheets are made of it afterwards.
"""

import math
from contextlib import ExitStack, contextmanager

import torch

from ... import attention, samplers
from ...segmentation import AttentionMaps
from .pictures import bytes_of, spread

MOST_STEPS = 100  # of a longer run, so many are kept, evenly
MOST_PLACES = 1024  # self-attention is N x N numbers: at levels of up to 32 x 32 places, ...
LOOKS = 5  # ... at so many steps
HALF = torch.finfo(torch.float16).max
QUANTITIES = ("x_t", "eps_uncond", "eps_cond", "eps", "x_0", "x_prev")


class Recorder:
    """Keeps the Steps of one picture (of a batch, the last). total: how many will come. full: keep the arrays in float32, to be written
    (else what float16 can hold is kept so).

    steps: a dict of numbers each; latents: {quantity: list of (4,h,w)}; cross: per step {places: (N, tokens)}; own: {step: {places:
    (N,N) uint8, each row by its largest}}; changed: what has a part in x_prev beside the sampler, "mask" or "hook"; layers_of: {places:
    how many layers of cross-attention}.
    """

    def __init__(
        self,
        sdxl,
        prompt,
        total,
        *,
        negative_prompt=None,
        full=False,
        sampler="euler",
        guidance=5.0,
        eta=None,
        **_,
    ):
        self.sdxl, self.prompt, self.negative, self.full = sdxl, prompt, negative_prompt, full
        self.sampler, self.guidance, self.focus, self.changed = (
            sampler,
            guidance,
            None,
            None,
        )  # focus: the token to be shown first
        self.row = samplers.find_sampler(sampler)
        self.eta = self.row.eta if eta is None else eta
        self.total, self.kept, self.seen = total, spread(total, MOST_STEPS), {}
        self.size = None  # (h, w) of the latents, known when the network is first called
        self.looks = sorted(
            {min(self.kept, key=lambda k: abs(k - look)) for look in spread(total, LOOKS)}
        )
        self.words = (
            min(75, len(sdxl.tokenizers[0].tokens(prompt))) + 2
        )  # with the start and the end
        self.steps, self.latents, self.cross, self.own, self.layers_of = [], {}, [], {}, {}

    def follow(self, steps):
        """Yield what steps yields. The attention is watched only while the loop makes a step that is kept."""
        steps, index = iter(steps), 0
        while True:
            with self.watching(index):
                step = next(steps, None)
            if step is None:
                return
            if index in self.kept:
                self.take(step)
            yield step
            index += 1

    @contextmanager
    def watching(self, index):
        """Inside, the layers of a step are watched from the network's first call on, which tells the size of the latents."""
        with ExitStack() as watched:

            def begin(unet, given):
                called.remove()
                self.size = tuple(given[0].shape[-2:])
                watched.enter_context(
                    attention.record_attention(unet, self.layers(index), self.see)
                )

            called = self.sdxl.unet.register_forward_pre_hook(begin)
            watched.callback(called.remove)
            yield

    def layers(self, index):
        """Those to be watched at a step: cross-attention, and at a few steps self-attention where it is coarse enough."""
        names = list(attention.attentions(self.sdxl.unet)) if index in self.kept else []
        cross = [name for name in names if name.endswith("attn2")]
        if index not in self.looks:
            return cross
        shape = AttentionMaps(self.sdxl.unet, [], self.size).layer_size
        return cross + [
            name
            for name in names
            if name.endswith("attn1") and math.prod(shape(name)) <= MOST_PLACES
        ]

    def see(self, name, probabilities):
        """One layer's (B, heads, N, M): the mean over the heads. The conditional half of a guided batch is its second."""
        p = probabilities[-1].mean(0)
        key = name.rpartition(".")[2], len(p)
        total, count = self.seen.get(key, (0, 0))
        self.seen[key] = total + (p[:, : self.words] if key[0] == "attn2" else p), count + 1

    def take(self, step):
        if self.row.update is samplers.lcm_step:
            sigma = self.eta * (1 - step.alpha_bar_prev) ** 0.5
        else:
            sigma = samplers.ddim_sigma(step.alpha_bar, step.alpha_bar_prev, self.eta)
        self.steps.append(
            {
                "index": step.index,
                "t": step.t,
                "t_prev": step.t_prev,
                "alpha_bar": step.alpha_bar,
                "alpha_bar_prev": step.alpha_bar_prev,
                "sigma": sigma,
            }
        )
        for name in QUANTITIES:
            if (x := getattr(step, name)) is not None:
                x = x[-1].detach().to("cpu", torch.float32, copy=True)
                self.latents.setdefault(name, []).append(
                    x if self.full or x.abs().max() > HALF else x.half()
                )
        means = {key: total / count for key, (total, count) in self.seen.items()}
        self.cross.append({n: p.half().cpu() for (kind, n), p in means.items() if kind == "attn2"})
        self.layers_of |= {
            n: count for (kind, n), (_, count) in self.seen.items() if kind == "attn2"
        }
        own = {
            n: torch.from_numpy(bytes_of(p / p.amax(1, keepdim=True), 0, 1))
            for (kind, n), p in means.items()
            if kind == "attn1"
        }
        self.own |= {len(self.steps) - 1: own} if own else {}
        self.seen = {}

    def shape(self, places):
        """(h, w) of the level with so many places: the latents' sides, halved and rounded up so many times."""
        halved = ([-(-side // 2**level) for side in self.size] for level in range(16))
        return next((h, w) for h, w in halved if h * w == places)

    def stacked(self, name):
        """All steps' latents of a quantity: (n,4,h,w) float32."""
        return torch.stack([x.float() for x in self.latents[name]])

    def arrays(self):
        """Everything as {name: tensor}, for a file: latents (n,4,h,w), cross-attention (n,N,tokens) by level, self-attention by step."""
        made = {name: torch.stack(kept) for name, kept in self.latents.items()}
        made |= {
            f"cross_attention.{n}": torch.stack([step[n] for step in self.cross])
            for n in (self.cross[0] if self.cross else ())
        }
        made |= {
            f"self_attention.{n}.step_{k}": p
            for k, levels in self.own.items()
            for n, p in levels.items()
        }
        numbers = (
            [s[key] for s in self.steps] for key in ("t", "alpha_bar", "alpha_bar_prev", "sigma")
        )
        return made | dict(
            zip(
                ("t", "alpha_bar", "alpha_bar_prev", "sigma"),
                (torch.tensor(x, dtype=torch.float64) for x in numbers),
            )
        )
