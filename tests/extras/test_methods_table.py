"""The comparison of the methods (weights/toy/methods.py)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weights.toy import WEIGHTS, classifier, methods, world


@pytest.fixture
def measuring(tmp_path):
    """A Methods on the miniature, of one subject and a picture of it."""
    return methods.Methods(tmp_path, 0.05, str(WEIGHTS / "mini"))


def test_pencil_and_sepia_are_told_from_all_other_styles_but_for_one_in_56(measuring):
    styles = methods.Styles(measuring.sdxl, measuring.classifier, 140)
    x, truth = styles.renders(classifier.FRESH + 2**26, 56)  # as the VAE returns them
    named = styles.name(x)
    for style in ("pencil", "sepia"):
        wrong = [(n == style) != (styles.names[k] == style) for n, k in zip(named, truth)]
        assert sum(wrong) <= 1
    pixels = np.uint8((x[:7].movedim(1, -1) + 1) * 127.5)
    assert styles.name(list(map(Image.fromarray, pixels))) == named[:7]


def test_photos_of_one_background_differ_and_have_the_true_mask_of_their_size(measuring):
    folders = measuring.photos_of_one_background("dog-poodle")
    photos, masks = (sorted(folder.iterdir()) for folder in folders)
    assert [p.name for p in photos] == [p.name for p in masks] and len(photos) == 5
    found = measuring.classifier.name([Image.open(p).resize((128, 128)) for p in photos])
    place = world.subject_photos("dog-poodle", 1)[0].background
    assert {(instance, place) for _, instance, place in found} == {("dog-poodle", place)}
    assert len({p.read_bytes() for p in photos}) == 5
    for photo, mask in zip(photos, masks, strict=True):
        assert Image.open(photo).size == Image.open(mask).size
        assert 0.02 < np.mean(np.asarray(Image.open(mask)) > 127) < 0.6


def test_a_row_of_a_subject_and_one_of_a_style_are_measured_with_what_was_taught(
    measuring, monkeypatch
):
    def train_subject(self, photos, out, *flags):
        out.mkdir(parents=True)
        shutil.copy(WEIGHTS / "example.safetensors", out / "lora.safetensors")
        (out / "seconds.json").write_text("61")

    monkeypatch.setattr(methods.Methods, "train_subject", train_subject)
    monkeypatch.setattr(methods.Styles, "__init__", lambda self, sdxl, net: None)
    monkeypatch.setattr(methods.Styles, "name", lambda self, pictures: ["photo"] * len(pictures))
    monkeypatch.setattr(methods.Styles, "accuracy", lambda self: 0.5)
    found = measuring.of_subjects("lora", *methods.OF_SUBJECTS["lora"])
    assert set(found.values()) <= {0, 1}  # of one image
    assert {"subject", "background", "prior", "class"} <= set(found)
    found = measuring.of_styles("style-lora", *methods.OF_STYLES["style-lora"])
    assert found == {"style": 0, "plain": 1, "classifier": 0.5}


def test_rows_that_are_named_are_measured_and_kept_beside_what_was(monkeypatch, tmp_path, capsys):
    def start(self, out, share, weights):
        self.out = Path(out)

    def of_subjects(self, row, *_):
        return {"subject": 0.5, "background": 1, "prior": 0, "class": len(row) / 10}

    monkeypatch.setattr(methods.Methods, "__init__", start)
    monkeypatch.setattr(methods.Methods, "of_subjects", of_subjects)
    for row in ("word", "lora", "lora"):
        methods.main([row, "--out", str(tmp_path)])
    assert list(json.loads((tmp_path / "methods-1.json").read_text())) == ["word", "lora"]
    last = "| Textual inversion (`word`) | 50% | 100% | 0% | 40% |"
    assert capsys.readouterr().out.strip().endswith(last)
    with pytest.raises(ValueError, match="no row lara; there are lora-alone, "):
        methods.main(["lara"])
