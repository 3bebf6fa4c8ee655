"""How visible the mask's edge is in the result of an insertion."""

import torch.nn.functional as F
from torch import Tensor

from ... import images
from ...insertion import Insertion

SCALES = (1, 2, 4, 8)  # pixels, in an image of 128
REACH = 8  # pixels along the boundary over which jumps are averaged, in an image of 128
DIRECTIONS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
VISIBLE = 2 / 127.5  # two grey levels of 255: the smallest jump that counts, in [-1,1]


def seam(insertion: Insertion) -> float:
    """The jump across the mask's boundary, relative to the scene's own jump at the same place.

    A jump is the difference between two patches, as wide as they are apart, one inside the mask
    and one outside. Its ratio to the same jump in the scene is averaged over eight directions, so
    that each side of the mask counts by its own texture; the largest of four scales is returned,
    so that a rim of any width counts. 1: the edge is no more visible than in the scene.
    """
    result = images.to_tensor(insertion.result)[0]
    scene = images.to_tensor(insertion.scene)[0]
    inside = insertion.feathered.cpu() > 0
    pixel = max(1, min(inside.shape) // 128)
    ratios = []
    for scale in SCALES:
        ratio = jump_ratio(result, scene, inside, scale * pixel, REACH * pixel)
        ratios.append(ratio)
    return max(ratios)


def jump_ratio(result: Tensor, scene: Tensor, inside: Tensor, distance: int, reach: int) -> float:
    """The mean over directions of result's jump over scene's; (3,H,W) each, inside (H,W) bool."""
    result = smooth(result, distance)
    scene = smooth(scene, distance)
    ratios = []
    for dy, dx in DIRECTIONS:
        offset = (dy * distance, dx * distance)
        here, there = pairs(inside, *offset)
        crossing = here & ~there
        if crossing.any():
            before = coherent_jump(scene, crossing, offset, reach)
            after = coherent_jump(result, crossing, offset, reach)
            ratios.append(max(after, VISIBLE) / max(before, VISIBLE))
    if not ratios:
        return 1.0
    return sum(ratios) / len(ratios)


def coherent_jump(image: Tensor, crossing: Tensor, offset: tuple[int, int], reach: int) -> float:
    """The mean absolute jump of image (3,H,W) over the pairs of pixels in `crossing`.

    Jumps are first averaged over neighbouring pairs, up to `reach` pixels away: texture cancels
    out, an edge along the boundary does not.
    """
    here, there = pairs(image, *offset)
    window = dict(kernel_size=2 * reach + 1, stride=1, padding=reach)
    total = F.avg_pool2d((there - here) * crossing, **window)
    share = F.avg_pool2d(crossing[None].float(), **window)
    jumps = (total / share.clamp(min=1e-9)).abs().mean(0)
    return float(jumps[crossing].mean())


def pairs(x: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Pixels of x (...,H,W) that have a neighbour at the offset (dy, dx), and the neighbours."""
    height, width = x.shape[-2:]
    top, bottom = max(-dy, 0), height - max(dy, 0)
    left, right = max(-dx, 0), width - max(dx, 0)
    here = x[..., top:bottom, left:right]
    there = x[..., top + dy : bottom + dy, left + dx : right + dx]
    return here, there


def smooth(image: Tensor, width: int) -> Tensor:
    """The mean of image (3,H,W) over a window of about that width."""
    radius = width // 2
    return F.avg_pool2d(image, 2 * radius + 1, 1, radius, count_include_pad=False)
