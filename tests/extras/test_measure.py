"""The measuring of the miniature (weights/classifier.py, measure.py) and the states that it is trained from (recipe.py, checkpoint.py)."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.spellings import adapters
from PIL import Image
from safetensors.torch import load_file

import alchemy
from weights.toy import WEIGHTS, checkpoint, classifier, measure, recipe, world
from weights.toy.state import State
from weights.toy.table import table


@pytest.fixture(scope="module")
def trained():
    return classifier.load()


@pytest.fixture
def measuring(tmp_path):
    """A Measure on the miniature, of a few pictures."""
    return measure.Measure(tmp_path, 0.004, str(WEIGHTS / "mini"))


def test_the_classifier_names_97_of_100_fresh_renders_right_by_each_head(trained):
    right, _ = classifier.accuracy(trained, 316)
    assert min(right.values()) >= 0.97, right


def test_the_classifier_takes_pictures_and_arrays_alike(trained):
    pixels = [
        classifier.example(classifier.FRESH + k)[0].permute(1, 2, 0).numpy() for k in range(5)
    ]
    assert trained.name(pixels) == trained.name([Image.fromarray(p) for p in pixels])


def test_an_example_of_the_classifier_is_of_the_instance_and_place_that_it_names():
    for seed in (0, 78, 79, classifier.FRESH):
        _, (word, instance, place) = classifier.example(seed)
        scene = world.scene(seed, "any", instance=classifier.INSTANCES[instance], style="photo")
        assert (
            classifier.INSTANCES[instance].startswith(classifier.WORDS[word] + "-")
            and classifier.PLACES[place] == scene.background
        )


def test_a_batch_draws_what_single_pictures_draw(measuring):
    prompts = [
        "a photo of a dog on the grass",
        "a photo of a cup in a room",
        "a photo of a hat at night",
    ]
    for k, picture in enumerate(measure.drawn(measuring.sdxl, prompts, 40)):
        alone = alchemy.text_to_image(measuring.sdxl, prompts[k], seed=40 + k)
        assert (
            np.abs(np.int16(picture) - np.int16(alone)).max() <= 1
        )  # a grey level: float32 sums in another order


def test_masks_that_are_the_truth_have_an_iou_of_1_and_hold_all_of_it(measuring, monkeypatch):
    truth = {}

    def scene(*args, **named):
        made = world.scene(*args, **named)
        truth[made.image.tobytes()] = torch.from_numpy(
            (made.objects[0][2] > 0.5).astype(np.float32)
        )
        return made

    monkeypatch.setattr(
        measure,
        "world",
        type(
            "World",
            (),
            {
                "scene": staticmethod(scene),
                "CLASSES": world.CLASSES,
                "HELD_OUT_INSTANCES": world.HELD_OUT_INSTANCES,
                "BACKGROUNDS": world.BACKGROUNDS,
            },
        ),
    )
    monkeypatch.setattr(
        alchemy, "segment", lambda sdxl, picture, word: truth[np.asarray(picture).tobytes()]
    )
    monkeypatch.setattr(measure.segmentation, "clean", lambda mask: mask)
    measuring.share = 0.1
    measuring.masks()
    assert (
        measuring.found["iou"] == 1
        and measuring.found["inside"] == 1
        and 1 < measuring.found["area"] < 2
    )


def test_a_subject_is_measured_in_one_stage_and_in_two_and_nothing_changes_outside_the_mask(
    measuring, monkeypatch
):
    monkeypatch.setattr(
        measure.Measure, "lora", lambda self, instance: WEIGHTS / "example.safetensors"
    )
    monkeypatch.setattr(world, "HELD_OUT_INSTANCES", (world.EXAMPLE,))
    measuring.subjects()
    found = measuring.found
    assert (
        found["outside"] == 0
        and found["more"] == found["two"] + found["two place"] - found["one"] - found["one place"]
    )
    assert all(
        found[key] in (0, 1)
        for key in (
            "subject",
            "subject place",
            "prior",
            "prior class",
            "two",
            "two place",
            "failed",
        )
    )  # of one picture
    assert not adapters(measuring.sdxl)  # the next subject finds the miniature as it ships


def test_a_picture_that_cannot_be_made_is_right_in_nothing(measuring):
    wanted = [("ball", "ball-eight", "night")]  # what the classifier takes black for
    assert measuring.read("none", [None], wanted) == [(None, None, None)]


def test_a_mask_that_insert_would_refuse_counts_as_nothing_inside(measuring, monkeypatch):
    monkeypatch.setattr(alchemy, "segment", lambda sdxl, picture, word: torch.ones(128, 128))
    measuring.masks()
    assert measuring.found["inside"] == 0 and measuring.found["area"] == float("inf")


def test_other_weights_or_defaults_are_measured_in_another_folder(measuring, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(WEIGHTS / "mini", copy)
    assert measure.Measure(tmp_path, 1, str(copy)).out == measuring.out
    file = copy / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\0\1")
    assert measure.Measure(tmp_path, 1, str(copy)).out != measuring.out


@pytest.mark.parametrize(
    "key, value, marks",
    [
        ("prompt class", 0.749, 2),
        ("prompt class", 0.75, 1),
        ("prompt class", 0.9, 0),
        ("classifier place", 0.96, 2),
        ("area", 1.61, 2),
        ("area", 1.6, 0),
        ("more", 0.0, 2),
        ("more", 0.01, 0),
        ("outside", 1, 2),
        ("outside", 0, 0),
        ("psnr", 29.99, 1),
        ("two", 0.0, 0),
    ],
)
def test_the_table_marks_what_misses_in_each_column(key, value, marks):
    assert table({key: value}).count("(missed)") == marks


def test_unpack_and_pack_give_the_shipped_weights_again_to_the_bit(tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS / "mini", tmp_path / "mini")
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    before = {
        path: path.read_bytes() for path in sorted((tmp_path / "mini").rglob("*")) if path.is_file()
    }
    checkpoint.unpack(tmp_path)
    for path in (tmp_path / "mini").rglob("*.safetensors"):
        path.unlink()
    checkpoint.pack(tmp_path)
    for path, content in before.items():
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads(content), path
        else:
            assert path.read_bytes() == content, path


def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(tmp_path):
    def fresh(path):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 2, 3)).to(
            memory_format=torch.channels_last
        )
        return State({"net": net}, tmp_path / path, 0.1, 0.99)

    def steps(state, first, last):
        for k in range(first, last):
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(k))
            state.update((state.modules["net"](x) - 1).square().mean(), 0.1)

    whole, half = fresh("whole"), fresh("half")
    steps(whole, 0, 6)
    steps(half, 0, 3)
    half.save()
    again = fresh("half")
    steps(again, again.step, 6)
    for k, p in whole.parameters.items():
        assert torch.equal(p, again.parameters[k]) and torch.equal(whole.ema[k], again.ema[k])
    assert again.step == 6


def test_the_streams_that_train_hold_nothing_that_is_held_out(monkeypatch):
    made = []

    def scene(*args, **named):
        made.append((args, world.scene(*args, **named)))
        return made[-1][1]

    class Encoder:
        def encode(self, x):
            return x[:, :, ::4, ::4], x[:, :, ::4, ::4]

    monkeypatch.setattr(recipe, "world", type("World", (), {"scene": staticmethod(scene)}))
    for k, size in enumerate([(64, 64), (32, 64)]):
        recipe.Pool(Encoder(), size, k << 32, torch.device("cpu")).grow(300)
    recipe.crops(3, 100, 64)
    assert len(made) == 650 and max(args[0] for args, _ in made) < world.FRESH
    for _, one in made:
        assert one.style not in world.HELD_OUT_STYLES
        for word, instance, _ in one.objects:
            assert (
                instance not in world.HELD_OUT_INSTANCES
                and (word, one.background) not in world.HELD_OUT_PAIRS
            )


def test_training_the_decoder_alone_leaves_the_latents_as_they_are(tmp_path):
    checkpoint.unpack(tmp_path)
    before = load_file(tmp_path / "vae.safetensors")
    recipe.main(
        [
            "vae",
            "--decoder-only",
            "--minutes",
            "0.01",
            "--batch",
            "2",
            "--work",
            str(tmp_path),
            "--threads",
            "1",
        ]
    )
    after = load_file(tmp_path / "vae.safetensors")
    for key in (key for key in before if key.startswith("ema.")):
        assert torch.equal(before[key], after[key]) == key.startswith(
            ("ema.vae.encoder", "ema.vae.quant_conv")
        ), key


@pytest.mark.parametrize("part", ["unet", "pack"])
def test_a_part_whose_states_are_missing_says_which_to_run(part, tmp_path):
    with pytest.raises(ValueError, match="unpack"):
        recipe.main([part, "--work", str(tmp_path)])


def test_unpacking_overwrites_no_state(tmp_path):
    (tmp_path / "vae.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="there already"):
        checkpoint.unpack(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["vae.safetensors"]
