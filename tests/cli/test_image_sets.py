"""sample.py --prompts: a set of images, each with its own seed, continued where it stopped."""

from pathlib import Path

import pytest
from helpers.running import call, contents, good, pixels, refused, same
from safetensors.torch import load_file, save_file

from alchemy import pipeline
from alchemy.formats.png import read_metadata
from alchemy.methods import captions

PROMPTS = ["a photo of a sks dog", "a sks dog at night, “painted”"]
NAMES = [f"0000{k}.png" for k in range(4)]


@pytest.fixture
def image_set(tiny, lora_file, tmp_path):
    """image_set(flags): sample.py --prompts, two images of each of two prompts, in set/."""
    text = f"{PROMPTS[0]}\n\n  {PROMPTS[1]}\n"
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    flags = ["--prompts", "prompts.txt", "--weights", tiny, "--lora", lora_file, "--count", 2]
    return lambda *argv: call("sample.py", *flags, "--seed", 5, "--out", "set", *argv)


def test_a_set_has_metadata_that_training_reads_and_each_image_is_that_of_its_seed(
    image_set, tiny, lora_file
):
    good(image_set())
    assert sorted(contents("set")) == [*NAMES, "metadata.jsonl"]
    pairs = [(Path("set") / name, PROMPTS[k // 2]) for k, name in enumerate(NAMES)]
    assert captions.read("set") == pairs
    for k, (path, prompt) in enumerate(pairs):
        assert (read_metadata(path)["prompt"], read_metadata(path)["seed"]) == (prompt, 5 + k)
    files = ["--weights", tiny, "--lora", lora_file]
    good(call("sample.py", PROMPTS[1], *files, "--seed", 8, "--out", "alone.png"))
    good(call("sample.py", "--like", "set/00003.png", *files, "--out", "like.png"))
    assert same(pixels("set/00003.png"), pixels("alone.png"))
    assert same(pixels("set/00003.png"), pixels("like.png"))


def test_existing_images_are_not_generated_again(image_set, monkeypatch):
    good(image_set())
    before = contents("set")
    Path("set/00001.png").unlink()
    Path("set/metadata.jsonl").unlink()
    seeds, whole = [], pipeline.sample

    def sample(sdxl, cond, uncond, seed, *args, **options):
        seeds.append(seed)
        return whole(sdxl, cond, uncond, seed, *args, **options)

    monkeypatch.setattr(pipeline, "sample", sample)
    good(image_set())
    assert seeds == [6] and contents("set") == before


@pytest.mark.parametrize(
    "flags, name",
    [
        (("--seed", 6), "seed 5, not 6"),
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
def test_images_of_other_settings_are_never_mixed_in(image_set, lora_file, flags, name):
    Path("again.safetensors").write_bytes(lora_file.read_bytes())
    good(image_set("--steps", 1) if name != "steps" else image_set())
    Path("set/00003.png").unlink()
    before = contents("set")
    steps = () if name == "steps" else ("--steps", 1)
    refused(image_set(*steps, *flags), "00000.png", f"({name}", "another folder")
    assert contents("set") == before


def test_a_lora_of_the_same_name_but_other_contents_is_another(image_set, lora_file):
    Path("mine.safetensors").write_bytes(lora_file.read_bytes())
    good(image_set("--lora", "mine.safetensors"))
    save_file({k: 2 * t for k, t in load_file(lora_file).items()}, "mine.safetensors")
    refused(image_set("--lora", "mine.safetensors"), "00000.png", "digests")


@pytest.mark.parametrize("argv", [("a dog",), ("--out", "a.png"), ("--like", "a.png")])
def test_a_set_takes_no_prompt_image_file_or_like(image_set, argv):
    refused(image_set(*argv), "--prompts")
    assert not Path("set").exists()


@pytest.mark.parametrize(
    "data, word", [(b"\n \n", "no prompt"), ("a k\xe4se".encode("latin-1"), "UTF-8")]
)
def test_a_file_without_prompts_or_of_other_text_is_named(image_set, data, word):
    Path("prompts.txt").write_bytes(data)
    refused(image_set(), "prompts.txt", word)


OTHER = '{"file_name": "mine.jpg", "text": "a cat"}\n'


@pytest.mark.parametrize("text", [OTHER, '{"a": 1}', "[1]", "xx", "[" * 100_000, "3"])
def test_metadata_of_other_images_is_named_and_kept(image_set, text):
    Path("set").mkdir()
    Path("set/metadata.jsonl").write_text(text)
    refused(image_set(), "metadata.jsonl", "another folder", *(["mine.jpg"] * (text == OTHER)))
    assert contents("set") == {"metadata.jsonl": text.encode()}


def test_images_before_an_interrupt_are_listed_for_training(image_set, monkeypatch):
    whole = pipeline.sample

    def sample(sdxl, cond, uncond, seed, *args, **options):
        if seed == 7:
            raise KeyboardInterrupt
        return whole(sdxl, cond, uncond, seed, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "sample", sample)
        assert image_set().status == 130
    assert captions.read("set") == [(Path("set") / name, PROMPTS[0]) for name in NAMES[:2]]
    good(image_set())
    assert len(captions.read("set")) == 4
