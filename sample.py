"""Generate images from a prompt, or from a prompt and an image.

python sample.py                                      the example subject, on the miniature
python sample.py "a photo of a sks dog on a beach" --lora out/my-dog --out out/beach.png
python sample.py "a watercolor of a sks dog" --image photo.jpg --strength 0.6
python sample.py --like out/beach.png                 the same image again
python sample.py --prompts prompts.txt --count 10 --out out/set     a set with metadata.jsonl
torchrun --nproc-per-node 4 sample.py ...             several images, on several GPUs at once
"""

import _signal

if __name__ == "__main__":  # Ctrl-C during the imports, that of signal too: no traceback
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

from functools import partial
from pathlib import Path

from alchemy import cli
from alchemy.extras import distributed


def parser() -> cli.Parser:
    p = cli.parser(__doc__)
    add = p.add_argument
    add("prompt", nargs="?", help=f"(default: the example subject {cli.EXAMPLE_SCENE})")
    text = "folder, or a .png file (default: out/samples)"
    add("--out", default="out/samples", metavar="PATH", help=text)
    text = "number of images, with the seeds --seed, --seed + 1, ... (default: 1)"
    add("--count", type=cli.COUNT, default=1, metavar="N", help=text)
    text = "file with one prompt per line: --count images of each and metadata.jsonl, which "
    text += "train.py --captions reads; a second call continues the set"
    add("--prompts", metavar="FILE", help=text)
    text = "image to start from (Img2Img); it is scaled and cropped to --size"
    add("--image", metavar="FILE", help=text)
    text = cli.by_checkpoint("strength", "above 0, to 1: how far the image is noised")
    add("--strength", type=cli.STRENGTH, metavar="S", help=text)
    text = "take the settings from this image by sample.py; other flags override them"
    add("--like", metavar="IMAGE", help=text)
    cli.add_checkpoint(p)
    cli.add_sampling(p)
    text = "add the LoRAs to the weights first: faster steps, results equal but for rounding"
    p.add_argument("--merge", action="store_true", help=text)
    cli.add_inspect(p)
    return p


def parse(argv: list[str] | None) -> cli.argparse.Namespace:
    p = parser()
    args = cli.parse(p, argv)
    if args.prompts and (args.prompt or args.like or cli.is_image_path(Path(args.out))):
        raise ValueError("--prompts: leave out the prompt and --like, and give a folder as --out")
    given_strength = args.strength
    if args.like:
        from alchemy.extras import image_sets

        values = image_sets.read_like(args.like, p, args)
        args = p.parse_over(argv, values)
        args.lora = values.get("lora", args.lora)
    if given_strength is not None and not args.image:
        raise ValueError("--strength needs an image to start from; give it with --image")
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


def generate(args: cli.argparse.Namespace, folder: Path, page: Path | None) -> None:
    from PIL import Image, ImageOps

    from alchemy import files, images, pipeline, samplers
    from alchemy.extras import image_sets, memory
    from alchemy.formats import png

    # Load the checkpoint and add the LoRAs, before a prompt is encoded: they may change that too.
    jobs = image_sets.list_jobs(args)
    if args.prompts:
        image_sets.check_list(folder, jobs)
    start = images.read(args.image) if args.image else None
    sdxl = cli.load(args)
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    cli.apply_loras(
        sdxl, args.lora, args.embedding, [*prompts, args.negative_prompt], merge=args.merge
    )

    # Fill in the checkpoint's defaults.
    options = pipeline.resolve_options(sdxl, **cli.sampling_options(args))
    args.size = size = pipeline.resolve_size(sdxl, args.size)
    memory.choose_memory_mode(args, sdxl)
    strength = 1.0
    if start:
        strength = sdxl.defaults["strength"] if args.strength is None else args.strength
        start = ImageOps.fit(start, size[::-1], Image.LANCZOS)
    sampler = samplers.find_sampler(options["sampler"])
    timesteps = sampler.timesteps(sdxl.schedule, options["steps"], args.spacing, strength)
    metadata = cli.metadata(args) | options
    metadata |= {"script": "sample.py", "strength": strength, "count": 1}
    metadata["digests"] = image_sets.file_digests(args)

    # Leave out what a set has already, and take this process's share of the rest.
    jobs_left = jobs
    if args.prompts:
        jobs_left = [job for job in jobs if not image_sets.is_done(job, metadata)]
    count = f"{cli.count_of(len(jobs_left), 'image')} of {size[1]}x{size[0]}"
    what = cli.describe_steps(sdxl.schedule, timesteps, options["steps"])
    cli.log(f"{cli.describe(sdxl, args)}: {count}, {options['sampler']}, {what}")
    jobs_left = jobs_left[distributed.rank_slice()]
    distributed.barrier()  # all have seen what exists before one writes

    # Encode each prompt once, then free the text encoders: the UNet can use the memory.
    conditioning = {prompt: sdxl.encode_prompt([prompt], size) for prompt in prompts}
    unconditional = sdxl.encode_prompt([args.negative_prompt], size)
    sdxl.free("text_encoders")

    follow = partial(cli.follow_steps, args, sdxl, total=len(timesteps))
    suggest = partial(memory.suggest_flags, args, sdxl)
    for job in jobs_left:
        recorder = None
        if page:
            recorder = new_recorder(sdxl, args, job.prompt, len(timesteps), options)
        with cli.suggest_when_out_of_memory(suggest):
            image = pipeline.sample(
                sdxl,
                conditioning[job.prompt],
                unconditional,
                job.seed,
                size,
                image=start,
                strength=strength,
                progress=partial(follow, name=f"seed {job.seed}", recorder=recorder),
                **options,
            )
        image_metadata = metadata | {"prompt": job.prompt, "seed": job.seed}
        write = files.replace if args.prompts else files.create
        path = png.save(image, job.path, image_metadata, write)
        cli.log_written(path)
        if recorder:
            write_page(page, len(jobs), path, recorder, image, image_metadata)
        if args.prompts and not distributed.rank():
            image_sets.write_list(folder, jobs)  # of use even if the run is stopped

    distributed.barrier()
    if page and not jobs_left:
        cli.log("all images exist already, so there is no page")
    if args.prompts and not distributed.rank():
        cli.log_written(image_sets.write_list(folder, jobs))


def new_recorder(sdxl, args, prompt, total, options):
    from alchemy.extras.inspect.page import Recorder

    full, negative_prompt = args.inspect_full, args.negative_prompt
    return Recorder(sdxl, prompt, total, negative_prompt=negative_prompt, full=full, **options)


def write_page(page: Path, count: int, path: Path, recorder, image, metadata: dict) -> None:
    """The page of one image; of several, each has a folder of its own."""
    from alchemy.extras.inspect import page as pages

    folder = page if count == 1 else page / path.stem
    paths = pages.write_page(folder, metadata["prompt"], [("", recorder, image)], metadata)
    cli.log_written(*paths, main=paths[-1])


if __name__ == "__main__":
    cli.run(main)
