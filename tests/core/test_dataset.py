"""Photos to latents, and what one training sample is made of. The VAE is planted: its latents are
averages of pixels, so that a sample can be compared with the photo at the place in its time ids."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.running import picture
from helpers.training import left_half
from PIL import Image, ImageOps

from alchemy import dataset, images
from alchemy.methods import captions
from alchemy.schedule import Schedule

FACTOR = 4


class Averages:
    """mean (B,4,h,w): the three colours and their sum, each the average of its cell."""

    def encode(self, x):
        mean = F.avg_pool2d(torch.cat([x, x.sum(1, keepdim=True)], 1), FACTOR)
        return mean, torch.zeros_like(mean)


def planted():
    return SimpleNamespace(
        vae=Averages(),
        vae_scale_factor=FACTOR,
        device=torch.device("cpu"),
        schedule=Schedule.from_config({}),
    )


def latents_at(photo, size, place):
    """By hand: the photo scaled until it covers size, cropped at place, averaged."""
    scale = max(size[0] / photo.height, size[1] / photo.width)
    scaled = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.LANCZOS)
    top, left = place
    assert 0 <= top <= scaled.height - size[0] and 0 <= left <= scaled.width - size[1]
    crop = scaled.crop((left, top, left + size[1], top + size[0]))
    return Averages().encode(images.to_tensor(crop))[0][0]


def sample(photos, size=(16, 16), seed=0, step=0, index=0, timesteps=1000):
    """A Batch of one, and the three sizes of its time ids: original, place, target."""
    schedule = Schedule.from_config({"num_train_timesteps": timesteps})
    one = dataset.get_sample(photos, schedule, size, FACTOR, seed, step, index)
    ids = one.time_ids[0].int().tolist()
    return one, (tuple(ids[:2]), tuple(ids[2:4]), tuple(ids[4:]))


def constant_photos(count, std=0.0, side=6):
    """Photos of one value each, named by their prompts."""
    photos = []
    for i in range(count):
        mean, deviation = torch.full((4, side, side), float(i)), torch.full((4, side, side), std)
        view = mean, deviation, torch.ones(1, side, side)
        photos.append(dataset.TrainingImage((view,), (24, 24), f"photo {i}"))
    return photos


def test_images_are_listed_sorted_and_other_files_named(tmp_path):
    names = "b.PNG a.jpg 10.webp 9.jpeg notes.txt clip.mp4 .hidden.png .DS_Store"
    for name in names.split():
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    found, skipped = captions.find_photos(tmp_path)
    assert [path.name for path in found] == ["10.webp", "9.jpeg", "a.jpg", "b.PNG"]
    assert skipped == ["clip.mp4", "notes.txt"]


def test_a_folder_that_is_missing_or_has_no_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="no images found"):
        captions.find_photos(tmp_path)
    for path in (tmp_path / "none", tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="no such folder"):
            captions.find_photos(path)


SHAPES = [(16, 16), (40, 24), (23, 37), (9, 30), (200, 67), (17, 16)]


@pytest.mark.parametrize("height, width", SHAPES)
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 16)])
def test_the_time_ids_are_the_place_and_size_of_the_pixels(tmp_path, height, width, size):
    photo = picture(height, width)
    photo.save(tmp_path / "photo.png")
    photos = [dataset.encode_image(planted(), tmp_path / "photo.png", size, "a dog")]
    assert len(photos[0].views) == 1
    places = set()
    for step in range(12):
        drawn, (original, place, target) = sample(photos, size, step=step)
        assert original == (height, width) and target == size
        assert drawn.time_ids.dtype == torch.float32
        assert torch.equal(drawn.x_0[0], latents_at(photo, size, place))
        places.add(place)
    scale = max(size[0] / height, size[1] / width)
    rooms = round(scale * height) - size[0], round(scale * width) - size[1]
    assert len(places) > 1 if max(rooms) >= FACTOR else places == {(0, 0)}


def test_a_mirrored_sample_is_a_crop_of_the_mirrored_photo(tmp_path):
    photo, size, seen = picture(19, 45), (16, 16), set()
    photo.save(tmp_path / "photo.png")
    path = tmp_path / "photo.png"
    photos = [dataset.encode_image(planted(), path, size, "a dog", mirror=True)]
    for step in range(24):
        drawn, (_, place, _) = sample(photos, size, step=step)
        views = [latents_at(view, size, place) for view in (photo, ImageOps.mirror(photo))]
        same = [torch.equal(drawn.x_0[0], view) for view in views]
        assert sum(same) == 1
        seen.add(same[1])
    assert seen == {False, True}


def test_the_loss_mask_is_the_masks_share_of_each_latent_in_the_crop(tmp_path):
    picture(40, 64).save(tmp_path / "a.png")
    mask = left_half(40, 64)
    photo = dataset.encode_image(planted(), tmp_path / "a.png", (32, 32), "a dog", True, mask)
    masks = [view[2] for view in photo.views]  # 32 x 51 pixels, of which 48 are whole latents
    assert [tuple(m.shape) for m in masks] == [(1, 8, 12)] * 2
    assert torch.equal(masks[0], masks[0][:, :1].expand(1, 8, 12))
    assert masks[0][0, 0].tolist() == pytest.approx([1] * 6 + [0.4] + [0] * 5, abs=0.1)
    assert masks[1][0, 0, 0] == 0 and masks[1][0, 0, -1] == 1  # of the mirrored photo
    for step in range(20):
        drawn, (_, place, _) = sample([photo], (32, 32), step=step)
        left = place[1] // 4
        assert any(torch.equal(drawn.loss_mask[0], m[:, :, left : left + 8]) for m in masks)


def test_posterior_and_noise_are_independent_unit_gaussians_at_each_step():
    photos = constant_photos(4, std=0.5, side=4)[3:]  # of the value 3
    samples = [sample(photos, step=step)[0] for step in range(200)]
    z = (torch.stack([s.x_0 for s in samples]) - 3) / 0.5
    eps = torch.stack([s.eps for s in samples])
    assert not (z[0] == z[1]).any() and not (eps[0] == eps[1]).any()
    for values in (z, eps):
        assert abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.03
    assert abs((z * eps).mean()) < 0.03


def test_a_sample_is_a_function_of_seed_step_and_index_alone():
    photos = constant_photos(3, std=1.0)

    first, _ = sample(photos, seed=5, step=7, index=4)
    torch.manual_seed(123)
    np.random.seed(9)
    state = torch.get_rng_state()
    again, _ = sample(photos, seed=5, step=7, index=4)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not used
    for name in ("x_0", "eps", "t", "time_ids"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.prompts == again.prompts
    for seed, step, index in ((6, 7, 4), (5, 8, 4), (5, 7, 5)):
        other, _ = sample(photos, seed=seed, step=step, index=index)
        assert not torch.equal(other.eps, first.eps)


@pytest.mark.parametrize("batch, accumulation, world", [(3, 1, 1), (1, 2, 1), (2, 2, 2)])
def test_batches_hold_consecutive_samples_with_their_targets(batch, accumulation, world):
    photos, sdxl, index = constant_photos(5, std=1.0), planted(), 0
    batchers = []
    for rank in range(world):
        arguments = sdxl, photos, (16, 16), 5, batch, accumulation, rank, world
        batchers.append(dataset.make_batcher(*arguments))
    prompts = []
    for step in range(8):
        for micro_step in range(accumulation):
            for get_batch in batchers:
                got = get_batch(step, micro_step)
                for i in range(batch):
                    one, _ = sample(photos, seed=5, step=step, index=index)
                    for name in ("x_0", "eps", "target", "loss_mask", "t", "time_ids"):
                        assert torch.equal(getattr(got, name)[i : i + 1], getattr(one, name))
                    assert torch.equal(one.target, one.eps)
                    index += 1
                prompts += got.prompts
    # Each photo comes once before one comes twice, in an order of its own.
    rounds = [tuple(prompts[i : i + 5]) for i in range(0, len(prompts) - 4, 5)]
    assert all(len(set(r)) == 5 for r in rounds) and len(set(rounds)) > 1


def test_concat_keeps_the_samples_in_order():
    sdxl = planted()
    get_batch = dataset.make_batcher(sdxl, constant_photos(3, std=1.0), (16, 16), 0, 2)
    a, b = get_batch(0, 0), get_batch(1, 0)
    both = dataset.concat(a, b)
    assert len(both.t) == 4 and both.prompts == a.prompts + b.prompts
    assert torch.equal(both.target[2:], b.target) and torch.equal(both.time_ids[:2], a.time_ids)


def test_timesteps_are_drawn_evenly_from_the_first_to_the_last():
    photos = constant_photos(1)
    t = []
    for step in range(300):
        t.append(int(sample(photos, step=step, index=step, timesteps=10)[0].t))
    assert set(t) == set(range(10)) and max(t.count(i) for i in range(10)) < 60
