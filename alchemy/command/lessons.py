"""What train.py teaches: pictures and prompts, encoded once, and the loss of a step."""
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Mapping

from .. import command, data, images
from ..methods import captions, masks, prior, textual_inversion
from ..sdxl import Conditioning
from ..train import errors, loss

UNRELATED = "a photo of a car"


@dataclass(frozen=True)
class Lesson:
    """pictures: (path, caption) of each. prompts: {prompt: Conditioning of one} that previews show; loss_of(step, part): see alchemy.train.train."""
    pictures: list
    prompts: Mapping
    unconditional: Conditioning
    loss_of: Callable


def named(args):
    """The prompt with the subject's name, and the one with the class alone."""
    return [args.caption.replace("{}", name) for name in (f"{args.token} {args.class_word}", args.class_word)]


def told(sdxl, prompts, size):
    return {prompt: sdxl.encode_prompt([prompt], size) for prompt in prompts}


def encoded(args, sdxl, pictures):
    """(path, caption, (H,W) of the crops) of each picture to data.Photos, in order."""
    def one(path, caption, size):
        mask = masks.mask_of(args.mask, path, sdxl, args.class_word or args.init_word) if args.mask else None
        return data.encode(sdxl, path, size, caption, args.mirror, mask)
    return list(command.progress((one(*picture) for picture in pictures), len(pictures), "encoding"))


def subject(args, sdxl):
    """A few photos of one subject, kept apart from its class."""
    found, skipped = data.find_photos(args.photos)
    for name in skipped:
        command.say(f"skipped {name}: not a JPEG, PNG or WebP")
    prompt, of_class = named(args)
    photos = encoded(args, sdxl, [(path, prompt, args.size) for path in found])
    drawn = class_photos(args, sdxl, of_class) if args.class_pictures and args.prior_weight else None
    prompts, unconditional = told(sdxl, (prompt, of_class, UNRELATED), args.size), sdxl.encode_prompt([None], args.size)
    command.say(f"{len(photos)} photos, {prompt!r}, kept apart from {of_class!r} with weight {args.prior_weight:g}" +
                (f", by {len(drawn)} pictures of it" if drawn else ""))
    pictures = [(path, prompt) for path in found]
    draw = data.stream(sdxl, photos, args.size, args.seed, args.batch, args.accumulation)
    if drawn is None:
        return Lesson(pictures, prompts, unconditional, lambda step, part: loss(sdxl, draw(step, part), prompts, of_class, args.prior_weight, args.snr_gamma))
    beside = data.stream(sdxl, drawn, args.size, args.seed + prior.FIRST_SEED, args.batch, args.accumulation)  # with noise of their own
    return Lesson(pictures, prompts, unconditional, lambda step, part: prior.loss(
        sdxl, draw(step, part), beside(step, part), prompts, args.prior_weight, args.snr_gamma))


def inversion(args, sdxl):
    """A few photos of a thing or a style, for which there is to be a word."""
    found, _ = data.find_photos(args.photos)
    word = args.init_word or args.class_word
    textual_inversion.add_word(sdxl, args.token, textual_inversion.start_rows(sdxl, word, args.vectors))
    prompts = [template.format(args.token) for template in (textual_inversion.STYLE if args.style else textual_inversion.OBJECT)]
    photos = encoded(args, sdxl, [(path, prompts[0], args.size) for path in found])
    command.say(f"{len(photos)} photos, {args.token!r} learns from {word!r} on, {args.vectors} vectors in each text encoder")
    live = textual_inversion.Live(sdxl, prompts, args.size)
    draw = textual_inversion.stream(data.stream(sdxl, photos, args.size, args.seed, args.batch, args.accumulation), prompts, args.seed)
    shown = textual_inversion.Live(sdxl, (prompts[0], prompts[0].replace(args.token, word), UNRELATED), args.size)
    return Lesson([(path, prompts[0]) for path in found], shown, sdxl.encode_prompt([None], args.size),
                  lambda step, part: errors(sdxl, draw(step, part), live, args.snr_gamma).mean())


def class_photos(args, sdxl, prompt):
    """The class pictures as data.Photos; drawn, where they are not there yet, by the model as it is."""
    folder = command.folder(args.class_folder or Path(args.out) / "class")
    paths = command.progress(prior.class_pictures(sdxl, prompt, folder, args.class_pictures, args.size), args.class_pictures, "class pictures")
    return [data.encode(sdxl, path, args.size, prompt) for path in paths]


def captioned(args, sdxl):
    """Pictures with captions of their own, in buckets of their shapes."""
    pictures, buckets, cell = captions.read(args.photos), {}, 8 * sdxl.factor
    sizes = [captions.bucket(images.read(path).size[::-1], args.size[0] * args.size[1], cell) for path, _ in pictures]
    for size, photo in zip(sizes, encoded(args, sdxl, [(*picture, size) for picture, size in zip(pictures, sizes)])):
        buckets.setdefault(size, []).append(photo)
    texts = list(dict.fromkeys(caption for _, caption in pictures))
    prompts = told(sdxl, texts, args.size) | {None: sdxl.encode_prompt([None], args.size)}
    shapes = ", ".join(f"{len(photos)} of {w}x{h}" for (h, w), photos in sorted(buckets.items()))
    command.say(f"{len(pictures)} pictures with {len(texts)} captions: {shapes}")
    draw = captions.stream(sdxl, buckets, args.seed, args.batch, args.accumulation, args.caption_dropout)
    return Lesson(pictures, {text: prompts[text] for text in texts[:3]}, prompts[None],
                  lambda step, part: errors(sdxl, draw(step, part), prompts, args.snr_gamma).mean())
