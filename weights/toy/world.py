"""The toy world: captioned scenes with exact masks, deterministic per seed, that the miniature is trained on and measured with.

    python -m weights.toy.world sheet out.png        a contact sheet of scenes with their captions
    python -m weights.toy.world subjects             write weights/subjects/<instance>/00.jpg ...
    python -m weights.toy.world captioned FOLDER     write 100 scenes in a style that is new to the miniature, and metadata.jsonl with their captions

A scene is a place (backgrounds.py), one or two sprites that stand in it, a light, a style and a caption.
What the HELD_OUT tables of things.py name is in no scene of split "train": subjects to learn, pairs to combine, styles to learn.
"""

import argparse
import functools
import json
import textwrap
import zlib
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
EXAMPLE = "bear-panda"  # the README's subject; the bears in training are brown and white
LIGHTS = {
    "": (1.0, 1.0, 1.0),
    "warm": (1.1, 0.97, 0.8),
    "cool": (0.88, 0.96, 1.08),
    "dim": (0.74, 0.74, 0.77),
}
NIGHT = np.array((0.68, 0.71, 0.94), np.float32)[
    :, None, None
]  # what moonlight leaves of a sprite's colours


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # (H, W, 3) uint8
    caption: str
    objects: tuple  # of (class, instance, mask): mask (H, W) float32 in [0, 1], the alpha of the part not hidden by others
    background: str
    style: str


@functools.cache
def sprite(instance):
    """The sprite cut to its alpha, and mirrored: what a scene starts from, decoded once."""
    picture = Image.open(WEIGHTS / "sprites" / f"{instance}.webp").convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    return picture, picture.transpose(Image.FLIP_LEFT_RIGHT)


def posed(rng, instance, side):
    """An instance mirrored, tilted and scaled: its longer side is `side` pixels before the tilt. Float32 (4, h, w) in [0, 1], RGB A."""
    flat = sprite(instance)[rng.integers(2)]
    tilt = np.clip(rng.normal(0, 6), -15, 15)  # mostly upright: a house on its edge looks thrown
    scale = side / max(flat.size)
    turned = flat.rotate(
        tilt, Image.BICUBIC if scale > 0.6 else Image.BILINEAR, expand=True
    )  # shrinking hides the difference
    turned = turned.resize([max(1, round(n * scale)) for n in turned.size], Image.LANCZOS)
    turned = turned.crop(turned.getchannel("A").point(lambda a: 255 * (a > 12)).getbbox())
    pixels = np.asarray(turned).transpose(2, 0, 1).astype(np.float32) / 255
    tint = rng.uniform(0.88, 1.08) * rng.uniform(0.95, 1.05, 3)
    pixels[:3] = np.clip(pixels[:3] * tint[:, None, None].astype(np.float32), 0, 1)
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
    """Pose each instance and find where it stands: a list of (instance, share of the shorter side, pixels (4, h, w), top, left)."""
    height, width = size
    placed = []
    for k, instance in enumerate(instances):
        share = rng.uniform(0.35, 0.75) if len(instances) == 1 else rng.uniform(0.33, 0.48)
        pixels = posed(rng, instance, share * min(size))
        h, w = pixels.shape[1:]
        # large things are near, and near things stand low: without this they would look like giants on the horizon
        near = np.clip(0.25 + 1.4 * (share - 0.35) + rng.uniform(-0.2, 0.25), 0.05, 0.92)
        foot = min(max(horizon + near * (height - horizon), h + 1), height - 1)
        across = (
            rng.random()
            if len(instances) == 1
            else (k + rng.uniform(0.0, 0.7)) / (len(instances) - 0.3)
        )
        placed.append((instance, share, pixels, int(foot) - h, int(across * (width - w))))
    return placed


def compose(rgb, placed, night):
    """Paint the objects over rgb (3, H, W) in place, far to near, each with its shadow; return their visible alphas (H, W), in order."""
    masks = [np.zeros(rgb.shape[1:], np.float32) for _ in placed]
    for k in sorted(range(len(placed)), key=lambda k: placed[k][3] + placed[k][2].shape[1]):
        _, _, pixels, top, left = placed[k]
        rows, cols = slice(top, top + pixels.shape[1]), slice(left, left + pixels.shape[2])
        alpha, colour = pixels[3], pixels[:3] * NIGHT if night else pixels[:3]
        shadow(rgb, alpha, top, left, 0.4 if night else 0.5)
        rgb[:, rows, cols] += alpha * (colour - rgb[:, rows, cols])
        for mask in masks:
            mask[rows, cols] *= 1 - alpha
        masks[k][rows, cols] = alpha
    return masks


def describe(rng, placed, width, background, style, light):
    """A caption: about half are "a photo of a {class} {place phrase}", the rest add what can be seen."""
    phrases = BACKGROUNDS[background]
    phrase = phrases[0] if rng.random() < 0.6 else phrases[rng.integers(len(phrases))]
    plain, look, spot, tail, lead = rng.random(5)
    look, spot = (look, spot) if plain > 0.6 else (1, 1)
    things = []
    for k, (instance, share, pixels, _, left) in enumerate(placed):
        noun, middle = instance.split("-")[0], (left + pixels.shape[2] / 2) / width
        if look < 0.4:
            noun = f"{COLOUR_OF.get(instance, '')} {noun}".strip()
        elif look < 0.6 and not 0.45 < share < 0.65:
            noun = f"{'small' if share < 0.5 else 'big'} {noun}"
        side = 2 * k if len(placed) == 2 else int(middle > 0.4) + int(middle > 0.6)
        spot_words = (" on the left", " in the middle", " on the right")[side] if spot < 0.4 else ""
        things.append(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}{spot_words}")
    subject = " and ".join(things) or "an empty place"
    free = (
        plain > 0.6 and style == "photo" and lead < 0.65
    )  # the words of a style are never dropped
    lead = STYLES[style][0] + " " if not free else "a picture of " if lead > 0.35 else ""
    comma, shine = "," if spot < 0.4 else "", f", in {light} light" if light and tail < 0.5 else ""
    return lead + subject + comma + " " + phrase + shine


def choose(rng, split, instances, background, style):
    """Fill in what was not forced: instances of distinct classes, a place allowed for all of them, a style."""
    train = split == "train"
    if instances is None:
        words = [word for word in CLASSES if not (train and (word, background) in HELD_OUT_PAIRS)]
        words = [
            words[k] for k in rng.choice(len(words), 2 if rng.random() < 0.1 else 1, replace=False)
        ]
        ones = [
            [one for one in CLASSES[word] if not (train and one in HELD_OUT_INSTANCES)]
            for word in words
        ]
        instances = [those[rng.integers(len(those))] for those in ones]
    if background is None:
        words = [one.split("-")[0] for one in instances]
        free = [
            name
            for name in BACKGROUNDS
            if not train or all((word, name) not in HELD_OUT_PAIRS for word in words)
        ]
        background = free[rng.integers(len(free))]
    if style is None:
        others = [
            name for name in STYLES if name != "photo" and not (train and name in HELD_OUT_STYLES)
        ]
        style = others[rng.integers(len(others))] if rng.random() < 0.12 else "photo"
    return instances, background, style


def scene(
    seed,
    split="train",
    size=(128, 128),
    *,
    instance=None,
    background=None,
    style=None,
    objects=None,
    caption=None,
):
    """Draw the scene of a seed at (height, width); same arguments, same bits.

    split "train" leaves out everything held out, "any" nothing; what is given by name overrides both. `objects` is a tuple of
    instances, () for an empty place; `instance` is short for a tuple of one. The splits share their seeds: measure on seeds
    that no training stream reaches.
    """
    # a stream each, so that forcing one thing leaves the others as they were: the same place without its object, say
    choice, ground, stand, finish, words = map(
        np.random.default_rng, np.random.SeedSequence(seed).spawn(5)
    )
    instances = (instance,) if instance else objects
    instances, background, style = choose(choice, split, instances, background, style)
    rgb, horizon = draw(background, ground, size)
    placed = place(stand, size, horizon, instances)
    masks = compose(rgb, placed, background == "night")

    plain = (
        finish.random() < 0.7 or background == "night" or style != "photo"
    )  # night and sepia have a light of their own
    light = "" if plain else list(LIGHTS)[1 + finish.integers(3)]
    rgb *= (np.array(LIGHTS[light]) * finish.uniform(0.93, 1.06)).astype(np.float32)[:, None, None]
    rgb = STYLES[style][1](np.clip(rgb, 0, 1), finish)
    image = np.ascontiguousarray((rgb * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
    caption = (
        describe(words, placed, size[1], background, style, light) if caption is None else caption
    )
    return Scene(
        image,
        caption,
        tuple((one.split("-")[0], one, mask) for one, mask in zip(instances, masks, strict=False)),
        background,
        style,
    )


def subject_photos(instance, count=5):
    """The photos that a subject is learned from: 192 x 192, each in another place, none of them a held-out pair."""
    word, seed = instance.split("-")[0], zlib.crc32(instance.encode())
    free = [name for name in BACKGROUNDS if (word, name) not in HELD_OUT_PAIRS]
    order = [free[k] for k in np.random.default_rng(seed).permutation(len(free))]
    return [
        scene(
            seed + k,
            "any",
            (192, 192),
            instance=instance,
            background=order[k % len(order)],
            style="photo",
            caption=f"a photo of a {word} {BACKGROUNDS[order[k % len(order)]][0]}",
        )
        for k in range(count)
    ]


def sheet(path, rows=8, columns=6):
    """A contact sheet of training scenes, enlarged twice, over their captions."""
    page = Image.new("RGB", (columns * 264, rows * 284), "white")
    for k in range(rows * columns):
        one, x, y = scene(k), 264 * (k % columns), 284 * (k // columns)
        page.paste(Image.fromarray(one.image).resize((256, 256), Image.NEAREST), (x, y))
        ImageDraw.Draw(page).multiline_text(
            (x, y + 257), textwrap.fill(one.caption, 42), fill="black", spacing=1
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    print(path)


def subjects():
    """Write each held-out instance's photos."""
    for instance in HELD_OUT_INSTANCES:
        folder = WEIGHTS / "subjects" / instance
        folder.mkdir(parents=True, exist_ok=True)
        for k, photo in enumerate(subject_photos(instance)):
            Image.fromarray(photo.image).save(folder / f"{k:02d}.jpg", quality=92)
        print(folder)


def captioned(folder, count=100, style=HELD_OUT_STYLES[0], named=None):
    """Write scenes of 192 x 192 in a style, and metadata.jsonl as train.py --captions reads it. named: a caption with {} for what is to be
    seen and where, None for the world's own."""
    folder, lines = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        one = scene(FRESH + 2**31 + 2**25 + k, style=style, size=(192, 192))
        Image.fromarray(one.image).save(folder / f"{k:04d}.png")
        what = (
            " and a ".join(word for word, _, _ in one.objects)
            + " "
            + BACKGROUNDS[one.background][0]
        )
        lines.append(
            json.dumps(
                {"file_name": f"{k:04d}.png", "text": named.format(what) if named else one.caption}
            )
            + "\n"
        )
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=("sheet", "subjects", "captioned"))
    p.add_argument(
        "path", nargs="?", help="where to, of a sheet (a file) and of captioned scenes (a folder)"
    )
    p.add_argument(
        "--count", type=int, default=100, metavar="N", help="of captioned scenes (default: 100)"
    )
    args = p.parse_args(argv)
    if args.what != "subjects" and not args.path or args.count < 1:
        p.error("sheet and captioned need a path, and --count is at least 1")
    if args.what == "captioned":
        print(captioned(args.path, args.count))
    else:
        subjects() if args.what == "subjects" else sheet(args.path)


if __name__ == "__main__":
    main()
