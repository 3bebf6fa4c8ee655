"""Draw pictures from a prompt, or from a prompt and a picture.

python sample.py "a photo of a sks dog on a beach" --lora out/my-dog/lora.safetensors --seed 0 --out out/beach.png
python sample.py "a watercolor of a sks dog" --image photo.jpg --strength 0.6
python sample.py --like out/beach.png                     make it again
python sample.py --prompts prompts.txt --count 10 --lora ... --out out/set/        a data set: pictures and metadata.jsonl
torchrun --nproc-per-node 4 sample.py ...                 several pictures, on several GPUs at once
"""

from pathlib import Path

from alchemy import cli
from alchemy.command import inspecting, pace, results, together
from alchemy.extras import distributed
from alchemy.formats.text import read_text


def parse(argv):
    p = cli.parser(__doc__)
    p.add_argument(
        "prompt", nargs="?", help=f"what to draw (default: the example subject {cli.PLACE})"
    )
    p.add_argument(
        "--out",
        default="out/samples",
        metavar="PATH",
        help="folder, or a .png file (default: out/samples)",
    )
    p.add_argument(
        "--count",
        type=cli.COUNT,
        default=1,
        metavar="N",
        help="pictures, of seeds --seed, --seed + 1, ... (default: 1)",
    )
    p.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt a line: --count pictures of each, with metadata.jsonl, which train.py --captions reads; what is there is not drawn again",
    )
    p.add_argument(
        "--image",
        metavar="FILE",
        help="a picture to start from (Img2Img); it is scaled and cropped to --size",
    )
    p.add_argument(
        "--strength",
        type=cli.STRENGTH,
        metavar="S",
        help=cli.by_checkpoint("strength", "above 0, to 1: how far back to noise the picture goes"),
    )
    p.add_argument(
        "--like",
        metavar="PICTURE",
        help="take every setting from this picture's text chunk; other flags override",
    )
    cli.add_checkpoint(p)
    cli.add_drawing(p)
    p.add_argument(
        "--merge",
        action="store_true",
        help="add the LoRAs to the weights before drawing: they cost nothing then, and the last digits are others",
    )
    inspecting.add_flags(p)
    args = given = p.parse_args(argv)
    if args.prompts and (args.prompt or args.like or cli.is_picture(Path(args.out))):
        raise ValueError("--prompts goes without a prompt and --like, and --out is then a folder")
    if args.like:
        from alchemy.formats.png import facts_of

        facts = facts_of(args.like)
        if facts.get("script") != "sample.py":
            raise ValueError(
                f"--like {args.like}: {facts.get('script', 'another tool')} made it; only pictures by sample.py can be made again so"
            )
        p.set_defaults(
            **{k: v for k, v in facts.items() if k in vars(args) and k not in results.PLACES}
        )
        args = p.parse_args(argv)
        args.size, args.lora = (
            tuple(args.size),
            given.lora or args.lora,
        )  # --lora replaces, it does not add
        args.embedding = given.embedding or args.embedding
    if given.strength is not None and not args.image:
        raise ValueError("--strength is of a picture to start from; --image names it")
    together.drawing(args)
    if args.prompt is None and not args.prompts:
        args.prompt = "a photo of a {token} {class_word} ".format(**cli.EXAMPLE) + cli.PLACE
        args.lora = args.lora or cli.default_lora()
    return args


def places(out, seeds):
    """A free path for each seed: in the folder out, or, where out is a file, that file, numbered by seed if there are several."""
    if not cli.is_picture(out):
        return [cli.free_path(out / f"{seed:04d}.png") for seed in seeds]
    return [
        cli.free_path(out if len(seeds) == 1 else out.with_stem(f"{out.stem}-{seed}"))
        for seed in seeds
    ]


def jobs(args, out):
    """(prompt, seed, path) of every picture; of a data set, those that are there already too."""
    if not args.prompts:
        seeds = range(args.seed, args.seed + args.count)
        return [(args.prompt, seed, path) for seed, path in zip(seeds, places(out, seeds))]
    lines = [line.strip() for line in read_text(args.prompts).split("\n")]
    prompts = [line for line in lines if line for _ in range(args.count)]
    if not prompts:
        raise ValueError(f"{args.prompts}: no prompt in it")
    return [(prompt, args.seed + k, out / f"{k:05d}.png") for k, prompt in enumerate(prompts)]


def end(args, out, page, wanted):
    """What is left to do when all is drawn."""
    from alchemy.command import dataset

    if page and not any(page.iterdir()):
        inspecting.take_back(page)
    if args.prompts:
        cli.wrote(dataset.write_list(out, wanted))


def main(argv=None):
    args = parse(argv)
    out = Path(args.out)
    wanted = jobs(args, out)
    cli.folder(out.parent if cli.is_picture(out) else out)

    from PIL import Image, ImageOps
    from alchemy.command import fitting
    from alchemy import images, pipeline, sampling, samplers
    from alchemy.command import dataset
    from alchemy.formats import png

    if args.prompts:
        dataset.check_list(out, wanted)
    page = inspecting.page_folder(args, out.parent if cli.is_picture(out) else out)
    if page:
        from alchemy.extras.inspect.page import Recorder, write
    image = args.image and images.read(args.image)
    sdxl = cli.load(args)
    fitting.settle(args, sdxl)
    # Before a prompt is encoded: text encoders may have adapters too.
    cli.put_loras(
        sdxl,
        args.lora,
        args.embedding,
        [args.negative_prompt, *(prompt for prompt, *_ in wanted)],
        args.merge,
    )
    size, unconditional, options = pipeline.resolve_options(
        sdxl, args.negative_prompt, args.size, cli.drawing(args)
    )
    strength = sdxl.defaults["strength"] if args.strength is None else args.strength
    image = image and ImageOps.fit(image, size[::-1], Image.LANCZOS)
    grid = samplers.find_sampler(options["sampler"]).timesteps(
        sdxl.schedule, options["steps"], options.get("spacing"), strength if image else 1.0
    )
    cli.say(
        f"{options['sampler']}: {pace.ran(sdxl.schedule, grid, options['steps'])}, {size[1]}x{size[0]}"
    )

    facts = (
        results.facts_of(args)
        | {
            "script": "sample.py",
            "size": size,
            "strength": strength,
            "count": 1,
            "digests": dataset.digests(args),
        }
        | options
    )
    missing = [
        job
        for job in wanted
        if not (
            args.prompts and dataset.is_there(job[2], facts | {"prompt": job[0], "seed": job[1]})
        )
    ][distributed.rank_slice()]
    distributed.barrier()  # all have seen what is there, before any draws
    conditioning = {
        prompt: sdxl.encode_prompt([prompt], size)
        for prompt in dict.fromkeys(prompt for prompt, *_ in missing)
    }
    sdxl.free("text_encoders")  # the UNet can use the memory
    for prompt, seed, path in (
        dataset.keeping_list(out, wanted, missing)
        if args.prompts and not distributed.rank()
        else missing
    ):
        recorder = page and Recorder(
            sdxl,
            prompt,
            len(grid),
            negative_prompt=args.negative_prompt,
            full=args.inspect_full,
            **options,
        )

        def bar(steps):
            return cli.progress(
                pace.drawing(args, sdxl, recorder.follow(steps) if recorder else steps),
                len(grid),
                f"seed {seed}",
            )

        picture = pipeline.sample(
            sdxl,
            conditioning[prompt],
            unconditional,
            seed,
            size,
            image=image,
            strength=strength,
            progress=bar,
            **options,
        )
        png.save(picture, path, facts | {"prompt": prompt, "seed": seed})
        if recorder:
            where = page if len(wanted) == 1 else page / path.stem
            paths = write(
                where, prompt, [("", recorder, picture)], facts | {"prompt": prompt, "seed": seed}
            )
        cli.wrote(path, *(paths if recorder else ()))
    distributed.barrier()
    if not distributed.rank():
        end(args, out, page, wanted)


if __name__ == "__main__":
    cli.run(main)
