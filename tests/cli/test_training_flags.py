"""The flags of train.py: which apply together, and what a run may read, replace and resume."""

import json

import pytest
from helpers.checkpoints import refused
from helpers.running import call, good, photos

import train
from alchemy.methods import flags, task

SUBJECT = ("a", "--class-word", "dog")
CAPTIONS = ("a", "--captions")
WORD = ("a", "--init-word", "dog", "--method", "textual-inversion")
FULL = (*SUBJECT, "--method", "full", "--prior-weight", "0")
PRIOR = ("--class-images 3", "--class-folder b", "--prior-weight 0", "--caption x{}")
# (base, flags, what the message names)
REFUSED = [
    *((SUBJECT, text, "--method textual-inversion") for text in ("--vectors 3", "--style")),
    (SUBJECT, "--init-word cat", "--method textual-inversion"),
    *((FULL, text, "--method lora") for text in ("--rank 4", "--alpha 2", "--format diffusers")),
    *((WORD, text, "--method lora") for text in ("--rank 4", "--init-lora x", "--captions")),
    *((WORD, text, "without --captions") for text in PRIOR),
    *((CAPTIONS, text, "without --captions") for text in (*PRIOR, "--class-word a", "--token a")),
    (SUBJECT, "--caption-dropout 0.2", "--captions"),
    (WORD, "--caption-dropout 0", "--captions"),
    (SUBJECT, "--text-encoders", "--method full"),
    (SUBJECT, "--class-folder b", "--class-images"),
    (SUBJECT, "--class-images 3 --prior-weight 0", "--prior-weight 0"),
    (SUBJECT, "--method full --class-images 0", "--prior-weight 0"),
    (FULL, "--fp8-base", "--method full"),
    (WORD, "--format peft", "diffusers"),
    (CAPTIONS, "--mask segment", "--captions"),
]


def read_args(argv):
    return flags.read_args(train.parser(), argv)


@pytest.mark.parametrize("base, text, word", REFUSED)
def test_a_flag_that_does_not_apply_is_refused_by_name(base, text, word):
    refused(lambda: read_args([*base, *text.split()]), text.split()[0], word)


@pytest.mark.parametrize(
    "argv, words",
    [
        ([*WORD, "--token", ""], ["--token is empty"]),
        ([*SUBJECT, "--token", " "], ["--token is empty"]),
        ([*WORD, "--init-word", " "], ["--init-word is empty"]),
        ([*WORD, "--token", "my dog"], ["--token 'my dog'", "white space"]),
        ([*SUBJECT, "--caption", "a photo"], ["--caption 'a photo'", "{}"]),
        (["a"], ["--class-word is missing"]),
        (["--captions"], ["--captions needs the folder"]),
    ],
)
def test_a_flag_without_its_value_is_refused(argv, words):
    refused(lambda: read_args(argv), *words)


@pytest.mark.parametrize(
    "base, text",
    [
        ((), ""),
        (SUBJECT, "--rank 4 --alpha 2 --format peft --class-images 3 --mask segment"),
        (SUBJECT, "--method full --text-encoders"),
        (FULL, ""),
        (CAPTIONS, "--caption-dropout 0.2 --rank 4 --mask alpha"),
        (CAPTIONS, "--method full --text-encoders"),
        (WORD, "--vectors 3 --style --token <b> --format diffusers --mask segment"),
    ],
)
def test_flags_that_apply_together_are_accepted(base, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = read_args([*base, *text.split()])
    assert args.method in flags.METHODS and args.out.startswith("out/")


def test_kohyas_parent_folder_gives_repeats_token_class_word_and_prompt(tmp_path):
    parent = tmp_path / "parent"
    photos(parent / "3_zwx small dog", 2)
    args = read_args([str(parent)])
    assert (args.token, args.class_word, args.caption) == ("zwx", "small dog", "{}")
    examples = task.list_examples(args)
    assert [(path.name, prompt) for path, prompt in examples] == [
        (f"{i}.png", "zwx small dog") for i in (0, 1)
    ] * 3
    args = read_args([str(parent), "--class-word", "dog"])
    assert {prompt for _, prompt in task.list_examples(args)} == {"a photo of a sks dog"}
    photos(parent / "1_sks cat", 1)
    refused(lambda: read_args([str(parent)]), "sks cat, zwx small dog", "--class-word")


def test_every_flag_of_the_table_exists():
    known = vars(train.parser().parse_args([]))
    for methods, names in flags.APPLIES_TO.items():
        assert set(names) <= known.keys() and set(methods) <= flags.METHODS.keys()


@pytest.mark.parametrize(
    "flag, given",
    [
        ("--weights", "run/checkpoint"),
        ("--vae", "run/checkpoint/vae"),
        ("--model-config", "run/../run/checkpoint"),
        ("--class-folder", "run/checkpoint/class"),
    ],
)
def test_a_run_that_would_remove_its_own_input_is_refused(tmp_path, monkeypatch, flag, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    images = ("--method", "full", "--class-images", "2", flag, given)
    base = [*SUBJECT, *images, "--overwrite", "--out"]
    refused(lambda: read_args([*base, "run"]), f"{flag} {given}", "--out run")
    assert read_args([*base, "other"]).overwrite
    assert read_args([*base, "run", "--check"]).check


def test_the_checkpoint_of_an_earlier_run_is_not_removed_by_its_reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    (tmp_path / "run/settings.json").write_text('{"method": "full"}')
    argv = [*SUBJECT, "--weights", "run/checkpoint", "--overwrite", "--out", "run"]
    refused(lambda: read_args(argv), "--weights run/checkpoint", "--out run")


def test_a_lora_to_start_from_has_to_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for given in ("none.safetensors", "run"):
        refused(lambda given=given: read_args([*SUBJECT, "--init-lora", given]), "--init-lora")


def test_a_file_of_the_name_that_a_result_has_while_it_is_written_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "new.safetensors").write_text("precious")
    argv = [*SUBJECT, "--out", "run.safetensors"]
    refused(lambda: read_args(argv), "new.safetensors", "--overwrite")
    assert read_args([*SUBJECT, "--out", "run"]).out == "run"


@pytest.mark.parametrize("token", ["sks dog", "sks Dog"])
def test_the_class_word_behind_the_token_is_left_out(token):
    assert read_args([*SUBJECT, "--token", token, "--out", "nowhere"]).token == "sks"


NO_SETTINGS = [("mask", 5), ("rank", "4"), ("batch", 0), ("caption", None), ("mirror", "yes")]
NO_SETTINGS += [("method", "other"), ("size", ["a", 2]), ("preview_prompt", "one")]
NO_SETTINGS += [("prior_weight", 2**70)]


@pytest.mark.parametrize("name, value", NO_SETTINGS)
def test_a_setting_that_cannot_be_is_refused_by_its_name(tmp_path, name, value):
    settings = {"photos": "a", "class_word": "dog", "size": [64, 32], "learning_rate": 3e-5}
    (tmp_path / "settings.json").write_text(json.dumps(settings | {name: value}))
    resume = ["--resume", "--out", str(tmp_path)]
    refused(lambda: read_args(resume), "settings.json", name)


def test_resuming_with_another_method_is_refused(tmp_path):
    settings = {"photos": "a", "class_word": "dog", "method": "lora", "rank": 4}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    argv = ["--resume", "--method", "full", "--out", str(tmp_path)]
    refused(lambda: read_args(argv), "--method full", "lora")


@pytest.mark.parametrize(
    "more", [("--method", "textual-inversion"), ("--method", "full", "--prior-weight", 0), ()]
)
def test_a_resumed_run_without_a_state_starts_again_with_its_settings(tiny, tmp_path, more):
    photos(tmp_path / "photos")
    base = ("--class-word", "dog", "--weights", tiny, "--steps", 1, "--preview-every", 0)
    good(call("train.py", "photos", *base, *more, "--out", "run"))
    for file in (tmp_path / "run").glob("*.safetensors"):
        file.unlink()
    if "full" in more:
        (tmp_path / "run/checkpoint").rename(tmp_path / "moved")
    good(call("train.py", "--out", "run", "--resume"))


def test_equal_settings_from_config_repeat_a_run(tiny, tmp_path):
    photos(tmp_path / "photos")
    base = ("--class-word", "dog", "--weights", tiny, "--steps", 1, "--preview-every", 0)
    good(call("train.py", "photos", *base, "--out", "run/a", "--overwrite"))
    same = call("train.py", "--config", "run/a/settings.json")
    assert same.status == 2 and "run/a holds a run already" in same.err
    good(call("train.py", "--config", "run/a/settings.json", "--out", "again/a"))
    files = [tmp_path / f"{name}/a/lora.safetensors" for name in ("run", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
