"""Where in an image is the object that a word names? The model's own attention answers.

Cross-attention gives the weight of the word at each position (Tang et al. 2022, DAAM).
Self-attention gives which positions belong together, and so spreads the word over the whole
object (Wang et al. 2023, DiffSegmenter). At the image's resolution, a guided filter (He et al.
2010) moves the edges of the mask to those of the image.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from . import attention, images, sampling
from .arguments import checked, resolve_seed
from .images import ImageLike, Size
from .sampling import Step
from .sdxl import SDXL, Conditioning

# Self-attention is N x N numbers: it is recorded at the finest level of at most so many positions
# (of SDXL at 1024 x 1024, the level of 32 x 32).
MAX_SELF_ATTENTION = 2048


def token_positions(sdxl: SDXL, prompt: str, word: str) -> list[int]:
    """The positions of the word's tokens among the 77 of the prompt, all occurrences.

    Raises ValueError where the word is not in the prompt.
    """
    occurrences = sdxl.tokenizers[0].find(prompt, word)
    if not occurrences:
        truncated = sdxl.tokenizers[0].truncated_text(prompt)
        note = f", of which {truncated!r} is cut off" if truncated else ""
        raise ValueError(f"the word {word!r} is not in the prompt {prompt!r}{note}")
    return sorted(set(itertools.chain(*occurrences)))


class AttentionMaps:
    """Averages the attention to some tokens, and of the image to itself, over layers and steps.

        maps = word_maps(sdxl, prompt, word, size)
        for step in maps.follow(denoise(...)): ...
        heat = maps.heatmap(walk_iterations=1)

    latent_size: (h, w). window: only timesteps between these shares of `timesteps` count; in
    earlier steps there is nothing to see yet.

    cross: {(h, w): (sum, count)} of maps (h·w,) by the size of their layer; self_attn: the same
    of matrices (h·w, h·w). pending: the same, by (is it cross-attention, size), of what was
    recorded since the last accumulate; sums, since the matrices of all layers are gigabytes.
    """

    def __init__(
        self,
        unet: nn.Module,
        positions: Sequence[int],
        latent_size: Size,
        timesteps: int = 1000,
        window: tuple[float, float] = (0.0, 1.0),
    ):
        self.unet = unet
        self.positions = positions
        self.latent_size = latent_size
        self.low_t = window[0] * timesteps
        self.high_t = window[1] * timesteps
        self.cross: dict[Size, tuple[Tensor, int]] = {}
        self.self_attn: dict[Size, tuple[Tensor, int]] = {}
        self.pending: dict[tuple[bool, Size], tuple[Tensor, int]] = {}

    def layer_size(self, name: str) -> Size:
        """(h, w) of a layer: the latents' sides, halved and rounded up at each level down."""
        block, index = name.split(".")[:2]
        level = len(self.unet.down_blocks) - 1  # of the mid block
        if block == "down_blocks":
            level = int(index)
        elif block == "up_blocks":
            level -= int(index)
        height, width = self.latent_size
        return math.ceil(height / 2**level), math.ceil(width / 2**level)

    def layers(self) -> list[str]:
        """The layers to record: all of cross-attention, and one level of self-attention."""
        sizes = {name: self.layer_size(name) for name in attention.attentions(self.unet)}
        small = [size for size in sizes.values() if math.prod(size) <= MAX_SELF_ATTENTION]
        finest = max(small, default=None)
        chosen = []
        for name, size in sizes.items():
            if name.endswith("attn2") or size == finest:
                chosen.append(name)
        return chosen

    def record(self) -> AbstractContextManager:
        """Inside, each forward of the UNet adds to `pending`."""
        return attention.record_attention(self.unet, self.layers(), self.collect, last_only=True)

    def collect(self, name: str, probabilities: Tensor) -> None:
        """Add one layer's probabilities (1, heads, N, M), of the conditional half of the batch."""
        p = probabilities[-1].mean(0)  # (N, M)
        is_cross = name.endswith("attn2")
        if is_cross:
            # One by one: to index by a list would wait for the device.
            columns = [p[:, position] for position in self.positions]
            p = torch.stack(columns, dim=1).mean(1)  # (N,)
        key = is_cross, self.layer_size(name)
        total, count = self.pending.get(key, (0, 0))
        self.pending[key] = (total + p, count + 1)

    def accumulate(self, t: float) -> None:
        """Count what is pending, recorded at timestep t, if t is in the window; else discard it."""
        if self.in_window(t):
            for (is_cross, size), (p, layers) in self.pending.items():
                table = self.cross if is_cross else self.self_attn
                total, count = table.get(size, (0, 0))
                table[size] = (total + p, count + layers)
        self.pending = {}

    def in_window(self, t: float) -> bool:
        return self.low_t <= t <= self.high_t

    def follow(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Pass Steps through, while the attention of those in the window is recorded."""
        with ExitStack() as recording:
            recording.enter_context(self.record())  # the first timestep is not known yet
            for step in steps:
                self.accumulate(step.t)
                recording.close()
                if step.t_prev is not None and self.in_window(step.t_prev):
                    recording.enter_context(self.record())
                yield step

    def heatmap(self, walk_iterations: int) -> Tensor:
        """The word's map (h, w) in [0,1] at the finest recorded level.

        walk_iterations: steps of a random walk along self-attention, which spread the map over
        positions that belong together. Raises ValueError where no step was in the window.
        """
        if not self.cross:
            raise ValueError(
                f"no step lies between timesteps {self.low_t:g} and {self.high_t:g}, "
                "where attention locates objects: raise --steps"
            )
        finest = max(self.cross)
        heat = 0
        for size, (total, count) in self.cross.items():
            m = (total / count).view(size)
            heat = heat + resize(m / m.mean(), finest, "bilinear")  # all levels count alike
        heat = heat / len(self.cross)
        if walk_iterations:
            heat = self.walk(heat, walk_iterations)
        return normalize_percentile(heat)

    def strength(self) -> float:
        """How strongly the word is attended to: its peak over uniform attention, 1/77 a token.

        The peak is the 99th percentile of the map, of the level where it is largest.
        """
        peaks = []
        for total, count in self.cross.values():
            peaks.append(torch.quantile(total / count, 0.99))
        return 77 * float(max(peaks))

    def walk(self, heat: Tensor, iterations: int) -> Tensor:
        """Multiply heat (h, w) by the self-attention matrix, at the size of that."""
        for size, (total, _) in self.self_attn.items():
            transition = total / total.sum(1, keepdim=True)  # (N, N), rows of sum 1
            p = resize(heat, size, "area").flatten()
            for _ in range(iterations):
                p = transition @ p
            heat = resize(p.view(size), heat.shape, "bilinear")
        return heat


def word_maps(
    sdxl: SDXL, prompt: str, word: str, size: Size, window: tuple[float, float] = (0.0, 1.0)
) -> AttentionMaps:
    """AttentionMaps of a word in a prompt, for images of size (H,W) in pixels."""
    f = sdxl.vae_scale_factor
    latent_size = (size[0] // f, size[1] // f)
    positions = token_positions(sdxl, prompt, word)
    return AttentionMaps(sdxl.unet, positions, latent_size, len(sdxl.schedule.alpha_bar), window)


def resize(x: Tensor, size: Size, mode: str) -> Tensor:
    """x (h, w) interpolated to size (H, W)."""
    align_corners = None if mode in ("area", "nearest") else False
    return F.interpolate(x[None, None], size, mode=mode, align_corners=align_corners)[0, 0]


def normalize_percentile(x: Tensor) -> Tensor:
    """Scale to [0,1] between the 1st and the 99th percentile, and clip."""
    low = torch.quantile(x, 0.01)
    high = torch.quantile(x, 0.99)
    scaled = (x - low) / (high - low).clamp(min=1e-8)
    return scaled.clamp(0, 1)


def box_mean(x: Tensor, radius: int) -> Tensor:
    """The mean of x (H,W) over windows of 2 · radius + 1, cut at the border.

    By cumulative sums, so that the time does not depend on the radius.
    """
    for _ in range(2):  # along the columns, then, transposed, along the rows
        index = torch.arange(len(x))
        sums = x.double().cumsum(0)
        sums = F.pad(sums, (0, 0, 1, 0))
        first = (index - radius).clamp(min=0)
        end = (index + radius + 1).clamp(max=len(x))
        means = (sums[end] - sums[first]) / (end - first)[:, None]
        x = means.to(x.dtype).T
    return x


def guided_filter(mask: Tensor, guide: Tensor, radius: int, eps: float = 1e-3) -> Tensor:
    """The mask as a locally linear function a · guide + b; both (H,W) in [0,1].

    He et al. 2010, eq. 5, 6 and 8.
    """
    mean_mask, mean_guide = box_mean(mask, radius), box_mean(guide, radius)
    covariance = box_mean(guide * mask, radius) - mean_guide * mean_mask
    variance = box_mean(guide * guide, radius) - mean_guide**2
    a = covariance / (variance + eps)
    b = mean_mask - a * mean_guide
    refined = box_mean(a, radius) * guide + box_mean(b, radius)
    return refined.clamp(0, 1)


def warn_if_weak(word: str, maps: AttentionMaps, least: float) -> None:
    """Warn where attention hardly reacts to the word, so that its mask means little."""
    strength = maps.strength()
    if strength < least:
        warnings.warn(
            f"the model hardly reacts to {word!r} (attention {strength:.1f} times uniform; words "
            f"it knows reach {least:g}): the mask may be arbitrary; use another word, or --mask",
            stacklevel=3,
        )


def to_pixels(heat: Tensor, image: Image.Image) -> Tensor:
    """A map (h, w) at the image's resolution, its edges at the image's: (H,W) in [0,1]."""
    size = image.size[::-1]
    large = resize(heat.float().cpu(), size, "bicubic").clamp(0, 1)
    grey = images.to_tensor(image).mean(1)[0] / 2 + 0.5
    return guided_filter(large, grey, radius=max(2, min(size) // 32))


def record_pass(
    sdxl: SDXL,
    x_0: Tensor,
    conditioning: Conditioning,
    positions: Sequence[int],
    noise_level: float,
    seed: int = 0,
) -> AttentionMaps:
    """The attention of one pass of the UNet over latents (1,4,h,w), noised to a share of T."""
    eps = sampling.noise(x_0.shape, [seed]).to(x_0)
    t = torch.tensor([int(noise_level * (len(sdxl.schedule.alpha_bar) - 1))])
    x_t = sdxl.schedule.add_noise(x_0, eps, t)
    maps = AttentionMaps(sdxl.unet, positions, x_0.shape[-2:])
    with maps.record():
        sdxl.unet(x_t, t.to(x_0.device), *conditioning.parts())
    maps.accumulate(int(t))
    return maps


@checked
@torch.no_grad()
def segment(
    sdxl: SDXL,
    image: ImageLike,
    word: str,
    *,
    prompt: str | None = None,
    seed: int | None = 0,
    noise_level: float | None = None,
    walk_iterations: int | None = None,
    conditioning: Conditioning | None = None,
) -> Tensor:
    """The soft mask (H,W) in [0,1] of the object that a word names in an image of any size.

    The image is noised lightly and goes through the UNet once, whose attention is recorded.
    prompt: a description of the image with the word in it; None is "a photo of a WORD".
    noise_level: how far to noise, as a share of the timesteps.
    walk_iterations: see AttentionMaps.heatmap. None is the checkpoint's default for both.
    conditioning: the prompt, where it is encoded already; at model_resolution of the image.
    """
    image = images.as_image(image)
    prompt = prompt or f"a photo of a {word}"
    positions = token_positions(sdxl, prompt, word)
    defaults = sdxl.defaults
    noise_level = defaults["noise_level"] if noise_level is None else noise_level
    walk_iterations = defaults["walk_iterations"] if walk_iterations is None else walk_iterations

    # All of the image, at a size that the model knows: slightly stretched, not cropped.
    size = model_resolution(sdxl, image.size[::-1])
    pixels = images.to_tensor(image.resize(size[::-1]))
    x_0, _ = sdxl.vae.encode(pixels.to(sdxl.device))
    conditioning = conditioning or sdxl.encode_prompt([prompt], size)

    maps = record_pass(sdxl, x_0, conditioning, positions, noise_level, resolve_seed(seed))
    warn_if_weak(word, maps, defaults["image_word_strength"])
    return to_pixels(maps.heatmap(walk_iterations), image)


def model_resolution(sdxl: SDXL, size: Size) -> Size:
    """The size (H, W) to generate at for an image of `size`.

    About the area that the checkpoint was trained at, in the aspect ratio of size, both sides
    multiples of 4 latents. A size that is as good (a generated scene's) stays.
    """
    height, width = size
    f = sdxl.vae_scale_factor
    scale = height * width / math.prod(sdxl.size)
    if 0.5 <= scale <= 1.5 and height % f == width % f == 0:
        return height, width
    cell = 4 * f
    rows = max(round(height / scale**0.5 / cell), 2)
    columns = max(round(width / scale**0.5 / cell), 2)
    return rows * cell, columns * cell


def connected_components(mask: Tensor) -> Tensor:
    """Label each 8-connected part of a bool mask (H,W), 0 outside: its largest flat index + 1."""
    numbers = torch.arange(1, mask.numel() + 1, dtype=torch.float64)
    label = numbers.view(mask.shape) * mask
    while True:  # the largest label spreads by a pixel a time, until nothing changes
        spread = F.max_pool2d(label[None], 3, 1, 1)[0] * mask
        if torch.equal(spread, label):
            return label.long()
        label = spread


def remove_specks_and_holes(mask: Tensor, min_share: float = 0.2) -> Tensor:
    """A bool mask (H,W) without holes and without parts below min_share of the largest part."""
    # Connectivity is judged on a grid of about 128 cells a side.
    scale = max(1, max(mask.shape) // 128)
    pooled = F.max_pool2d(mask[None].float(), scale, ceil_mode=True)
    coarse = pooled[0] > 0

    labels = connected_components(coarse)
    areas = torch.bincount(labels.flatten())
    areas[0] = 0
    kept = (areas >= min_share * areas.max())[labels] & coarse

    # A hole is what the border does not reach; its rim is the mask's own.
    outside = connected_components(~F.pad(kept, (1, 1, 1, 1)))
    reached = (outside == outside[0, 0])[None].float()
    enclosed = F.max_pool2d(reached, 3, 1)[0] == 0

    def enlarge(x: Tensor) -> Tensor:
        x = x.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        return x[: mask.shape[0], : mask.shape[1]]

    return (mask & enlarge(kept)) | enlarge(enclosed)


def grow(mask: Tensor, radius: int) -> Tensor:
    """A mask (H,W) of 0 and 1 grown by `radius` pixels in all directions (a square)."""
    return (box_mean(mask.double(), radius) > 0).float()


def binarize(soft: Tensor, threshold: float, dilate: float) -> Tensor:
    """A soft mask (H,W) to the region of 0 and 1 that may change.

    Thresholded, cleaned, and grown by `dilate` of the shorter side.
    Raises ValueError where nothing, or nearly everything, is inside.
    """
    mask = soft >= threshold
    if not mask.any():
        raise ValueError(
            "the mask is empty: the word was not found in the image; "
            "lower --threshold, or give --mask"
        )
    radius = round(dilate * min(mask.shape))
    region = grow(remove_specks_and_holes(mask), radius)
    if region.mean() > 0.95:
        raise ValueError("the mask covers the whole image; raise --threshold, or give --mask")
    return region
