"""What insert.py --inspect records: both stages, how the mask came to be, and the way back into the picture."""

from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ... import pipeline, sampling
from ...insertion import with_token
from ...segmentation import (
    AttentionMaps,
    model_resolution,
    remove_specks_and_holes,
    to_pixels,
    token_positions,
)
from . import sheets
from .page import write
from .pictures import bytes_of, film, uri
from .record import Recorder


class Watcher:
    """Stands, as `progress`, between both stages and their ends. totals: steps of each; image, mask, size: see alchemy.insert.

    The word's maps are collected a second time, beside insert's own. Of a picture of one's own they come from the one look that is
    taken at it before stage 2 begins.
    """

    def __init__(
        self,
        sdxl,
        prompt,
        class_word,
        token,
        totals,
        *,
        image=None,
        mask=None,
        size=None,
        **options,
    ):
        self.sdxl, self.looking, self.maps = sdxl, ExitStack(), None
        named = with_token(prompt, class_word, token)
        prompts = {
            "Stage 1: the scene, unmodified model": prompt,
            "Stage 2: the subject, with the LoRA": named,
        }
        stages = [
            (name, Recorder(sdxl, told, total, **options))
            for (name, told), total in zip(prompts.items(), totals)
        ]
        self.stages, self.begun = stages[1:] if image else stages, 0
        self.stages[-1][1].changed = "mask"
        for _, recorder in self.stages:
            recorder.focus = token_positions(sdxl, recorder.prompt, class_word)[0]
        if mask is None:
            size = model_resolution(sdxl, image.size[::-1]) if image else size
            window = () if image else (len(sdxl.schedule.alpha_bar), sdxl.defaults["window"])
            self.maps = AttentionMaps(
                sdxl.unet,
                token_positions(sdxl, prompt, class_word),
                tuple(side // sdxl.vae_scale_factor for side in size),
                *window,
            )
            if image:
                self.looking.enter_context(self.maps.record())

    def follow(self, steps):
        recorder, last = self.stages[self.begun][1], self.begun == len(self.stages) - 1
        if last and len(self.stages) == 1 and self.maps:
            self.looking.close()
            self.maps.accumulate(0)
        self.begun += 1
        return (
            recorder.follow(steps)
            if last or not self.maps
            else self.maps.follow(recorder.follow(steps))
        )


def mask_stages(watcher, made, threshold):
    """[(name, what it is, (H,W) in [0,1])]: the mask from the attention on, as insert made it."""
    if watcher.maps is None:
        return [
            ("your own mask", "given with --mask", made.mask),
            ("feathered", "falls off towards its edge, within it", made.feathered),
        ]
    power, (w, h) = watcher.sdxl.defaults["walk_iterations"], made.scene.size
    raw, spread = watcher.maps.heatmap(0), watcher.maps.heatmap(power)
    large = F.interpolate(
        spread[None, None].float().cpu(), (h, w), mode="bicubic", align_corners=False
    )[0, 0].clamp(0, 1)
    soft = to_pixels(spread, made.scene)
    rough = soft >= threshold
    return [
        (
            "cross-attention",
            "how much each place looks at the class word: the mean of all levels, and of the steps that count",
            raw.cpu(),
        ),
        (
            "times self-attention",
            "places that belong together share it: <i>A</i><sub>self</sub> · <i>m</i>",
            spread.cpu(),
        ),
        ("enlarged", "to the picture's size, bicubic", large),
        (
            "edge-aware",
            "a guided filter moves its edges to the picture's (He et al. 2010): <i>a · I + b</i> in each window",
            soft,
        ),
        ("thresholded", f"at least {threshold:g}", rough.float()),
        ("cleaned", "without small parts and holes", remove_specks_and_holes(rough).float()),
        ("grown", "by a margin: here something may change", made.mask),
        ("feathered", "falls off towards its edge, within it", made.feathered),
    ]


def latent_mask(made, factor):
    """Where stage 2 may draw, at its latents (h,w): see insertion.insert."""
    top, left, height, width = made.box
    inside = F.adaptive_max_pool2d(
        made.mask[None, top : top + height, left : left + width], made.generated.size[::-1]
    )[0]
    return pipeline.latent_mask(inside, factor)[0, 0]


def difference(made):
    """|result − scene| (H,W), the largest of the three colours, uint8; and the largest of it where the feathered mask is 0."""
    a, b = (np.asarray(p.convert("RGB"), dtype=np.int16) for p in (made.result, made.scene))
    changed = np.abs(a - b).max(2).astype(np.uint8)
    outside = changed[made.feathered.cpu().numpy() == 0]
    return changed, int(outside.max()) if outside.size else 0


def single(map):
    """One (H,W) in [0,1] as a film of one frame."""
    return film(bytes_of(map, 0, 1)[None], exact=True)


def write_page(folder, watcher, made, facts):
    """The page of an Insertion; returns the paths."""
    steps = mask_stages(watcher, made, facts["threshold"])
    changed, outside = difference(made)
    top = max(int(changed.max()), 1)
    pictures = [made.scene, made.generated][-len(watcher.stages) :]
    own = (
        {"result": made.result}
        if len(pictures) == 2
        else {"result": made.result, "scene": made.scene}
    )  # what no stage has shown
    own |= {"crop": made.crop} if made.crop != made.scene else {}
    told = {name: uri(picture, picture.width <= 256) for name, picture in own.items()}
    told |= {
        "mask": [{"name": name, "note": note, "film": single(m)} for name, note, m in steps],
        "seam": facts["seam"],
        "box": made.box,
        "difference": single(torch.from_numpy(changed) / top),
        "most": top,
        "outside": outside,
        "changed": float((made.feathered > 0).float().mean()),
        "latent_mask": single(latent_mask(made, watcher.sdxl.vae_scale_factor)),
        "size": made.scene.size,
        "found": watcher.maps is not None,
    }
    rows = [
        [(name, sheets.grey(m)) for name, _, m in steps],
        [
            *((name, getattr(made, name)) for name in ("scene", "crop", "generated", "result")),
            ("difference", Image.fromarray(changed)),
        ],
    ]
    stages = [
        (name, recorder, picture) for (name, recorder), picture in zip(watcher.stages, pictures)
    ]
    return write(
        folder,
        facts["prompt"],
        stages,
        facts,
        {"kind": "How the subject came into the scene", "insertion": told},
        rows,
    )
