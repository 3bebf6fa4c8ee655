"""A model without weights whose every answer is known: what it draws, and where its attention lies.

    sdxl = Planted({"dog": scene, "sks dog": subject}, where={"dog": blob})

It draws, whatever the noise, the picture of the longest phrase in the prompt. Its VAE is exact for grey pictures of factor 2: a
latent's four channels are the four pixels of a cell. Its attention is what `cross` and `own` return; by default the phrases of
`where` are looked at from their blobs, a mask (H,W), and the places of one blob, or of none, look at each other.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from alchemy import defaults
from alchemy.attention import Attention
from alchemy.lora import Adapter, LoRALinear
from alchemy.schedule import Schedule
from alchemy.sdxl import Conditioning
from alchemy.tokenizer import Tokenizer

FACTOR, HEADS = 2, 2


@lru_cache
def tokenizer():
    return Tokenizer.from_folder(
        Path(__file__).resolve().parents[2] / "weights" / "mini" / "tokenizer"
    )


def grey(pixels):
    """(H,W) numbers 0 to 255 to an RGB picture."""
    return Image.fromarray(np.asarray(pixels).astype(np.uint8)).convert("RGB")


def noise_picture(height, width, seed=0):
    """A grey picture without two equal neighbours worth speaking of."""
    return grey(np.random.default_rng(seed).integers(0, 256, (height, width)))


def ellipse(height, width, centre=(0.5, 0.5), radii=(0.25, 0.25)):
    """A mask (H,W) of 0 and 1; centre and radii as shares of the sides."""
    y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
    return (
        ((y[:, None] - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1
    ).float()


def iou(a, b):
    return float((a & b).sum() / (a | b).sum())


def cone(mask, width):
    """feather by its definition: for each pixel the least of (value there + steps to it / (width + 1)) over all pixels."""
    y, x = np.indices(mask.shape)
    lowest = np.empty(mask.shape)
    for at in np.ndindex(mask.shape):
        lowest[at] = (mask + (abs(y - at[0]) + abs(x - at[1])) / (width + 1)).min()
    return np.minimum(lowest * mask.max() / lowest.max(), mask)


class PlantedAttention(Attention):
    """Shows whoever watches it what table(name, t, B) returns, and computes nothing."""

    def __init__(self, name, table):
        nn.Module.__init__(self)
        self.name, self.table, self.callbacks = name, table, ()

    def forward(self, t, batch):
        for callback, rows in self.callbacks:
            callback(self.table(self.name, t, batch)[rows])


class UNet(nn.Module):
    """Three levels as the miniature's: no attention at the finest, down, middle and up at the others. Returns eps for a known x_0."""

    def __init__(self, table, draw, schedule):
        super().__init__()
        self.draw, self.schedule, self.calls = draw, schedule, []

        def block(name, attends=True):
            return nn.ModuleDict(
                {
                    kind: PlantedAttention(f"{name}.{kind}", table)
                    for kind in ("attn1", "attn2")
                    if attends
                }
            )

        self.down_blocks = nn.ModuleList(
            [block("down_blocks.0", False), block("down_blocks.1"), block("down_blocks.2")]
        )
        self.mid_block = block("mid_block")
        self.up_blocks = nn.ModuleList(
            [block("up_blocks.0"), block("up_blocks.1"), block("up_blocks.2", False)]
        )
        self.taught = LoRALinear(
            2, 2
        )  # a place for an adapter, so that a test can see when it is on
        self.taught.lora["default"] = Adapter(torch.ones(1, 2), torch.ones(2, 1), 1)

    def forward(self, x_t, t, context, pooled, time_ids):
        t = float(torch.as_tensor(t).flatten()[0])
        self.calls.append(
            dict(
                t=t,
                x_t=x_t,
                context=context,
                time_ids=time_ids,
                lora=self.taught.lora["default"].scale,
            )
        )
        x_0 = self.draw(int(context[-1, 0, 0]), x_t[-1:])
        for module in self.modules():
            if isinstance(module, PlantedAttention):
                module(t, len(x_t))
        ab = self.schedule.alpha_bar_at(t)
        return (x_t - ab**0.5 * x_0) / (1 - ab) ** 0.5


class VAE:
    seen = None  # the latents of what was last encoded

    def encode(self, images):
        self.seen = F.pixel_unshuffle(images.mean(1, keepdim=True), FACTOR)
        return self.seen, torch.zeros_like(self.seen)

    def decode(self, latents):
        return F.pixel_shuffle(latents, FACTOR).expand(-1, 3, -1, -1)


class Planted:
    """pictures: {phrase: PIL grey, brought to the size asked for, or None for the picture it is given}. where: {phrase: mask (H,W)},
    likewise. cross, own: functions (name, t, batch) to probabilities (B, heads, N, M). chosen: other defaults."""

    vae_scale_factor, device = FACTOR, torch.device("cpu")

    def __init__(self, pictures, where=None, size=(64, 64), cross=None, own=None, **chosen):
        self.pictures, self.where, self.size = pictures, where or {}, size
        self.defaults = defaults.column("mini") | {"steps": 8, "size": size[0]} | chosen
        self.tokenizers, self.vae, self.schedule, self.prompts = (
            (tokenizer(), tokenizer()),
            VAE(),
            Schedule.from_config({}),
            [],
        )
        self.tables = {
            "attn2": cross or self.look_at_words,
            "attn1": own or self.look_at_each_other,
        }
        self.unet = UNet(
            lambda name, t, batch: self.tables[name[-5:]](name, t, batch), self.drawn, self.schedule
        )

    def named_modules(self):
        return self.unet.named_modules(prefix="unet")

    def encode_prompt(self, prompts, size=None):
        """The conditioning holds which of self.prompts it is, in its first number."""
        indices = torch.arange(len(prompts)) + len(self.prompts)
        self.prompts += prompts
        self.latent_size = tuple(side // FACTOR for side in size)
        context = indices.float().view(-1, 1, 1).expand(-1, 77, 4)
        return Conditioning(
            context,
            context[:, 0],
            torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).expand(len(prompts), -1),
        )

    def drawn(self, index, x_t):
        """x_0 (1,4,h,w) of the prompt: the picture of the longest phrase in it."""
        self.prompt, self.latent_size = self.prompts[index], tuple(x_t.shape[-2:])
        picture = self.pictures[max((p for p in self.pictures if p in self.prompt), key=len)]
        size = tuple(FACTOR * side for side in x_t.shape[-2:])
        if picture is None:
            return self.vae.seen
        return VAE().encode(
            torch.from_numpy(np.array(picture.resize(size[::-1], Image.LANCZOS)))
            .permute(2, 0, 1)[None]
            .float()
            / 127.5
            - 1
        )[0]

    def level(self, name):
        """(h, w) by hand: attention is at a half and a quarter of the latents' sides."""
        halve = 2 if name.startswith(("down_blocks.2", "mid", "up_blocks.0")) else 1
        h, w = self.latent_size
        for _ in range(halve):
            h, w = h // 2 + h % 2, w // 2 + w % 2
        return h, w

    def blob(self, phrase, shape):
        return F.interpolate(self.where[phrase][None, None], shape, mode="area").flatten()

    def look_at_words(self, name, t, batch):
        """The prompt's row looks at each phrase from its blob, with 0.3 there and 0.1 elsewhere; the other row the other way round."""
        shape, prompt = self.level(name), self.prompt
        p = torch.zeros(batch, HEADS, shape[0] * shape[1], 77)
        for phrase in self.where:
            for places in tokenizer().find(prompt, phrase):
                p[..., places] = (0.1 + 0.2 * (1 - self.blob(phrase, shape)))[:, None]
                p[-1][..., places] = (0.1 + 0.2 * self.blob(phrase, shape))[:, None]
        return p

    def look_at_each_other(self, name, t, batch):
        shape = self.level(name)
        thing = torch.zeros(shape[0] * shape[1])
        for number, phrase in enumerate(self.where, 1):
            thing[self.blob(phrase, shape) > 0.5] = number
        same = (thing[:, None] == thing[None]).float()
        return (same / same.sum(1, keepdim=True)).expand(batch, HEADS, -1, -1)
