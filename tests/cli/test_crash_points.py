"""A run killed before any of its file-system operations ends, resumed, in the same bytes.

ALCHEMY_CRASH_POINTS=all tries every operation; by default a sample of them. The last ones, where
results are written and the state is removed, are always among them.
"""

import builtins
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
from helpers.running import call, contents, good, photos

from alchemy import files

OPERATIONS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "link")
ALL = os.environ.get("ALCHEMY_CRASH_POINTS") == "all"
KILLED = 9
RUNS = {
    "lora": ("--rank", 2),
    "full": ("--method", "full", "--prior-weight", 0),
    "textual-inversion": ("--method", "textual-inversion", "--token", "<my-dog>"),
    "class-images": ("--rank", 2, "--class-images", 2),
}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class CrashPoint:
    """Counts the run's file-system operations; the process dies before operation number `at`."""

    def __init__(self, at=None):
        self.at, self.count = at, 0
        for name in OPERATIONS:
            setattr(os, name, self.counted(getattr(os, name)))
        safetensors.torch.save_file = self.counted(safetensors.torch.save_file)
        plain_open, counted_open = builtins.open, self.counted(builtins.open)

        def choose_open(file, mode="r", *args, **kwargs):
            is_writing = isinstance(mode, str) and set(mode) & set("wax+")
            return (counted_open if is_writing else plain_open)(file, mode, *args, **kwargs)

        builtins.open = choose_open

    def counted(self, function):
        def operation(*args, **kwargs):
            # Absolute paths are those of libraries, which make their caches once.
            is_path = args and isinstance(args[0], (str, Path))
            self.count += not (is_path and os.path.isabs(args[0]))
            if self.count == self.at:
                os._exit(KILLED)
            return function(*args, **kwargs)

        return operation


def in_child(argv, at=None):
    """Run train.py in a forked process that dies at that operation: (status, operations)."""
    queue = multiprocessing.get_context("fork").SimpleQueue()

    def work():
        point = CrashPoint(at)
        run = call(*argv)
        queue.put((run.status, point.count))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(300)
    assert child.exitcode in (0, KILLED), child.exitcode
    return queue.get() if child.exitcode == 0 else (KILLED, at)


def results(folder):
    """What has to be equal: not the times in the log, nor the settings."""
    skipped = ("log.csv", "log.jsonl", "settings.json", ".lock")
    return {name: data for name, data in contents(folder).items() if name not in skipped}


def leftovers(folder):
    return list(Path(folder).rglob(".tmp*"))


def chosen(count):
    """The operations to crash at."""
    if ALL:
        return range(1, count + 1)
    sample = {1 + k * count // 6 for k in range(6)} | {count - k for k in range(10)}
    return sorted(sample)


@pytest.mark.parametrize("method", RUNS)
def test_a_run_killed_at_any_file_operation_resumes_to_the_same_bytes(tiny, tmp_path, method):
    photos(tmp_path / "photos")
    base = ("--class-word", "dog", "--weights", tiny, "--batch", 1, "--preview-every", 0)
    flags = ("train.py", "photos", *base, "--steps", 2, "--save-every", 1, *RUNS[method])
    flags = (*flags, "--out", "run")
    status, count = in_child(flags)
    assert status == 0 and count > 20
    expected = results("run")
    for at in chosen(count):
        shutil.rmtree("run")
        assert in_child(flags, at)[0] == KILLED, at
        has_settings = Path("run/settings.json").exists()
        resume = ("train.py", "--out", "run", "--resume")
        run = call(*(resume if has_settings else flags))
        if "this run is finished" not in run.err:
            good(run)
            assert not Path("run/.lock").exists()
        assert results("run") == expected, f"operation {at} of {count}"
        assert not leftovers("run"), at


def test_a_set_killed_at_any_file_operation_is_continued_to_the_same_bytes(tiny, monkeypatch):
    Path("prompts.txt").write_text("a dog\na cat\n")
    flags = ("sample.py", "--prompts", "prompts.txt", "--weights", tiny, "--out", "run")
    status, count = in_child(flags)
    assert status == 0 and count > 20
    expected = results("run")
    monkeypatch.setattr(files, "STALE", 0)  # the killed process was the only one
    for at in chosen(count):
        shutil.rmtree("run")
        assert in_child(flags, at)[0] == KILLED, at
        good(call(*flags))
        assert results("run") == expected and not leftovers("run"), f"operation {at} of {count}"
