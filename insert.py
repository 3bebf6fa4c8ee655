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
from functools import partial
from pathlib import Path

from alchemy import cli
from alchemy.extras import distributed

IMAGES = ("scene", "soft_mask", "mask", "feathered", "crop", "generated", "sheet")
NAMES = (*(f"{name}.png" for name in IMAGES), "metadata.json")  # written beside the result


def parser() -> cli.Parser:
    p = cli.parser(__doc__)
    add = p.add_argument
    text = f"the scene, with the class word in it (default: the example's, {cli.EXAMPLE_SCENE})"
    add("prompt", nargs="?", help=text)
    text = "the word in the prompt that the subject replaces (default: from the LoRA)"
    add("--class-word", metavar="WORD", help=text)
    text = "the rare word that names the subject (default: from the LoRA or embedding, or sks)"
    add("--token", metavar="WORD", help=text)
    text = "folder, or a .png file for the result and a folder of that name for the rest "
    add("--out", default="out/insert", metavar="PATH", help=text + "(default: out/insert)")

    add = p.add_argument_group("stage 1: the scene and the mask").add_argument
    add("--image", metavar="FILE", help="an image instead of a generated scene, of any size")
    text = "white where the subject goes, black where nothing may change; of the image's size"
    add("--mask", metavar="FILE", help=text)
    text = cli.by_checkpoint("threshold", "of the soft mask, 0 to 1")
    add("--threshold", type=cli.SHARE, metavar="X", help=text)
    text = cli.by_checkpoint("dilate", "grow the mask by this share of the shorter side")
    add("--dilate", type=cli.SHARE, metavar="X", help=text)

    add = p.add_argument_group("stage 2: the subject").add_argument
    text = cli.by_checkpoint("strength", "above 0, to 1: how far the region is noised")
    add("--strength", type=cli.STRENGTH, metavar="S", help=text)
    text = "work on a part around the mask, at full resolution (default: if the image is large)"
    add("--crop", action=cli.BooleanOptionalAction, help=text)
    cli.add_checkpoint(p)
    cli.add_sampling(p)
    cli.add_inspect(p)
    return p


def parse(argv: list[str] | None) -> cli.argparse.Namespace:
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


def name_subject(args: cli.argparse.Namespace) -> None:
    """Take class word and token from the LoRA where they are not given, and check the prompt."""
    if args.lora:
        cli.find_loras(args)
    trained = cli.lora_metadata(args.lora[0][0]) if args.lora else {}
    several = len(args.embedding or ()) + bool(args.lora) > 1
    if not args.token and several:
        raise ValueError("--token is missing: with several files, which token is the subject's?")
    for name, flag in (("class_word", "--class-word"), ("token", "--token")):
        given, value = getattr(args, name), trained.get(f"alchemy.{name}")
        if value and not given:
            setattr(args, name, value)
        elif value and given and given.lower() != value.lower() and len(args.lora) == 1:
            cli.log(
                f"warning: {flag} is {given!r}, but {args.lora[0][0]} was trained with {value!r}"
            )
    if not args.class_word:
        raise ValueError("--class-word is missing: which word of the prompt does it replace?")
    if args.token is None and not args.embedding:
        args.token = cli.EXAMPLE_TOKEN
    if args.token:
        args.token = cli.single_token(args.token, args.class_word)
        # The scene is generated from the class word alone; the token comes in stage 2.
        pattern = rf"(?<!\w){re.escape(args.token)}\s+(?={re.escape(args.class_word)}(?!\w))"
        cleaned = re.sub(pattern, "", args.prompt, flags=re.IGNORECASE)
        if cleaned != args.prompt:
            cli.log(f"the scene is generated without the token: {cleaned!r}")
            args.prompt = cleaned
    if not re.search(rf"(?<!\w){re.escape(args.class_word)}(?!\w)", args.prompt, re.IGNORECASE):
        raise ValueError(
            f"the class word {args.class_word!r} is not in the prompt {args.prompt!r}; "
            "put it there, or name another with --class-word"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    name_subject(args)
    out = Path(args.out)
    with (
        cli.numbered_folder(out, NAMES, "result.png") as (result, folder),
        cli.page_folder(args, folder) as page,
    ):
        insert(args, result, folder, page)


def insert(args, result: Path, folder: Path, page: Path | None) -> None:
    import numpy as np
    import torch

    import alchemy
    from alchemy import images, samplers
    from alchemy.extras import memory
    from alchemy.extras.inspect.seam import seam

    # Read the user's image and mask, and the checkpoint.
    image = images.read(args.image) if args.image else None
    mask = None
    if args.mask:
        mask = torch.from_numpy(np.array(images.read(args.mask, "L"))).float() / 255
    sdxl = cli.load(args)
    args.size = image.size[::-1] if image else args.size or sdxl.size
    if mask is not None and mask.shape != args.size:
        sizes = [f"{width}x{height}" for height, width in (mask.shape, args.size)]
        raise ValueError(f"{args.mask} is {sizes[0]}, the image {sizes[1]}; resize the mask")
    memory.choose_memory_mode(args, sdxl)
    prompts = args.token and [args.prompt, args.token, args.negative_prompt]
    tokens = cli.apply_loras(sdxl, args.lora, args.embedding, prompts)
    args.token = args.token or tokens[0]

    # Fill in the checkpoint's defaults.
    names = ("sampler", "steps", "guidance", "strength", "threshold", "dilate")
    options = {name: getattr(args, name) for name in names}
    options = {name: sdxl.defaults[name] if v is None else v for name, v in options.items()}
    timesteps = partial(
        samplers.find_sampler(options["sampler"]).timesteps,
        sdxl.schedule,
        options["steps"],
        args.spacing,
    )
    stage_2 = timesteps(options["strength"])
    totals = [len(stage_2)] if image else [len(timesteps(1.0)), len(stage_2)]
    steps = " + ".join(map(str, totals))
    cli.log(f"{cli.describe(sdxl, args)}: {args.size[1]}x{args.size[0]}, {steps} steps")

    # Generate the scene, segment the class, and insert the subject.
    watcher = new_watcher(sdxl, args, timesteps, image, mask, options) if page else None
    stages = list(enumerate(totals, 2 if image else 1))

    def progress(steps):
        stage, total = stages.pop(0)
        name = f"stage {stage}"
        return cli.follow_steps(args, sdxl, steps, total=total, name=name, recorder=watcher)

    with cli.suggest_when_out_of_memory(partial(memory.suggest_flags, args, sdxl)):
        insertion = alchemy.insert(
            sdxl,
            args.prompt,
            args.class_word,
            args.token,
            image=image,
            mask=mask,
            seed=args.seed,
            size=None if image else args.size,
            crop=args.crop,
            negative_prompt=args.negative_prompt,
            progress=progress,
            free_text_encoders=True,
            spacing=args.spacing,
            eta=args.eta,
            **options,
        )

    # Write everything.
    jump = seam(insertion)
    changed = float((insertion.feathered > 0).float().mean())
    cli.log(f"stage 2: {cli.describe_steps(sdxl.schedule, stage_2, options['steps'])}")
    cli.log(f"changed {changed:.1%} of the image; seam {jump:.2f} (contrast at the mask's edge)")
    metadata = cli.metadata(args) | options | {"script": "insert.py", "box": insertion.box}
    metadata |= {"first_timestep": stage_2[0][0], "seam": round(jump, 4)}
    paths = save(insertion, result, folder, metadata)
    if page:
        from alchemy.extras.inspect import insertion_page

        paths += insertion_page.write_insertion_page(page, watcher, insertion, metadata)
    cli.log_written(*paths, main=folder / "sheet.png")


def new_watcher(sdxl, args, timesteps, image, mask, options: dict):
    """The recorder of both stages for --inspect."""
    from alchemy.extras.inspect import insertion_page

    totals = [len(timesteps(1.0)), len(timesteps(options["strength"]))]
    return insertion_page.InsertionRecorder(
        sdxl,
        args.prompt,
        args.class_word,
        args.token,
        totals,
        image=image,
        mask=mask,
        size=args.size,
        negative_prompt=args.negative_prompt,
        full=args.inspect_full,
        **cli.sampling_options(args) | options,
    )


def save(insertion, result: Path, folder: Path, metadata: dict) -> list[Path]:
    """The result, every intermediate image, a sheet of them side by side, and the metadata."""
    from alchemy.extras.inspect import sheets
    from alchemy.files import save_json
    from alchemy.formats import png

    soft_mask = sheets.grey(insertion.soft)
    row = [
        ("scene", insertion.scene),
        ("soft mask", soft_mask),
        ("may change", sheets.outlined(insertion.scene, insertion.feathered)),
        ("result", insertion.result),
    ]
    pictures = (
        insertion.result,
        insertion.scene,
        soft_mask,
        sheets.grey(insertion.mask),
        sheets.grey(insertion.feathered),
        insertion.crop,
        insertion.generated,
        sheets.sheet([row]),
    )
    paths = [result] + [folder / name for name in NAMES]
    for path, picture in zip(paths, pictures, strict=False):
        png.save(picture, path, metadata)
    save_json(metadata, paths[-1])
    return paths


if __name__ == "__main__":
    cli.run(main)
