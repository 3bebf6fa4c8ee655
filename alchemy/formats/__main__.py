"""Write a LoRA or an embedding under the names that another tool reads, or merge a LoRA into its base. Of names that have no place for
alpha, it goes into up. An embedding is known by its content: a file with clip_l and clip_g, or a folder with diffusers' two.

    python -m alchemy.formats found.safetensors dog.safetensors --to kohya
    python -m alchemy.formats out/my-dog/lora.safetensors dog.safetensors --to diffusers --weights weights/mini
    python -m alchemy.formats out/my-dog/lora.safetensors my-dog-sdxl/ --merge --weights stabilityai/stable-diffusion-xl-base-1.0
    python -m alchemy.formats my-dog.safetensors my-dog/ --to diffusers
"""

from pathlib import Path

from .. import cli
from .embeddings import is_embedding, read_embedding, write_embedding
from .lora import FACTS, FORMATS, load_lora, networks_in, read_lora, write_lora
from .tensors import open_safetensors


def parse(argv):
    p = cli.parser(__doc__)
    p.add_argument(
        "source", metavar="IN", help="a LoRA file or an embedding, in any spelling that is read"
    )
    p.add_argument(
        "target", metavar="OUT", help="the file or folder to write; it must not be there yet"
    )
    g = p.add_mutually_exclusive_group(required=True)
    g.add_argument(
        "--to", choices=FORMATS, help="kohya, which all tools read, diffusers or, of LoRAs, peft"
    )
    g.add_argument(
        "--merge",
        action="store_true",
        help="write the whole checkpoint with the LoRA in its weights, in the Hub layout",
    )
    p.add_argument(
        "--weights",
        metavar="PATH|ID",
        help="the checkpoint that a LoRA was made for; for --to only its configurations are read (default: SDXL base's)",
    )
    p.add_argument(
        "--config", metavar="FOLDER", help="configurations, where --weights is a single file"
    )
    p.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of --weights on the Hub"
    )
    g = p.add_argument_group("merging")
    g.add_argument(
        "--scale",
        type=cli.number(float, -100, 100),
        metavar="X",
        help="of the LoRA (default: 1)",
    )
    g.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the merged checkpoint (default: float16)",
    )
    args = p.parse_args(argv)
    needs = {
        "merge": "weights",
        "config": "weights",
        "revision": "weights",
        "scale": "merge",
        "dtype": "merge",
    }
    for flag, other in needs.items():
        if getattr(args, flag) not in (None, False) and not getattr(args, other):
            raise ValueError(f"--{flag} needs --{other}; --help says what each is for")
    if args.merge and Path(args.weights).is_file() and not args.config:
        raise ValueError(
            f"{args.weights}: a single file brings no configurations for the folder: give --config FOLDER"
        )
    if Path(args.target).exists():
        raise ValueError(f"{args.target} is there already; name another")
    return args


def own_facts(header):
    """What we wrote into a header, but for what is written anew."""
    anew = {FACTS + "rank", FACTS + "alpha", FACTS + "token"}
    return {
        key.removeprefix(FACTS): value
        for key, value in header.items()
        if key.startswith(FACTS) and key not in anew
    }


def rename(args):
    if is_embedding(args.source):
        token, rows, header = read_embedding(args.source)
        return write_embedding(args.target, token, rows, args.to, own_facts(header))
    if Path(args.target).suffix != ".safetensors":
        raise ValueError(f"{args.target}: the file to write has to end in .safetensors")
    import alchemy
    from .checkpoint import BASE, CONFIGS, empty

    file = open_safetensors(args.source)
    configs = {name: CONFIGS[name].from_config(BASE[name]) for name in CONFIGS}
    if args.weights:
        configs = alchemy.load(
            args.weights, "cpu", config=args.config, revision=args.revision
        ).configs
    networks = {
        name: empty(name, configs[name]) for name in networks_in(file.keys())
    }  # names and shapes: no weight is read
    pairs = read_lora(args.source, networks, args.weights or "SDXL base")
    write_lora(args.target, pairs, configs["unet"], args.to, own_facts(file.metadata() or {}))
    return [args.target]


def merge(args):
    import alchemy
    from .folder import save_checkpoint

    open_safetensors(args.source)  # before gigabytes are read
    scale = 1.0 if args.scale is None else args.scale
    sdxl = alchemy.load(
        args.weights, "cpu", args.dtype or "float16", config=args.config, revision=args.revision
    )
    load_lora(sdxl, args.source, scale)
    return save_checkpoint(
        sdxl, args.target, {"alchemy.merged": Path(args.source).name, "alchemy.scale": scale}
    )


def main(argv=None):
    args = parse(argv)
    cli.wrote(*(merge if args.merge else rename)(args))


if __name__ == "__main__":
    cli.run(main)
