"""`python tests/benchmark.py --cuda`: the code of its rows, on the miniature and the CPU; its weights, as diffusers loads them."""

import json

import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

import torch  # noqa: E402

import alchemy  # noqa: E402
import benchmark_cuda  # noqa: E402
from helpers.checkpoints import CONFIGS  # noqa: E402
from helpers.full_size import write_folder  # noqa: E402


@pytest.mark.parametrize(
    "name", ["vae", "checkpointing", "merging"]
)  # the others take minutes: benchmark.py --cuda --tiny runs them all
def test_the_code_of_a_row_runs(name, tmp_path, capsys):
    benchmark_cuda.main([name, "--tiny", "--json", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"][name]
    assert rows and all(r["what"] in capsys.readouterr().out or r["ours"] >= 0 for r in rows)
    for r in rows:
        if r["what"].startswith(("tensors that un-merging", "fp8 bases")):
            assert r["ours"] == 0
        elif not r["what"].startswith("of which"):
            assert r["ours"] > 0 and r["theirs"] != 0


@torch.no_grad()
def test_the_folder_of_random_weights_is_one_for_both(tmp_path):
    folder = write_folder(tmp_path / "small", CONFIGS)
    sdxl = alchemy.load(folder, "cpu", "float32")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder, variant="fp16", dtype=torch.float32, add_watermarker=False
    )
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    told = sdxl.encode_prompt(["a dog"], (32, 32))
    ours = sdxl.unet(x, torch.tensor([500]), *told.parts())
    theirs = pipe.unet(
        x,
        torch.tensor([500]),
        encoder_hidden_states=told.context,
        added_cond_kwargs={"text_embeds": told.pooled, "time_ids": told.time_ids},
    ).sample
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    decoded = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    assert (sdxl.vae.decode(x) - decoded).abs().max() <= 1e-4 * decoded.abs().max()
