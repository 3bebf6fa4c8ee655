"""The toy world (weights/toy/world.py): what its scenes promise to whoever trains on them or measures against them."""

import re

import numpy as np
import pytest

from alchemy.methods import captions
from weights.toy import WEIGHTS, styles, world

ALL = [instance for instances in world.CLASSES.values() for instance in instances]


@pytest.fixture(scope="module")
def train_scenes():
    """3000 scenes of the training stream, small: what is drawn and said does not depend on the size."""
    return [world.scene(seed, size=(32, 32)) for seed in range(3000)]


def test_same_arguments_give_the_same_bits():
    for seed in range(8):
        one, two = world.scene(seed, "any"), world.scene(seed, "any")
        assert np.array_equal(one.image, two.image) and one.caption == two.caption
        assert all(np.array_equal(a[2], b[2]) for a, b in zip(one.objects, two.objects))
    assert not np.array_equal(world.scene(0).image, world.scene(1).image)


def test_training_scenes_hold_no_held_out_instance_pair_or_style(train_scenes):
    for one in train_scenes:
        assert one.style not in world.HELD_OUT_STYLES
        for word, instance, _ in one.objects:
            assert (
                instance not in world.HELD_OUT_INSTANCES
                and (word, one.background) not in world.HELD_OUT_PAIRS
            )


def test_training_captions_name_no_held_out_pair_or_style(train_scenes):
    phrases = {phrase: name for name, those in world.BACKGROUNDS.items() for phrase in those}
    for one in train_scenes:
        assert not any(styles.STYLES[style][0] in one.caption for style in world.HELD_OUT_STYLES)
        named = {name for phrase, name in phrases.items() if phrase in one.caption}
        assert named == {one.background}
        assert not any(
            (word, one.background) in world.HELD_OUT_PAIRS
            for word in re.findall("[a-z]+", one.caption)
        )


def test_every_caption_names_its_class_words_and_no_other(train_scenes):
    for one in train_scenes:
        said = [word for word in re.findall("[a-z]+", one.caption) if word in world.CLASSES]
        assert said == [word for word, _, _ in one.objects], one.caption


def test_the_plain_caption_is_six_in_ten_of_the_training_stream(train_scenes):
    plain = {
        f"a photo of a {word} {phrase}"
        for word in world.CLASSES
        for those in world.BACKGROUNDS.values()
        for phrase in those
    }
    assert 0.5 < np.mean([one.caption in plain for one in train_scenes]) < 0.7


def test_every_training_instance_place_and_style_is_drawn(train_scenes):
    assert {instance for one in train_scenes for _, instance, _ in one.objects} == set(ALL) - set(
        world.HELD_OUT_INSTANCES
    )
    assert {one.background for one in train_scenes} == set(world.BACKGROUNDS)
    assert {one.style for one in train_scenes} == set(styles.STYLES) - set(world.HELD_OUT_STYLES)


def test_held_out_tables_leave_enough_to_learn_every_class_and_place():
    assert len(world.HELD_OUT_INSTANCES) >= 8 and world.EXAMPLE in world.HELD_OUT_INSTANCES
    assert len(world.HELD_OUT_PAIRS) == round(len(world.CLASSES) * len(world.BACKGROUNDS) / 10)
    for word, instances in world.CLASSES.items():
        assert len(set(instances) - set(world.HELD_OUT_INSTANCES)) >= 3
        assert sum(pair[0] == word for pair in world.HELD_OUT_PAIRS) <= 1
    assert all(
        sum(pair[1] == name for pair in world.HELD_OUT_PAIRS) <= 2 for name in world.BACKGROUNDS
    )


@pytest.mark.parametrize("objects", [("ball-eight",), ("cup-bubble",), ("dog-poodle", "car-taxi")])
def test_mask_is_the_matte_between_a_black_and_a_grey_place(objects, monkeypatch):
    """Over grey minus over black is grey * (1 - alpha): that is how a matte is measured on any picture."""
    monkeypatch.setattr(world, "shadow", lambda *_: None)
    pictures = {}
    for key, tone, things in (("black", 0.0, objects), ("grey", 0.8, objects), ("bare", 0.8, ())):
        monkeypatch.setattr(
            world, "draw", lambda name, rng, size: (np.full((3, *size), tone, np.float32), 60.0)
        )
        pictures[key] = world.scene(3, "any", background="room", style="photo", objects=things)
    level = pictures["bare"].image.astype(np.float64)
    matte = 1 - (pictures["grey"].image.astype(np.float64) - pictures["black"].image) / level
    masks = [mask for _, _, mask in pictures["grey"].objects]
    assert len(masks) == len(objects) and all(
        mask.dtype == np.float32 and mask.min() >= 0 and mask.max() <= 1 for mask in masks
    )
    error = np.abs(matte - sum(masks)[..., None]).max()
    assert error <= 1.51 / level.min()  # three roundings to 8 bits


def test_without_its_object_a_scene_is_the_same_place_without_mask_and_shadow():
    for seed in range(6):
        forced = dict(background="grass", style="photo")
        full, bare = (
            world.scene(seed, objects=("ball-eight",), **forced),
            world.scene(seed, objects=(), **forced),
        )
        mask = full.objects[0][2]
        changed = (full.image != bare.image).any(-1)
        assert bare.objects == () and changed[mask > 0.5].mean() > 0.99
        assert (full.image <= bare.image)[mask == 0].all()  # a shadow only darkens
        top = np.flatnonzero(mask.any(1))[[0, -1]].mean()
        assert not changed[: int(top)][mask[: int(top)] == 0].any()  # and lies at the foot


def test_every_instance_stands_wholly_in_the_picture_with_a_mask_of_its_own():
    for seed, instance in enumerate(ALL):
        ((word, name, mask),) = world.scene(seed, "any", instance=instance).objects
        assert name == instance and instance.startswith(word + "-") and 0.02 < mask.mean() < 0.6
        assert max(np.ptp(np.flatnonzero(mask.any(axis))) for axis in (0, 1)) > 0.3 * 128


@pytest.mark.parametrize("size", [(96, 160), (160, 96), (160, 160), (64, 64), (97, 131)])
def test_scenes_are_drawn_at_any_size_in_every_place_and_style(size):
    for seed, (name, style) in enumerate(
        (name, style) for name in world.BACKGROUNDS for style in styles.STYLES
    ):
        one = world.scene(seed, "any", size, background=name, style=style)
        assert (
            one.image.shape == (*size, 3)
            and one.image.dtype == np.uint8
            and one.background == name
            and one.style == style
        )
        assert all(mask.shape == size for _, _, mask in one.objects)


def test_forced_arguments_override_the_split():
    one = world.scene(
        5,
        "train",
        objects=("dog-poodle", "hat-straw"),
        background="desert",
        style="pencil",
        caption="",
    )
    assert [name for _, name, _ in one.objects] == ["dog-poodle", "hat-straw"]
    assert (one.background, one.style, one.caption) == ("desert", "pencil", "")


def test_sprites_folder_holds_exactly_the_listed_instances_and_their_licence():
    files = {path.name for path in (WEIGHTS / "sprites").iterdir()}
    assert files == {f"{instance}.webp" for instance in ALL} | {"LICENSE"}


def test_each_subject_folder_holds_five_photos_of_192_pixels():
    subjects = WEIGHTS / "subjects"
    assert {path.name for path in subjects.iterdir()} == set(world.HELD_OUT_INSTANCES)
    for instance in world.HELD_OUT_INSTANCES:
        files = sorted((subjects / instance).iterdir())
        assert [file.name for file in files] == [f"{k:02d}.jpg" for k in range(5)]
        assert all(world.Image.open(file).size == (192, 192) for file in files)


def test_subject_photos_show_the_subject_on_five_backgrounds_without_a_held_out_pair():
    for instance in world.HELD_OUT_INSTANCES:
        photos = world.subject_photos(instance)
        assert len({photo.background for photo in photos}) == len(photos) == 5
        for photo in photos:
            ((word, name, _),) = photo.objects
            assert name == instance and photo.style == "photo"
            assert (word, photo.background) not in world.HELD_OUT_PAIRS


def test_captioned_scenes_are_of_a_style_that_no_training_saw_and_are_read_with_their_captions(
    tmp_path,
):
    for folder in ("one", "two"):
        world.main(["captioned", str(tmp_path / folder), "--count", "12"])
    pictures = captions.read(tmp_path / "one")
    assert len(pictures) == 12 and captions.unlisted(tmp_path / "one", pictures) == []
    assert all(
        path.read_bytes() == (tmp_path / "two" / path.name).read_bytes() for path, _ in pictures
    )
    phrases = [phrase for those in world.BACKGROUNDS.values() for phrase in those]
    for path, caption in pictures:
        assert (
            world.Image.open(path).size == (192, 192)
            and caption.startswith("a pencil drawing of a")
            and any(p in caption for p in phrases)
        )
    assert "pencil" in world.HELD_OUT_STYLES and len(set(caption for _, caption in pictures)) > 6


def test_captions_of_ones_own_name_what_is_there(tmp_path):
    lines = captions.read(world.captioned(tmp_path, 12, "pixel", "a sks drawing of a {}"))
    scene = world.scene(world.FRESH + 2**31 + 2**25, style="pixel", size=(192, 192))
    assert np.array_equal(scene.image, np.asarray(world.Image.open(lines[0][0])))
    assert (
        lines[0][1]
        == f"a sks drawing of a {' and a '.join(word for word, _, _ in scene.objects)} {world.BACKGROUNDS[scene.background][0]}"
    )


@pytest.mark.parametrize(
    "argv", [["captioned"], ["captioned", "x", "--count", "0"], ["nothing"], ["sheet"]]
)
def test_a_command_of_the_world_that_cannot_be_is_refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        world.main(argv)
    assert "error:" in capsys.readouterr().err
