"""Reading LoRA files: every spelling of the names gives the same adapter, what does not fit is refused whole."""

import json

import pytest
import torch
from helpers.checkpoints import refused, vocabulary_read_once, write_json  # noqa: F401
from helpers.running import tiny  # noqa: F401
from helpers.spellings import (
    ALPHA,
    HEADER,
    RANK,
    SPELLINGS,
    adapter,
    adapters,
    equal,
    fresh,
    pairs,
    written,
)  # noqa: F401
from safetensors.torch import save_file

import alchemy
from alchemy import lora
from alchemy.formats import layout

# Reading


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_adapter(fresh, pairs, tmp_path, spelling):
    save_file(written(pairs, *SPELLINGS[spelling]), tmp_path / "a.safetensors")
    sdxl = fresh()
    equal(adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "a.safetensors", 0.7)), pairs, scale=0.7)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_without_a_word_on_alpha_it_is_the_rank(fresh, pairs, tmp_path, spelling):
    save_file(written(pairs, *SPELLINGS[spelling], alpha=False), tmp_path / "a.safetensors")
    sdxl = fresh()
    equal(
        adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "a.safetensors")), pairs, alpha=float(RANK)
    )


def test_alpha_is_read_from_the_header_as_diffusers_writes_it(fresh, pairs, tmp_path):
    tensors, sdxl = written(pairs, *SPELLINGS["PEFT in diffusers"], alpha=False), fresh()
    save_file(tensors, tmp_path / "a.safetensors", HEADER)
    equal(adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "a.safetensors")), pairs)
    own = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    told = {
        "unet.lora_alpha": ALPHA,
        "unet.alpha_pattern": {own: 9},
        "unet.use_rslora": True,
        "text_encoder.lora_alpha": 5,
        "lora_alpha": 6,
    }
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    ours = adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "a.safetensors"))
    for layer, (*_, alpha, _) in ours.items():
        if layer.startswith("unet."):
            assert alpha == pytest.approx((9 if layer == f"unet.{own}" else ALPHA) * RANK**0.5)
        else:
            assert alpha == (5 if layer.startswith("text_encoder.") else 6)
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": "{"})
    refused(
        lambda: alchemy.load_lora(sdxl, tmp_path / "a.safetensors"),
        tmp_path / "a.safetensors",
        "lora_adapter_metadata",
    )


def test_kohyas_names_of_sdxl_base_are_those_of_the_published_files():
    inside = "transformer_blocks.0.attn1.to_out.0"
    known = {
        f"down_blocks.{b}.attentions.{i}": f"input_blocks_{n}_1"
        for b, i, n in ((1, 0, 4), (1, 1, 5), (2, 0, 7), (2, 1, 8))
    }
    known |= {
        f"up_blocks.{b}.attentions.{i}": f"output_blocks_{3 * b + i}_1"
        for b in (0, 1)
        for i in (0, 1, 2)
    }
    known["mid_block.attentions.0"] = "middle_block_1"
    for ours, theirs in known.items():
        name = layout.single_file_name("unet", f"{ours}.{inside}", UNET_OF_SDXL)
        assert (
            "lora_unet_" + name.replace(".", "_")
            == f"lora_unet_{theirs}_transformer_blocks_0_attn1_to_out_0"
        )


class UNET_OF_SDXL:
    layers_per_block = 2


def test_half_precision_in_a_file_is_read_as_float32(fresh, pairs, tmp_path):
    save_file(
        {k: t.bfloat16() for k, t in written(pairs, *SPELLINGS["diffusers"]).items()},
        tmp_path / "a.safetensors",
    )
    sdxl = fresh()
    rounded = {layer: tuple(t.bfloat16().float() for t in pair) for layer, pair in pairs.items()}
    equal(adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "a.safetensors")), rounded)


def test_files_come_beside_each_other_whatever_their_headers_say(fresh, pairs, tmp_path):
    sdxl = fresh()
    alchemy.add_lora(sdxl, RANK)
    for name in ("my.dog", "keys", "default"):  # dots, a dict's own words: no names for a module
        alchemy.save_lora(sdxl, tmp_path / f"{name}.safetensors", metadata={"name": name})
    names = [
        alchemy.load_lora(sdxl, tmp_path / f"{name}.safetensors", 0.5)
        for name in ("my.dog", "keys", "default", "default")
    ]
    assert len({*names, "default"}) == 5 and adapters(sdxl.unet) == {*names, "default"}
    assert (
        alchemy.load_lora(sdxl, tmp_path / "keys.safetensors", name="mine")
        == "mine"
        in adapters(sdxl.unet)
    )


@pytest.mark.parametrize("spelling", ["kohya, diffusers' blocks", "diffusers", "PEFT"])
def test_text_encoders_layers_as_transformers_5_calls_them_are_the_same(
    fresh, pairs, tmp_path, spelling
):
    tensors, sdxl = written(pairs, *SPELLINGS[spelling]), fresh()
    tensors = {
        key.replace("text_model.", "").replace("text_model_", ""): t for key, t in tensors.items()
    }
    assert not any("text_model" in key for key in tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    equal(adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "a.safetensors")), pairs)


@pytest.mark.parametrize("before", ["", "base_model.model."])
def test_the_unet_alone_needs_no_networks_name_and_pefts_alpha_stands_beside(
    fresh, pairs, tmp_path, before
):
    some, sdxl = {k: v for k, v in pairs.items() if k.startswith("unet.")}, fresh()
    tensors = written(
        some,
        lambda layer: before + layer.removeprefix("unet."),
        ".lora_A.weight",
        ".lora_B.weight",
        alpha=False,
    )
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    equal(
        adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "adapter_model.safetensors")),
        some,
        alpha=float(RANK),
    )
    write_json(
        tmp_path / "adapter_config.json",
        {"lora_alpha": ALPHA, "alpha_pattern": {}, "use_rslora": False},
    )
    equal(adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "adapter_model.safetensors")), some)
    save_file(tensors, tmp_path / "other.safetensors")  # of another name, the config is not of it
    equal(
        adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "other.safetensors")),
        some,
        alpha=float(RANK),
    )


# Refusing


def refused_whole(sdxl, path, *words):
    line = refused(lambda: alchemy.load_lora(sdxl, path), path, *words)
    assert not adapters(sdxl)  # nothing of it was put on
    return line


def test_a_lora_of_another_base_is_refused_with_the_layer_and_both_shapes(fresh, pairs, tmp_path):
    stem, down, up = SPELLINGS["kohya, the single file's blocks"]
    last = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k"
    wider = dict(pairs) | {last: (torch.zeros(RANK, 2048), torch.zeros(640, RANK))}
    deeper = written(wider, stem, down, up) | {
        "lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q" + down: torch.zeros(1)
    }
    save_file(deeper, tmp_path / "a.safetensors")
    sdxl = fresh()
    refused_whole(
        sdxl,
        tmp_path / "a.safetensors",
        "another base",
        last,
        "(12, 20)",
        "(640, 2048)",
        sdxl.source,
    )


@pytest.mark.parametrize(
    "key",
    [
        "lora_te1_text_model_encoder_layers_9_self_attn_q_proj.lora_down.weight",
        "what.ever",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    ],
)
def test_a_key_that_matches_nothing_is_named_and_nothing_is_put_on(fresh, pairs, tmp_path, key):
    tensors = written(pairs, *SPELLINGS["kohya, the single file's blocks"])
    save_file(tensors | {key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    refused_whole(fresh(), tmp_path / "a.safetensors", f"1 of its {len(tensors) + 1} keys", key)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.dora_scale",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_magnitude_vector",
    ],
)
def test_a_dora_is_called_one_and_refused(fresh, pairs, tmp_path, key):
    save_file(
        written(pairs, *SPELLINGS["PEFT"]) | {key: torch.ones(16)}, tmp_path / "a.safetensors"
    )
    refused_whole(fresh(), tmp_path / "a.safetensors", "a DoRA", key)


def test_the_older_diffusers_processors_give_the_same_adapter(fresh, pairs, tmp_path):
    tensors, some = {}, {k: v for k, v in pairs.items() if ".attn1." in k or ".attn2." in k}
    for layer, (down, up) in some.items():
        parent, _, projection = layer.removesuffix(".0").rpartition(".")
        tensors |= {
            f"{parent}.processor.{projection}_lora.down.weight": down.clone(),
            f"{parent}.processor.{projection}_lora.up.weight": up.clone(),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    sdxl = fresh()
    equal(
        adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "a.safetensors")), some, alpha=float(RANK)
    )


def test_a_file_of_the_unet_alone_reads_no_text_encoder(fresh, pairs, tmp_path):
    save_file(
        written({k: v for k, v in pairs.items() if k.startswith("unet.")}, *SPELLINGS["diffusers"]),
        tmp_path / "a.safetensors",
    )
    sdxl = fresh()
    alchemy.load_lora(sdxl, tmp_path / "a.safetensors")
    assert set(sdxl.loaded) == {"unet"}


def test_a_lora_of_every_layer_is_the_same_change_of_weights_as_merged(fresh, pairs, tmp_path):
    save_file(
        written(pairs, *SPELLINGS["kohya, the single file's blocks"]), tmp_path / "a.safetensors"
    )
    sdxl, plain = fresh(), fresh()
    alchemy.load_lora(sdxl, tmp_path / "a.safetensors", 0.1)
    told = sdxl.encode_prompt(["a dog"], (32, 32))
    for layer, (down, up) in pairs.items():
        network, _, name = layer.partition(".")
        weight = plain.network(network).get_submodule(name).weight
        weight.data += 0.1 * ALPHA / RANK * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    other = plain.encode_prompt(["a dog"], (32, 32))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = (s.unet(x, 500, *t.parts()) for s, t in ((sdxl, told), (plain, other)))
    assert (told.context - other.context).norm() <= 3e-6 * other.context.norm() and (
        ours - theirs
    ).norm() <= 3e-6 * theirs.norm()
    assert (theirs - fresh().unet(x, 500, *other.parts())).norm() > 1e-2 * theirs.norm()
    lora.merge(sdxl)
    assert (sdxl.unet(x, 500, *told.parts()) - theirs).norm() <= 3e-6 * theirs.norm()


def test_half_a_pair_a_layer_twice_and_an_alpha_of_many_are_refused(fresh, pairs, tmp_path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    one, path, sdxl = {name: pairs[name]}, tmp_path / "a.safetensors", fresh()
    stem, down, up = SPELLINGS["kohya, diffusers' blocks"]
    whole = written(one, stem, down, up)
    for spoiled, word in (
        ({k: t for k, t in whole.items() if not k.endswith(up)}, "not one update"),
        (whole | written(one, *SPELLINGS["diffusers"]), name),
        (whole | {stem(name) + ".alpha": torch.ones(2)}, "alpha (2,)"),
        ({}, "empty"),
    ):
        save_file(spoiled, path)
        refused_whole(sdxl, path, word)
    for a, b in (
        (torch.ones(2, 16), torch.ones(16, 3)),
        (torch.ones(16), torch.ones(16)),
        (torch.ones(2, 16, 1, 1), torch.ones(16, 2)),
    ):
        save_file(whole | {stem(name) + down: a, stem(name) + up: b}, path)
        refused_whole(sdxl, path, name, tuple(a.shape), tuple(b.shape))


@pytest.mark.parametrize(
    "told",
    [
        "{",
        "null",
        "[1]",
        '"x"',
        "[" * 9999,
        '{"unet.alpha_pattern": [1]}',
        '{"unet.alpha_pattern": "x"}',
        '{"unet.alpha_pattern": {"to_q": "9"}}',
        '{"unet.alpha_pattern": {"to_q": [1]}}',
        '{"lora_alpha": "9"}',
        '{"lora_alpha": true}',
        '{"lora_alpha": {}}',
        '{"use_rslora": "yes"}',
        '{"lora_alpha": 1%s}' % ("0" * 400),
        '{"lora_alpha": NaN}',
        '{"alpha_pattern": {"to_q": Infinity}}',
        '{"alpha_pattern": {"(a+)+": 1}}',
        '{"alpha_pattern": {"(": 1}}',
    ],
)
def test_a_header_that_is_odd_about_alpha_is_refused(fresh, tmp_path, told):
    path, sdxl = tmp_path / "a.safetensors", fresh()
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {name + ".lora_A.weight": torch.ones(2, 16), name + ".lora_B.weight": torch.ones(16, 2)},
        path,
        {"lora_adapter_metadata": told},
    )
    refused_whole(sdxl, path, "lora_adapter_metadata")


@pytest.mark.parametrize(
    "down, alpha, told",
    [
        (1.0, float("nan"), None),
        (float("inf"), 2.0, None),
    ],
)
def test_values_that_are_not_finite_are_refused_with_their_layer(
    fresh, tmp_path, down, alpha, told
):
    path, name = (
        tmp_path / "a.safetensors",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    )
    tensors = {
        name + ".lora_A.weight": torch.full((2, 16), down),
        name + ".lora_B.weight": torch.ones(16, 2),
    }
    save_file(
        tensors | ({} if told else {name + ".alpha": torch.tensor(alpha)}),
        path,
        told and {"lora_adapter_metadata": told},
    )
    refused_whole(fresh(), path, name, "not finite")


def test_a_rank_of_0_is_refused(fresh, tmp_path):
    path, name = (
        tmp_path / "a.safetensors",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    )
    save_file(
        {name + ".lora_A.weight": torch.ones(0, 16), name + ".lora_B.weight": torch.ones(16, 0)},
        path,
    )
    refused_whole(fresh(), path, name, "(0, 16)")
