"""The flags of the savers in the scripts."""

import json
import signal

import pytest

from alchemy import dataset, lora
from alchemy.extras import fp8
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import (
    call,
    contents,
    good,
    lora_file,
    nothing_written,
    photos,
    pixels,
    quick,
    refused,
    same,
    tiny,
)  # noqa: F401


@pytest.fixture
def picture(tiny):
    """picture(flags): what sample.py draws."""
    return lambda *argv: pixels(
        good(call("sample.py", "a dog", "--weights", tiny, "--size", 32, *argv)).wrote[0]
    )


@pytest.fixture
def stored(monkeypatch):
    """A list that grows by a shape with each weight that goes into fp8."""
    shapes, pack = [], fp8.pack
    monkeypatch.setattr(fp8, "pack", lambda weight: shapes.append(weight.shape) or pack(weight))
    return shapes


def test_fp8_base_draws_nearly_the_same_picture(picture, lora_file, stored):
    plain = picture("--lora", lora_file)
    assert not stored
    small = picture("--lora", lora_file, "--fp8-base")
    assert (
        len(stored) > 100 and not same(small, plain) and abs(small.astype(int) - plain).mean() < 4
    )
    assert not same(picture("--fp8-base"), small)  # the LoRA is on it


def test_a_merged_lora_draws_the_same_picture(picture, lora_file, monkeypatch):
    calls, add = [], lora.Adapter.apply_to
    monkeypatch.setattr(lora.Adapter, "apply_to", lambda *args: calls.append(1) or add(*args))
    beside, plain, before = picture("--lora", lora_file), picture(), len(calls)
    merged = picture("--lora", lora_file, "--merge")
    assert (
        len(calls) == before > 0
        and abs(merged.astype(int) - beside).max() <= 1
        and abs(merged.astype(int) - plain).max() > 5
    )


def test_what_has_no_part_is_refused_and_nothing_is_written(tiny, lora_file, tmp_path):
    refused(
        call("sample.py", "a dog", "--weights", tiny, "--lora", lora_file, "--merge", "--fp8-base"),
        "--merge",
        "--fp8-base",
    )
    refused(
        call(
            "train.py",
            photos(tmp_path / "photos"),
            "--class-word",
            "dog",
            "--weights",
            tiny,
            "--method",
            "full",
            "--fp8-base",
        ),
        "--fp8-base",
        "--method full",
    )
    assert nothing_written()


def test_on_an_fp8_base_training_goes_on_to_the_bit_and_remembers_the_flag(
    tiny, tmp_path, stored, monkeypatch
):
    flags = (
        "train.py",
        photos(tmp_path / "photos"),
        "--class-word",
        "dog",
        "--weights",
        tiny,
        "--size",
        16,
        "--batch",
        1,
        "--rank",
        2,
        "--learning-rate",
        1e-3,
        "--steps",
        3,
        "--preview-every",
        2,
        "--fp8-base",
    )
    good(call(*flags, "--out", "whole/run"))
    assert (
        len(stored) > 100 and json.loads(contents("whole/run")["settings.json"])["fp8_base"] is True
    )
    whole, draw = contents("whole/run")["lora.safetensors"], dataset.get_sample

    def interrupted(*args):
        if args[5] == 1:
            signal.raise_signal(signal.SIGTERM)
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "batch", interrupted)
        assert call(*flags, "--out", "broken/run").status == 143
    good(call("train.py", "--resume", "--out", "broken/run"))
    assert contents("broken/run")["lora.safetensors"] == whole
    good(call(*flags, "--out", "plain/run", "--no-fp8-base"))
    assert contents("plain/run")["lora.safetensors"] != whole


def test_a_data_set_does_not_go_on_with_another_base(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    flags = ("sample.py", "--prompts", "prompts.txt", "--weights", tiny, "--out", "set")
    good(call(*flags))
    refused(call(*flags, "--fp8-base"), "fp8_base", "name another folder")
