"""The classifier: a small network that tells class, instance and place of a one-object scene; what measure.py counts with.

    python -m weights.toy.classifier train --minutes 12     train it on renders, held-out instances too, and write weights/net.safetensors
    python -m weights.toy.classifier                        its accuracy on fresh renders, with the confusions

It never sees a picture that a model drew.
"""

import collections
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from alchemy import cli

from . import world

FILE = Path(__file__).parent / "classifier.safetensors"
WORDS, PLACES = list(world.CLASSES), list(world.BACKGROUNDS)
HEADS = ("class", "instance", "place")
INSTANCES = [one for ones in world.CLASSES.values() for one in ones]
FRESH = world.FRESH + 2**31  # training stays far below


class Block(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.skip(F.avg_pool2d(x, 2)))


class Classifier(nn.Module):
    """Pictures (B,3,128,128) in [-1,1] to three tables of logits: class (B,16), instance (B,79), place (B,8)."""

    def __init__(self, widths=(32, 64, 96, 128, 192)):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.blocks = nn.Sequential(
            *(Block(a, b) for a, b in zip(widths, widths[1:], strict=False))
        )
        # The largest response finds an object anywhere, the mean sees the place around it.
        self.heads = nn.ModuleList(
            [nn.Linear(2 * widths[-1], len(names)) for names in (WORDS, INSTANCES, PLACES)]
        )

    def features(self, x):
        """(B,384): the largest and the mean response of each channel."""
        x = self.blocks(F.relu(self.stem(x)))
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], dim=1)

    def forward(self, x):
        features = self.features(x)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def name(self, pictures):
        """PIL pictures or (H,W,3) arrays to a list of (class, instance, place)."""
        x = (
            torch.stack([torch.from_numpy(np.array(p)) for p in pictures])
            .permute(0, 3, 1, 2)
            .float()
            / 127.5
            - 1
        )
        found = [logits.argmax(1).tolist() for part in x.split(64) for logits in self(part)]
        columns = [sum(found[k::3], []) for k in range(3)]
        return [(WORDS[c], INSTANCES[i], PLACES[p]) for c, i, p in zip(*columns, strict=False)]


def load(path=FILE):
    net = Classifier()
    net.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    )
    return net.eval()


def example(seed):
    """One render, of any instance in any place, in the plain style: pixels (3,H,W) uint8 and three numbers."""
    instance = INSTANCES[seed % len(INSTANCES)]
    scene = world.scene(seed, "any", instance=instance, style="photo")
    names = (
        WORDS.index(instance.split("-")[0]),
        INSTANCES.index(instance),
        PLACES.index(scene.background),
    )
    return torch.from_numpy(scene.image).permute(2, 0, 1), torch.tensor(names)


def recoloured(x, generator, turn=0.6):
    """Pictures (B,3,H,W) in [-1,1], every other with its hues turned by at most `turn` radians, and its saturation times 0.7 to 1.5."""
    angle, strength = (
        turn * (2 * torch.rand(len(x), 1, generator=generator) - 1),
        0.7 + 0.8 * torch.rand(len(x), 1, generator=generator),
    )
    grey, side = (
        torch.full((3, 3), 1 / 3),
        torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5,
    )  # a turn around the axis of greys
    mix = (
        grey
        + (strength * angle.cos())[..., None] * (torch.eye(3) - grey)
        + (strength * angle.sin())[..., None] * side
    )
    mix[torch.rand(len(x), generator=generator) >= 0.5] = torch.eye(3)
    return torch.einsum("bij,bjhw->bihw", mix.to(x), x).clamp(-1, 1)


def spoiled(x, generator):
    """What a picture may go through without being another: in other light, shifted, blurred as a VAE does, a little noise."""
    x = recoloured(x, generator)
    dy, dx = torch.randint(-8, 9, (2,), generator=generator).tolist()
    x = F.pad(x, (8, 8, 8, 8), mode="replicate")[
        :, :, 8 + dy : 8 + dy + x.shape[2], 8 + dx : 8 + dx + x.shape[3]
    ]
    lot = torch.rand((), generator=generator)
    if lot < 0.5:
        side = 64 if lot < 0.25 else 88
        x = F.interpolate(
            F.interpolate(x, side, mode="area"), x.shape[2:], mode="bicubic", align_corners=False
        )
    return x + 0.08 * torch.rand((), generator=generator) * torch.randn(
        x.shape, generator=generator
    )


def train(minutes, batch=64, peak=2e-3, most=24000):
    torch.manual_seed(0)
    net, generator, pixels, names, seed = (
        Classifier().to(memory_format=torch.channels_last),
        torch.Generator().manual_seed(0),
        [],
        [],
        0,
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=peak, weight_decay=0.02)
    start, step, mean = time.time(), 0, None
    while (spent := (time.time() - start) / (60 * minutes)) < 1:
        for _ in range(
            40 * batch if not pixels else batch // 3
        ):  # each render is used about three times
            picture, name = example(seed)
            pixels.append(picture)
            names.append(name)
            seed += 1
        pixels, names = pixels[-most:], names[-most:]
        chosen = torch.randint(len(pixels), (batch,), generator=generator).tolist()
        x = torch.stack([pixels[k] for k in chosen]).float() / 127.5 - 1
        truth = torch.stack([names[k] for k in chosen]).T
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 200, 2 * (1 - spent))
        logits = net(spoiled(x, generator).contiguous(memory_format=torch.channels_last))
        loss = sum(
            F.cross_entropy(one, t, label_smoothing=0.05)
            for one, t in zip(logits, truth, strict=False)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, mean = step + 1, loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0:
            print(
                f"step {step} loss {mean:.3f}, {seed} renders, {spent:.0%} of the time", flush=True
            )
    save_file(
        {
            k: (v.half() if v.is_floating_point() else v).contiguous()
            for k, v in net.state_dict().items()
        },
        FILE,
    )


def accuracy(net, count):
    """On fresh renders: ({head: share right}, Counter of (truth, taken for))."""
    pictures, numbers = zip(*map(example, range(FRESH, FRESH + count)), strict=False)
    truth = [
        (WORDS[word], INSTANCES[one], PLACES[place])
        for word, one, place in (n.tolist() for n in numbers)
    ]
    said = net.name([p.permute(1, 2, 0).numpy() for p in pictures])
    right = {
        head: sum(t[k] == s[k] for t, s in zip(truth, said, strict=False)) / count
        for k, head in enumerate(HEADS)
    }
    return right, collections.Counter(
        (t[k], s[k]) for t, s in zip(truth, said, strict=False) for k in range(3) if t[k] != s[k]
    )


def main(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("what", nargs="?", choices=("train", "accuracy"), default="accuracy")
    parser.add_argument(
        "--minutes", type=cli.POSITIVE, default=12, help="of training (default: 12)"
    )
    parser.add_argument(
        "--renders",
        type=cli.COUNT,
        default=1580,
        help="fresh renders to classify (default: 1580, twenty of each instance)",
    )
    args = parser.parse_args(argv)
    if args.what == "train":
        train(args.minutes)
    right, confused = accuracy(load(), args.renders)
    print(
        f"{args.renders} fresh renders: "
        + ", ".join(f"{head} {share:.1%}" for head, share in right.items())
    )
    for (truth, taken), count in confused.most_common(12):
        print(f"  {truth} taken for {taken}: {count}")


if __name__ == "__main__":
    cli.run(main)
