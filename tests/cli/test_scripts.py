"""train.py, sample.py and insert.py as a user meets them: their flags and defaults, and what train.py writes."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image
from safetensors import safe_open

import insert
import sample
import train
from alchemy import cli
from alchemy.defaults import TABLE
from alchemy.formats import png
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import PROMPT, ROOT, SCENE, call, contents, good, photos, quick, tiny  # noqa: F401

# Flags


@pytest.mark.parametrize("script", ["train.py", "sample.py", "insert.py"])
def test_help_imports_no_torch_and_tells_both_defaults(script):
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    print("heavy:", sorted({{"torch", "numpy", "PIL", "safetensors", "tqdm", "huggingface_hub"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "heavy: []" in run.stdout and run.stderr == ""
    assert (
        "for the miniature" in run.stdout
        and "for SDXL" in run.stdout
        and f"python {script}" in run.stdout
    )


def test_every_flag_is_explained_and_one_spelling_means_the_same_everywhere():
    seen = {}
    for script in ("train.py", "sample.py", "insert.py"):
        text = subprocess.run(
            [sys.executable, script, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={"COLUMNS": "400"},
        ).stdout
        for flag, explained in re.findall(r"^  (--[\w-]+).*?(?:  +|\n {20,})(.*)$", text, re.M):
            seen.setdefault(flag, set()).add(explained)
        assert (
            len(set(re.findall(r"^  (--[\w-]+)", text, re.M)) - seen.keys()) == 0
        )  # each is explained
    for flag in (
        "--weights",
        "--device",
        "--dtype",
        "--vae",
        "--lora",
        "--sampler",
        "--guidance",
        "--negative-prompt",
    ):
        assert len(seen[flag]) == 1, seen[flag]
    assert len(seen["--steps"]) == 2  # of training, of denoising


def test_the_learning_rate_of_each_method_is_told():
    text = " ".join(
        subprocess.run(
            [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
    )
    for row in (row for row in TABLE if row[0] in ("learning_rate", "full_rate", "word_rate")):
        assert f"(default: {row[1]} for the miniature, {row[2]} for SDXL)" in text


def test_with_no_argument_each_script_is_complete(tmp_path):
    args = train.read_flags([])
    assert (
        args.class_word == "bear"
        and args.token == "sks"
        and args.out == "out/bear-panda"
        and args.weights == cli.MINI
    )
    assert list(cli.SUBJECT.iterdir())
    for given in (sample.parse([]), insert.parse([])):
        assert "bear" in given.prompt and given.lora == [(str(cli.SHIPPED), 1.0)]
    (tmp_path / "out/bear-panda").mkdir(parents=True)
    (tmp_path / "out/bear-panda/lora.safetensors").touch()
    for given in (sample.parse([]), insert.parse([])):
        assert given.lora == [
            ("out/bear-panda/lora.safetensors", 1.0)
        ]  # what train.py's defaults write
    assert (
        sample.parse(["a cat"]).lora is None
    )  # a prompt of one's own means no LoRA that was not asked for


@pytest.mark.parametrize(
    "given, out",
    [
        ("photos", "out/photos"),
        ("photos/", "out/photos"),
        (".", "out/here"),
        ("photos/..", "out/here"),
    ],
)
def test_the_default_folder_is_named_after_the_photos(tmp_path, monkeypatch, given, out):
    (tmp_path / "here/photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert train.read_flags([given, "--class-word", "dog"]).out == out


@pytest.mark.parametrize("text, size", [("64", (64, 64)), ("64x32", (32, 64)), ("64X32", (32, 64))])
def test_size_is_a_number_or_width_by_height(text, size):
    assert cli.size(text) == size


def test_a_lora_is_a_file_with_or_without_a_scale():
    assert cli.scaled_file("a.safetensors") == ("a.safetensors", 1.0)
    assert cli.scaled_file("a:b.safetensors:0.8") == ("a:b.safetensors", 0.8)
    assert cli.scaled_file("C:\\a.safetensors") == ("C:\\a.safetensors", 1.0)


# train.py


def test_train_writes_the_lora_with_its_facts_the_previews_and_the_settings(tiny, tmp_path):
    folder = photos(tmp_path / "photos")
    (folder / "notes.txt").touch()
    run = good(
        call(
            "train.py",
            folder,
            "--class-word",
            "dog",
            "--weights",
            tiny,
            "--steps",
            2,
            "--rank",
            2,
            "--alpha",
            3,
            "--format",
            "diffusers",
        )
    )
    names = ["lora.safetensors", "preview.png", "loss.png", "settings.json"]
    assert [p.as_posix() for p in run.wrote] == [f"out/photos/{name}" for name in names] and sorted(
        contents("out/photos")
    ) == sorted(names)
    assert (
        "skipped notes.txt" in run.err
        and "'a photo of a sks dog'" in run.err
        and "training: 2/2" in run.err
    )
    with safe_open("out/photos/lora.safetensors", "pt") as file:
        facts = {
            k.removeprefix("alchemy."): v
            for k, v in file.metadata().items()
            if k.startswith("alchemy.")
        }
        assert all(".lora." in key for key in file.keys())
    assert facts == {
        "base": "tiny",
        "prompt": "a photo of a sks dog",
        "class_word": "dog",
        "token": "sks",
        "steps": "2",
        "seed": "0",
        "name": "photos",
        "targets": '["to_q", "to_k", "to_v", "to_out.0"]',
        "rank": "2",
        "alpha": "3.0",
    }
    settings = json.loads(contents("out/photos")["settings.json"])
    assert (
        settings["steps"] == 2
        and settings["size"] == [32, 32]
        and settings["batch"] == 4
        and settings["prior_weight"] == 1.0
    )
    assert (
        png.facts_of("out/photos/preview.png")["steps"] == 2
        and png.facts_of("out/photos/loss.png")["prompt"] == "a photo of a sks dog"
    )
    assert (
        all(
            {"out", "name", "class_folder"}.isdisjoint(png.facts_of(f"out/photos/{name}.png"))
            for name in ("preview", "loss")
        )
        and "out" in settings
    )
    with Image.open("out/photos/preview.png") as page:
        assert (
            page.width > 3 * 256 and page.height > 4 * 256
        )  # three prompts at three times, and the loss


def test_what_train_writes_sample_and_insert_read(tiny, tmp_path):
    good(
        call(
            "train.py",
            photos(tmp_path / "photos"),
            "--class-word",
            "dog",
            "--weights",
            tiny,
            "--steps",
            1,
            "--rank",
            2,
            "--preview-every",
            0,
            "--out",
            "my.dog",
        )
    )
    good(call("sample.py", PROMPT, "--weights", tiny, "--lora", "my.dog/lora.safetensors"))
    good(
        call(
            "insert.py",
            SCENE,
            "--class-word",
            "dog",
            "--weights",
            tiny,
            "--lora",
            "my.dog/lora.safetensors",
            "--steps",
            8,
        )
    )
