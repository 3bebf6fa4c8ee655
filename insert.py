"""Put a learned subject into a scene: the unmodified model draws the scene with the class word, the class is segmented, and a masked
Img2Img with the LoRA puts the subject there. Nothing outside the mask changes.

    python insert.py "a photo of a dog on a beach" --class-word dog --token sks --lora out/my-dog/lora.safetensors --out out/insert/
    python insert.py "a photo of a dog in a park" --image park.jpg --mask mask.png --class-word dog --token sks --lora ...
"""
from pathlib import Path

from alchemy import command


def parse(argv):
    p = command.parser(__doc__)
    p.add_argument("prompt", nargs="?",                                  help=f"the scene, with the class word in it (default: the example subject's, {command.PLACE})")
    p.add_argument("--class-word", metavar="WORD",                       help="what is to be replaced (default: dog, where no prompt is given)")
    p.add_argument("--token",      metavar="WORD",                       help="the rare word that the LoRA was taught with (default: sks)", default="sks")
    p.add_argument("--out",        default="out/insert", metavar="FOLDER", help="(default: out/insert)")
    g = p.add_argument_group("stage 1: the scene and the mask")
    g.add_argument("--image",      metavar="FILE",                       help="a picture of your own instead of a drawn scene, of any size")
    g.add_argument("--mask",       metavar="FILE",                       help="white where the subject goes, black where nothing may change; of the picture's size")
    g.add_argument("--threshold",  type=float, metavar="X",              help=command.by_checkpoint("threshold", "of the soft mask, 0 to 1"))
    g.add_argument("--dilate",     type=float, metavar="X",              help=command.by_checkpoint("dilate", "grow the mask by this share of the shorter side"))
    g = p.add_argument_group("stage 2: the subject")
    g.add_argument("--strength",   type=float, metavar="S",              help=command.by_checkpoint("strength", "above 0, to 1: how far back to noise the region goes"))
    g.add_argument("--crop",       action=command.BooleanOptionalAction, help="work on a part around the mask, at full resolution (default: where the picture is large)")
    command.add_checkpoint(p)
    command.add_drawing(p)
    args = p.parse_args(argv)
    if args.prompt is None:
        args.class_word = args.class_word or command.EXAMPLE["class_word"]
        args.prompt = f"a photo of a {args.class_word} {command.PLACE}"
        args.lora = args.lora or command.default_lora()
    if not args.class_word:
        raise ValueError("--class-word is missing: the word in the prompt that the subject takes the place of")
    if not args.lora:
        raise ValueError("--lora is missing: the file that train.py wrote")
    return args


def write(made, folder, facts):
    """Every intermediate, a sheet of them side by side, and the facts."""
    from alchemy import images
    from alchemy.files import save_json
    from alchemy.report import sheets
    pictures = {"scene": made.scene, "soft_mask": sheets.grey(made.soft), "mask": sheets.grey(made.mask), "feathered": sheets.grey(made.feathered),
                "crop": made.crop, "drawn": made.drawn, "result": made.result}
    row = [("scene", made.scene), ("soft mask", pictures["soft_mask"]), ("may change", sheets.outlined(made.scene, made.feathered)), ("result", made.result)]
    paths = [folder / f"{name}.png" for name in pictures] + [folder / "sheet.png", folder / "facts.json"]
    for path, picture in zip(paths, pictures.values()):
        images.save_png(picture, path, facts)
    images.save_png(sheets.sheet([row]), paths[-2], facts)
    save_json(facts, paths[-1])
    return paths


def free_folder(path):
    """path, or, where it holds a result, path-1, path-2, ..."""
    number, free = 0, path
    while (free / "result.png").exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return command.folder(free)


def main(argv=None):
    args = parse(argv)
    folder = free_folder(Path(args.out))

    import numpy as np
    import torch
    import alchemy
    from alchemy import images
    image = args.image and images.read(args.image)
    mask = args.mask and torch.from_numpy(np.array(images.read(args.mask, "L"))).float() / 255
    sdxl = command.load(args)
    command.put_loras(sdxl, args.lora)
    seen = []

    def bar(steps):
        total = len(sdxl.schedule.grid(args.steps or sdxl.defaults["steps"], args.grid, 1.0 if not seen and not image else strength))
        for step in command.progress(steps, total, "stage 2" if seen or image else "stage 1"):
            yield step
        seen.append(total)

    strength = sdxl.defaults["strength"] if args.strength is None else args.strength
    made = alchemy.insert(sdxl, args.prompt, args.class_word, args.token, image=image, mask=mask, seed=args.seed, size=args.size, strength=strength,
                          threshold=args.threshold, dilate=args.dilate, crop=args.crop, negative_prompt=args.negative_prompt, progress=bar,
                          **command.drawing(args))
    options = {k: args.__dict__[k] or sdxl.defaults[k] for k in ("sampler", "steps", "guidance", "threshold", "dilate")}
    grid = sdxl.schedule.grid(options["steps"], args.grid, strength)
    command.say(f"stage 2 ran {sdxl.schedule.describe(grid, options['steps'])}")
    command.say(f"changed {float((made.feathered > 0).float().mean()):.1%} of the picture; seam {made.seam:.2f} (the jump across the mask's edge over the scene's own)")
    facts = command.settings_of(args) | options | {"strength": strength, "first_timestep": grid[0][0], "box": made.box, "seam": round(made.seam, 4)}
    command.wrote(*write(made, folder, facts))


if __name__ == "__main__":
    command.run(main)
