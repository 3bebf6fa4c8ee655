"""The toy world: captioned scenes with exact masks, deterministic per seed.

python -m weights.toy.world sheet out.png      a contact sheet of scenes with their captions
python -m weights.toy.world subjects           writes weights/subjects/<instance>/00.jpg ...
python -m weights.toy.world captioned FOLDER   100 scenes in a style that no training saw, and
                                               metadata.jsonl with their captions

A scene is a background, one or two sprites that stand in it, a style and a caption. No scene of
split "train" shows what the HELD_OUT tables of objects.py name: subjects, pairs and styles.
"""

import argparse
import functools
import json
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from . import WEIGHTS
from .backgrounds import draw
from .objects import (
    BACKGROUNDS,
    CLASSES,
    COLOUR_OF,
    HELD_OUT_INSTANCES,
    HELD_OUT_PAIRS,
    HELD_OUT_STYLES,
)
from .styles import STYLES

FRESH = 2**40  # seeds from here on are for measuring: no training stream comes here
NIGHT = np.array((0.68, 0.71, 0.94), np.float32)[:, None, None]  # colours by moonlight


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # (H, W, 3) uint8
    caption: str
    objects: tuple  # of (class, instance, mask): (H, W) float32 in [0, 1], the visible alpha
    background: str
    style: str


@functools.cache
def sprite(instance):
    """The sprite cropped to its alpha, decoded once."""
    image = Image.open(WEIGHTS / "sprites" / f"{instance}.webp").convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


def posed(rng, instance, side):
    """An instance, slightly lighter or darker: (4, h, w) float32 RGBA, longer side `side`."""
    flat = sprite(instance)
    scale = side / max(flat.size)
    scaled = flat.resize([max(1, round(n * scale)) for n in flat.size], Image.LANCZOS)
    pixels = np.asarray(scaled).transpose(2, 0, 1).astype(np.float32) / 255
    pixels[:3] = np.clip(pixels[:3] * np.float32(rng.uniform(0.94, 1.04)), 0, 1)
    return pixels


def shadow(rgb, alpha, top, left, strength):
    """Darken the ground in a soft ellipse under the part of the object that touches it."""
    height, width = alpha.shape
    touching = np.flatnonzero(alpha[-max(2, height // 7) :].max(0) > 0.3)
    x, y = left + (touching[0] + touching[-1] + 1) / 2, top + height - 0.02 * height
    rx, ry = (touching[-1] - touching[0] + 1) / 2 + 0.12 * width, 0.085 * max(height, width)
    rows = slice(max(0, int(y - 3 * ry)), min(rgb.shape[1], int(y + 3 * ry)))
    cols = slice(max(0, int(x - 2.2 * rx)), min(rgb.shape[2], int(x + 2.2 * rx)))
    yy, xx = np.ogrid[rows, cols]
    r2 = ((xx + 0.5 - x) / rx) ** 2 + ((yy + 0.5 - y) / ry) ** 2
    rgb[:, rows, cols] *= 1 - strength * np.exp(-0.5 * r2 * r2).astype(np.float32)


def place(rng, size, horizon, instances):
    """Pose each instance and choose where it stands: [(instance, pixels (4, h, w), top, left)]."""
    height, width = size
    alone = len(instances) == 1
    placed = []
    for k, instance in enumerate(instances):
        share = rng.uniform(0.55, 0.75) if alone else rng.uniform(0.36, 0.48)
        pixels = posed(rng, instance, share * min(size))
        h, w = pixels.shape[1:]
        # Large objects stand low, which is near: else they would look like giants on the horizon.
        near = np.clip(0.25 + 1.4 * (share - 0.35) + rng.uniform(-0.15, 0.2), 0.05, 0.92)
        foot = min(max(horizon + near * (height - horizon), h + 1), height - 1)
        across = rng.random()
        if not alone:
            across = (k + 0.7 * across) / (len(instances) - 0.3)
        placed.append((instance, pixels, int(foot) - h, int(across * (width - w))))
    return placed


def compose(rgb, placed, night):
    """Paint the objects over rgb (3, H, W) in place, far to near, each with its shadow.

    Returns the visible alpha (H, W) of each, in order."""
    masks = [np.zeros(rgb.shape[1:], np.float32) for _ in placed]
    for k in sorted(range(len(placed)), key=lambda k: placed[k][2] + placed[k][1].shape[1]):
        _, pixels, top, left = placed[k]
        rows, cols = slice(top, top + pixels.shape[1]), slice(left, left + pixels.shape[2])
        alpha, colour = pixels[3], pixels[:3] * NIGHT if night else pixels[:3]
        shadow(rgb, alpha, top, left, 0.4 if night else 0.5)
        rgb[:, rows, cols] += alpha * (colour - rgb[:, rows, cols])
        for mask in masks:
            mask[rows, cols] *= 1 - alpha
        masks[k][rows, cols] = alpha
    return masks


def describe(rng, placed, width, background, style):
    """A caption: about half are "a photo of a {class} {background phrase}", the rest say more."""
    phrases = BACKGROUNDS[background]
    phrase = phrases[0] if rng.random() < 0.6 else phrases[rng.integers(len(phrases))]
    plain, look, spot, lead = rng.random(4)
    detailed = plain > 0.6
    nouns = []
    for k, (instance, pixels, _, left) in enumerate(placed):
        noun = instance.split("-")[0]
        if detailed and look < 0.4:
            noun = f"{COLOUR_OF.get(instance, '')} {noun}".strip()
        noun = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
        if detailed and spot < 0.4:
            middle = (left + pixels.shape[2] / 2) / width
            side = 2 * k if len(placed) == 2 else int(middle > 0.4) + int(middle > 0.6)
            noun += (" on the left", " in the middle", " on the right")[side]
        nouns.append(noun)
    start = STYLES[style][0] + " "
    if detailed and style == "photo" and lead < 0.65:  # the words of a style are never dropped
        start = "a picture of " if lead > 0.35 else ""
    comma = "," if detailed and spot < 0.4 else ""
    return f"{start}{' and '.join(nouns)}{comma} {phrase}"


def choose(rng, split, instances, background, style):
    """Fill in what was not given: instances of distinct classes, a background that is allowed for
    all of them, a style."""
    train = split == "train"
    if instances is None:
        words = [word for word in CLASSES if not (train and (word, background) in HELD_OUT_PAIRS)]
        count = 2 if rng.random() < 0.04 else 1
        instances = []
        chosen = [words[k] for k in rng.choice(len(words), count, replace=False)]
        for word in chosen:
            known = [name for name in CLASSES[word] if not train or name not in HELD_OUT_INSTANCES]
            instances.append(known[rng.integers(len(known))])
    if background is None:
        words = {name.split("-")[0] for name in instances} if train else ()
        taboo = {place for word, place in HELD_OUT_PAIRS if word in words}
        allowed = [place for place in BACKGROUNDS if place not in taboo]
        background = allowed[rng.integers(len(allowed))]
    if style is None:
        others = set(STYLES) - {"photo"} - set(HELD_OUT_STYLES if train else ())
        others = [name for name in STYLES if name in others]
        style = others[rng.integers(len(others))] if rng.random() < 0.06 else "photo"
    return instances, background, style


def scene(
    seed: int,
    split: str = "train",
    size: tuple[int, int] = (128, 128),
    *,
    instance: str | None = None,
    background: str | None = None,
    style: str | None = None,
    caption: str | None = None,
) -> Scene:
    """The scene of a seed at (height, width); same arguments, same bits.

    split "train" leaves out everything held out, "any" nothing; what is given overrides both.
    The splits share their seeds: measure on seeds that no training stream reaches.
    """
    # A stream each, so that giving one argument changes nothing else.
    choice, ground, stand, finish, words = map(
        np.random.default_rng, np.random.SeedSequence(seed).spawn(5)
    )
    instances = (instance,) if instance else None
    instances, background, style = choose(choice, split, instances, background, style)
    rgb, horizon = draw(background, ground, size)
    placed = place(stand, size, horizon, instances)
    masks = compose(rgb, placed, background == "night")
    rgb *= np.float32(finish.uniform(0.95, 1.04))
    rgb = STYLES[style][1](np.clip(rgb, 0, 1), finish)
    image = np.ascontiguousarray((rgb * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
    if caption is None:
        caption = describe(words, placed, size[1], background, style)
    shown = zip(instances, masks, strict=True)
    objects = tuple((name.split("-")[0], name, mask) for name, mask in shown)
    return Scene(image, caption, objects, background, style)


def trained(word: str) -> list[str]:
    """The instances of a class that training shows."""
    return [name for name in CLASSES[word] if name not in HELD_OUT_INSTANCES]


def plain_scenes(count: int, first_seed: int) -> Iterator[Scene]:
    """Scenes of one object that training shows, as photos, the classes in turn."""
    words = list(CLASSES)
    for k in range(count):
        known = trained(words[k % len(words)])
        instance = known[k // len(words) % len(known)]
        yield scene(first_seed + k, instance=instance, style="photo")


def subject_photos(instance: str, count: int = 5) -> list[Scene]:
    """The photos of a subject: 192 x 192, each on another background, no held-out pair."""
    word, seed = instance.split("-")[0], zlib.crc32(instance.encode())
    allowed = [name for name in BACKGROUNDS if (word, name) not in HELD_OUT_PAIRS]
    order = [allowed[k] for k in np.random.default_rng(seed).permutation(len(allowed))]
    photos = []
    for k in range(count):
        background = order[k % len(order)]
        given = {"instance": instance, "background": background, "style": "photo"}
        caption = f"a photo of a {word} {BACKGROUNDS[background][0]}"
        photos.append(scene(seed + k, "any", (192, 192), **given, caption=caption))
    return photos


def sheet(path: str, rows: int = 8, columns: int = 6) -> None:
    """A contact sheet of training scenes, enlarged twice, over their captions."""
    page = Image.new("RGB", (columns * 264, rows * 284), "white")
    for k in range(rows * columns):
        one, x, y = scene(k), 264 * (k % columns), 284 * (k // columns)
        page.paste(Image.fromarray(one.image).resize((256, 256), Image.NEAREST), (x, y))
        caption = textwrap.fill(one.caption, 42)
        ImageDraw.Draw(page).multiline_text((x, y + 257), caption, fill="black", spacing=1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    print(path)


def subjects() -> None:
    """Write the photos of each held-out instance."""
    for instance in HELD_OUT_INSTANCES:
        folder = WEIGHTS / "subjects" / instance
        folder.mkdir(parents=True, exist_ok=True)
        for k, photo in enumerate(subject_photos(instance)):
            Image.fromarray(photo.image).save(folder / f"{k:02d}.jpg", quality=92)
        print(folder)


def captioned(
    folder: Path, count: int = 100, style: str = HELD_OUT_STYLES[0], template: str | None = None
) -> Path:
    """Write scenes of 192 x 192 in a style, and metadata.jsonl as train.py --captions reads it.

    template: a caption with {} for the objects and the background; None for the world's own."""
    folder, lines = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        one, file = scene(FRESH + 2**31 + 2**25 + k, style=style, size=(192, 192)), f"{k:04d}.png"
        Image.fromarray(one.image).save(folder / file)
        nouns = " and a ".join(word for word, _, _ in one.objects)
        text = one.caption
        if template:
            text = template.format(f"{nouns} {BACKGROUNDS[one.background][0]}")
        lines.append(json.dumps({"file_name": file, "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("sheet", "subjects", "captioned"))
    parser.add_argument("path", nargs="?", help="of the sheet, or the folder of captioned scenes")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="(default: 100)")
    args = parser.parse_args(argv)
    if args.what != "subjects" and not args.path or args.count < 1:
        parser.error("sheet and captioned need a path, and --count is at least 1")
    if args.what == "captioned":
        print(captioned(args.path, args.count))
    elif args.what == "subjects":
        subjects()
    else:
        sheet(args.path)


if __name__ == "__main__":
    main()
