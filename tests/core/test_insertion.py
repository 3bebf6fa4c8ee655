"""The two stages on planted images: what changes, where, by how much; the rest bit for bit."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.checkpoints import vocabulary_read_once, write_folder  # noqa: F401
from helpers.planted import Planted, cone, ellipse, grey, noise_picture

import alchemy
from alchemy import images, insertion, lora, segmentation
from alchemy.insertion import Box

SIZES = {"square": (64, 64), "wide": (48, 84), "tall": (92, 44)}
IMAGE_SIZES = {
    "square": (300, 300),
    "wide": (453, 701),
    "tall": (331, 97),
    "panorama": (90, 700),
    "small": (40, 33),
}
PROMPT = "a photo of a dog in the snow"
SUBJECT_PROMPT = "a photo of a sks dog in the snow"


def pixels(image):
    return np.asarray(image).astype(int)


def planted(scene=None, subject=200, blob=None, **more):
    subject = subject if subject is None else grey(np.full((8, 8), subject))
    where = {} if blob is None else {"dog": blob}
    return Planted({"dog": scene, "sks dog": subject}, where=where, **more)


def insert(sdxl, prompt=PROMPT, **more):
    return alchemy.insert(sdxl, prompt, "dog", "sks", **more)


# The prompt


@pytest.mark.parametrize(
    "prompt, word, token, expected",
    [
        ("a dog on a beach", "dog", "sks", "a sks dog on a beach"),
        ("Dog and dog", "dog", "sks", "sks Dog and dog"),
        ("a hotdog, a dog.", "dog", "sks", "a hotdog, a sks dog."),
        ("dogs and dog-like dogs", "dog", "sks", "dogs and sks dog-like dogs"),
        ("a (c.t) cat", "c.t", r"\1<x>", r"a (\1<x> c.t) cat"),
        ("a teddy bear", "teddy bear", "sks", "a sks teddy bear"),
        ("a dog", "dog", "sks dog", "a sks dog"),
        ("a sks dog", "dog", "sks", "a sks dog"),
    ],
)
def test_the_token_is_put_before_the_first_class_word(prompt, word, token, expected):
    assert insertion.with_token(prompt, word, token) == expected


# Stage 1, stage 2, composite


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_subject_replaces_the_words_region_and_the_rest_is_bit_identical(size):
    scene, blob = noise_picture(*size), ellipse(*size, (0.45, 0.55), (0.25, 0.25))
    made = insert(planted(scene, 200, blob, dilate=0.06), size=size)
    old, new = pixels(scene), pixels(made.result)
    assert np.array_equal(pixels(made.scene), old)
    assert made.box == (0, 0, *size) and made.crop.size == size[::-1]
    inside, weight = made.mask.bool().numpy(), made.feathered.numpy()
    assert inside[blob.bool().numpy()].mean() > 0.97 and inside.mean() < 2.2 * float(blob.mean())
    assert np.array_equal(new[weight == 0], old[weight == 0]) and (new[inside] == 200).all()
    # The weight falls linearly over 4 pixels, which are 2 latents, beyond the mask's edge.
    grown = segmentation.grow(made.mask, 4).numpy()
    assert np.abs(weight - cone(grown, 4)).max() < 1e-6 and weight[inside].min() > 1 - 1e-6
    cells = F.max_pool2d(made.mask[None], 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    generated = np.where(cells[0, :, :, None].numpy() > 0, 200, old)
    assert np.abs(new - (old + weight[:, :, None] * (generated - old))).max() <= 0.51


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_values_of_a_given_mask_weigh_how_much_changes(size):
    mask, blob = ellipse(*size) * 0.5, ellipse(*size, (0.3, 0.3), (0.2, 0.2))
    made = insert(planted(noise_picture(*size), blob=blob), size=size, mask=mask)
    assert torch.equal(made.mask, mask) and torch.equal(made.soft, mask)
    assert (made.feathered <= mask).all() and made.feathered.max() == 0.5
    old, new = pixels(made.scene), pixels(made.result)
    assert np.array_equal(new[mask.numpy() == 0], old[mask.numpy() == 0])
    # The blend of the latents has the mask's weight too: at a half, they stay half the scene's.
    middle = made.feathered.numpy() == 0.5
    assert (abs(new - old)[middle] <= 0.5 * abs(200 - old)[middle] + 1).all()
    assert abs(new - old)[middle].mean() > 10


@pytest.mark.parametrize("crop", [True, False, None])
@pytest.mark.parametrize("height, width", IMAGE_SIZES.values(), ids=IMAGE_SIZES)
def test_in_an_image_of_any_size_nothing_outside_a_given_mask_changes(height, width, crop):
    image = noise_picture(height, width, seed=5)
    y, x = np.indices((height, width))
    distance = np.hypot((y / height - 0.5) / 0.1, (x / width - 0.6) / 0.1)
    mask = torch.tensor(np.clip(1.8 - distance, 0, 1), dtype=torch.float32)
    made = insert(planted(), image=image, mask=mask, crop=crop)
    old, new, outside = pixels(image), pixels(made.result), mask.numpy() == 0
    assert made.result.size == (width, height) and np.array_equal(new[outside], old[outside])
    assert (made.feathered <= mask).all() and float(made.feathered.max()) == float(mask.max())
    full = F.max_pool2d(-mask[None], 3, 1, 1)[0].numpy() == -1  # all around it may change freely
    assert full.any() and abs(new[full] - 200).max() <= 30  # an edge rings when it is resized
    assert abs(new[full] - 200).mean() < 3
    if crop is not False and height * width > 1.5 * 64**2:
        assert made.box.height * made.box.width < 0.9 * height * width
    ratio = made.crop.width / made.crop.height
    assert made.crop.size == made.generated.size
    assert abs(ratio * made.box.height - made.box.width) <= 1.5


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("height, width", IMAGE_SIZES.values(), ids=IMAGE_SIZES)
def test_an_image_generated_unchanged_comes_back_where_it_was(height, width, crop):
    # Waves of 24 pixels at the model's resolution survive resampling; moved by half a pixel they
    # would be off by 8 of 120.
    mask = ellipse(height, width, (0.6, 0.4))
    box, size = insertion.crop_box(planted(), mask, crop)
    y, x = np.indices((height, width)) * 2 * np.pi / (24 * box.height / size[0])
    image = grey(np.round(128 + 60 * np.sin(y) + 60 * np.sin(x)))
    made = insert(planted(subject=None), image=image, mask=mask, crop=crop)
    assert np.abs(pixels(made.generated) - pixels(made.crop)).max() <= 1
    change = np.abs(pixels(made.result) - pixels(image))
    assert change.mean() < 1.5 and change.max() <= 6


def test_the_feather_ends_at_a_box_that_cuts_the_mask():
    made = insert(planted(), image=noise_picture(60, 2000), mask=torch.ones(60, 2000))
    left, last = made.box.left, made.box.left + made.box.width - 1
    row = made.feathered[30]
    assert made.box.width < 2000  # too long for the latents' grid
    assert row[left - 1] == 0 < row[left] < row[left + 1]
    assert row[last + 1] == 0 < row[last] < row[last - 1]


def test_in_an_image_of_ones_own_the_object_is_found_and_the_rest_bit_identical():
    for height, width in IMAGE_SIZES.values():
        blob = ellipse(height, width, (0.5, 0.4), (0.2, 0.2))
        image = noise_picture(height, width)
        sdxl = planted(blob=blob, size=(128, 128))
        made = insert(sdxl, image=image)
        inside, outside = made.mask.bool().numpy(), made.feathered.numpy() == 0
        assert made.scene is image and inside[blob.bool().numpy()].mean() > 0.95
        assert inside.mean() < 2.5 * float(blob.mean())
        assert np.array_equal(pixels(made.result)[outside], pixels(image)[outside])
        assert sdxl.prompts[0] == PROMPT and sdxl.unet.calls[0]["lora"] == 0


# Prompts, LoRA, steps


def test_stage_1_has_the_class_word_without_lora_and_stage_2_the_token_with_it():
    sdxl = planted(noise_picture(64, 64), blob=ellipse(64, 64))
    insert(sdxl, negative_prompt="a cat")
    assert sdxl.prompts == [PROMPT, "a cat", SUBJECT_PROMPT, "a cat"]
    assert [call["lora"] for call in sdxl.unet.calls] == [0] * 8 + [1] * 6  # 8 steps, 0.85 of them
    prompts = [sdxl.prompts[int(call["context"][-1, 0, 0])] for call in sdxl.unet.calls]
    assert prompts == [PROMPT] * 8 + [SUBJECT_PROMPT] * 6
    insert(sdxl, image=noise_picture(64, 64), mask=ellipse(64, 64))
    assert sdxl.prompts[4:] == [PROMPT, None, SUBJECT_PROMPT, None]


@pytest.mark.parametrize("strength, runs", [(1.0, 8), (0.5, 4), (0.13, 1)])
def test_strength_is_the_share_of_steps_of_stage_2(strength, runs):
    sdxl = planted()
    insert(sdxl, image=noise_picture(64, 64), mask=ellipse(64, 64), strength=strength, seed=3)
    t = sdxl.schedule.timesteps(8)[8 - runs][0]
    assert len(sdxl.unet.calls) == runs and sdxl.unet.calls[0]["t"] == t
    ab, noise = sdxl.schedule.alpha_bar_at(t), alchemy.noise((1, 4, 32, 32), [4])  # seed + 1
    start = noise if strength == 1 else ab**0.5 * sdxl.vae.encoded + (1 - ab) ** 0.5 * noise
    assert (sdxl.unet.calls[0]["x_t"][-1:] - start).abs().max() < 1e-6


def test_a_masked_line_of_one_pixel_reaches_the_latents_of_a_large_image():
    image, mask = noise_picture(600, 600), torch.zeros(600, 600)
    mask[300] = 1
    result = pixels(insert(planted(), image=image, mask=mask).result)
    assert abs(result[300] - 200).mean() < 20
    assert np.array_equal(np.delete(result, 300, 0), np.delete(pixels(image), 300, 0))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mask=torch.ones(48, 64)), "^the mask is 64x48, the image 48x64; both must agree$"),
        (dict(mask=torch.zeros(64, 48)), "^the mask is empty: nothing may change$"),
        (dict(prompt="a cat"), "the class word 'dog' is not in the prompt 'a cat'"),
        (dict(prompt="two dogs"), "the class word 'dog' is not in the prompt 'two dogs'"),
        (dict(image="missing.png"), "^missing.png: no such file$"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_generated(options, message):
    sdxl = planted()
    with pytest.raises(ValueError, match=message):
        insert(sdxl, **{"image": noise_picture(64, 48)} | options)
    assert not sdxl.unet.calls


# The feather


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("size", [(17, 17), (12, 23), (25, 9)])
def test_feather_is_the_lowest_cone_over_every_pixel_and_lies_within(size, width):
    rng = np.random.default_rng(width)
    hard = ellipse(*size, (0.5, 0.4), (0.4, 0.4)).numpy()
    for mask in (hard, hard * rng.random(size), rng.random(size), np.ones(size)):
        made = insertion.feather(torch.tensor(mask, dtype=torch.float32), width).numpy()
        assert np.abs(made - cone(mask, width)).max() < 1e-6
        assert (made <= mask.astype(np.float32)).all() and ((made > 0) == (mask > 0)).all()


# The box


BOX_IMAGES = [(1200, 800), (453, 701), (300, 2400), (1999, 260), (50, 61)]
CORNERS = [(0.4, 0.45), (0, 0), (0.75, 0.75), (0.3, 0.75)]
EXTENTS = [(0.25, 0.25), (0.03, 0.2), (0.25, 0.02), (0, 0)]


@pytest.mark.parametrize("crop", [True, False])
def test_the_box_holds_the_mask_and_has_the_model_resolutions_aspect_ratio(crop):
    sdxl = Planted({})
    for image, corner, extent in product(BOX_IMAGES, CORNERS, EXTENTS):
        mask = torch.zeros(image)
        first = [int(side * c) for side, c in zip(image, corner, strict=True)]
        lengths = [max(1, round(side * e)) for side, e in zip(image, extent, strict=True)]
        mask[first[0] : first[0] + lengths[0], first[1] : first[1] + lengths[1]] = 1
        subject = Box.around(mask)
        box, size = insertion.crop_box(sdxl, mask, crop)
        for axis in (0, 1):  # inside the image
            assert 0 <= box[axis] <= image[axis] - box[axis + 2]
        scale = max(box.height / size[0], box.width / size[1])  # nothing is stretched
        assert abs(size[0] * scale - box.height) <= 1 and abs(size[1] * scale - box.width) <= 1
        assert size[0] % 2 == size[1] % 2 == 0 and 0.4 * 64**2 < size[0] * size[1] <= 1.5 * 64**2
        for axis in (0, 1):
            start, length, side = box[axis], box[axis + 2], image[axis]
            whole_other_side = box[3 - axis] == image[1 - axis]
            if subject[axis + 2] <= length:
                assert start <= subject[axis]
                assert subject[axis] + subject[axis + 2] <= start + length
            else:  # as far as the aspect ratio allows
                assert whole_other_side
            if crop and not whole_other_side:
                assert length >= min(2 * subject[axis + 2], side)
        if crop and extent == (0, 0):
            assert min(box.size) <= 40 and box.height * box.width < 0.6 * mask.numel()
        if not crop:
            assert box.height == image[0] or box.width == image[1]


# On real networks


def test_stage_1_with_a_lora_is_bit_equal_to_a_model_without_one(tmp_path):
    folder, mask = write_folder(tmp_path), ellipse(32, 32)
    bare, trained = (alchemy.load(folder, "cpu", torch.float32) for _ in range(2))
    rng = torch.Generator().manual_seed(0)
    alchemy.add_lora(trained, rank=2)
    for encoder in trained.text_encoders:
        layer = encoder.text_model.encoder.layers[0].mlp.fc1
        down, up = torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2)
        lora.add_adapter(layer, "default", down, up, alpha=1)
    for adapter in lora.adapters(trained):
        adapter.up.data = torch.randn(adapter.up.shape, generator=rng)
    options = dict(size=32, steps=4, seed=1, guidance=2.0)
    scene = pixels(alchemy.text_to_image(bare, PROMPT, **options))
    assert not np.array_equal(scene, pixels(alchemy.text_to_image(trained, PROMPT, **options)))
    made, plain = insert(trained, mask=mask, **options), insert(bare, mask=mask, **options)
    assert np.array_equal(pixels(made.scene), scene) and torch.equal(made.soft, plain.soft)
    assert not np.array_equal(pixels(made.generated), pixels(plain.generated))  # stage 2 has it
    options = dict(image=made.scene, threshold=0.5, dilate=0, steps=4)
    assert torch.equal(insert(trained, **options).soft, insert(bare, **options).soft)


def test_the_text_encoders_can_be_freed_before_the_first_step(tmp_path):
    sdxl = alchemy.load(write_folder(tmp_path), "cpu", torch.float32)
    loaded, mask = [], ellipse(32, 32)

    def progress(steps):  # of both stages
        for step in steps:
            loaded.append(set(sdxl.loaded))
            yield step

    options = dict(mask=mask, size=32, steps=2, strength=1.0, progress=progress)
    kept, freed = (insert(sdxl, free_text_encoders=free, **options) for free in (False, True))
    both = {"text_encoder", "text_encoder_2"}
    assert [both <= names for names in loaded] == [True] * 4 + [False] * 4
    assert [bool(both & names) for names in loaded] == [True] * 4 + [False] * 4
    assert np.array_equal(pixels(kept.result), pixels(freed.result))


@pytest.mark.parametrize("height, width", [(32, 32), (24, 44), (52, 20)])
def test_masked_image_to_image_is_bit_identical_outside_the_mask(height, width, tmp_path):
    sdxl = alchemy.load(write_folder(tmp_path), "cpu", torch.float32)
    image, mask = noise_picture(height, width), ellipse(height, width) * 0.9
    options = dict(strength=0.5, steps=4)
    made = pixels(alchemy.image_to_image(sdxl, "a dog", image, mask=mask, **options))
    outside, old = mask.numpy() == 0, pixels(image)
    assert np.array_equal(made[outside], old[outside]) and abs(made - old)[~outside].mean() > 1
    whole = pixels(alchemy.image_to_image(sdxl, "a dog", image, **options))
    assert whole.shape == made.shape and not np.array_equal(whole[outside], old[outside])
    # An image of other sides is fitted; a mask may be an image.
    larger = image.resize((width + 1, height + 3))
    white = images.to_image(torch.ones(3, height + 3, width + 1))
    fitted = alchemy.image_to_image(sdxl, "a dog", larger, mask=white, **options)
    assert fitted.size == image.size


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda sdxl: alchemy.text_to_image(sdxl, ["a dog"]), "prompt is .* must be one text"),
        (lambda sdxl: alchemy.text_to_image(sdxl, "a", size=(32, 30)), "30x32.*multiples of 4"),
        (lambda sdxl: alchemy.text_to_image(sdxl, "a", size=2**32), "more than 100 million"),
        (lambda sdxl: alchemy.text_to_image(sdxl, "a", size=(4, 400)), "longer than 50:1"),
        (lambda sdxl: alchemy.image_to_image(sdxl, "a", np.zeros(3)), "the image is a ndarray"),
    ],
)
def test_bad_arguments_of_the_pipeline_are_one_line(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(alchemy.load(write_folder(tmp_path), "cpu", torch.float32))


def test_seed_none_draws_another_image_each_time(tmp_path):
    sdxl = alchemy.load(write_folder(tmp_path), "cpu", torch.float32)
    one, two = (alchemy.text_to_image(sdxl, "a", size=32, steps=1, seed=None) for _ in range(2))
    assert not np.array_equal(pixels(one), pixels(two))
