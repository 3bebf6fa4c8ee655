"""Write a LoRA file under the names that another tool reads. Only names change; alpha too, where the names have no place for it.

    python -m alchemy.formats found.safetensors dog.safetensors --to kohya
    python -m alchemy.formats out/my-dog/lora.safetensors dog.safetensors --to diffusers --weights weights/mini
"""
from pathlib import Path

from .. import command
from .lora import FACTS, FORMATS, networks_in, read_lora, write_lora


def main(argv=None):
    p = command.parser(__doc__)
    p.add_argument("source",    metavar="IN",                    help="a LoRA file, in any spelling that is read")
    p.add_argument("target",    metavar="OUT",                   help="the file to write, which must not be there yet")
    p.add_argument("--to",      required=True, choices=FORMATS,  help="kohya, which all tools read, diffusers or peft")
    p.add_argument("--weights", metavar="PATH|ID",               help="the checkpoint that it was made for; only its configurations are read (default: SDXL base's)")
    args = p.parse_args(argv)
    target = Path(args.target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: the file to write has to end in .safetensors")
    if target.exists():
        raise ValueError(f"{target} is there already; name another")

    import alchemy
    from .checkpoint import BASE, CONFIGS, empty, open_safetensors
    file = open_safetensors(args.source)
    configs = alchemy.load(args.weights, "cpu").configs if args.weights else {name: CONFIGS[name].from_config(BASE[name]) for name in CONFIGS}
    networks = {name: empty(name, configs[name]) for name in networks_in(file.keys())}  # names and shapes: no weight is read
    pairs = read_lora(args.source, networks, args.weights or "SDXL base")
    facts = {k.removeprefix(FACTS): v for k, v in (file.metadata() or {}).items() if k.startswith(FACTS) and k not in (FACTS + "rank", FACTS + "alpha")}
    write_lora(target, pairs, configs["unet"], args.to, facts)
    command.wrote(target)


if __name__ == "__main__":
    command.run(main)
