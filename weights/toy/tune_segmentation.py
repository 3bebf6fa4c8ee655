"""The settings of the segmentation compared by mean IoU with the true alpha over fresh renders.

python -m weights.toy.tune_segmentation

Each scene is noised to each of NOISE_LEVELS and passes the UNet once. Noise levels, walk
iterations and threshold are then tried on those maps. A single level is how `segment`
treats an image; a window of levels stands for a scene that is watched while it is generated. The
mask of the best setting is then grown by each of DILATIONS.
"""

import itertools
import statistics

import torch
from PIL import Image
from torch import Tensor

import alchemy
from alchemy import cli, images, segmentation

from . import WEIGHTS, world

NOISE_LEVELS = tuple(k / 10 for k in range(1, 10))  # shares of T
WINDOWS = ((0.1, 0.5), (0.1, 0.7), (0.1, 0.9), (0.3, 0.7), (0.3, 0.9))
ITERATIONS, THRESHOLDS = (0, 1, 2, 3), (0.2, 0.3, 0.4, 0.5)
DILATIONS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05)  # shares of the shorter side
FIRST_SEED = world.FRESH + 2**30


@torch.no_grad()
def record(sdxl, image: Image.Image, word: str) -> dict:
    """{noise level: AttentionMaps}, each as `segment` makes it."""
    prompt, recorded = f"a photo of a {word}", {}
    x_0, _ = sdxl.vae.encode(images.to_tensor(image).to(sdxl.device))
    conditioning = sdxl.encode_prompt([prompt], image.size[::-1])
    tokens = segmentation.token_positions(sdxl, prompt, word)
    for level in NOISE_LEVELS:
        recorded[level] = segmentation.record_pass(sdxl, x_0, conditioning, tokens, level)
    return recorded


def combine(sdxl, recorded: dict, window: tuple):
    """AttentionMaps of all noise levels within the window (low, high)."""
    whole = segmentation.AttentionMaps(sdxl.unet, (), ())  # records nothing itself
    for level, maps in recorded.items():
        if not window[0] <= level <= window[1]:
            continue
        for sums, added in ((whole.cross, maps.cross), (whole.self_attn, maps.self_attn)):
            for shape, (total, count) in added.items():
                before = sums.get(shape, (0, 0))
                sums[shape] = (before[0] + total, before[1] + count)
    return whole


def iou(mask: Tensor, alpha: Tensor) -> float:
    inside = alpha > 0.5
    return float((mask & inside).sum() / (mask | inside).sum())


def grown(masks: list, dilation: float) -> tuple[float, float]:
    """Of soft masks: the median area over the true one, the mean part of the true one inside."""
    areas, insides = [], []
    for soft, threshold, alpha in masks:
        try:
            region = segmentation.binarize(soft, threshold, dilation) > 0
        except ValueError:  # insert would refuse it
            region = torch.ones_like(alpha, dtype=torch.bool)
        areas.append(float(region.sum() / (alpha > 0.5).sum()))
        insides.append(float(region[alpha > 0.5].float().mean()))
    return statistics.median(areas), statistics.mean(insides)


def main(argv=None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--scenes", type=cli.COUNT, default=32, help="(default: 32)")
    parser.add_argument("--weights", default=str(WEIGHTS / "mini"))
    args = parser.parse_args(argv)
    sdxl, ious, masks = alchemy.load(args.weights, dtype="float32"), {}, {}
    windows = [(level, level) for level in NOISE_LEVELS[:6]] + list(WINDOWS)
    for scene in world.plain_scenes(args.scenes, FIRST_SEED):
        ((word, _, alpha),) = scene.objects
        image, alpha = Image.fromarray(scene.image), torch.from_numpy(alpha)
        recorded = record(sdxl, image, word)
        for window, steps in itertools.product(windows, ITERATIONS):
            maps = combine(sdxl, recorded, window)
            soft = segmentation.to_pixels(maps.heatmap(steps), image)
            for threshold in THRESHOLDS:
                key = window, steps, threshold
                found = iou(segmentation.remove_specks_and_holes(soft >= threshold), alpha)
                ious.setdefault(key, []).append(found)
                masks.setdefault(key, []).append((soft, threshold, alpha))
    means = sorted(((statistics.mean(values), key) for key, values in ious.items()), reverse=True)
    print(f"{args.scenes} scenes; mean IoU of the cleaned mask, before it is grown")
    for title, single in (("noise level", True), ("window of levels", False)):
        chosen = [row for row in means if (row[1][0][0] == row[1][0][1]) == single]
        print(f"\n| {title} | walk iterations | threshold | mean IoU |\n|---|---|---|---|")
        for mean, (window, steps, threshold) in chosen[:6] + chosen[-1:]:
            levels = f"{window[0]}" if single else f"{window[0]} to {window[1]}"
            print(f"| {levels} | {steps} | {threshold} | {mean:.3f} |")
        print("\n| the best, grown by | area over the true one | of the true one inside |")
        print("|---|---|---|")
        for dilation in DILATIONS:
            area, inside = grown(masks[chosen[0][1]], dilation)
            print(f"| {dilation} | {area:.2f} | {inside:.1%} |")


if __name__ == "__main__":
    cli.run(main)
