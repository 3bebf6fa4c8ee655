"""The page of insert.py: both stages, how the mask was made, and the composite."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ... import pipeline, segmentation
from ...insertion import Insertion, with_token
from ...sampling import Step
from ...sdxl import SDXL
from .page import write_page
from .record import Recorder
from .sprites import data_uri, single_sprite

STAGES = ("Stage 1: the scene, from the base model", "Stage 2: the subject, with the LoRA")


class InsertionRecorder:
    """Records both stages of alchemy.insert, to which `follow` goes as its progress.

    totals: the number of steps of each stage. image, mask, size: as given to alchemy.insert.
    The attention to the class word is recorded a second time, beside insert's own; for an image
    of the user's it comes from the one forward pass before stage 2.
    """

    def __init__(
        self,
        sdxl: SDXL,
        prompt: str,
        class_word: str,
        token: str,
        totals: tuple[int, int],
        *,
        image: Image.Image | None = None,
        mask: Tensor | None = None,
        size: tuple[int, int] | None = None,
        **options: object,
    ):
        self.sdxl = sdxl
        self.stack = ExitStack()
        self.maps: segmentation.AttentionMaps | None = None
        self.current = -1  # the index of the stage under way
        prompts = (prompt, with_token(prompt, class_word, token))
        self.stages = []
        for name, text, total in zip(STAGES, prompts, totals, strict=True):
            recorder = Recorder(sdxl, text, total, **options)
            recorder.focus = segmentation.token_positions(sdxl, text, class_word)[0]
            self.stages.append((name, recorder))
        if image:
            del self.stages[0]
        self.stages[-1][1].modifier = "mask"
        # The class word's attention, over the steps that insert counts too.
        if mask is None and image:
            size = segmentation.model_resolution(sdxl, image.size[::-1])
            self.maps = segmentation.word_maps(sdxl, prompt, class_word, size)
            self.stack.enter_context(self.maps.record())
        elif mask is None:
            size, window = size or sdxl.size, sdxl.defaults["window"]
            self.maps = segmentation.word_maps(sdxl, prompt, class_word, size, window)

    def follow(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Record the next stage."""
        self.current += 1
        recorded = self.stages[self.current][1].follow(steps)
        if self.maps is None:
            return recorded
        if len(self.stages) == 1:  # the user's image has just been segmented
            self.stack.close()
            self.maps.accumulate(0)
        elif self.current == 0:
            return self.maps.follow(recorded)
        return recorded


def mask_steps(
    recorder: InsertionRecorder, made: Insertion, threshold: float
) -> list[tuple[str, str, Tensor]]:
    """(name, explanation, (H,W) in [0,1]) of each step from the attention to insert's mask."""
    edge = ("feathered", "falls off towards its edge, inside it", made.feathered)
    if recorder.maps is None:
        return [("your mask", "given with --mask", made.mask), edge]
    size = made.scene.size[::-1]
    iterations = recorder.sdxl.defaults["walk_iterations"]
    raw = recorder.maps.heatmap(0).float().cpu()
    walked = recorder.maps.heatmap(iterations).float().cpu()
    large = segmentation.resize(walked, size, "bicubic")
    soft = segmentation.to_pixels(walked, made.scene)
    rough = soft >= threshold
    smooth = segmentation.remove_specks_and_holes(rough).float()
    return [
        ("cross-attention", "to the class word: mean over levels and steps", raw),
        (
            "times self-attention",
            "one random-walk step: <i>A</i><sub>self</sub> · <i>m</i>",
            walked,
        ),
        ("upsampled", "to the image's size, bicubic", large.clamp(0, 1)),
        ("guided filter", "moves edges to the image's edges (He et al. 2010)", soft),
        ("thresholded", f"at least {threshold:g}", rough.float()),
        ("cleaned", "without specks and holes", smooth),
        ("dilated", "by a margin: what may change", made.mask),
        edge,
    ]


def latent_mask(made: Insertion, factor: int) -> Tensor:
    """Where stage 2 generates, (h,w) of its latents: as in insertion.insert."""
    top, left, height, width = made.box
    part = made.mask[None, top : top + height, left : left + width]
    inside = F.adaptive_max_pool2d(part, made.generated.size[::-1])[0]
    return pipeline.latent_mask(inside, factor)[0, 0]


def difference(made: Insertion) -> tuple[Tensor, int]:
    """|result − scene| (H,W) uint8, the largest of three channels; and its maximum outside."""
    result = torch.from_numpy(np.array(made.result))
    scene = torch.from_numpy(np.array(made.scene))
    changed = (result.int() - scene.int()).abs().amax(2)
    outside = changed[made.feathered.cpu() == 0]
    largest_outside = int(outside.max()) if outside.numel() else 0
    return changed.byte(), largest_outside


def write_insertion_page(
    folder: str | PathLike, recorder: InsertionRecorder, made: Insertion, metadata: dict
) -> list[Path]:
    """Write the page of an Insertion; returns the paths."""
    changed, largest_outside = difference(made)
    top = max(int(changed.max()), 1)
    images = [made.scene, made.generated][-len(recorder.stages) :]
    steps = []
    for name, note, mask in mask_steps(recorder, made, metadata["threshold"]):
        steps.append({"name": name, "note": note, "sprite": single_sprite(mask)})
    shown = {
        "mask": steps,
        "seam": metadata["seam"],
        "box": made.box,
        "difference": single_sprite(changed / top),
        "largest_difference": top,
        "difference_outside": largest_outside,
        "changed_share": float((made.feathered > 0).float().mean()),
        "latent_mask": single_sprite(latent_mask(made, recorder.sdxl.vae_scale_factor)),
        "size": made.scene.size,
        "segmented": recorder.maps is not None,
        "result": data_uri(made.result, made.result.width <= 256),
    }
    # Only what no stage shows already.
    if len(recorder.stages) == 1:
        shown["scene"] = data_uri(made.scene, made.scene.width <= 256)
    if made.crop != made.scene:
        shown["crop"] = data_uri(made.crop, made.crop.width <= 256)
    stages = []
    for (name, stage), image in zip(recorder.stages, images, strict=True):
        stages.append((name, stage, image))
    extra = {"kind": "How the subject was inserted into the scene", "insertion": shown}
    return write_page(folder, metadata["prompt"], stages, metadata, extra)
