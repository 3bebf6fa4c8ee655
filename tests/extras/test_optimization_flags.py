"""--fp8-base and --merge in the scripts."""

import json

import pytest
from helpers.running import call, contents, good, nothing_written, photos, pixels, refused, same

from alchemy import lora
from alchemy.extras import fp8


@pytest.fixture
def image(tiny):
    """image(flags): the pixels that sample.py writes."""

    def sample(*argv):
        run = good(call("sample.py", "a dog", "--weights", tiny, "--size", 32, *argv))
        return pixels(run.wrote[0]).astype(int)

    return sample


@pytest.fixture
def stored(monkeypatch):
    """A list that grows by a shape with each weight that is stored in fp8."""
    shapes, pack = [], fp8.pack
    monkeypatch.setattr(fp8, "pack", lambda weight: shapes.append(weight.shape) or pack(weight))
    return shapes


def test_fp8_base_samples_nearly_the_same_image(image, lora_file, stored):
    plain = image("--lora", lora_file)
    assert not stored
    small = image("--lora", lora_file, "--fp8-base")
    assert len(stored) > 100 and not same(small, plain)
    assert abs(small - plain).mean() < 4
    assert not same(image("--fp8-base"), small)  # the LoRA is applied


def test_a_merged_lora_samples_the_same_image(image, lora_file, monkeypatch):
    calls, apply_to = [], lora.Adapter.apply_to
    monkeypatch.setattr(lora.Adapter, "apply_to", lambda *args: calls.append(1) or apply_to(*args))
    beside, plain, before = image("--lora", lora_file), image(), len(calls)
    merged = image("--lora", lora_file, "--merge")
    assert len(calls) == before > 0
    assert abs(merged - beside).max() <= 1 and abs(merged - plain).max() > 5


def test_flags_that_exclude_each_other_are_refused(tiny, lora_file, tmp_path):
    flags = ("--weights", tiny, "--lora", lora_file, "--merge", "--fp8-base")
    refused(call("sample.py", "a dog", *flags), "--merge", "--fp8-base")
    flags = ("--class-word", "dog", "--weights", tiny, "--method", "full", "--fp8-base")
    run = call("train.py", photos(tmp_path / "photos"), *flags)
    refused(run, "--fp8-base", "--method full")
    assert nothing_written()


def test_training_on_an_fp8_base_resumes_bit_for_bit(tiny, tmp_path, stored, stopped):
    flags = f"--size 16 --batch 1 --rank 2 --learning-rate 1e-3 --steps 3 --weights {tiny}".split()
    flags += ["--class-word", "dog", "--preview-every", 2, "--fp8-base"]
    flags = ["train.py", photos(tmp_path / "photos"), *flags]
    good(call(*flags, "--out", "whole/run"))
    whole = contents("whole/run")
    assert len(stored) > 100 and json.loads(whole["settings.json"])["fp8_base"] is True
    assert stopped((*flags, "--out", "broken/run"), step=1).status == 143
    good(call("train.py", "--resume", "--out", "broken/run"))
    assert contents("broken/run")["lora.safetensors"] == whole["lora.safetensors"]
    good(call(*flags, "--out", "plain/run", "--no-fp8-base"))
    assert contents("plain/run")["lora.safetensors"] != whole["lora.safetensors"]


def test_a_set_of_samples_is_not_continued_with_another_base(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    flags = ("sample.py", "--prompts", "prompts.txt", "--weights", tiny, "--out", "set")
    good(call(*flags))
    refused(call(*flags, "--fp8-base"), "fp8_base", "name another folder")
