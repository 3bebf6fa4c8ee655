"""How good the miniature is: the table of weights/README.md, by the classifier and the true masks.

python -m weights.toy.measure                               all, about 50 minutes on one core
python -m weights.toy.measure prompts pairs --share 0.2     some of it, with a fifth of the images

Scenes have one object; prompts are "a photo of a CLASS BACKGROUND". What was measured of the same
weights and defaults is kept in --out and printed too, beside sheets of all images; LoRAs that are
there are not trained again. Seeds are fixed.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import alchemy
from alchemy import cli, images, insertion, lora, sampling, segmentation
from alchemy.extras.inspect import sheets
from alchemy.extras.inspect.seam import seam
from alchemy.files import save_json

from . import WEIGHTS, classifier, world

TOKEN, SCALES, BATCH = "sks", (0.6, 0.8, 1.0), 4
NOTHING = (None, None, None)  # the classification of an image that could not be made
ROWS = (  # (row, key, what is asked); the sign says in which direction
    ("classifier on fresh renders: class", "classifier class", ">= 97%"),
    ("classifier on fresh renders: instance", "classifier instance", ">= 97%"),
    ("classifier on fresh renders: background", "classifier background", ">= 97%"),
    ("classifier on fresh renders: mean IoU of its masks", "classifier iou", ">= 0.9"),
    ("classifier on fresh renders: confident of an instance", "classifier confident", ""),
    ("VAE, PSNR on fresh renders in dB", "psnr", ">= 32"),
    ("after the VAE: class right, of the renders' rate", "vae class", ">= 98%"),
    ("after the VAE: confident of an instance, of the renders' rate", "vae confident", ">= 85%"),
    ("after the VAE: Fréchet distance over the floor", "vae distance", ""),
    ("subjects' photos after the VAE: subject right", "vae subject", ""),
    ("text to image: class right", "prompt class", ">= 95%"),
    ("text to image: background right", "prompt background", ">= 98%"),
    ("text to image: confident of an instance, of the renders' rate", "confident", ">= 70%"),
    ("text to image: Fréchet distance over the floor", "distance", "<= 2"),
    ("unseen pairs of class and background: both right", "pair both", ">= 90%"),
    ("subject learned: subject right", "subject", ">= 80%"),
    ("subject learned: background right", "subject background", ">= 85%"),
    ("class prompt after training: not the subject", "prior", ">= 94%"),
    ("class prompt after training: class right", "prior class", ">= 95%"),
    ("segmentation of the class word on fresh renders, mean IoU", "iou", ">= 0.88"),
    ("two stages: subject right", "two", ">= 85%"),
    ("two stages: background right", "two background", ""),
    ("one stage at its best scale: subject right", "one", ""),
    ("one stage at its best scale: background right", "one background", ""),
    ("two stages over one, both figures added", "more", ">= 0.1"),
    ("insertions whose seam is below 1.3", "seam", ">= 90%"),
    ("insertions without a mask, which count as wrong", "failed", ""),
    ("region that may change over the true alpha's area, median", "area", "<= 1.6"),
    ("part of the true area within that region, mean", "inside", ">= 90%"),
    ("pixels changed outside the feathered mask", "outside", "<= 0"),
)
NUMBERS = ("psnr", "iou", "classifier iou", "distance", "vae distance", "area", "more")
NOTES = ("classifier confusions", "best scale", "floor", "by class", "by background")


def share(hits: list) -> float:
    return sum(hits) / max(1, len(hits))


def phrase(background: str, kind: int = 0) -> str:
    return world.BACKGROUNDS[background][kind]


def new_backgrounds(instance: str) -> list[str]:
    """Those that no photo of the subject shows, and training showed with its class."""
    known = {photo.background for photo in world.subject_photos(instance)}
    new = [background for background in world.BACKGROUNDS if background not in known]
    word = instance.split("-")[0]
    return [background for background in new if (word, background) not in world.HELD_OUT_PAIRS]


@torch.no_grad()
def generate(sdxl, prompts: list[str], first_seed: int, **options) -> list[Image.Image]:
    """An image per prompt, of seeds first_seed, first_seed + 1, ..., in batches.

    options: sampler, steps and guidance, where they are not the defaults."""
    options = {key: sdxl.defaults[key] for key in ("sampler", "steps", "guidance")} | options
    size = [side // sdxl.vae_scale_factor for side in sdxl.size]
    generated = []
    for start in range(0, len(prompts), BATCH):
        cond = sdxl.encode_prompt(prompts[start : start + BATCH])
        count = len(prompts[start : start + BATCH])
        seeds = range(first_seed + start, first_seed + start + count)
        noise = sampling.noise((count, 4, *size), seeds).to(sdxl.device)
        uncond = sdxl.encode_prompt([None] * count)
        *_, step = sampling.denoise(sdxl, noise, cond, uncond, **options)
        generated += [images.to_image(x) for x in sdxl.vae.decode(step.x_prev)]
    return generated


def run_training(photos: Path, out: Path, *flags: str) -> None:
    """train.py on a folder of photos, without previews; what is in out already is replaced."""
    command = [sys.executable, str(WEIGHTS.parent / "train.py"), str(photos), "--out", str(out)]
    command += ["--preview-every", "0", "--overwrite", *flags]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"train.py: {run.stderr.strip()[-300:]}")


@torch.no_grad()
def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of features (N,C) and (M,C): Heusel et al. 2017, eq. 6."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * cross)


class Measure:
    """Each part fills `found` with its figures."""

    def __init__(self, out: str, share: float, weights: str):
        self.sdxl = alchemy.load(weights, dtype="float32")
        self.classifier, self.weights, self.share = classifier.load(), weights, share
        self.found, self.known = {}, {}
        files = sorted(Path(weights).rglob("*.safetensors"))
        files += [WEIGHTS.parent / "alchemy" / "defaults.py", classifier.FILE]
        content = b"".join(path.read_bytes() for path in files)
        self.out = Path(out) / f"{zlib.crc32(content):08x}"
        self.out.mkdir(parents=True, exist_ok=True)

    def figures(self, part: str) -> dict:
        """What a part finds, {figure: value}."""
        getattr(self, part)()
        return self.found

    def count(self, number: int) -> int:
        return max(1, round(number * self.share))

    def show(self, name: str, labelled: list, columns: int = 8) -> None:
        """A sheet of (label, image)."""
        starts = range(0, min(len(labelled), 10 * columns), columns)
        rows = [list(labelled[start : start + columns]) for start in starts]
        sheets.sheet(rows, least=128).save(self.out / f"{name}.png")

    def read(self, name: str, generated: list, expected: list) -> list:
        """The classification of each image, NOTHING for None, and a sheet of them.

        expected: (class, instance or None, background) of each."""
        blank = Image.new("RGB", self.sdxl.size[::-1], "white")
        shown = [image or blank for image in generated]
        found = self.classifier.name(shown)
        cells = []
        for k, image in enumerate(generated):
            found[k] = found[k] if image else NOTHING
            word, instance, background = expected[k]
            label = f"{instance or word} {background}: {found[k][1]} {found[k][2]}"
            cells.append((label, shown[k]))
        self.show(name, cells)
        return found

    def right(self, name: str, generated: list, expected: list) -> tuple[list, list, list]:
        """Whether the class, the instance and the background of each image are the expected."""
        hits = [], [], []
        for found, truth in zip(self.read(name, generated, expected), expected, strict=True):
            for k in range(3):
                hits[k].append(found[k] == truth[k])
        return hits

    @torch.no_grad()
    def features(self, generated) -> Tensor:
        """Classifier features (N,512) of images or an array (N,128,128,3)."""
        x = classifier.to_input(np.stack([np.asarray(image) for image in generated]))
        return torch.cat([self.classifier.features(part) for part in x.split(64)])

    @torch.no_grad()
    def after_vae(self, x: Tensor) -> Tensor:
        parts = [self.sdxl.vae.decode(self.sdxl.vae.encode(part)[0]) for part in x.split(16)]
        return torch.cat(parts).clamp(-1, 1)

    def of_renders(self, count: int, offset: int) -> Tensor:
        """Features of fresh renders, computed once."""
        if (count, offset) not in self.known:
            self.known[count, offset] = self.features(classifier.fresh(count, offset)[0])
        return self.known[count, offset]

    def distances(self, key: str, generated: list) -> None:
        """Fréchet distance to 1000 fresh renders, over that of as many renders: the floor."""
        reference, renders = self.of_renders(1000, 2**22), self.of_renders(len(generated), 2**23)
        self.found["floor"] = frechet(renders, reference)
        self.found[key] = frechet(self.features(generated), reference) / self.found["floor"]

    def renders(self) -> None:
        """The classifier's own errors, which bound all else, and the VAE's."""
        right, confused = classifier.accuracy(self.classifier, self.count(1580))
        self.found |= {f"classifier {head}": value for head, value in right.items()}
        pairs = [f"{a} taken for {b} {count}" for (a, b), count in confused.most_common(6)]
        self.found["classifier confusions"] = ", ".join(pairs) or "none"
        pixels, masks, truth = classifier.fresh(self.count(500), 2**20)
        x = classifier.to_input(pixels)
        with torch.no_grad():
            heads = [self.classifier.mask_logits(self.classifier.maps(p)) for p in x.split(64)]
        predicted = torch.cat(heads) > 0
        true = torch.from_numpy(masks) > 127
        union = (predicted | true).sum((1, 2)).clamp(min=1)
        self.found["classifier iou"] = float(((predicted & true).sum((1, 2)) / union).mean())

        y = self.after_vae(x)
        errors = ((y - x) / 2).square().mean((1, 2, 3))
        self.found["psnr"] = float((-10 * errors.log10()).mean())
        decoded = [images.to_image(one) for one in y]
        rates = []
        for shown in (pixels, decoded):
            names, confidence = self.classifier.classify(shown)
            hits = [name[0] == one[0] for name, one in zip(names, truth, strict=True)]
            rates.append((share(hits), float((confidence > 0.9).float().mean())))
        self.found["vae class"] = rates[1][0] / max(rates[0][0], 1e-9)
        self.found["vae confident"] = rates[1][1] / max(rates[0][1], 1e-9)
        self.found["classifier confident"] = rates[0][1]
        self.distances("vae distance", decoded)
        # What the VAE keeps of the subjects bounds all that can be learned of them.
        hits = []
        for instance in world.HELD_OUT_INSTANCES:
            photos = [Image.fromarray(photo.image) for photo in world.subject_photos(instance)]
            photos = [photo.resize(self.sdxl.size[::-1], Image.LANCZOS) for photo in photos]
            y = self.after_vae(torch.cat([images.to_tensor(photo) for photo in photos]))
            names = self.classifier.name([images.to_image(one) for one in y])
            hits += [name[1] == instance for name in names]
        self.found["vae subject"] = share(hits)

    def prompts(self, **options) -> None:
        """Of pairs that were trained on; options as those of `generate`."""
        seen = list(itertools.product(world.CLASSES, world.BACKGROUNDS))
        seen = [pair for pair in seen if pair not in world.HELD_OUT_PAIRS]
        rng = np.random.default_rng(0)
        order = np.concatenate([rng.permutation(len(seen)) for _ in range(5)])
        expected = [seen[k] for k in order[: self.count(500)]]
        prompts = [f"a photo of a {word} {phrase(background)}" for word, background in expected]
        generated = generate(self.sdxl, prompts, 1000, **options)
        labels = [(word, None, background) for word, background in expected]
        found = self.read("prompts", generated, labels)
        for k, head, names in ((0, "class", world.CLASSES), (1, "background", world.BACKGROUNDS)):
            hits = {name: [] for name in names}
            for one, pair in zip(found, expected, strict=True):
                hits[pair[k]].append(one[2 * k] == pair[k])
            self.found[f"prompt {head}"] = share(sum(hits.values(), []))
            rates = {name: round(share(rows), 2) for name, rows in hits.items() if rows}
            self.found[f"by {head}"] = rates
        _, confidence = self.classifier.classify(generated)
        _, bound = self.classifier.classify(classifier.fresh(len(generated), 2**23)[0])
        confident, bound = ((p > 0.9).float().mean() for p in (confidence, bound))
        self.found["confident"] = float(confident / bound.clamp(min=1e-9))
        self.distances("distance", generated)

    def pairs(self) -> None:
        expected = list(world.HELD_OUT_PAIRS) * self.count(8)
        prompts = [f"a photo of a {word} {phrase(background)}" for word, background in expected]
        labels = [(word, None, background) for word, background in expected]
        words, _, backgrounds = self.right("pairs", generate(self.sdxl, prompts, 3000), labels)
        self.found["pair both"] = share([all(pair) for pair in zip(words, backgrounds)])

    def train_subject(self, photos: Path, out: Path, *flags: str) -> Path:
        """The folder out with what train.py writes, on the weights that are measured."""
        if not (out / "seconds.json").exists():
            start = time.time()
            run_training(photos, out, "--weights", self.weights, *flags)
            save_json(round(time.time() - start), out / "seconds.json")
        return out

    def lora(self, instance: str) -> Path:
        """The LoRA that train.py makes with its defaults from the subject's photos."""
        photos, out = WEIGHTS / "subjects" / instance, self.out / "loras" / instance
        flags = ("--class-word", instance.split("-")[0], "--token", TOKEN)
        return self.train_subject(photos, out, *flags) / "lora.safetensors"

    def asked(self, instance: str) -> tuple[list[str], list[tuple]]:
        """Prompts for the class in places that the subject's photos do not show, and what an
        image of the subject there is: (class, instance, background)."""
        word, new = instance.split("-")[0], new_backgrounds(instance)
        prompts, expected = [], []
        for k in range(self.count(12)):
            background = new[k % len(new)]
            prompts.append(f"a photo of a {word} {phrase(background, k // len(new) % 3)}")
            expected.append((word, instance, background))
        return prompts, expected

    def subjects(self) -> None:
        """Per subject: one stage at several scales, the class prompt, two stages."""
        hits = {}
        for n, instance in enumerate(world.HELD_OUT_INSTANCES[: self.count(8)]):
            prompts, expected = self.asked(instance)
            alchemy.load_lora(self.sdxl, self.lora(instance))
            made = self.one_stage(instance, prompts, expected, 5000 + 100 * n)
            made |= self.two_stages(instance, prompts, expected, 5000 + 100 * n)
            for key, values in made.items():
                hits.setdefault(key, []).extend(values)
            self.sdxl.free("unet")  # and the LoRA with it
            print(f"{instance}: one {share(made['one 1.0']):.2f}, two {share(made['two']):.2f}")
        found = {key: share(values) for key, values in hits.items()}
        best = max(SCALES, key=lambda s: found[f"one {s}"] + found[f"one background {s}"])
        for key in ("prior", "prior class", "two", "two background", "seam"):
            self.found[key] = found[key]
        self.found["subject"] = found["one 1.0"]
        self.found["subject background"] = found["one background 1.0"]
        self.found["one"] = found[f"one {best}"]
        self.found["one background"] = found[f"one background {best}"]
        two = found["two"] + found["two background"]
        self.found["more"] = two - self.found["one"] - self.found["one background"]
        self.found["best scale"] = best
        self.found["failed"], self.found["outside"] = sum(hits["failed"]), sum(hits["outside"])

    def one_stage(
        self, instance: str, prompts: list, expected: list, seed: int, scales: tuple = SCALES
    ) -> dict:
        word, hits = expected[0][0], {}
        named = [insertion.with_token(prompt, word, TOKEN) for prompt in prompts]
        for scale in scales:
            with lora.lora_scale(self.sdxl, scale):
                generated = generate(self.sdxl, named, seed)
            _, subjects, backgrounds = self.right(f"{instance}-one-{scale}", generated, expected)
            hits |= {f"one {scale}": subjects, f"one background {scale}": backgrounds}
        generated = generate(self.sdxl, prompts, seed)
        words, subjects, _ = self.right(f"{instance}-prior", generated, expected)
        return hits | {"prior": [not hit for hit in subjects], "prior class": words}

    def two_stages(self, instance: str, prompts: list, expected: list, seed: int) -> dict:
        made, cells, changed = [], [], []
        for k, prompt in enumerate(prompts):
            try:
                one = alchemy.insert(self.sdxl, prompt, expected[0][0], TOKEN, seed=seed + k)
            except ValueError as error:  # no mask: nothing is inserted, which counts as wrong
                print(f"{prompt}, seed {seed + k}: {error}", flush=True)
                made.append(None)
                continue
            made.append(one)
            region = sheets.outlined(one.scene, one.feathered)
            cells += [("scene", one.scene), ("may change", region), ("result", one.result)]
            different = (np.asarray(one.scene) != np.asarray(one.result)).any(-1)
            changed.append(int((different & (one.feathered == 0).numpy()).sum()))
        self.show(f"{instance}-stages", cells, 9)
        results = [one and one.result for one in made]
        _, subjects, backgrounds = self.right(f"{instance}-two", results, expected)
        return {
            "two": subjects,
            "two background": backgrounds,
            "failed": [one is None for one in made],
            "seam": [seam(one) < 1.3 for one in made if one],
            "outside": changed,
        }

    def masks(self) -> None:
        """Of fresh renders of all classes: the segmentation and insert.py's region, against the
        true alpha."""
        ious, areas, insides, cells = [], [], [], []
        defaults = self.sdxl.defaults
        for scene in world.plain_scenes(self.count(96), classifier.FRESH + 2**21):
            ((word, _, alpha),) = scene.objects
            image, alpha = Image.fromarray(scene.image), torch.from_numpy(alpha) > 0.5
            soft = alchemy.segment(self.sdxl, image, word).cpu()
            mask = segmentation.remove_specks_and_holes(soft >= defaults["threshold"])
            ious.append(float((mask & alpha).sum() / (mask | alpha).sum()))
            cells += [(f"{word} {ious[-1]:.2f}", image), ("soft", sheets.grey(soft))]
            try:
                region = segmentation.binarize(soft, defaults["threshold"], defaults["dilate"]) > 0
            except ValueError:  # nothing, or all but nothing, is outside: insert.py would refuse
                areas.append(float("inf"))
                insides.append(0.0)
                continue
            areas.append(float(region.sum() / alpha.sum()))
            insides.append(float((region & alpha).sum() / alpha.sum()))
        self.show("masks", cells)
        self.found["iou"] = statistics.mean(ious)
        self.found["area"] = statistics.median(areas)
        self.found["inside"] = statistics.mean(insides)


PARTS = ("renders", "prompts", "pairs", "subjects", "masks")


def met(value: float, asked: str) -> bool:
    """Whether a figure is what is asked: ">= 97%", "<= 1.6", or nothing."""
    if not asked:
        return True
    sign, bound = asked.split()
    bound = float(bound.rstrip("%")) / (100 if "%" in bound else 1)
    return value >= bound if sign == ">=" else value <= bound


def table(found: dict) -> str:
    """Markdown of {key: figure}: what is measured and asked, what misses; then the notes."""
    lines = ["| figure | measured | at least |", "|---|---|---|"]
    for row, key, asked in ROWS:
        if key not in found:
            continue
        value = found[key]
        text = f"{value:.2f}" if key in NUMBERS else f"{value:.1%}"
        text = str(value) if isinstance(value, int) else text
        missed = "" if met(value, asked) else " (missed)"
        lines.append(f"| {row} | {text} | {asked.replace('<= ', '').replace('>= ', '')}{missed} |")
    for key in NOTES:
        note = found.get(key)
        if isinstance(note, dict):
            note = ", ".join(f"{name} {value:.0%}" for name, value in note.items())
        if note is not None:
            lines.append(f"\n{key}: {note}")
    return "\n".join(lines)


def measured(argv, description: str, kind: type, rows: list, name: str) -> tuple[Measure, dict]:
    """Measure the rows that the flags name; (the Measure, all figures of its file)."""
    parser = cli.parser(description)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(rows)} (default: all)")
    parser.add_argument("--share", type=cli.number(float, 0, 1, above=True), default=1.0)
    parser.add_argument("--out", default="out/measure", metavar="FOLDER")
    parser.add_argument("--weights", default=str(WEIGHTS / "mini"), metavar="FOLDER")
    args = parser.parse_args(argv)
    unknown = set(args.rows) - set(rows)
    if unknown:
        raise ValueError(f"no row {', '.join(unknown)}; there are {', '.join(rows)}")
    measure = kind(args.out, args.share, args.weights)
    file = measure.out / f"{name}-{args.share:g}.json"
    for row in args.rows or rows:
        start = time.time()
        found = measure.figures(row)
        print(f"{row}: {time.time() - start:.0f} s", flush=True)
        before = json.loads(file.read_text()) if file.exists() else {}  # others may measure beside
        save_json(before | found, file)
    return measure, json.loads(file.read_text())


def main(argv=None) -> None:
    measure, found = measured(argv, __doc__, Measure, PARTS, "figures")
    print(f"\n{table(found)}\n\n{measure.share:.0%} of the images; sheets in {measure.out}")


if __name__ == "__main__":
    cli.run(main)
