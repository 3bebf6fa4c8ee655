"""Flags that have no part in a run are refused by name, and those that have one are not."""

import json

import pytest

import insert
import sample
import train
from alchemy.command import together
from helpers.checkpoints import refused
from helpers.running import SCENE, call, contents, good, photos, pixels, quick, same, tiny  # noqa: F401
from helpers.running import refused as run_refused

SUBJECT, CAPTIONS, WORD = (
    ("a", "--class-word", "dog"),
    ("a", "--captions"),
    ("a", "--init-word", "dog", "--method", "textual-inversion"),
)
FULL = (*SUBJECT, "--method", "full", "--prior-weight", "0")


@pytest.mark.parametrize(
    "argv, flag, goes_with",
    [
        *(
            (SUBJECT + flags, flags[0], "--method textual-inversion")
            for flags in (("--vectors", "3"), ("--init-word", "cat"), ("--style",))
        ),
        *(
            (FULL + flags, flags[0], "--method lora")
            for flags in (("--rank", "4"), ("--alpha", "2"), ("--format", "diffusers"))
        ),
        *(
            (WORD + flags, flags[0], "--method lora")
            for flags in (
                ("--rank", "4"),
                ("--alpha", "2"),
                ("--caption", "my {}"),
                ("--class-pictures", "3"),
                ("--class-folder", "b"),
                ("--prior-weight", "0"),
                ("--captions",),
            )
        ),
        *(
            (CAPTIONS + flags, flags[0], "without --captions")
            for flags in (
                ("--class-word", "dog"),
                ("--token", "zwx"),
                ("--caption", "my {}"),
                ("--class-pictures", "3"),
                ("--class-folder", "b"),
                ("--prior-weight", "0"),
            )
        ),
        (WORD + ("--token", ""), "--token", "empty"),
        (WORD + ("--init-word", " "), "--init-word", "empty"),
        (SUBJECT + ("--token", " "), "--token", "empty"),
        (WORD + ("--token", "my dog"), "--token 'my dog'", "white space"),
        (SUBJECT + ("--caption-dropout", "0.2"), "--caption-dropout", "--captions"),
        (WORD + ("--caption-dropout", "0"), "--caption-dropout", "--captions"),
        (SUBJECT + ("--text-encoders",), "--text-encoders", "--method full"),
        (WORD + ("--text-encoders",), "--text-encoders", "--method full"),
        (SUBJECT + ("--class-folder", "b"), "--class-folder", "--class-pictures"),
        (
            SUBJECT + ("--class-pictures", "3", "--prior-weight", "0"),
            "--class-pictures",
            "--prior-weight 0",
        ),
        (WORD + ("--format", "peft"), "--format peft", "--format diffusers"),
        (CAPTIONS + ("--mask", "segment"), "--mask segment", "--captions"),
    ],
)
def test_a_flag_of_another_way_to_teach_is_refused_with_what_it_goes_with(argv, flag, goes_with):
    refused(lambda: train.read_flags([*argv]), flag, goes_with)


@pytest.mark.parametrize(
    "argv",
    [
        (),
        SUBJECT
        + (
            "--rank",
            "4",
            "--alpha",
            "2",
            "--format",
            "peft",
            "--caption",
            "my {}",
            "--class-pictures",
            "3",
            "--class-folder",
            "b",
            "--mask",
            "segment",
        ),
        (*SUBJECT, "--method", "full", "--text-encoders"),
        FULL,
        CAPTIONS + ("--caption-dropout", "0.2", "--rank", "4", "--mask", "alpha"),
        CAPTIONS + ("--method", "full", "--text-encoders"),
        WORD
        + (
            "--vectors",
            "3",
            "--style",
            "--token",
            "<b>",
            "--format",
            "diffusers",
            "--mask",
            "segment",
        ),
    ],
)
def test_flags_that_go_together_are_taken(argv, tmp_path):
    assert train.read_flags([*argv]).method in ("lora", "full", "textual-inversion")


def test_every_flag_in_the_table_is_one_of_train_py_and_has_a_part_somewhere():
    flags = vars(train.parser().parse_args([]))
    assert not [flag for flag in together.ONLY if flag not in flags] and {
        way for goes in together.ONLY.values() for way in goes
    } == {*together.WAYS}


@pytest.mark.parametrize(
    "parse, argv, words",
    [
        (sample.parse, ["a dog", "--sampler", "dpmpp_2m", "--eta", "0.5"], ["--eta", "dpmpp_2m"]),
        (
            sample.parse,
            ["a dog", "--guidance", "1", "--negative-prompt", "a cat"],
            ["--negative-prompt", "--guidance 1"],
        ),
        (sample.parse, ["a dog", "--strength", "0.5"], ["--strength", "--image"]),
        (
            insert.parse,
            [SCENE, "--class-word", "dog", "--lora", "a", "--sampler", "dpmpp_2m", "--eta", "1"],
            ["--eta", "dpmpp_2m"],
        ),
        *(
            (
                insert.parse,
                [SCENE, "--class-word", "dog", "--lora", "a", "--mask", "m.png", flag, "0.1"],
                [flag, "--mask"],
            )
            for flag in ("--threshold", "--dilate")
        ),
        (
            insert.parse,
            [SCENE, "--class-word", "dog", "--lora", "a", "--token", ""],
            ["--token is empty"],
        ),
        (insert.parse, [SCENE, "--class-word", "dog"], ["--lora is missing", "--method full"]),
        (
            insert.parse,
            [SCENE, "--class-word", "dog", "--lora", "a", "--embedding", "b"],
            ["--token"],
        ),
        (
            insert.parse,
            [SCENE, "--class-word", "dog", "--embedding", "a", "--embedding", "b"],
            ["--token"],
        ),
    ],
)
def test_a_flag_without_a_part_in_what_is_drawn_is_refused(parse, argv, words):
    refused(lambda: parse(argv), *words)


def test_a_revision_is_of_the_hub(tiny):
    run_refused(
        call("sample.py", "a dog", "--weights", tiny, "--revision", "main"),
        "--revision",
        "Hub",
        tiny,
    )


def test_a_resumed_run_takes_its_own_settings_whatever_its_method(tiny, tmp_path):
    photos(tmp_path / "photos")
    for name, flags in (
        ("word", ("--method", "textual-inversion")),
        ("whole", ("--method", "full", "--prior-weight", 0)),
        ("lora", ()),
    ):
        good(
            call(
                "train.py",
                "photos",
                "--class-word",
                "dog",
                "--weights",
                tiny,
                "--steps",
                1,
                "--preview-every",
                0,
                "--out",
                name,
                *flags,
            )
        )
        for file in (tmp_path / name).glob("*.safetensors"):
            file.unlink()
        (tmp_path / name / "checkpoint").rename(
            tmp_path / f"{name}-checkpoint"
        ) if name == "whole" else None
        good(call("train.py", "--out", name, "--resume"))  # without a state it starts again


def test_insert_takes_the_word_of_an_embedding_for_the_token(tiny, tmp_path):
    photos(tmp_path / "photos")
    good(
        call(
            "train.py",
            "photos",
            "--weights",
            tiny,
            "--method",
            "textual-inversion",
            "--token",
            "<mine>",
            "--class-word",
            "dog",
            "--steps",
            1,
            "--preview-every",
            0,
            "--out",
            "word",
        )
    )
    flags = (
        "insert.py",
        SCENE,
        "--class-word",
        "dog",
        "--weights",
        tiny,
        "--embedding",
        "word/mine.safetensors",
        "--steps",
        8,
    )
    good(call(*flags))
    assert "is in no prompt" not in good(call(*flags, "--token", "<mine>", "--out", "same")).err
    assert contents("out/insert")["facts.json"].count(b'"token": "<mine>"') == 1
    assert "is in no prompt" in good(call(*flags, "--token", "sks", "--out", "other")).err
    assert same(pixels("out/insert/drawn.png"), pixels("same/drawn.png")) and not same(
        pixels("out/insert/drawn.png"), pixels("other/drawn.png")
    )


@pytest.mark.parametrize(
    "flag, given",
    [
        ("--weights", "run/checkpoint"),
        ("--vae", "run/checkpoint/vae"),
        ("--config", "run/../run/checkpoint"),
        ("--class-folder", "run/checkpoint/class"),
    ],
)
def test_a_run_that_would_take_away_what_it_reads_is_refused(tmp_path, monkeypatch, flag, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    base = [
        *SUBJECT,
        "--method",
        "full",
        "--class-pictures",
        "2",
        flag,
        given,
        "--overwrite",
        "--out",
    ]
    refused(lambda: train.read_flags([*base, "run"]), f"{flag} {given}", "--out run")
    assert (
        train.read_flags([*base, "other"]).overwrite
        and train.read_flags([*base, "run", "--check"]).check
    )


def test_the_checkpoint_of_an_earlier_run_is_spared_by_a_run_of_another_method(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    (tmp_path / "run/settings.json").write_text('{"method": "full"}')
    refused(
        lambda: train.read_flags(
            [*SUBJECT, "--weights", "run/checkpoint", "--overwrite", "--out", "run"]
        ),
        "--weights run/checkpoint",
        "--out run",
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("mask", 5),
        ("rank", "4"),
        ("batch", 0),
        ("caption", None),
        ("mirror", "yes"),
        ("method", "other"),
        ("size", 5),
        ("size", ["a", 2]),
    ],
)
def test_settings_of_which_one_cannot_be_are_refused_by_its_name(tmp_path, name, value):
    (tmp_path / "settings.json").write_text(
        json.dumps(
            {
                "photos": "a",
                "class_word": "dog",
                "size": [64, 32],
                "learning_rate": 3e-5,
                name: value,
            }
        )
    )
    refused(
        lambda: train.read_flags(["--resume", "--out", str(tmp_path)]),
        "settings.json",
        "--overwrite",
        *([] if value == 5 and name == "size" else [name]),
    )


def test_resuming_by_another_method_is_refused_as_that(tmp_path):
    (tmp_path / "settings.json").write_text(
        json.dumps({"photos": "a", "class_word": "dog", "method": "lora", "rank": 4})
    )
    refused(
        lambda: train.read_flags(["--resume", "--method", "full", "--out", str(tmp_path)]),
        "--method full",
        "lora",
    )
