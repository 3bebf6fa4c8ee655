"""Everything that is asked of a GPU, measured: ours and diffusers in turns on the same random weights of SDXL's full size; medians, peak memory.

python tests/benchmark.py --cuda                          all rows (half an hour; the weights, 7 GB, are written first)
python tests/benchmark.py --cuda --keep out/full sample   some rows, the weights kept for the next call; results add up in --json
python tests/benchmark.py --cuda --tiny                   every row's code on the miniature, on the CPU: its numbers mean nothing
"""

import argparse
import contextlib
import gc
import json
import platform
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from benchmark import MINI
from benchmark_rows import ROWS, Bench


def facts(b):
    import diffusers
    import peft

    card = (
        torch.cuda.get_device_name()
        if b.device == "cuda"
        else f"{platform.processor() or 'CPU'}, the miniature: code that was tried, not figures"
    )
    return {
        "card": card,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "dtype": str(b.dtype),
    }


def table(found):
    """The README's table of all that was measured on this card with these versions."""
    yield ", ".join(f"{k} {v}" for k, v in found["facts"].items()) + "; medians\n"
    yield f"| {'':52} | ours      | diffusers | ratio | at most | over the floor |\n|{'-' * 54}|----------:|----------:|------:|--------:|---------------:|"
    for r in (r for name in ROWS for r in found["rows"].get(name, ())):
        ratio = f"{r['ours'] / r['theirs']:.2f}" if r["theirs"] else ""
        cells = [
            f"{r['ours']:.3g} {r['unit']}",
            f"{r['theirs']:.3g}" if r["theirs"] else "",
            ratio,
            "" if r["at most"] is None else f"{r['at most']:g}",
            f"{r['ours'] / r['floor']:.1f}" if r["floor"] else "",
        ]
        yield (
            f"| {r['what']:52} | "
            + " | ".join(f"{cell:>{width}}" for cell, width in zip(cells, (9, 9, 5, 7, 14)))
            + " |"
        )
    if missing := [name for name in ROWS if name not in found["rows"]]:
        yield f"\nnot measured: {', '.join(missing)}"


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="benchmark.py --cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    p.add_argument(
        "--tiny", action="store_true", help="the miniature on the CPU, once: to try the code"
    )
    p.add_argument(
        "--keep",
        metavar="FOLDER",
        type=Path,
        help="where the weights are written, or are already (default: written anew, and deleted)",
    )
    p.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        default=Path("out/benchmark_cuda.json"),
        help="results, to which this call's are added",
    )
    args = p.parse_args(argv)
    if unknown := set(args.rows) - set(ROWS):
        p.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as folder:
        b = (
            Bench(MINI, "cpu", torch.float32, 128, 2, 2, 1)
            if args.tiny
            else Bench(args.keep or Path(folder))
        )
        # The miniature is not worth a compiler's minute: blocks are taken apart as for one, and run as they are.
        quick = (
            mock.patch.object(torch, "compile", partial(torch.compile, backend="eager"))
            if args.tiny
            else contextlib.nullcontext()
        )
        if not args.tiny and not (b.weights / "vae/config.json").exists():
            from full_size import write_folder

            write_folder(b.weights)
        found = {"facts": facts(b), "rows": {}}
        if (
            args.json.exists()
            and (stored := json.loads(args.json.read_text()))["facts"] == found["facts"]
        ):
            found = stored
        for name in args.rows or ROWS:
            print(f"{name} ...", file=sys.stderr, flush=True)
            with quick:
                found["rows"][name] = list(ROWS[name](b))
            vars(b).pop("pipe", None)
            gc.collect()
            if b.device == "cuda":
                torch.cuda.empty_cache()  # the rows that are processes of their own look at what is free
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=1))
    print("\n".join(table(found)))
