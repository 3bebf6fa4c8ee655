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
DIV           mean of 1 - cosine over the pairs of generated images of one prompt
PRES          mean cosine over all pairs of a class image and a photo; high is a lost class (--prior)
DIV-prior     DIV of the class images (--prior)

DINO, CLIP-I and CLIP-T are DreamBooth's (Ruiz et al. 2023, section 4.1), PRES and DIV those of its
section 4.3, with one difference: the paper's DIV is by LPIPS, whose weights are published only as a
pickle. DIV here is by DINO features, and does not compare with the paper's values.
"""

import contextlib
import csv
import io
import itertools
import math
import re
from pathlib import Path
from typing import Callable, Iterable

import torch
from PIL import Image
from torch import Tensor

from .. import cli, images
from ..files import replace, save_json
from ..formats import png
from ..formats.checkpoint import choose_device
from ..formats.text import read_text
from ..methods import captions
from ..methods.captions import find_photos
from ..methods.masks import mask_of
from .encoders import CLIP, DINO, Clip, Encoder, load_clip, load_dino
from .inspect import sheets

MEAN_COLOUR = (124, 116, 104)  # ImageNet's: 0 after DINO's normalisation
COLUMNS = ("DINO", "CLIP-I", "CLIP-T", "DINO-subject", "leakage")


# The figures.


def fidelity(generated: Tensor, photos: Tensor) -> Tensor:
    """(N,): the mean cosine of each generated image (N, D) to all photos (M, D), of length 1."""
    return (generated @ photos.T).mean(1)


def diversity(features: Tensor, prompts: list) -> float:
    """The mean of 1 - cosine over all pairs of images (N, D) that have the same prompt."""
    distances = []
    for i, j in itertools.combinations(range(len(prompts)), 2):
        if prompts[i] and prompts[i] == prompts[j]:
            distances.append(1 - float(features[i] @ features[j]))
    return mean(distances)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def subject_only(image: Image.Image, mask: Image.Image) -> Image.Image:
    """A square around the subject, which alone is kept; mask: of the image's size, mode L."""
    box = mask.getbbox()
    width, height = box[2] - box[0], box[3] - box[1]
    side = math.ceil(max(width, height) * 256 / 224)  # so that preprocessing cuts nothing off
    page = Image.new("RGB", (side, side), MEAN_COLOUR)
    corner = ((side - width) // 2, (side - height) // 2)
    page.paste(image.crop(box), corner, mask.crop(box))
    return page


def background_only(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with the subject painted over."""
    return Image.composite(Image.new("RGB", image.size, MEAN_COLOUR), image, mask)


def score(
    generated: dict[str, Image.Image],
    photos: dict[str, Image.Image],
    dino: Encoder,
    clip: Clip | None = None,
    prompts: dict[str, str] | None = None,
    masks: dict[str, Image.Image | None] | None = None,
    photo_masks: dict[str, Image.Image] | None = None,
) -> tuple[list[dict], dict]:
    """A row of figures per generated image, and their means with DIV.

    prompts and masks: by the names of the images. A figure whose input is missing is None.
    """
    prompts, names, figures = prompts or {}, list(generated), {}

    def put(column: str, chosen: list[str], values: Tensor) -> None:
        figures[column] = dict(zip(chosen, values.tolist(), strict=True))

    # The whole image.
    features = dino(generated.values())
    put("DINO", names, fidelity(features, dino(photos.values())))
    if clip:
        embeddings = clip.images(generated.values())
        put("CLIP-I", names, fidelity(embeddings, clip.images(photos.values())))
        told = [name for name in names if prompts.get(name)]
        if told:
            texts = clip.texts([prompts[name] for name in told])
            put("CLIP-T", told, (embeddings[[name in told for name in names]] * texts).sum(1))

    # Subject and background.
    masked = [name for name in names if masks and masks.get(name)]
    for column, cut in (("DINO-subject", subject_only), ("leakage", background_only)):
        if masked and photo_masks:
            ours = dino(cut(generated[name], masks[name]) for name in masked)
            theirs = dino(cut(photo, photo_masks[name]) for name, photo in photos.items())
            # A background comes from one photo, so that the most similar one tells.
            cosines = ours @ theirs.T
            put(column, masked, cosines.mean(1) if cut is subject_only else cosines.amax(1))

    rows = []
    for name in names:
        found = {column: figures.get(column, {}).get(name) for column in COLUMNS}
        rows.append({"image": name, "prompt": prompts.get(name)} | found)
    summary = {column: mean(row[column] for row in rows) for column in COLUMNS}
    return rows, summary | {"DIV": diversity(features, [prompts.get(name) for name in names])}


def validation_scores(
    encode: Callable,
    subject: list[Image.Image],
    photos: list[Image.Image],
    class_: list[Image.Image],
    base_class: list[Image.Image],
) -> dict[str, float]:
    """How a training run stands: likeness of the subject's previews to the photos, and of the class
    previews to the base model's images of the class; `score` is the mean of the two.

    encode: an Encoder, or toy_encoder() for the miniature. The subject figure rises while the
    subject is learned, the class figure falls as the class is lost: the best step has both.
    """
    likeness = float(fidelity(encode(subject), encode(photos)).mean())
    prior = float(fidelity(encode(class_), encode(base_class)).mean())
    return {"subject": likeness, "class": prior, "score": (likeness + prior) / 2}


# The command.


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
                prompts[path.name] = png.facts_of(path).get("prompt")
    word = re.compile(rf"(?<!\w){re.escape(token)}(?!\w)")
    return {name: " ".join(word.sub(" ", text).split()) for name, text in prompts.items() if text}


def find_masks(paths: list[Path], how: str, sdxl: object, word: str | None) -> dict:
    """{image name: mask, or None where nothing is found}."""
    masks = {}
    for path in cli.progress(paths, len(paths), "masks"):
        try:
            masks[path.name] = mask_of(how, path, sdxl, word)
        except ValueError as error:
            cli.say(f"no subject region: {error}")
            masks[path.name] = None
    return masks


def format_table(rows: list[dict], columns: Iterable[str]) -> str:
    """Rows as aligned text: the first column left, figures with three digits."""
    cells = [list(columns)]
    for row in rows:
        values = [row.get(column) for column in columns]
        cells.append([f"{v:.3f}" if isinstance(v, float) else str(v or "-") for v in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        figures = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *figures]))
    return "\n".join(lines)


def contact_sheet(rows: list[dict], generated: dict[str, Image.Image], columns: int = 6):
    """The images by DINO, the most alike first; at most 60 of them, spread over the whole range."""
    ordered = sorted(rows, key=lambda row: -row["DINO"])
    step = max(1, -(-len(ordered) // 60))
    cells = [
        (f"{row['DINO']:.3f} {row['image']}", generated[row["image"]]) for row in ordered[::step]
    ]
    return sheets.sheet([cells[k : k + columns] for k in range(0, len(cells), columns)], 128)


def write_csv(rows: list[dict], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace(path, lambda new: new.write_text(text.getvalue(), encoding="utf-8"))


def write_scores(rows: list[dict], summary: dict, generated: dict, folder: Path) -> list[Path]:
    """scores.csv, scores.json and scores.png in the folder."""
    paths = [folder / f"scores.{kind}" for kind in ("csv", "json", "png")]
    write_csv(rows, paths[0])
    save_json({"mean": summary, "images": rows}, paths[1])
    png.save(contact_sheet(rows, generated), paths[2], summary)
    return paths


def parser():
    p = cli.parser(__doc__)
    p.add_argument("generated", nargs="?", metavar="GENERATED", help="folder of generated images")
    p.add_argument("photos", nargs="?", metavar="PHOTOS", help="folder of photos of the subject")
    p.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt per line, in the order of the images' names (default: metadata.jsonl of the "
        "folder, or the text chunks of its PNG files)",
    )
    p.add_argument(
        "--mask",
        metavar="segment|FOLDER",
        help="also score subject and background: masks from --class-word and --weights, or from a "
        "folder, of the images' names",
    )
    p.add_argument("--photo-mask", metavar="segment|FOLDER", help="of the photos (default: --mask)")
    p.add_argument("--class-word", metavar="WORD", help="what the subject is, for --mask segment")
    p.add_argument("--token", default="sks", metavar="WORD", help="of the subject (default: sks)")
    p.add_argument("--prior", metavar="FOLDER", help="images of the class, for PRES and DIV")
    p.add_argument("--out", default="out/scores", metavar="FOLDER", help="(default: out/scores)")
    g = p.add_argument_group("benchmark")
    g.add_argument("--benchmark", metavar="FOLDER", help="train and score every subject of it")
    g.add_argument(
        "--train",
        default="",
        metavar="FLAGS",
        help="of train.py, as one text, such as '--steps 800'",
    )
    g.add_argument("--steps", type=cli.COUNT, metavar="N", help="denoising steps of its images")
    g.add_argument("--size", type=cli.size, metavar="N|WxH", help="pixels (default: checkpoint's)")
    g.add_argument("--seeds", type=cli.COUNT, default=4, metavar="N", help="(default: 4)")
    g.add_argument("--prompt-count", type=cli.COUNT, metavar="N", help="only the first N prompts")
    g = p.add_argument_group("encoders")
    g.add_argument("--dino", default=DINO, metavar="PATH|ID", help=f"(default: {DINO})")
    g.add_argument("--clip", default=CLIP, metavar="PATH|ID", help=f"(default: {CLIP})")
    cli.add_checkpoint(p)
    return p


def read_images(folder: str) -> tuple[list[Path], dict[str, Image.Image]]:
    paths, _ = find_photos(folder)
    return paths, {path.name: images.read(path) for path in paths}


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.benchmark:
        from . import benchmark

        return benchmark.run(args)
    if not args.generated or not args.photos:
        raise ValueError("two folders are needed: the generated images and the photos")
    if Path(args.out).resolve() == Path(args.generated).resolve():
        raise ValueError("--out is the folder of the generated images; name another")
    how = {"generated": args.mask, "photos": args.photo_mask or args.mask}
    if "segment" in how.values() and not args.class_word:
        raise ValueError("--mask segment needs --class-word, the word to look for")
    paths, generated = read_images(args.generated)
    photo_paths, photos = read_images(args.photos)
    prompts = find_prompts(paths, args.prompts, args.token)
    folder = cli.folder(args.out)

    # Load the encoders, and the checkpoint if it has to find the subject.
    device, _ = choose_device(args.device, args.dtype)
    dino, clip = load_dino(args.dino, device), load_clip(args.clip, device)
    masks = photo_masks = None
    if args.mask:
        sdxl = cli.load(args) if "segment" in how.values() else None
        masks = find_masks(paths, how["generated"], sdxl, args.class_word)
        photo_masks = find_masks(photo_paths, how["photos"], sdxl, args.class_word)

    # Score.
    rows, summary = score(generated, photos, dino, clip, prompts, masks, photo_masks)
    if args.prior:
        prior_paths, prior = read_images(args.prior)
        of_prompt = find_prompts(prior_paths, None, args.token)
        features = dino(prior.values())
        summary["PRES"] = float(fidelity(features, dino(photos.values())).mean())
        summary["DIV-prior"] = diversity(features, [of_prompt.get(name) for name in prior])

    # Write.
    columns = [name for name in ("image", *summary) if name == "image" or summary[name] is not None]
    print(format_table([*rows, {"image": "mean", **summary}], columns))
    cli.wrote(*write_scores(rows, summary, generated, folder))


if __name__ == "__main__":
    cli.run(main)
