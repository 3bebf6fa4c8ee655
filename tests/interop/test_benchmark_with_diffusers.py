"""The benchmark's rows run on the miniature; its full-size weights load in diffusers too."""

import json
import sys

import benchmark
import pytest
import torch
from helpers.checkpoints import CONFIGS
from helpers.full_size import networks, write_folder

import alchemy


@pytest.fixture
def results(tmp_path, monkeypatch):
    """results(flags): (exit status, what --json holds)."""
    path = tmp_path / "results.json"
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run(*flags):
        status = benchmark.main([*flags, "--tiny", "--json", str(path)])
        return status, json.loads(path.read_text())

    return run


@pytest.mark.parametrize("row", ["step", "vae", "vae-2048", "compiled"])
def test_a_row_runs_on_the_miniature(row, results, capsys):
    status, found = results(row, "--here")
    assert status == 0 and list(found["rows"]) == [row]
    for entry in found["rows"][row]:
        assert entry["what"] in capsys.readouterr().out or entry["ours"] is not None
        assert entry["what"].startswith("compiling") or entry["ours"] > 0


def test_rows_add_up_and_only_missing_ones_run(results, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "run_apart", lambda name, args: [{"error": f"{name}: new"}])
    results("vae", "--here")
    status, found = results()
    assert status == 1 and "error" not in found["rows"]["vae"][0]
    assert found["rows"]["step"] == [{"error": "step: new"}]
    assert list(found["rows"])[1] == "correctness"
    monkeypatch.setattr(benchmark, "describe_setup", lambda *_: {"device": "another"})
    assert "vae" not in results("step")[1]["rows"]
    assert "not measured: correctness" in capsys.readouterr().out


def test_a_row_that_fails_or_takes_too_long_is_an_entry_not_a_crash(results, monkeypatch):
    monkeypatch.setattr(benchmark, "ROW_SECONDS", 0.1)
    status, found = results("vae")
    assert status == 1 and found["rows"]["vae"] == [{"error": "vae: took more than 0.1 s"}]


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
