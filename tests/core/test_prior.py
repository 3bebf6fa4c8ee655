"""DreamBooth's class images: generated before training, once, and kept."""

from pathlib import Path

import pytest
from helpers.checkpoints import refused, vocabulary_read_once  # noqa: F401
from helpers.running import contents, good, quick, taught, tiny  # noqa: F401
from helpers.running import refused as run_refused
from helpers.training import same_tensors
from safetensors.torch import load_file

import alchemy
from alchemy import dataset, pipeline
from alchemy.formats import png
from alchemy.methods import prior


def generate(sdxl, *args):
    """The paths of class images, of which missing ones have been generated."""
    jobs = prior.class_image_jobs(sdxl, *args)
    missing = [job for job in jobs if not job[0].exists()]
    assert list(prior.generate_class_images(sdxl, missing)) == [path for path, _ in missing]
    return [path for path, _ in jobs]


def times(paths):
    return [path.stat().st_mtime_ns for path in paths]


def test_class_images_are_the_models_own_and_are_not_generated_twice(tiny, tmp_path):
    sdxl = alchemy.load(tiny, "cpu")
    paths = generate(sdxl, "a photo of a dog", tmp_path, 2)
    assert [path.name for path in paths] == ["0000.png", "0001.png"]
    assert png.read_metadata(paths[1])["seed"] == prior.FIRST_SEED + 1
    alone = alchemy.text_to_image(sdxl, "a photo of a dog", seed=prior.FIRST_SEED + 1)
    assert alone.tobytes() == alchemy.images.read(paths[1]).tobytes()
    before = times(paths)
    assert len(generate(sdxl, "a photo of a dog", tmp_path, 3)) == 3 and times(paths) == before


@pytest.mark.parametrize(
    "prompt, size, more, words",
    [
        ("a photo of a cat", (32, 32), {}, "a photo of a dog"),
        ("a photo of a dog", (24, 32), {}, "size [32, 32], not [24, 32]"),
        ("a photo of a dog", (32, 32), {"vae": "other"}, "vae None, not 'other'"),
    ],
)
def test_class_images_of_other_settings_are_refused(tiny, tmp_path, prompt, size, more, words):
    sdxl = alchemy.load(tiny, "cpu")
    generate(sdxl, "a photo of a dog", tmp_path, 1, (32, 32))
    before = contents(tmp_path)
    refused(lambda: generate(sdxl, prompt, tmp_path, 2, size, more), "0000.png", words)
    assert contents(tmp_path) == before


def test_the_class_prompt_is_encoded_once_and_the_encoders_freed(tiny, tmp_path, monkeypatch):
    sdxl, loaded, prompts = alchemy.load(tiny, "cpu"), [], []
    sample, encode = pipeline.sample, type(sdxl).encode_prompt

    def sampling(sdxl, *args, **options):
        loaded.append(set(sdxl.loaded))
        return sample(sdxl, *args, **options)

    def encoding(self, texts, *args, **options):
        prompts.extend(texts)
        return encode(self, texts, *args, **options)

    monkeypatch.setattr(type(sdxl), "encode_prompt", encoding)
    monkeypatch.setattr(pipeline, "sample", sampling)
    generate(sdxl, "a photo of a dog", tmp_path, 3)
    assert prompts == ["a photo of a dog", None] and len(loaded) == 3
    assert not {"text_encoder", "text_encoder_2"} & set().union(*loaded)


def test_train_py_generates_class_images_once_and_trains_on_them(taught):
    shared = ("--class-images", 2, "--class-folder", "shared", "--steps", 3)
    run = good(taught(*shared, "--out", "one"))
    assert "2 class images" in run.err
    assert sorted(contents("shared")) == ["0000.png", "0001.png"]
    written = times(sorted(Path("shared").iterdir()))
    good(taught(*shared, "--out", "two"))
    assert times(sorted(Path("shared").iterdir())) == written
    good(taught("--out", "none", "--steps", 3))
    one, two, none = (load_file(f"{name}/lora.safetensors") for name in ("one", "two", "none"))
    assert same_tensors(one, two) and not same_tensors(one, none)


def test_class_images_of_another_word_are_refused_before_encoding(taught, monkeypatch):
    good(taught("--class-images", 1, "--out", "run"))

    def fail(*args):
        pytest.fail("a photo was encoded")

    monkeypatch.setattr(dataset, "encode_image", fail)
    more = ("--class-images", 1, "--out", "run", "--overwrite", "--class-word", "cat")
    run_refused(taught(*more), "run/class/0000.png", "a photo of a dog")


def test_a_class_folder_that_cannot_exist_is_named_by_its_flag(taught):
    more = ("--class-images", 1, "--class-folder", "/dev/null", "--out", "new/run")
    run_refused(taught(*more), "--class-folder /dev/null")
    assert not Path("new").exists()


def test_an_interrupt_during_class_images_says_how_to_continue(taught, monkeypatch):
    sample, images = pipeline.sample, []

    def interrupted(*args, **options):
        if images:
            raise KeyboardInterrupt
        images.append(sample(*args, **options))
        return images[0]

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "sample", interrupted)
        run = taught("--class-images", 2, "--out", "run")
    assert run.status == 130 and "the same command continues" in run.err
    assert sorted(contents("run")) == ["class/0000.png"]
    good(taught("--class-images", 2, "--out", "run"))
