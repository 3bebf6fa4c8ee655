"""Insert a learned subject into a scene: the two stages of Image-Alchemy (arXiv 2505.10743).

Stage 1: the unmodified model generates the scene from the class word, and the class is segmented.
Stage 2: a masked Img2Img with the LoRA puts the subject there. Nothing changes outside the mask.

    python insert.py                                     the example subject, on the miniature
    python insert.py "a photo of a dog on a beach" --lora out/my-dog --out out/beach
    python insert.py "a photo of a dog in a park" --image park.jpg --mask mask.png --lora ...
"""

import _signal

if __name__ == "__main__":  # Ctrl-C during the imports, that of signal too: no traceback
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import re
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from alchemy import cli
from alchemy.extras import distributed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from alchemy.insertion import Insertion
    from alchemy.sampling import Step
    from alchemy.sdxl import SDXL

IMAGES = ("scene", "soft_mask", "mask", "feathered", "crop", "generated", "sheet")
NAMES = (*(f"{name}.png" for name in IMAGES), "metadata.json")  # written beside the result
OPTIONS = ("sampler", "steps", "guidance", "strength", "threshold", "dilate")


def parser() -> cli.Parser:
    p = cli.parser(__doc__)
    add = p.group("")
    text = f"the scene, with the class word in it (default: the example's, {cli.EXAMPLE_SCENE})"
    add("prompt", text, nargs="?")
    text = "the word in the prompt that the subject replaces (default: from the LoRA)"
    add("--class-word", text, metavar="WORD")
    text = "the rare word that names the subject (default: from the LoRA or embedding, or sks)"
    add("--token", text, metavar="WORD")
    text = "folder, or a .png file for the result and a folder of its name (default: out/insert)"
    add("--out", text, default="out/insert", metavar="PATH")
    add = p.group("stage 1: the scene and the mask")
    add("--image", "an image instead of a generated scene, of any size", metavar="FILE")
    text = "white where the subject goes, black where nothing may change; of the image's size"
    add("--mask", text, metavar="FILE")
    text = cli.by_checkpoint("threshold", "threshold of the soft mask, 0 to 1")
    add("--threshold", text, type=cli.SHARE, metavar="X")
    text = cli.by_checkpoint("dilate", "grow the mask by this share of the shorter side")
    add("--dilate", text, type=cli.SHARE, metavar="X")
    add = p.group("stage 2: the subject")
    text = cli.by_checkpoint("strength", "how far the region is noised, above 0 and up to 1")
    add("--strength", text, type=cli.STRENGTH, metavar="S")
    text = "work on a part around the mask, at full resolution (default: if the image is large)"
    add("--crop", text, action=cli.BooleanOptionalAction)
    cli.add_checkpoint(p)
    cli.add_sampling(p)
    cli.add_inspect(p)
    return p


def parse(argv: list[str] | None) -> Namespace:
    args = cli.parse(parser(), argv)
    if distributed.world() > 1:
        raise ValueError("insert.py makes one image in one process; run it without torchrun")
    if args.prompt is None:
        args.class_word = args.class_word or cli.EXAMPLE_CLASS
        args.prompt = f"a photo of a {args.class_word} {cli.EXAMPLE_SCENE}"
        if not args.embedding:
            args.lora = args.lora or cli.default_lora()
    if not args.lora and not args.embedding:
        raise ValueError(
            "--lora is missing: the file or folder that train.py wrote. (A checkpoint of --method "
            "full cannot be used here: stage 1 needs the unmodified model)"
        )
    if args.image and args.size:
        raise ValueError("--size has no effect with --image, which keeps its own size")
    if args.mask and (args.threshold, args.dilate) != (None, None):
        raise ValueError("--threshold and --dilate have no effect with --mask, which is used as is")
    cli.check_sampling(args)
    cli.choose_seed(args)
    return args


def name_subject(args: Namespace) -> None:
    """Take class word and token from the LoRA where they are not given, and check the prompt."""
    from alchemy.formats.tensors import open_safetensors

    trained, files = {}, list(args.embedding or ())
    if args.lora:
        cli.find_loras(args)
        files.append(args.lora[0][0])
        trained = open_safetensors(files[-1]).metadata() or {}
    if not args.token and len(files) > 1:
        raise ValueError("--token is missing: with several files, which token is the subject's?")
    for name in ("class_word", "token"):
        given, value = getattr(args, name), trained.get(f"alchemy.{name}")
        if value and not given:
            setattr(args, name, value)
        elif value and given.lower() != value.lower() and len(args.lora) == 1:
            flag = cli.flag_of(name)
            cli.log(f"warning: {flag} is {given!r}, but {files[-1]} was trained with {value!r}")
    if not args.class_word:
        raise ValueError("--class-word is missing: which word of the prompt does it replace?")
    if args.token is None and not args.embedding:
        args.token = cli.EXAMPLE_TOKEN
    word = rf"{re.escape(args.class_word)}(?!\w)"
    if args.token:
        args.token = cli.single_token(args.token, args.class_word)
        # The scene is generated from the class word alone; the token comes in stage 2.
        pattern = rf"(?<!\w){re.escape(args.token)}\s+(?={word})"
        cleaned = re.sub(pattern, "", args.prompt, flags=re.IGNORECASE)
        if cleaned != args.prompt:
            cli.log(f"the scene is generated without the token: {cleaned!r}")
            args.prompt = cleaned
    if not re.search(rf"(?<!\w){word}", args.prompt, re.IGNORECASE):
        raise ValueError(
            f"the class word {args.class_word!r} is not in the prompt {args.prompt!r}; "
            "put it there, or name another with --class-word"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    name_subject(args)
    with (
        cli.numbered_folder(Path(args.out), NAMES, "result.png") as (result, folder),
        cli.page_folder(args, folder) as page,
    ):
        insert(args, result, folder, page)


def load(args: Namespace) -> "tuple[SDXL, dict]":
    """The checkpoint with the LoRA, and the options of alchemy.insert that the flags leave open."""
    from alchemy import images
    from alchemy.extras import memory

    # Read the user's image and mask, and the checkpoint.
    image = images.read(args.image) if args.image else None
    sdxl = cli.load(args)
    args.size = image.size[::-1] if image else args.size or sdxl.size
    mask = images.as_mask(args.mask, args.size) if args.mask else None
    memory.choose_memory_mode(args, sdxl)
    prompts = args.token and [args.prompt, args.token, args.negative_prompt]
    tokens = cli.apply_loras(sdxl, args.lora, args.embedding, prompts)
    args.token = args.token or tokens[0]

    # Fill in the checkpoint's defaults.
    options = {}
    for name in OPTIONS:
        value = getattr(args, name)
        options[name] = sdxl.defaults[name] if value is None else value
    options |= {"image": image, "mask": mask, "negative_prompt": args.negative_prompt}
    return sdxl, options | {"spacing": args.spacing, "eta": args.eta}


def insert(args: Namespace, result: Path, folder: Path, page: Path | None) -> None:
    import alchemy
    from alchemy.extras import memory

    # Load the checkpoint, and count the steps of each stage; an image leaves out the first.
    sdxl, options = load(args)
    is_given = options["image"] is not None
    stage_2 = cli.timesteps(args, sdxl, options, options["strength"])
    totals = [len(cli.timesteps(args, sdxl, options, 1.0)), len(stage_2)]
    stages = list(enumerate(totals, 1))[1 if is_given else 0 :]
    steps = " + ".join(str(total) for _, total in stages)
    cli.log(f"{cli.describe(sdxl, args)}: {args.size[1]}x{args.size[0]}, {steps} steps")

    # Generate the scene, segment the class, and insert the subject.
    subject = (sdxl, args.prompt, args.class_word, args.token)
    recorder = None
    if page:
        from alchemy.extras.inspect import insertion_page

        recorder = insertion_page.InsertionRecorder(
            *subject, totals, size=args.size, full=args.inspect_full, **options
        )

    total = sum(total for _, total in stages)
    estimate = cli.Estimate(total, f"{steps} steps")

    def progress(steps: "Iterable[Step]") -> "Iterator[Step]":
        stage, total = stages.pop(0)
        shown = dict(name=f"stage {stage}", recorder=recorder, estimate=estimate)
        return cli.follow_steps(args, sdxl, steps, total=total, **shown)

    with cli.suggest_when_out_of_memory(partial(memory.suggest_flags, args, sdxl)):
        insertion = alchemy.insert(
            *subject,
            seed=args.seed,
            size=None if is_given else args.size,
            crop=args.crop,
            progress=progress,
            free_text_encoders=True,
            **options,
        )

    # Write everything.
    metadata = cli.metadata(args) | {name: options[name] for name in OPTIONS}
    metadata |= {"first_timestep": stage_2[0][0]}
    cli.log(f"stage 2: {cli.describe_steps(sdxl.schedule, stage_2, options['steps'])}")
    paths = save(insertion, result, folder, metadata)
    if page:
        paths += insertion_page.write_insertion_page(page, recorder, insertion, metadata)
    cli.log_written(*paths, main=folder / "sheet.png")


def save(insertion: "Insertion", result: Path, folder: Path, metadata: dict) -> list[Path]:
    """The result, every intermediate image, a sheet of them side by side, and the metadata, to
    which the box and the seam are added."""
    from alchemy.extras.inspect import sheets
    from alchemy.extras.inspect.seam import seam
    from alchemy.files import save_json
    from alchemy.formats import png

    jump, changed = seam(insertion), float((insertion.feathered > 0).float().mean())
    cli.log(f"changed {changed:.1%} of the image; seam {jump:.2f} (contrast at the mask's edge)")
    metadata |= {"script": "insert.py", "box": insertion.box, "seam": round(jump, 4)}
    scene, soft_mask = insertion.scene, sheets.grey(insertion.soft)
    may_change = sheets.outlined(scene, insertion.feathered)
    row = [("scene", scene), ("soft mask", soft_mask), ("may change", may_change)]
    sheet = sheets.sheet([[*row, ("result", insertion.result)]])
    masks = [soft_mask, sheets.grey(insertion.mask), sheets.grey(insertion.feathered)]
    images = [scene, *masks, insertion.crop, insertion.generated, sheet]
    paths = [folder / name for name in NAMES]
    for path, image in zip([result, *paths], [insertion.result, *images], strict=False):
        png.save(image, path, metadata)
    save_json(metadata, paths[-1])
    return [result, *paths]


if __name__ == "__main__":
    cli.run(main)
