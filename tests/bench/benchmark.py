"""Speed, memory and exactness, against diffusers and peft where they are installed.

    python tests/bench/benchmark.py                        # the miniature, float32, on this CPU
    python tests/bench/benchmark.py --cuda --keep out/full # SDXL's size, random weights, bfloat16
    python tests/bench/benchmark.py --cuda --keep out/full sample step     # only these rows

Each row runs in its own process, for at most 3 minutes, and is added to --json at once. A further
call goes on with the rows that are missing; a row that is named is measured again. Both sides have
the same weights, dtype, threads, memory format and fused attention, and run in turns; medians.
With --tiny every row runs once on the miniature, to try the code: the figures mean nothing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]
ROW_SECONDS = 180
LIBRARIES = ("torch", "diffusers", "peft")
QUIET = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}


def main(argv: list[str] | None = None) -> int:
    from benchmark_rows import CPU_ROWS, CUDA_ROWS, ROWS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: missing ones)")
    add("--cuda", action="store_true", help="SDXL's size on a GPU")
    add("--tiny", action="store_true", help="the miniature, every row once, on the CPU")
    add("--keep", type=Path, metavar="FOLDER", help="where the full-size weights are or go (7 GB)")
    add("--json", type=Path, metavar="FILE", default=Path("out/benchmark.json"))
    add("--here", action="store_true", help="run the rows in this process, without a time limit")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.rows) - set(ROWS))
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if args.cuda and not args.tiny and not args.keep:
        parser.error("--cuda needs --keep FOLDER for the full-size weights")
    os.environ |= QUIET

    setup = describe_setup(args.cuda and not args.tiny, args.tiny)
    found = read_results(args.json, setup)
    planned = CUDA_ROWS if args.cuda or args.tiny else CPU_ROWS
    missing = [name for name in planned if name not in found["rows"]]
    for name in args.rows or missing:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found["rows"][name] = run_here(name, args) if args.here else run_apart(name, args)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if not args.here or args.tiny:
        print("\n".join(table(found, planned)))
    failed = [name for name in args.rows or missing if "error" in found["rows"][name][0]]
    return 1 if failed else 0


def describe_setup(cuda: bool, tiny: bool) -> dict[str, str]:
    """What the figures belong to. Libraries are named by their metadata, without an import."""
    import torch

    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    setup = {"device": "tiny: no figures" if tiny else device}
    for name in LIBRARIES:
        try:
            setup[name] = version(name)
        except PackageNotFoundError:
            setup[name] = "not installed"
    return setup


def read_results(path: Path, setup: dict[str, str]) -> dict:
    """What --json holds, if it was measured with the same setup."""
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.get("setup") == setup:
            return stored
    return {"setup": setup, "rows": {}}


def run_here(name: str, args: argparse.Namespace) -> list[dict]:
    """The entries of a row, measured in this process."""
    from benchmark_rows import ROWS, Bench

    if args.tiny:
        bench = Bench.tiny()
    elif args.cuda:
        bench = Bench(full_size_weights(args.keep))
    else:
        bench = Bench.cpu()
    return list(ROWS[name](bench))


def run_apart(name: str, args: argparse.Namespace) -> list[dict]:
    """The entries of a row, measured in a new process; its error, if it fails or takes long."""
    if args.cuda and not args.tiny:
        full_size_weights(args.keep)  # not within the row's time
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, name, "--here", "--json", str(out)]
        command += [flag for flag in ("--cuda", "--tiny") if getattr(args, flag[2:])]
        command += ["--keep", str(args.keep)] if args.keep else []
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=ROW_SECONDS)
        except subprocess.TimeoutExpired:
            return [{"error": f"{name}: took more than {ROW_SECONDS} s"}]
        if not out.exists():
            lines = run.stderr.strip().splitlines() or ["no message"]
            return [{"error": f"{name}: {lines[-1]}"}]
        return json.loads(out.read_text(encoding="utf-8"))["rows"][name]


def full_size_weights(folder: Path) -> Path:
    """The folder of random full-size weights, written if it is not there or not complete."""
    from helpers.full_size import write_folder

    done = folder / "complete"
    if not done.exists():
        print(f"writing 7 GB to {folder} ...", file=sys.stderr, flush=True)
        write_folder(folder)
        done.touch()
    return folder


def table(found: dict, planned: tuple[str, ...]) -> list[str]:
    """The results as Markdown; `limit`: what is required, `floor`: what the hardware allows."""
    setup = ", ".join(f"{key} {value}" for key, value in found["setup"].items())
    lines = [setup + "; medians", "", "| | ours | theirs | ratio | limit | over the floor |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name in planned:
        for entry in found["rows"].get(name, ()):
            if "error" in entry:
                lines.append(f"| {entry['error']} | – | | | | |")
                continue
            ours, theirs, floor = (entry[key] for key in ("ours", "theirs", "floor"))
            cells = [entry["what"], f"{ours:.3g} {entry['unit']}"]
            cells.append(f"{theirs:.3g}" if theirs else "")
            cells.append(f"{ours / theirs:.2f}" if theirs else "")
            cells.append("" if entry["limit"] is None else f"{entry['limit']:g}")
            cells.append(f"{ours / floor:.1f}" if floor else "")
            lines.append(f"| {' | '.join(cells)} |")
    missing = [name for name in planned if name not in found["rows"]]
    return [*lines, f"\nnot measured: {', '.join(missing)}"] if missing else lines


if __name__ == "__main__":
    sys.exit(main())
