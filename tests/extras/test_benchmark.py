"""evaluate --benchmark: the DreamBooth benchmark on the miniature, with random vision weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.running import call_main, contents, good, photos, refused
from helpers.vision import save_clip, save_dino

from alchemy import insertion
from alchemy.extras import benchmark, evaluate
from alchemy.formats.png import read_metadata

TABLE = """Classes

subject_name,class
rex,dog
ball,toy
absent,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on the beach'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]
"""
ROOT = Path(__file__).resolve().parents[2]
DREAMBOOTH = ROOT.parent / "shared" / "dreambooth"


@pytest.fixture
def dataset(tmp_path):
    for subject in ("rex", "ball"):
        photos(tmp_path / "dataset" / subject, 2)
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text(TABLE)
    return Path("dataset")


def test_subjects_with_a_folder_and_the_prompts_of_their_kind_are_read(dataset):
    classes, prompts = benchmark.read_benchmark(dataset)
    assert classes == {"rex": "dog", "ball": "toy"}
    assert prompts[False] == ["a {0} {1} on the beach", "a cube shaped {0} {1}"]
    assert prompts[True][1:] == ["a {0} {1} wearing a red hat", "a red {0} {1}"]


def test_the_published_file_has_25_prompts_of_each_kind():
    if not DREAMBOOTH.is_dir():
        pytest.skip(f"{DREAMBOOTH} is not here")
    classes, prompts = benchmark.read_benchmark(DREAMBOOTH)
    assert len(classes) == 6 and classes["backpack_dog"] == "backpack"
    assert [len(prompts[alive]) for alive in (False, True)] == [25, 25]


def test_each_prompt_has_its_seeds_in_both_stages_with_and_without_the_token():
    templates = ["a {0} {1} in snow", "a red {0} {1}"]
    jobs = benchmark.list_jobs(Path("out"), templates, "sks", "dog", 4)
    assert len({job.path for job in jobs}) == 2 * 2 * 4
    last = jobs[-1]
    assert (last.stage, last.seed, last.path) == ("two", 3, Path("out/two/01-3.png"))
    assert (last.scene, last.prompt) == ("a red dog", "a red sks dog")


def test_a_scene_without_the_class_stays_as_the_base_model_draws_it(monkeypatch):
    def insert(*args, **kwargs):
        raise ValueError("the mask is empty")

    monkeypatch.setattr(insertion, "insert", insert)
    monkeypatch.setattr(benchmark.pipeline, "text_to_image", lambda sdxl, prompt, **_: prompt)
    args, model = SimpleNamespace(size=None, steps=3, token="sks"), torch.nn.Module()
    model.unet = torch.nn.Module()
    one, two = benchmark.list_jobs(Path("out"), ["a red {0} {1}"], "sks", "dog", 1)
    assert benchmark.generate(model, one, args, "dog") == ("a red sks dog", True)
    assert benchmark.generate(model, two, args, "dog") == ("a red dog", False)


def test_an_interrupted_benchmark_waits_until_its_training_has_saved(tmp_path):
    child = (
        "import signal, time; stop = []; signal.signal(signal.SIGTERM, lambda *_: stop.append(1));"
    )
    child += "open('ready', 'w').close()\nwhile not stop: time.sleep(0.01)\n"
    child += "time.sleep(1.5); open('saved', 'w').close()"
    parent = "import sys, os; from alchemy.extras import benchmark; "
    parent += "benchmark.run_to_saved_state([sys.executable, '-c', sys.argv[1]], dict(os.environ))"
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", parent, child],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        while not (folder / "ready").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() != 0 and (folder / "saved").exists()


def test_a_folder_without_subjects_is_refused(dataset):
    (dataset / "prompts_and_classes.txt").write_text(TABLE.replace("rex", "x").replace("ball", "y"))
    refused(call_main(evaluate.main, "--benchmark", dataset), "prompts_and_classes.txt", "no class")


def test_the_benchmark_trains_generates_scores_and_resumes(dataset, reference, monkeypatch):
    dino = save_dino(dataset.parent / "dino", reference("dino"))
    clip = save_clip(dataset.parent / "clip", reference("clip_vision"))
    table = dataset / "prompts_and_classes.txt"
    table.write_text(TABLE.replace("'a red {0} {1}'", "# "))
    argv = ["--benchmark", dataset, "--dino", dino, "--clip", clip, "--out", "out"]
    argv += ["--seeds", 1, "--steps", 3, "--device", "cpu"]
    argv += ["--train", "--steps 1 --batch 1 --rank 2 --preview-every 0"]

    # Stopped at an image, as Ctrl-C would: what is there stays.
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(insertion, "insert", interrupt)
        assert call_main(evaluate.main, *argv).status == 130
    before = contents("out")
    assert sorted(name for name in before if name.endswith("-0.png")) == [
        "ball/one/00-0.png",
        "ball/one/01-0.png",
    ]

    written = {name: Path("out", name).stat().st_mtime_ns for name in before}
    run = good(call_main(evaluate.main, *argv))
    assert {name: Path("out", name).stat().st_mtime_ns for name in before} == written
    assert read_metadata("out/rex/two/01-0.png")["prompt"] == "a sks dog wearing a red hat"
    rows = json.loads(Path("out/benchmark.json").read_text())
    assert [(row["subject"], row["images"]) for row in rows[:6]] == [
        ("ball", 2),
        ("ball", 2),
        ("rex", 2),
        ("rex", 2),
        ("all", 4),
        ("all", 4),
    ]
    assert rows[5]["failed"] < 4
    for stage in (0, 1):
        for name in benchmark.FIGURES:
            both = (rows[stage][name] + rows[2 + stage][name]) / 2
            assert rows[4 + stage][name] == pytest.approx(both, abs=2e-6)  # six digits
    assert "0.668   0.803   0.305  arXiv 2208.12242, table 1" in run.out
    refused(call_main(evaluate.main, *argv, "--steps", 2), "begun with --steps 3")
    refused(call_main(evaluate.main, *argv, "--train", "--steps 2"), "begun with --train")
    Path("out/rex/one/00-0.png").rename("out/rex/one/01-0.png")
    refused(call_main(evaluate.main, *argv), "01-0.png", "made with other settings (prompt")
