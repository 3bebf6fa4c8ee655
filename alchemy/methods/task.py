"""From the flags of train.py to a TrainingTask: what the batches, the prior and the prompts are;
and a look at them before the training."""

import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import cli, dataset, images
from ..dataset import Batch, GetBatch, TrainingImage
from ..extras import distributed
from ..extras.inspect import preflight
from ..formats import png
from ..sdxl import SDXL
from ..training import GetLoss, Prompts, TrainingTask, TrainState, train
from . import captions, flags, masks, prior, textual_inversion

UNRELATED_PROMPT = "a photo of a car"  # of the previews: what training should not change
Example = tuple[Path, str]  # an image and its prompt


def encode_every_step(args: Namespace) -> bool:
    """Whether prompts cannot be encoded in advance, because what encodes them is trained."""
    return args.text_encoders or args.method == "textual-inversion"


def list_examples(args: Namespace) -> list[Example]:
    """(path, prompt) of each image; logs skipped files."""
    if args.captions:
        examples = captions.read(args.photos)
        missing = captions.unlisted(args.photos, examples)
        if missing:
            names = ", ".join(missing[:3])
            cli.log(f"skipped {cli.count_of(len(missing), 'image')} without a caption ({names})")
        return examples
    photos, skipped = find_subject_photos(args.photos)
    for name in skipped:
        cli.log(f"skipped {name}: not a JPEG, PNG, WebP, BMP or TIFF image")
    if args.method == "textual-inversion":
        prompt = textual_inversion.build_prompts(args.token, args.style)[0]
    else:
        prompt = args.caption.replace("{}", f"{args.token} {args.class_word}")
    return [(path, prompt) for path in photos]


def find_subject_photos(folder: str | Path) -> tuple[list[Path], list[str]]:
    """The photos of a subject and the names of skipped files. Of kohya's layout, a folder with
    "10_sks dog" inside, each photo 10 times."""
    photos, skipped = [], []
    for repeats, _, inner in flags.kohya_folders(folder) or [(1, "", folder)]:
        found, others = captions.find_photos(inner)
        photos += found * repeats
        skipped += others
    return photos, skipped


def prepare(args: Namespace, sdxl: SDXL, examples: list[Example], out: Path) -> TrainingTask:
    """Encode images and prompts. --check encodes the first image only."""
    if args.captions:
        return prepare_captions(args, sdxl, examples)
    if args.method == "textual-inversion":
        return prepare_inversion(args, sdxl, examples)
    return prepare_subject(args, sdxl, examples, out)


def prepare_captions(args: Namespace, sdxl: SDXL, examples: list[Example]) -> TrainingTask:
    """Images with captions, in buckets of their shapes."""
    area = args.size[0] * args.size[1]
    cell = 8 * sdxl.vae_scale_factor
    used = examples[:1] if args.check else examples
    sizes = [captions.bucket(images.read(path).size[::-1], area, cell) for path, _ in used]
    buckets = {}
    for size, photo in zip(sizes, encode_photos(args, sdxl, used, sizes), strict=True):
        buckets.setdefault(size, []).append(photo)
    texts = list(dict.fromkeys(caption for _, caption in used))
    shown = args.preview_prompt or texts[:3]
    shapes = ", ".join(f"{len(buckets[h, w])} of {w}x{h}" for h, w in sorted(buckets))
    count = cli.count_of(len(set(examples)), "image")
    cli.log(f"{count} with {cli.count_of(len(texts), 'caption')}: {shapes}")
    get_batch = captions.make_batcher(
        sdxl,
        buckets,
        args.seed,
        args.batch,
        args.accumulation,
        args.caption_dropout,
        distributed.rank(),
        distributed.world(),
    )
    prompts = encode_prompts(args, sdxl, [*texts, *shown])
    return TrainingTask(without_prior(get_batch), prompts, shown)


def prepare_inversion(args: Namespace, sdxl: SDXL, examples: list[Example]) -> TrainingTask:
    """Photos of an object or a style, for the embedding of a new token."""
    init_word = args.init_word or args.class_word
    templates = textual_inversion.build_prompts(args.token, args.style)
    textual_inversion.start(sdxl, args.token, init_word, args.vectors, templates)
    photos = encode_photos(args, sdxl, examples)
    count = cli.count_of(len(set(examples)), "photo")
    vectors = cli.count_of(args.vectors, "vector")
    cli.log(f"{count}, {args.token!r} starts from {init_word!r}, {vectors} per text encoder")
    shown = args.preview_prompt or [
        templates[0],
        templates[0].replace(args.token, init_word),
        UNRELATED_PROMPT,
    ]
    get_batch = make_batcher(args, sdxl, photos, args.seed)
    get_batch = textual_inversion.vary_prompts(
        get_batch, templates, args.seed, distributed.rank(), distributed.world()
    )
    return TrainingTask(without_prior(get_batch), encode_prompts(args, sdxl, []), shown)


def prepare_subject(
    args: Namespace, sdxl: SDXL, examples: list[Example], out: Path
) -> TrainingTask:
    """Photos of one subject, with prior preservation of its class."""
    _, subject = examples[0]
    class_prompt = args.caption.replace("{}", args.class_word)
    jobs = class_image_jobs(args, sdxl, class_prompt, out)  # refuses others in the folder
    photos = encode_photos(args, sdxl, examples)
    shown = args.preview_prompt or [subject, class_prompt, UNRELATED_PROMPT]
    prompts = encode_prompts(args, sdxl, [subject, class_prompt, *shown])
    count = cli.count_of(len(set(examples)), "photo")
    cli.log(f"{count}, trained as {subject!r}")
    if args.prior_weight:
        weight = f"prior preservation of weight {args.prior_weight:g}"
        cli.log(f"{class_prompt!r} is kept as it is, by {weight}")
    get_class_batch = None
    if args.class_images:
        cli.log(f"{cli.count_of(args.class_images, 'class image')} for prior preservation")
        # They have noise and timesteps of their own. For --check, the photos are as good.
        generated = photos if args.check else encode_class_images(args, sdxl, class_prompt, jobs)
        get_class_batch = make_batcher(args, sdxl, generated, args.seed + prior.FIRST_SEED)

    get_batch = make_batcher(args, sdxl, photos, args.seed)

    def get_batches(step: int, micro_step: int) -> tuple[Batch, Batch | None]:
        batch = get_batch(step, micro_step)
        if not args.prior_weight:
            return batch, None
        if get_class_batch:
            return batch, get_class_batch(step, micro_step)
        teacher = prior.teacher_batch(sdxl, batch, prompts, class_prompt)
        return prior.keep_outside(batch, teacher) if args.mask else batch, teacher

    return TrainingTask(get_batches, prompts, shown)


def without_prior(get_batch: GetBatch) -> Callable[[int, int], tuple[Batch, None]]:
    return lambda step, micro_step: (get_batch(step, micro_step), None)


def make_batcher(args: Namespace, sdxl: SDXL, photos: list[TrainingImage], seed: int) -> GetBatch:
    ranks = distributed.rank(), distributed.world()
    return dataset.make_batcher(
        sdxl, photos, args.size, seed, args.batch, args.accumulation, *ranks
    )


def encode_photos(
    args: Namespace, sdxl: SDXL, examples: list[Example], sizes: Sequence | None = None
) -> list[TrainingImage]:
    """The photos with their masks; each file is encoded once, however often it is listed."""
    used = examples[:1] if args.check else examples
    sizes = dict(zip(used, sizes or [args.size] * len(used), strict=True))
    encoded = {}
    for path, prompt in cli.progress(sizes, len(sizes), "encoding"):
        mask = None
        size = sizes[path, prompt]
        if args.mask:
            mask = masks.mask_of(args.mask, path, sdxl, args.class_word or args.init_word)
        photo = dataset.encode_image(sdxl, path, size, prompt, args.mirror, mask)
        encoded[path, prompt] = photo
    return [encoded[example] for example in used]


def encode_prompts(args: Namespace, sdxl: SDXL, prompts: list[str]) -> Prompts:
    if encode_every_step(args):
        return dataset.EncodeEveryStep(sdxl, args.size)
    return dataset.encode_prompts(sdxl, list(dict.fromkeys(prompts)), args.size)


def class_image_jobs(args: Namespace, sdxl: SDXL, prompt: str, out: Path) -> list[prior.Job]:
    """The class images in their folder; those that exist are checked before anything is encoded."""
    if not args.class_images or args.check:
        return []
    folder = Path(args.class_folder or out / "class")
    if not distributed.rank():
        folder.mkdir(parents=True, exist_ok=True)
    names = ("vae", "model_config", "revision", "dtype", "fp8_base")
    metadata = {name: getattr(args, name) for name in names}
    return prior.class_image_jobs(sdxl, prompt, folder, args.class_images, args.size, metadata)


def encode_class_images(
    args: Namespace, sdxl: SDXL, prompt: str, jobs: list[prior.Job]
) -> list[TrainingImage]:
    """Generate the class images that do not exist yet, each rank a share, and encode all."""
    missing = [job for job in jobs if not job[0].exists()][distributed.rank_slice()]
    distributed.barrier()  # all have seen which are missing, and the folder exists
    try:
        generated = prior.generate_class_images(sdxl, missing)
        for _ in cli.progress(generated, len(missing), "class images"):
            pass
    except KeyboardInterrupt:  # there is no state yet that --resume could continue from
        cli.log("the class images so far are kept; the same command continues with them")
        raise
    distributed.barrier()
    return [dataset.encode_image(sdxl, path, args.size, prompt) for path, _ in jobs]


def inspect_photos(args: Namespace, sdxl: SDXL, examples: Sequence, out: Path) -> None:
    """Log what is odd about photos and token, before anything is computed; with --check, write
    the photos and their crops to check.png."""

    sheet_path = out / "check.png"
    if args.check and sheet_path.exists() and not args.overwrite:
        try:
            png.read_metadata(sheet_path)
        except ValueError:
            raise ValueError(
                f"{sheet_path} was not written by --check; --overwrite replaces it"
            ) from None

    def mask_of(path):
        # Raises where a mask is missing. Segmenting takes the model: one photo stands for all.
        first = args.check and path == examples[0][0]
        if args.mask and (args.mask != "segment" or first):
            return masks.mask_of(args.mask, path, sdxl, args.class_word or args.init_word)
        return None

    lines, sheet = preflight.look(sdxl, examples, args.size, args.captions, mask_of)
    counts = (0, 0)
    if args.token and args.method != "textual-inversion":
        counts = tuple(len(tokenizer.tokens(args.token)) for tokenizer in sdxl.tokenizers)
    if args.check and any(counts) or max(counts) > 3:
        line = f"{args.token!r} has {counts[0]} and {counts[1]} tokens in the two tokenizers"
        if max(counts) > 3:
            line += "; a short rare word, such as sks, is learned more easily"
        lines.append(line)
    for line in lines:
        cli.log(line)
    warnings.filterwarnings("ignore", "prompt too long")  # logged above, with the photo's name
    if args.check:
        png.save(sheet, sheet_path, cli.metadata(args))


def time_step(args: Namespace, sdxl: SDXL, state: TrainState, get_loss: GetLoss) -> None:
    """Log what a step costs: of two, the second; the first warms up and makes the moments."""
    ends = []
    for _ in train(sdxl, state, get_loss, steps=state.step + 2, accumulation=args.accumulation):
        ends.append(time.perf_counter())
    seconds = ends[1] - ends[0]
    total = cli.duration(args.steps * seconds)
    cli.log(f"a step takes {seconds:.1f} s, {cli.count_of(args.steps, 'step')} about {total}")
