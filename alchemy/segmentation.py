"""Where in a picture is the thing a word names? The model's own attention tells.

Cross-attention says for each place how much it looks at the word (Tang et al. 2022, DAAM); self-attention, which places belong
together, and so spreads the word over the whole of its object (Wang et al. 2023, DiffSegmenter). At pixel size, a guided filter
(He et al. 2010) moves the mask's edge to the picture's.
"""
import torch
import torch.nn.functional as F

from . import attention, images, loop

MOST_TOKENS = 1024  # self-attention is taken at the finest level of at most 32 x 32 places: N x N numbers


def positions(sdxl, prompt, word):
    """Where the word's tokens stand among the 77 of the prompt. Raises ValueError where it is not there."""
    found = sdxl.tokenizers[0].find(prompt, word)
    if not found:
        raise ValueError(f"the word {word!r} is not in the prompt {prompt!r}")
    return sorted({place for occurrence in found for place in occurrence})


class WordMaps:
    """Collects, while steps are followed, how much each place attends to the word, and to each other place.

    Only timesteps within `window` (as shares of T) count: earlier there is nothing to see yet. latent_size: (h, w).
    """

    def __init__(self, unet, places, latent_size, T=1000, window=(0.0, 1.0)):
        self.unet, self.places, self.size, self.window = unet, places, latent_size, (window[0] * T, window[1] * T)
        self.cross, self.own, self.now = {}, {}, []

    def see(self, name, probabilities):
        """One layer's (B, heads, N, M); of a guided batch, the last row is the conditional one."""
        p = probabilities[-1].mean(0)  # (N, M)
        if name.endswith("attn2"):
            self.now.append((self.cross, p[:, self.places].mean(1)))
        elif len(p) <= MOST_TOKENS:
            self.now.append((self.own, p))

    def watch(self):
        return attention.watch(self.unet, attention.attentions(self.unet), self.see)

    def take(self, t):
        """What was just seen at timestep t counts, if t lies in the window."""
        if self.window[0] <= t <= self.window[1]:
            for table, p in self.now:  # summed by level, that is by N
                total, count = table.get(len(p), (0, 0))
                table[len(p)] = (total + p, count + 1)
        self.now = []

    def follow(self, steps):
        with self.watch():
            for step in steps:
                self.take(step.t)
                yield step

    def shape(self, count):
        """(h, w) of the level with that many places: the latents' sides, halved and rounded up."""
        h, w = self.size
        while h * w > count:
            h, w = (h + 1) // 2, (w + 1) // 2
        return h, w

    def heat(self, power):
        """The word's map (h, w) in [0,1] at the finest level that was seen, sharpened `power` times by self-attention."""
        finest = self.shape(max(self.cross))
        maps = []
        for count, (total, seen) in self.cross.items():
            m = (total / seen).view(1, 1, *self.shape(count))
            maps.append(F.interpolate(m / m.mean(), finest, mode="bilinear", align_corners=False))
        heat = sum(maps) / len(maps)
        if power and self.own:
            count = max(self.own)
            own = self.own[count][0] / self.own[count][0].sum(1, keepdim=True)  # rows sum to 1
            coarse = F.interpolate(heat, self.shape(count), mode="area").flatten()
            for _ in range(power):
                coarse = own @ coarse
            heat = F.interpolate(coarse.view(1, 1, *self.shape(count)), finest, mode="bilinear", align_corners=False)
        return stretch(heat[0, 0])


def stretch(x):
    """To [0,1], where the lowest and highest percent are cut."""
    low, high = torch.quantile(x.flatten(), torch.tensor([0.01, 0.99], device=x.device))
    return ((x - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)


def box_mean(x, radius):
    """The mean over a window of 2 · radius + 1 along both sides, fewer at the border; x (B,1,H,W)."""
    return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)


def guided_filter(mask, guide, radius, eps=1e-3):
    """mask and guide (H,W) in [0,1]: within each window the mask becomes a linear function a · guide + b. He et al. 2010, eq. 5, 6, 8."""
    p, i = mask[None, None], guide[None, None]
    mean_p, mean_i = box_mean(p, radius), box_mean(i, radius)
    a = (box_mean(i * p, radius) - mean_i * mean_p) / (box_mean(i * i, radius) - mean_i ** 2 + eps)
    b = mean_p - a * mean_i
    return (box_mean(a, radius) * i + box_mean(b, radius))[0, 0].clamp(0, 1)


def to_pixels(heat, picture):
    """heat (h, w) brought to the picture's size, edges where the picture has them: (H,W) in [0,1]."""
    size = picture.size[::-1]
    heat = F.interpolate(heat[None, None].float().cpu(), size, mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
    grey = images.to_tensor(picture).mean(1)[0] / 2 + 0.5
    return guided_filter(heat, grey, max(2, min(size) // 32))


@torch.no_grad()
def segment(sdxl, image, word, *, prompt=None, seed=0, look=None, power=None):
    """The soft mask (H,W) in [0,1] of what the word names in a PIL picture of any size: noise it lightly, look once.

    prompt: what the picture shows ("a photo of a WORD", if None); look: how far to noise, as a share of T; power: of the sharpening.
    """
    prompt = prompt or f"a photo of a {word}"
    places = positions(sdxl, prompt, word)
    look, power = (sdxl.defaults[key] if value is None else value for key, value in (("look", look), ("sharpening", power)))
    size = working_size(sdxl, image.size[::-1])
    x_0 = sdxl.vae.encode(images.to_tensor(images.cover(image, size)[0]).to(sdxl.device))[0]
    maps = WordMaps(sdxl.unet, places, x_0.shape[-2:])
    t = torch.tensor([int(look * (len(sdxl.schedule.alpha_bar) - 1))])
    x_t = sdxl.schedule.add_noise(x_0, loop.noise(x_0.shape, [seed]).to(x_0), t)
    with maps.watch():
        sdxl.unet(x_t, t.to(sdxl.device), *sdxl.encode_prompt([prompt], size).parts())
    maps.take(int(t))
    return to_pixels(maps.heat(power), image)


def working_size(sdxl, size):
    """(H,W) of about the area the checkpoint was trained at and the aspect ratio of size, both sides multiples of 4 latents."""
    cell, area = 4 * sdxl.factor, sdxl.size[0] * sdxl.size[1]
    scale = (area / (size[0] * size[1])) ** 0.5
    return tuple(max(round(side * scale / cell), 2) * cell for side in size)


def grow(mask, radius):
    """The largest within a square of 2 · radius + 1 around each pixel; the smallest where radius is negative. Outside counts as inside."""
    sign = 1 if radius > 0 else -1
    return sign * F.max_pool2d(sign * mask[None, None], 2 * abs(radius) + 1, 1, abs(radius))[0, 0] if radius else mask


def components(mask):
    """Label (H,W) of each connected part of a bool mask, 0 outside: the largest index in it, spread until nothing changes."""
    label = (torch.arange(mask.numel(), dtype=torch.float64).view(mask.shape) + 1) * mask
    while True:
        spread = grow(label, 1) * mask
        if torch.equal(spread, label):
            return label.long()
        label = spread


def clean(mask, least=0.2):
    """A bool mask without its small parts (under `least` of the largest) and without holes."""
    scale = max(1, max(mask.shape) // 128)  # what is seen on a grid of some 128 cells is enough to judge by
    small = F.max_pool2d(mask[None, None].float(), scale, ceil_mode=True)[0, 0] > 0
    labels = components(small)
    areas = torch.bincount(labels.flatten())
    areas[0] = 0
    kept = (areas >= least * areas.max())[labels] & small
    outside = components(~F.pad(kept, (1, 1, 1, 1)))
    filled = (outside != outside[0, 0])[1:-1, 1:-1]  # all that the border cannot reach

    def to_full(x):
        return F.interpolate(x[None, None].float(), scale_factor=scale, mode="nearest")[0, 0, :mask.shape[0], :mask.shape[1]] > 0

    return (mask & to_full(kept)) | to_full(filled & ~kept)


def to_mask(soft, threshold, dilate):
    """A soft mask (H,W) to the region (H,W) of 0 and 1 where something may change: thresholded, cleaned, grown by `dilate` of the shorter side.

    Raises ValueError where nothing, or all but nothing, is left outside.
    """
    mask = soft >= threshold
    if not mask.any():
        raise ValueError("the mask is empty: the word was not found in the picture; lower --threshold, or give --mask")
    region = grow(clean(mask).float(), round(dilate * min(mask.shape)))
    if region.mean() > 0.95:
        raise ValueError("the mask covers the whole picture; raise --threshold, or give --mask")
    return region
