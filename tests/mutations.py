"""Break the code on purpose, one line at a time: every fault must turn a test red.

    python tests/mutations.py [-k WORD]    all faults, two at a time
    python tests/mutations.py --no-green   skip the first run without a fault (CI has just run it)
    python tests/mutations.py --record     write anew which test caught which fault
    python tests/mutations.py --minutes 7  as many as fit, in an order of the day (CI)

The faults are in tests/faults/, one file per area. The test that caught a fault before, by
tests/faults/caught_by.json, runs first and alone; the files of the fault follow only where it no
longer fails, so that the record saves time and cannot hide a fault. Exit status 1 if a fault is
not caught, or if its old text is not found exactly once (the code has changed: change the fault
with it).
Needs fork (Linux, macOS), so that torch is imported once and not for each fault.
"""

import argparse
import contextlib
import datetime
import importlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 2
TIMEOUT = 150  # seconds; a fault that makes the code hang counts as caught
RECORD = ROOT / "tests" / "faults" / "caught_by.json"  # {fault: "cli/test_flags.py::test_name"}


@dataclass(frozen=True)
class Fault:
    """Replace `old`, which occurs once in alchemy/`module`.py, by `new`: a test must fail."""

    module: str  # "schedule", "formats/lora"; "../train" is the script
    tests: tuple[str, ...]  # "core/schedule" is tests/core/test_schedule.py
    what: str
    old: str
    new: str

    @property
    def name(self) -> str:
        return f"{self.module}: {self.what}"

    @property
    def files(self) -> list[str]:
        folders = [Path(name) for name in self.tests]
        return [str(path.with_name(f"test_{path.name}.py")) for path in folders]


def read_faults() -> list[Fault]:
    """All faults of tests/faults/*.py, in the order of their files."""
    sys.path.insert(0, str(ROOT / "tests"))
    faults = []
    for path in sorted((ROOT / "tests" / "faults").glob("[a-z]*.py")):
        table = importlib.import_module(f"faults.{path.stem}").FAULTS
        for (module, tests), rows in table.items():
            faults += [Fault(module, tuple(tests.split()), *row) for row in rows]
    return faults


def copy_repository(folder: Path) -> Path:
    """Copy the code and the tests into `folder`; link what is large and never changed."""
    repo = folder.resolve() / "repo"
    ignore = shutil.ignore_patterns("__pycache__", "reference")
    for name in ("alchemy", "tests"):
        shutil.copytree(ROOT / name, repo / name, ignore=ignore)
    for script in ("train.py", "sample.py", "insert.py"):
        shutil.copy(ROOT / script, repo)
    (repo / "tests" / "reference").symlink_to(ROOT / "tests" / "reference")
    for name in ("weights", "README.md"):
        (repo / name).symlink_to(ROOT / name)
    shared = ROOT.parent / "shared"
    if shared.exists():
        (repo.parent / "shared").symlink_to(shared)
    return repo


def run_tests(repo: Path, tests: list[str]) -> tuple[int, str]:
    """Run tests (paths below tests/) of the copy in this forked process.

    Returns pytest's exit status and its output."""
    import pytest

    os.chdir(repo)
    # Not the original's modules; its virtual environment may well lie within ROOT.
    own = ("", str(ROOT), str(ROOT / "tests"))
    sys.path[:] = [str(repo)] + [p for p in sys.path if p not in own]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        paths = [f"tests/{name}" for name in tests]
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *paths])
    return int(status), output.getvalue()


def apply_and_test(send, folder: str, fault: Fault, tests: list[str]) -> None:
    """In a forked process: put the fault into a copy, run tests, send (result, failed test)."""
    repo = copy_repository(Path(folder))
    file = repo / "alchemy" / f"{fault.module}.py"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if text.count(fault.old) != 1:
        send.send((f"old text found {text.count(fault.old)} times", ""))
        return
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    status, output = run_tests(repo, tests)
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if status == 1 and failed:
        test = failed[0].split(" ", 1)[1].split(" - ")[0].split("[")[0]
        send.send(("caught", test.removeprefix("tests/")))
    elif status == 0:
        send.send(("NOT CAUGHT", ""))
    else:
        send.send(("caught" if failed else f"pytest ended with status {status}", "import"))


def start(fault: Fault, tests: list[str]) -> tuple:
    """Start a process for one fault; (process, pipe to its answer, its folder)."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    folder = tempfile.TemporaryDirectory()
    process = fork.Process(target=apply_and_test, args=(send, folder.name, fault, tests))
    process.start()
    send.close()
    return process, receive, folder


def answer(process, receive, folder) -> tuple[str, str]:
    """Wait for the process: (result, failed test)."""
    try:
        result = receive.recv() if receive.poll(TIMEOUT) else ("caught", "no end")
    except EOFError:  # the process died without an answer
        result = "caught", "the process died"
    process.kill()
    process.join()
    folder.cleanup()
    return result


def results(
    faults: list[Fault], record: dict[str, str], end: float = float("inf")
) -> Iterator[tuple[Fault, str, str]]:
    """Yield (fault, result, failed test) in order; each runs in a forked process, two at a time.

    end: the time.time() after which no more of them start."""
    waiting, running = list(faults), []
    while waiting or running:
        if time.time() > end:
            waiting = []
        while waiting and len(running) < AT_ONCE:
            fault = waiting.pop(0)
            test = record.get(fault.name)
            running.append((fault, test, start(fault, [test] if test else fault.files)))
        fault, test, process = running.pop(0)
        result, failed = answer(*process)
        if test and result != "caught":
            result, failed = answer(*start(fault, fault.files))
        yield fault, result, failed


def check_green(faults: list[Fault]) -> None:
    """Without a fault the tests must pass, or a failure would prove nothing."""
    tests = sorted(set().union(*(fault.files for fault in faults)))
    with tempfile.TemporaryDirectory() as folder:
        process_results = multiprocessing.get_context("fork").Queue()

        def run() -> None:
            process_results.put(run_tests(copy_repository(Path(folder)), tests))

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        status, output = process_results.get()
        process.join()
    if status:
        sys.exit(f"{output}\nthe tests fail before any fault is made")


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "-k", metavar="WORD", default="", help="only faults with this in their name"
    )
    parser.add_argument("--no-green", action="store_true", help="skip the run without a fault")
    parser.add_argument("--minutes", type=float, metavar="X", help="start no more of them then")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} anew")
    args = parser.parse_args(argv)
    faults = [fault for fault in read_faults() if args.k in fault.name]
    record = {}
    if RECORD.exists():
        record = json.loads(RECORD.read_text(encoding="utf-8"))

    import torch

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    begin = time.time()
    if not args.no_green:
        check_green(faults)
    end = float("inf")
    if args.minutes:
        end = begin + 60 * args.minutes
        random.Random(datetime.date.today().isoformat()).shuffle(faults)
    missed = run = 0
    for fault, result, test in results(faults, record, end):
        run += 1
        missed += result != "caught"
        print(f"{result:<12} {fault.name}   {test}", flush=True)
        if "::" in test:
            record[fault.name] = test
    if args.record:
        known = {fault.name for fault in read_faults()}
        record = {name: record[name] for name in sorted(known.intersection(record))}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    seconds = time.time() - begin
    print(f"{run - missed} of {run} faults are caught, in {seconds:.0f} s; {len(faults)} in all")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
