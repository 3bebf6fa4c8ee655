"""A run that was interrupted, by whatever and at any step, ends with the same file as one that was not, to the bit."""

import json
import signal

import pytest
import torch
from safetensors import safe_open

from alchemy import dataset, files
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import call, contents, good, photos, process, quick, refused, tiny  # noqa: F401

STEPS, SAVE = 6, 2


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("taught") / "photos")


@pytest.fixture
def flags(tiny, taught):
    """Everything that a resumed run has to remember is other than its default."""
    return (
        "train.py",
        taught,
        "--class-word",
        "dog",
        "--token",
        "zwx",
        "--caption",
        "my {}",
        "--weights",
        tiny,
        "--size",
        "16x20",
        "--rank",
        2,
        "--alpha",
        3,
        "--batch",
        1,
        "--accumulation",
        2,
        "--warmup",
        3,
        "--learning-rate",
        3e-3,
        "--prior-weight",
        0.5,
        "--snr-gamma",
        3,
        "--mirror",
        "--seed",
        4,
        "--preview-every",
        0,
        "--steps",
        STEPS,
        "--save-every",
        SAVE,
        "--out",
        "run",
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return {}


@pytest.fixture
def expected(flags, unbroken, tmp_path, monkeypatch):
    """lora.safetensors of the unbroken run; it is made once."""
    if not unbroken:
        (tmp_path / "unbroken").mkdir()
        with monkeypatch.context() as there:
            there.chdir(tmp_path / "unbroken")
            good(call(*flags))
            unbroken.update(contents("run"))
    return unbroken["lora.safetensors"]


def step_of(path):
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def at(step, action):
    """Python that does action when the loop has finished that step, before its state is saved."""
    return f"""
import os, signal
from alchemy import cli, files
whole = cli.progress
def progress(items, total, name, *rest):
    for item in whole(items, total, name, *rest):
        if name == "training" and item[0] == {step}:
            {action}
        yield item
cli.progress = progress
"""


def kill(which):
    return f"os.kill(os.getpid(), signal.{which})"


HALF_A_STATE = """
            def half(tensors, path, header):
                whole_save(tensors, path, header)
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            whole_save, files.save_file = files.save_file, half"""


@pytest.mark.parametrize(
    "step, action, status, saved",
    [
        (1, kill("SIGINT"), 130, 1),
        (5, kill("SIGTERM"), 143, 5),
        (1, kill("SIGKILL"), -9, 0),
        (5, kill("SIGKILL"), -9, 4),
        (4, HALF_A_STATE, -9, 2),
    ],
)
def test_the_file_after_an_interruption_is_that_of_an_unbroken_run(
    flags, expected, step, action, status, saved
):
    run = process(*flags, before=at(step, action))
    assert (
        run.status == status
        and "Traceback" not in run.err
        and "lora.safetensors" not in contents("run")
    ), run.err
    if status > 0:
        assert (
            run.err.splitlines()[-1]
            == f"stopped after step {step}; the same command with --resume goes on"
        )
    assert step_of("run/state.safetensors") == saved
    run = good(call("train.py", "--out", "run", "--resume"))
    assert f"resuming at step {saved} of {STEPS}" in run.err
    assert contents("run")["lora.safetensors"] == expected
    assert not [name for name in contents("run") if name.startswith(".") or "state" in name]


@pytest.fixture
def stopped(monkeypatch):
    """stopped(argv, signal, step, times): call the script in this process; the signal comes while that step is under way."""

    def run(argv, which=signal.SIGTERM, step=0, times=1):
        whole, left = dataset.batch, [times]

        def interrupting(*args):
            while args[5] == step and left[0]:
                left[0] -= 1
                signal.raise_signal(which)
            return whole(*args)

        with monkeypatch.context() as patch:
            patch.setattr(dataset, "batch", interrupting)
            return call(*argv)

    return run


def test_interrupted_after_every_step_it_still_ends_in_the_same_file(flags, expected, stopped):
    for step in range(STEPS):
        run = stopped(
            flags if step == 0 else ("train.py", "--out", "run", "--resume"), signal.SIGINT, step
        )
        assert run.status == 130 and step_of("run/state.safetensors") == step + 1
    good(call("train.py", "--out", "run", "--resume"))
    assert contents("run")["lora.safetensors"] == expected


def test_a_second_interrupt_ends_the_run_at_once(flags, stopped):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = stopped(flags, signal.SIGINT, times=2)
    assert (
        run.status == 130
        and run.err.splitlines()[-1] == "interrupted"
        and step_of("run/state.safetensors") == 0
    )
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_what_the_previews_showed_before_stays(flags, stopped):
    assert stopped((*flags, "--preview-every", 1, "--steps", 2), step=1).status == 143
    before = contents("run")["preview.png"]
    good(call("train.py", "--out", "run", "--resume", "--steps", 3))
    after = contents("run")
    assert after["preview-1.png"] == before != after["preview.png"]


def test_stopped_after_its_last_step_a_run_has_only_to_be_finished(flags, stopped):
    assert stopped((*flags, "--preview-every", 1, "--steps", 2), step=1).status == 143
    before = contents("run")["preview.png"]
    run = good(call("train.py", "--out", "run", "--resume"))
    assert [p.name for p in run.wrote] == [
        "lora.safetensors",
        "preview.png",
        "loss.png",
        "settings.json",
    ]
    assert (
        sorted(contents("run")) == sorted(p.name for p in run.wrote)
        and contents("run")["preview.png"] == before
    )


def test_the_settings_come_back_and_flags_go_over_them(flags, stopped):
    assert stopped(flags).status == 143
    before = json.loads(contents("run")["settings.json"])
    assert (
        before["caption"] == "my {}"
        and before["size"] == [20, 16]
        and before["learning_rate"] == 3e-3
        and before["mirror"] is True
    )
    good(call("train.py", "--out", "run", "--resume", "--steps", 2, "--token", "other"))
    after = json.loads(contents("run")["settings.json"])
    assert after == before | {"steps": 2, "token": "other", "resume": True}
    with safe_open("run/lora.safetensors", "pt") as file:
        assert (
            file.metadata()["alchemy.prompt"] == "my other dog"
            and file.metadata()["alchemy.steps"] == "2"
        )


def test_the_thread_count_is_that_of_the_run_before_anything_is_computed(
    flags, stopped, monkeypatch
):
    whole, seen = dataset.encode, []
    assert stopped(flags).status == 143
    monkeypatch.setattr(
        dataset, "encode", lambda *args: seen.append(torch.get_num_threads()) or whole(*args)
    )
    try:
        torch.set_num_threads(3)
        good(call("train.py", "--out", "run", "--resume", "--steps", 2))
        assert set(seen) == {1} and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_a_state_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, tensor = tmp_path / "state.safetensors", {"x": torch.ones(4)}
    files.save_tensors(tensor, path, {"step": "1"})
    before, whole = contents(tmp_path), files.save_file
    for failure in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def half(tensors, new, header):
            whole(tensors, new, header)
            assert (
                contents(tmp_path)["state.safetensors"] == before["state.safetensors"]
            )  # the old one goes last
            raise failure

        monkeypatch.setattr(files, "save_file", half)
        with pytest.raises(type(failure)):
            files.save_tensors({"x": torch.zeros(4)}, path, {"step": "2"})
        assert contents(tmp_path) == before


def test_equal_tensors_and_facts_are_equal_files_whatever_the_facts_hold(tmp_path):
    facts = {
        f"fact {i}": text
        for i, text in enumerate(
            (
                '"quoted" \\ and / é 狗 🐕',
                "line\nbreak\ttab\x01\x1f\x7f\u2028",
                "",
                {"a": [1, None, "é"]},
                3.5,
            )
        )
    }
    ends = set()
    for i in range(4):
        files.save_tensors(
            {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)},
            tmp_path / f"{i}.safetensors",
            facts,
        )
        ends.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(ends) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == {
            k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
            for k, v in facts.items()
        }
        assert torch.equal(file.get_tensor("b"), torch.arange(3.0)) and torch.equal(
            file.get_tensor("a"), torch.ones(2, 2, dtype=torch.bfloat16)
        )


# What is there already


def test_a_folder_with_a_run_is_left_alone_unless_told(flags, taught):
    flags = (*flags, "--steps", 1)
    good(call(*flags))
    before = contents("run")
    refused(call(*flags), "run holds a run already", "--resume", "--overwrite", "--out")
    refused(
        call("train.py", "--out", "run", "--resume"),
        "run: this run is finished",
        "--overwrite",
        "--out",
    )
    refused(call(*flags, "--resume", "--overwrite"), "--resume", "--overwrite", "not allowed with")
    assert contents("run") == before
    # Where the new run cannot even begin, the old one stays too.
    refused(call(*flags, "--overwrite", "--size", 30), "30x30", "multiples of 4")
    (taught / "broken.jpg").write_text("no picture")
    try:
        refused(call(*flags, "--overwrite"), "broken.jpg")
    finally:
        (taught / "broken.jpg").unlink()
    assert contents("run") == before
    good(call(*flags, "--overwrite", "--seed", 5))
    assert contents("run")["lora.safetensors"] != before["lora.safetensors"]
    good(call(*flags, "--overwrite"))
    assert contents("run")["lora.safetensors"] == before["lora.safetensors"]


def test_a_stopped_run_is_not_overwritten_unless_told(flags, expected, stopped):
    assert stopped(flags).status == 143
    before = contents("run")
    refused(call(*flags), "run holds a run already")
    refused(
        call("train.py", "--out", "run", "--resume", "--rank", 3),
        "run/state.safetensors",
        "another kind of run",
        "--overwrite",
    )
    assert contents("run") == before  # the settings too: the next --resume finds what it needs
    good(call(*flags, "--overwrite"))
    assert contents("run")["lora.safetensors"] == expected


def test_nothing_to_resume_is_said(flags, tmp_path):
    refused(
        call("train.py", "--out", "nowhere", "--resume"),
        "nowhere",
        "no run to resume",
        "settings.json",
    )
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "odd").mkdir()
    for text in ("{", "[1]", "3"):
        (tmp_path / "odd/settings.json").write_text(text)
        refused(call("train.py", "--out", "odd", "--resume"), "odd/settings.json", "--overwrite")


def test_a_state_of_something_else_is_refused(flags, stopped, tmp_path):
    assert stopped(flags).status == 143
    state = tmp_path / "run/state.safetensors"
    whole = state.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a state"):
        state.write_bytes(content)
        assert "download" not in refused(
            call("train.py", "--out", "run", "--resume"), "run/state.safetensors", "--overwrite"
        )
        assert state.read_bytes() == content
    files.save_tensors({"x": torch.ones(1)}, state, {})
    refused(call("train.py", "--out", "run", "--resume"), "another kind of run")
