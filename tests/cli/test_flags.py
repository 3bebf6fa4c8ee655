"""The flags of the three scripts: defaults, help, hints, files of flags, and refused values."""

import json
import re
import subprocess
import sys

import pytest
import torch
from helpers.running import MAIN, ROOT, SCENE, call, good, nothing_written, process, refused

import insert
import sample
import train
from alchemy import cli
from alchemy.defaults import TABLE
from alchemy.extras import other_tools
from alchemy.formats import png

HEAVY = {"torch", "numpy", "PIL", "safetensors", "tqdm", "huggingface_hub"}


def help_of(script):
    """(--help on one line per flag, the heavy packages that it imported)."""
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    print("heavy:", sorted({HEAVY!r} & set(sys.modules)))
"""
    argv, env = [sys.executable, "-c", code], {"COLUMNS": "400"}
    return subprocess.run(
        argv, cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout


def test_help_imports_nothing_heavy_and_one_flag_means_the_same_in_all_scripts():
    explained = {}
    for script in MAIN:
        text = help_of(script)
        assert "heavy: []" in text and f"python {script}" in text
        found = re.findall(r"^  (--[\w-]+).*?(?:  +|\n {20,})(.*)$", text, re.M)
        assert len(found) == len(re.findall(r"^  --[\w-]+", text, re.M))  # each is explained
        for flag, meaning in found:
            explained.setdefault(flag, set()).add(meaning)
        rates = [row for row in TABLE if row[0] in ("learning_rate", "full_rate", "word_rate")]
        for _, mini, sdxl, *_ in rates if script == "train.py" else []:
            assert f"{mini} for the miniature, {sdxl} for SDXL" in text
    shared = ["weights", "device", "dtype", "vae", "lora", "sampler", "guidance", "config"]
    assert [flag for flag in shared if len(explained[f"--{flag}"]) != 1] == []
    assert len(explained["--steps"]) == 2  # of training, and of denoising


def test_without_arguments_the_example_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(cli.EXAMPLE_PHOTOS.iterdir()) and cli.BUNDLED_LORA.exists()
    for lora in (cli.BUNDLED_LORA, cli.TRAINED_LORA):
        for args in (sample.parse([]), insert.parse([])):
            assert cli.EXAMPLE_CLASS in args.prompt and args.weights == cli.MINI
            assert args.lora == [(str(lora), 1.0)]
        cli.TRAINED_LORA.parent.mkdir(parents=True, exist_ok=True)
        cli.TRAINED_LORA.touch()  # by train.py's default run
    assert sample.parse(["a cat"]).lora is None


@pytest.mark.parametrize(
    "read, text, value",
    [
        (cli.size, "64", (64, 64)),
        (cli.size, "64x32", (32, 64)),
        (cli.size, "64X32", (32, 64)),
        (cli.scaled_file, "a.safetensors", ("a.safetensors", None)),
        (cli.scaled_file, "a:b.safetensors:0.8", ("a:b.safetensors", 0.8)),
        (cli.scaled_file, "C:\\a.safetensors", ("C:\\a.safetensors", None)),
    ],
)
def test_sizes_and_scaled_files_are_parsed(read, text, value):
    assert read(text) == value


NO_SIZES = "big 0 -8 64x 64x64x64 1e3 ² 16385 4294967296x4294967296".split()


@pytest.mark.parametrize(
    "script, argv, words",
    [
        ("train", ["--steps"], ["--steps", "expected one argument"]),
        ("train", ["--steps", "0"], ["--steps", "at least 1"]),
        ("train", ["--steps", "1.5"], ["--steps", "1.5", "whole number"]),
        ("train", ["--learning-rate", "0"], ["--learning-rate", "above 0"]),
        ("train", ["--learning-rate", "nan"], ["--learning-rate", "nan"]),
        ("train", ["--learning-rate", "inf"], ["--learning-rate", "inf"]),
        ("train", ["--learning-rate", "fast"], ["--learning-rate", "'fast' is not a number"]),
        ("train", ["--rank", "9" * 20], ["--rank", "at most 4096"]),
        ("train", ["--rank", "9" * 5000], ["--rank", "whole number"]),
        ("train", ["--alpha", "1e308"], ["--alpha", "at most 1e+06"]),
        ("train", ["--seed", "-2"], ["--seed", "at least -1"]),
        ("train", ["--overwrite", "--resume"], ["--resume", "not allowed with"]),
        ("sample", ["--step", "3"], ["unknown flag --step (here it is --steps)"]),
        ("sample", ["--sampler", "dpm"], ["--sampler", "'dpm'", "euler_ancestral"]),
        ("sample", ["--sampler", "Euler_a"], ["Euler_a", "here it is euler_ancestral"]),
        ("sample", ["--sampler", "DPM++ 2M"], ["here it is dpmpp_2m"]),
        ("sample", ["--sampler", "unipc"], ["not available; the closest is dpmpp_2m"]),
        ("sample", ["--lr", "1"], ["--lr (not of this script; in another it is --learning-rate)"]),
        ("sample", ["a", "--image", "none.png"], ["none.png: no such file"]),
        ("train", ["none", "--class-word", "dog"], ["none: no such folder"]),
        ("sample", ["--dtype", "bf16"], ["here it is bfloat16"]),
        ("train", ["--schedule", "linear"], ["the closest is cosine"]),
        ("sample", ["a", "dog", "-x"], ["unknown flag -x (--help"]),
        ("sample", ["a", "dog", "runs"], ["more arguments than expected: 'dog runs'", "in quotes"]),
        ("sample", [f"--x{i}=1" for i in range(9)], ["--x4, and 4 more", "alchemy/CLI.md"]),
        ("sample", ["--timestep-spacing", "karras"], ["--timestep-spacing", "trailing"]),
        ("sample", ["--strength", "0"], ["--strength", "above 0 and at most 1"]),
        ("sample", ["--eta", "2"], ["--eta", "at least 0 and at most 1"]),
        ("sample", ["--seed", str(2**64)], ["--seed"]),
        ("sample", ["--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        ("sample", ["--lora", "a:nan"], ["--lora", "a:nan", "finite"]),
        *(("sample", ["--size", text], ["--size", text, "WIDTHxHEIGHT"]) for text in NO_SIZES),
        ("sample", ["a dog", "--strength", "0.5"], ["--strength", "--image"]),
        ("sample", ["a dog", "--sampler", "dpmpp_2m", "--eta", "0.5"], ["--eta", "dpmpp_2m"]),
        ("sample", ["--merge", "--fp8-base"], ["--merge", "--fp8-base"]),
        ("sample", ["--guidance", "1", "--negative-prompt", "a"], ["no effect with --guidance 1"]),
        ("sample", ["a dog", "--model-config", "."], ["its own configurations"]),
        ("sample", ["a dog", "--weights", "~nosuchuser/x"], ["nosuchuser"]),
        ("sample", ["--out", "beach.jpg"], ["beach.jpg", ".png"]),
        ("sample", ["--out", "dog.safetensors"], ["dog.safetensors", "alchemy.formats"]),
        ("sample", ["--inspect-full"], ["--inspect-full", "--inspect FOLDER"]),
        ("insert", [SCENE], ["--lora is missing", "--method full"]),
        ("insert", [SCENE, "--embedding", "a"], ["--class-word is missing"]),
        ("insert", ["--image", "a.png", "--size", "64"], ["--size", "--image"]),
        ("insert", ["--threshold", "-1"], ["--threshold"]),
        ("insert", ["--dilate", "7"], ["--dilate"]),
        ("insert", ["--mask", "m.png", "--threshold", "0.1"], ["--threshold", "--mask"]),
        ("insert", ["--mask", "m.png", "--dilate", "0.1"], ["--dilate", "--mask"]),
        ("insert", ["--token", ""], ["--token is empty"]),
        ("insert", ["--token", "my cat"], ["--token 'my cat'", "several words"]),
        ("insert", ["--embedding", "a", "--embedding", "b"], ["--token is missing"]),
        ("insert", [SCENE, "--class-word", "cat", "--embedding", "a"], ["'cat'", SCENE]),
    ],
)
def test_a_refused_flag_is_named_in_one_line(script, argv, words):
    line = refused(call(f"{script}.py", *argv), *words)
    assert "usage:" not in line and nothing_written()


@pytest.mark.parametrize(
    "script, flags",
    [
        ("train", {"--lr": "--learning-rate", "--network_dim": "--rank"}),
        (
            "train",
            {"--train_batch_size": "--batch", "--instance_prompt": "--class-word and --token"},
        ),
        ("train", {"--resolution": "--size", "--train_data_dir": "the first argument"}),
        ("train", {"--output_name": "--out FILE.safetensors", "--network-weights": "--init-lora"}),
        ("sample", {"--num-images": "--count", "--lora-scale": "--lora FILE:SCALE"}),
        ("sample", {"--cfg-scale": "--guidance", "--network_weights": "--lora"}),
        ("sample", {"--batch_size": "--count", "--Num_Inference_Steps": "--steps"}),
        ("insert", {"--width": "--size WIDTHxHEIGHT"}),
    ],
)
def test_flags_of_other_tools_are_answered_with_the_flags_here(script, flags):
    values = [f"{flag}=3" for flag in flags]
    words = [f"{flag} (here it is {here}" for flag, here in flags.items()]
    line = refused(call(f"{script}.py", "a", *values), *words)
    assert line.startswith("error: unknown flag")


@pytest.mark.parametrize("flag", ["--xformers", "--variant", "--report_to", "--push-to-hub"])
def test_flags_that_have_no_counterpart_are_explained(flag):
    refused(
        call("train.py", flag), f"unknown flag {flag} (", "not " if "rep" not in flag else "log"
    )


def test_every_hint_names_a_flag_of_a_script():
    parsers = [module.parser() for module in (train, sample, insert)]
    known = set().union(*(p._option_string_actions for p in parsers))
    assert set(re.findall(r"--[\w-]+", " ".join(other_tools.FLAGS))) <= known
    for names in other_tools.FLAGS.values():
        for name in names:  # none is a flag of all scripts, and each has an answer in one
            assert any(p.flag_hint(f"--{name}") for p in parsers), name
            assert not all(f"--{name}" in p._option_string_actions for p in parsers), name


def test_seed_minus_1_draws_a_seed_and_reports_it(tiny):
    seeds = set()
    for _ in range(2):
        run = good(call("sample.py", "a dog", "--weights", tiny, "--seed", -1, "--steps", 1))
        seed = png.read_metadata(run.wrote[0])["seed"]
        assert f"seed {seed}\n" in run.err
        seeds.add(seed)
    assert len(seeds) == 2


def test_config_takes_the_flags_of_a_file_and_given_flags_override_it(tmp_path):
    path = tmp_path / "settings.json"
    saved = {"steps": 7, "size": [64, 32], "lora": [["a", 0.5]], "prompt": "a cat", "unknown": 1}
    path.write_text(json.dumps(saved))
    args = sample.parse(["--config", str(path), "--steps", "9", "--lora", "b"])
    assert (args.prompt, args.steps, args.size) == ("a cat", 9, (64, 32))
    assert args.lora == [("b", None)]
    assert sample.parse(["--config", str(path)]).lora == [("a", 0.5)]


NO_SETTINGS = [("steps", "4"), ("steps", 0), ("steps", True), ("guidance", {}), ("size", [1, "a"])]
NO_SETTINGS += [("size", [2**40, 2]), ("seed", -3), ("lora", "a"), ("lora", {}), ("prompt", 5)]
NO_SETTINGS += [("lora", [["a", None, 3]]), ("embedding", "a"), ("merge", "yes")]
NO_SETTINGS += [("sampler", "magic"), ("spacing", "x" * 5000)]


@pytest.mark.parametrize(
    "text, words",
    [
        ("[" * 100_000, "not a JSON file"),
        ("{", "not a JSON file"),
        ("[1]", "JSON object"),
        *((json.dumps({name: value}), name) for name, value in NO_SETTINGS),
    ],
)
def test_a_file_of_flags_with_a_refused_value_is_named(tmp_path, text, words):
    path = tmp_path / "settings.json"
    path.write_text(text)
    refused(call("sample.py", "--config", path), "settings.json", words)
    assert nothing_written()


def test_device_cuda_without_cuda_and_an_unknown_device_are_explained(tiny):
    refused(call("sample.py", "a dog", "--weights", tiny, "--device", "abacus"), "abacus")
    if not torch.cuda.is_available():
        refused(call("sample.py", "a dog", "--weights", tiny, "--device", "cuda"), "device is cuda")


def test_a_process_ends_in_one_line_and_status_2_and_traceback_shows_a_fault():
    run = process("sample.py", "--steps", "many")
    refused(run, "argument --steps: 'many' is not a whole number (--help shows every flag)")
    assert "Traceback" in process("sample.py", "--traceback", before=FAULT).err
    refused(process("sample.py", before=FAULT), "ZeroDivisionError", "--traceback")


FAULT = """
from alchemy import cli
def broken(argv): 1 / 0
cli.choose_seed = broken
"""
