"""What a Recorder kept, as a page and a contact sheet show it: pictures of each quantity, maps of each token, numbers."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ... import images
from .pictures import bytes_of, film, preview, spread, uri

DECODED = 6  # steps whose x_0 goes through the VAE
MAPS = 800  # of a level, so many are shown: every step for 26 tokens, every third of 30 for 77
MOST = 2**24  # numbers that torch.quantile takes


@torch.no_grad()
def decoded(recorder):
    """{step: x_0 as a picture (3,H,W) in [-1,1]} of a few steps; grey where it is not finite."""
    x_0, sdxl = recorder.latents["x_0"], recorder.sdxl

    def one(x):
        try:
            return sdxl.vae.decode(x[None].float().to(sdxl.device))[0].float().cpu()
        except FloatingPointError:
            return torch.zeros(3, *(side * sdxl.vae_scale_factor for side in x.shape[1:]))

    return {k: one(x_0[k]) for k in spread(len(x_0), DECODED)}


def frames(recorder, colours):
    """{quantity: uint8 frames, one a step}. Of the guided and the unguided prediction, what x_0 each would mean."""
    made = {name: preview(recorder.stacked(name), colours) for name in ("x_t", "x_0", "eps")}
    x_prev = recorder.stacked("x_prev")
    if len(recorder.steps) == recorder.total:  # each is the next x_t: only the last is new
        made["x_t"] = np.concatenate([made["x_t"], preview(x_prev[-1:], colours)])
    else:
        made["x_prev"] = preview(x_prev, colours)
    if "eps_uncond" in recorder.latents:
        ab = torch.tensor([s["alpha_bar"] for s in recorder.steps]).view(-1, 1, 1, 1)
        a, s, x_t = ab.sqrt().clamp(min=1e-4), (1 - ab).sqrt(), recorder.stacked("x_t")
        for name in ("uncond", "cond"):
            made[f"x_0_{name}"] = preview((x_t - s * recorder.stacked(f"eps_{name}")) / a, colours)
        difference = (
            (recorder.stacked("eps_cond") - recorder.stacked("eps_uncond")).square().mean(1).sqrt()
        )
        made["guidance"] = bytes_of(
            difference, 0, float(difference.flatten()[:MOST].quantile(0.995))
        )
    return made


def maps(recorder):
    """Cross-attention: {level: (n, tokens, h, w) probabilities}, finest first, and "all", the mean of the levels, each by its own mean."""
    if not recorder.cross or not recorder.cross[0]:
        return {}
    levels = {}
    for n in sorted(recorder.cross[0], reverse=True):
        h, w = recorder.shape(n)
        levels[f"{w} × {h}"] = (
            torch.stack([step[n] for step in recorder.cross])
            .float()
            .movedim(-1, 1)
            .unflatten(-1, (h, w))
        )
    finest = next(iter(levels.values())).shape[-2:]
    even = [
        F.interpolate(
            m / m.mean((2, 3), keepdim=True).clamp(min=1e-9),
            finest,
            mode="bilinear",
            align_corners=False,
        )
        for m in levels.values()
    ]
    return levels | ({"all": sum(even) / len(even)} if len(levels) > 1 else {})


def mass(recorder):
    """How much of all cross-attention goes to each token: (n, tokens), the mean over the places of a layer, and over the layers."""
    layers = recorder.layers_of
    return torch.stack(
        [sum(layers[n] * p.float().mean(0) for n, p in step.items()) for step in recorder.cross]
    ) / sum(layers.values())


def films_of(level):
    """(n, tokens, h, w) to a film for each token, `at` some of the steps, the mean over all of them last, and the probabilities (low,
    high) of black and white."""
    at = spread(len(level), max(10, MAPS // level.shape[1]))
    level = torch.cat([level[at], level.mean(0, keepdim=True)])
    films, ranges = [], []
    for token in level.unbind(1):
        low, high = (
            float(x) for x in torch.quantile(token.flatten()[:MOST], torch.tensor([0.0, 0.999]))
        )  # a few brightest are cut
        films.append(film(bytes_of(token, low, high)))
        ranges.append([low, high])
    return {"films": films, "range": ranges, "at": at}


def tokens(sdxl, prompt):
    """The prompt as each tokenizer cuts it: [id, spelling] of every piece with start and end, and the words that did not fit."""
    cut = []
    for tokenizer in sdxl.tokenizers:
        ids = tokenizer(prompt)
        pieces = [[i, text] for i, text in tokenizer.tokens(prompt)][:75]
        cut.append(
            {
                "pieces": [[ids[0], "start"], *pieces, [ids[len(pieces) + 1], "end"]],
                "lost": tokenizer.truncated_text(prompt),
            }
        )
    return cut


def describe(recorder, name, picture, made, shown, levels):
    """The stage as page/stage.js reads it. picture: what came of it; made: see decoded; shown: see frames; levels: see maps."""
    spread_of = {q: recorder.stacked(q).flatten(1).std(1).tolist() for q in ("eps", "x_0")}
    steps = [
        dict(s, std={q: round(x[k], 4) for q, x in spread_of.items()})
        for k, s in enumerate(recorder.steps)
    ]
    large = film(
        torch.stack([m.movedim(0, -1) for m in made.values()])
        .add(1)
        .mul(127.5)
        .round()
        .clamp(0, 255)
        .byte()
        .numpy()
    )
    own = {}
    for k, found in recorder.own.items():
        for n, p in found.items():
            h, w = recorder.shape(n)
            level = own.setdefault(f"{w} × {h}", {"w": w, "h": h, "at": [], "src": []})
            level["at"].append(k)
            level["src"].append(uri(Image.fromarray(p.numpy())))
    return {
        "name": name,
        "focus": recorder.focus,
        "prompt": recorder.prompt,
        "negative": recorder.negative,
        "sampler": recorder.sampler,
        "guidance": recorder.guidance,
        "eta": recorder.eta,
        "guided": "eps_uncond" in recorder.latents,
        "changed": recorder.changed,
        "steps": steps,
        "tokens": tokens(recorder.sdxl, recorder.prompt),
        "films": {key: film(x) for key, x in shown.items()},
        "decoded": large | {"at": list(made)},
        "picture": uri(picture, picture.width <= 256),
        "cross": {key: films_of(level) for key, level in levels.items()},
        "mass": [[round(x, 5) for x in row] for row in mass(recorder).tolist()] if levels else [],
        "own": own,
        "latent": recorder.size,
        "pixels": picture.size[::-1],
    }


def contact(recorder, made, shown, levels):
    """Rows of (label, picture) for sheets.sheet: each quantity, then each token's map, at a few steps."""
    chosen = spread(len(recorder.steps), 8)
    words = {
        "x_t": "x_t",
        "eps": "predicted noise",
        "x_0": "predicted x_0",
        "x_0_uncond": "x_0, unguided",
        "x_0_cond": "x_0, prompt alone",
        "guidance": "where the prompt speaks",
    }
    rows = [
        [
            (f"{words[q]}, t {recorder.steps[k]['t']:g}", Image.fromarray(shown[q][k]))
            for k in chosen
        ]
        for q in words
        if q in shown
    ]
    rows.append(
        [(f"decoded, t {recorder.steps[k]['t']:g}", images.to_image(x)) for k, x in made.items()]
    )
    level = next(iter(levels.values()), None) if "all" not in levels else levels["all"]
    pieces = tokens(recorder.sdxl, recorder.prompt)[0]["pieces"]
    for i, (_, text) in list(enumerate(pieces))[:-1][:16] if level is not None else ():
        m = bytes_of(level[chosen, i], float(level[:, i].min()), float(level[:, i].max()))
        rows.append(
            [
                (f"{text!r}, t {recorder.steps[k]['t']:g}", Image.fromarray(m[j]))
                for j, k in enumerate(chosen)
            ]
        )
    return rows
