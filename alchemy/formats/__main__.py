"""Write a LoRA file under the names that another tool reads, or merge it into its base. Of names that have no place for alpha, it goes into up.

    python -m alchemy.formats found.safetensors dog.safetensors --to kohya
    python -m alchemy.formats out/my-dog/lora.safetensors dog.safetensors --to diffusers --weights weights/mini
    python -m alchemy.formats out/my-dog/lora.safetensors my-dog-sdxl/ --merge --weights stabilityai/stable-diffusion-xl-base-1.0
"""
from pathlib import Path

from .. import command
from .lora import FACTS, FORMATS, load_lora, networks_in, read_lora, write_lora


def parse(argv):
    p = command.parser(__doc__)
    p.add_argument("source",    metavar="IN",                    help="a LoRA file, in any spelling that is read")
    p.add_argument("target",    metavar="OUT",                   help="the file to write, or, with --merge, the folder; it must not be there yet")
    g = p.add_mutually_exclusive_group(required=True)
    g.add_argument("--to",      choices=FORMATS,                 help="kohya, which all tools read, diffusers or peft")
    g.add_argument("--merge",   action="store_true",             help="write the whole checkpoint with the LoRA in its weights, in the Hub layout")
    p.add_argument("--scale",   type=float, default=1.0, metavar="X", help="of the LoRA that is merged (default: 1)")
    p.add_argument("--weights", metavar="PATH|ID",               help="the checkpoint that it was made for; for --to only its configurations are read (default: SDXL base's)")
    p.add_argument("--config",  metavar="FOLDER",                help="configurations, where --weights is a single file")
    p.add_argument("--dtype",   default="float16", choices=("float32", "bfloat16", "float16"), help="of a merged checkpoint (default: float16)")
    args = p.parse_args(argv)
    if args.merge and not args.weights:
        raise ValueError("--merge needs --weights, the checkpoint that the LoRA goes into")
    if not args.merge and Path(args.target).suffix != ".safetensors":
        raise ValueError(f"{args.target}: the file to write has to end in .safetensors")
    if Path(args.target).exists():
        raise ValueError(f"{args.target} is there already; name another")
    return args


def rename(args):
    import alchemy
    from .checkpoint import BASE, CONFIGS, empty, open_safetensors
    file = open_safetensors(args.source)
    configs = {name: CONFIGS[name].from_config(BASE[name]) for name in CONFIGS}
    if args.weights:
        configs = alchemy.load(args.weights, "cpu", config=args.config).configs
    networks = {name: empty(name, configs[name]) for name in networks_in(file.keys())}  # names and shapes: no weight is read
    pairs = read_lora(args.source, networks, args.weights or "SDXL base")
    facts = {k.removeprefix(FACTS): v for k, v in (file.metadata() or {}).items() if k.startswith(FACTS) and k not in (FACTS + "rank", FACTS + "alpha")}
    write_lora(args.target, pairs, configs["unet"], args.to, facts)
    return [args.target]


def merge(args):
    import alchemy
    from .. import lora
    from .folder import save_checkpoint
    sdxl = alchemy.load(args.weights, "cpu", args.dtype, config=args.config)
    load_lora(sdxl, args.source, args.scale)
    lora.merge(sdxl)
    return save_checkpoint(sdxl, args.target, args.config, {"alchemy.merged": Path(args.source).name, "alchemy.scale": args.scale})


def main(argv=None):
    args = parse(argv)
    command.wrote(*(merge if args.merge else rename)(args))


if __name__ == "__main__":
    command.run(main)
