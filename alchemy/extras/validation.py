"""train.py --validate: how like the photos are the previews, and is the class still what it was?"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from .. import cli, images
from ..formats import png
from ..methods.outputs import SCORES, Log
from ..methods.task import find_subject_photos
from ..sdxl import SDXL
from .encoders import DINO, load_dino, load_toy
from .evaluate import fidelity
from .inspect.sheets import INK

COLOURS = {"subject": (40, 110, 180), "class": (60, 140, 70)}

# PIL images to features of length 1.
Encode = Callable[[Iterable[Image.Image]], Tensor]


def choose_encoder(sdxl: SDXL, source: str | None) -> Encode:
    """DINO; for the miniature, unless a source is given, its toy classifier, which is offline."""
    if source is None and sdxl.size[0] < 512:
        cli.log("validation: by the features of the miniature's toy classifier, not DINO")
        return load_toy()
    return load_dino(source or DINO, sdxl.device)


class Validation:
    """The scores of a run's previews, in its log and here: {step: {"subject": ..., "class": ...}}.

    subject is the mean cosine of the subject's preview to all photos; class is that of the class
    preview to the base model's image of the same seed, which is the preview at step 0. The subject
    rises as it is learned, the class falls as it is lost.
    """

    def __init__(self, encode: Encode, photos: list[Path], folder: Path):
        """folder: where the base model's image is kept for a resumed run."""
        self.encode = encode
        self.photos = encode(map(images.read, photos))
        self.base_class = folder / "class-base.png"
        self.scores = {}

    @classmethod
    def create(cls, args: argparse.Namespace, sdxl: SDXL, out: Path) -> "Validation":
        photos, _ = find_subject_photos(args.photos)
        photos = list(dict.fromkeys(photos))
        return cls(choose_encoder(sdxl, args.dino), photos, out / "previews")

    def begin(self, log: Log) -> None:
        """Take the run's log, with the scores of before an interruption."""
        self.log = log
        for row in log.rows:
            if row.get("subject") is not None:
                self.scores[row["step"]] = {name: row[name] for name in SCORES}

    def add(self, step: int, subject: Image.Image, class_: Image.Image) -> dict[str, float]:
        """Score the previews of a step."""
        if step == 0:
            self.base_class.parent.mkdir(exist_ok=True)
            png.save(class_, self.base_class, {})
        base = self.encode([images.read(self.base_class)])
        subject_score = fidelity(self.encode([subject]), self.photos)
        class_score = fidelity(self.encode([class_]), base)
        scores = {
            "subject": round(float(subject_score), 6),
            "class": round(float(class_score), 6),
        }
        self.scores[step] = scores
        self.log.add_scores(step, scores)
        cli.log(f"step {step}: subject {scores['subject']:.3f}, class {scores['class']:.3f}")
        return scores

    def best(self) -> int | None:
        """The step with the highest mean of both scores, the earliest of equal ones, or None.

        Step 0 does not count: there, the class is itself and nothing is trained.
        """
        trained = [step for step in self.scores if step]
        return max(trained, key=lambda step: sum(self.scores[step].values()), default=None)

    def log_best(self) -> None:
        step = self.best()
        if step is None:
            return
        lora = self.base_class.with_name(f"step-{step:06d}.safetensors")
        scores = self.scores[step]
        cli.log(
            f"the best preview by the mean of both scores is that of step {step}: "
            f"subject {scores['subject']:.3f}, class {scores['class']:.3f}"
            + (f" ({lora})" if lora.exists() else "")
        )

    def draw(self, curve: Image.Image, steps: int) -> Image.Image:
        """Draw the scores, from 0 to 1 over the whole height, into the loss curve of `steps`."""
        draw = ImageDraw.Draw(curve)
        left, right, top, bottom = 52, curve.width - 10, 16, curve.height - 24  # sheets.curve
        draw.text((right + 3, top - 6), "1", INK)
        draw.text((right + 3, bottom - 6), "0", INK)
        for name in SCORES:
            points = []
            for step, scores in sorted(self.scores.items()):
                x = left + step / max(steps, 1) * (right - left)
                points.append((x, bottom - max(scores[name], 0) * (bottom - top)))
            if len(points) > 1:
                draw.line(points, fill=COLOURS[name], width=2)
                draw.text((left + 4, points[0][1] - 16), name, COLOURS[name])
        return curve
