"""Six samplers from the same noise, each by the formula of its own paper.

    python tests/bench/samplers_sheet.py alchemy/samplers.png

The formulas replace denoise's step, as a hook. Float64: the network amplifies every rounding. The
sheet shows which of them are the same step; tests/extras/test_samplers_sheet.py compares them with
alchemy/samplers.py.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PROMPT, SEED, STEPS, SHOWN = "a photo of a cat on a beach", 1, 20, (0, 2, 4, 7, 11, 19)


def noise_ratio(ab: float) -> float:
    """σ, in which Karras et al. and k-diffusion count."""
    return ((1 - ab) / ab) ** 0.5


def ddim(step, ab, ab_prev, z, previous, eta=0.0):
    """Song et al. 2021, eq. 12 and 16."""
    sigma = eta * ((1 - ab_prev) / (1 - ab)) ** 0.5 * (1 - ab / ab_prev) ** 0.5
    return ab_prev**0.5 * step.x_0 + (1 - ab_prev - sigma**2) ** 0.5 * step.eps + sigma * z


def ddpm(step, ab, ab_prev, z, previous):
    """Ho et al. 2020, eq. 11 and algorithm 2, the smaller variance; α = ᾱ/ᾱ_prev."""
    alpha, beta = ab / ab_prev, 1 - ab / ab_prev
    mean = (step.x_t - beta / (1 - ab) ** 0.5 * step.eps) / alpha**0.5
    return mean + (beta * (1 - ab_prev) / (1 - ab)) ** 0.5 * z


def euler(step, ab, ab_prev, z, previous):
    """The Euler step of Karras et al. 2022, algorithm 1, on y = x/√ᾱ."""
    y = step.x_t / ab**0.5
    return ab_prev**0.5 * (y + (noise_ratio(ab_prev) - noise_ratio(ab)) * step.eps)


def euler_ancestral(step, ab, ab_prev, z, previous):
    """k-diffusion's: an Euler step to a lower level, then noise up to the wanted one."""
    s, s_prev = noise_ratio(ab), noise_ratio(ab_prev)
    up = s_prev / s * (s**2 - s_prev**2) ** 0.5
    down = (s_prev**2 - up**2) ** 0.5
    return ab_prev**0.5 * (step.x_t / ab**0.5 + (down - s) * step.eps + up * z)


def dpmpp_2m(step, ab, ab_prev, z, previous):
    """Lu et al. 2022 (DPM-Solver++), algorithm 2; of first order at both ends."""
    s, s_prev, x_0 = noise_ratio(ab), noise_ratio(ab_prev), step.x_0
    if previous and s_prev:
        r = math.log(noise_ratio(previous.alpha_bar) / s) / math.log(s / s_prev)
        x_0 = (1 + 1 / (2 * r)) * step.x_0 - 1 / (2 * r) * previous.x_0
    return ((1 - ab_prev) / (1 - ab)) ** 0.5 * step.x_t - ab_prev**0.5 * (s_prev / s - 1) * x_0


# Title, formula, sampler of alchemy.samplers and its η (None: its own), row to compare with.
ROWS = (
    ("DDIM, eta 0", ddim, "ddim", None, 0),
    ("Euler", euler, "euler", None, 0),
    ("DDPM", ddpm, "ddpm", None, 2),
    ("DDIM, eta 1", partial(ddim, eta=1.0), "ddim", 1.0, 2),
    ("Euler ancestral", euler_ancestral, "euler_ancestral", None, 2),
    ("DPM-Solver++(2M)", dpmpp_2m, "dpmpp_2m", None, 0),
)


def trajectory(sdxl, size: tuple[int, int], steps: int, formula: Callable | None, **sampler):
    """x_0 (steps,4,h,w) as predicted at every step: by a formula, or by alchemy.samplers."""
    from alchemy import sampling

    rngs = sampling.generators([SEED])
    cond, uncond = sdxl.encode_prompt([PROMPT]), sdxl.encode_prompt([None])
    noise = sampling.noise((1, 4, *size), rngs).to(cond.context)
    history = [None]

    def hook(step):
        history.append(step)
        z = sampling.noise(noise.shape, rngs).to(noise)
        return formula(step, step.alpha_bar, step.alpha_bar_prev, z, history[-2])

    options = dict(spacing="leading", steps=steps, generators=rngs, hook=formula and hook)
    run = sampling.denoise(sdxl, noise, cond, uncond, **options, **sampler)
    return torch.cat([step.x_0 for step in run])


def trajectories(sdxl, size: tuple[int, int], steps: int) -> dict[str, tuple[Tensor, Tensor]]:
    """{title: (by its paper's formula, by alchemy.samplers)}."""
    found = {}
    for title, formula, name, eta, _ in ROWS:
        ours = trajectory(sdxl, size, steps, None, sampler=name, eta=eta)
        found[title] = trajectory(sdxl, size, steps, formula), ours
    return found


def main(argv: list[str] | None = None) -> None:
    from alchemy import cli, images
    from alchemy.extras.inspect.sheets import sheet
    from alchemy.formats import checkpoint, png

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.png")
    out = parser.parse_args(argv).out
    sdxl, rows = checkpoint.load(cli.ROOT / cli.MINI, "cpu", torch.float64), []
    found, pairs = trajectories(sdxl, (32, 32), STEPS), sdxl.schedule.timesteps(STEPS, "leading")
    for title, _, _, _, like in ROWS:
        (x_0, ours), other = found[title], ROWS[like][0]
        off = f"{(x_0 - found[other][0]).abs().max().item():.1g}"
        own = f"{(x_0 - ours).abs().max().item():.1g}"
        print(f"{title}: at most {off} from {other}, {own} from alchemy.samplers")
        last = "the image" if off == "0" else f"{other.split(',')[0]} ± {off}"
        labels = [title, *(f"t = {pairs[k][0]}" for k in SHOWN[1:-1]), last]
        decoded = [images.to_image(x) for x in sdxl.vae.decode(x_0[list(SHOWN)])]
        rows.append(list(zip(labels, decoded, strict=True)))
    metadata = {"prompt": PROMPT, "seed": SEED, "steps": STEPS, "weights": cli.MINI}
    png.save(sheet(rows, 128).quantize(128), out, metadata)


if __name__ == "__main__":
    main()
