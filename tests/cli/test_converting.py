"""python -m alchemy.formats: LoRAs and embeddings under other names, and checkpoints with a LoRA in their weights."""

import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import (
    NETWORKS,
    SHIPPED,
    VAE,
    refused,
    same,
    vocabulary_read_once,
    weights,
    write_folder,
    write_json,  # noqa: F401
    write_single,
    write_weights,
)
from helpers.running import contents, tiny  # noqa: F401
from helpers.spellings import ALPHA, RANK, SPELLINGS, adapter, adapters, fresh, pairs, written  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alchemy
from alchemy import cli, lora
from alchemy.formats import saving
from alchemy.formats.__main__ import main as convert
from alchemy.formats.embeddings import DIFFUSERS_FILES, KEYS, load_embedding
from alchemy.formats.saving import save_checkpoint

# LoRAs


@pytest.mark.parametrize("source", SPELLINGS)
@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_converting_keeps_the_change_of_every_weight(pairs, fresh, tiny, tmp_path, source, to):
    save_file(
        written(pairs, *SPELLINGS[source]), tmp_path / "a.safetensors", {"alchemy.prompt": "a dog"}
    )
    convert(
        [
            str(tmp_path / "a.safetensors"),
            str(tmp_path / "b.safetensors"),
            "--to",
            to,
            "--weights",
            str(tiny),
        ]
    )
    sdxl = fresh()
    ours = adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "b.safetensors"))
    assert ours.keys() == pairs.keys()
    for layer, (down, up, alpha, _) in ours.items():
        assert torch.equal(down, pairs[layer][0]) and torch.allclose(
            up * (alpha / RANK), pairs[layer][1] * (ALPHA / RANK), rtol=1e-6, atol=0
        )
    ends = {
        "kohya": SPELLINGS["kohya, the single file's blocks"],
        "diffusers": SPELLINGS["diffusers"],
        "peft": SPELLINGS["PEFT in diffusers"],
    }[to]
    assert (
        load_file(tmp_path / "b.safetensors").keys()
        == written(pairs, *ends, alpha=to == "kohya").keys()
    )
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["alchemy.prompt"] == "a dog"


def test_converting_needs_no_weights_of_sdxl_base_and_knows_its_names(tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k"
    save_file(
        {
            layer + ".lora_A.weight": torch.ones(2, 2048),
            layer + ".lora_B.weight": torch.ones(1280, 2),
        },
        tmp_path / "a.safetensors",
    )
    convert([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "kohya"])
    stem = "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k"
    assert load_file(tmp_path / "b.safetensors").keys() == {
        stem + end for end in (".lora_down.weight", ".lora_up.weight", ".alpha")
    }


def test_converting_overwrites_nothing_and_names_another_base(pairs, tiny, tmp_path):
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    save_file(written(pairs, *SPELLINGS["PEFT"]), a)
    refused(
        lambda: convert([a, b, "--to", "kohya"]), "made for another base", "SDXL base", "--weights"
    )
    refused(lambda: convert([a, a, "--to", "kohya", "--weights", str(tiny)]), "exists already")
    refused(
        lambda: convert([a, b + ".pt", "--to", "kohya", "--weights", str(tiny)]), ".safetensors"
    )
    assert not Path(b).exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--to", "peft", "--scale", "2"), ("--scale needs --merge",)),
        (("--to", "peft", "--dtype", "float32"), ("--dtype needs --merge",)),
        (("--to", "peft", "--config", "folder"), ("--config needs --weights",)),
        (("--merge",), ("--merge needs --weights",)),
        (("--merge", "--weights", "w", "--scale", "nan"), ("--scale", "nan")),
        (("--merge", "--weights", "w", "--scale=-inf"), ("--scale", "-inf")),
    ],
)
def test_a_flag_that_would_be_ignored_and_a_scale_that_is_no_number_are_refused(
    capsys, pairs, tmp_path, flags, words
):
    save_file(written(pairs, *SPELLINGS["PEFT"]), tmp_path / "a.safetensors")
    with pytest.raises(SystemExit) as end:
        cli.run(
            lambda: convert(
                [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), *flags]
            )
        )
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and all(word in said for word in words)
    assert sorted(contents(tmp_path)) == ["a.safetensors"]


# Embeddings


def test_an_embedding_goes_to_diffusers_two_files_and_back_to_the_bit(tmp_path):
    rows = [
        torch.randn(2, width, generator=torch.Generator().manual_seed(width)) for width in (8, 12)
    ]
    save_file(
        dict(zip(KEYS, rows)),
        tmp_path / "my-dog.safetensors",
        {"alchemy.token": "<my-dog>", "alchemy.steps": "9", "other": "x"},
    )
    convert([str(tmp_path / "my-dog.safetensors"), str(tmp_path / "two"), "--to", "diffusers"])
    for name, r in zip(DIFFUSERS_FILES, rows):
        assert load_file(tmp_path / "two" / name).keys() == {"<my-dog>"} and torch.equal(
            load_file(tmp_path / "two" / name)["<my-dog>"], r
        )
    convert([str(tmp_path / "two"), str(tmp_path / "one.safetensors"), "--to", "kohya"])
    again = load_file(tmp_path / "one.safetensors")
    assert again.keys() == {*KEYS} and all(torch.equal(again[key], r) for key, r in zip(KEYS, rows))
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.metadata() == {
            "alchemy.token": "<my-dog>",
            "alchemy.steps": "9",
            "format": "pt",
        }


def test_another_tools_embedding_is_called_by_its_name_and_of_one_vector_has_one_row(tmp_path):
    save_file({"clip_l": torch.ones(8), "clip_g": torch.ones(12)}, tmp_path / "dotty.safetensors")
    convert([str(tmp_path / "dotty.safetensors"), str(tmp_path / "two"), "--to", "diffusers"])
    assert [
        tuple(load_file(tmp_path / "two" / name)["dotty"].shape) for name in DIFFUSERS_FILES
    ] == [
        (1, 8),
        (1, 12),
    ]


NAN = torch.full((1, 8), float("nan"))


@pytest.mark.parametrize(
    "clip_l, clip_g",
    [
        (torch.tensor(1.0), torch.tensor(1.0)),
        (torch.ones(1, 8), torch.tensor(1.0)),
        (torch.ones(0, 8), torch.ones(0, 12)),
        (torch.ones(1, 1, 8), torch.ones(1, 1, 12)),
        (torch.ones(2, 8), torch.ones(12)),
        (NAN, torch.ones(1, 12)),
    ],
)
def test_tensors_that_are_no_rows_are_refused_by_reader_and_converter(
    fresh, tmp_path, clip_l, clip_g
):
    path = tmp_path / "a.safetensors"
    save_file({"clip_l": clip_l, "clip_g": clip_g}, path)
    refused(lambda: load_embedding(fresh(), path), path, "no SDXL embedding")
    refused(
        lambda: convert([str(path), str(tmp_path / "two"), "--to", "diffusers"]),
        path,
        "no SDXL embedding",
    )
    assert not (tmp_path / "two").exists()


def test_an_embedding_is_refused_in_a_form_that_it_has_not(tmp_path):
    save_file({"clip_l": torch.ones(8), "clip_g": torch.ones(12)}, tmp_path / "a.safetensors")
    for target, to, words in (
        ("b.safetensors", "diffusers", "folder"),
        ("b", "kohya", ".safetensors"),
        ("b.safetensors", "peft", "kohya, diffusers"),
    ):
        refused(
            lambda: convert([str(tmp_path / "a.safetensors"), str(tmp_path / target), "--to", to]),
            words,
        )
    (tmp_path / "empty").mkdir()
    refused(
        lambda: convert([str(tmp_path / "empty"), str(tmp_path / "b"), "--to", "diffusers"]),
        "empty",
        DIFFUSERS_FILES[0],
        "nor a LoRA",
    )
    assert sorted(contents(tmp_path)) == ["a.safetensors"] and not (tmp_path / "b").exists()


def test_an_embedding_is_not_merged(tiny, tmp_path):
    save_file({"clip_l": torch.ones(8), "clip_g": torch.ones(12)}, tmp_path / "a.safetensors")
    refused(
        lambda: convert(
            [
                str(tmp_path / "a.safetensors"),
                str(tmp_path / "b"),
                "--merge",
                "--weights",
                str(tiny),
            ]
        ),
        "a.safetensors",
        "an embedding",
        "--embedding",
    )
    assert not (tmp_path / "b").exists()


def test_the_folders_above_what_is_written_are_made(pairs, tiny, tmp_path):
    save_file(written(pairs, *SPELLINGS["PEFT"]), tmp_path / "a.safetensors")
    save_file({"clip_l": torch.ones(8), "clip_g": torch.ones(12)}, tmp_path / "e.safetensors")
    for source, more in (("a", ["--weights", str(tiny)]), ("e", [])):
        convert(
            [
                str(tmp_path / f"{source}.safetensors"),
                str(tmp_path / f"to/{source}/b.safetensors"),
                "--to",
                "kohya",
                *more,
            ]
        )
        assert (tmp_path / f"to/{source}/b.safetensors").exists()


# Merging


def test_a_merged_checkpoint_draws_what_base_and_lora_draw(pairs, tiny, tmp_path):
    small = {layer: (0.1 * down, 0.1 * up) for layer, (down, up) in pairs.items()}
    save_file(written(small, *SPELLINGS["PEFT in diffusers"]), tmp_path / "a.safetensors")
    convert(
        [
            str(tmp_path / "a.safetensors"),
            str(tmp_path / "whole"),
            "--merge",
            "--weights",
            str(tiny),
            "--dtype",
            "float32",
            "--scale",
            "0.5",
        ]
    )
    merged, beside, base = (
        alchemy.load(tmp_path / "whole", "cpu"),
        alchemy.load(tiny, "cpu"),
        alchemy.load(tiny, "cpu"),
    )
    alchemy.load_lora(beside, tmp_path / "a.safetensors", 0.5)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = [
        sdxl.unet(x, 500, *sdxl.encode_prompt(["a dog"], (32, 32)).parts())
        for sdxl in (merged, beside, base)
    ]
    assert (drawn[0] - drawn[1]).norm() <= 3e-6 * drawn[1].norm() and (
        drawn[0] - drawn[2]
    ).norm() > 1e-2 * drawn[2].norm()
    assert not adapters(merged) and all(
        torch.equal(p, q) for p, q in zip(merged.vae.parameters(), base.vae.parameters())
    )
    assert not [
        key
        for key in load_file(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors")
        if "lora" in key
    ]


def test_a_merge_into_one_file_is_the_merge_into_a_folder(pairs, tiny, tmp_path):
    source = str(tmp_path / "a.safetensors")
    save_file(written(pairs, *SPELLINGS["ComfyUI"]), source)
    flags = ["--merge", "--weights", str(tiny), "--dtype", "float32"]
    convert([source, str(tmp_path / "b.safetensors"), *flags])
    convert([source, str(tmp_path / "b"), *flags])
    one = alchemy.load(tmp_path / "b.safetensors", "cpu", config=tiny)
    identical(one, alchemy.load(tmp_path / "b", "cpu"))
    # A single file needs no configurations to become a single file.
    flags[2] = str(tmp_path / "b.safetensors")
    convert(
        [source, str(tmp_path / "c.safetensors"), *flags, "--config", str(tiny), "--scale", "0"]
    )
    again = alchemy.load(tmp_path / "c.safetensors", "cpu", config=tiny)
    identical(one, again)


@pytest.mark.parametrize("to, warned", [("kohya", False), ("diffusers", True), ("peft", True)])
def test_converting_says_which_tools_ignore_the_file(pairs, tiny, tmp_path, capsys, to, warned):
    source = str(tmp_path / "a.safetensors")
    save_file(written(pairs, *SPELLINGS["PEFT"]), source)
    convert([source, str(tmp_path / "b.safetensors"), "--to", to, "--weights", str(tiny)])
    assert ("A1111 and kohya's tools ignore" in capsys.readouterr().err) == warned


def test_merging_refuses_a_folder_that_is_there_and_a_base_without_configurations(
    pairs, tiny, tmp_path
):
    save_file(written(pairs, *SPELLINGS["PEFT"]), tmp_path / "a.safetensors")
    (tmp_path / "b").mkdir()
    a = str(tmp_path / "a.safetensors")
    refused(
        lambda: convert([a, str(tmp_path / "b"), "--merge", "--weights", str(tiny)]),
        "exists already",
    )
    refused(lambda: convert([a, str(tmp_path / "c"), "--merge"]), "--weights")
    refused(
        lambda: convert([a, str(tmp_path / "c"), "--merge", "--weights", a]),
        "a.safetensors",
        "--config",
    )
    single = write_single(
        tmp_path / "single.safetensors",
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)},
    )
    refused(
        lambda: save_checkpoint(alchemy.load(single, "cpu"), tmp_path / "c"),
        "single.safetensors",
        "--config",
    )
    assert not (tmp_path / "c").exists()


LAYOUT = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{name}/config.json" for name in NETWORKS),
    *(f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae")),
    *(f"{name}/model.safetensors" for name in NETWORKS if "text" in name),
    *(
        f"{name}/{file.name}"
        for name in ("tokenizer", "tokenizer_2")
        for file in (SHIPPED / name).iterdir()
    ),
}


def identical(one, other):
    """Two checkpoints have the same networks to the bit, configurations, schedule and tokens."""
    for name in NETWORKS:
        same(one.network(name), other.network(name).state_dict(), one.dtype)
    assert one.configs == other.configs and one.zeros_for_none == other.zeros_for_none
    assert (
        one.schedule.prediction == other.schedule.prediction
        and one.schedule.spacing == other.schedule.spacing
    )
    assert torch.equal(one.schedule.alpha_bar, other.schedule.alpha_bar)
    assert [t("a dog!") for t in one.tokenizers] == [t("a dog!") for t in other.tokenizers]


@pytest.mark.parametrize(
    "vocabulary", [True, False]
)  # without one of its own, the one that ships goes along
def test_a_written_folder_holds_the_layout_and_nothing_else_and_loads_the_same(
    tmp_path, vocabulary
):
    source = write_folder(
        tmp_path / "source", vocabulary=vocabulary, index={"force_zeros_for_empty_prompt": False}
    )
    for other in (
        "notes.txt",
        "unet/training.json",
        "lora/adapter_config.json",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    ):
        write_json(source / other, {"of": "no use"})
    sdxl = alchemy.load(source, "cpu")
    save_checkpoint(sdxl, tmp_path / "whole")
    assert contents(tmp_path / "whole").keys() == LAYOUT
    identical(alchemy.load(tmp_path / "whole", "cpu"), alchemy.load(source, "cpu"))


def test_another_vae_is_written_with_its_own_configuration(tmp_path):
    source, other = (
        write_folder(tmp_path / "source"),
        VAE | {"scaling_factor": 0.7, "force_upcast": False, "shift_factor": 0.1},
    )
    write_json(tmp_path / "vae/config.json", other)
    write_weights(tmp_path / "vae", "vae", weights(1)["vae"])
    save_checkpoint(alchemy.load(source, "cpu", vae=tmp_path / "vae"), tmp_path / "whole")
    assert json.loads((tmp_path / "whole/vae/config.json").read_text()) == other
    identical(
        alchemy.load(tmp_path / "whole", "cpu"), alchemy.load(source, "cpu", vae=tmp_path / "vae")
    )


def test_what_a_single_file_says_of_its_schedule_is_written(tmp_path):
    source, marks = (
        write_folder(tmp_path / "source"),
        {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])},
    )
    single = alchemy.load(
        write_single(tmp_path / "v.safetensors", extras=marks), "cpu", config=source
    )
    save_checkpoint(single, tmp_path / "whole")
    assert single.schedule.prediction == "v_prediction" and single.schedule.alpha_bar[-1] == 0
    identical(alchemy.load(tmp_path / "whole", "cpu"), single)


def test_merging_for_good_keeps_no_weight_twice(fresh, pairs, tmp_path):
    save_file(written(pairs, *SPELLINGS["PEFT"]), tmp_path / "a.safetensors")
    sdxl = fresh()
    alchemy.load_lora(sdxl, tmp_path / "a.safetensors")
    save_checkpoint(sdxl, tmp_path / "whole")
    assert not adapters(sdxl) and all(
        layer.base_weight is None for layer in lora.layers(sdxl).values()
    )
    identical(alchemy.load(tmp_path / "whole", "cpu"), sdxl)


def test_a_checkpoint_that_cannot_be_written_whole_leaves_nothing(fresh, tmp_path, monkeypatch):
    def full(tensors, path, facts):
        raise OSError(f"{path}: could not be written (No space left on device)")

    monkeypatch.setattr(saving, "save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(fresh(), tmp_path / "whole")
    assert not list(tmp_path.iterdir())
