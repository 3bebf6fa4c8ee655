"""Convert a LoRA or an embedding to the names of another tool, or merge a LoRA into a checkpoint.

python -m alchemy.formats found.safetensors dog.safetensors --to kohya
python -m alchemy.formats out/dog dog.safetensors --to peft --weights weights/mini
python -m alchemy.formats dog.safetensors dog-sdxl.safetensors --merge --weights SDXL.safetensors
python -m alchemy.formats my-dog.safetensors my-dog/ --to diffusers

Embeddings that OneTrainer has bundled with a LoRA become files of their own beside OUT.
"""

import argparse
from contextlib import suppress
from pathlib import Path

from .. import cli
from ..files import lora_of_run
from ..methods.outputs import embedding_name
from .embeddings import (
    METADATA,
    bundled_embeddings,
    is_embedding,
    read_embedding,
    write_embedding,
)
from .lora import FORMATS, load_lora, networks_in, read_lora, write_lora
from .tensors import open_safetensors

NEEDS = {  # a flag: the flag without which it has no effect
    "merge": "weights",
    "model_config": "weights",
    "revision": "weights",
    "scale": "merge",
    "dtype": "merge",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = cli.parser(__doc__)
    text = "a LoRA, the folder of its run, or an embedding, in any names that we read"
    p.add_argument("source", metavar="IN", help=text)
    p.add_argument("target", metavar="OUT", help="the file or folder to write; must not exist")
    group = p.add_mutually_exclusive_group(required=True)
    text = "kohya, which every tool reads, diffusers or, for LoRAs, peft"
    group.add_argument("--to", choices=FORMATS, help=text)
    text = "write the checkpoint with the LoRA in its weights: one file in the original layout if "
    text += "OUT ends in .safetensors, else a folder in the Hub layout"
    group.add_argument("--merge", action="store_true", help=text)
    text = "checkpoint of the LoRA; with --to only its configurations are read (default: SDXL base)"
    p.add_argument("--weights", metavar="PATH|ID", help=text)
    text = "folder with the configurations, if --weights is a single file (default: SDXL base)"
    p.add_argument("--model-config", metavar="FOLDER", help=text)
    text = "branch, tag or commit of --weights on the Hub"
    p.add_argument("--revision", metavar="NAME", help=text)
    group = p.add_argument_group("merging")
    scale = cli.number(float, -100, 100)
    group.add_argument("--scale", type=scale, metavar="X", help="of the LoRA (default: 1)")
    text = "of the merged checkpoint (default: float16)"
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=text)
    args = p.parse_args(argv)
    for flag, needed in NEEDS.items():
        if getattr(args, flag) not in (None, False) and not getattr(args, needed):
            raise ValueError(f"{cli.flag_of(flag)} needs --{needed}; --help says what each is for")
    to_folder = args.merge and Path(args.target).suffix != ".safetensors"
    if to_folder and Path(args.weights).is_file() and not args.model_config:
        raise ValueError(
            f"{args.weights}: a single file brings no configurations for a folder: "
            "give --model-config FOLDER, or an OUT that ends in .safetensors"
        )
    if Path(args.target).exists():
        raise ValueError(f"{args.target} exists already; name another")
    with suppress(ValueError):  # a folder without a LoRA may be that of an embedding
        args.source = str(lora_of_run(args.source))
    return args


def own_metadata(header: dict[str, str]) -> dict[str, str]:
    """What we wrote into a header, except what is written anew."""
    kept = {}
    for key, value in header.items():
        name = key.removeprefix(METADATA)
        if key.startswith(METADATA) and name not in ("rank", "alpha", "token"):
            kept[name] = value
    return kept


def convert(args: argparse.Namespace) -> list[Path]:
    """Write the source under other names; return what was written."""
    if is_embedding(args.source):
        token, rows, header = read_embedding(args.source)
        return write_embedding(args.target, token, rows, args.to, own_metadata(header))
    if Path(args.target).suffix != ".safetensors":
        raise ValueError(f"{args.target}: the file to write has to end in .safetensors")
    import alchemy

    from .checkpoint import BASE, CONFIGS, build_on_meta

    file = open_safetensors(args.source)
    configs = {name: CONFIGS[name].from_config(BASE[name]) for name in CONFIGS}
    if args.weights:
        options = {"config": args.model_config, "revision": args.revision}
        configs = alchemy.load(args.weights, "cpu", **options).configs
    # Names and shapes are all that is needed of the networks.
    networks = {name: build_on_meta(name, configs[name]) for name in networks_in(file.keys())}
    adapters = read_lora(args.source, networks, args.weights or "SDXL base")
    metadata = own_metadata(file.metadata() or {})
    embeddings = plan_embeddings(args)
    write_lora(args.target, adapters, configs["unet"], args.to, metadata)
    if args.to != "kohya":
        cli.log(f"A1111 and kohya's tools ignore a file in the names of {args.to}; for them: kohya")
    return [Path(args.target), *write_embeddings(embeddings)]


def plan_embeddings(args: argparse.Namespace) -> dict[Path, tuple[str, list]]:
    """{path beside OUT: (token, rows)} of the embeddings that a LoRA is bundled with.

    The path is a file in kohya's form or, of --to diffusers and peft, a folder in diffusers'.
    Raises ValueError if there is one already.
    """
    suffix = "" if args.to in ("diffusers", "peft") else ".safetensors"
    planned = {}
    for token, rows in bundled_embeddings(args.source).items():
        path = Path(args.target).with_name(embedding_name(token) + suffix)
        if path == Path(args.target):
            path = path.with_name(f"{path.stem}-embedding{suffix}")
        if path.exists() or path in planned:
            raise ValueError(
                f"{path} exists already, where the bundled embedding {token!r} goes; "
                "move it, or name an OUT in another folder"
            )
        planned[path] = token, rows
    return planned


def write_embeddings(planned: dict[Path, tuple[str, list]]) -> list[Path]:
    written = []
    for path, (token, rows) in planned.items():
        written += write_embedding(
            path, token, rows, "kohya" if path.suffix == ".safetensors" else "diffusers"
        )
        cli.log(f"{path}: an embedding that was bundled with the LoRA; its token is {token!r}")
    return written


def merge(args: argparse.Namespace) -> list[Path]:
    """Write the checkpoint with the LoRA in its weights; return what was written."""
    import alchemy

    from .saving import save_checkpoint

    embeddings = plan_embeddings(args)  # an error here comes before gigabytes are read
    scale = 1.0 if args.scale is None else args.scale
    dtype = args.dtype or "float16"
    options = {"config": args.model_config, "revision": args.revision}
    sdxl = alchemy.load(args.weights, "cpu", dtype, **options)
    load_lora(sdxl, args.source, scale, embeddings=False)
    metadata = {"alchemy.merged": Path(args.source).name, "alchemy.scale": scale}
    written = save_checkpoint(sdxl, args.target, metadata)
    return [*written, *write_embeddings(embeddings)]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    cli.log_written(*(merge if args.merge else convert)(args))


if __name__ == "__main__":
    cli.run(main)
