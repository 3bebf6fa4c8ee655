"""The two stages on planted drawings: what changes, where, by how much; and that nothing else does, to the bit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import alchemy
from alchemy import images, insertion
from helpers.checkpoints import vocabulary_read_once, write_folder  # noqa: F401
from helpers.planted import Planted, cone, ellipse, grey, noise_picture

SHAPES = {"square": (64, 64), "wide": (48, 84), "tall": (92, 44)}
OWN = {
    "square": (300, 300),
    "wide": (453, 701),
    "tall": (331, 97),
    "panorama": (90, 700),
    "small": (40, 33),
}
PROMPT = "a photo of a dog in the snow"


def pixels(picture):
    return np.asarray(picture).astype(int)


def planted(scene=None, subject=200, blob=None, **more):
    pictures = {
        "dog": scene,
        "sks dog": subject if subject is None else grey(np.full((8, 8), subject)),
    }
    return Planted(pictures, where={} if blob is None else {"dog": blob}, **more)


def insert(sdxl, prompt=PROMPT, **more):
    return alchemy.insert(sdxl, prompt, "dog", "sks", **more)


# Stage 1, stage 2, composite


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
def test_the_subject_stands_in_the_words_region_and_the_rest_is_the_scene_to_the_bit(size):
    scene, blob = noise_picture(*size), ellipse(*size, (0.45, 0.55), (0.25, 0.25))
    made = insert(planted(scene, 200, blob, dilate=0.06), size=size)
    assert (
        np.array_equal(pixels(made.scene), pixels(scene))
        and made.box == (0, 0, *size)
        and made.crop.size == size[::-1]
    )
    inside = made.mask.bool().numpy()
    assert inside[blob.bool().numpy()].mean() > 0.97 and inside.mean() < 2.2 * float(blob.mean())

    feathered = cone(made.mask.numpy(), max(1, round(min(size) / 40)))
    assert np.abs(made.feathered.numpy() - feathered).max() < 1e-6
    old = pixels(scene)
    assert np.abs(pixels(made.result) - (old + feathered[:, :, None] * (200 - old))).max() <= 0.51
    assert np.array_equal(pixels(made.result)[~inside], old[~inside])
    assert (pixels(made.result)[made.feathered.numpy() == 1] == 200).all()


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
def test_a_users_soft_mask_weighs_how_much_of_a_drawn_scene_changes(size):
    mask, blob = ellipse(*size) * 0.5, ellipse(*size, (0.3, 0.3), (0.2, 0.2))
    made = insert(planted(noise_picture(*size), blob=blob), size=size, mask=mask)
    assert made.mask is mask and (made.feathered <= mask).all() and made.feathered.max() == 0.5
    assert torch.equal(made.soft, mask)
    old, new = pixels(made.scene), pixels(made.result)
    assert np.array_equal(new[mask.numpy() == 0], old[mask.numpy() == 0])
    # The latents' blend has the mask's weight too: where it is a half, they stay half the scene's.
    middle = made.feathered.numpy() == 0.5
    assert (abs(new - old)[middle] <= 0.5 * abs(200 - old)[middle] + 1).all() and abs(new - old)[
        middle
    ].mean() > 10


@pytest.mark.parametrize("crop", [True, False, None])
@pytest.mark.parametrize("height, width", OWN.values(), ids=OWN)
def test_in_a_picture_of_ones_own_nothing_outside_a_soft_mask_changes(height, width, crop):
    picture = noise_picture(height, width, seed=5)
    y, x = np.indices((height, width))
    mask = torch.tensor(
        np.clip(1.8 - np.hypot((y / height - 0.5) / 0.1, (x / width - 0.6) / 0.1), 0, 1),
        dtype=torch.float32,
    )
    made = insert(planted(), image=picture, mask=mask, crop=crop)
    old, new, outside = pixels(picture), pixels(made.result), mask.numpy() == 0
    assert made.result.size == (width, height) and np.array_equal(new[outside], old[outside])
    assert (made.feathered <= mask).all() and float(made.feathered.max()) == float(mask.max())
    deep = F.max_pool2d(-mask[None], 3, 1, 1)[0].numpy() == -1  # all around it may change freely
    assert (
        deep.any() and abs(new[deep] - 200).max() <= 30 and abs(new[deep] - 200).mean() < 3
    )  # an edge rings when it is resized
    top, left, box_height, box_width = made.box
    if crop is not False and height * width > 1.5 * 64**2:
        assert box_height * box_width < 0.9 * height * width
    assert (
        made.crop.size == made.drawn.size
        and abs(made.crop.width / made.crop.height * box_height - box_width) <= 1.5
    )


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("height, width", OWN.values(), ids=OWN)
def test_what_is_drawn_unchanged_comes_back_where_it_was(height, width, crop):
    # Waves of 24 places at the working size survive resampling; moved by half a place they would be off by 8 of 120.
    y, x = np.indices((height, width))
    box, work = insertion.work_box(planted(), ellipse(height, width, (0.6, 0.4)), crop)
    wave = 24 * box[2] / work[0]
    picture = grey(
        np.round(128 + 60 * np.sin(2 * np.pi * y / wave) + 60 * np.sin(2 * np.pi * x / wave))
    )
    made = insert(
        planted(subject=None), image=picture, mask=ellipse(height, width, (0.6, 0.4)), crop=crop
    )
    assert np.abs(pixels(made.drawn) - pixels(made.crop)).max() <= 1
    assert (
        np.abs(pixels(made.result) - pixels(picture)).mean() < 1.5
        and np.abs(pixels(made.result) - pixels(picture)).max() <= 6
    )


def test_the_feather_ends_at_a_box_that_cuts_the_mask():
    picture, mask = noise_picture(60, 2000), torch.ones(60, 2000)
    made = insert(planted(), image=picture, mask=mask)
    top, left, height, width = made.box
    assert width < 2000  # too long for the latents' grid
    for column, step in ((left, 1), (left + width - 1, -1)):
        assert (
            made.feathered[30, column - step] == 0
            and 0 < made.feathered[30, column] < made.feathered[30, column + step]
        )


def test_segmentation_finds_the_place_in_a_picture_of_ones_own_and_nothing_else_changes():
    for height, width in OWN.values():
        blob = ellipse(height, width, (0.5, 0.4), (0.2, 0.2))
        picture = noise_picture(height, width)
        sdxl = planted(blob=blob, size=(128, 128))
        sdxl.pictures["dog"] = None
        made = insert(sdxl, image=picture)
        inside = made.mask.bool().numpy()
        assert (
            made.scene is picture
            and inside[blob.bool().numpy()].mean() > 0.95
            and inside.mean() < 2.5 * float(blob.mean())
        )
        assert np.array_equal(pixels(made.result)[~inside], pixels(picture)[~inside])
        assert (
            sdxl.prompts[0] == PROMPT and sdxl.unet.calls[0]["lora"] == 0
        )  # looked at by the unmodified model, with what it shows


# Prompts, LoRA, steps


def test_stage_1_is_told_the_class_word_without_lora_and_stage_2_the_token_with_it():
    sdxl = planted(noise_picture(64, 64), blob=ellipse(64, 64))
    insert(sdxl, negative_prompt="a cat")
    assert sdxl.prompts == ["a cat", PROMPT, "a cat", "a photo of a sks dog in the snow"]
    assert [call["lora"] for call in sdxl.unet.calls] == [0] * 8 + [
        1
    ] * 6  # 8 steps, and 0.85 of them
    assert [sdxl.prompts[int(call["context"][-1, 0, 0])] for call in sdxl.unet.calls] == [
        PROMPT
    ] * 8 + ["a photo of a sks dog in the snow"] * 6
    insert(sdxl, image=noise_picture(64, 64), mask=ellipse(64, 64))
    assert sdxl.prompts[4:] == [None, "a photo of a sks dog in the snow"]


@pytest.mark.parametrize("strength, ran", [(1.0, 8), (0.5, 4), (0.13, 1)])
def test_strength_is_the_share_of_steps_that_stage_2_runs(strength, ran):
    sdxl, picture = planted(), noise_picture(64, 64)
    insert(sdxl, image=picture, mask=ellipse(64, 64), strength=strength, seed=3)
    first = sdxl.schedule.timesteps(8)[8 - ran][0]
    assert len(sdxl.unet.calls) == ran and sdxl.unet.calls[0]["t"] == first
    ab, noise = sdxl.schedule.alpha_bar_at(first), alchemy.noise((1, 4, 32, 32), [4])
    wanted = noise if strength == 1 else ab**0.5 * sdxl.vae.seen + (1 - ab) ** 0.5 * noise
    assert (sdxl.unet.calls[0]["x_t"][-1:] - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, 0.05])
def test_a_strength_that_cannot_be_is_an_error(strength):
    with pytest.raises(ValueError, match=f"strength .*{strength}"):
        insert(planted(), image=noise_picture(64, 64), mask=ellipse(64, 64), strength=strength)


def test_while_stage_2_runs_the_latents_outside_the_mask_are_the_pictures_at_each_level():
    sdxl, picture, mask = planted(), noise_picture(64, 64), ellipse(64, 64)
    insert(sdxl, image=picture, mask=mask, seed=3)
    free = (
        F.max_pool2d(mask[None, None], 2).bool().expand(1, 4, -1, -1)
    )  # a cell with one masked pixel may change
    noise = alchemy.noise((1, 4, 32, 32), [4])
    for call in sdxl.unet.calls:
        ab = sdxl.schedule.alpha_bar_at(call["t"])
        wanted = ab**0.5 * sdxl.vae.seen + (1 - ab) ** 0.5 * noise
        assert (call["x_t"][-1:] - wanted)[~free].abs().max() < 1e-5


def test_a_masked_line_of_one_pixel_reaches_the_latents_of_a_large_picture():
    picture, mask = noise_picture(600, 600), torch.zeros(600, 600)
    mask[300] = 1
    made = insert(planted(), image=picture, mask=mask)
    row = pixels(made.result)[300]
    assert abs(row - 200).mean() < 20 and np.array_equal(
        np.delete(pixels(made.result), 300, 0), np.delete(pixels(picture), 300, 0)
    )


def test_progress_sees_the_steps_of_both_stages():
    seen = []

    def bar(steps):
        for step in steps:
            seen.append(step.index)
            yield step

    insert(planted(noise_picture(64, 64), blob=ellipse(64, 64)), progress=bar)
    assert seen == [*range(8), *range(6)]


def test_a_second_subject_is_a_second_run_on_the_first_result():
    scene, left, right = (
        noise_picture(64, 64),
        ellipse(64, 64, (0.5, 0.25), (0.2, 0.15)),
        ellipse(64, 64, (0.5, 0.75), (0.2, 0.15)),
    )
    sdxl = Planted(
        {"": scene, "sks dog": grey(np.full((8, 8), 250)), "xyz cat": grey(np.full((8, 8), 5))},
        where={"dog": left, "cat": right},
    )
    prompt = "a dog and a cat in the snow"
    first = alchemy.insert(sdxl, prompt, "dog", "sks")
    sdxl.pictures[""] = None
    second = alchemy.insert(sdxl, prompt, "cat", "xyz", image=first.result)
    a, b = first.mask.bool().numpy(), second.mask.bool().numpy()
    assert not (a & b).any() and second.scene is first.result
    assert np.array_equal(pixels(second.result)[~b], pixels(first.result)[~b])
    assert np.array_equal(pixels(second.result)[~a & ~b], pixels(scene)[~a & ~b])
    assert (pixels(second.result)[first.feathered.numpy() == 1] == 250).all() and (
        pixels(second.result)[second.feathered.numpy() == 1] == 5
    ).all()


# What is wrong is said before anything is drawn


def test_a_mask_of_another_size_or_an_empty_one_is_an_error():
    sdxl = planted()
    with pytest.raises(ValueError, match="^the mask is 64x48, the picture 48x64$"):
        insert(sdxl, image=noise_picture(64, 48), mask=torch.ones(48, 64))
    with pytest.raises(ValueError, match="^the mask is empty: nothing may change$"):
        insert(sdxl, image=noise_picture(64, 64), mask=torch.zeros(64, 64))
    with pytest.raises(ValueError, match="the class word 'dog' is not in the prompt 'a cat'"):
        insert(sdxl, "a cat", image=noise_picture(64, 64))
    assert not sdxl.unet.calls


def test_a_word_that_is_looked_at_everywhere_is_an_error_that_names_the_flag():
    with pytest.raises(ValueError, match="the mask covers the whole picture; raise --threshold"):
        insert(planted(noise_picture(64, 64), blob=ellipse(64, 64)), threshold=0.0)


# On real networks


def test_stage_1_with_a_lora_on_is_bit_equal_to_a_model_that_never_had_one(tmp_path):
    folder, mask = write_folder(tmp_path), ellipse(32, 32)
    bare, taught = (alchemy.load(folder, "cpu", torch.float32) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for p in alchemy.add_lora(taught, rank=2):
        p.data = torch.randn(p.shape, generator=generator)
    options = dict(size=(32, 32), steps=4, seed=1, guidance=2.0)
    scene = alchemy.text_to_image(bare, PROMPT, **options)
    assert not np.array_equal(
        pixels(scene), pixels(alchemy.text_to_image(taught, PROMPT, **options))
    )
    made, plain = insert(taught, mask=mask, **options), insert(bare, mask=mask, **options)
    assert np.array_equal(pixels(made.scene), pixels(scene)) and torch.equal(made.soft, plain.soft)
    assert not np.array_equal(pixels(made.drawn), pixels(plain.drawn))  # stage 2 has it
    looked = [
        alchemy.insert(m, PROMPT, "dog", "sks", image=scene, threshold=0.5, dilate=0, steps=4).soft
        for m in (taught, bare)
    ]
    assert torch.equal(*looked)


@pytest.mark.parametrize("height, width", [(32, 32), (24, 44), (52, 20)])
def test_masked_img2img_is_the_picture_outside_the_mask_on_real_networks(height, width, tmp_path):
    sdxl = alchemy.load(write_folder(tmp_path), "cpu", torch.float32)
    picture, mask = noise_picture(height, width), ellipse(height, width) * 0.9
    rgb = images.composite(picture, picture.rotate(180), torch.full((height, width), 0.5))
    made = pixels(alchemy.image_to_image(sdxl, "a dog", rgb, strength=0.5, mask=mask, steps=4))
    assert np.array_equal(made[mask.numpy() == 0], pixels(rgb)[mask.numpy() == 0])
    assert abs(made - pixels(rgb))[mask.numpy() > 0].mean() > 1
    whole = pixels(alchemy.image_to_image(sdxl, "a dog", rgb, strength=0.5, steps=4))
    assert whole.shape == made.shape and not np.array_equal(
        whole[mask.numpy() == 0], pixels(rgb)[mask.numpy() == 0]
    )
