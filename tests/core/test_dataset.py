"""Photos to latents, and what one training sample is made of. The VAE is planted: its latents are averages of pixels, so that each
sample can be held against the photo at the place that the UNet is told."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from alchemy import dataset, images
from alchemy.methods import captions
from helpers.running import picture

FACTOR, T = 4, 1000


class Averages:
    """mean (B,4,h,w): the three colours and their sum, each the average of its cell; std is what it is told to be."""

    def __init__(self, std=0.0):
        self.std = std

    def encode(self, x):
        mean = F.avg_pool2d(torch.cat([x, x.sum(1, keepdim=True)], 1), FACTOR)
        return mean, torch.full_like(mean, self.std)


def planted(std=0.0):
    return SimpleNamespace(vae=Averages(std), vae_scale_factor=FACTOR, device=torch.device("cpu"))


def latents_at(photo, size, place):
    """By hand: the photo scaled until it covers size, cut at place, averaged."""
    scale = max(size[0] / photo.height, size[1] / photo.width)
    scaled = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.LANCZOS)
    top, left = place
    assert 0 <= top <= scaled.height - size[0] and 0 <= left <= scaled.width - size[1]
    return Averages().encode(
        images.to_tensor(scaled.crop((left, top, left + size[1], top + size[0])))
    )[0][0]


def draw(photos, size=(16, 16), seed=0, step=0, index=0):
    x_0, eps, weight, t, ids, prompt = dataset.sample(photos, size, FACTOR, T, seed, step, index)
    return SimpleNamespace(
        x_0=x_0,
        eps=eps,
        t=t,
        original=tuple(ids[:2].int().tolist()),
        place=tuple(ids[2:4].int().tolist()),
        target=tuple(ids[4:].int().tolist()),
        ids=ids,
        prompt=prompt,
    )


def several(count, std=0.0):
    """Photos of one value each, named by their prompts."""
    return [
        dataset.TrainingImage(
            ((torch.full((4, 6, 6), float(i)), torch.full((4, 6, 6), std), torch.ones(1, 6, 6)),),
            (24, 24),
            f"photo {i}",
        )
        for i in range(count)
    ]


# The folder


def test_pictures_are_listed_sorted_and_other_files_named(tmp_path):
    for name in (
        "b.PNG",
        "a.jpg",
        "10.webp",
        "9.jpeg",
        "notes.txt",
        "clip.mp4",
        ".hidden.png",
        ".DS_Store",
    ):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    found, skipped = captions.find_photos(tmp_path)
    assert [p.name for p in found] == ["10.webp", "9.jpeg", "a.jpg", "b.PNG"]
    assert skipped == ["clip.mp4", "notes.txt"]


def test_a_folder_that_is_missing_or_has_no_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="no pictures in it"):
        captions.find_photos(tmp_path)
    for path in (tmp_path / "none", tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="no such folder"):
            captions.find_photos(path)


# One photo


@pytest.mark.parametrize(
    "height, width", [(16, 16), (40, 24), (23, 37), (9, 30), (200, 67), (17, 16)]
)
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 16)])
def test_the_told_place_and_size_are_those_of_the_pixels_that_are_fed(
    tmp_path, height, width, size
):
    photo = picture(height, width)
    photo.save(tmp_path / "photo.png")
    encoded = [dataset.encode(planted(), tmp_path / "photo.png", size, "a dog")]
    places = set()
    for step in range(12):
        drawn = draw(encoded, size, step=step)
        assert (
            drawn.original == (height, width)
            and drawn.target == size
            and drawn.ids.dtype == torch.float32
        )
        assert torch.equal(drawn.x_0, latents_at(photo, size, drawn.place))
        places.add(drawn.place)
    room = [
        round(max(size[0] / height, size[1] / width) * side) - s >= FACTOR
        for side, s in ((height, size[0]), (width, size[1]))
    ]
    assert len(places) > 1 if any(room) else places == {(0, 0)}


def test_a_mirrored_sample_is_a_crop_of_the_mirrored_photo_at_the_told_place(tmp_path):
    photo, size = picture(19, 45), (16, 16)
    photo.save(tmp_path / "photo.png")
    encoded, seen = (
        [dataset.encode(planted(), tmp_path / "photo.png", size, "a dog", mirror=True)],
        set(),
    )
    for step in range(24):
        drawn = draw(encoded, size, step=step)
        same = [
            torch.equal(drawn.x_0, latents_at(view, size, drawn.place))
            for view in (photo, ImageOps.mirror(photo))
        ]
        assert sum(same) == 1
        seen.add(same[1])
    assert seen == {False, True}


def test_without_mirror_only_the_photo_itself_is_encoded(tmp_path):
    picture(16, 16).save(tmp_path / "photo.png")
    assert len(dataset.encode(planted(), tmp_path / "photo.png", (16, 16), "a dog").latents) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_honoured_in_pixels_and_in_the_original_size(tmp_path, orientation):
    turned, exif = picture(24, 36), Image.Exif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "photo.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "photo.png"))
    encoded = [dataset.encode(planted(), tmp_path / "photo.png", (16, 16), "a dog")]
    drawn = draw(encoded)
    assert drawn.original == upright.size[::-1] == ((36, 24) if orientation > 4 else (24, 36))
    assert torch.equal(drawn.x_0, latents_at(upright, (16, 16), drawn.place))


# One sample


def test_the_posterior_is_sampled_anew_at_each_step():
    photos = [
        dataset.TrainingImage(
            ((torch.full((4, 4, 4), 3.0), torch.full((4, 4, 4), 0.5), torch.ones(1, 4, 4)),),
            (16, 16),
            "a dog",
        )
    ]
    drawn = torch.stack([draw(photos, step=step).x_0 for step in range(200)])
    z = (drawn - 3.0) / 0.5
    assert z[0].unique().numel() == 64 and not (z[0] == z[1]).any()
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03


def test_latents_posterior_noise_and_target_noise_are_independent():
    photos = several(1, std=1.0)
    pairs = [
        (d.x_0.flatten(), d.eps.flatten()) for d in (draw(photos, step=step) for step in range(200))
    ]
    x, eps = (torch.cat(part) for part in zip(*pairs))
    assert (
        abs(float((x * eps).mean())) < 0.03
        and abs(float(eps.mean())) < 0.03
        and abs(float(eps.std()) - 1) < 0.03
    )


def test_a_sample_is_a_function_of_seed_step_and_index_only():
    photos = several(3, std=1.0)

    def draws():
        return [
            dataset.sample(photos, (16, 16), FACTOR, T, 5, step, index)
            for step, index in ((0, 0), (7, 4), (7, 5))
        ]

    first = draws()
    torch.manual_seed(123)
    torch.randn(10)
    np.random.seed(9)
    state = torch.get_rng_state()
    again = draws()
    assert torch.equal(torch.get_rng_state(), state)  # nor does it use up anyone else's numbers
    for a, b in zip(first, again):
        assert all(torch.equal(x, y) for x, y in zip(a[:5], b[:5])) and a[5] == b[5]
    base = dataset.sample(photos, (16, 16), FACTOR, T, 5, 7, 4)
    for other in ((6, 7, 4), (5, 8, 4), (5, 7, 5)):
        assert not torch.equal(dataset.sample(photos, (16, 16), FACTOR, T, *other)[1], base[1])


def test_a_batch_holds_the_samples_of_its_indices():
    photos = several(3, std=1.0)
    batch = dataset.batch(photos, (16, 16), FACTOR, T, 5, 2, range(4, 7), "cpu")
    assert (
        batch.x_0.shape == batch.eps.shape == (3, 4, 4, 4)
        and batch.time_ids.shape == (3, 6)
        and batch.time_ids.dtype == torch.float32
    )
    for i, index in enumerate(range(4, 7)):
        one = dataset.sample(photos, (16, 16), FACTOR, T, 5, 2, index)
        assert (
            torch.equal(batch.x_0[i], one[0])
            and torch.equal(batch.eps[i], one[1])
            and batch.t[i] == one[3]
        )
        assert torch.equal(batch.time_ids[i], one[4]) and batch.prompts[i] == one[5]


def test_each_photo_comes_once_before_one_comes_twice():
    photos = several(5)
    order = [draw(photos, step=index, index=index).prompt for index in range(50)]
    rounds = [tuple(order[i : i + 5]) for i in range(0, 50, 5)]
    assert all(len(set(r)) == 5 for r in rounds) and len(set(rounds)) > 5


def test_the_order_of_photos_does_not_depend_on_batch_size():
    photos = several(5)
    one = [
        p
        for step in range(12)
        for p in dataset.batch(
            photos, (16, 16), FACTOR, T, 0, step, range(step, step + 1), "cpu"
        ).prompts
    ]
    four = [
        p
        for step in range(3)
        for p in dataset.batch(
            photos, (16, 16), FACTOR, T, 0, step, range(4 * step, 4 * step + 4), "cpu"
        ).prompts
    ]
    assert one == four


def test_timesteps_reach_from_the_first_to_the_last():
    t = [
        int(dataset.sample(several(1), (16, 16), FACTOR, 10, 0, step, step)[3])
        for step in range(300)
    ]
    assert set(t) == set(range(10)) and max(t.count(i) for i in range(10)) < 60
