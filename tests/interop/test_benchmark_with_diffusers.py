"""The benchmark's rows run on the miniature; its full-size weights load in diffusers too."""

import json
import sys

import benchmark
import benchmark_rows
import pytest
import torch
from benchmark_rows import entry
from helpers.checkpoints import CONFIGS
from helpers.full_size import networks, write_folder

import alchemy


@pytest.fixture
def results(tmp_path, monkeypatch):
    """results(flags): (exit status, the rows of the last setup that --json holds)."""
    path = tmp_path / "results.json"
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run(*flags):
        status = benchmark.main([*flags, "--tiny", "--json", str(path)])
        return status, json.loads(path.read_text())[-1]["rows"]

    return run


@pytest.mark.parametrize("row", ["step", "vae", "vae-2048", "compiled", "graph", "group-norm"])
def test_a_row_runs_on_the_miniature(row, results):
    status, rows = results(row, "--here")
    assert status == 0 and list(rows) == [row]
    for found in rows[row]:
        assert found["ours"] >= 0 or found["what"].startswith("compiling")


def fake_rows(monkeypatch, ours=1.0, error=None):
    """Rows take no time: one figure, and an error if there is one."""

    def run_apart(name, args, seconds):
        return [entry(name, ours, "s")] + ([{"error": error}] if error else [])

    monkeypatch.setattr(benchmark, "run_apart", run_apart)


def test_rows_add_up_and_figures_are_never_lost(results, tmp_path, monkeypatch, capsys):
    fake_rows(monkeypatch)
    results("vae")
    fake_rows(monkeypatch, 2.0)
    status, rows = results()
    assert status == 0 and rows["vae"][0]["ours"] == 1 and rows["step"][0]["ours"] == 2
    fake_rows(monkeypatch, 3.0, "out of memory")
    assert results("step") == (1, rows)  # a failure replaces nothing
    fake_rows(monkeypatch, 4.0)
    assert results("step")[1]["step"][0]["ours"] == 4

    # Another card's figures stand beside these.
    monkeypatch.setattr(benchmark, "describe_setup", lambda *_: {"device": "another"})
    assert list(results("vae")[1]) == ["vae"]
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    assert "not measured: tests" in capsys.readouterr().out
    (tmp_path / "results.json").write_text('{"setup": {}}')
    with pytest.raises(SystemExit):
        results("vae")
    assert "not results of this benchmark" in capsys.readouterr().err


def test_no_row_is_started_that_may_end_after_the_minutes(results, monkeypatch, capsys):
    fake_rows(monkeypatch)
    results("vae")
    assert list(results("--minutes", "2")[1]) == ["vae"]
    assert "goes on with tests" in capsys.readouterr().err


def test_a_row_that_fails_or_takes_too_long_is_an_entry_not_a_crash(results, monkeypatch):
    monkeypatch.setitem(benchmark_rows.SECONDS, "vae", 0.1)
    assert results("vae") == (1, {"vae": [{"error": "vae: took more than 0.1 s"}]})


@pytest.mark.parametrize(
    "theirs, target, ratio, expected",
    [
        (None, None, None, ""),
        (None, 1.0, None, "PASS"),
        (None, 0.9, None, "MISS"),
        (2.0, 1.0, 0.5, "PASS"),
        (1.9, 1.0, 0.5, "MISS"),
        (None, 1.0, 0.5, "PASS (no ratio: diffusers or peft is missing)"),
    ],
)
def test_a_line_of_the_table_says_whether_its_targets_are_met(theirs, target, ratio, expected):
    line = entry("a step", 1.0, "s", theirs, target, ratio_target=ratio)
    cells = benchmark.cells(line)
    assert line["verdict"] == cells[-1] == expected
    assert cells[2] == ("" if target is None else f"{target:g}")


def test_a_half_written_folder_of_weights_is_written_again(tmp_path, monkeypatch):
    folder, written = tmp_path / "full", []

    def write(path):
        (path / "vae").mkdir(parents=True, exist_ok=True)
        (path / "vae/config.json").touch()
        written.append(path)
        if len(written) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("helpers.full_size.write_folder", write)
    with pytest.raises(KeyboardInterrupt):
        benchmark.full_size_weights(folder)
    for _ in range(2):
        assert benchmark.full_size_weights(folder) == folder
    assert len(written) == 2


def test_random_norm_weights_are_near_1():
    for _, _, tensors in networks(CONFIGS):
        norms = [t for key, t in tensors.items() if key.endswith(".weight") and t.ndim == 1]
        assert norms and all(abs(float(t.mean()) - 1) < 0.05 for t in norms)


@torch.no_grad()
def test_the_random_weights_load_in_diffusers_with_the_same_outputs(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder = write_folder(tmp_path / "small", CONFIGS)
    sdxl = alchemy.load(folder, "cpu", "float32")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder, variant="fp16", dtype=torch.float32, add_watermarker=False
    )
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond, t = sdxl.encode_prompt(["a dog"], (32, 32)), torch.tensor([500])
    ours = sdxl.unet(x, t, *cond.parts())
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    theirs = pipe.unet(x, t, encoder_hidden_states=cond.context, added_cond_kwargs=added).sample
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    decoded = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    assert (sdxl.vae.decode(x) - decoded).abs().max() <= 1e-4 * decoded.abs().max()
