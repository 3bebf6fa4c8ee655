"""What a bad flag and a place that cannot be written get: one line that names it, exit status 2, no half-written file, and what was
there is still there."""

import errno
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alchemy import files, pipeline, sampling, vae
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import (
    SCENE,
    call,
    contents,
    drawn,
    good,
    inserted,
    lora_file,
    nothing_written,
    photos,
    picture,
    process,
    quick,
    refused,  # noqa: F401
    taught,
    tiny,
)

# Flags


@pytest.mark.parametrize(
    "script, argv, words",
    [
        ("train.py", ["--frobnicate"], ["unrecognized arguments: --frobnicate"]),
        ("sample.py", ["--step", "3"], ["unrecognized arguments: --step"]),
        ("train.py", ["--method", "magic"], ["--method", "magic", "lora"]),
        ("train.py", ["--steps"], ["--steps", "expected one argument"]),
        ("train.py", ["--steps", "0"], ["--steps", "at least 1"]),
        ("train.py", ["--steps", "-5"], ["--steps", "-5", "at least 1"]),
        ("train.py", ["--steps", "1.5"], ["--steps", "1.5", "whole number"]),
        ("train.py", ["--learning-rate", "0"], ["--learning-rate", "above 0"]),
        ("train.py", ["--learning-rate", "nan"], ["--learning-rate", "nan"]),
        ("train.py", ["--learning-rate", "inf"], ["--learning-rate", "inf"]),
        ("train.py", ["--learning-rate", "fast"], ["--learning-rate", "'fast' is not a number"]),
        ("train.py", ["--rank", "0"], ["--rank"]),
        ("train.py", ["--alpha", "-1"], ["--alpha", "above 0"]),
        ("train.py", ["--batch", "0"], ["--batch"]),
        ("train.py", ["--save-every", "0"], ["--save-every"]),
        ("train.py", ["--prior-weight", "-1"], ["--prior-weight", "at least 0"]),
        ("train.py", ["--seed", "-1"], ["--seed", "at least 0"]),
        ("train.py", ["photos"], ["--class-word is missing"]),
        ("train.py", ["--caption", "a photo"], ["--caption 'a photo'", "{}"]),
        (
            "train.py",
            ["--overwrite", "--resume"],
            ["--resume", "not allowed with argument --overwrite"],
        ),
        ("sample.py", ["--sampler", "dpm"], ["--sampler", "dpm", "euler_ancestral"]),
        ("sample.py", ["--timestep-spacing", "karras"], ["--timestep-spacing", "karras", "trailing"]),
        ("sample.py", ["--steps", "-3"], ["--steps", "at least 1"]),
        ("sample.py", ["--count", "0"], ["--count", "at least 1"]),
        ("sample.py", ["--strength", "0"], ["--strength", "above 0 and at most 1"]),
        ("sample.py", ["--strength", "1.5"], ["--strength", "1.5"]),
        ("sample.py", ["--eta", "2"], ["--eta", "at least 0 and at most 1"]),
        ("sample.py", ["--seed", str(2**64)], ["--seed"]),
        ("sample.py", ["--guidance", "nan"], ["--guidance"]),
        ("sample.py", ["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        *(
            ("sample.py", ["--size", text], ["--size", text, "WIDTHxHEIGHT"])
            for text in ("big", "0", "-8", "64x", "64x64x64", "1e3", "²")
        ),
        ("sample.py", ["a dog", "--strength", "0.5"], ["--strength", "--image"]),
        (
            "insert.py",
            [SCENE, "--class-word", "dog", "--image", "a.png", "--size", "64"],
            ["--size", "--image"],
        ),
        ("sample.py", ["a dog", "--config", "."], ["has configurations of its own", "single file"]),
        ("sample.py", ["--out", "beach.jpg"], ["beach.jpg", ".png"]),
        ("insert.py", ["--out", "beach.webp"], ["beach.webp", ".png"]),
        *(
            (f"{script}.py", ["--inspect-full"], ["--inspect-full", "--inspect DIR"])
            for script in ("sample", "insert", "train")
        ),
        ("insert.py", [SCENE], ["--class-word is missing"]),
        ("insert.py", [SCENE, "--class-word", "dog"], ["--lora is missing"]),
        ("insert.py", [SCENE, "--class-word", "cat"], ["'cat'", SCENE, "--class-word"]),
        ("insert.py", ["--strength", "0"], ["--strength"]),
        ("insert.py", ["--strength", "1.5"], ["--strength"]),
        ("insert.py", ["--threshold", "-1"], ["--threshold"]),
        ("insert.py", ["--dilate", "7"], ["--dilate"]),
    ],
)
def test_a_flag_that_makes_no_sense_is_named(script, argv, words):
    line = refused(call(script, *argv), *words)
    assert "usage:" not in line and nothing_written()


def test_a_process_too_ends_in_one_line_and_status_2():
    run = process("sample.py", "--steps", "many")
    assert (
        run.err
        == "error: argument --steps: 'many' is not a whole number (--help shows every flag)\n"
    )
    refused(run)


def test_a_size_that_does_not_fit_is_refused_before_anything_is_written(taught, drawn, inserted):
    for run in (
        taught("--size", 30),
        drawn("--size", "32x30"),
        drawn("--size", 3),
        inserted("--size", 34),
    ):
        refused(run, "does not fit", "multiples of 4")
    assert nothing_written()


def test_more_steps_than_timesteps_and_too_little_strength_are_refused(drawn, inserted, tmp_path):
    picture(32, 32).save("start.png")
    refused(drawn("--steps", 2000), "steps is 2000", "1000")
    refused(
        drawn("--image", "start.png", "--strength", 0.01),
        "strength 0.01 of 3 steps is no step at all",
    )
    refused(inserted("--image", "start.png", "--strength", 0.01), "strength 0.01 of 3 steps")
    assert nothing_written()


def test_a_device_that_is_not_there_is_named(drawn):
    refused(drawn("--device", "abacus"), "abacus", "--device cpu")


def test_too_little_memory_is_said_in_a_line_and_what_helps(drawn, monkeypatch):
    for error in (
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ):
        monkeypatch.setattr(
            pipeline, "sample", lambda *_, error=error, **__: (_ for _ in ()).throw(error)
        )
        refused(drawn(), "out of memory", "--size", "--dtype bfloat16")
    with pytest.raises(RuntimeError, match="a fault of ours"):  # which must not pass for bad input
        monkeypatch.setattr(
            pipeline,
            "sample",
            lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a fault of ours")),
        )
        drawn()


def test_what_the_vae_cannot_decode_is_said_and_no_picture_written(drawn, monkeypatch):
    monkeypatch.setattr(
        vae.Decoder, "forward", lambda self, x: torch.full((1, 3, 32, 32), float("nan"))
    )
    refused(drawn(), "NaN", "bfloat16 or float32")
    assert nothing_written()


# Where it is to be written


@pytest.mark.parametrize(
    "out", ["taken", "taken/below", "/proc/nowhere", "/dev/null/x", "/dev/null"]
)
def test_a_place_that_cannot_be_written_is_named_before_the_work_begins(
    taught, drawn, inserted, tmp_path, out
):
    (tmp_path / "taken").write_text("a file")
    for run in (taught("--out", out), drawn("--out", out), inserted("--out", out)):
        refused(run, f"--out {out}", "another folder")
    for run in (drawn("--out", f"{out}/x.png"), inserted("--out", f"{out}/x.png")):
        refused(run, f"--out {out}", "another folder")
    assert Path("taken").read_text() == "a file" and nothing_written()


def test_trying_whether_a_folder_can_be_written_leaves_no_trace(drawn, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/.writable").write_text("somebody's own")
    before = contents("here")
    refused(drawn("--out", "here", "--steps", 2000))
    assert contents("here") == before


class FullDisk:
    """os.fsync fails from the n-th call on, as where the disk is full only then."""

    def __init__(self, after):
        self.left, self.whole = after, files.os.fsync

    def __call__(self, f):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.whole(f)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_when_the_disk_is_full_the_file_is_named_and_no_half_of_it_stays(
    taught, drawn, inserted, monkeypatch, after
):
    picture(32, 32).save("own.png")
    Image.fromarray(np.pad(np.full((16, 16), 255, dtype=np.uint8), 8)).save("mask.png")
    for name, run, whole in (
        (
            "t",
            lambda: taught("--out", "t"),
            ["settings.json", "state.safetensors", "state.safetensors", "lora.safetensors"],
        ),
        ("s", lambda: drawn("--out", "s", "--count", 4), [f"000{i}.png" for i in range(4)]),
        (
            "i",
            lambda: inserted("--image", "own.png", "--mask", "mask.png", "--out", "i"),
            ["result.png", "scene.png", "soft_mask.png", "mask.png"],
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", FullDisk(after))
            ended = run()
        lines = [line for line in ended.err.splitlines() if line.startswith("error:")]
        assert ended.status == 2 and len(lines) == 1 and "Traceback" not in ended.err
        assert f"{name}/{whole[after]}: could not be written (No space left on device)" in lines[0]
        assert sorted(contents(name)) == sorted(set(whole[:after]))
    good(
        call("train.py", "--out", "t", "--resume")
    ) if after == 3 else None  # all that was paid for is in the state


def test_a_real_limit_on_the_size_of_files_is_met_the_same_way(tiny, tmp_path):
    argv = (
        "train.py",
        photos(tmp_path / "photos"),
        "--class-word",
        "dog",
        "--weights",
        tiny,
        "--steps",
        1,
        "--rank",
        2,
        "--preview-every",
        0,
        "--out",
        "run",
    )
    run = process(
        *argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    )
    refused(run, "run/state.safetensors: could not be written", "File too large")
    assert sorted(contents("run")) == ["settings.json"]


def test_a_later_failure_leaves_the_pictures_that_were_there(drawn, monkeypatch):
    good(drawn("--out", "here"))
    before = contents("here")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", FullDisk(0))
        refused(drawn("--out", "here"), "here/0000-1.png")
    assert contents("here") == before
