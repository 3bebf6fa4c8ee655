"""Six samplers from the same noise, each by the formula of its own paper: which of them are one step (alchemy/samplers.py), on a sheet.

    python -m alchemy.extras.inspect.samplers out/samplers.png

The formulas stand in the place of denoise's step, as a hook. In float64, since the network makes more of every rounding.
"""

import math
from functools import partial
from pathlib import Path

import torch

from ... import cli, images, sampling
from ...formats import checkpoint, png
from .sheets import sheet

PROMPT, SEED, STEPS, SHOWN = "a photo of a cat on a beach", 1, 20, (0, 2, 4, 7, 11, 19)


def level(ab):
    return ((1 - ab) / ab) ** 0.5  # σ, in which Karras et al. and k-diffusion count


def ddim(step, ab, ab_prev, z, last, eta=0.0):
    """Song et al. 2021, eq. 12 and 16."""
    sigma = eta * ((1 - ab_prev) / (1 - ab)) ** 0.5 * (1 - ab / ab_prev) ** 0.5
    return ab_prev**0.5 * step.x_0 + (1 - ab_prev - sigma**2) ** 0.5 * step.eps + sigma * z


def ddpm(step, ab, ab_prev, z, last):
    """Ho et al. 2020, eq. 11 and algorithm 2, of its two variances the smaller; α = ᾱ/ᾱ_prev: a step is many timesteps long."""
    alpha, beta = ab / ab_prev, 1 - ab / ab_prev
    mean = (step.x_t - beta / (1 - ab) ** 0.5 * step.eps) / alpha**0.5
    return mean + (beta * (1 - ab_prev) / (1 - ab)) ** 0.5 * z


def euler(step, ab, ab_prev, z, last):
    """Euler's step in Karras et al. 2022, algorithm 1, on y = x/√ᾱ."""
    return ab_prev**0.5 * (step.x_t / ab**0.5 + (level(ab_prev) - level(ab)) * step.eps)


def euler_ancestral(step, ab, ab_prev, z, last):
    """k-diffusion's: Euler's step, but further down; then noise up to the level that is wanted."""
    s, s_prev = level(ab), level(ab_prev)
    up = s_prev / s * (s**2 - s_prev**2) ** 0.5
    down = (s_prev**2 - up**2) ** 0.5
    return ab_prev**0.5 * (step.x_t / ab**0.5 + (down - s) * step.eps + up * z)


def dpmpp_2m(step, ab, ab_prev, z, last):
    """Lu et al. 2022 (DPM-Solver++), algorithm 2; of first order at both ends."""
    s, s_prev, towards = level(ab), level(ab_prev), step.x_0
    if last and s_prev:
        r = math.log(level(last.alpha_bar) / s) / math.log(s / s_prev)
        towards = (1 + 1 / (2 * r)) * step.x_0 - 1 / (2 * r) * last.x_0
    return ((1 - ab_prev) / (1 - ab)) ** 0.5 * step.x_t - ab_prev**0.5 * (s_prev / s - 1) * towards


# Title, formula, the same in alchemy.samplers with which η (None: its own), and the row to compare with.
ROWS = (
    ("DDIM, eta 0", ddim, "ddim", None, 0),
    ("Euler", euler, "euler", None, 0),
    ("DDPM", ddpm, "ddpm", None, 2),
    ("DDIM, eta 1", partial(ddim, eta=1.0), "ddim", 1.0, 2),
    ("Euler ancestral", euler_ancestral, "euler_ancestral", None, 2),
    ("DPM-Solver++(2M)", dpmpp_2m, "dpmpp_2m", None, 0),
)


def trajectories(sdxl, size, steps):
    """For each of ROWS, x_0 (steps,4,h,w) as predicted at every step: by its formula, and by alchemy.samplers. size: (h, w)."""
    told, untold = sdxl.encode_prompt([PROMPT]), sdxl.encode_prompt([None])

    def draw(rule=None, **sampler):
        made, seen = sampling.generators([SEED]), [None]
        noise = sampling.noise((1, 4, *size), made).to(told.context)

        def hook(step):
            seen.append(step)
            return rule(
                step,
                step.alpha_bar,
                step.alpha_bar_prev,
                sampling.noise(noise.shape, made).to(noise),
                seen[-2],
            )

        drawn = sampling.denoise(
            sdxl,
            noise,
            told,
            untold,
            spacing="leading",
            steps=steps,
            generators=made,
            hook=rule and hook,
            **sampler,
        )
        return torch.cat([step.x_0 for step in drawn])

    return [(draw(rule), draw(sampler=name, eta=eta)) for _, rule, name, eta, _ in ROWS]


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("out", metavar="OUT.png", type=Path, help="the sheet to write")
    out = p.parse_args(argv).out
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: the sheet is a picture; name a file that ends in .png")
    sdxl, rows = checkpoint.load(cli.ROOT / cli.MINI, "cpu", torch.float64), []
    found, pairs = trajectories(sdxl, (32, 32), STEPS), sdxl.schedule.timesteps(STEPS, "leading")
    for (title, _, _, _, like), (x_0, ours) in zip(ROWS, found):
        ours, other = (f"{(x_0 - x).abs().max().item():.1g}" for x in (ours, found[like][0]))
        print(f"{title}: at most {other} from {ROWS[like][0]}, {ours} from alchemy.samplers")
        labels = [
            title,
            *(f"t = {pairs[k][0]}" for k in SHOWN[1:-1]),
            f"{ROWS[like][0].split(',')[0]} ± {other}" if other != "0" else "the picture",
        ]
        rows.append(
            [
                (label, images.to_image(image))
                for label, image in zip(labels, sdxl.vae.decode(x_0[list(SHOWN)]))
            ]
        )
    png.save(
        sheet(rows, 128).quantize(128),
        out,
        {"prompt": PROMPT, "seed": SEED, "steps": STEPS, "weights": cli.MINI},
    )
    cli.wrote(out)


if __name__ == "__main__":
    cli.run(main)
