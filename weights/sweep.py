"""Which settings segment best? Mean IoU with the true alpha over fresh renders, for each combination; segmentation's defaults come from here.

    python weights/sweep.py --scenes 48

One UNet forward per scene and noise level; sharpening, threshold and dilation are then tried on the same maps.
"""
import argparse
import itertools
import sys
from pathlib import Path

import torch
from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import alchemy  # noqa: E402
from alchemy import segmentation  # noqa: E402
import world  # noqa: E402

LOOKS, POWERS, THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5), (0, 1, 2, 3), (0.2, 0.3, 0.4, 0.5, 0.6)
FIRST_SEED = 2 ** 41  # no training stream comes here


def scenes(count):
    """Fresh scenes of one object in the plain style, classes in turn: (PIL picture, class word, caption, true alpha (H,W))."""
    words = list(world.CLASSES)
    for k in range(count):
        instance = [i for i in world.CLASSES[words[k % len(words)]] if i not in world.HELD_OUT_INSTANCES][k // len(words) % 2]
        scene = world.scene(FIRST_SEED + k, instance=instance, style="photo")
        word, _, alpha = scene.objects[0]
        yield Image.fromarray(scene.image), word, scene.caption, torch.from_numpy(alpha)


def iou(mask, alpha):
    inside = alpha > 0.5
    return float((mask & inside).sum() / (mask | inside).sum())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=48, help="(default: 48)")
    parser.add_argument("--weights", default=str(HERE / "mini"))
    args = parser.parse_args(argv)
    sdxl, table = alchemy.load(args.weights), {}
    for picture, word, caption, alpha in scenes(args.scenes):
        for look, power in itertools.product(LOOKS, POWERS):
            soft = alchemy.segment(sdxl, picture, word, look=look, power=power)
            for threshold in THRESHOLDS:
                table.setdefault((look, power, threshold), []).append(iou(segmentation.clean(soft >= threshold), alpha))
    means = sorted(((sum(v) / len(v), key) for key, v in table.items()), reverse=True)
    print(f"{args.scenes} scenes; mean IoU of the cleaned mask, before it is grown\n\n| look | sharpening | threshold | mean IoU |\n|---|---|---|---|")
    for mean, (look, power, threshold) in means[:10] + means[-1:]:
        print(f"| {look} | {power} | {threshold} | {mean:.3f} |")


if __name__ == "__main__":
    main()
