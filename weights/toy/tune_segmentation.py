"""Which settings segment best? Mean IoU with the true alpha over fresh renders; segmentation's defaults come from here.

    python -m weights.toy.tune_segmentation

Each scene is noised to each of LOOKS and looked at once; noise levels, layers, sharpening and threshold are then tried on those maps.
One level, of the first six, is how `segment` looks at a picture; a window of them stands for a scene that is watched while it is drawn.
The mask of the best setting is then grown by each of GROWN, to see what that takes and what it gives.
"""

import itertools
import statistics

import torch
from PIL import Image

import alchemy
from alchemy import cli, images, sampling, segmentation

from . import WEIGHTS, world

LOOKS = tuple(k / 10 for k in range(1, 10))  # shares of T
WINDOWS = ((0.1, 0.5), (0.1, 0.7), (0.1, 0.9), (0.3, 0.7), (0.3, 0.9))
LAYERS = {
    "all": slice(None),
    "finest": slice(0, 1),
    "coarsest": slice(-1, None),
}  # of cross-attention, by the size of their maps
POWERS, THRESHOLDS = (0, 1, 2, 3), (0.2, 0.3, 0.4, 0.5)
GROWN = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05)  # shares of the shorter side
FIRST_SEED = world.FRESH + 2**30


def scenes(count):
    """Fresh scenes of one object in the plain style, classes in turn: (PIL picture, class word, true alpha (H,W))."""
    words = list(world.CLASSES)
    for k in range(count):
        ones = [
            one
            for one in world.CLASSES[words[k % len(words)]]
            if one not in world.HELD_OUT_INSTANCES
        ]
        scene = world.scene(
            FIRST_SEED + k, instance=ones[k // len(words) % len(ones)], style="photo"
        )
        word, _, alpha = scene.objects[0]
        yield Image.fromarray(scene.image), word, torch.from_numpy(alpha)


@torch.no_grad()
def looked_at(sdxl, picture, word):
    """{look: AttentionMaps of that noise level}, each as `segment` makes it."""
    prompt, x_0 = (
        f"a photo of a {word}",
        sdxl.vae.encode(images.to_tensor(picture).to(sdxl.device))[0],
    )
    noise, told, made = (
        sampling.noise(x_0.shape, [0]).to(x_0),
        sdxl.encode_prompt([prompt], picture.size[::-1]).parts(),
        {},
    )
    for look in LOOKS:
        maps = segmentation.AttentionMaps(
            sdxl.unet, segmentation.token_positions(sdxl, prompt, word), x_0.shape[-2:]
        )
        t = torch.tensor([int(look * (len(sdxl.schedule.alpha_bar) - 1))])
        with maps.record():
            sdxl.unet(sdxl.schedule.add_noise(x_0, noise, t), t.to(x_0.device), *told)
        maps.accumulate(int(t))
        made[look] = maps
    return made


def combined(sdxl, made, window, layers):
    """AttentionMaps of all that was seen within the window (low, high), of some layers."""
    whole = segmentation.AttentionMaps(sdxl.unet, (), ())  # looks at nothing itself
    for maps in (maps for look, maps in made.items() if window[0] <= look <= window[1]):
        for mine, theirs in ((whole.cross, maps.cross), (whole.self_attn, maps.self_attn)):
            for shape, (total, count) in theirs.items():
                before = mine.get(shape, (0, 0))
                mine[shape] = (before[0] + total, before[1] + count)
    whole.cross = dict(sorted(whole.cross.items(), reverse=True)[LAYERS[layers]])
    return whole


def iou(mask, alpha):
    inside = alpha > 0.5
    return float((mask & inside).sum() / (mask | inside).sum())


def grown(best, dilation):
    """Of the soft masks of the best setting: the median area over the true one, and the mean part of the true one inside."""
    areas, insides = [], []
    for soft, threshold, alpha in best:
        try:
            may = segmentation.binarize(soft, threshold, dilation) > 0
        except ValueError:  # it would not be used
            may = torch.ones_like(alpha, dtype=torch.bool)
        areas.append(float(may.sum() / (alpha > 0.5).sum()))
        insides.append(float(may[alpha > 0.5].float().mean()))
    return statistics.median(areas), statistics.mean(insides)


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--scenes", type=cli.COUNT, default=32, help="(default: 32, two of each class)"
    )
    parser.add_argument("--weights", default=str(WEIGHTS / "mini"))
    args = parser.parse_args(argv)
    sdxl, table, softs = alchemy.load(args.weights, dtype="float32"), {}, {}
    for picture, word, alpha in scenes(args.scenes):
        made = looked_at(sdxl, picture, word)
        for window, layers in itertools.product(
            [(look, look) for look in LOOKS[:6]] + list(WINDOWS), LAYERS
        ):
            maps = combined(sdxl, made, window, layers)
            for power in POWERS:
                soft = segmentation.to_pixels(maps.heatmap(power), picture)
                for threshold in THRESHOLDS:
                    table.setdefault((window, layers, power, threshold), []).append(
                        iou(segmentation.remove_specks_and_holes(soft >= threshold), alpha)
                    )
                    softs.setdefault((window, layers, power, threshold), []).append(
                        (soft, threshold, alpha)
                    )
    means = sorted(((sum(v) / len(v), key) for key, v in table.items()), reverse=True)
    print(f"{args.scenes} scenes; mean IoU of the cleaned mask, before it is grown")
    for title, single in (("one noise level", True), ("a window of them", False)):
        chosen = [row for row in means if (row[1][0][0] == row[1][0][1]) == single]
        print(f"\n| {title} | layers | sharpening | threshold | mean IoU |\n|---|---|---|---|---|")
        for mean, (window, layers, power, threshold) in chosen[:6] + chosen[-1:]:
            print(
                f"| {window[0] if single else '{} to {}'.format(*window)} | {layers} | {power} | {threshold} | {mean:.3f} |"
            )
        print(
            "\n| the best, grown by | area over the true one | of the true one inside |\n|---|---|---|"
        )
        for dilation in GROWN:
            area, inside = grown(softs[chosen[0][1]], dilation)
            print(f"| {dilation} | {area:.2f} | {inside:.1%} |")


if __name__ == "__main__":
    cli.run(main)
