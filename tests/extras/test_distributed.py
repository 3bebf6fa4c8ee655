"""N ranks with batch B train as one with batch N·B; ranks share work and end together."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.forking import WAYS, all_good, called, flags, forked, read_once
from helpers.running import ROOT, call, contents, good, pixels, refused, same
from helpers.training import (
    SIZE,
    encoded_photos,
    encoded_prompts,
    make_get_loss,
    parameters,
    small,
    spoiled,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alchemy import dataset, files
from alchemy.extras import distributed
from alchemy.formats import png
from alchemy.methods import captions, textual_inversion
from alchemy.methods.report import Report
from alchemy.training import TrainState, denoising_loss, train


def step_of(path):
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def relative_difference(one, other, prefix):
    """‖one − other‖ / ‖other‖ over all tensors of two files whose names start with the prefix."""
    flat = []
    for path in (one, other):
        tensors = sorted(load_file(path).items())
        flat.append(torch.cat([t.double().flatten() for k, t in tensors if k.startswith(prefix)]))
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


# Training


def test_each_rank_gets_its_part_of_the_batch():
    sdxl, photos, texts = small(), encoded_photos(5), ["a", "b", "c", None]
    photos = [replace(photo, prompt=texts[k % 3]) for k, photo in enumerate(photos)]
    buckets = {SIZE: photos[:3], (24, 40): photos[3:]}

    def plain(count, *place):
        return dataset.make_batcher(sdxl, photos, SIZE, 7, count, 3, *place)

    def captioned(count, *place):
        return captions.make_batcher(sdxl, buckets, 7, count, 3, 0.4, *place)

    def varied(count, *place):
        return textual_inversion.vary_prompts(plain(count, *place), texts[:3], 7, *place)

    def tensors(batch):
        prompts = torch.tensor([texts.index(prompt) for prompt in batch.prompts])
        return batch.x_0, batch.eps, batch.loss_mask, batch.t, batch.time_ids, prompts

    for make in (plain, captioned, varied):
        for at in ((0, 0), (0, 2), (5, 1), (6, 0)):
            parts = [tensors(make(2, rank, 3)(*at)) for rank in range(3)]
            whole = tensors(make(6)(*at))
            for mine, expected in zip(zip(*parts, strict=True), whole, strict=True):
                assert torch.equal(torch.cat(mine), expected)


def save_gradient(rank, world):
    """The losses of two micro-steps of 4 samples, and their gradient, as a file of the rank."""
    if world > 1:
        distributed.join()
    sdxl = small()
    photos, trained = encoded_photos(5), parameters(sdxl)
    get_batch = dataset.make_batcher(sdxl, photos, SIZE, 3, 4 // world, 2, rank, world)

    def get_loss(step, micro_step):
        return denoising_loss(sdxl, get_batch(step, micro_step), encoded_prompts(sdxl)).mean()

    get_loss, losses = distributed.mean_over_ranks(get_loss, trained.values(), 2), []
    for micro_step in range(2):
        losses.append(get_loss(5, micro_step))
        losses[-1].backward()
    tensors = {name: p.grad for name, p in trained.items()}
    tensors["losses"] = torch.stack(losses).detach()
    save_file(tensors, f"{rank}-of-{world}.safetensors")


def test_the_gradient_is_the_mean_over_ranks_and_micro_steps(tmp_path, close):
    save_gradient(0, 1)
    all_good(forked(2, partial(save_gradient, world=2)))
    whole = load_file("0-of-1.safetensors")
    for rank in range(2):
        for name, ours in load_file(f"{rank}-of-2.safetensors").items():
            close(ours, whole[name], 1e-6)


def train_with_nan(rank):
    """Four steps of two micro-steps; on rank 1 some predictions are NaN."""
    distributed.join()
    sdxl = small()
    state = TrainState.create(parameters(sdxl), 1e-2)
    bad = spoiled(sdxl, {3, 4, 6} if rank else ())
    get_loss = make_get_loss(bad, class_prompt=None, accumulation=2)
    get_loss = distributed.mean_over_ranks(get_loss, state.parameters.values(), 2)
    list(train(sdxl, state, get_loss, steps=4, accumulation=2))
    state.save(f"{rank}.safetensors", {})


def test_a_step_with_nan_on_one_rank_is_taken_by_none(tmp_path):
    all_good(forked(2, train_with_nan))
    one, other = (load_file(f"{rank}.safetensors") for rank in (0, 1))
    assert one["losses"].isfinite().tolist() == [True, False, False, True]
    assert torch.allclose(one["losses"], other["losses"], equal_nan=True)
    assert all(torch.equal(one[key], other[key]) for key in one if key != "losses")
    assert {int(t) for key, t in one.items() if key.startswith("step:")} == {2}


def test_only_rank_0_writes_and_previews_are_those_of_one_process(tiny, monkeypatch):
    def forbid_writing(rank):
        write = files.replace

        def replace(path, save):
            assert rank == 0, f"rank {rank} writes {path}"
            write(path, save)

        files.replace = png.replace = replace

    command = flags(tiny, "prior", "--batch", 1, "--accumulation", 1, "--learning-rate", 1e-30)
    command += ("--steps", 1, "--preview-every", 1, "--out")
    run, other = all_good(called(2, *command, "run", "--inspect", "page", before=forbid_writing))
    assert not other.out and {"lora.safetensors", "preview.png"} < set(contents("run"))
    good(call(*command, "alone"))
    rows = pixels("run/preview.png").shape[0] // 2  # the loss curve is below
    assert same(pixels("run/preview.png")[:rows], pixels("alone/preview.png")[:rows])


@pytest.fixture
def unfinished(monkeypatch):
    """The last state is kept, with its moments: they are sums of gradients."""
    monkeypatch.setattr(Report, "finish", lambda self: None)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_train_as_one_with_twice_the_batch(tiny, way, unfinished):
    all_good(called(0, *flags(tiny, way, "--batch", 2, "--out", "one")))
    all_good(called(2, *flags(tiny, way, "--batch", 1, "--out", "two")))
    # Measured: 4e-7 and 1e-5 with the whole UNet and text encoders, a tenth of it otherwise.
    paths = "two/state.safetensors", "one/state.safetensors"
    assert relative_difference(*paths, "losses") < 3e-6
    assert relative_difference(*paths, "exp_avg:") < 5e-5


def test_a_run_stopped_on_one_rank_resumes_in_one_process(tiny, unfinished):
    def stop_rank_1(rank):
        original = dataset.generator

        def generator(*numbers):
            if rank and numbers[1:] == (2, 0, 1):  # of its first sample
                signal.raise_signal(signal.SIGTERM)
            return original(*numbers)

        dataset.generator = generator

    all_good(called(0, *flags(tiny, "prior", "--batch", 2, "--out", "whole")))
    command = flags(tiny, "prior", "--batch", 1, "--out", "half")
    one, other = called(2, *command, before=stop_rank_1)
    assert (one.status, other.status, other.err) == (143, 143, "")
    assert one.err.splitlines()[-1].startswith("stopped after step 1;")
    (run,) = all_good(called(0, "train.py", "--out", "half", "--resume", "--batch", 2))
    assert "step 1 of 2" in run.err and "warning" not in run.err
    for prefix in ("losses", "exp_avg:"):
        paths = "half/state.safetensors", "whole/state.safetensors"
        assert relative_difference(*paths, prefix) < 3e-6


def test_torchrun_starts_the_ranks_and_its_sigterm_leaves_a_state(tiny):
    command = flags(tiny, "prior", "--batch", 1, "--steps", 100000, "--out", "run")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = subprocess.Popen(
        [sys.executable, *torchrun, str(ROOT / "train.py"), *map(str, command[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    state, deadline = Path("run/state.safetensors"), time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline:
        if state.exists() and step_of(state) > 2:
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    output = run.communicate(timeout=60)[1]
    steps = re.findall(r"stopped after step (\d+); the same command with --resume", output)
    assert run.returncode and steps == [str(step_of(state))]


# Sampling


def test_class_images_are_the_same_files_for_any_number_of_ranks(tiny):
    command = flags(tiny, "class", "--batch", 1, "--class-images", 5, "--steps", 1)
    command += ("--class-folder", "class", "--out", "run")
    good(call(*command))
    alone, kept = contents("class"), Path("class/0001.png")
    for name in alone.keys() - {kept.name}:
        Path("class", name).unlink()
    before = kept.stat().st_mtime_ns
    all_good(called(2, *command, "--overwrite"))
    assert contents("class") == alone and kept.stat().st_mtime_ns == before


def test_a_list_of_prompts_gives_the_same_files_for_any_number_of_ranks(tiny, lora_file):
    Path("prompts.txt").write_text("a photo of a sks dog\na dog at night\n")
    command = ("sample.py", "--prompts", "prompts.txt", "--weights", tiny, "--lora", lora_file)
    command += ("--count", 2, "--seed", 5, "--out", "set")
    all_good(called(2, *command))
    generated = contents("set")
    assert {"00000.png", "00003.png", "metadata.jsonl"} < set(generated)
    for name in ("00001.png", "00002.png", "metadata.jsonl"):
        Path("set", name).unlink()
    all_good(called(3, *command))
    assert contents("set") == generated
    shutil.rmtree("set")
    good(call(*command))
    assert contents("set") == generated


def test_images_of_several_ranks_get_names_that_do_not_collide(tiny):
    command = ("sample.py", "a dog", "--weights", tiny, "--count", 3, "--out")
    good(call(*command, "alone"))
    for _ in range(2):
        all_good(called(2, *command, "several"))
    assert len(contents("several")) == 6
    for name in contents("several"):
        assert same(pixels(f"several/{name}"), pixels(f"alone/{name[:4]}.png"))


# Errors


def test_a_bad_input_is_reported_once_and_ends_all_ranks(tiny):
    for argv, words in (
        (flags(tiny, "prior", "--size", 30, "--out", "run"), "30x30"),
        (("insert.py", "a dog", "--class-word", "dog"), "torchrun"),
    ):
        one, other = called(2, *argv)
        assert words in refused(one) and (other.status, other.err) == (2, "")
    assert not Path("run").exists()


def test_an_error_of_one_rank_is_reported_by_it(tiny, monkeypatch):
    def fill_disk(rank):
        def save(*_):
            raise OSError("the disk is full")

        png.save = save if rank else png.save

    monkeypatch.setattr(distributed, "RANK_0_FIRST", timedelta(seconds=0.5))
    command = ("sample.py", "a dog", "--weights", tiny, "--count", 2, "--out", "set")
    runs = called(3, *command, before=fill_disk)
    assert [run.status for run in runs] == [2, 2, 2] and sorted(contents("set")) == ["0000.png"]
    assert runs[1].err == "rank 1: error: the disk is full\n"
    assert "error" not in runs[0].err + runs[2].err


def test_a_killed_rank_ends_the_others_with_one_line(tiny):
    def kill_rank_1(rank):
        original = dataset.generator

        def generator(*numbers):
            if rank and numbers[1] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*numbers)

        dataset.generator = generator

    command = flags(tiny, "prior", "--save-every", 1, "--out", "run")
    one, other = called(2, *command, before=kill_rank_1)
    assert (one.status, other.status) == (2, -9) and "Traceback" not in one.err
    last = one.err.splitlines()[-1]
    assert last.startswith("error: another rank has ended") and "--resume" in last
    assert "state.safetensors" in contents("run")
