"""train.py --validate: scores of the previews, in the log, on the curve, and the best step."""

import csv

import pytest
from helpers.running import call, good, photos, refused
from helpers.vision import by_colour
from PIL import Image

from alchemy.extras import encoders, evaluate
from alchemy.extras.validation import Validation
from alchemy.methods.outputs import SCORES, Log

RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
PURPLE = Image.new("RGB", (64, 64), (255, 0, 255))


@pytest.fixture
def paths(tmp_path):
    for name, image in (("a.png", RED), ("b.png", BLUE)):
        image.save(tmp_path / name)
    return [tmp_path / "a.png", tmp_path / "b.png"]


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def begun(paths, folder, log):
    validation = Validation(by_colour, paths, folder / "previews")
    validation.begin(log)
    return validation


def test_subject_and_class_are_scored_apart_and_the_best_step_has_both(paths, tmp_path):
    validation = begun(paths, tmp_path, Log(tmp_path, 0, SCORES))
    assert validation.best() is None
    assert validation.add(0, RED, RED) == pytest.approx({"subject": 0.5, "class": 1})
    cosines = (255 + 60) / (255**2 + 60**2) ** 0.5
    between = Image.new("RGB", (64, 64), (255, 0, 60))
    assert validation.add(20, between, RED) == pytest.approx({"subject": cosines / 2, "class": 1})
    half = 0.5**0.5
    assert validation.add(40, PURPLE, PURPLE) == pytest.approx({"subject": half, "class": half})
    assert validation.best() == 20
    del validation.scores[20], validation.scores[40]
    assert validation.best() is None  # step 0 is no result


def test_a_resumed_run_has_the_base_image_and_the_scores_of_before(paths, tmp_path):
    log = Log(tmp_path, 0, SCORES)
    validation = begun(paths, tmp_path, log)
    validation.add(0, PURPLE, BLUE)
    for step in (1, 2, 3):
        log.add(step, float("nan") if step == 2 else 0.5, 1e-4, 1.0)
    validation.add(3, RED, BLUE)
    again = begun(paths, tmp_path, Log(tmp_path, 2, SCORES))
    assert set(again.scores) == {0} and again.add(4, RED, BLUE)["class"] == 1
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "4"]
    assert (tmp_path / "log.jsonl").read_text().count("null") == 3 + 2 + 3 + 3  # with the NaN


def test_training_logs_scores_and_names_the_best_step(tiny, tmp_path):
    argv = ["train.py", photos(tmp_path / "dog"), "--weights", tiny, "--class-word", "dog"]
    argv += ["--steps", 2, "--rank", 2, "--out", "run", "--preview-every", 1, "--validate"]
    run = good(call(*argv))
    table = rows(tmp_path / "run")
    assert list(table[0]) == ["step", "loss", "learning_rate", "seconds", "subject", "class"]
    assert [row["step"] for row in table] == ["0", "1", "2"] and table[0]["loss"] == ""
    assert float(table[0]["class"]) == pytest.approx(1) and all(row["subject"] for row in table)
    assert "toy classifier, not DINO" in run.err and "the best preview by" in run.err
    curve = Image.open("run/loss.png").convert("RGB")
    assert {colour for _, colour in curve.getcolors(100000)} >= {(40, 110, 180), (60, 140, 70)}


BAD = {
    "no previews": (["--validate", "--preview-every", 0], "leave out --preview-prompt"),
    "other previews": (["--validate", "--preview-prompt", "a cat"], "leave out --preview-prompt"),
    "an encoder for nothing": (["--dino", "folder"], "--dino has no effect without --validate"),
    "no such encoder": (["--validate", "--dino", "nothing"], "nothing: no such folder"),
}


@pytest.mark.parametrize("argv, message", BAD.values(), ids=BAD)
def test_flags_that_do_not_fit_are_refused(argv, message, tiny, tmp_path):
    photos(tmp_path / "dog")
    run = call("train.py", "dog", "--weights", tiny, "--class-word", "dog", "--steps", 1, *argv)
    refused(run, message)


def test_the_toy_encoder_tells_a_subject_from_others_of_its_class():
    from weights.toy import world

    encode, (one, other) = encoders.load_toy(), world.CLASSES["dog"][:2]

    def scenes(instance, first_seed):
        made = [world.scene(first_seed + k, "any", instance=instance) for k in range(4)]
        return encode(Image.fromarray(scene.image) for scene in made)

    photos = scenes(one, 100)
    likeness = evaluate.fidelity(scenes(one, 200), photos).mean()
    assert likeness > evaluate.fidelity(scenes(other, 200), photos).mean() + 0.05
