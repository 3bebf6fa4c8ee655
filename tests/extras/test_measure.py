"""The measurements of the miniature and its training recipe (weights/toy)."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.spellings import adapters
from safetensors.torch import load_file, save_file

import alchemy
from weights.toy import WEIGHTS, classifier, measure, recipe, training, world
from weights.toy.training import State


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


def test_the_classifiers_masks_have_an_iou_of_0_9_with_the_true_ones(trained):
    images, masks, _ = classifier.fresh(79)
    with torch.no_grad():
        predicted = trained.mask_logits(trained.maps(classifier.to_input(images))) > 0
    true = torch.from_numpy(masks) > 127
    iou = (predicted & true).sum((1, 2)) / (predicted | true).sum((1, 2))
    assert iou.mean() > 0.9


def test_frechet_distance_of_scaled_and_shifted_axes_is_the_sum_of_squares():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    scales = torch.tensor([3.0, 0.5, 1.0], dtype=torch.float64)
    assert measure.frechet(x, x * scales + scales) == pytest.approx(4.25 + 10.25, abs=1e-9)


def test_a_batch_draws_what_single_pictures_draw(measuring):
    prompts = ["a photo of a dog on the grass", "a photo of a cup in a room", "a hat at night"]
    for k, image in enumerate(measure.generate(measuring.sdxl, prompts, 40)):
        alone = alchemy.text_to_image(measuring.sdxl, prompts[k], seed=40 + k)
        # One grey level: float32 sums in another order.
        assert np.abs(np.int16(image) - np.int16(alone)).max() <= 1


def test_masks_that_are_the_truth_have_an_iou_of_1_and_hold_all_of_it(measuring, monkeypatch):
    truth, scene = {}, world.scene

    def noted(*args, **options):
        made = scene(*args, **options)
        mask = torch.from_numpy(made.objects[0][2])
        truth[made.image.tobytes()] = (mask > 0.5).float()
        return made

    def segment(sdxl, image, word):
        return truth[np.asarray(image).tobytes()]

    monkeypatch.setattr(world, "scene", noted)
    monkeypatch.setattr(alchemy, "segment", segment)
    monkeypatch.setattr(measure.segmentation, "remove_specks_and_holes", lambda mask: mask)
    measuring.share = 0.1
    measuring.masks()
    found = measuring.found
    assert found["iou"] == found["inside"] == 1 and 1 < found["area"] < 2


def test_a_subject_is_measured_in_one_stage_and_in_two(measuring, monkeypatch):
    lora = WEIGHTS / "example.safetensors"
    monkeypatch.setattr(measure.Measure, "lora", lambda self, instance: lora)
    monkeypatch.setattr(world, "HELD_OUT_INSTANCES", ("flower-sunflower",))
    measuring.subjects()
    found = measuring.found
    assert found["outside"] == 0
    one, two = found["one"] + found["one background"], found["two"] + found["two background"]
    assert found["more"] == two - one
    names = ("subject", "subject background", "prior", "prior class", "two", "two background")
    assert all(found[name] in (0, 1) for name in (*names, "failed"))  # of one image
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
    "key, value, missed",
    [
        ("prompt class", 0.949, True),
        ("prompt class", 0.95, False),
        ("area", 1.61, True),
        ("outside", 0, False),
        ("two background", 0.0, False),
    ],
)
def test_the_table_marks_the_figures_that_miss_what_is_asked(key, value, missed):
    assert ("(missed)" in measure.table({key: value})) == missed


def small_state(path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 2, 3))
    return State({"net": net.to(memory_format=torch.channels_last)}, path, 0.99)


def test_training_resumes_from_a_saved_state_as_if_it_had_not_stopped(tmp_path):
    def steps(state, first, last):
        for k in range(first, last):
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(k))
            state.update((state.modules["net"](x) - 1).square().mean(), 0.1)

    whole, half = small_state(tmp_path / "whole"), small_state(tmp_path / "half")
    steps(whole, 0, 6)
    steps(half, 0, 3)
    half.save()
    again = small_state(tmp_path / "half")
    steps(again, again.step, 6)
    for key, parameter in whole.parameters.items():
        assert torch.equal(parameter, again.parameters[key])
        assert torch.equal(whole.ema[key], again.ema[key])
    assert again.step == 6


def test_the_learning_rate_warms_up_stays_and_falls_linearly(tmp_path):
    state = small_state(tmp_path / "state")
    for state.step, state.seconds, rate in (
        (0, 0, 0.01),
        (99, 1, 1.0),
        (1000, 50, 2.0),
        (1000, 60, 2.0),
        (1000, 80, 1.0),
        (1000, 100, 0.04),
    ):
        assert training.learning_rate(state, 100, 2.0, 0.6) == pytest.approx(rate)


def test_training_stops_when_the_time_is_spent_and_refuses_a_loss_of_nan(tmp_path):
    state, lines = small_state(tmp_path / "state"), []
    clock = iter(range(100)).__next__
    net = state.modules["net"]
    x = torch.ones(1, 3, 5, 5)
    training.train(state, 0.1, 0.1, 0.6, lambda step: net(x).square().mean(), lines.append, clock)
    assert state.step == 6 and state.path.exists() and lines == ["done at step 6, 6 s"]
    with pytest.raises(FloatingPointError, match="step 6"):
        training.train(state, 1, 0.1, 0.6, lambda step: net(x).mean() * torch.nan, lines.append)


@pytest.fixture
def scenes(tmp_path):
    return recipe.Scenes(tmp_path / "scenes", 300)


def test_training_scenes_are_those_of_the_first_seeds(scenes):
    assert len(scenes.captions) == 300 < world.FRESH
    assert np.array_equal(scenes.images[7], world.scene(7).image)
    assert scenes.captions[7] == world.scene(7).caption


def test_crops_lie_within_the_images_and_mostly_on_objects(scenes):
    crops = scenes.crops(200, 64, torch.Generator().manual_seed(0))
    assert crops.shape == (200, 3, 64, 64) and crops.min() >= -1 and crops.max() <= 1
    whole = scenes.crops(3, 128, torch.Generator().manual_seed(0))
    images = classifier.to_input(scenes.images)
    for one in whole:
        assert (images == one).flatten(1).all(1).any()


def test_recolouring_turns_hues_and_leaves_greys_and_the_other_images():
    x = torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    grey = x[:, :1].expand(-1, 3, -1, -1)
    turned = recipe.recolour(x, torch.Generator().manual_seed(1), 0.5)
    same = (x == turned).flatten(1).all(1)
    assert 0.3 < same.float().mean() < 0.7
    kept = recipe.recolour(grey, torch.Generator().manual_seed(1), 1.0)
    assert torch.allclose(kept, grey, atol=1e-6)
    assert torch.allclose(turned.mean(1), x.mean(1), atol=1e-6)


@torch.no_grad()
def test_a_warm_start_predicts_rotated_noise_of_rotated_latents(tmp_path):
    scenes = recipe.Scenes(tmp_path / "scenes", 32)
    before = alchemy.load(WEIGHTS / "mini", dtype="float32")
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    class Turned:
        def encode(self, x):
            mean, std = before.vae.encode(x)
            return torch.einsum("ij,bjhw->bihw", turn.T, mean), std

    denoiser = recipe.Denoiser(recipe.NETWORKS["unet"], torch.device("cpu"))
    share = recipe.warm_start(denoiser, Turned(), scenes, WEIGHTS / "mini")
    assert share == pytest.approx(1, abs=1e-4)
    x = alchemy.noise((2, 4, 16, 16), [0, 1])
    inputs = before.encode_prompt(["a dog", "a cat"]).parts()
    expected = torch.einsum("ij,bjhw->bihw", turn.T, before.unet(x, torch.tensor([500]), *inputs))
    turned = torch.einsum("ij,bjhw->bihw", turn.T, x)
    found = denoiser.modules["unet"](turned, torch.tensor([500]), *inputs)
    assert torch.allclose(found, expected, atol=1e-3)


def test_a_unet_goes_on_from_the_packed_weights_and_pack_keeps_their_vae(tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS / "mini", tmp_path / "mini")
    monkeypatch.setattr(recipe, "WEIGHTS", tmp_path)
    flags = ["--work", str(tmp_path), "--threads", "1", "--scenes", "40", "--batch", "2"]
    recipe.main(["unet", "--minutes", "0.01", "--init", str(tmp_path / "mini"), *flags])
    assert "by a rotation: 1.00" in (tmp_path / "unet.log").read_text()
    recipe.pack(tmp_path)
    before, after = (alchemy.load(root / "mini") for root in (WEIGHTS, tmp_path))
    kept = zip(before.vae.parameters(), after.vae.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in kept)
    assert not torch.equal(before.unet.conv_in.weight, after.unet.conv_in.weight)


def test_a_vae_and_a_unet_train_for_a_moment_and_are_packed_in_half_precision(
    tmp_path, monkeypatch
):
    for name in recipe.TOKENIZERS:
        shutil.copytree(WEIGHTS / "mini" / name, tmp_path / "mini" / name)
    monkeypatch.setattr(recipe, "WEIGHTS", tmp_path)
    flags = ["--work", str(tmp_path), "--threads", "1", "--scenes", "40"]
    save_file(load_file(classifier.FILE), tmp_path / "critic.safetensors")
    recipe.main(["vae", "--minutes", "0.01", *flags])
    recipe.main(["unet", "--minutes", "0.01", "--batch", "2", *flags])
    assert "held-out loss" in (tmp_path / "unet.log").read_text()
    scale = json.loads((tmp_path / "scaling.json").read_text())["scaling_factor"]
    assert int(training.metadata(tmp_path / "unet.safetensors")["step"]) >= 1
    recipe.pack(tmp_path)
    sdxl = alchemy.load(tmp_path / "mini", dtype="float32")
    assert sdxl.vae.config.scaling_factor == scale
    for name, tensor in training.ema_of(tmp_path / "unet.safetensors", "unet").items():
        assert torch.equal(sdxl.unet.get_parameter(name), tensor.half().float())
    assert alchemy.text_to_image(sdxl, "a photo of a dog", steps=1).size == (128, 128)


@pytest.mark.parametrize("part", ["unet", "pack"])
def test_a_part_whose_states_are_missing_names_the_part_to_run(part, tmp_path):
    with pytest.raises(ValueError, match="run the part"):
        recipe.main([part, "--work", str(tmp_path)])
