"""What train.py does by default, as one function for notebooks: a LoRA of one subject."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from .. import lora
from ..arguments import checked, resolve_seed
from ..dataset import encode_image, encode_prompts, make_batcher
from ..insertion import with_token
from ..sdxl import SDXL
from ..training import TrainState, loss, train
from .captions import find_photos
from .prior import teacher_batch


@checked
def train_lora(
    sdxl: SDXL,
    photos: str | Path | Iterable[str | Path],
    class_word: str,
    token: str = "sks",
    *,
    steps: int | None = None,
    rank: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = 0,
) -> Iterator[tuple[int, float]]:
    """Train a LoRA on photos of one subject with prior preservation; yields (step, loss).

    photos: a folder, or paths of images. The LoRA is added to sdxl when the iteration begins;
    alchemy.save_lora writes it. None as an option is the checkpoint's default. For all
    else, see train.py.
    """
    if isinstance(photos, (str, Path)):
        photos, _ = find_photos(photos)
    if not photos:
        raise ValueError("train_lora needs at least one photo")
    defaults = sdxl.defaults
    size = sdxl.size
    seed = resolve_seed(seed)
    class_prompt = f"a photo of a {class_word}"
    subject = with_token(class_prompt, class_word, token)
    encoded = [encode_image(sdxl, path, size, subject) for path in photos]
    prompts = encode_prompts(sdxl, [subject, class_prompt], size)
    get_batch = make_batcher(sdxl, encoded, size, seed, defaults["batch"])
    added = {id(p) for p in lora.add_lora(sdxl, rank or defaults["rank"], seed=seed)}
    parameters = {n: p for n, p in sdxl.unet.named_parameters() if id(p) in added}
    state = TrainState.create(parameters, learning_rate or defaults["learning_rate"], sdxl.dtype)

    def get_loss(step, micro_step):
        batch = get_batch(step, micro_step)
        return loss(sdxl, batch, teacher_batch(sdxl, batch, prompts, class_prompt), prompts)

    yield from train(sdxl, state, get_loss, steps=steps or defaults["training_steps"])
