"""Generate images from a prompt, or from a prompt and an image.

python sample.py                                      the example subject, on the miniature
python sample.py "a photo of a sks dog on a beach" --lora out/my-dog --out out/beach.png
python sample.py "a watercolor of a sks dog" --image photo.jpg --strength 0.6
python sample.py --like out/beach.png --lora out/my-dog      the same image again
python sample.py --prompts prompts.txt --count 10 --out out/set     a set with metadata.jsonl
torchrun --nproc-per-node 4 sample.py ...             several images, on several GPUs at once
"""

import _signal

if __name__ == "__main__":  # Ctrl-C during the imports, that of signal too: no traceback
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from alchemy import cli
from alchemy.extras import distributed

if TYPE_CHECKING:
    from PIL.Image import Image

    from alchemy.extras.image_sets import Job
    from alchemy.extras.inspect.page import Recorder
    from alchemy.sdxl import SDXL


def parser() -> cli.Parser:
    p = cli.parser(__doc__)
    add = p.group("")
    add("prompt", f"what to generate (default: the example subject {cli.EXAMPLE_SCENE})", nargs="?")
    add("--out", "folder, or a .png file (default: out/samples)", default="out/samples")
    text = "number of images, with the seeds --seed, --seed + 1, ... (default: 1)"
    add("--count", text, type=cli.COUNT, default=1, metavar="N")
    text = "file with one prompt per line: --count images of each and metadata.jsonl, which "
    text += "train.py --captions reads; a second call continues the set"
    add("--prompts", text, metavar="FILE")
    text = "image to start from (Img2Img); it is scaled and cropped to --size"
    add("--image", text, metavar="FILE")
    text = cli.by_checkpoint("strength", "how far the image is noised, above 0 and up to 1")
    add("--strength", text, type=cli.STRENGTH, metavar="S")
    text = "repeat the settings of this image, which sample.py wrote; other flags override them"
    add("--like", text, metavar="IMAGE")
    text = "add the LoRAs to the weights first: faster steps, equal results but for rounding"
    add("--merge", text, action="store_true")
    cli.add_checkpoint(p)
    cli.add_sampling(p)
    cli.add_inspect(p)
    return p


def parse(argv: list[str] | None) -> Namespace:
    p = parser()
    args = cli.parse(p, argv)
    if args.prompts and (args.prompt or args.like or cli.is_image_path(Path(args.out))):
        raise ValueError("--prompts: leave out the prompt and --like, and give a folder as --out")
    if args.strength is not None and not args.image:
        raise ValueError("--strength needs an image to start from; give it with --image")
    if args.like:
        from alchemy.extras import image_sets

        values = image_sets.read_like(args.like, p, args)
        args = p.parse_over(argv, values)
        args.lora = values.get("lora", args.lora)
    if args.image and not Path(args.image).exists():  # before a checkpoint is downloaded
        raise ValueError(f"{args.image}: no such file")
    cli.check_sampling(args)
    cli.choose_seed(args)
    if args.prompt is None and not args.prompts:
        args.prompt = f"a photo of a {cli.EXAMPLE_TOKEN} {cli.EXAMPLE_CLASS} {cli.EXAMPLE_SCENE}"
        args.lora = args.lora or cli.default_lora()
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    out = Path(args.out)
    folder = out.parent if cli.is_image_path(out) else out
    # Several runs may add images to a folder at once, but only one to a set.
    with (
        cli.output_folder(folder, lock=bool(args.prompts)),
        cli.page_folder(args, folder) as page,
    ):
        generate(args, folder, page)


def load(args: Namespace, prompts: list[str]) -> "tuple[SDXL, dict]":
    """The checkpoint with the LoRAs, and the sampling options with its defaults."""
    from alchemy import pipeline
    from alchemy.extras import memory

    # Add the LoRAs before a prompt is encoded: they may change that too.
    sdxl = cli.load(args)
    used = [*prompts, args.negative_prompt]
    cli.apply_loras(sdxl, args.lora, args.embedding, used, merge=args.merge)
    options = pipeline.resolve_options(sdxl, **cli.sampling_options(args))
    args.size = pipeline.resolve_size(sdxl, args.size)
    memory.choose_memory_mode(args, sdxl)
    return sdxl, options


def generate(args: Namespace, folder: Path, page: Path | None) -> None:
    from alchemy import pipeline
    from alchemy.extras import image_sets, memory

    # List the images, load the checkpoint, and note all that determines an image.
    jobs = image_sets.list_jobs(args)
    if args.prompts:
        image_sets.check_list(folder, jobs)
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    sdxl, options = load(args, prompts)
    start, strength = read_start(args, sdxl.defaults["strength"])
    timesteps = cli.timesteps(args, sdxl, options, strength)
    metadata = cli.metadata(args) | options
    metadata |= {"script": "sample.py", "strength": strength, "count": 1}
    metadata["digests"] = image_sets.file_digests(args)
    if args.like:
        image_sets.warn_of_changed_files(args, metadata["digests"])

    # Leave out what a set has already, and take this process's share of the rest.
    missing = jobs
    if args.prompts:
        missing = [job for job in jobs if not image_sets.is_done(job, metadata)]
    count = f"{cli.count_of(len(missing), 'image')} of {args.size[1]}x{args.size[0]}"
    what = cli.describe_steps(sdxl.schedule, timesteps, options["steps"])
    cli.log(f"{cli.describe(sdxl, args)}: {count}, {options['sampler']}, {what}")
    mine = missing[distributed.rank_slice()]
    distributed.barrier()  # all have seen what exists before one writes

    # Encode each prompt once, then free the text encoders: the UNet can use the memory.
    conditioning = {prompt: sdxl.encode_prompt([prompt], args.size) for prompt in prompts}
    unconditional = sdxl.encode_prompt([args.negative_prompt], args.size)
    sdxl.free("text_encoders")

    # Generate and save one image after the other.
    total = len(timesteps) * len(mine)
    estimate = cli.Estimate(total, f"{cli.count_of(len(mine), 'image')} of {len(timesteps)} steps")
    follow = partial(cli.follow_steps, args, sdxl, total=len(timesteps), estimate=estimate)
    result = folder
    for job in mine:
        recorder = new_recorder(args, sdxl, job, len(timesteps), options) if page else None
        with cli.suggest_when_out_of_memory(partial(memory.suggest_flags, args, sdxl)):
            image = pipeline.sample(
                sdxl,
                conditioning[job.prompt],
                unconditional,
                job.seed,
                args.size,
                image=start,
                strength=strength,
                progress=partial(follow, name=f"seed {job.seed}", recorder=recorder),
                **options,
            )
        result = save(args, jobs, job, image, metadata, page, recorder)
    distributed.barrier()
    if page and not mine:
        cli.log("all images exist already, so there is no page")
    if args.prompts and not distributed.rank():
        cli.log_written(image_sets.write_list(folder, jobs))
    if not distributed.rank():
        cli.log_main(result if len(jobs) == 1 else page if page and mine else folder)


def read_start(args: Namespace, strength: float) -> "tuple[Image | None, float]":
    """--image, scaled and cropped to --size, and its strength; None and 1.0 without one."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    from alchemy import images

    if not args.image:
        return None, 1.0
    image = ImageOps.fit(images.read(args.image), args.size[::-1], Resampling.LANCZOS)
    return image, strength if args.strength is None else args.strength


def new_recorder(
    args: Namespace, sdxl: "SDXL", job: "Job", total: int, options: dict
) -> "Recorder":
    """Of the steps of an image, for --inspect."""
    from alchemy.extras.inspect.page import Recorder

    options = options | {"negative_prompt": args.negative_prompt, "full": args.inspect_full}
    return Recorder(sdxl, job.prompt, total, **options)


def save(
    args: Namespace,
    jobs: list["Job"],
    job: "Job",
    image: "Image",
    metadata: dict,
    page: Path | None,
    recorder: "Recorder | None",
) -> Path:
    """Write an image, its page, and the list of its set. Returns what to open."""
    from alchemy import files
    from alchemy.extras import image_sets
    from alchemy.formats import png

    metadata = metadata | {"prompt": job.prompt, "seed": job.seed}
    write = files.replace if args.prompts else files.create
    path = png.save(image, job.path, metadata, write)
    cli.log_written(path)
    result = path
    if page:
        from alchemy.extras.inspect.page import write_page

        inner = page if len(jobs) == 1 else page / path.stem
        paths = write_page(inner, job.prompt, [("", recorder, image)], metadata)
        cli.log_written(*paths)
        result = paths[-1]
    if args.prompts and not distributed.rank():
        image_sets.write_list(path.parent, jobs)  # of use even if the run is stopped
    return result


if __name__ == "__main__":
    cli.run(main)
