"""A run that was interrupted, in any way and at any step, ends with the same file to the bit."""

import json
import signal
from pathlib import Path

import pytest
import torch
from helpers.running import call, contents, good, photos, process, refused
from safetensors import safe_open
from safetensors.torch import load_file

from alchemy import dataset, files, training
from alchemy.methods import outputs

STEPS, SAVE = 6, 2
# Everything that a resumed run has to remember differs from its default.
NOT_DEFAULT = (
    "--token zwx --size 16x20 --rank 2 --alpha 3 --batch 1 --accumulation 2 --warmup 3 "
    "--learning-rate 3e-3 --schedule cosine --prior-weight 0.5 --snr-gamma 3 --mirror --seed 4 "
    "--preview-every 0 --out run"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture
def flags(tiny, folder):
    caption = ("--caption", "my {}", "--steps", STEPS, "--save-every", SAVE)
    start = ("train.py", folder, "--class-word", "dog", "--weights", tiny)
    return (*start, *caption, *NOT_DEFAULT.split())


@pytest.fixture(scope="module")
def uninterrupted():
    return {}


@pytest.fixture
def expected(flags, uninterrupted, tmp_path, monkeypatch):
    """lora.safetensors of the run that was not interrupted; it is trained once."""
    if not uninterrupted:
        (tmp_path / "uninterrupted").mkdir()
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path / "uninterrupted")
            good(call(*flags))
            uninterrupted.update(contents("run"))
    return uninterrupted["lora.safetensors"]


def step_of(path):
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


RESUME = ("train.py", "--out", "run", "--resume")


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
            import safetensors.torch
            def half(tensors, path, header):
                whole_save(tensors, path, header)
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            whole_save, safetensors.torch.save_file = safetensors.torch.save_file, half"""


@pytest.mark.parametrize(
    "step, action, status, saved",
    [
        (1, kill("SIGINT"), 130, 1),
        (5, kill("SIGTERM"), 143, 5),
        (1, kill("SIGKILL"), -9, 0),
        (4, HALF_A_STATE, -9, 2),
    ],
)
def test_a_resumed_run_ends_in_the_same_file(flags, expected, step, action, status, saved):
    run = process(*flags, before=at(step, action))
    assert run.status == status and "Traceback" not in run.err, run.err
    assert "lora.safetensors" not in contents("run")
    if status > 0:
        last = f"stopped after step {step}; the same command with --resume continues"
        assert run.err.splitlines()[-1] == last
    assert step_of("run/state.safetensors") == saved
    assert f"resuming at step {saved} of {STEPS}" in good(call(*RESUME)).err
    assert contents("run")["lora.safetensors"] == expected
    assert not [name for name in contents("run") if name.startswith(".")]


def test_a_finished_run_continues_to_that_of_more_steps(flags, expected):
    flags = (*flags, "--schedule", "constant")
    good(call(*flags, "--out", "whole/run"))
    good(call(*flags, "--steps", 3))
    line = refused(call(*RESUME), "run: this run is finished", "--steps above 3 continues it")
    assert "--init-lora" not in line
    good(call(*RESUME, "--steps", STEPS))
    names = ("lora.safetensors", "state.safetensors")
    assert [contents("run")[n] for n in names] == [contents("whole/run")[n] for n in names]
    (Path("run") / "state.safetensors").unlink()
    refused(call(*RESUME, "--steps", 9), "run: this run is finished", "--init-lora")


def test_interrupted_after_every_step_it_ends_in_the_same_file(flags, expected, stopped):
    for step in range(STEPS):
        run = stopped(RESUME if step else flags, signal.SIGINT, step)
        assert run.status == 130 and step_of("run/state.safetensors") == step + 1
    good(call(*RESUME))
    assert contents("run")["lora.safetensors"] == expected
    rows = contents("run")["log.csv"].decode().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [str(step + 1) for step in range(STEPS)]


def test_a_second_interrupt_ends_the_run_at_once(flags, stopped):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = stopped(flags, signal.SIGINT, times=2)
    assert run.status == 130 and run.err.splitlines()[-1] == "interrupted"
    assert step_of("run/state.safetensors") == 0
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_earlier_previews_are_kept_and_those_lost_to_a_stop_are_made(flags, stopped):
    assert stopped((*flags, "--preview-every", 1, "--steps", 2), step=1).status == 143
    before = contents("run")
    assert "previews/step-000002.safetensors" not in before
    run = good(call(*RESUME))  # no step is left
    assert "run/preview.png, with the previews so far, is run/preview-1.png now" in run.err
    after = contents("run")
    assert after["preview-1.png"] == before["preview.png"] != after["preview.png"]
    assert {"previews/step-000002.safetensors", "lora.safetensors"} <= after.keys()


def test_settings_are_restored_and_flags_override_them(flags, stopped):
    assert stopped(flags).status == 143
    before = json.loads(contents("run")["settings.json"])
    expected = {"caption": "my {}", "size": [20, 16], "learning_rate": 3e-3, "mirror": True}
    assert before | expected == before
    good(call(*RESUME, "--steps", 2, "--token", "other"))
    after = json.loads(contents("run")["settings.json"])
    assert after == before | {"steps": 2, "token": "other", "finished": 2}
    with safe_open("run/lora.safetensors", "pt") as file:
        assert file.metadata()["alchemy.prompt"] == "my other dog"
        assert file.metadata()["alchemy.steps"] == "2"


def test_the_thread_count_is_restored_before_anything_is_computed(flags, stopped, monkeypatch):
    encode, seen = dataset.encode_image, []
    assert stopped(flags).status == 143

    def encoding(*args):
        seen.append(torch.get_num_threads())
        return encode(*args)

    monkeypatch.setattr(dataset, "encode_image", encoding)
    try:
        torch.set_num_threads(3)
        good(call(*RESUME, "--steps", 2))
        assert set(seen) == {1} and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_equal_tensors_and_metadata_are_equal_files(tmp_path):
    texts = ['"quoted" \\ and / é 狗 🐕', "line\nbreak\ttab\x01\x1f\x7f\u2028", "", 3.5]
    metadata = {f"fact {i}": text for i, text in enumerate([*texts, {"a": [1, None, "é"]}])}
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    written = set()
    for i in range(4):
        files.save_tensors(tensors, tmp_path / f"{i}.safetensors", metadata)
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        for key, value in metadata.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            assert file.metadata()[key] == text
        assert all(torch.equal(file.get_tensor(name), t) for name, t in tensors.items())


# What exists already


def test_a_folder_with_a_run_is_left_alone_without_overwrite(flags, folder):
    flags = (*flags, "--steps", 1)
    good(call(*flags))
    before = contents("run")
    refused(call(*flags), "run holds a run already", "--resume", "--overwrite", "--out")
    refused(call(*RESUME), "run: this run is finished", "--steps above 1", "--overwrite")
    refused(call(*flags, "--resume", "--overwrite"), "not allowed with")
    # Where the new run cannot begin, the old one is kept too.
    refused(call(*flags, "--overwrite", "--size", 30), "30x30", "multiples of 4")
    (folder / "broken.jpg").write_text("no image")
    try:
        refused(call(*flags, "--overwrite"), "broken.jpg")
    finally:
        (folder / "broken.jpg").unlink()
    assert contents("run") == before
    good(call(*flags, "--overwrite", "--seed", 5))
    assert contents("run")["lora.safetensors"] != before["lora.safetensors"]


@pytest.mark.parametrize(
    "name", ["preview.png", "loss.png", "state.safetensors", "log.csv", "previews/mine.txt"]
)
def test_files_of_the_user_are_not_replaced_without_overwrite(flags, tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    refused(call(*flags), f"run/{name.split('/')[0]} exists", "--out", "--overwrite")
    assert contents("run") == {name: b"mine"}


def test_a_second_run_in_the_same_folder_is_refused(flags, tmp_path):
    (tmp_path / "run").mkdir()
    with files.lock_folder(tmp_path / "run"):
        refused(call(*flags), "--out run", "another run is writing there")
    assert not contents("run")


def test_a_stopped_run_is_not_overwritten_without_the_flag(flags, expected, stopped):
    assert stopped(flags).status == 143
    before = contents("run")
    refused(call(*flags), "run holds a run already")
    words = ("run/state.safetensors", "another kind of run", "--overwrite")
    refused(call(*RESUME, "--rank", 3), *words)
    assert contents("run") == before  # the settings too: the next --resume needs them
    good(call(*flags, "--overwrite"))
    assert contents("run")["lora.safetensors"] == expected


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    missing = call("train.py", "--out", "nowhere", "--resume")
    refused(missing, "nowhere", "no run to resume", "settings.json")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "odd").mkdir()
    for text in ("{", "[1]", "3", '{"steps": "many"}', '{"prior_weight": 1e300}'):
        (tmp_path / "odd/settings.json").write_text(text)
        refused(call("train.py", "--out", "odd", "--resume"), "odd/settings.json")
    (tmp_path / "odd/settings.json").write_text('{"out": null}')
    refused(call("train.py", "--out", "odd", "--resume"), "the run in odd is one of --method None")


def test_a_damaged_state_is_refused_and_kept(flags, stopped, tmp_path):
    assert stopped(flags).status == 143
    state = tmp_path / "run/state.safetensors"
    intact = state.read_bytes()
    threads = intact.replace(b'"threads":"1"', b'"threads":"9"')
    for content in (intact[: len(intact) // 2], b"", b"not a state", threads):
        state.write_bytes(content)
        line = refused(call(*RESUME), "run/state.safetensors", "--overwrite")
        assert "download" not in line and state.read_bytes() == content
    state.write_bytes(intact)
    log = (tmp_path / "run/log.csv").read_bytes()
    for content in (b"\xff", b"a,b\n1,2\n", log + b"1,x,y,z\n", b"step\n" + b"1" * 200_000):
        (tmp_path / "run/log.csv").write_bytes(content)
        refused(call(*RESUME), "run/log.csv: damaged, or not the log of this run; move it away")
    files.save_tensors({"x": torch.ones(1)}, state, {})
    refused(call(*RESUME), "another kind of run")
    torch.set_num_threads(1)


def forged(state, path, threads=None, **changes):
    """Write a state with other tensors and a checksum that fits; a change of None removes one."""
    tensors, header = load_file(state), dict(state_header(state))
    first = next(name for name in sorted(tensors) if name.startswith("exp_avg:"))
    for name, value in changes.items():
        key = name if name in tensors else first.replace("exp_avg", name)
        assert key in tensors
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    header["threads"] = threads or header["threads"]
    header["checksum"] = training.checksum(header, sorted(tensors.items()))
    files.save_tensors(tensors, path, header)


def state_header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"losses": None}, "losses"),
        ({"losses": torch.zeros(7, dtype=torch.float64)}, "step"),
        ({"exp_avg": None}, "exp_avg:"),
        ({"exp_avg_sq": torch.ones(1)}, "exp_avg_sq:"),
        ({"exp_avg_sq": torch.full((2, 8), torch.nan)}, "exp_avg_sq:"),
        ({"step": torch.ones((), dtype=torch.int32)}, "step:"),
    ],
)
def test_a_state_whose_checksum_fits_is_checked_too(flags, stopped, tmp_path, changes, named):
    assert stopped(flags).status == 143
    state = tmp_path / "run/state.safetensors"
    forged(state, state, **changes)
    refused(call(*RESUME), "run/state.safetensors", "the state is damaged", named, "--overwrite")


def test_a_state_of_more_threads_than_the_machine_has_is_capped(
    flags, expected, stopped, tmp_path, monkeypatch
):
    assert stopped(flags).status == 143
    state = tmp_path / "run/state.safetensors"
    forged(state, state, threads="1000")
    monkeypatch.setattr(outputs.os, "cpu_count", lambda: 1)
    run = good(call(*RESUME))
    assert "warning: the run had 1000 threads and has 1 now; the last bits differ" in run.err
    assert torch.get_num_threads() == 1
    assert contents("run")["lora.safetensors"] == expected
