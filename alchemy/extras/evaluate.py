"""How like the photos are the generated images? The figures of the papers, from one command.

python -m alchemy.extras.evaluate out/samples photos/ --out out/scores
python -m alchemy.extras.evaluate out/samples photos/ --class-word dog --mask segment --weights ID
python -m alchemy.extras.evaluate out/samples photos/ --prior out/class-samples
python -m alchemy.extras.evaluate --benchmark dreambooth/dataset --out out/benchmark

DINO          mean cosine over all pairs of a generated image and a photo (DINO ViT-S/16, CLS)
CLIP-I        the same with the image embeddings of CLIP ViT-B/32
CLIP-T        mean cosine of an image's and its prompt's CLIP embeddings; --token is left out
DINO-subject  DINO of the subject's region alone, on the mean colour (--mask)
leakage       DINO of the backgrounds, the subject painted over; of the photos, the most similar
              one counts (--mask)
DIV           mean of 1 - cosine of DINO features over the pairs of images of one prompt
PRES          mean cosine of all class images and photos; high where the class is lost (--prior)
DIV-prior     DIV of the class images (--prior)

DINO, CLIP-I and CLIP-T are DreamBooth's (Ruiz et al. 2023, section 4.1), PRES and DIV those of its
section 4.3, with one difference: the paper's DIV is by LPIPS, a network that is not implemented
here. DIV is by DINO features instead: higher is more diverse, as in the paper, but the values do
not compare with the paper's.
"""

import argparse
import contextlib
import csv
import io
import math
import re
from collections.abc import Iterable
from itertools import combinations, starmap
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from .. import cli, images
from ..files import replace, save_json
from ..formats import png
from ..formats.checkpoint import choose_device
from ..formats.text import read_text
from ..methods import captions
from ..methods.captions import find_photos
from ..methods.masks import mask_of
from ..sdxl import SDXL
from .encoders import CLIP, DINO, Clip, Encoder, load_clip, load_dino
from .inspect import sheets

MEAN_COLOUR = (124, 116, 104)  # ImageNet's: 0 after DINO's normalisation
COLUMNS = ("DINO", "CLIP-I", "CLIP-T", "DINO-subject", "leakage")
# Flags of one of the two kinds of run alone: the benchmark, and two folders.
BENCHMARK_FLAGS = ("train", "steps", "size", "seeds")
FOLDER_FLAGS = ("generated", "photos", "prompts", "mask", "photo_mask", "class_word", "prior")


# The figures.


def fidelity(generated: Tensor, photos: Tensor) -> Tensor:
    """(N,): the mean cosine of each generated image (N, D) to all photos (M, D), of length 1."""
    return (generated @ photos.T).mean(1)


def diversity(features: Tensor, prompts: list[str | None]) -> float | None:
    """The mean of 1 - cosine over all pairs of images (N, D) that have the same prompt."""
    distances = []
    for i, j in combinations(range(len(prompts)), 2):
        if prompts[i] and prompts[i] == prompts[j]:
            distances.append(1 - float(features[i] @ features[j]))
    return mean(distances)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None, to 6 digits, or None."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 6) if known else None


def subject_only(image: Image.Image, mask: Image.Image) -> Image.Image:
    """A square around the subject, which alone is kept; mask: of the image's size, mode L."""
    box = mask.getbbox()
    left, top, right, bottom = box
    width = right - left
    height = bottom - top
    side = math.ceil(max(width, height) * 256 / 224)  # so that preprocessing cuts nothing off
    page = Image.new("RGB", (side, side), MEAN_COLOUR)
    corner = ((side - width) // 2, (side - height) // 2)
    page.paste(image.crop(box), corner, mask.crop(box))
    return page


def background_only(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with the subject painted over."""
    plain = Image.new("RGB", image.size, MEAN_COLOUR)
    return Image.composite(plain, image, mask)


def score(
    paths: list[Path],
    photos: list[Path],
    dino: Encoder,
    clip: Clip | None = None,
    prompts: dict[str, str] | None = None,
    masks: dict[str, Image.Image] | None = None,
    photo_masks: dict[str, Image.Image] | None = None,
) -> tuple[list[dict], dict]:
    """A row of figures per generated image, and their means with DIV.

    prompts and masks: by the names of the images. A figure whose input is missing is None.
    """
    rows = []
    for path in paths:
        row = {"image": path.name, "prompt": (prompts or {}).get(path.name)}
        rows.append(row | dict.fromkeys(COLUMNS))

    def fill(column: str, chosen: list[int], values: Tensor) -> None:
        for k, value in zip(chosen, values.tolist(), strict=True):
            rows[k][column] = round(value, 6)

    # The whole image.
    everything = list(range(len(paths)))
    features = dino(map(images.read, paths))
    photo_features = dino(map(images.read, photos))
    fill("DINO", everything, fidelity(features, photo_features))
    if clip:
        embeddings = clip.images(map(images.read, paths))
        photo_embeddings = clip.images(map(images.read, photos))
        fill("CLIP-I", everything, fidelity(embeddings, photo_embeddings))
        chosen = [k for k in everything if rows[k]["prompt"]]
        if chosen:
            texts = clip.texts([rows[k]["prompt"] for k in chosen])
            fill("CLIP-T", chosen, (embeddings[chosen] * texts).sum(1))

    # Subject and background. A background is copied from one photo: the most similar one counts.
    chosen = [k for k in everything if masks and paths[k].name in masks]
    known = [photo for photo in photos if photo_masks and photo.name in photo_masks]
    if chosen and known:
        masked = [(images.read(paths[k]), masks[paths[k].name]) for k in chosen]
        photos_masked = [(images.read(photo), photo_masks[photo.name]) for photo in known]
        ours = dino(starmap(subject_only, masked))
        theirs = dino(starmap(subject_only, photos_masked))
        fill("DINO-subject", chosen, fidelity(ours, theirs))
        ours = dino(starmap(background_only, masked))
        theirs = dino(starmap(background_only, photos_masked))
        fill("leakage", chosen, (ours @ theirs.T).amax(1))

    summary = {}
    for column in COLUMNS:
        summary[column] = mean(row[column] for row in rows)
    return rows, summary | {"DIV": diversity(features, [row["prompt"] for row in rows])}


# The command.


def generated_images(folder: str) -> list[Path]:
    """The images of a folder; of one that insert.py wrote, the result alone."""
    paths, _ = find_photos(folder)
    names = {path.name for path in paths}
    if {"result.png", "scene.png", "feathered.png"} <= names:
        cli.log(f"{folder}: written by insert.py; only result.png is scored")
        return [path for path in paths if path.name == "result.png"]
    return paths


def find_prompts(paths: list[Path], file: str | None, token: str) -> dict[str, str]:
    """{image name: prompt without the token}: of the file, a line per image in the order of the
    names; else of the folder's metadata.jsonl; else of the PNG files written by this package."""
    listed = paths[0].parent / "metadata.jsonl"
    prompts = {}
    if file:
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
        if len(lines) != len(paths):
            raise ValueError(f"{file}: {len(lines)} prompts for {len(paths)} images; one line each")
        prompts = {path.name: line for path, line in zip(paths, lines, strict=True)}
    elif listed.exists():
        prompts = {path.name: text for path, text in captions.read(listed.parent)}
    else:
        for path in paths:
            with contextlib.suppress(ValueError):
                prompts[path.name] = png.read_metadata(path).get("prompt")
    word = re.compile(rf"(?<!\w){re.escape(token)}(?!\w)")
    return {name: " ".join(word.sub(" ", text).split()) for name, text in prompts.items() if text}


def find_masks(
    paths: list[Path], how: str, sdxl: SDXL | None, word: str | None
) -> dict[str, Image.Image]:
    """{image name: mask} of the images in which there is a subject."""
    masks = {}
    for path in cli.progress(paths, len(paths), "masks"):
        try:
            masks[path.name] = mask_of(how, path, sdxl, word)
        except ValueError as error:
            cli.log(f"left out of DINO-subject and leakage: {error}")
    return masks


def shown(value: object) -> str:
    """A cell of a table."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)


def format_table(rows: list[dict], columns: Iterable[str]) -> str:
    """Rows as aligned text: words on the left, figures with three digits on the right."""
    padded = []
    for column in columns:
        values = [row.get(column) for row in rows]
        cells = [column, *map(shown, values)]
        width = max(map(len, cells))
        is_text = any(isinstance(value, str) for value in values)
        pad = str.ljust if is_text else str.rjust
        padded.append([pad(cell, width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True))


def write_scores(
    rows: list[dict], summary: dict, paths: list[Path], photos: list[Path], out: Path, about: dict
) -> list[Path]:
    """Write scores.csv and .json, means included, and scores.png; returns the paths.

    about: the settings, for the JSON file. The sheet shows some photos, then at most 60 images,
    the most alike by DINO first.
    """
    written = [out / f"scores.{kind}" for kind in ("csv", "json", "png")]
    text = io.StringIO()
    table = csv.DictWriter(text, ["image", "prompt", *summary], lineterminator="\n")
    table.writeheader()
    table.writerows([*rows, {"image": "mean"} | summary])
    replace(written[0], lambda new: new.write_text(text.getvalue(), encoding="utf-8"))
    save_json({"settings": about, "mean": summary, "images": rows}, written[1])

    ordered = sorted(zip(rows, paths, strict=True), key=lambda pair: -pair[0]["DINO"])
    cells = []
    stride = math.ceil(len(ordered) / 60)
    for row, path in ordered[::stride]:
        cells.append((f"{row['DINO']:.3f} {path.name}", thumbnail(path)))
    grid = [[(f"photo {path.name}", thumbnail(path)) for path in photos[:6]]]
    grid += [cells[k : k + 6] for k in range(0, len(cells), 6)]
    png.save(sheets.sheet(grid, least=128), written[2], summary)
    return written


def thumbnail(path: Path) -> Image.Image:
    return ImageOps.contain(images.read(path), (256, 256))


def parser() -> cli.Parser:
    p = cli.parser(__doc__)
    p.prog = "python -m alchemy.extras.evaluate"
    add = p.add_argument
    add("generated", nargs="?", metavar="GENERATED", help="folder of generated images")
    add("photos", nargs="?", metavar="PHOTOS", help="folder of photos of the subject")
    text = "a prompt per line, in the order of the images' names (default: metadata.jsonl of the "
    text += "folder, or the text chunks of its PNG files)"
    add("--prompts", metavar="FILE", help=text)
    text = "also score subject and background: masks from --class-word and --weights, from the "
    text += "alpha channel, or from a folder, of the images' names"
    add("--mask", metavar="segment|alpha|FOLDER", help=text)
    add("--photo-mask", metavar="segment|alpha|FOLDER", help="of the photos (default: --mask)")
    add("--class-word", metavar="WORD", help="what the subject is, for --mask segment")
    add("--token", default="sks", metavar="WORD", help="of the subject (default: sks)")
    add("--prior", metavar="FOLDER", help="images of the class, for PRES and DIV")
    add("--out", default="out/scores", metavar="FOLDER", help="(default: out/scores)")
    add("--overwrite", action="store_true", help="replace the scores in --out")
    add = p.add_argument_group("benchmark").add_argument
    add("--benchmark", metavar="FOLDER", help="train and score every subject of it")
    text = "of train.py, as one text, such as '--steps 800'"
    add("--train", default="", metavar="FLAGS", help=text)
    add("--steps", type=cli.COUNT, metavar="N", help="denoising steps of its images")
    add("--size", type=cli.size, metavar="N|WxH", help="pixels (default: checkpoint's)")
    add("--seeds", type=cli.COUNT, default=4, metavar="N", help="per prompt (default: 4)")
    add = p.add_argument_group("encoders").add_argument
    add("--dino", default=DINO, metavar="PATH|ID", help=f"(default: {DINO})")
    add("--clip", default=CLIP, metavar="PATH|ID", help=f"(default: {CLIP})")
    cli.add_checkpoint(p)
    return p


def check_flags(args: argparse.Namespace, p: cli.Parser) -> None:
    """Raise ValueError for flags that do not apply, or that others need."""
    for name in FOLDER_FLAGS if args.benchmark else BENCHMARK_FLAGS:
        if getattr(args, name) != p.get_default(name):
            flag = name.upper() if name in FOLDER_FLAGS[:2] else f"--{name.replace('_', '-')}"
            reason = "has no effect with" if args.benchmark else "goes with"
            raise ValueError(f"{flag} {reason} --benchmark")
    if args.benchmark:
        return
    if not args.generated or not args.photos:
        raise ValueError("two folders are needed: the generated images and the photos")
    for name in ("generated", "photos", "prior", "mask", "photo_mask"):
        folder = getattr(args, name)
        if folder and Path(args.out).resolve() == Path(folder).resolve():
            raise ValueError(f"--out is the folder {folder}, which is read; name another")
    if args.photo_mask and not args.mask:
        raise ValueError("--photo-mask goes with --mask")
    for name in ("mask", "photo_mask"):
        folder = getattr(args, name)
        if folder not in (None, "segment", "alpha") and not Path(folder).is_dir():
            raise ValueError(f"--{name.replace('_', '-')} {folder}: no such folder")
    if "segment" in (args.mask, args.photo_mask) and not args.class_word:
        raise ValueError("--mask segment needs --class-word, the word to look for")


def score_folders(
    args: argparse.Namespace, paths: list[Path], photos: list[Path], prompts: dict[str, str]
) -> tuple[list[dict], dict]:
    """What `score` returns, with masks from the flags, and PRES and DIV-prior of --prior."""
    # Load the encoders, and the checkpoint if it has to find the subject.
    device, _ = choose_device(args.device, args.dtype)
    dino, clip = load_dino(args.dino, device), load_clip(args.clip, device)
    masks = photo_masks = None
    if args.mask:
        photo_mask = args.photo_mask or args.mask
        sdxl = cli.load(args) if "segment" in (args.mask, photo_mask) else None
        masks = find_masks(paths, args.mask, sdxl, args.class_word)
        photo_masks = find_masks(photos, photo_mask, sdxl, args.class_word)

    rows, summary = score(paths, photos, dino, clip, prompts, masks, photo_masks)
    if args.prior:
        prior, _ = find_photos(args.prior)
        prior_prompts = find_prompts(prior, None, args.token)
        features = dino(map(images.read, prior))
        summary["PRES"] = mean(fidelity(features, dino(map(images.read, photos))).tolist())
        summary["DIV-prior"] = diversity(features, [prior_prompts.get(path.name) for path in prior])
    return rows, summary


def main(argv: list[str] | None = None) -> None:
    p = parser()
    args = cli.parse(p, argv)
    check_flags(args, p)
    if args.benchmark:
        from . import benchmark

        return benchmark.run(args)
    if (Path(args.out) / "scores.csv").exists() and not args.overwrite:
        raise ValueError(f"{args.out} holds scores; name another --out, or --overwrite them")
    paths = generated_images(args.generated)
    photos, _ = find_photos(args.photos)
    prompts = find_prompts(paths, args.prompts, args.token)
    if not prompts:
        cli.log("no prompt is known, so CLIP-T and DIV are left out; --prompts FILE gives them")
    with cli.output_folder(args.out) as out:
        rows, summary = score_folders(args, paths, photos, prompts)
        columns = [name for name in summary if summary[name] is not None]
        print(format_table([*rows, {"image": "mean", **summary}], ["image", *columns]))
        cli.log_written(*write_scores(rows, summary, paths, photos, out, cli.settings(args)))


if __name__ == "__main__":
    cli.run(main)
