"""The classifier of one-object scenes, which measure.py counts with: class, instance, mask.

python -m weights.toy.classifier train      trains it on renders and writes classifier.safetensors
python -m weights.toy.classifier            its accuracy on fresh renders, with the confusions

It is trained on sharp renders alone, of held-out instances too: no blur, no shift of hues, no
image that a model generated. What it recognises looks like a render.
"""

import collections
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alchemy import cli

from . import world
from .training import bfloat16

FILE = Path(__file__).parent / "classifier.safetensors"
WORDS, BACKGROUNDS = list(world.CLASSES), list(world.BACKGROUNDS)
INSTANCES = sum(world.CLASSES.values(), [])
HEADS = {"class": WORDS, "instance": INSTANCES, "background": BACKGROUNDS}
FRESH = world.FRESH + 2**31  # training stays far below
WIDTHS = (32, 64, 128, 192, 256)


def to_input(images) -> Tensor:
    """uint8 images (B,H,W,3), an array or a tensor, to (B,3,H,W) in [-1,1]."""
    pixels = images if torch.is_tensor(images) else torch.from_numpy(np.array(images))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class Block(nn.Module):
    """A residual block that halves the sides."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.skip(F.avg_pool2d(x, 2)))


class Classifier(nn.Module):
    """Images (B,3,128,128) in [-1,1] to logits: class (B,16), instance (B,79), background (B,8)."""

    def __init__(self, widths: tuple = WIDTHS):
        super().__init__()
        pairs = zip(widths, widths[1:], strict=False)
        self.stem = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairs))
        # The largest response finds an object anywhere, the mean sees the background.
        heads = (nn.Linear(2 * widths[-1], len(names)) for names in HEADS.values())
        self.heads = nn.ModuleList(heads)
        joined = nn.Conv2d(widths[1] + widths[3], 64, 3, padding=1)
        self.mask = nn.Sequential(joined, nn.ReLU(), nn.Conv2d(64, 1, 1))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The responses at 1/2, 1/4, 1/8, 1/16 and 1/32 of the sides."""
        maps = [F.relu(self.stem(x))]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps

    def features(self, x: Tensor) -> Tensor:
        """(B,512): the largest and the mean response of each channel of the last map."""
        return pool(self.maps(x)[-1])

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.features(x)
        return [head(features) for head in self.heads]

    def mask_logits(self, maps: list[Tensor]) -> Tensor:
        """(B,128,128): above 0 where the object is."""
        coarse = F.interpolate(maps[3], maps[1].shape[2:], mode="bilinear")
        logits = self.mask(torch.cat([maps[1], coarse], dim=1))
        return F.interpolate(logits, scale_factor=4, mode="bilinear")[:, 0]

    @torch.no_grad()
    def classify(self, images) -> tuple[list[tuple[str, str, str]], Tensor]:
        """PIL images or (H,W,3) arrays to (class, instance, background) of each, and to the
        probability (B,) of the likeliest instance."""
        logits = [[], [], []]
        for part in to_input(np.stack([np.asarray(image) for image in images])).split(64):
            for rows, head in zip(logits, self(part), strict=True):
                rows.append(head)
        logits = [torch.cat(rows) for rows in logits]
        columns = []
        for names, head in zip(HEADS.values(), logits, strict=True):
            columns.append([names[k] for k in head.argmax(1)])
        return list(zip(*columns, strict=True)), logits[1].softmax(1).amax(1)

    def name(self, images) -> list[tuple[str, str, str]]:
        """PIL images or (H,W,3) arrays to (class, instance, background) of each."""
        return self.classify(images)[0]


def pool(x: Tensor) -> Tensor:
    return torch.cat([x.amax((2, 3)), x.mean((2, 3))], dim=1)


def load(path: Path = FILE) -> Classifier:
    tensors = load_file(path)
    widths = [len(tensors["stem.bias"])]
    while f"blocks.{len(widths) - 1}.skip.bias" in tensors:
        widths.append(len(tensors[f"blocks.{len(widths) - 1}.skip.bias"]))
    network = Classifier(tuple(widths))
    network.load_state_dict(tensors)  # copies half precision into float32
    return network.eval()


def example(seed: int, split: str = "any") -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One render: pixels (128,128,3) and mask (128,128), uint8, and the index in each head.

    split "any" gives all instances in turn in the plain style, "train" the training stream."""
    instance = INSTANCES[seed % len(INSTANCES)]
    given = {} if split == "train" else {"instance": instance, "style": "photo"}
    scene = world.scene(seed, split, **given)
    word, instance, _ = scene.objects[0]
    mask = np.uint8(255 * np.clip(sum(mask for _, _, mask in scene.objects), 0, 1))
    truth = [WORDS.index(word), INSTANCES.index(instance), BACKGROUNDS.index(scene.background)]
    return scene.image, mask, truth


def train(
    path: Path, minutes: float, draw: Callable[[int], tuple], log=print, renders: int = 40000
) -> None:
    """Train on draw(0), draw(1), ... for minutes of processor time and write path."""
    examples = [draw(0)]
    torch.manual_seed(7)
    network = Classifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    spent, step, mean = 0.0, 0, None
    start = time.process_time()
    while spent < 1:
        # Each render is used a few times; new ones are drawn until there are enough.
        drawn = len(examples)
        examples += [draw(k) for k in range(drawn, min(renders, drawn + 64))]
        chosen = torch.randint(len(examples), (64,), generator=generator).tolist()
        images, masks, truth = zip(*(examples[k] for k in chosen), strict=True)
        x = to_input(np.stack(images)).contiguous(memory_format=torch.channels_last)
        with bfloat16(x.device):
            maps = network.maps(x)
            logits = [head(pool(maps[-1])) for head in network.heads]
            mask_logits = network.mask_logits(maps).float()
        alpha = torch.from_numpy(np.stack(masks)).float() / 255
        loss = 2 * F.binary_cross_entropy_with_logits(mask_logits, alpha)
        for head, column in zip(logits, torch.tensor(truth).T, strict=True):
            loss = loss + F.cross_entropy(head.float(), column, label_smoothing=0.02)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100, 1.6 * (1 - spent))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, mean = step + 1, loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        spent = (time.process_time() - start) / (60 * minutes)
        if step % 100 == 0:
            log(f"step {step} loss {mean:.3f}, {len(examples)} renders, {spent:.0%} of the time")
    tensors = {}
    for key, tensor in network.state_dict().items():
        tensors[key] = (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
    save_file(tensors, path)


def fresh(count: int, offset: int = 0) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, str]]]:
    """Fresh renders (N,128,128,3), their masks (N,128,128) and what they show."""
    images, masks, truth = [], [], []
    for k in range(count):
        image, mask, indices = example(FRESH + offset + k)
        images.append(image)
        masks.append(mask)
        pairs = zip(HEADS.values(), indices, strict=True)
        truth.append(tuple(names[index] for names, index in pairs))
    return np.stack(images), np.stack(masks), truth


def accuracy(network: Classifier, count: int) -> tuple[dict, collections.Counter]:
    """On fresh renders: {head: share right}, and how often (truth, taken for) were confused."""
    images, _, truth = fresh(count)
    names, right, confused = network.name(images), {}, collections.Counter()
    for k, head in enumerate(HEADS):
        pairs = [(t[k], n[k]) for t, n in zip(truth, names, strict=True)]
        right[head] = sum(a == b for a, b in pairs) / count
        confused.update(pair for pair in pairs if pair[0] != pair[1])
    return right, confused


def main(argv=None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("what", nargs="?", choices=("train", "accuracy"), default="accuracy")
    parser.add_argument("--minutes", type=cli.POSITIVE, default=10, help="(default: 10)")
    parser.add_argument("--renders", type=cli.COUNT, default=1580, help="fresh (default: 1580)")
    args = parser.parse_args(argv)
    if args.what == "train":
        train(FILE, args.minutes, example)
    right, confused = accuracy(load(), args.renders)
    shares = ", ".join(f"{head} {share:.1%}" for head, share in right.items())
    print(f"{args.renders} fresh renders: {shares}")
    for (truth, taken), count in confused.most_common(12):
        print(f"  {truth} taken for {taken}: {count}")


if __name__ == "__main__":
    cli.run(main)
