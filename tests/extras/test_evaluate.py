"""The figures of likeness by hand, and the command that writes them."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from helpers.running import call_main, good, photos, picture, refused
from helpers.vision import by_colour, save_clip, save_dino
from PIL import Image

from alchemy.extras import encoders, evaluate
from alchemy.formats import png


@pytest.fixture(scope="module")
def folders(tmp_path_factory, reference):
    """The flags that name DINO and CLIP of random weights."""
    root = tmp_path_factory.mktemp("encoders")
    dino = save_dino(root / "dino", reference("dino"))
    clip = save_clip(root / "clip", reference("clip_vision"))
    return ["--dino", dino, "--clip", clip]


def unit(*rows):
    return F.normalize(torch.tensor(rows), dim=-1)


def test_fidelity_is_the_mean_cosine_over_all_pairs():
    generated, photos = unit([1.0, 0.0], [0.0, 1.0]), unit([1.0, 0.0], [0.6, 0.8], [0.0, -1.0])
    expected = [(1 + 0.6 + 0) / 3, (0 + 0.8 - 1) / 3]
    assert evaluate.fidelity(generated, photos).tolist() == pytest.approx(expected)


def test_diversity_counts_each_pair_of_one_prompt_once():
    features = unit([1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [1.0, 0.0])
    assert evaluate.diversity(features, ["a", "a", "a", "b"]) == pytest.approx(1.6 / 3, abs=1e-6)
    assert evaluate.diversity(features, ["a", "b", "c", "d"]) is None


def test_the_subject_is_cut_to_a_square_on_the_mean_colour():
    image, mask = Image.new("RGB", (40, 30), "red"), Image.new("L", (40, 30), 0)
    mask.paste(255, (10, 5, 31, 15))  # 21 x 10
    mask.paste(0, (10, 5, 12, 7))
    cut = evaluate.subject_only(image, mask)
    assert cut.size == (24, 24)  # 21 * 256 / 224
    assert sum(count for count, colour in cut.getcolors() if colour == (255, 0, 0)) == 21 * 10 - 4
    assert cut.getpixel((0, 0)) == cut.getpixel((12, 2)) == evaluate.MEAN_COLOUR


def test_the_background_is_the_image_with_the_subject_painted_over():
    image, mask = picture(30, 40), Image.new("L", (40, 30), 0)
    mask.paste(255, (10, 5, 31, 15))
    rest = evaluate.background_only(image, mask)
    assert rest.getpixel((10, 5)) == rest.getpixel((30, 14)) == evaluate.MEAN_COLOUR
    assert rest.getpixel((9, 5)) == image.getpixel((9, 5))


def test_leakage_is_of_the_most_similar_photo_and_the_subject_of_all(tmp_path):
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))

    def scene(name, subject, background):
        image = Image.new("RGB", (8, 8), background)
        image.paste(subject, (0, 0, 4, 8))
        image.save(tmp_path / f"{name}.png")
        return tmp_path / f"{name}.png"

    paths = [scene("a", "red", "blue"), scene("b", "red", "blue")]
    photos = [scene("c", "red", "blue"), scene("d", "lime", "yellow")]
    photo_masks = {"c.png": mask, "d.png": mask}
    masks = {"a.png": mask}
    rows, means = evaluate.score(paths, photos, by_colour, None, None, masks, photo_masks)
    cuts = by_colour(evaluate.subject_only(Image.open(path), mask) for path in photos)
    expected = evaluate.fidelity(cuts[:1], cuts).item()
    assert rows[0]["leakage"] == pytest.approx(1)
    assert rows[0]["DINO-subject"] == pytest.approx(expected)
    assert rows[1]["leakage"] is rows[1]["DINO-subject"] is None  # no mask was found
    assert means["leakage"] == pytest.approx(1)


def test_the_command_writes_table_csv_json_and_sheet(folders, tmp_path):
    prompts = ["a photo of a sks dog", "two tasks, a sks dog", "a sks dog"]
    for k, prompt in enumerate(prompts):
        (tmp_path / "made").mkdir(exist_ok=True)
        png.save(picture(40, 50, k), tmp_path / "made" / f"{k}.png", {"prompt": prompt})
    photos(tmp_path / "dog", 2)
    run = good(call_main(evaluate.main, "made", "dog", "--out", "scores", *folders))
    assert [path.name for path in run.wrote] == ["scores.csv", "scores.json", "scores.png"]
    assert Image.open("scores/scores.png").height > 2 * 128  # the photos, and the images

    dino, clip = encoders.load_dino(str(folders[1])), encoders.load_clip(str(folders[3]))
    images = [picture(40, 50, k) for k in range(3)]
    real = [Image.open(tmp_path / "dog" / f"{k}.png") for k in range(2)]
    texts = clip.texts(["a photo of a dog", "two tasks, a dog", "a dog"])  # without the token
    expected = {
        "DINO": (dino(images) @ dino(real).T).mean(1),
        "CLIP-I": (clip.images(images) @ clip.images(real).T).mean(1),
        "CLIP-T": (clip.images(images) * texts).sum(1),
    }
    stored = json.loads((tmp_path / "scores" / "scores.json").read_text())
    *rows, means = csv.DictReader((tmp_path / "scores" / "scores.csv").open())
    assert stored["settings"]["photos"] == "dog" and means["image"] == "mean"
    for name, values in expected.items():
        assert [row[name] for row in stored["images"]] == pytest.approx(values.tolist(), abs=1e-6)
        assert [float(row[name]) for row in rows] == pytest.approx(values.tolist(), abs=1e-6)
        assert stored["mean"][name] == float(means[name])
        assert stored["mean"][name] == pytest.approx(values.mean().item(), abs=2e-6)
    assert run.out.splitlines()[0].split() == ["image", "DINO", "CLIP-I", "CLIP-T"]
    assert run.out.splitlines()[4].split()[:2] == ["mean", f"{stored['mean']['DINO']:.3f}"]


def test_masks_of_a_folder_and_a_prior_set_add_their_figures(folders, tmp_path):
    for name in ("made", "dog", "prior"):
        photos(tmp_path / name, 3)
    for k in range(3):
        mask = Image.new("L", (20, 24 + 4 * k), 0)
        mask.paste(255, (2, 3, 12, 15))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / f"{k}.png")
    (tmp_path / "prompts.txt").write_text("a dog\na dog\na cat\n")
    lines = [{"file_name": f"{k}.png", "text": "a dog"} for k in range(3)]
    (tmp_path / "prior" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["made", "dog", "--prompts", "prompts.txt", "--mask", "masks", "--prior", "prior"]
    good(call_main(evaluate.main, *argv, "--out", "scores", *folders))
    mean = json.loads((tmp_path / "scores" / "scores.json").read_text())["mean"]
    assert (
        set(mean) == {*evaluate.COLUMNS, "DIV", "PRES", "DIV-prior"} and None not in mean.values()
    )
    # The three folders hold the same images.
    features = encoders.load_dino(str(folders[1]))(picture(24 + 4 * k, 20, k) for k in range(3))
    cosines = features @ features.T
    assert mean["PRES"] == pytest.approx(cosines.mean().item(), abs=2e-6)
    assert mean["DIV-prior"] == pytest.approx((9 - cosines.sum().item()) / 6, abs=2e-6)
    assert mean["DIV"] == pytest.approx(1 - cosines[0, 1].item(), abs=2e-6)
    assert mean["leakage"] == pytest.approx(1, abs=1e-5)


def test_of_a_folder_that_insert_wrote_only_the_result_is_scored(tmp_path):
    photos(tmp_path / "made", 3)
    assert len(evaluate.generated_images(str(tmp_path / "made"))) == 3
    names = ("result.png", "scene.png", "feathered.png")
    for path, name in zip(sorted((tmp_path / "made").iterdir()), names, strict=True):
        path.rename(path.with_name(name))
    assert [p.name for p in evaluate.generated_images(str(tmp_path / "made"))] == ["result.png"]


def test_scores_are_replaced_with_overwrite_alone(folders, tmp_path):
    photos(tmp_path / "made")
    argv = ["made", "made", "--out", "scores", *folders]
    good(call_main(evaluate.main, *argv))
    refused(call_main(evaluate.main, *argv), "scores holds scores")
    good(call_main(evaluate.main, *argv, "--overwrite"))


def test_an_image_without_a_mask_is_named_and_left_out(tmp_path, capsys):
    paths = sorted(photos(tmp_path / "made", 2).iterdir())
    (tmp_path / "masks").mkdir()
    Image.new("L", Image.open(paths[1]).size, 255).save(tmp_path / "masks" / "1.png")
    masks = evaluate.find_masks(paths, str(tmp_path / "masks"), None, None)
    assert list(masks) == ["1.png"]
    assert "left out of DINO-subject and leakage" in capsys.readouterr().err


BAD = {
    "no photos": (["made"], "two folders are needed"),
    "an empty folder": (["made", "empty"], "empty: no "),
    "segmentation without a word": (["made", "dog", "--mask", "segment"], "needs --class-word"),
    "prompts that are too few": (["made", "dog", "--prompts", "p.txt"], "1 prompts for 3 images"),
    "the images' own folder": (["made", "dog", "--out", "made"], "name another"),
    "the photos' folder": (["made", "dog", "--out", "dog"], "which is read; name another"),
    "no masks": (["made", "dog", "--mask", "nothing"], "--mask nothing: no such folder"),
    "masks of the photos alone": (["made", "dog", "--photo-mask", "m"], "goes with --mask"),
    "a flag of the benchmark": (["made", "dog", "--seeds", "2"], "--seeds goes with --benchmark"),
    "a folder for the benchmark": (["made", "--benchmark", "b"], "GENERATED has no effect with"),
    "no encoder": (["made", "dog", "--dino", "nothing"], "nothing: no such folder"),
}


@pytest.mark.parametrize("argv, message", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(argv, message, tmp_path):
    photos(tmp_path / "made")
    photos(tmp_path / "dog")
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.txt").write_text("a dog\n")
    refused(call_main(evaluate.main, *argv), message)
    assert not (tmp_path / "out" / "scores").exists() or not list((tmp_path / "out").rglob("*.*"))
