"""sample.py --prompts: a data set of many pictures, each by its own seed, that goes on where it stopped."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from alchemy import pipeline, sampling
from alchemy.formats.png import facts_of
from alchemy.methods import captions
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import call, contents, good, lora_file, quick, refused, tiny  # noqa: F401

PROMPTS = ["a photo of a sks dog", "a sks dog at night, “painted”"]


@pytest.fixture
def drawn(tiny, lora_file, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n  {PROMPTS[1]}\n", encoding="utf-8")
    return lambda *argv: call(
        "sample.py",
        "--prompts",
        "prompts.txt",
        "--weights",
        tiny,
        "--lora",
        lora_file,
        "--count",
        2,
        "--seed",
        5,
        "--out",
        "set",
        *argv,
    )


def test_each_prompt_has_its_pictures_and_metadata_that_training_reads(drawn):
    good(drawn())
    assert sorted(contents("set")) == [*(f"0000{k}.png" for k in range(4)), "metadata.jsonl"]
    assert captions.read("set") == [
        (Path("set") / f"0000{k}.png", PROMPTS[k // 2]) for k in range(4)
    ]
    assert [
        (facts_of(f"set/0000{k}.png")["prompt"], facts_of(f"set/0000{k}.png")["seed"])
        for k in range(4)
    ] == [(PROMPTS[k // 2], 5 + k) for k in range(4)]


def test_a_picture_of_the_set_is_what_the_prompt_alone_draws_with_its_seed(drawn, tiny, lora_file):
    good(drawn())
    good(
        call(
            "sample.py",
            PROMPTS[1],
            "--weights",
            tiny,
            "--lora",
            lora_file,
            "--seed",
            8,
            "--out",
            "alone.png",
        )
    )
    good(call("sample.py", "--like", "set/00003.png", "--out", "like.png"))
    pictures = [
        sampling.images.read(path).tobytes() for path in ("set/00003.png", "alone.png", "like.png")
    ]
    assert pictures[0] == pictures[1] == pictures[2]


def test_what_is_there_is_not_drawn_again(drawn, monkeypatch):
    good(drawn())
    before = contents("set")
    Path("set/00001.png").unlink()
    Path("set/metadata.jsonl").unlink()
    calls, whole = [], pipeline.sample
    monkeypatch.setattr(
        pipeline,
        "sample",
        lambda *args, **options: calls.append(args[3]) or whole(*args, **options),
    )
    good(drawn())
    assert calls == [6] and contents("set") == before


def test_another_data_set_in_the_folder_is_refused_before_anything_is_drawn(drawn):
    good(drawn())
    before = contents("set")
    refused(drawn("--seed", 6), "00000.png", "seed 5, not 6", "another folder")
    assert contents("set") == before


@pytest.mark.parametrize(
    "flags, name",
    [
        (("--guidance", 3), "guidance"),
        (("--steps", 2), "steps"),
        (("--sampler", "ddim"), "sampler"),
        (("--negative-prompt", "a cat"), "negative_prompt"),
        (("--size", "24x32"), "size"),
        (("--timestep-spacing", "trailing"), "spacing"),
        (("--eta", 0.5), "eta"),
        (("--dtype", "float32"), "dtype"),
        (("--lora", "again.safetensors"), "lora"),
    ],
)
def test_pictures_of_other_settings_are_never_mixed_in(drawn, lora_file, flags, name):
    Path("again.safetensors").write_bytes(lora_file.read_bytes())
    good(drawn())
    Path("set/00003.png").unlink()
    before = contents("set")
    refused(drawn(*flags), "00000.png", "other settings", f"({name} ", "another folder")
    assert contents("set") == before


def test_a_lora_taught_anew_under_the_same_name_counts_as_another(tiny, lora_file, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog")
    flags = (
        "sample.py",
        "--prompts",
        "prompts.txt",
        "--weights",
        tiny,
        "--lora",
        "mine.safetensors",
        "--out",
        "set",
    )
    Path("mine.safetensors").write_bytes(lora_file.read_bytes())
    good(call(*flags))
    save_file({k: 2 * t for k, t in load_file(lora_file).items()}, "mine.safetensors")
    refused(call(*flags, "--count", 2), "00000.png", "other settings", "digests")


def test_prompts_and_a_prompt_or_a_picture_file_are_refused(drawn, tmp_path):
    for argv in (("a dog",), ("--out", "a.png"), ("--like", "a.png")):
        refused(drawn(*argv), "--prompts")
    (tmp_path / "prompts.txt").write_text("\n \n")
    refused(drawn(), "prompts.txt", "no prompt")
    assert not Path("set").exists()


def test_metadata_of_other_pictures_is_not_overwritten(drawn):
    Path("set").mkdir()
    Path("set/metadata.jsonl").write_text('{"file_name": "mine.jpg", "text": "a cat"}\n')
    refused(drawn(), "mine.jpg", "another folder")
    assert (
        list(contents("set")) == ["metadata.jsonl"]
        and "a cat" in Path("set/metadata.jsonl").read_text()
    )


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", "xx", "[" * 100000, "3"])
def test_metadata_of_something_else_is_named_and_kept(drawn, text):
    Path("set").mkdir()
    Path("set/metadata.jsonl").write_text(text)
    refused(drawn(), "set/metadata.jsonl", "another folder")
    assert (
        list(contents("set")) == ["metadata.jsonl"]
        and Path("set/metadata.jsonl").read_text() == text
    )


def test_prompts_that_are_not_utf_8_are_named(drawn):
    Path("prompts.txt").write_bytes("a k\xe4se".encode("latin-1"))
    refused(drawn(), "prompts.txt", "UTF-8")


def test_what_is_drawn_before_an_interrupt_is_listed_for_training(drawn, monkeypatch):
    whole = pipeline.sample

    def sample(sdxl, conditioning, unconditional, seed, *args, **options):
        if seed == 7:
            raise KeyboardInterrupt
        return whole(sdxl, conditioning, unconditional, seed, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "sample", sample)
        assert drawn().status == 130
    assert captions.read("set") == [(Path("set") / f"0000{k}.png", PROMPTS[0]) for k in range(2)]
    good(drawn())
    assert len(captions.read("set")) == 4
