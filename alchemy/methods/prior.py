"""Prior preservation with class pictures: DreamBooth (Ruiz et al. 2023, eq. 2).

    loss = error(subject) + λ · error(class)

The class term is the same error on pictures of the class that the model itself drew before it was taught: what the class word meant,
it is to mean still. Beside it stands alchemy/train.py's way, which needs no pictures.
"""
import torch

from .. import loop
from ..data import Batch
from ..formats import png
from ..train import errors

FIRST_SEED = 10 ** 6  # of the class pictures: not those that previews are drawn with


def class_pictures(sdxl, prompt, folder, count, size=None):
    """Yield the paths of `count` pictures of the prompt, 0000.png and on, in a folder; those that are not there yet are drawn.

    Raises ValueError where one in the folder was drawn from another prompt.
    """
    for k in range(count):
        path = folder / f"{k:04d}.png"
        facts = {"prompt": prompt, "seed": FIRST_SEED + k, "weights": str(sdxl.source)}
        if not path.exists():
            png.save(loop.text_to_image(sdxl, prompt, size=size, seed=FIRST_SEED + k), path, facts)
        elif png.facts_of(path).get("prompt") != prompt:
            raise ValueError(f"{path} was drawn from {png.facts_of(path).get('prompt')!r}, not from {prompt!r}; name another folder")
        yield path


def join(one, other):
    """Two batches as one."""
    return Batch(*(a + b if isinstance(a, list) else torch.cat([a, b]) for a, b in zip(*(batch.__dict__.values() for batch in (one, other)))))


def loss(sdxl, batch, class_batch, prompts, prior_weight=1.0, gamma=5.0):
    """The loss above, a scalar. Both terms are means, so λ means the same for any two batch sizes; they go through the network together."""
    subject, prior = errors(sdxl, join(batch, class_batch), prompts, gamma).split([len(batch.t), len(class_batch.t)])
    return subject.mean() + prior_weight * prior.mean()
