"""How good is the miniature? Counted by the judge and the true masks, on fixed seeds: the table of weights/README.md.

    python weights/measure.py                                  everything, about 40 minutes on two cores
    python weights/measure.py prompts pairs --share 0.2        some of it, on a fifth of the pictures

Pictures, LoRAs and figures are kept in --out; what is there is not made again.
"""
import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import alchemy  # noqa: E402
from alchemy import images, insertion, lora, loop, segmentation  # noqa: E402
from alchemy.files import save_json  # noqa: E402
from alchemy.report import sheets  # noqa: E402
import judge as judges  # noqa: E402
import world  # noqa: E402

TOKEN, SCALES, BATCH = "sks", (0.6, 0.8, 1.0), 4
# What is asked of each figure: (row, key, of a miniature trained on a CPU, on a GPU); the sign says in which direction.
ASKED = (
    ("VAE reconstruction of fresh scenes, PSNR in dB", "psnr", ">= 27", ">= 30"),
    ("text to image: class right", "prompt class", ">= 75%", ">= 90%"),
    ("text to image: place right", "prompt place", ">= 90%", ">= 95%"),
    ("unseen pairs of class and place: both right", "pair both", ">= 60%", ">= 80%"),
    ("subject learned: judged as that instance", "subject", ">= 60%", ">= 80%"),
    ("subject learned: place right", "subject place", ">= 80%", ">= 85%"),
    ("class prompt after training: not the subject", "prior", ">= 85%", ">= 90%"),
    ("segmentation of the class word on fresh renders, mean IoU", "iou", ">= 0.65", ">= 0.75"),
    ("two stages: subject right", "two subject", "", ""),
    ("two stages: place right", "two place", "", ""),
    ("two stages: the sum of both", "two sum", "", ""),
    ("one stage at its best scale: the sum of both", "one sum", "< two stages", "< two stages"),
    ("changed area over the true alpha's, median", "area", "<= 1.6", "<= 1.6"),
    ("part of the true area that may change, mean", "inside", ">= 90%", ">= 90%"),
    ("pixels changed outside the feathered mask", "outside", "<= 0", "<= 0"),
)


def share(hits):
    return sum(hits) / len(hits)


def phrase(place):
    return world.BACKGROUNDS[place][0]


@torch.no_grad()
def drawn(sdxl, prompts, first_seed):
    """A picture for each prompt at the defaults, of seeds first_seed, first_seed + 1, ...; several in a batch."""
    options, pictures = {k: sdxl.defaults[k] for k in ("sampler", "steps", "guidance")}, []
    for start in range(0, len(prompts), BATCH):
        told = sdxl.encode_prompt(prompts[start:start + BATCH])
        noise = loop.noise((len(told), 4, *(side // sdxl.factor for side in sdxl.size)), range(first_seed + start, first_seed + start + len(told)))
        for step in loop.denoise(sdxl, noise, told, sdxl.encode_prompt([None] * len(told)), **options):
            pass
        pictures += [images.to_image(x) for x in sdxl.vae.decode(step.x_prev)]
    return pictures


class Measure:
    def __init__(self, args):
        self.out, self.share, self.found = Path(args.out), args.share, {}
        self.sdxl, self.judge = alchemy.load(args.weights), judges.load()
        self.weights = args.weights

    def count(self, number):
        return max(1, round(number * self.share))

    def show(self, name, labelled, columns=8):
        """A sheet of (label, picture), for the eye."""
        rows = [list(labelled[k:k + columns]) for k in range(0, min(len(labelled), 10 * columns), columns)]
        sheets.sheet(rows, least=128).save(self.out / f"{name}.png")

    def judged(self, name, prompts, first_seed, wanted):
        """Draw and judge; a sheet of them with what they were taken for. wanted: (class, instance or None, place) of each."""
        pictures = drawn(self.sdxl, prompts, first_seed)
        return pictures, self.read(name, pictures, wanted)

    def read(self, name, pictures, wanted):
        said = self.judge.name(pictures)
        self.show(name, [(f"{w[1] or w[0]} {w[2]}: {s[1]} {s[2]}", p) for w, s, p in zip(wanted, said, pictures)])
        return said

    def renders(self):
        """The judge's own errors, and the VAE's."""
        right, confused = judges.accuracy(self.judge, self.count(1580))
        for head, value in right.items():
            self.found[f"judge {head}"] = value
        self.found["judge confusions"] = ", ".join(f"{a} for {b} {n}" for (b, a), n in confused.most_common(6))
        scenes = [judges.example(judges.FRESH + 2 ** 20 + k)[0][None].float() / 127.5 - 1 for k in range(self.count(200))]
        with torch.no_grad():
            errors = [((self.sdxl.vae.decode(self.sdxl.vae.encode(x)[0]).clamp(-1, 1) - x) / 2).square().mean() for x in scenes]
        self.found["psnr"] = float(torch.stack([-10 * e.log10() for e in errors]).mean())

    def prompts(self):
        seen = [pair for pair in itertools.product(world.CLASSES, world.BACKGROUNDS) if pair not in world.HELD_OUT_PAIRS]
        rng = np.random.default_rng(0)
        wanted = [seen[k] for k in np.concatenate([rng.permutation(len(seen)) for _ in range(5)])[:self.count(500)]]
        _, said = self.judged("prompts", [f"a photo of a {word} {phrase(place)}" for word, place in wanted], 1000, [(w, None, p) for w, p in wanted])
        self.found["prompt class"] = share([s[0] == w for s, (w, _) in zip(said, wanted)])
        self.found["prompt place"] = share([s[2] == p for s, (_, p) in zip(said, wanted)])
        for k, words in ((0, world.CLASSES), (1, world.BACKGROUNDS)):
            self.found["by " + ("class", "place")[k]] = {word: round(share([s[2 * k] == word for s, w in zip(said, wanted) if w[k] == word] or [0]), 2)
                                                         for word in words}

    def pairs(self):
        wanted = list(world.HELD_OUT_PAIRS) * self.count(8)
        _, said = self.judged("pairs", [f"a photo of a {word} {phrase(place)}" for word, place in wanted], 3000, [(w, None, p) for w, p in wanted])
        self.found["pair both"] = share([(s[0], s[2]) == w for s, w in zip(said, wanted)])

    def lora(self, instance):
        """What train.py learns with its defaults from the subject's photos."""
        out = self.out / "loras" / instance
        if not (out / "lora.safetensors").exists():
            subprocess.run([sys.executable, HERE.parent / "train.py", HERE / "subjects" / instance, "--class-word", instance.split("-")[0], "--token", TOKEN,
                            "--weights", self.weights, "--preview-every", "0", "--overwrite", "--out", out], check=True, stderr=subprocess.DEVNULL)
        return out / "lora.safetensors"

    def subjects(self):
        """For each subject: prompts of places that are not on its photos, in one stage at several scales, and in two."""
        rows = {key: [] for key in ("one", "one place", "prior", "two", "two place", "outside")}
        for instance in world.HELD_OUT_INSTANCES[:self.count(8)]:
            word = instance.split("-")[0]
            known = {photo.background for photo in world.subject_photos(instance)}
            places = [place for place in world.BACKGROUNDS if place not in known and (word, place) not in world.HELD_OUT_PAIRS]
            places = (places * 12)[:self.count(12)]
            prompts, wanted = [f"a photo of a {word} {phrase(place)}" for place in places], [(word, instance, place) for place in places]
            named = [insertion.with_token(prompt, word, TOKEN) for prompt in prompts]
            alchemy.load_lora(self.sdxl, self.lora(instance))

            one = []
            for scale in SCALES:
                with lora.scaled(self.sdxl.unet, scale):
                    one.append(self.judged(f"{instance}-one-{scale}", named, 5000, wanted)[1])
            rows["one"].append([[s[1] == instance for s in said] for said in one])
            rows["one place"].append([[s[2] == place for s, place in zip(said, places)] for said in one])
            _, said = self.judged(f"{instance}-prior", prompts, 5000, wanted)
            rows["prior"] += [s[1] != instance for s in said]
            made = [self.inserted(prompt, word, 5000 + k) for k, prompt in enumerate(prompts)]
            rows["outside"] += [int((np.asarray(m.scene) != np.asarray(m.result))[(m.feathered == 0).numpy()].sum()) for m in made if m]
            said = self.read(f"{instance}-two", [m.result if m else Image.new("RGB", self.sdxl.size[::-1]) for m in made], wanted)
            rows["two"] += [s[1] == instance for s in said]
            rows["two place"] += [s[2] == place for s, place in zip(said, places)]
            self.show(f"{instance}-stages", [cell for m in made[:6] if m for cell in (("scene", m.scene), ("may change", sheets.outlined(m.scene, m.feathered)),
                                                                                     ("result", m.result))], 6)
            self.sdxl.free("unet")
            print(f"{instance}: one stage {[round(share(hits), 2) for hits in rows['one'][-1]]} at {SCALES}, two {share(rows['two'][-len(places):]):.2f}", flush=True)
        right, placed = (np.array(rows[key]).mean((0, 2)) for key in ("one", "one place"))  # per scale
        self.found |= {"subject": right[-1], "subject place": placed[-1], "prior": share(rows["prior"]), "two subject": share(rows["two"]),
                       "two place": share(rows["two place"]), "two sum": share(rows["two"]) + share(rows["two place"]),
                       "one sum": max(right + placed), "best scale": SCALES[int((right + placed).argmax())], "outside": sum(rows["outside"])}

    def inserted(self, prompt, word, seed):
        try:
            return alchemy.insert(self.sdxl, prompt, word, TOKEN, seed=seed)
        except ValueError as error:  # no mask to be had: nothing inserted, counted as wrong
            print(f"{prompt}, seed {seed}: {error}", flush=True)

    def masks(self):
        """Segmentation and the region that may change, beside the true alpha of fresh renders of all classes."""
        ious, areas, insides, cells = [], [], [], []
        for k in range(self.count(96)):
            word = list(world.CLASSES)[k % len(world.CLASSES)]
            ones = [one for one in world.CLASSES[word] if one not in world.HELD_OUT_INSTANCES]
            scene = world.scene(judges.FRESH + 2 ** 21 + k, "any", instance=ones[k // len(world.CLASSES) % len(ones)], style="photo")
            picture, alpha = Image.fromarray(scene.image), torch.from_numpy(scene.objects[0][2]) > 0.5
            soft = alchemy.segment(self.sdxl, picture, word, prompt=f"a photo of a {word} {phrase(scene.background)}")
            mask = segmentation.clean(soft >= self.sdxl.defaults["threshold"])
            may = segmentation.to_mask(soft, self.sdxl.defaults["threshold"], self.sdxl.defaults["dilate"]) > 0
            ious.append(float((mask & alpha).sum() / (mask | alpha).sum()))
            areas.append(float(may.sum() / alpha.sum()))
            insides.append(float((may & alpha).sum() / alpha.sum()))
            cells += [(f"{word} {ious[-1]:.2f}", picture), ("soft", sheets.grey(soft))]
        self.show("masks", cells)
        self.found |= {"iou": statistics.mean(ious), "area": statistics.median(areas), "inside": statistics.mean(insides)}


def table(found):
    """Markdown: figure, measured, and what is asked, with a mark where it is missed."""
    lines = ["| figure | measured | asked of a CPU | of a GPU |", "|---|---|---|---|"]
    for head in ("class", "instance", "place"):
        if f"judge {head}" in found:
            lines.append(f"| the judge on fresh renders: {head} | {found[f'judge {head}']:.1%} | >= 97% | >= 97% |")
    for row, key, cpu, gpu in ASKED:
        if key not in found:
            continue
        value = found[key]
        percent = "%" in cpu + gpu or key in ("two subject", "two place")
        text = f"{value:.1%}" if percent else f"{value}" if key == "outside" else f"{value:.2f}"
        if cpu[:2] in (">=", "<="):
            bound = float(cpu[3:].rstrip("%")) / (100 if percent else 1)
            text += "" if (value >= bound if cpu[0] == ">" else value <= bound) else " (missed)"
        lines.append(f"| {row} | {text} | {cpu} | {gpu} |")
    return "\n".join(lines)


PARTS = ("renders", "prompts", "pairs", "subjects", "masks")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures (default: all; less is quicker, and rougher)")
    parser.add_argument("--out", default="out/measure")
    parser.add_argument("--weights", default=str(HERE / "mini"))
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    measure, file = Measure(args), Path(args.out) / "figures.json"
    measure.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts or PARTS:
        start = time.time()
        getattr(measure, part)()
        print(f"{part}: {time.time() - start:.0f} s", flush=True)
        save_json((json.loads(file.read_text()) if file.exists() else {}) | measure.found, file)
    found = json.loads(file.read_text())
    print(f"\n{table(found)}\n")
    for key in ("judge confusions", "best scale", "by class", "by place"):
        if key in found:
            print(f"{key}: {found[key]}")


if __name__ == "__main__":
    main()
