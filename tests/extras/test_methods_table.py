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


def test_pencil_and_sepia_as_the_vae_returns_them_are_told_from_all_other_styles_but_for_one_in_56(
    measuring,
):
    styles = methods.Styles(measuring.sdxl, measuring.classifier, 140)
    x, truth = styles.renders(classifier.FRESH + 2**26, 56)
    named = styles.name(x)
    for style in ("pencil", "sepia"):
        assert (
            sum((name == style) != (styles.names[k] == style) for name, k in zip(named, truth)) <= 1
        )
    assert (
        styles.name(
            [Image.fromarray(np.uint8((one.permute(1, 2, 0) + 1) * 127.5)) for one in x[:7]]
        )
        == named[:7]
    )


def test_photos_of_one_background_differ_from_each_other_and_have_the_true_mask_of_their_size(
    measuring,
):
    photos, masks = (
        sorted(folder.iterdir()) for folder in measuring.photos_of_one_background("dog-poodle")
    )
    assert [p.name for p in photos] == [p.name for p in masks] and len(photos) == 5
    said = measuring.classifier.name([Image.open(p).resize((128, 128)) for p in photos])
    assert {(instance, place) for _, instance, place in said} == {
        ("dog-poodle", world.subject_photos("dog-poodle", 1)[0].background)
    }
    assert len({p.read_bytes() for p in photos}) == 5
    for photo, mask in zip(photos, masks):
        assert (
            Image.open(photo).size == Image.open(mask).size
            and 0.02 < np.mean(np.asarray(Image.open(mask)) > 127) < 0.6
        )


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
    assert all(
        found[key] in (0, 1) for key in ("subject", "background", "prior", "class")
    )  # of one picture
    assert measuring.of_styles("style-lora", *methods.OF_STYLES["style-lora"]) == {
        "style": 0,
        "plain": 1,
        "classifier": 0.5,
    }


def test_rows_that_are_named_are_measured_and_kept_beside_what_was(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        methods.Methods,
        "__init__",
        lambda self, out, share, weights: setattr(self, "out", Path(out)),
    )
    monkeypatch.setattr(
        methods.Methods,
        "of_subjects",
        lambda self, row, *_: {"subject": 0.5, "background": 1, "prior": 0, "class": len(row) / 10},
    )
    for row in ("word", "lora", "lora"):
        methods.main([row, "--out", str(tmp_path)])
    assert list(json.loads((tmp_path / "methods-1.json").read_text())) == ["word", "lora"]
    assert (
        capsys.readouterr()
        .out.strip()
        .endswith("| Textual inversion (`word`) | 50% | 100% | 0% | 40% |")
    )
    with pytest.raises(ValueError, match="no row lara; there are lora-alone, "):
        methods.main(["lara"])


def test_the_table_has_a_line_for_each_row_that_was_measured():
    figures = {"subject": 0.5, "background": 1.0, "prior": 0.25, "class": 0.0}
    assert methods.table({"word": figures}).splitlines()[2:] == [
        "| Textual inversion (`word`) | 50% | 100% | 25% | 0% |"
    ]
