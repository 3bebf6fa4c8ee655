"""What train.py teaches: pictures and prompts, encoded once, and the loss of a step. With --check, one picture stands for all of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

from .. import cli, dataset, images
from ..methods import captions, masks, prior, textual_inversion
from ..sdxl import Conditioning
from ..training import denoising_loss, loss
from ..extras import distributed

UNRELATED = "a photo of a car"


@dataclass(frozen=True)
class Lesson:
    """prompts[prompt]: its Conditioning, of one, None's too. shown: the prompts of previews. loss_of(step, part): see alchemy.training.train.
    error_at(t): the plain error, with no weight and no prior, of the very first batch at timestep t."""

    prompts: object
    shown: list
    loss_of: Callable
    error_at: Callable


def live(args):
    """Whether text encoders learn, or what they are given, so that prompts have to be encoded at each step."""
    return args.text_encoders or args.method == "textual-inversion"


def named(args):
    """The prompt with the subject's name, and the one with the class alone; of a new word, all that it is taught with."""
    if args.method == "textual-inversion":
        return [
            template.format(args.token)
            for template in (textual_inversion.STYLE if args.style else textual_inversion.OBJECT)
        ]
    return [
        args.caption.replace("{}", name)
        for name in (f"{args.token} {args.class_word}", args.class_word)
    ]


def listed(args):
    """(path, caption) of each picture; what of the folder is left out is said."""
    if args.captions:
        pictures = captions.read(args.photos)
        if missing := captions.unlisted(args.photos, pictures):
            cli.say(
                f"{len(missing)} pictures of {args.photos} are not in its metadata.jsonl and are left out ({', '.join(missing[:3])})"
            )
        return pictures
    found, skipped = captions.find_photos(args.photos)
    for name in skipped:
        cli.say(f"skipped {name}: not a JPEG, PNG or WebP")
    return [(path, named(args)[0]) for path in found]


def told(args, sdxl, prompts):
    """{prompt: Conditioning of one}, None's too: on the CPU, where thousands have room, or, where they change, encoded when asked for."""
    if live(args):
        return textual_inversion.Live(sdxl, args.size)
    made = {prompt: sdxl.encode_prompt([prompt], args.size) for prompt in (*prompts, None)}
    return {prompt: Conditioning(*(part.cpu() for part in c.parts())) for prompt, c in made.items()}


def at_timestep(sdxl, draw, prompts):
    """The error_at of a Lesson."""

    def error(t):
        batch = draw(0, 0)
        return float(
            denoising_loss(sdxl, replace(batch, t=batch.t * 0 + t), prompts, 0).mean().detach()
        )

    return error


def encoded(args, sdxl, pictures):
    """(path, caption, (H,W) of the crops) of each picture to data.Photos, in order."""

    def one(path, caption, size):
        mask = (
            masks.mask_of(args.mask, path, sdxl, args.class_word or args.init_word)
            if args.mask
            else None
        )
        return dataset.encode(sdxl, path, size, caption, args.mirror, mask)

    some = pictures[:1] if args.check else pictures
    return list(cli.progress((one(*picture) for picture in some), len(some), "encoding"))


def stream(args, sdxl, photos, seed):
    """dataset.make_batcher of this rank's batches."""
    return dataset.make_batcher(
        sdxl,
        photos,
        args.size,
        seed,
        args.batch,
        args.accumulation,
        distributed.rank(),
        distributed.world(),
    )


def subject(args, sdxl, pictures):
    """A few photos of one subject, kept apart from its class."""
    prompt, of_class = named(args)
    of_its_class = (
        class_pictures(args, sdxl, of_class) if args.class_pictures and not args.check else ()
    )  # those there are looked at first
    photos = encoded(args, sdxl, [(*picture, args.size) for picture in pictures])
    prompts, drawn = told(args, sdxl, (prompt, of_class, UNRELATED)), None
    if args.class_pictures:
        drawn = photos if args.check else class_photos(args, sdxl, of_class, of_its_class)
    cli.say(
        f"{len(pictures)} photos, {prompt!r}, kept apart from {of_class!r} with weight {args.prior_weight:g}"
        + (f", by {args.class_pictures} pictures of it" if drawn else "")
    )
    draw = stream(args, sdxl, photos, args.seed)
    shown, error_at = [prompt, of_class, UNRELATED], at_timestep(sdxl, draw, prompts)
    if drawn is None:
        return Lesson(
            prompts,
            shown,
            lambda step, part: loss(
                sdxl, draw(step, part), prompts, of_class, args.prior_weight, args.snr_gamma
            ),
            error_at,
        )
    beside = stream(args, sdxl, drawn, args.seed + prior.FIRST_SEED)  # with noise of their own
    return Lesson(
        prompts,
        shown,
        lambda step, part: prior.loss(
            sdxl, draw(step, part), beside(step, part), prompts, args.prior_weight, args.snr_gamma
        ),
        error_at,
    )


def inversion(args, sdxl, pictures):
    """A few photos of a thing or a style, for which there is to be a word."""
    word, prompts = args.init_word or args.class_word, named(args)
    if any(
        args.token.lower() in template
        for template in (*textual_inversion.OBJECT, *textual_inversion.STYLE, UNRELATED)
    ):
        raise ValueError(
            f"--token {args.token!r} stands in the very prompts that it is taught with: choose another, such as <my-dog>"
        )
    textual_inversion.add_word(
        sdxl, args.token, textual_inversion.start_rows(sdxl, word, args.vectors)
    )
    if any(sdxl.tokenizers[0].truncated_text(prompt) for prompt in prompts):
        raise ValueError(
            f"--vectors {args.vectors} are too many: the word has to fit, with {max(prompts, key=len)!r} around it, into the 77 tokens of a prompt"
        )
    photos = encoded(args, sdxl, [(*picture, args.size) for picture in pictures])
    cli.say(
        f"{len(pictures)} photos, {args.token!r} learns from {word!r} on, {args.vectors} vectors in each text encoder"
    )
    changing = told(args, sdxl, prompts)
    draw = textual_inversion.stream(
        stream(args, sdxl, photos, args.seed),
        prompts,
        args.seed,
        distributed.rank(),
        distributed.world(),
    )
    return Lesson(
        changing,
        [prompts[0], prompts[0].replace(args.token, word), UNRELATED],
        lambda step, part: denoising_loss(sdxl, draw(step, part), changing, args.snr_gamma).mean(),
        at_timestep(sdxl, draw, changing),
    )


def class_pictures(args, sdxl, prompt):
    """The class pictures (prior.class_pictures), in their folder."""
    folder = cli.folder(
        args.class_folder or Path(args.out) / "class",
        "--class-folder" if args.class_folder else "--out",
    )
    facts = {k: getattr(args, k) for k in ("vae", "config", "revision", "dtype", "fp8_base")}
    return prior.class_pictures(sdxl, prompt, folder, args.class_pictures, args.size, facts)


def class_photos(args, sdxl, prompt, pictures):
    """The class pictures as data.Photos; those that are not there yet are drawn by the model as it is, a share of them by each rank."""
    missing = [picture for picture in pictures if not picture[0].exists()][distributed.rank_slice()]
    try:
        distributed.barrier()  # all have seen which are missing, and the folder is there
        for _ in cli.progress(prior.draw(sdxl, missing), len(missing), "class pictures"):
            pass
        distributed.barrier()
    except KeyboardInterrupt:  # there is no run yet that --resume could go on with
        cli.say("the class pictures that are drawn stay: the same command goes on with them")
        raise
    return [dataset.encode(sdxl, path, args.size, prompt) for path, _ in pictures]


def captioned(args, sdxl, pictures):
    """Pictures with captions of their own, in buckets of their shapes."""
    buckets, cell = {}, 8 * sdxl.vae_scale_factor
    sizes = [
        captions.bucket(images.read(path).size[::-1], args.size[0] * args.size[1], cell)
        for path, _ in pictures
    ]
    for size, photo in zip(
        sizes, encoded(args, sdxl, [(*picture, size) for picture, size in zip(pictures, sizes)])
    ):
        buckets.setdefault(size, []).append(photo)
    texts = list(dict.fromkeys(caption for _, caption in pictures))
    prompts = told(args, sdxl, texts[:1] if args.check else texts)
    shapes = ", ".join(f"{sizes.count((h, w))} of {w}x{h}" for h, w in sorted(set(sizes)))
    cli.say(f"{len(pictures)} pictures with {len(texts)} captions: {shapes}")
    draw = captions.stream(
        sdxl,
        buckets,
        args.seed,
        args.batch,
        args.accumulation,
        args.caption_dropout,
        distributed.rank(),
        distributed.world(),
    )
    return Lesson(
        prompts,
        texts[:3],
        lambda step, part: denoising_loss(sdxl, draw(step, part), prompts, args.snr_gamma).mean(),
        at_timestep(sdxl, draw, prompts),
    )
