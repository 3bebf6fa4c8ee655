"""train.py --validate: how like the photos are the previews, and is the class still what it was?"""

from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image
from torch import Tensor

from .. import images
from .encoders import load_dino, load_toy
from .evaluate import fidelity

# PIL images to features of length 1.
Encode = Callable[[Iterable[Image.Image]], Tensor]


def choose_encoder(name: str, device: str = "cpu") -> Encode:
    """DINO from a folder or Hub id, or "toy": the classifier of the miniature's world, offline."""
    return load_toy() if name == "toy" else load_dino(name, device)


class Validation:
    """The scores of a run's previews: {step: {"subject": ..., "class": ..., "score": ...}}.

    subject is the mean cosine of the subject's previews to all photos, class that of the class
    previews to the base model's images of the same seeds; score is their mean. The subject rises
    as it is learned, the class falls as it is lost: the best step has the highest score.
    """

    def __init__(self, encode: Encode, photos: list[Path], base_class: list[Image.Image]):
        self.encode = encode
        self.photos = encode(map(images.read, photos))
        self.base_class = encode(base_class)
        self.scores = {}

    def add(
        self, step: int, subject: list[Image.Image], class_: list[Image.Image]
    ) -> dict[str, float]:
        """Score the previews of a step; returns its row."""
        likeness = float(fidelity(self.encode(subject), self.photos).mean())
        # Images of the same seed are compared, not all pairs: an unchanged class scores 1.
        prior = float((self.encode(class_) * self.base_class).sum(1).mean())
        self.scores[step] = {
            "subject": likeness,
            "class": prior,
            "score": (likeness + prior) / 2,
        }
        return self.scores[step]

    def best(self) -> int | None:
        """The step with the highest score, the earliest of equal ones; None before the first."""
        return max(self.scores, key=lambda step: self.scores[step]["score"], default=None)
