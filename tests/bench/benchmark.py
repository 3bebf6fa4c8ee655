"""Speed, memory and exactness, against diffusers and peft where they are installed.

    python tests/bench/benchmark.py                   # the miniature, float32, on this CPU
    python tests/bench/benchmark.py --cuda            # SDXL's size, random weights, bfloat16
    python tests/bench/benchmark.py --cuda --minutes 9     # start no row that may end later
    python tests/bench/benchmark.py --cuda sample step     # only these rows, again

Each row runs in a process of its own, for at most 1.5 or 3 minutes, and its figures are added to
--json as they are measured. The same command goes on with the rows that are missing; a row that
is named is measured again. Figures of another card or other versions stay beside the new ones.
Both sides have the same weights, dtype, threads, memory format and fused attention, and run in
turns; medians. With --tiny every row runs once on the miniature, to try the code: the figures mean
nothing. On a GPU the whole takes about 15 minutes.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]
LIBRARIES = ("torch", "diffusers", "peft")
QUIET = {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}


def main(argv: list[str] | None = None) -> int:
    from benchmark_rows import CPU_ROWS, CUDA_ROWS, ROWS, SECONDS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: missing ones)")
    add("--cuda", action="store_true", help="SDXL's size on a GPU")
    add("--tiny", action="store_true", help="the miniature, every row once, on the CPU")
    text = "where the full-size weights are or go (7 GB; default: out/full-size)"
    add("--keep", type=Path, metavar="FOLDER", help=text, default=Path("out/full-size"))
    add("--json", type=Path, metavar="FILE", default=Path("out/benchmark.json"))
    add("--minutes", type=float, metavar="N", help="start no row that may end later than this")
    add("--here", action="store_true", help="run the rows in this process, without a time limit")
    args = parser.parse_args(argv)
    start = time.monotonic()
    unknown = sorted(set(args.rows) - set(ROWS))
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    os.environ |= QUIET

    try:
        results = Results(args.json, describe_setup(args.cuda and not args.tiny, args.tiny))
    except ValueError as error:
        parser.error(str(error))
    planned = CUDA_ROWS if args.cuda or args.tiny else CPU_ROWS
    missing = [name for name in planned if name not in results.rows]
    if args.here:
        for name in args.rows or missing:
            results.add(name, run_here(name, args))
        return 0
    failed = []
    if args.cuda and not args.tiny and (args.rows or missing):
        full_size_weights(args.keep)  # not within a row's time
    for name in args.rows or missing:
        left = 60 * args.minutes - (time.monotonic() - start) if args.minutes else SECONDS[name]
        if left < SECONDS[name]:
            log(f"{left:.0f} s are left: the same command goes on with {name}")
            break
        log(f"{name} ...")
        entries = run_apart(name, args, SECONDS[name])
        if not results.add(name, entries):
            failed.append(name)
            log(entries[-1]["error"])
    print("\n".join(table(results.setup, results.rows, planned)))
    return 1 if failed else 0


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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


class Results:
    """A JSON file: a list of {"setup": …, "rows": {name: entries}}, one for each setup.

    rows: those of this setup. Raises ValueError for a file that is something else.
    """

    def __init__(self, path: Path, setup: dict[str, str]):
        self.path, self.setup = path, setup
        self.runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        try:
            known = [run for run in self.runs if run["setup"] == setup]
        except (TypeError, KeyError):
            raise ValueError(
                f"{path}: not results of this benchmark; name another --json"
            ) from None
        if not known:
            known = [{"setup": setup, "rows": {}}]
            self.runs += known
        self.rows = known[0]["rows"]

    def add(self, name: str, entries: Iterable[dict]) -> bool:
        """Write the entries of a row as they come, and return whether they are without an error.

        Those of an earlier call stay where the new ones fail or are fewer.
        """
        earlier, new = self.rows.get(name, []), []
        for entry in entries:
            new.append(entry)
            self.rows[name] = max(new, earlier, key=worth)
            self.write()
        return is_good(new)

    def write(self) -> None:
        """Replace the file at once, so that a process that is killed leaves the old or the new."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text(json.dumps(self.runs, indent=1), encoding="utf-8")
        new.replace(self.path)


def is_good(entries: list[dict]) -> bool:
    return not any("error" in entry for entry in entries)


def worth(entries: list[dict]) -> tuple[bool, int]:
    return bool(entries) and is_good(entries), len(entries)


def run_here(name: str, args: argparse.Namespace) -> Iterator[dict]:
    """The entries of a row, measured in this process."""
    from benchmark_rows import ROWS, Bench

    if args.tiny:
        bench = Bench.tiny()
    elif args.cuda:
        bench = Bench(full_size_weights(args.keep))
    else:
        bench = Bench.cpu()
    yield from ROWS[name](bench)


def run_apart(name: str, args: argparse.Namespace, seconds: float) -> list[dict]:
    """The entries of a row, measured in a new process; last its error, if it fails or is slow."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, name, "--here", "--json", str(out)]
        command += [flag for flag in ("--cuda", "--tiny") if getattr(args, flag[2:])]
        command += ["--keep", str(args.keep)]
        with ended(command) as process:
            try:
                _, output = process.communicate(timeout=seconds)
                lines = output.strip().splitlines() or ["no message"]
                error = lines[-1] if process.returncode else None
            except subprocess.TimeoutExpired:
                error = f"took more than {seconds:g} s"
        entries = []
        if out.exists():
            entries = json.loads(out.read_text(encoding="utf-8"))[0]["rows"].get(name, [])
        return entries + ([{"error": f"{name}: {error}"}] if error else [])


@contextmanager
def ended(command: list[str]) -> Iterator[subprocess.Popen]:
    """A process that has ended, with all that it started, when the block is left."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        signal.signal(signal.SIGTERM, previous)


def full_size_weights(folder: Path) -> Path:
    """The folder of random full-size weights, written if it is not there or not complete."""
    from helpers.full_size import write_folder

    done = folder / "complete"
    if not done.exists():
        log(f"writing 7 GB to {folder} ...")
        write_folder(folder)
        done.touch()
    return folder


def table(setup: dict[str, str], rows: dict[str, list], planned: tuple[str, ...]) -> list[str]:
    """The results as Markdown; `floor`: what the hardware allows at best."""
    versions = ", ".join(f"{key} {value}" for key, value in setup.items())
    lines = [f"{versions}; medians", ""]
    lines.append("| | ours | target | theirs | ratio | target | over the floor | |")
    lines.append("|---|---:|---:|---:|---:|---:|---:|---|")
    for name in planned:
        for entry in rows.get(name, ()):
            lines.append(f"| {' | '.join(cells(entry))} |")
    missing = [name for name in planned if name not in rows]
    return [*lines, f"\nnot measured: {', '.join(missing)}"] if missing else lines


def cells(entry: dict) -> list[str]:
    """The cells of an entry in the table."""
    if "error" in entry:
        return [entry["error"], *[""] * 6, "FAILED"]
    ours, theirs, floor = (entry[key] for key in ("ours", "theirs", "floor"))
    target, ratio = entry["target"], entry["ratio_target"]
    return [
        entry["what"],
        f"{ours:.3g} {entry['unit']}".strip(),
        "" if target is None else f"{target:g}",
        f"{theirs:.3g}" if theirs else "",
        f"{ours / theirs:.2f}" if theirs else "",
        "" if ratio is None else f"{ratio:g}",
        f"{ours / floor:.1f}" if floor else "",
        entry["verdict"],
    ]


if __name__ == "__main__":
    sys.exit(main())
