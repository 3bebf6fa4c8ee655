"""Where results go: places that cannot be written, full disks, runs at once, names, messages."""

import contextlib
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.running import (
    ROOT,
    call,
    contents,
    good,
    nothing_written,
    photos,
    picture,
    process,
    refused,
)
from PIL import Image

from alchemy import cli, files, pipeline
from alchemy.formats.png import read_metadata

# Refused before the work


@pytest.mark.parametrize("out", ["taken", "taken/below", "/proc/nowhere", "/dev/null/x"])
def test_a_place_that_cannot_be_written_is_named_first(taught, drawn, inserted, tmp_path, out):
    (tmp_path / "taken").write_text("a file")
    for run in (taught("--out", out), drawn("--out", out), inserted("--out", out)):
        refused(run, f"--out {out}", "another folder")
    for run in (drawn("--out", f"{out}/x.png"), inserted("--out", f"{out}/x.png")):
        refused(run, f"--out {out}", "another folder")
    assert Path("taken").read_text() == "a file" and nothing_written()


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128])
def test_a_name_that_is_too_long_is_refused_before_the_work(drawn, inserted, monkeypatch, name):
    monkeypatch.setattr(pipeline, "sample", None)
    for run in (drawn("--out", f"{name}.png"), inserted("--out", f"{name}.png")):
        refused(run, "--out", "too long")
    assert nothing_written()


def test_a_name_that_is_too_long_with_its_number_is_refused_before_the_work(drawn, monkeypatch):
    name = f"{'x' * 251}.png"
    good(drawn("--out", name))
    monkeypatch.setattr(pipeline, "sample", None)
    for flags in (("--count", 2), ()):
        refused(drawn("--out", name, *flags), "--out", "too long")
    assert list(contents(".")) == [name]


def test_a_long_name_that_fits_is_written(drawn):
    run = good(drawn("--out", f"out/{'x' * 240}.png"))
    assert sorted(contents("out")) == [run.wrote[0].name]


def test_folders_made_for_a_run_that_fails_are_removed_and_others_kept(drawn, inserted, tmp_path):
    (tmp_path / "here").mkdir()
    for run in (drawn, inserted):
        refused(run("--out", "new/below", "--steps", 2000, "--inspect", "page"), "2000", "1000")
        refused(run("--out", "here", "--size", "34x30"), "34x30", "multiples of 4")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_strength_that_leaves_no_step_is_refused(drawn, inserted, tmp_path):
    picture(32, 32).save(tmp_path / "start.png")
    for run in (drawn, inserted):
        refused(run("--image", "start.png", "--strength", 0.01), "strength 0.01 of 3 steps")
    assert nothing_written()


# A full disk


class FullDisk:
    """os.fsync of a file fails from the n-th call on, as on a disk that is full only then."""

    def __init__(self, after):
        self.left, self.whole = after, os.fsync

    def __call__(self, descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            return self.whole(descriptor)
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.whole(descriptor)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_on_a_full_disk_the_file_is_named_and_no_part_of_it_stays(
    drawn, inserted, monkeypatch, after
):
    picture(32, 32).save("own.png")
    Image.fromarray(np.pad(np.full((16, 16), 255, dtype=np.uint8), 8)).save("mask.png")
    images = ("--image", "own.png", "--mask", "mask.png")
    masks = ["result.png", "scene.png", "soft_mask.png", "mask.png"]
    for run, flags, folder, names in (
        (drawn, ("--count", 4), "s", [f"000{i}.png" for i in range(4)]),
        (inserted, images, "i", masks),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", FullDisk(after))
            ended = run(*flags, "--out", folder)
        error = ended.err.splitlines()[-1]
        expected = f"{folder}/{names[after]}: could not be written (No space left on device)"
        assert ended.status == 2 and expected in error
        assert sorted(contents(folder)) == sorted(names[:after])


def test_a_file_size_limit_is_met_the_same_way(tiny, tmp_path):
    flags = ("--class-word", "dog", "--weights", tiny, "--steps", 1, "--rank", 2)
    argv = ("train.py", photos(tmp_path / "photos"), *flags, "--preview-every", 0, "--out", "run")
    limit = (20000, 20000)
    run = process(*argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    refused(run, "run/state.safetensors: could not be written", "File too large")
    assert sorted(contents("run")) == ["log.csv", "settings.json"]


def test_a_later_failure_leaves_the_existing_images(drawn, monkeypatch):
    good(drawn("--out", "here"))
    before = contents("here")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", FullDisk(0))
        refused(drawn("--out", "here"), "here/0000-1.png")
    assert contents("here") == before


# Several runs at once


def start(script, *argv, **options):
    argv = [sys.executable, str(ROOT / script), *map(str, argv)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, env=env, **pipes | options)


def test_two_runs_of_sample_at_once_lose_no_image(tiny):
    flags = ("a dog", "--weights", tiny, "--steps", 1, "--out", "out")
    runs = [start("sample.py", *flags, "--count", 6) for _ in range(2)]
    outputs = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    lines = "".join(out for out, _ in outputs).splitlines()
    reported = [line.split("/")[1] for line in lines if line.startswith("wrote ")]
    assert len(set(reported)) == 12 and sorted(contents("out")) == sorted(reported)
    for name in reported:
        assert read_metadata(f"out/{name}")["seed"] == int(name[:4])


def test_files_created_at_once_take_different_names(tmp_path, monkeypatch):
    def write(new):
        new.write_text("mine")
        (tmp_path / "a.png").write_text("another's, which came first")

    assert files.create(tmp_path / "a.png", write) == tmp_path / "a-1.png"
    link = os.link
    monkeypatch.setattr(files.os, "link", lambda *_: link("/nowhere", tmp_path / "x"))
    assert files.create(tmp_path / "a.png", write) == tmp_path / "a-2.png"  # without hard links
    assert contents(tmp_path) == {
        "a.png": b"another's, which came first",
        "a-1.png": b"mine",
        "a-2.png": b"mine",
    }


def test_a_locked_folder_is_refused_or_passed_over(drawn, inserted, tmp_path):
    (tmp_path / "prompts.txt").write_text("a")
    with files.lock_folder(make("set")), files.lock_folder(make("out/insert")):
        run = call("sample.py", "--prompts", "prompts.txt", "--out", "set")
        refused(run, "--out set: another run is writing there")
        good(inserted("--steps", 8))
        assert "result.png" in contents("out/insert-1")
        assert contents("set") == {".lock": b""}
    assert contents("set") == {} == contents("out/insert")


def make(folder):
    Path(folder).mkdir(parents=True)
    return folder


def test_the_lock_of_a_killed_process_is_released(tmp_path):
    code = "import time; from alchemy import files\n"
    code += f"with files.lock_folder({str(tmp_path)!r}):\n"
    code += "    print('locked', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(files.FolderInUseError), files.lock_folder(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with files.lock_folder(tmp_path):
        pass
    assert contents(tmp_path) == {}


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    whole, calls = files.try_lock, []

    def try_lock(file):
        if not calls:
            (tmp_path / ".lock").unlink()  # as its last holder does at the end
        calls.append(file)
        return whole(file)

    monkeypatch.setattr(files, "try_lock", try_lock)
    with files.lock_folder(tmp_path):
        assert (tmp_path / ".lock").exists()
        with pytest.raises(files.FolderInUseError), files.lock_folder(tmp_path):
            pass
    assert len(calls) == 3


# Messages


def test_control_characters_reach_no_terminal_and_messages_are_short(tiny, tmp_path):
    run = call("sample.py", "a", "--weights", tiny, "--image", "\x1b[2J\x9b\u202e.png")
    line = refused(run, "\\x1b[2J\\x9b\\u202e.png")
    assert line.isprintable()
    refused(call("sample.py", "a", "--weights", "x" * 5000), " ... ")
    run = good(call("sample.py", "a", "--weights", tiny, "--steps", 1, "--out", "\x1b[2J"))
    assert run.out.startswith("wrote \\x1b[2J/0000.png\n") and "\x1b" not in run.err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_path_that_stdout_cannot_encode_is_escaped(tiny, encoding):
    before = f"import io; sys.stdout = io.TextIOWrapper(sys.stdout.buffer, {encoding!r})"
    argv = ("a", "--weights", tiny, "--steps", 1, "--count", 2, "--out", "bücher\udcff")
    run = good(process("sample.py", *argv, before=before))
    name = "b\\xfccher" if encoding == "ascii" else "bücher"
    assert run.out.splitlines()[:2] == [f"wrote {name}\\udcff/000{i}.png" for i in (0, 1)]


def test_text_that_utf_8_cannot_hold_is_written_and_read_back(drawn, taught, tiny):
    odd = "a dog \udcff"
    good(drawn("--negative-prompt", odd, "--out", "a.png", "--inspect", "page"))
    metadata = read_metadata("a.png")
    assert metadata["negative_prompt"] == odd and Path("page/index.html").exists()
    Path("photos\udcff").mkdir()
    Path("photos/0.png").rename("photos\udcff/0.png")
    train = ("train.py", "photos\udcff", "--class-word", "dog", "--weights", tiny, "--rank", 2)
    good(call(*train, "--steps", 1, "--preview-every", 0, "--out", "run"))
    assert json.loads(Path("run/settings.json").read_text())["photos"] == "photos\udcff"
    # safetensors can neither read nor write such a path.
    refused(taught("--out", "run\udcff"), "run\\udcff is not UTF-8")
    refused(drawn("--lora", "lora\udcff"), "lora\\udcff: its name is not UTF-8")


def test_a_run_with_closed_stderr_writes_its_image(tiny):
    argv = ("a", "--weights", tiny, "--steps", 1)
    run = start("sample.py", *argv, stderr=None, preexec_fn=lambda: os.close(2))
    assert run.communicate(timeout=120)[0].startswith("wrote out/samples/0000.png\n")
    assert run.returncode == 0


def test_a_run_whose_messages_cannot_be_written_writes_its_image(tiny):
    argv = ("a", "--weights", tiny, "--steps", 1)
    with open("/dev/full", "w") as full:
        run = start("sample.py", *argv, stderr=full)
    assert run.communicate(timeout=120)[0].startswith("wrote out/samples/0000.png\n")
    assert run.returncode == 0
    with open("/dev/full", "w") as full:
        assert start("sample.py", "--steps", 0, stderr=full).wait(timeout=120) == 2


def test_the_warning_of_a_long_prompt_is_cut(tiny):
    run = good(call("sample.py", "word " * 2000, "--weights", tiny, "--steps", 1))
    (line,) = [line for line in run.err.splitlines() if "too long" in line]
    assert line.startswith("warning: prompt too long") and len(line) < 400


@pytest.mark.parametrize("delay", [0.02, 0.1, 1.0])
def test_an_interrupt_at_any_time_gives_no_traceback(tiny, delay):
    run = start("sample.py", "a", "--weights", tiny, "--steps", 999)
    time.sleep(delay)
    run.send_signal(signal.SIGINT)
    try:
        _, err = run.communicate(timeout=20)
    except subprocess.TimeoutExpired:  # Python's own start can swallow a signal
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=120)
    # Only Python itself, before the script's first statement, may still show one.
    assert not re.search(r'(sample\.py", line [1-9]|/alchemy/\w+\.py")', err), err
    assert run.returncode in (1, 130, -signal.SIGINT)
    with contextlib.suppress(FileNotFoundError):
        assert contents("out") == {}


OUT_OF_MEMORY = [
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line_with_what_helps(drawn, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(pipeline, "sample", fail)
    refused(drawn(), "out of memory", "--size", "--dtype bfloat16")


@pytest.mark.parametrize("advice, said", [("use --fp8-base", "use --fp8-base"), (None, "--size")])
def test_out_of_memory_names_the_flags_that_a_run_suggests(advice, said, capsys):
    def main():
        with cli.suggest_when_out_of_memory(lambda: advice):
            raise OUT_OF_MEMORY[0]

    with pytest.raises(SystemExit):
        cli.run(main)
    assert f"out of memory: {said}" in capsys.readouterr().err.replace("use a smaller ", "")
