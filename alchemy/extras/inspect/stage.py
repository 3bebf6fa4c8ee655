"""What a Recorder recorded, as the page shows it."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...sdxl import SDXL
from .record import Recorder
from .sprites import data_uri, even_indices, preview, sprite_sheet, to_uint8

DECODED_STEPS = 6  # x_0 goes through the VAE at so many steps
MAX_MAPS = 800  # per level: all steps of 26 tokens, every third of 30 steps of 77
MAX_QUANTILE = 2**24  # torch.quantile takes no more numbers


@torch.no_grad()
def decode_steps(recorder: Recorder) -> dict[int, Tensor]:
    """{step: the image (3,H,W) in [-1,1] that x_0 decodes to} of a few steps; grey for NaN."""
    sdxl = recorder.sdxl
    decoded = {}
    for k in even_indices(len(recorder.steps), DECODED_STEPS):
        x_0 = recorder.latents["x_0"][k].float().to(sdxl.device)
        try:
            image = sdxl.vae.decode(x_0[None])[0].float().cpu()
        except FloatingPointError:
            height, width = (side * sdxl.vae_scale_factor for side in x_0.shape[1:])
            image = torch.zeros(3, height, width)
        decoded[k] = image
    return decoded


def frames(recorder: Recorder, colors: Tensor) -> dict[str, np.ndarray]:
    """{quantity: uint8 frames (n,h,w,3), one per step}; colors: see sprites.fit_colors.

    With guidance also the x_0 that eps_uncond and eps_cond alone imply, and their difference.
    """
    x_t = recorder.stacked("x_t")
    x_prev = recorder.stacked("x_prev")
    shown = {name: preview(recorder.stacked(name), colors) for name in ("x_t", "x_0", "eps")}
    if len(recorder.steps) == recorder.total:  # x_prev is the next x_t: only the last is new
        last = preview(x_prev[-1:], colors)
        shown["x_t"] = np.concatenate([shown["x_t"], last])
    else:
        shown["x_prev"] = preview(x_prev, colors)
    if "eps_uncond" in recorder.latents:
        ab = torch.tensor([step["alpha_bar"] for step in recorder.steps])
        ab = ab.view(-1, 1, 1, 1)
        uncond = recorder.stacked("eps_uncond")
        cond = recorder.stacked("eps_cond")
        for name, eps in (("x_0_uncond", uncond), ("x_0_cond", cond)):
            signal = x_t - (1 - ab).sqrt() * eps
            x_0 = signal / ab.sqrt().clamp(min=1e-4)
            shown[name] = preview(x_0, colors)
        difference = (cond - uncond).square().mean(1).sqrt()
        values = difference.flatten()[:MAX_QUANTILE]
        top = float(values.quantile(0.995))
        shown["guidance"] = to_uint8(difference, 0, top)
    return shown


def attention_levels(recorder: Recorder) -> dict[str, Tensor]:
    """Cross-attention by level, finest first: {"W × H": (n, tokens, h, w) probabilities}.

    With several levels also "all": their mean, each divided by its own mean.
    """
    if not recorder.cross or not recorder.cross[0]:
        return {}
    levels = {}
    for n in sorted(recorder.cross[0], reverse=True):
        h, w = recorder.level_shape(n)
        stacked = torch.stack([step[n] for step in recorder.cross]).float()  # (n, N, tokens)
        levels[f"{w} × {h}"] = stacked.movedim(-1, 1).unflatten(-1, (h, w))
    if len(levels) == 1:
        return levels
    finest = next(iter(levels.values())).shape[-2:]
    total = 0
    for level in levels.values():
        relative = level / level.mean((2, 3), keepdim=True).clamp(min=1e-9)
        total = total + F.interpolate(relative, finest, mode="bilinear", align_corners=False)
    return levels | {"all": total / len(levels)}


def attention_share(recorder: Recorder) -> Tensor:
    """The share of all cross-attention that each token gets: (n, tokens), the mean over layers."""
    counts = recorder.layer_counts
    rows = []
    for step in recorder.cross:
        total = 0
        for n, p in step.items():
            total = total + counts[n] * p.float().mean(0)
        rows.append(total)
    return torch.stack(rows) / sum(counts.values())


def token_sprites(level: Tensor) -> dict:
    """(n, tokens, h, w) to a sprite sheet for each token.

    at: the steps shown; the last frame is the mean over all steps. range: the probabilities that
    are black and white, for each token; the brightest 0.1 % are clipped.
    """
    most = max(10, MAX_MAPS // level.shape[1])
    at = even_indices(len(level), most)
    mean = level.mean(0, keepdim=True)
    level = torch.cat([level[at], mean])
    limits = torch.tensor([0.0, 0.999])
    sprites, ranges = [], []
    for token in level.unbind(1):
        values = token.flatten()[:MAX_QUANTILE]
        low, high = torch.quantile(values, limits).tolist()
        sprites.append(sprite_sheet(to_uint8(token, low, high)))
        ranges.append([low, high])
    return {"sprites": sprites, "range": ranges, "at": at}


def split_prompt(sdxl: SDXL, prompt: str) -> list[dict]:
    """For each tokenizer: [id, text] of every token with start and end, and the text cut off."""
    split = []
    for tokenizer in sdxl.tokenizers:
        ids = tokenizer(prompt)
        words = [list(token) for token in tokenizer.tokens(prompt)[:75]]
        start = [ids[0], "start"]
        end = [ids[len(words) + 1], "end"]
        truncated = tokenizer.truncated_text(prompt)
        split.append({"tokens": [start, *words, end], "truncated": truncated})
    return split


def self_attention_images(recorder: Recorder) -> dict[str, dict]:
    """{"W × H": {w, h, at: steps, src: data URIs of the (N,N) maps}}."""
    levels: dict[str, dict] = {}
    for k, maps in recorder.self_attention.items():
        for n, p in maps.items():
            h, w = recorder.level_shape(n)
            level = levels.setdefault(f"{w} × {h}", {"w": w, "h": h, "at": [], "src": []})
            level["at"].append(k)
            level["src"].append(data_uri(Image.fromarray(p.numpy())))
    return levels


def describe(
    recorder: Recorder, name: str, image: Image.Image, decoded: dict[int, Tensor], colors: Tensor
) -> dict:
    """A stage as page/stage.js reads it. decoded: see decode_steps; colors: see fit_colors."""
    eps_std = recorder.stacked("eps").flatten(1).std(1).tolist()
    x_0_std = recorder.stacked("x_0").flatten(1).std(1).tolist()
    steps = []
    for k, step in enumerate(recorder.steps):
        std = {"eps": round(eps_std[k], 4), "x_0": round(x_0_std[k], 4)}
        steps.append(step | {"std": std})
    pixels = torch.stack(list(decoded.values())).movedim(1, -1)
    shown = frames(recorder, colors)
    levels = attention_levels(recorder)
    return {
        "name": name,
        "focus": recorder.focus,
        "prompt": recorder.prompt,
        "negative": recorder.negative_prompt,
        "sampler": recorder.sampler,
        "guidance": recorder.guidance,
        "eta": recorder.eta,
        "guided": "eps_uncond" in recorder.latents,
        "modifier": recorder.modifier,
        "steps": steps,
        "tokens": split_prompt(recorder.sdxl, recorder.prompt),
        "sprites": {key: sprite_sheet(x) for key, x in shown.items()},
        "decoded": sprite_sheet(to_uint8(pixels, -1, 1)) | {"at": list(decoded)},
        "image": data_uri(image, image.width <= 256),
        "cross": {key: token_sprites(level) for key, level in levels.items()},
        "attention_share": attention_share(recorder).tolist() if levels else [],
        "self_attention": self_attention_images(recorder),
        "latent_size": recorder.latent_size,
        "image_size": image.size[::-1],
    }
