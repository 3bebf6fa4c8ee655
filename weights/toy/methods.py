"""The training methods compared: one subject by every method of train.py, measured alike.

python -m weights.toy.methods                    every row, about 40 minutes on one core
python -m weights.toy.methods lora word          some of them

What was measured of the same weights and defaults is kept in --out and printed too; what is
trained already is not trained again.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import alchemy
from alchemy import cli, insertion
from alchemy.formats.embeddings import load_embedding

from . import WEIGHTS, classifier, world
from .measure import TOKEN, Measure, generate, measured, phrase, share

SUBJECTS = ("dog-poodle",)  # more of world.HELD_OUT_INSTANCES take minutes each, in every row
WORD = "<new>"
CLASS = ("--class-images", "60")
FULL = ("--method", "full")
INVERSION = ("--method", "textual-inversion", "--token", WORD)
OF_SUBJECTS = {  # row: (title, whether all photos show one background, flags)
    "lora-alone": ("LoRA, no prior preservation", False, ("--prior-weight", "0")),
    "lora": ("LoRA, prior: the base model's prediction", False, ()),
    "lora-images": ("LoRA, prior: 60 class images", False, CLASS),
    "full-alone": ("DreamBooth, no prior preservation", False, (*FULL, "--prior-weight", "0")),
    "full": ("DreamBooth with 60 class images", False, (*FULL, *CLASS)),
    "word": ("Textual inversion", False, INVERSION),
    "one-background": ("LoRA, all photos on one background", True, ()),
    "one-background-masked": (
        "LoRA, all photos on one background, --mask",
        True,
        ("--mask", "{masks}"),
    ),
}
OF_STYLES = {  # row: (title, the prompt that asks for the style, flags)
    "style-word": (
        "Textual inversion of a style",
        f"a picture of a {{}}, in the style of {WORD}",
        (*INVERSION, "--style", "--init-word", "watercolor"),
    ),
    "style-lora": (
        "LoRA on captioned images of a style",
        f"a {TOKEN} drawing of a {{}}",
        ("--captions",),
    ),
}


class Styles:
    """Tells the styles of the world apart: a linear map of colours and of the classifier's first
    responses, fitted on renders as the VAE returns them, which no generated image can surpass."""

    def __init__(self, sdxl, network: classifier.Classifier, count: int = 700):
        self.sdxl, self.classifier, self.names = sdxl, network, list(world.STYLES)
        x, truth = self.renders(classifier.FRESH + 2**22, count)
        x = self.features(x)
        self.mean, self.std = x.mean(0), x.std(0) + 1e-3
        x, y = (x - self.mean) / self.std, 2 * F.one_hot(truth, len(self.names)).float() - 1
        self.bias = y.mean(0)
        self.map = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ y)

    @torch.no_grad()
    def renders(self, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """Images (count,3,H,W) in [-1,1] after the VAE, the styles in turn, and their indices."""
        truth = torch.arange(count) % len(self.names)
        scenes = []
        for k, style in enumerate(truth.tolist()):
            scenes.append(world.scene(seed + k, "any", style=self.names[style]).image)
        parts = []
        for x in classifier.to_input(np.stack(scenes)).split(16):
            parts.append(self.sdxl.vae.decode(self.sdxl.vae.encode(x)[0]).clamp(-1, 1))
        return torch.cat(parts), truth

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        chroma = (x - x.mean(1, keepdim=True)).abs()
        features = [chroma.mean((2, 3)), x.mean((2, 3))]
        for responses in self.classifier.maps(x)[:4]:
            features += [responses.mean((2, 3)), responses.std((2, 3))]
        return torch.cat(features, dim=1)

    def name(self, x) -> list[str]:
        """The style of each image (B,3,H,W) in [-1,1], or of each PIL image of a list."""
        if isinstance(x, list):
            x = classifier.to_input(np.stack([np.asarray(image) for image in x]))
        scores = (self.features(x) - self.mean) / self.std @ self.map + self.bias
        return [self.names[k] for k in scores.argmax(1)]

    def accuracy(self, count: int = 140) -> float:
        x, truth = self.renders(classifier.FRESH + 2**23, count)
        pairs = zip(self.name(x), truth, strict=True)
        return share([name == self.names[k] for name, k in pairs])


class Methods(Measure):
    """One row per method."""

    def trained(self, photos: Path, out: Path, *flags: str):
        """A checkpoint that has learned the photos."""
        self.train_subject(photos, out, *flags)
        whole, adapter = out / "checkpoint", out / "lora.safetensors"
        sdxl = alchemy.load(whole if whole.exists() else self.weights, dtype="float32")
        if adapter.exists():
            alchemy.load_lora(sdxl, adapter)
        elif not whole.exists():
            load_embedding(sdxl, next(out.glob("*.safetensors")))
        return sdxl

    def figures(self, row: str) -> dict:
        measure = self.of_subjects if row in OF_SUBJECTS else self.of_styles
        found = measure(row, *(OF_SUBJECTS | OF_STYLES)[row])
        print(f"{row}: " + ", ".join(f"{k} {value:.2f}" for k, value in found.items()), flush=True)
        return {row: found}

    def folder(self, row: str) -> Path:
        """The LoRAs of measure.py are shared: each is trained once."""
        return self.out / ("loras" if row == "lora" else f"methods/{row}")

    def photos_of_one_background(self, instance: str) -> list[Path]:
        """Folders of five photos on one background of the subject's photos, and of their masks."""
        background = world.subject_photos(instance, 1)[0].background
        seed = classifier.FRESH + 2**24
        folders = [self.out / "photos" / f"{instance}{end}" for end in ("", "-masks")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for k in range(5):
            given = {"instance": instance, "background": background, "style": "photo"}
            scene = world.scene(seed + k, "any", (192, 192), **given)
            for folder, pixels in zip(
                folders, (scene.image, np.uint8(255 * scene.objects[0][2])), strict=True
            ):
                Image.fromarray(pixels).save(folder / f"{k:02d}.png")
        return folders

    def of_subjects(self, row: str, _, one_background: bool, flags: tuple) -> dict:
        hits = {"subject": [], "background": [], "prior": [], "class": []}
        for n, instance in enumerate(SUBJECTS[: self.count(len(SUBJECTS))]):
            word, seed = instance.split("-")[0], 5000 + 100 * n
            photos, masks = WEIGHTS / "subjects" / instance, ""
            if one_background:
                photos, masks = self.photos_of_one_background(instance)
            given = [flag.replace("{masks}", str(masks)) for flag in flags]
            if WORD not in given:
                given += ["--token", TOKEN]
            sdxl = self.trained(photos, self.folder(row) / instance, "--class-word", word, *given)
            plain, expected = self.asked(instance)
            named = [insertion.with_token(prompt, word, TOKEN) for prompt in plain]
            if WORD in given:
                named = [prompt.replace(word, WORD, 1) for prompt in plain]
            generated = generate(sdxl, named, seed)
            _, subjects, backgrounds = self.right(f"{row}-{instance}", generated, expected)
            hits["subject"] += subjects
            hits["background"] += backgrounds
            generated = generate(sdxl, plain, seed)
            words, subjects, _ = self.right(f"{row}-{instance}-prior", generated, expected)
            hits["prior"] += [not hit for hit in subjects]
            hits["class"] += words
        return {key: share(values) for key, values in hits.items()}

    def of_styles(self, row: str, _, template: str, flags: tuple) -> dict:
        styles, hits = Styles(self.sdxl, self.classifier), {"style": [], "plain": []}
        objects = []
        for word in list(world.CLASSES)[::2]:
            objects += [f"{word} {phrase(place)}" for place in list(world.BACKGROUNDS)[::3]]
        objects = objects[: self.count(24)]
        for style in world.HELD_OUT_STYLES:
            photos = world.captioned(self.out / "photos" / style, 12, style, template)
            sdxl = self.trained(photos, self.folder(row) / style, *flags)
            for key, prompt, expected in (
                ("style", template, style),
                ("plain", "a photo of a {}", "photo"),
            ):
                generated = generate(sdxl, [prompt.format(one) for one in objects], 7000)
                found = styles.name(generated)
                hits[key] += [name == expected for name in found]
                labels = [f"{a}: {b}" for a, b in zip(objects, found, strict=True)]
                self.show(f"{row}-{style}-{key}", list(zip(labels, generated, strict=True)))
        found = {key: share(values) for key, values in hits.items()}
        return found | {"classifier": styles.accuracy()}


def table(found: dict) -> str:
    """Markdown of {row: {figure: value}}."""
    lines = []
    subject_head = "subject right | background right | class prompt: not the subject | class right"
    style_head = "style right | plain prompt stays a photo | the classifier's own accuracy"
    for rows, keys, head in (
        (OF_SUBJECTS, ("subject", "background", "prior", "class"), subject_head),
        (OF_STYLES, ("style", "plain", "classifier"), style_head),
    ):
        if not set(rows) & set(found):
            continue
        lines += [f"| method | {head} |", "|---" * (1 + len(keys)) + "|"]
        for row, (title, *_) in rows.items():
            if row in found:
                figures = " | ".join(f"{found[row][key]:.0%}" for key in keys)
                lines.append(f"| {title} (`{row}`) | {figures} |")
        lines.append("")
    return "\n".join(lines)


def main(argv=None) -> None:
    rows = [*OF_SUBJECTS, *OF_STYLES]
    print("\n" + table(measured(argv, __doc__, Methods, rows, "methods")[1]))


if __name__ == "__main__":
    cli.run(main)
