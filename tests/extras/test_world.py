"""The toy world (weights/toy/world.py): what its scenes promise to training and measuring."""

import re
from itertools import product

import numpy as np
import pytest

from alchemy.methods import captions
from weights.toy import WEIGHTS, styles, world

ALL = sum(map(list, world.CLASSES.values()), [])
PHRASES = {}  # {phrase of a caption: background}
for background, texts in world.BACKGROUNDS.items():
    PHRASES |= dict.fromkeys(texts, background)


@pytest.fixture(scope="module")
def train_scenes():
    """3000 small scenes of the training stream: their content does not depend on the size."""
    return [world.scene(seed, size=(32, 32)) for seed in range(3000)]


def words_of(scene):
    return [word for word, _, _ in scene.objects]


def test_same_arguments_give_the_same_bits():
    for seed in range(8):
        one, two = world.scene(seed, "any"), world.scene(seed, "any")
        assert np.array_equal(one.image, two.image) and one.caption == two.caption
        for a, b in zip(one.objects, two.objects, strict=True):
            assert np.array_equal(a[2], b[2])
    assert not np.array_equal(world.scene(0).image, world.scene(1).image)


def test_training_scenes_and_captions_hold_nothing_held_out(train_scenes):
    held_out_styles = [styles.STYLES[style][0] for style in world.HELD_OUT_STYLES]
    for one in train_scenes:
        assert one.style not in world.HELD_OUT_STYLES
        assert not any(text in one.caption for text in held_out_styles)
        named = {place for phrase, place in PHRASES.items() if phrase in one.caption}
        assert named == {one.background}
        mentioned = [word for word in re.findall("[a-z]+", one.caption) if word in world.CLASSES]
        assert mentioned == words_of(one), one.caption
        for word, instance, _ in one.objects:
            assert instance not in world.HELD_OUT_INSTANCES
            assert (word, one.background) not in world.HELD_OUT_PAIRS


def test_the_training_stream_has_every_instance_place_and_style_and_plain_captions(train_scenes):
    plain = {f"a photo of a {word} {phrase}" for word, phrase in product(world.CLASSES, PHRASES)}
    assert 0.5 < np.mean([one.caption in plain for one in train_scenes]) < 0.7
    instances = set()
    for one in train_scenes:
        instances |= {instance for _, instance, _ in one.objects}
    assert instances == set(ALL) - set(world.HELD_OUT_INSTANCES)
    assert {one.background for one in train_scenes} == set(world.BACKGROUNDS)
    assert {one.style for one in train_scenes} == set(styles.STYLES) - set(world.HELD_OUT_STYLES)


def test_held_out_tables_leave_enough_to_train_on_every_class_and_place():
    pairs = list(world.HELD_OUT_PAIRS)
    assert len(world.HELD_OUT_INSTANCES) >= 8
    assert len(pairs) == round(len(world.CLASSES) * len(world.BACKGROUNDS) / 10)
    for word, instances in world.CLASSES.items():
        assert len(set(instances) - set(world.HELD_OUT_INSTANCES)) >= 3
        assert sum(pair[0] == word for pair in pairs) <= 1
    for name in world.BACKGROUNDS:
        assert sum(pair[1] == name for pair in pairs) <= 2


@pytest.mark.parametrize("instance", ["ball-eight", "cup-bubble", "dog-poodle"])
def test_mask_is_the_matte_between_a_black_and_a_grey_place(instance, monkeypatch):
    """Over grey minus over black is grey * (1 - alpha): how a matte of any image is measured."""
    monkeypatch.setattr(world, "shadow", lambda *_: None)

    def scene(tone):
        def draw(name, rng, size):
            return np.full((3, *size), tone, np.float32), 60.0

        monkeypatch.setattr(world, "draw", draw)
        made = world.scene(3, "any", background="room", style="photo", instance=instance)
        return made, made.image.astype(np.float64)

    _, black = scene(0.0)
    grey, over_grey = scene(0.8)
    ((_, _, mask),) = grey.objects
    assert mask.dtype == np.float32 and mask.min() >= 0 and mask.max() <= 1
    level = over_grey[0, 0]  # beside the object
    error = np.abs(1 - (over_grey - black) / level - mask[..., None]).max()
    assert error <= 1.51 / level.min()  # three roundings to 8 bits


def test_every_instance_stands_wholly_in_the_image_with_its_mask():
    for seed, instance in enumerate(ALL):
        ((word, name, mask),) = world.scene(seed, "any", instance=instance).objects
        assert name == instance and instance.startswith(word + "-") and 0.02 < mask.mean() < 0.6
        assert max(np.ptp(np.flatnonzero(mask.any(axis))) for axis in (0, 1)) > 0.3 * 128


@pytest.mark.parametrize("size", [(96, 160), (160, 96), (160, 160), (64, 64), (97, 131)])
def test_scenes_are_drawn_at_any_size_in_every_place_and_style(size):
    for seed, (name, style) in enumerate(product(world.BACKGROUNDS, styles.STYLES)):
        one = world.scene(seed, "any", size, background=name, style=style)
        assert one.image.shape == (*size, 3) and one.image.dtype == np.uint8
        assert (one.background, one.style) == (name, style)
        assert all(mask.shape == size for _, _, mask in one.objects)


def test_forced_arguments_override_the_split():
    forced = {"background": "desert", "style": "pencil", "caption": ""}
    one = world.scene(5, "train", instance="dog-poodle", **forced)
    assert [name for _, name, _ in one.objects] == ["dog-poodle"]
    assert (one.background, one.style, one.caption) == ("desert", "pencil", "")


def test_the_folders_hold_each_sprite_and_five_photos_of_192_pixels_per_subject():
    files = {path.name for path in (WEIGHTS / "sprites").iterdir()}
    assert files == {f"{instance}.webp" for instance in ALL} | {"LICENSE"}
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


def test_captioned_scenes_are_of_a_held_out_style_and_are_read_with_their_captions(tmp_path):
    for folder in ("one", "two"):
        world.main(["captioned", str(tmp_path / folder), "--count", "12"])
    examples = captions.read(tmp_path / "one")
    assert len(examples) == 12 and captions.unlisted(tmp_path / "one", examples) == []
    for path, caption in examples:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert world.Image.open(path).size == (192, 192)
        assert caption.startswith("a pencil drawing of a")
        assert any(phrase in caption for phrase in PHRASES)
    assert "pencil" in world.HELD_OUT_STYLES and len({caption for _, caption in examples}) > 6


def test_captions_of_a_given_form_name_the_objects_of_the_scene(tmp_path):
    folder = world.captioned(tmp_path, 12, "pixel", "a sks drawing of a {}")
    path, caption = captions.read(folder)[0]
    scene = world.scene(world.FRESH + 2**31 + 2**25, style="pixel", size=(192, 192))
    assert np.array_equal(scene.image, np.asarray(world.Image.open(path)))
    place = world.BACKGROUNDS[scene.background][0]
    assert caption == f"a sks drawing of a {' and a '.join(words_of(scene))} {place}"


@pytest.mark.parametrize(
    "argv", [["captioned"], ["captioned", "x", "--count", "0"], ["nothing"], ["sheet"]]
)
def test_a_command_of_the_world_that_cannot_be_is_refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        world.main(argv)
    assert "error:" in capsys.readouterr().err
