"""What is each way of teaching good for? The same photos, taught by every method of train.py and measured alike: a table of weights/README.md.

    python -m weights.toy.methods                    every row, about 40 minutes on one core
    python -m weights.toy.methods lora word          some of them

What was measured of the same weights and defaults is kept in --out and printed with it; what is taught already is not taught again.
"""


import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import alchemy
from alchemy import cli, insertion
from alchemy.formats.embeddings import load_embedding

from . import WEIGHTS, classifier, world
from .measure import TOKEN, Measure, drawn, measured, phrase, share

SUBJECTS = ("dog-poodle",)  # more of world.HELD_OUT_INSTANCES take minutes each, in every row
WORD = "<new>"
CLASS = ("--class-pictures", "60")
INVERSION = ("--method", "textual-inversion", "--token", WORD)
OF_SUBJECTS = {  # row: (what it is, whether all photos are of one place, flags beside --class-word and --token)
    "lora-alone": ("LoRA, nothing kept", False, ("--prior-weight", "0")),
    "lora": ("LoRA, the class held to the model's own prediction", False, ()),
    "lora-pictures": ("LoRA, the class held to 60 pictures of it", False, CLASS),
    "full-alone": ("DreamBooth, nothing kept", False, ("--method", "full", "--prior-weight", "0")),
    "full": ("DreamBooth with 60 class pictures", False, ("--method", "full", *CLASS)),
    "word": ("Textual Inversion", False, INVERSION),
    "one-place": ("LoRA, all photos of one place", True, ()),
    "one-place-masked": ("LoRA, all photos of one place, --mask", True, ("--mask", "{masks}")),
}
OF_STYLES = {  # row: (what it is, the prompt that asks for the style, flags)
    "style-word": (
        "Textual Inversion of a style",
        f"a picture of a {{}}, in the style of {WORD}",
        (*INVERSION, "--style", "--init-word", "watercolor"),
    ),
    "style-lora": (
        "LoRA on captioned pictures of a style",
        f"a {TOKEN} drawing of a {{}}",
        ("--captions",),
    ),
}


class Styles:
    """Tells the styles of the world apart by colours and by means and deviations of the classifier's first responses: a linear map, fitted on renders as
    the VAE returns them, which is the best that a picture of the model can be."""

    def __init__(self, sdxl, net, count=700):
        self.sdxl, self.classifier, self.names = sdxl, net, list(world.STYLES)
        x, truth = self.features(*self.renders(classifier.FRESH + 2**22, count))
        self.mean, self.std = x.mean(0), x.std(0) + 1e-3
        x, y = (x - self.mean) / self.std, 2 * F.one_hot(truth, len(self.names)).float() - 1
        self.bias, self.map = (
            y.mean(0),
            torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ y),
        )

    @torch.no_grad()
    def renders(self, seed, count):
        """count pictures (3,H,W) in [-1,1] after encoding and decoding, the styles in turn, and the number of each."""
        truth = [k % len(self.names) for k in range(count)]
        scenes = [
            world.scene(seed + k, "any", style=self.names[style]).image
            for k, style in enumerate(truth)
        ]
        x = (
            torch.stack([torch.from_numpy(image) for image in scenes]).permute(0, 3, 1, 2).float()
            / 127.5
            - 1
        )
        return torch.cat(
            [
                self.sdxl.vae.decode(self.sdxl.vae.encode(part)[0]).clamp(-1, 1)
                for part in x.split(16)
            ]
        ), truth

    @torch.no_grad()
    def features(self, x, truth=()):
        chroma = (
            x - x.mean(1, keepdim=True)
        ).abs()  # the classifier is taught not to mind light and colours, by which some styles are told
        found, h = [chroma.mean((2, 3)), x.mean((2, 3))], F.relu(self.classifier.stem(x))
        for block in (None, *self.classifier.blocks[:3]):
            h = block(h) if block else h
            found += [h.mean((2, 3)), h.std((2, 3))]
        return torch.cat(found, dim=1), torch.tensor(truth)

    def name(self, x):
        """Pictures (B,3,H,W) in [-1,1], or a list of PIL ones, to a list of styles."""
        if isinstance(x, list):
            x = (
                torch.stack([torch.from_numpy(np.array(p)) for p in x]).permute(0, 3, 1, 2).float()
                / 127.5
                - 1
            )
        return [
            self.names[k]
            for k in ((self.features(x)[0] - self.mean) / self.std @ self.map + self.bias).argmax(1)
        ]

    def accuracy(self, count=140):
        x, truth = self.renders(classifier.FRESH + 2**23, count)
        return share([name == self.names[k] for name, k in zip(self.name(x), truth, strict=False)])


class Methods(Measure):
    """A row for each way of teaching."""

    def taught(self, photos, out, *flags):
        """A model that has learned the photos."""
        self.teach(photos, out, *flags)
        whole, adapter = out / "checkpoint", out / "lora.safetensors"
        sdxl = alchemy.load(whole if whole.exists() else self.weights, dtype="float32")
        if adapter.exists():
            alchemy.load_lora(sdxl, adapter)
        elif not whole.exists():
            load_embedding(sdxl, next(out.glob("*.safetensors")))
        return sdxl

    def figures(self, row):
        found = (
            self.of_subjects(row, *OF_SUBJECTS[row])
            if row in OF_SUBJECTS
            else self.of_styles(row, *OF_STYLES[row])
        )
        print(
            f"{row}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True
        )
        return {row: found}

    def folder(self, row):
        return self.out / (
            "loras" if row == "lora" else f"methods/{row}"
        )  # what the other table needs is taught once

    def photos_of_one_place(self, instance):
        """Folders of five photos in one of the places that the subject's own photos show, and of their true masks."""
        place, seed = world.subject_photos(instance, 1)[0].background, classifier.FRESH + 2**24
        folders = [self.out / "photos" / f"{instance}{what}" for what in ("", "-masks")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for k in range(5):
            scene = world.scene(
                seed + k, "any", (192, 192), instance=instance, background=place, style="photo"
            )
            for folder, pixels in zip(
                folders, (scene.image, np.uint8(255 * scene.objects[0][2])), strict=False
            ):
                Image.fromarray(pixels).save(folder / f"{k:02d}.png")
        return folders

    def of_subjects(self, row, _, one_place, flags):
        hits = {"subject": [], "place": [], "prior": [], "class": []}
        for n, instance in enumerate(SUBJECTS[: self.count(len(SUBJECTS))]):
            word, seed = instance.split("-")[0], 5000 + 100 * n
            photos, masks = (
                self.photos_of_one_place(instance)
                if one_place
                else (WEIGHTS / "subjects" / instance, None)
            )
            given = [str(masks) if flag == "{masks}" else flag for flag in flags]
            token = [] if WORD in given else ["--token", TOKEN]
            sdxl = self.taught(
                photos, self.folder(row) / instance, "--class-word", word, *token, *given
            )
            asked = self.asked(instance)
            plain, wanted = (
                [f"a photo of a {word} {phrase(*which)}" for which in asked],
                [(word, instance, place) for place, _ in asked],
            )
            named = [
                p.replace(word, WORD, 1) if WORD in given else insertion.with_token(p, word, TOKEN)
                for p in plain
            ]
            said = self.read(f"{row}-{instance}", drawn(sdxl, named, seed), wanted)
            hits["subject"] += [s[1] == instance for s in said]
            hits["place"] += [s[2] == w[2] for s, w in zip(said, wanted, strict=False)]
            said = self.read(f"{row}-{instance}-prior", drawn(sdxl, plain, seed), wanted)
            hits["prior"] += [s[1] != instance for s in said]
            hits["class"] += [s[0] == word for s in said]
        return {key: share(values) for key, values in hits.items()}

    def of_styles(self, row, _, named, flags):
        styles, hits = Styles(self.sdxl, self.classifier), {"style": [], "plain": []}
        pairs = [
            (word, place)
            for word in list(world.CLASSES)[::2]
            for place in list(world.BACKGROUNDS)[::3]
        ][: self.count(24)]
        for style in world.HELD_OUT_STYLES:
            sdxl = self.taught(
                world.captioned(self.out / "photos" / style, 12, style, named),
                self.folder(row) / style,
                *flags,
            )
            things = [f"{word} {phrase(place)}" for word, place in pairs]
            for key, prompts, wanted in (
                ("style", [named.format(thing) for thing in things], style),
                ("plain", [f"a photo of a {thing}" for thing in things], "photo"),
            ):
                pictures = drawn(sdxl, prompts, 7000)
                said = styles.name(pictures)
                hits[key] += [s == wanted for s in said]
                self.show(
                    f"{row}-{style}-{key}",
                    [
                        (f"{thing}: {s}", p)
                        for thing, s, p in zip(things, said, pictures, strict=False)
                    ],
                )
        return {key: share(values) for key, values in hits.items()} | {
            "classifier": styles.accuracy()
        }


def table(found):
    """Markdown of {row: {figure: value}}."""
    lines = []
    for rows, keys, head in (
        (
            OF_SUBJECTS,
            ("subject", "place", "prior", "class"),
            "subject right | place right | class prompt: not the subject | its class right",
        ),
        (
            OF_STYLES,
            ("style", "plain", "classifier"),
            "style right | plain prompt stays a photo | the classifier's own accuracy",
        ),
    ):
        if any(row in found for row in rows):
            lines += [f"| method | {head} |", "|---" * (1 + len(keys)) + "|"]
            lines += [
                f"| {what[0]} (`{row}`) | "
                + " | ".join(f"{found[row][key]:.0%}" for key in keys)
                + " |"
                for row, what in rows.items()
                if row in found
            ] + [""]
    return "\n".join(lines)


def main(argv=None):
    print("\n" + table(measured(argv, __doc__, Methods, [*OF_SUBJECTS, *OF_STYLES], "methods")[1]))


if __name__ == "__main__":
    cli.run(main)
