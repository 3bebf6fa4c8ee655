"""Put a learned subject into a scene: the unmodified model draws the scene with the class word, the class is segmented, and a masked
Img2Img with the LoRA puts the subject there. Nothing outside the mask changes.

    python insert.py "a photo of a dog on a beach" --class-word dog --token sks --lora out/my-dog/lora.safetensors --out out/insert/
    python insert.py "a photo of a dog in a park" --image park.jpg --mask mask.png --class-word dog --token sks --lora ...
"""

from pathlib import Path

from alchemy import cli
from alchemy.command import inspecting, pace, results, together
from alchemy.extras import distributed

NAMES = (
    *(
        f"{name}.png"
        for name in ("scene", "soft_mask", "mask", "feathered", "crop", "drawn", "sheet")
    ),
    "facts.json",
)  # beside the result


def parse(argv):
    p = cli.parser(__doc__)
    p.add_argument(
        "prompt",
        nargs="?",
        help=f"the scene, with the class word in it (default: the example subject's, {cli.PLACE})",
    )
    p.add_argument(
        "--class-word",
        metavar="WORD",
        help="what is to be replaced (default: dog, where no prompt is given)",
    )
    p.add_argument(
        "--token",
        metavar="WORD",
        help="the rare word that the LoRA was taught with (default: sks, or the word of --embedding)",
    )
    p.add_argument(
        "--out",
        default="out/insert",
        metavar="PATH",
        help="folder, or a .png file for the result, the rest in a folder of that name (default: out/insert)",
    )
    g = p.add_argument_group("stage 1: the scene and the mask")
    g.add_argument(
        "--image",
        metavar="FILE",
        help="a picture of your own instead of a drawn scene, of any size",
    )
    g.add_argument(
        "--mask",
        metavar="FILE",
        help="white where the subject goes, black where nothing may change; of the picture's size",
    )
    g.add_argument(
        "--threshold",
        type=cli.SHARE,
        metavar="X",
        help=cli.by_checkpoint("threshold", "of the soft mask, 0 to 1"),
    )
    g.add_argument(
        "--dilate",
        type=cli.SHARE,
        metavar="X",
        help=cli.by_checkpoint("dilate", "grow the mask by this share of the shorter side"),
    )
    g = p.add_argument_group("stage 2: the subject")
    g.add_argument(
        "--strength",
        type=cli.STRENGTH,
        metavar="S",
        help=cli.by_checkpoint("strength", "above 0, to 1: how far back to noise the region goes"),
    )
    g.add_argument(
        "--crop",
        action=cli.BooleanOptionalAction,
        help="work on a part around the mask, at full resolution (default: where the picture is large)",
    )
    cli.add_checkpoint(p)
    cli.add_drawing(p)
    inspecting.add_flags(p)
    args = p.parse_args(argv)
    if distributed.world() > 1:
        raise ValueError("insert.py makes one picture, in one process: leave torchrun away")
    if args.prompt is None:
        args.class_word = args.class_word or cli.EXAMPLE["class_word"]
        args.prompt = f"a photo of a {args.class_word} {cli.PLACE}"
        args.lora = args.lora or (None if args.embedding else cli.default_lora())
    if not args.class_word:
        raise ValueError(
            "--class-word is missing: the word in the prompt that the subject takes the place of"
        )
    if args.class_word.lower() not in args.prompt.lower():
        raise ValueError(
            f"the class word {args.class_word!r} is not in the prompt {args.prompt!r}; put it there, or name another with --class-word"
        )
    if args.image and args.size:
        raise ValueError("--size is of a drawn scene; the picture of --image keeps its own")
    if not args.lora and not args.embedding:
        raise ValueError(
            "--lora is missing: the file that train.py wrote. (The checkpoint of --method full cannot stand for it: "
            "stage 1 needs the model as it was. For insert.py, teach a LoRA or a word)"
        )
    if not args.token and len(args.embedding or ()) + bool(args.lora) > 1:
        raise ValueError(
            "--token is missing: of several files with words of their own, which names the subject?"
        )
    if args.mask and (args.threshold, args.dilate) != (None, None):
        raise ValueError(
            "--threshold and --dilate are of a mask that is found; --mask gives its own"
        )
    together.drawing(args)
    return args


def write(made, result, folder, facts):
    """The result, every intermediate, a sheet of them side by side, and the facts."""
    from alchemy.files import save_json
    from alchemy.formats import png
    from alchemy.extras.inspect import sheets

    soft = sheets.grey(made.soft)
    row = [
        ("scene", made.scene),
        ("soft mask", soft),
        ("may change", sheets.outlined(made.scene, made.feathered)),
        ("result", made.result),
    ]
    pictures = (
        made.scene,
        soft,
        sheets.grey(made.mask),
        sheets.grey(made.feathered),
        made.crop,
        made.generated,
        sheets.sheet([row]),
    )
    paths = [result] + [folder / name for name in NAMES]
    for path, picture in zip(paths, (made.result, *pictures)):
        png.save(picture, path, facts)
    save_json(facts, paths[-1])
    return paths


def places(out):
    """Where the result goes, and the folder for the rest: both free, of the next number where files of that name are there already."""
    if cli.is_picture(out):
        cli.folder(out.parent)
        out = cli.free_path(out)
        return out, cli.folder(out.with_suffix(""))
    number, folder = 0, out
    while any((folder / name).exists() for name in ("result.png", *NAMES)):
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
    return cli.folder(folder) / "result.png", folder


def main(argv=None):
    args = parse(argv)
    result, folder = places(Path(args.out))
    page = inspecting.page_folder(args, folder)

    import numpy as np
    import torch
    import alchemy
    from alchemy.command import fitting
    from alchemy import images, samplers
    from alchemy.extras.inspect.seam import seam

    image = args.image and images.read(args.image)
    mask = args.mask and torch.from_numpy(np.array(images.read(args.mask, "L"))).float() / 255
    sdxl = cli.load(args)
    fitting.settle(args, sdxl)
    size = image.size[::-1] if image else args.size or sdxl.size
    if args.mask and mask.shape != size:
        raise ValueError(
            f"{args.mask} is {mask.shape[1]}x{mask.shape[0]}, the picture {size[1]}x{size[0]}: a mask has to be of the picture's size"
        )
    # Without --token, the word of the one embedding is what is put in.
    words = cli.put_loras(
        sdxl,
        args.lora,
        args.embedding,
        args.token and [args.prompt, args.token, args.negative_prompt],
    )
    args.token = args.token or (words or [cli.EXAMPLE["token"]])[0]
    chosen = {
        k: sdxl.defaults[k] if getattr(args, k) is None else getattr(args, k)
        for k in ("sampler", "steps", "guidance", "strength", "threshold", "dilate")
    }
    sampler, started = samplers.find_sampler(chosen["sampler"]), []

    def timesteps(strength):
        return sampler.timesteps(sdxl.schedule, chosen["steps"], args.spacing, strength)

    def bar(steps):
        second = bool(image or started)
        started.append(second)
        steps = pace.drawing(args, sdxl, watcher.follow(steps) if page else steps)
        return cli.progress(
            steps,
            len(timesteps(chosen["strength"] if second else 1.0)),
            "stage 2" if second else "stage 1",
        )

    if page:
        from alchemy.extras.inspect import placing

        totals = [len(timesteps(1.0)), len(timesteps(chosen["strength"]))]
        watcher = placing.Watcher(
            sdxl,
            args.prompt,
            args.class_word,
            args.token,
            totals,
            image=image,
            mask=mask,
            size=size,
            negative_prompt=args.negative_prompt,
            full=args.inspect_full,
            **cli.drawing(args) | chosen,
        )
    made = alchemy.insert(
        sdxl,
        args.prompt,
        args.class_word,
        args.token,
        image=image,
        mask=mask,
        seed=args.seed,
        size=args.size,
        crop=args.crop,
        negative_prompt=args.negative_prompt,
        progress=bar,
        spacing=args.spacing,
        eta=args.eta,
        **chosen,
    )
    second, edge = timesteps(chosen["strength"]), seam(made)
    cli.say(f"stage 2 ran {pace.ran(sdxl.schedule, second, chosen['steps'])}")
    cli.say(
        f"changed {float((made.feathered > 0).float().mean()):.1%} of the picture; seam {edge:.2f} (the jump across the mask's edge over the scene's own)"
    )
    facts = (
        results.facts_of(args)
        | chosen
        | {
            "script": "insert.py",
            "size": size,
            "first_timestep": second[0][0],
            "box": made.box,
            "seam": round(edge, 4),
        }
    )
    paths = write(made, result, folder, facts)
    cli.wrote(*paths, *(placing.write_page(page, watcher, made, facts) if page else ()))


if __name__ == "__main__":
    cli.run(main)
