"""sample.py --prompts: a data set of many pictures, each by its own seed, that goes on where it stopped."""
from pathlib import Path

import pytest

from alchemy import loop
from alchemy.formats.png import facts_of
from alchemy.methods import captions
from checkpoints import vocabulary_read_once  # noqa: F401
from running import call, contents, good, lora_file, quick, refused, tiny  # noqa: F401

PROMPTS = ["a photo of a sks dog", "a sks dog at night, “painted”"]


@pytest.fixture
def drawn(tiny, lora_file, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n  {PROMPTS[1]}\n", encoding="utf-8")
    return lambda *argv: call("sample.py", "--prompts", "prompts.txt", "--weights", tiny, "--lora", lora_file, "--count", 2, "--seed", 5, "--out", "set", *argv)


def test_each_prompt_has_its_pictures_and_metadata_that_training_reads(drawn):
    good(drawn())
    assert sorted(contents("set")) == [*(f"0000{k}.png" for k in range(4)), "metadata.jsonl"]
    assert captions.read("set") == [(Path("set") / f"0000{k}.png", PROMPTS[k // 2]) for k in range(4)]
    assert [(facts_of(f"set/0000{k}.png")["prompt"], facts_of(f"set/0000{k}.png")["seed"]) for k in range(4)] == [(PROMPTS[k // 2], 5 + k) for k in range(4)]


def test_a_picture_of_the_set_is_what_the_prompt_alone_draws_with_its_seed(drawn, tiny, lora_file):
    good(drawn())
    good(call("sample.py", PROMPTS[1], "--weights", tiny, "--lora", lora_file, "--seed", 8, "--out", "alone.png"))
    good(call("sample.py", "--like", "set/00003.png", "--out", "like.png"))
    pictures = [loop.images.read(path).tobytes() for path in ("set/00003.png", "alone.png", "like.png")]
    assert pictures[0] == pictures[1] == pictures[2]


def test_what_is_there_is_not_drawn_again(drawn, monkeypatch):
    good(drawn())
    before = contents("set")
    Path("set/00001.png").unlink()
    Path("set/metadata.jsonl").unlink()
    calls, whole = [], loop.sample
    monkeypatch.setattr(loop, "sample", lambda *args, **options: calls.append(args[3]) or whole(*args, **options))
    good(drawn())
    assert calls == [6] and contents("set") == before


def test_another_data_set_in_the_folder_is_refused_before_anything_is_drawn(drawn):
    good(drawn())
    before = contents("set")
    refused(drawn("--seed", 6), "00000.png", "seed 5", "another data set")
    assert contents("set") == before


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
    assert list(contents("set")) == ["metadata.jsonl"] and "a cat" in Path("set/metadata.jsonl").read_text()
