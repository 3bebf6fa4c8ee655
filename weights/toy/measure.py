"""How good is the miniature? Counted by the classifier and the true masks, on fixed seeds: the table of weights/README.md.

    python -m weights.toy.measure                                  everything, about 40 minutes on one core
    python -m weights.toy.measure prompts pairs --share 0.2        some of it, on a fifth of the pictures

The scenes asked for have one object, the prompts are "a photo of a CLASS PLACE". What was measured of the same weights and defaults is
kept in --out and printed with it, sheets of all pictures too; LoRAs that are there are not taught again.
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

import alchemy
from alchemy import cli, images, insertion, lora, sampling, segmentation
from alchemy.extras.inspect import sheets
from alchemy.files import save_json

from . import WEIGHTS, classifier, world
from .table import table

TOKEN, SCALES, BATCH = "sks", (0.6, 0.8, 1.0), 4
NOTHING = (None, None, None)  # what the classifier would say of a picture that could not be made


def share(hits):
    return sum(hits) / max(1, len(hits))


def phrase(place, kind=0):
    return world.BACKGROUNDS[place][kind]


@torch.no_grad()
def drawn(sdxl, prompts, first_seed):
    """A picture for each prompt at the defaults, of seeds first_seed, first_seed + 1, ...; several in a batch."""
    options, pictures = {k: sdxl.defaults[k] for k in ("sampler", "steps", "guidance")}, []
    for start in range(0, len(prompts), BATCH):
        told, count = (
            sdxl.encode_prompt(prompts[start : start + BATCH]),
            len(prompts[start : start + BATCH]),
        )
        seeds = range(first_seed + start, first_seed + start + count)
        noise = sampling.noise(
            (count, 4, *(side // sdxl.vae_scale_factor for side in sdxl.size)), seeds
        ).to(sdxl.device)
        for step in sampling.denoise(
            sdxl, noise, told, sdxl.encode_prompt([None] * count), **options
        ):
            pass
        pictures += [images.to_image(x) for x in sdxl.vae.decode(step.x_prev)]
    return pictures


class Measure:
    """Each part fills `found` with its figures."""

    def __init__(self, out, share, weights):
        self.sdxl, self.classifier, self.weights, self.share, self.found = (
            alchemy.load(weights, dtype="float32"),
            classifier.load(),
            weights,
            share,
            {},
        )
        files = [path for path in sorted(Path(weights).rglob("*.safetensors"))] + [
            WEIGHTS.parent / "alchemy" / "defaults.py"
        ]
        self.out = Path(out) / f"{zlib.crc32(b''.join(path.read_bytes() for path in files)):08x}"
        self.out.mkdir(parents=True, exist_ok=True)

    def figures(self, part):
        """What is found when a part is measured, {figure: value}."""
        getattr(self, part)()
        return self.found

    def count(self, number):
        return max(1, round(number * self.share))

    def show(self, name, labelled, columns=8):
        """A sheet of (label, picture), for the eye."""
        rows = [
            list(labelled[k : k + columns])
            for k in range(0, min(len(labelled), 10 * columns), columns)
        ]
        sheets.sheet(rows, least=128).save(self.out / f"{name}.png")

    def read(self, name, pictures, wanted):
        """What the classifier takes each picture for; None as a picture is nothing. wanted: (class, instance or None, place) of each, for the sheet."""
        blank = Image.new("RGB", self.sdxl.size[::-1], "white")
        said = [
            s if p else NOTHING
            for s, p in zip(
                self.classifier.name([p or blank for p in pictures]), pictures, strict=False
            )
        ]
        self.show(
            name,
            [
                (f"{w[1] or w[0]} {w[2]}: {s[1]} {s[2]}", p or blank)
                for w, s, p in zip(wanted, said, pictures, strict=False)
            ],
        )
        return said

    def renders(self):
        """The classifier's own errors, which bound all else, and the VAE's: the mean over pictures of one object in the plain style."""
        right, confused = classifier.accuracy(self.classifier, self.count(1580))
        self.found |= {f"classifier {head}": value for head, value in right.items()}
        self.found["classifier confusions"] = (
            ", ".join(
                f"{truth} taken for {taken} {n}" for (truth, taken), n in confused.most_common(6)
            )
            or "none"
        )
        scenes = [
            classifier.example(classifier.FRESH + 2**20 + k)[0][None].to(self.sdxl.device).float()
            / 127.5
            - 1
            for k in range(self.count(200))
        ]
        with torch.no_grad():
            errors = [
                ((self.sdxl.vae.decode(self.sdxl.vae.encode(x)[0]).clamp(-1, 1) - x) / 2)
                .square()
                .mean()
                for x in scenes
            ]
        self.found["psnr"] = float(torch.stack([-10 * e.log10() for e in errors]).mean())
        # What the VAE leaves of the subjects bounds all that can be learned of them.
        photos = [
            (one, Image.fromarray(photo.image))
            for one in world.HELD_OUT_INSTANCES
            for photo in world.subject_photos(one)
        ]
        with torch.no_grad():
            latents = [
                self.sdxl.vae.encode(
                    images.to_tensor(p.resize(self.sdxl.size[::-1], Image.LANCZOS))
                )[0]
                for _, p in photos
            ]
            said = self.classifier.name(
                [images.to_image(self.sdxl.vae.decode(x)[0]) for x in latents]
            )
        self.found["vae subject"] = share(
            [s[1] == one for s, (one, _) in zip(said, photos, strict=False)]
        )

    def prompts(self):
        seen = [
            pair
            for pair in itertools.product(world.CLASSES, world.BACKGROUNDS)
            if pair not in world.HELD_OUT_PAIRS
        ]
        rng = np.random.default_rng(0)
        wanted = [
            seen[k]
            for k in np.concatenate([rng.permutation(len(seen)) for _ in range(5)])[
                : self.count(500)
            ]
        ]
        said = self.read(
            "prompts",
            drawn(
                self.sdxl, [f"a photo of a {word} {phrase(place)}" for word, place in wanted], 1000
            ),
            [(word, None, place) for word, place in wanted],
        )
        for k, head, names in ((0, "class", world.CLASSES), (1, "place", world.BACKGROUNDS)):
            hits = {
                name: [s[2 * k] == name for s, w in zip(said, wanted, strict=False) if w[k] == name]
                for name in names
            }
            self.found[f"prompt {head}"] = share(sum(hits.values(), []))
            self.found[f"by {head}"] = {
                name: round(share(those), 2) for name, those in hits.items() if those
            }

    def pairs(self):
        wanted = list(world.HELD_OUT_PAIRS) * self.count(8)
        said = self.read(
            "pairs",
            drawn(
                self.sdxl, [f"a photo of a {word} {phrase(place)}" for word, place in wanted], 3000
            ),
            [(word, None, place) for word, place in wanted],
        )
        self.found["pair both"] = share(
            [(s[0], s[2]) == w for s, w in zip(said, wanted, strict=False)]
        )

    def teach(self, photos, out, *flags):
        """The folder out with what train.py makes of the photos, at the weights that are measured, and its seconds; one that is finished stays."""
        if not (out / "seconds.json").exists():
            start = time.time()
            run = subprocess.run(
                [
                    sys.executable,
                    WEIGHTS.parent / "train.py",
                    photos,
                    "--weights",
                    self.weights,
                    "--preview-every",
                    "0",
                    "--overwrite",
                    "--out",
                    out,
                    *flags,
                ],
                capture_output=True,
                text=True,
            )
            if run.returncode:
                raise ValueError(f"train.py: {run.stderr.strip()[-300:]}")
            save_json(round(time.time() - start), out / "seconds.json")
        return out

    def lora(self, instance):
        """What train.py learns with its defaults from the subject's photos."""
        out = self.teach(
            WEIGHTS / "subjects" / instance,
            self.out / "loras" / instance,
            "--class-word",
            instance.split("-")[0],
            "--token",
            TOKEN,
        )
        return out / "lora.safetensors"

    def asked(self, instance):
        """[(place, way to say it)] of places that are not on the subject's photos: every way in turn."""
        known = {photo.background for photo in world.subject_photos(instance)}
        places = [
            place
            for place in world.BACKGROUNDS
            if place not in known and (instance.split("-")[0], place) not in world.HELD_OUT_PAIRS
        ]
        return [(places[k % len(places)], k // len(places) % 3) for k in range(self.count(12))]

    def subjects(self):
        """For each subject, prompts of places that are not on its photos: one stage at several scales, the class alone, two stages."""
        hits = {}
        for n, instance in enumerate(world.HELD_OUT_INSTANCES[: self.count(8)]):
            word, seed = instance.split("-")[0], 5000 + 100 * n
            asked = self.asked(instance)
            prompts, wanted = (
                [f"a photo of a {word} {phrase(*which)}" for which in asked],
                [(word, instance, place) for place, _ in asked],
            )
            alchemy.load_lora(self.sdxl, self.lora(instance))
            made = self.one_stage(instance, prompts, wanted, seed) | self.two_stages(
                instance, prompts, wanted, seed
            )
            for key, values in made.items():
                hits.setdefault(key, []).extend(values)
            self.sdxl.free("unet")  # and the LoRA with it
            print(
                f"{instance}: "
                + ", ".join(
                    f"{key} {share(values):.2f}" for key, values in made.items() if key != "outside"
                ),
                flush=True,
            )
        found = {key: share(values) for key, values in hits.items()}
        best = max(SCALES, key=lambda scale: found[f"one {scale}"] + found[f"one place {scale}"])
        self.found |= {
            "subject": found["one 1.0"],
            "subject place": found["one place 1.0"],
            "prior": found["prior"],
            "prior class": found["prior class"],
            "two": found["two"],
            "two place": found["two place"],
            "one": found[f"one {best}"],
            "one place": found[f"one place {best}"],
            "best scale": best,
            "more": found["two"]
            + found["two place"]
            - found[f"one {best}"]
            - found[f"one place {best}"],
            "failed": sum(hits["failed"]),
            "outside": sum(hits["outside"]),
        }

    def one_stage(self, instance, prompts, wanted, seed):
        word, hits = wanted[0][0], {}
        for scale in SCALES:
            with lora.lora_scale(self.sdxl, scale):
                pictures = drawn(
                    self.sdxl,
                    [insertion.with_token(prompt, word, TOKEN) for prompt in prompts],
                    seed,
                )
            said = self.read(f"{instance}-one-{scale}", pictures, wanted)
            hits[f"one {scale}"] = [s[1] == instance for s in said]
            hits[f"one place {scale}"] = [s[2] == w[2] for s, w in zip(said, wanted, strict=False)]
        said = self.read(f"{instance}-prior", drawn(self.sdxl, prompts, seed), wanted)
        return hits | {
            "prior": [s[1] != instance for s in said],
            "prior class": [s[0] == word for s in said],
        }

    def two_stages(self, instance, prompts, wanted, seed):
        made = []
        for k, prompt in enumerate(prompts):
            try:
                made.append(alchemy.insert(self.sdxl, prompt, wanted[0][0], TOKEN, seed=seed + k))
            except (
                ValueError
            ) as error:  # no mask to be had: nothing is inserted, which counts as wrong
                made.append(None)
                print(f"{prompt}, seed {seed + k}: {error}", flush=True)
        said = self.read(f"{instance}-two", [m and m.result for m in made], wanted)
        self.show(
            f"{instance}-stages",
            [
                cell
                for m in made
                if m
                for cell in (
                    ("scene", m.scene),
                    ("may change", sheets.outlined(m.scene, m.feathered)),
                    ("result", m.result),
                )
            ],
            9,
        )
        changed = [
            (np.asarray(m.scene) != np.asarray(m.result)).any(-1) & (m.feathered == 0).numpy()
            for m in made
            if m
        ]
        return {
            "two": [s[1] == instance for s in said],
            "two place": [s[2] == w[2] for s, w in zip(said, wanted, strict=False)],
            "failed": [m is None for m in made],
            "outside": [int(c.sum()) for c in changed],
        }

    def masks(self):
        """Of fresh renders of all classes: the segmentation, and the region of insert.py, beside the true alpha."""
        rows, cells, words, s = [], [], list(world.CLASSES), self.sdxl.defaults
        for k in range(self.count(96)):
            word = words[k % len(words)]
            ones = [one for one in world.CLASSES[word] if one not in world.HELD_OUT_INSTANCES]
            scene = world.scene(
                classifier.FRESH + 2**21 + k,
                instance=ones[k // len(words) % len(ones)],
                style="photo",
            )
            picture, alpha = (
                Image.fromarray(scene.image),
                torch.from_numpy(scene.objects[0][2]) > 0.5,
            )
            soft = alchemy.segment(self.sdxl, picture, word).cpu()
            mask = segmentation.remove_specks_and_holes(soft >= s["threshold"])
            try:
                may = segmentation.binarize(soft, s["threshold"], s["dilate"]) > 0
            except (
                ValueError
            ):  # nothing, or all but nothing, is left outside: insert.py would refuse
                may = None
            rows.append(
                (
                    float((mask & alpha).sum() / (mask | alpha).sum()),
                    float("inf") if may is None else float(may.sum() / alpha.sum()),
                    0.0 if may is None else float((may & alpha).sum() / alpha.sum()),
                )
            )
            cells += [(f"{word} {rows[-1][0]:.2f}", picture), ("soft", sheets.grey(soft))]
        self.show("masks", cells)
        ious, areas, insides = zip(*rows, strict=False)
        self.found |= {
            "iou": statistics.mean(ious),
            "area": statistics.median(areas),
            "inside": statistics.mean(insides),
        }


PARTS = ("renders", "prompts", "pairs", "subjects", "masks")


def measured(argv, description, kind, rows, name):
    """Measure those rows of a kind of Measure that the flags name; (the Measure, all that its file `name` tells so far)."""
    parser = cli.parser(description)
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"of {', '.join(rows)} (default: all)"
    )
    parser.add_argument(
        "--share",
        type=cli.number(float, 0, 1, above=True),
        default=1.0,
        metavar="X",
        help="of the pictures (default: all; less is quicker, and rougher)",
    )
    parser.add_argument("--out", default="out/measure", metavar="FOLDER")
    parser.add_argument("--weights", default=str(WEIGHTS / "mini"), metavar="FOLDER")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - set(rows):
        raise ValueError(f"no row {', '.join(unknown)}; there are {', '.join(rows)}")
    measure = kind(args.out, args.share, args.weights)
    file = measure.out / f"{name}-{args.share:g}.json"
    for row in args.rows or rows:
        start = time.time()
        found = measure.figures(row)
        print(f"{row}: {time.time() - start:.0f} s", flush=True)
        save_json(
            (json.loads(file.read_text()) if file.exists() else {}) | found, file
        )  # read anew: others may measure beside
    return measure, json.loads(file.read_text())


def main(argv=None):
    measure, found = measured(argv, __doc__, Measure, PARTS, "figures")
    print(
        f"\n{table(found)}\n\n{measure.share:.0%} of the pictures; sheets of them in {measure.out}"
    )


if __name__ == "__main__":
    cli.run(main)
