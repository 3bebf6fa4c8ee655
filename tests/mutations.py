"""Do the tests notice? One-line faults are put into a copy of the package, one at a time; each must turn a test red.

    python tests/mutations.py [-k WORD]        # all of them, two at a time
    python tests/mutations.py --green          # where the tests have just been run: they are not run once more without a fault

The faults stand in faults.py. The exit status is 1 if a fault is survived, or if an old text is not found exactly once (the code has
changed: change the fault with it).
Needs fork (Linux, macOS): torch is imported once, not for each fault.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from faults import FAULTS

ROOT = Path(__file__).resolve().parents[1]


def copy(to):
    """What the tests need: the package and the tests as copies, the large files as links."""
    (to / "repo").mkdir()
    shutil.copytree(
        ROOT / "alchemy", to / "repo" / "alchemy", ignore=shutil.ignore_patterns("__pycache__")
    )
    for script in ("train.py", "sample.py", "insert.py"):
        shutil.copy(ROOT / script, to / "repo")
    (to / "repo" / "tests").mkdir()
    for file in (ROOT / "tests").glob("*.py"):
        shutil.copy(file, to / "repo" / "tests")
    (to / "repo" / "tests" / "reference").symlink_to(ROOT / "tests" / "reference")
    (to / "repo" / "weights").symlink_to(ROOT / "weights")
    if (ROOT.parent / "shared").exists():
        (to / "shared").symlink_to(ROOT.parent / "shared")
    return to / "repo"


def test(repo, tests):
    """Run test files of a copy, in a process of its own: pytest's exit status, and what it said."""
    import pytest

    os.chdir(repo)
    sys.path.insert(0, str(repo))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    assert Path(sys.modules["alchemy"].__file__).is_relative_to(repo)
    return int(status), out.getvalue()


def attempt(answer, folder, fault):
    """Make the copy in folder, put the fault in, run its tests, and answer (what came of it, the test that noticed)."""
    module, names, _, old, new = fault
    repo, tests = copy(Path(folder).resolve()), [f"tests/test_{name}.py" for name in names]
    if not module:  # the tests must be green to begin with: otherwise a fault would prove nothing
        status, out = test(repo, [*tests, "-k", "not trajectory"])
        return answer.to_device(("green" if status == 0 else "RED", out))
    file = repo / "alchemy" / f"{module}.py"
    text = file.read_text(encoding="utf-8")
    if text.count(old) != 1:
        return answer.to_device((f"old text found {text.count(old)} times", ""))
    file.write_text(text.replace(old, new), encoding="utf-8")
    status, out = test(repo, tests)
    red = next(
        (
            line.split("::")[-1].split(" - ")[0]
            for line in out.splitlines()
            if line.startswith("FAILED")
        ),
        "",
    )
    answer.to_device(
        ("caught" if red else "NOT CAUGHT" if status == 0 else f"pytest ended with {status}", red)
    )


def results(faults, at_once=2):
    """Yield (fault, what came of it, the test) in order, a forked process for each, two at a time."""
    fork, running = multiprocessing.get_context("fork"), []
    for fault in [*faults, *[None] * at_once]:
        if len(running) == at_once or fault is None and running:
            earlier, process, folder, answer = running.pop(0)
            yield (
                earlier,
                *(answer.recv() if answer.poll(120) else ("caught", "no end within two minutes")),
            )
            process.kill(), process.join(), folder.cleanup()
        if fault:
            (answer, end), folder = fork.Pipe(duplex=False), tempfile.TemporaryDirectory()
            process = fork.Process(target=attempt, args=(end, folder.name, fault))
            process.start(), end.close()
            running.append((fault, process, folder, answer))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-k",
        metavar="WORD",
        default="",
        help="only the faults whose file or description has this in it",
    )
    parser.add_argument(
        "--green", action="store_true", help="the tests are known to be green without a fault"
    )
    args = parser.parse_args(argv)
    faults = [
        (module, names.split(), *fault)
        for (module, names), group in FAULTS.items()
        for fault in group
        if args.k in f"{module}: {fault[0]}"
    ]
    import torch

    torch.set_num_threads(1)
    sys.dont_write_bytecode, start, caught = True, time.time(), 0
    unchanged = (None, sorted({name for fault in faults for name in fault[1]}), "", "", "")
    for (module, _, name, *_), result, said in results(
        faults if args.green else [unchanged, *faults]
    ):
        if result == "RED":
            sys.exit(f"{said}\nthe tests fail before any fault is made")
        if module:
            caught += result == "caught"
            print(f"{result:<12} {module}: {name}" + (f"   ({said})" if said else ""), flush=True)
    print(f"{caught} of {len(faults)} faults are caught, in {time.time() - start:.0f} s")
    return caught < len(faults)


if __name__ == "__main__":
    sys.exit(main())
