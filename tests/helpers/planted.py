"""A model without weights whose every answer is known: what it generates, and where it attends.

    sdxl = Planted({"dog": scene, "sks dog": subject}, where={"dog": blob})

Whatever the noise, it generates the image of the longest phrase in the prompt. Its VAE is exact for
grey images, of factor 2: a latent's four channels are the four pixels of a cell. Its attention is
what `cross_attention` and `self_attention` return; by default, the phrases of `where` are attended
to from their blobs, a mask (H,W), and the positions of one blob, or of none, to each other.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from alchemy import defaults, images
from alchemy.attention import Attention
from alchemy.lora import Adapter, LoRALinear
from alchemy.schedule import Schedule
from alchemy.sdxl import Conditioning
from alchemy.tokenizer import Tokenizer
from helpers.checkpoints import SHIPPED

FACTOR, HEADS = 2, 2


@lru_cache
def tokenizer():
    return Tokenizer.from_folder(SHIPPED / "tokenizer")


def grey(pixels):
    """(H,W) numbers 0 to 255 to an RGB image."""
    return Image.fromarray(np.asarray(pixels).astype(np.uint8)).convert("RGB")


def noise_picture(height, width, seed=0):
    """A grey image of independent pixels."""
    return grey(np.random.default_rng(seed).integers(0, 256, (height, width)))


def ellipse(height, width, centre=(0.5, 0.5), radii=(0.25, 0.25)):
    """A mask (H,W) of 0 and 1; centre and radii as shares of the sides."""
    y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
    distance = ((y[:, None] - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2
    return (distance <= 1).float()


def iou(a, b):
    return float((a & b).sum() / (a | b).sum())


def cone(mask, width):
    """feather by its definition.

    For each pixel the least of (value there + steps to it / (width + 1)) over all pixels.
    """
    y, x = np.indices(mask.shape)
    lowest = np.empty(mask.shape)
    for at in np.ndindex(mask.shape):
        steps = abs(y - at[0]) + abs(x - at[1])
        lowest[at] = (mask + steps / (width + 1)).min()
    return np.minimum(lowest * mask.max() / lowest.max(), mask)


class PlantedAttention(Attention):
    """Gives its callbacks what table(name, t, B) returns, and computes nothing."""

    def __init__(self, name, table):
        nn.Module.__init__(self)
        self.name, self.table, self.callbacks = name, table, ()

    def forward(self, t, batch):
        for callback, rows in self.callbacks:
            callback(self.table(self.name, t, batch)[rows])


class UNet(nn.Module):
    """The miniature's three levels, the finest without attention. Returns eps for a known x_0."""

    def __init__(self, table, x_0_of, schedule):
        super().__init__()
        self.x_0_of, self.schedule, self.calls = x_0_of, schedule, []

        def block(name, attends=True):
            kinds = ("attn1", "attn2") if attends else ()
            return nn.ModuleDict(
                {kind: PlantedAttention(f"{name}.{kind}", table) for kind in kinds}
            )

        down = [block("down_blocks.0", False), block("down_blocks.1"), block("down_blocks.2")]
        up = [block("up_blocks.0"), block("up_blocks.1"), block("up_blocks.2", False)]
        self.down_blocks, self.up_blocks = nn.ModuleList(down), nn.ModuleList(up)
        self.mid_block = block("mid_block")
        # A layer for an adapter, so that a test can see when it is on.
        self.adapted = LoRALinear(2, 2)
        self.adapted.lora["default"] = Adapter(torch.ones(1, 2), torch.ones(2, 1), 1)

    def forward(self, x_t, t, context, pooled, time_ids):
        t = float(torch.as_tensor(t).flatten()[0])
        call = {"t": t, "x_t": x_t, "context": context, "time_ids": time_ids}
        self.calls.append(call | {"lora": self.adapted.lora["default"].scale})
        x_0 = self.x_0_of(int(context[-1, 0, 0]), x_t[-1:])
        for module in self.modules():
            if isinstance(module, PlantedAttention):
                module(t, len(x_t))
        ab = self.schedule.alpha_bar_at(t)
        return (x_t - ab**0.5 * x_0) / (1 - ab) ** 0.5


class VAE:
    encoded = None  # the latents of the last image

    def encode(self, images):
        self.encoded = F.pixel_unshuffle(images.mean(1, keepdim=True), FACTOR)
        return self.encoded, torch.zeros_like(self.encoded)

    def decode(self, latents):
        return F.pixel_shuffle(latents, FACTOR).expand(-1, 3, -1, -1)


class Planted:
    """pictures: {phrase: PIL grey, resized to the size asked for, or None for the input image}.

    where: {phrase: mask (H,W)}, likewise. cross_attention, self_attention: functions (name, t, B)
    to probabilities (B, heads, N, M). chosen: other defaults.
    """

    vae_scale_factor, device = FACTOR, torch.device("cpu")

    def __init__(
        self,
        pictures,
        where=None,
        size=(64, 64),
        cross_attention=None,
        self_attention=None,
        **chosen,
    ):
        self.pictures, self.where, self.size = pictures, where or {}, size
        self.defaults = defaults.column("mini") | {"steps": 8, "size": size[0]} | chosen
        self.tokenizers, self.vae = (tokenizer(), tokenizer()), VAE()
        self.schedule, self.prompts = Schedule.from_config({}), []
        self.tables = {
            "attn2": cross_attention or self.attend_to_words,
            "attn1": self_attention or self.attend_within_blobs,
        }
        self.unet = UNet(self.table, self.x_0_of, self.schedule)

    def table(self, name, t, batch):
        return self.tables[name[-5:]](name, t, batch)

    def named_modules(self):
        return self.unet.named_modules(prefix="unet")

    def encode_prompt(self, prompts, size=None):
        """The first number of the context is the index of the prompt in self.prompts."""
        indices = torch.arange(len(prompts)) + len(self.prompts)
        self.prompts += prompts
        self.latent_size = tuple(side // FACTOR for side in size)
        context = indices.float().view(-1, 1, 1).expand(-1, 77, 4)
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
        return Conditioning(context, context[:, 0], time_ids.expand(len(prompts), -1))

    def x_0_of(self, index, x_t):
        """x_0 (1,4,h,w) of a prompt: the image of the longest phrase in it."""
        self.prompt, self.latent_size = self.prompts[index], tuple(x_t.shape[-2:])
        phrases = [phrase for phrase in self.pictures if phrase in self.prompt]
        picture = self.pictures[max(phrases, key=len)]
        if picture is None:
            return self.vae.encoded
        height, width = (FACTOR * side for side in x_t.shape[-2:])
        resized = picture.resize((width, height), Image.LANCZOS)
        return VAE().encode(images.to_tensor(resized))[0]

    def level(self, name):
        """(h, w) by hand: attention is at a half and a quarter of the latents' sides."""
        halve = 2 if name.startswith(("down_blocks.2", "mid", "up_blocks.0")) else 1
        h, w = self.latent_size
        for _ in range(halve):
            h, w = h // 2 + h % 2, w // 2 + w % 2
        return h, w

    def blob(self, phrase, shape):
        return F.interpolate(self.where[phrase][None, None], shape, mode="area").flatten()

    def attend_to_words(self, name, t, batch):
        """The prompt attends to each phrase from its blob, with 0.3 there and 0.1 elsewhere.

        The rest of the batch the other way round.
        """
        shape, prompt = self.level(name), self.prompt
        p = torch.zeros(batch, HEADS, shape[0] * shape[1], 77)
        for phrase in self.where:
            for positions in tokenizer().find(prompt, phrase):
                p[..., positions] = (0.1 + 0.2 * (1 - self.blob(phrase, shape)))[:, None]
                p[-1][..., positions] = (0.1 + 0.2 * self.blob(phrase, shape))[:, None]
        return p

    def attend_within_blobs(self, name, t, batch):
        shape = self.level(name)
        number_of = torch.zeros(shape[0] * shape[1])
        for number, phrase in enumerate(self.where, 1):
            number_of[self.blob(phrase, shape) > 0.5] = number
        same = (number_of[:, None] == number_of[None]).float()
        return (same / same.sum(1, keepdim=True)).expand(batch, HEADS, -1, -1)
