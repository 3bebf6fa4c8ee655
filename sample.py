"""Draw pictures from a prompt, or from a prompt and a picture.

    python sample.py "a photo of a sks dog on a beach" --lora out/my-dog/lora.safetensors --seed 0 --out out/beach.png
    python sample.py "a watercolor of a sks dog" --image photo.jpg --strength 0.6
    python sample.py --like out/beach.png                     make it again
"""
from pathlib import Path

from alchemy import command


def parse(argv):
    p = command.parser(__doc__)
    p.add_argument("prompt", nargs="?", help=f"what to draw (default: the example subject {command.PLACE})")
    p.add_argument("--out",      default="out/samples", metavar="PATH", help="folder, or a .png file (default: out/samples)")
    p.add_argument("--count",    type=command.COUNT, default=1, metavar="N", help="pictures, of seeds --seed, --seed + 1, ... (default: 1)")
    p.add_argument("--image",    metavar="FILE",                        help="a picture to start from (Img2Img); it is scaled and cropped to --size")
    p.add_argument("--strength", type=command.STRENGTH, metavar="S",    help=command.by_checkpoint("strength", "above 0, to 1: how far back to noise the picture goes"))
    p.add_argument("--like",     metavar="PICTURE",                     help="take every setting from this picture's text chunk; other flags override")
    command.add_checkpoint(p)
    command.add_drawing(p)
    args = given = p.parse_args(argv)
    if args.like:
        from alchemy.formats.png import facts_of
        facts = facts_of(args.like)
        if facts.get("script") != "sample.py":
            raise ValueError(f"--like {args.like}: {facts.get('script', 'another tool')} made it; only pictures by sample.py can be made again so")
        p.set_defaults(**{k: v for k, v in facts.items() if k in vars(args) and k not in ("out", "like")})
        args = p.parse_args(argv)
        args.size, args.lora = tuple(args.size), given.lora or args.lora  # --lora replaces, it does not add
    if given.strength is not None and not args.image:
        raise ValueError("--strength is of a picture to start from; --image names it")
    if args.prompt is None:
        args.prompt = "a photo of a {token} {class_word} ".format(**command.EXAMPLE) + command.PLACE
        args.lora = args.lora or command.default_lora()
    return args


def places(out, seeds):
    """A free path for each seed: in the folder out, or, where out is a file, that file, numbered by seed if there are several."""
    if not command.is_picture(out):
        return [command.free_path(out / f"{seed:04d}.png") for seed in seeds]
    return [command.free_path(out if len(seeds) == 1 else out.with_stem(f"{out.stem}-{seed}")) for seed in seeds]


def main(argv=None):
    args = parse(argv)
    out, seeds = Path(args.out), range(args.seed, args.seed + args.count)
    command.folder(out.parent if command.is_picture(out) else out)

    from PIL import Image, ImageOps
    from alchemy import images, loop, samplers
    from alchemy.formats import png
    image = args.image and images.read(args.image)
    sdxl = command.load(args)
    command.put_loras(sdxl, args.lora)  # before a prompt is encoded: text encoders may have adapters too
    size, unconditional, options = loop.settings(sdxl, args.negative_prompt, args.size, command.drawing(args))
    strength = sdxl.defaults["strength"] if args.strength is None else args.strength
    image = image and ImageOps.fit(image, size[::-1], Image.LANCZOS)
    grid = sdxl.schedule.grid(options["steps"], options.get("grid"), strength if image else 1.0, samplers.find(options["sampler"]).fractional)
    command.say(f"{options['sampler']}: {command.ran(sdxl.schedule, grid, options['steps'])}, {size[1]}x{size[0]}")

    conditioning = sdxl.encode_prompt([args.prompt], size)
    sdxl.free("text_encoders")  # the UNet can use the memory
    facts = command.settings_of(args) | {"script": "sample.py", "size": size, "strength": strength, "count": 1} | options
    for seed, path in zip(seeds, places(out, seeds)):
        def bar(steps):
            return command.progress(steps, len(grid), f"seed {seed}")
        picture = loop.sample(sdxl, conditioning, unconditional, seed, size, image=image, strength=strength, progress=bar, **options)
        png.save(picture, path, facts | {"seed": seed})
        command.wrote(path)


if __name__ == "__main__":
    command.run(main)
