"""Break the code on purpose, one line at a time: every fault must turn a test red.

    python tests/mutations.py [-k WORD]    all faults, two at a time
    python tests/mutations.py --no-green   skip the first run without a fault (CI has just run it)

The faults are in tests/faults/, one file per area. Exit status 1 if a fault is not caught, or if
its old text is not found exactly once (the code has changed: change the fault with it).
Needs fork (Linux, macOS), so that torch is imported once and not for each fault.
"""

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
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


@dataclass(frozen=True)
class Fault:
    """Replace `old`, which occurs once in alchemy/`module`.py, by `new`; one of `tests` must fail."""

    module: str  # "schedule", "formats/lora"; "../train" is the script
    tests: tuple[str, ...]  # "core/schedule" is tests/core/test_schedule.py
    what: str
    old: str
    new: str


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
    """Run test files of the copy in this (forked) process: pytest's exit status and its output."""
    import pytest

    os.chdir(repo)
    sys.path[:] = [str(repo)] + [p for p in sys.path if not p.startswith(str(ROOT))]
    files = [
        str(Path("tests", *name.split("/")[:-1], f"test_{Path(name).name}.py")) for name in tests
    ]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files])
    return int(status), output.getvalue()


def apply_and_test(send, folder: str, fault: Fault) -> None:
    """In a forked process: put the fault into a copy, run its tests, send (result, failed test)."""
    repo = copy_repository(Path(folder))
    file = repo / "alchemy" / f"{fault.module}.py"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if text.count(fault.old) != 1:
        send.send((f"old text found {text.count(fault.old)} times", ""))
        return
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    status, output = run_tests(repo, list(fault.tests))
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if status == 1 and failed:
        send.send(("caught", failed[0].split("::")[-1].split(" - ")[0]))
    elif status == 0:
        send.send(("NOT CAUGHT", ""))
    else:
        send.send(("caught" if failed else f"pytest ended with status {status}", "import"))


def results(faults: list[Fault]) -> Iterator[tuple[Fault, str, str]]:
    """Yield (fault, result, failed test) in order; each runs in a forked process, two at a time."""
    fork = multiprocessing.get_context("fork")
    waiting, running = list(faults), []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            receive, send = fork.Pipe(duplex=False)
            folder = tempfile.TemporaryDirectory()
            process = fork.Process(target=apply_and_test, args=(send, folder.name, waiting[0]))
            process.start()
            send.close()
            running.append((waiting.pop(0), process, receive, folder))
        fault, process, receive, folder = running.pop(0)
        try:
            result, test = receive.recv() if receive.poll(TIMEOUT) else ("caught", "no end")
        except EOFError:  # the process died without an answer
            result, test = "caught", "the process died"
        process.kill()
        process.join()
        folder.cleanup()
        yield fault, result, test


def check_green(faults: list[Fault]) -> None:
    """Without a fault the tests must pass, or a failure would prove nothing."""
    tests = sorted({name for fault in faults for name in fault.tests})
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
    args = parser.parse_args(argv)
    faults = [f for f in read_faults() if args.k in f"{f.module}: {f.what}"]

    import torch

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    start = time.time()
    if not args.no_green:
        check_green(faults)
    missed = 0
    for fault, result, test in results(faults):
        missed += result != "caught"
        print(f"{result:<12} {fault.module}: {fault.what}   {test}", flush=True)
    seconds = time.time() - start
    print(f"{len(faults) - missed} of {len(faults)} faults are caught, in {seconds:.0f} s")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
