"""Where in a picture is the thing a word names? The model's own attention tells.

Cross-attention says for each place how much it looks at the word (Tang et al. 2022, DAAM); self-attention, which places belong
together, and so spreads the word over the whole of its object (Wang et al. 2023, DiffSegmenter). At pixel size, a guided filter
(He et al. 2010) moves the mask's edge to the picture's.
"""

import math

import torch
import torch.nn.functional as F

from . import attention, images, sampling

MOST_PLACES = 2048  # self-attention is taken at the finest level of at most so many: N x N numbers (SDXL: 32 x 32 of 1024 pixels)


def positions(sdxl, prompt, word):
    """Where the word's tokens stand among the 77 of the prompt. Raises ValueError where it is not there."""
    found = sdxl.tokenizers[0].find(prompt, word)
    if not found:
        cut = sdxl.tokenizers[0].truncated_text(prompt)
        raise ValueError(
            f"the word {word!r} is not in the prompt {prompt!r}"
            + (f", of which {cut!r} is cut off" if cut else "")
        )
    return sorted({place for occurrence in found for place in occurrence})


class AttentionMaps:
    """Collects, while steps are followed, how much each place attends to the word, and to each other place.

    Only timesteps within `window` (as shares of T) count: earlier there is nothing to see yet. latent_size: (h, w).
    """

    def __init__(self, unet, places, latent_size, T=1000, window=(0.0, 1.0)):
        self.unet, self.places, self.size, self.window = (
            unet,
            places,
            latent_size,
            (window[0] * T, window[1] * T),
        )
        self.cross, self.own, self.now = {}, {}, []

    def shape(self, name):
        """(h, w) where the layer of that name stands: the latents' sides, halved and rounded up at each level down."""
        block, index = name.split(".")[:2]
        last = len(self.unet.down_blocks) - 1
        level = (
            last
            if block == "mid_block"
            else int(index)
            if block == "down_blocks"
            else last - int(index)
        )
        return tuple(-(-side // 2**level) for side in self.size)

    def see(self, name, probabilities):
        """One layer's (B, heads, N, M); of a guided batch, the last row is the conditional one."""
        p = probabilities[-1].mean(0)  # (N, M)
        table, p = (
            (self.cross, torch.stack([p[:, place] for place in self.places], 1).mean(1))
            if name.endswith("attn2")
            else (self.own, p)
        )
        self.now.append((table, self.shape(name), p))

    def watch(self):
        """All of cross-attention, but self-attention of one level: finer ones would fill the memory, coarser ones tell less."""
        shapes = {name: self.shape(name) for name in attention.attentions(self.unet)}
        own = max(
            (shape for shape in shapes.values() if math.prod(shape) <= MOST_PLACES), default=None
        )
        return attention.record_attention(
            self.unet,
            [name for name, shape in shapes.items() if name.endswith("attn2") or shape == own],
            self.see,
        )

    def take(self, t):
        """What was just seen at timestep t counts, if t lies in the window."""
        if self.window[0] <= t <= self.window[1]:
            for table, shape, p in self.now:
                total, count = table.get(shape, (0, 0))
                table[shape] = (total + p, count + 1)
        self.now = []

    def follow(self, steps):
        with self.watch():
            for step in steps:
                self.take(step.t)
                yield step

    def heat(self, power):
        """The word's map (h, w) in [0,1] at the finest level that was seen, spread `power` times by self-attention.

        Raises ValueError where no step lay in the window.
        """
        if not self.cross:
            raise ValueError(
                "no step lies between timesteps {:g} and {:g}, where attention tells: raise --steps".format(
                    *self.window
                )
            )
        finest, maps = max(self.cross), []
        for shape, (total, count) in self.cross.items():
            m = (total / count).view(1, 1, *shape)
            maps.append(F.interpolate(m / m.mean(), finest, mode="bilinear", align_corners=False))
        heat = sum(maps) / len(maps)
        for shape, (total, _) in self.own.items() if power else ():
            own, coarse = (
                total / total.sum(1, keepdim=True),
                F.interpolate(heat, shape, mode="area").flatten(),
            )  # own's rows sum to 1
            for _ in range(power):
                coarse = own @ coarse
            heat = F.interpolate(
                coarse.view(1, 1, *shape), finest, mode="bilinear", align_corners=False
            )
        return stretch(heat[0, 0])


def stretch(x):
    """To [0,1], where the lowest and highest percent are cut."""
    low, high = torch.quantile(x.flatten(), torch.tensor([0.01, 0.99], device=x.device))
    return ((x - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)


def box_mean(x, radius):
    """The mean of x (H,W) over a window of 2 · radius + 1 along both sides, cut at the border, in a time that radius has no part in."""
    for _ in range(2):  # along the columns, then along the rows
        place, above = torch.arange(len(x)), F.pad(x.double().cumsum(0), (0, 0, 1, 0))
        first, end = (place - radius).clamp(min=0), (place + radius + 1).clamp(max=len(x))
        x = ((above[end] - above[first]) / (end - first)[:, None]).to(x.dtype).T
    return x


def guided_filter(p, i, radius, eps=1e-3):
    """The mask p by the guide i, both (H,W) in [0,1]: within each window it becomes a linear function a · i + b. He et al. 2010."""
    mean_p, mean_i = box_mean(p, radius), box_mean(i, radius)
    a = (box_mean(i * p, radius) - mean_i * mean_p) / (box_mean(i * i, radius) - mean_i**2 + eps)
    b = mean_p - a * mean_i
    return (box_mean(a, radius) * i + box_mean(b, radius)).clamp(0, 1)


def to_pixels(heat, picture):
    """heat (h, w) brought to the picture's size, edges where the picture has them: (H,W) in [0,1]."""
    size = picture.size[::-1]
    heat = F.interpolate(heat[None, None].float().cpu(), size, mode="bicubic", align_corners=False)[
        0, 0
    ].clamp(0, 1)
    grey = images.to_tensor(picture).mean(1)[0] / 2 + 0.5
    return guided_filter(heat, grey, max(2, min(size) // 32))


@torch.no_grad()
def segment(sdxl, image, word, *, prompt=None, seed=0, look=None, power=None):
    """The soft mask (H,W) in [0,1] of what the word names in a PIL picture of any size: noise it lightly, look once.

    prompt: what the picture shows ("a photo of a WORD", if None); look: how far to noise, as a share of T; power: of the sharpening.
    """
    prompt = prompt or f"a photo of a {word}"
    places = positions(sdxl, prompt, word)
    look, power = (
        sdxl.defaults[key] if value is None else value
        for key, value in (("look", look), ("sharpening", power))
    )
    size = working_size(sdxl, image.size[::-1])
    looked_at = image.resize(
        size[::-1]
    )  # a little stretched, so that all of it is seen and each place stands for its own
    x_0 = sdxl.vae.encode(images.to_tensor(looked_at).to(sdxl.device))[0]
    maps = AttentionMaps(sdxl.unet, places, x_0.shape[-2:])
    t = torch.tensor([int(look * (len(sdxl.schedule.alpha_bar) - 1))])
    x_t = sdxl.schedule.add_noise(x_0, sampling.noise(x_0.shape, [seed]).to(x_0), t)
    with maps.watch():
        sdxl.unet(x_t, t.to(sdxl.device), *sdxl.encode_prompt([prompt], size).parts())
    maps.take(int(t))
    return to_pixels(maps.heat(power), image)


def working_size(sdxl, size):
    """(H,W) to draw at: of about the area the checkpoint was trained at and the aspect ratio of size, both sides multiples of 4 latents.

    A size that is as good (a scene's own) stays: nothing need be resized.
    """
    cell, share = 4 * sdxl.vae_scale_factor, size[0] * size[1] / (sdxl.size[0] * sdxl.size[1])
    if (
        0.5 <= share <= 1.5
        and size[0] % sdxl.vae_scale_factor == size[1] % sdxl.vae_scale_factor == 0
    ):
        return tuple(size)
    return tuple(max(round(side / share**0.5 / cell), 2) * cell for side in size)


def components(mask):
    """Label (H,W) of each connected part of a bool mask, 0 outside: the largest index in it, spread until nothing changes."""
    label = (torch.arange(mask.numel(), dtype=torch.float64).view(mask.shape) + 1) * mask
    while True:
        spread = F.max_pool2d(label[None], 3, 1, 1)[0] * mask
        if torch.equal(spread, label):
            return label.long()
        label = spread


def clean(mask, least=0.2):
    """A bool mask without its small parts (under `least` of the largest) and without holes."""
    scale = max(
        1, max(mask.shape) // 128
    )  # what is seen on a grid of some 128 cells is enough to judge by
    small = F.max_pool2d(mask[None, None].float(), scale, ceil_mode=True)[0, 0] > 0
    labels = components(small)
    areas = torch.bincount(labels.flatten())
    areas[0] = 0
    kept = (areas >= least * areas.max())[labels] & small
    outside = components(~F.pad(kept, (1, 1, 1, 1)))
    within = (
        F.max_pool2d((outside == outside[0, 0])[None].float(), 3, 1)[0] == 0
    )  # no neighbour is reached from the border

    def to_full(x):
        return (
            F.interpolate(x[None, None].float(), scale_factor=scale, mode="nearest")[
                0, 0, : mask.shape[0], : mask.shape[1]
            ]
            > 0
        )

    return (mask & to_full(kept)) | to_full(within)


def to_mask(soft, threshold, dilate):
    """A soft mask (H,W) to the region (H,W) of 0 and 1 where something may change: thresholded, cleaned, grown by `dilate` of the shorter side.

    Raises ValueError where nothing, or all but nothing, is left outside.
    """
    mask = soft >= threshold
    if not mask.any():
        raise ValueError(
            "the mask is empty: the word was not found in the picture; lower --threshold, or give --mask"
        )
    region = (box_mean(clean(mask).double(), round(dilate * min(mask.shape))) > 0).float()
    if region.mean() > 0.95:
        raise ValueError("the mask covers the whole picture; raise --threshold, or give --mask")
    return region
