"""The README's first image: subjects inserted into scenes of consecutive seeds, none chosen.

python -m weights.toy.showcase --out weights/example.webp     all held-out subjects, six seeds
python -m weights.toy.showcase flower-sunflower --seeds 3     one of them
python -m weights.toy.showcase --generated weights/generated.webp
                                                   48 generated images beside 48 renders

A row is a subject: a photo, then for each seed the scene, darkened where it may not change, and
the result. The scene is the first background that no photo of the subject shows. A LoRA that is
missing is trained first, with train.py's defaults.
"""

from pathlib import Path

from PIL import Image

import alchemy
from alchemy import cli
from alchemy.extras.inspect import sheets

from . import WEIGHTS, world
from .measure import generate, new_backgrounds, phrase, run_training

TOKEN = cli.EXAMPLE_TOKEN


def train_lora(instance: str, folder: Path, weights: str) -> Path:
    """The LoRA of a subject in folder/<instance>, trained with the defaults if it is not there."""
    path = folder / instance / "lora.safetensors"
    if not path.exists():
        flags = ("--class-word", instance.split("-")[0], "--token", TOKEN, "--weights", weights)
        run_training(WEIGHTS / "subjects" / instance, path.parent, *flags)
    return path


def insertions(sdxl, instance: str, background: str, seeds: range) -> list[tuple]:
    """A row of (label, image). The LoRA of the subject is already on sdxl."""
    class_word = instance.split("-")[0]
    prompt = f"a photo of a {class_word} {background}"
    photo = Image.open(WEIGHTS / "subjects" / instance / "00.jpg").resize(sdxl.size[::-1])
    row = [(instance, photo)]
    for seed in seeds:
        try:
            made = alchemy.insert(sdxl, prompt, class_word, TOKEN, seed=seed)
            cells = sheets.outlined(made.scene, made.feathered), made.result
        except ValueError as error:  # the segmentation found no region
            print(f"{prompt}, seed {seed}: {error}")
            cells = (Image.new("RGB", sdxl.size[::-1], "white"),) * 2
        row += zip((f"seed {seed}", "result"), cells, strict=True)
    return row


def generated_beside_renders(sdxl, count: int = 48) -> list[list]:
    """Rows of four generated images of seeds 0, 1, 2, ..., and four renders of the same words."""
    words, backgrounds = list(world.CLASSES), list(world.BACKGROUNDS)
    pairs = [(words[k % 16], backgrounds[(k + k // 16) % 8]) for k in range(count)]
    prompts = [f"a photo of a {word} {phrase(background)}" for word, background in pairs]
    generated, rows = generate(sdxl, prompts, 0), []
    for start in range(0, count, 4):
        chosen = range(start, start + 4)
        row = [(f"{' '.join(pairs[k])}, seed {k}", generated[k]) for k in chosen]
        for k in chosen:
            word, background = pairs[k]
            known = world.trained(word)
            given = {"instance": known[k % len(known)], "background": background}
            scene = world.scene(world.FRESH + k, style="photo", **given)
            row.append(("render", Image.fromarray(scene.image)))
        rows.append(row)
    return rows


def main(argv=None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("subjects", nargs="*", default=world.HELD_OUT_INSTANCES)
    parser.add_argument("--background", metavar="PHRASE", help='such as "on grass"')
    parser.add_argument("--seeds", type=cli.COUNT, default=6, metavar="N", help="(default: 6)")
    parser.add_argument("--loras", type=Path, default=Path("out"), metavar="FOLDER")
    parser.add_argument("--weights", default=str(WEIGHTS / "mini"), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("out/showcase.png"), metavar="FILE")
    parser.add_argument("--generated", type=Path, metavar="FILE", help="see above; nothing else")
    args = parser.parse_args(argv)
    if args.generated:
        rows = generated_beside_renders(alchemy.load(args.weights, dtype="float32"))
        sheets.sheet(rows, least=128).save(args.generated, quality=90)
        print(args.generated)
        return
    unknown = set(args.subjects) - set(world.HELD_OUT_INSTANCES)
    if unknown:
        known = ", ".join(world.HELD_OUT_INSTANCES)
        raise ValueError(f"no subject {', '.join(sorted(unknown))}; there are {known}")
    sdxl, rows = alchemy.load(args.weights, dtype="float32"), []
    for instance in args.subjects:
        alchemy.load_lora(sdxl, train_lora(instance, args.loras, args.weights))
        background = args.background or phrase(new_backgrounds(instance)[0])
        rows.append(insertions(sdxl, instance, background, range(args.seeds)))
        sdxl.free("unet")  # and the LoRA with it
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheets.sheet(rows, least=128).save(args.out, quality=90)
    print(args.out)


if __name__ == "__main__":
    cli.run(main)
