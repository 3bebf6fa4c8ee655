"""The measuring of the miniature (weights/judge.py, measure.py) and the states that it is trained from (recipe.py, miniature.py)."""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import alchemy

WEIGHTS = Path(__file__).parents[1] / "weights"
sys.path.insert(0, str(WEIGHTS))
import judge  # noqa: E402
import measure  # noqa: E402
import miniature  # noqa: E402
import recipe  # noqa: E402
import world  # noqa: E402


@pytest.fixture(scope="module")
def judged():
    return judge.load()


@pytest.fixture
def measuring(tmp_path):
    """A Measure on the miniature, of a few pictures."""
    class Arguments:
        out, share, weights = tmp_path, 0.004, str(WEIGHTS / "mini")
    return measure.Measure(Arguments)


def test_the_judge_names_97_of_100_fresh_renders_right_by_each_head(judged):
    right, _ = judge.accuracy(judged, 316)
    assert min(right.values()) >= 0.97, right


def test_the_judge_takes_pictures_and_arrays_alike(judged):
    pixels = [judge.example(judge.FRESH + k)[0].permute(1, 2, 0).numpy() for k in range(5)]
    assert judged.name(pixels) == judged.name([Image.fromarray(p) for p in pixels])


def test_an_example_of_the_judge_is_of_the_instance_and_place_that_it_names():
    for seed in (0, 78, 79, judge.FRESH):
        _, (word, instance, place) = judge.example(seed)
        scene = world.scene(seed, "any", instance=judge.INSTANCES[instance], style="photo")
        assert judge.INSTANCES[instance].startswith(judge.WORDS[word] + "-") and judge.PLACES[place] == scene.background


def test_a_batch_draws_what_single_pictures_draw(measuring):
    prompts = ["a photo of a dog on the grass", "a photo of a cup in a room", "a photo of a hat at night"]
    for k, picture in enumerate(measure.drawn(measuring.sdxl, prompts, 40)):
        alone = alchemy.text_to_image(measuring.sdxl, prompts[k], seed=40 + k)
        assert np.abs(np.int16(picture) - np.int16(alone)).max() <= 1  # a grey level: float32 sums in another order


def test_masks_that_are_the_truth_have_an_iou_of_1_and_hold_all_of_it(measuring, monkeypatch):
    truth = {}

    def scene(*args, **named):
        made = world.scene(*args, **named)
        truth[made.image.tobytes()] = torch.from_numpy((made.objects[0][2] > 0.5).astype(np.float32))
        return made

    monkeypatch.setattr(measure, "world", type("World", (), {"scene": staticmethod(scene), "CLASSES": world.CLASSES,
                        "HELD_OUT_INSTANCES": world.HELD_OUT_INSTANCES, "BACKGROUNDS": world.BACKGROUNDS}))
    monkeypatch.setattr(alchemy, "segment", lambda sdxl, picture, word, prompt: truth[np.asarray(picture).tobytes()])
    monkeypatch.setattr(measure.segmentation, "clean", lambda mask: mask)
    measuring.share = 0.1
    measuring.masks()
    assert measuring.found["iou"] == 1 and measuring.found["inside"] == 1 and 1 < measuring.found["area"] < 2


def test_a_subject_is_judged_in_one_stage_and_in_two_and_nothing_changes_outside_the_mask(measuring, monkeypatch):
    monkeypatch.setattr(measure.Measure, "lora", lambda self, instance: WEIGHTS / "example.safetensors")
    monkeypatch.setattr(world, "HELD_OUT_INSTANCES", (world.EXAMPLE,))
    measuring.subjects()
    found = measuring.found
    assert found["outside"] == 0 and found["two sum"] == found["two subject"] + found["two place"]
    assert all(found[key] in (0, 1) for key in ("subject", "subject place", "prior", "two subject", "two place"))  # of one picture
    assert alchemy.lora.names(measuring.sdxl.unet) == []  # the next subject finds the miniature as it ships


@pytest.mark.parametrize("value, missed", [(0.749, True), (0.75, False)])
def test_the_table_marks_a_figure_below_what_is_asked_of_a_cpu(value, missed):
    (line,) = [line for line in measure.table({"prompt class": value}).splitlines() if "class right" in line]
    assert ("missed" in line) == missed and f"{value:.1%}" in line


@pytest.mark.parametrize("area, missed", [(1.61, True), (1.6, False)])
def test_the_table_marks_a_figure_above_its_limit(area, missed):
    assert ("missed" in measure.table({"area": area})) == missed


def test_unpack_and_pack_give_the_shipped_weights_again_to_the_bit(tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS / "mini", tmp_path / "mini")
    monkeypatch.setattr(miniature, "HERE", tmp_path)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "mini").rglob("*")) if path.is_file()}
    miniature.unpack(tmp_path)
    for path in (tmp_path / "mini").rglob("*.safetensors"):
        path.unlink()
    miniature.pack(tmp_path)
    for path, content in before.items():
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads(content), path
        else:
            assert path.read_bytes() == content, path


def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(tmp_path):
    def fresh(path):
        torch.manual_seed(0)
        return recipe.State({"net": torch.nn.Linear(3, 2)}, tmp_path / path, 0.1, 0.99)

    def steps(state, first, last):
        for k in range(first, last):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(k))
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
