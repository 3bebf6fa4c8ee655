"""Prior preservation with class pictures: DreamBooth (Ruiz et al. 2023, eq. 2).

    loss = error(subject) + λ · error(class)

The class term is the same error on pictures of the class that the model itself drew before it was taught: what the class word meant,
it is to mean still. Beside it stands alchemy/train.py's way, which needs no pictures.
"""

from functools import partial

import torch

from .. import pipeline, sampling
from ..dataset import Batch
from ..formats import png
from ..extras.optimizations import cached_steps
from ..training import denoising_loss

FIRST_SEED = 10**6  # of the class pictures: not those that previews are drawn with
DECIDE = ("sampler", "steps", "guidance")


def class_pictures(sdxl, prompt, folder, count, size=None, facts=None):
    """[(path, facts)] of `count` pictures of the prompt, 0000.png and on, in a folder, of which some may be there and none has to be.

    facts: what else decides how they look. Raises ValueError where one in the folder was drawn with other settings.
    """
    facts = (
        {"prompt": prompt, "weights": str(sdxl.source), "size": size or sdxl.size}
        | {k: sdxl.defaults[k] for k in DECIDE}
        | (facts or {})
    )
    pictures = [(folder / f"{k:04d}.png", facts | {"seed": FIRST_SEED + k}) for k in range(count)]
    for path, facts in pictures:
        if path.exists():
            png.check(path, facts)
    return pictures


def draw(sdxl, pictures):
    """A generator that draws pictures of class_pictures, there or not, and yields the path of each."""
    told = None
    for path, facts in pictures:
        told = told or [sdxl.encode_prompt([p], facts["size"]) for p in (facts["prompt"], None)]
        sdxl.free("text_encoders")  # encoded once; the UNet can use the memory
        png.save(
            pipeline.sample(
                sdxl,
                *told,
                facts["seed"],
                facts["size"],
                progress=partial(cached_steps, sdxl.unet),
                **{k: facts[k] for k in DECIDE},
            ),
            path,
            facts,
        )
        yield path


def join(one, other):
    """Two batches as one."""
    return Batch(
        *(
            a + b if isinstance(a, list) else torch.cat([a, b])
            for a, b in zip(*(batch.__dict__.values() for batch in (one, other)))
        )
    )


def loss(sdxl, batch, class_batch, prompts, prior_weight=1.0, gamma=5.0):
    """The loss above, a scalar. Both terms are means, so λ means the same for any two batch sizes; they go through the network together."""
    subject, prior = denoising_loss(sdxl, join(batch, class_batch), prompts, gamma).split(
        [len(batch.t), len(class_batch.t)]
    )
    return subject.mean() + prior_weight * prior.mean()
