"""LoRA files: every tool's names give the same adapter, and what does not fit is refused whole."""

import json

import pytest
import torch
from helpers.checkpoints import refused, write_json
from helpers.spellings import (
    ALPHA,
    HEADER,
    RANK,
    SPELLINGS,
    adapter,
    adapters,
    equal,
    kohya,
    unet_only,
    written,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alchemy
from alchemy import lora

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
LAYER = f"unet.{QUERY}"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def loaded(sdxl, path, *args):
    """The adapter of a file: {layer: (down, up, alpha, scale)}."""
    return adapter(sdxl, alchemy.load_lora(sdxl, path, *args))


# Reading


@pytest.mark.parametrize("alpha", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_naming_gives_the_same_adapter(fresh, pairs, path, spelling, alpha):
    save_file(written(pairs, *SPELLINGS[spelling], alpha), path)
    equal(loaded(fresh(), path, 0.7), pairs, ALPHA if alpha else float(RANK), 0.7)


@pytest.mark.parametrize("spelling", ["kohya, diffusers' blocks", "diffusers", "PEFT"])
def test_text_layers_in_the_names_of_transformers_5_are_the_same(fresh, pairs, path, spelling):
    tensors = {}
    for key, tensor in written(pairs, *SPELLINGS[spelling]).items():
        tensors[key.replace("text_model.", "").replace("text_model_", "")] = tensor
    assert not any("text_model" in key for key in tensors)
    save_file(tensors, path)
    equal(loaded(fresh(), path), pairs)


def test_the_older_processors_of_diffusers_give_the_same_adapter(fresh, pairs, path):
    attention = {k: v for k, v in pairs.items() if ".attn1." in k or ".attn2." in k}

    def old_name(layer):
        parent, _, projection = layer.removesuffix(".0").rpartition(".")
        return f"{parent}.processor.{projection}_lora"

    save_file(written(attention, old_name, ".down.weight", ".up.weight", alpha=False), path)
    equal(loaded(fresh(), path), attention, float(RANK))


def test_a_file_of_the_unet_alone_reads_no_text_encoder(fresh, pairs, path):
    save_file(written(unet_only(pairs), *SPELLINGS["diffusers"]), path)
    sdxl = fresh()
    alchemy.load_lora(sdxl, path)
    assert set(sdxl.loaded) == {"unet"}


def test_alpha_is_read_from_the_header_as_diffusers_writes_it(fresh, pairs, path):
    tensors = written(pairs, *SPELLINGS["PEFT in diffusers"], alpha=False)
    save_file(tensors, path, HEADER)
    equal(loaded(fresh(), path), pairs)
    config = {
        "unet.lora_alpha": ALPHA,
        "unet.alpha_pattern": {QUERY: 9},
        "unet.use_rslora": True,
        "text_encoder.lora_alpha": 5,
        "lora_alpha": 6,
    }
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config)})
    for layer, (*_, alpha, _) in loaded(fresh(), path).items():
        expected = 5 if layer.startswith("text_encoder.") else 6
        if layer.startswith("unet."):
            expected = (9 if layer == LAYER else ALPHA) * RANK**0.5
        assert alpha == pytest.approx(expected)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_the_alpha_of_peft_is_read_from_beside_the_file(fresh, pairs, tmp_path, prefix):
    unet, file = unet_only(pairs), tmp_path / "adapter_model.safetensors"
    ends = ".lora_A.weight", ".lora_B.weight"
    tensors = written(unet, lambda layer: prefix + layer.removeprefix("unet."), *ends, alpha=False)
    save_file(tensors, file)
    equal(loaded(fresh(), file), unet, float(RANK))
    config = {"lora_alpha": ALPHA, "alpha_pattern": {}, "use_rslora": False}
    write_json(tmp_path / "adapter_config.json", config)
    equal(loaded(fresh(), file), unet)
    save_file(tensors, tmp_path / "other.safetensors")  # the configuration is not this file's
    equal(loaded(fresh(), tmp_path / "other.safetensors"), unet, float(RANK))


def test_half_precision_in_a_file_is_read_as_float32(fresh, pairs, path):
    tensors = written(pairs, *SPELLINGS["diffusers"])
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, path)
    rounded = {
        layer: (a.bfloat16().float(), b.bfloat16().float()) for layer, (a, b) in pairs.items()
    }
    equal(loaded(fresh(), path), rounded)


def test_several_files_are_loaded_beside_each_other(fresh, tmp_path):
    sdxl, names = fresh(), ["default"]
    alchemy.add_lora(sdxl, RANK)
    # Dots, and a method of dict: no names for a module.
    for name in ("my.dog", "keys", "default", "default"):
        file = tmp_path / f"{name}.safetensors"
        alchemy.save_lora(sdxl, file, metadata={"name": name})
        names.append(alchemy.load_lora(sdxl, file, 0.5))
    assert len({*names}) == 5 and adapters(sdxl.unet) == {*names}
    assert alchemy.load_lora(sdxl, tmp_path / "keys.safetensors", name="mine") == "mine"
    assert "mine" in adapters(sdxl.unet)


def test_a_lora_of_every_layer_is_the_same_change_of_weights_as_merged(fresh, pairs, path, close):
    save_file(written(pairs, *SPELLINGS["kohya, the single file's blocks"]), path)
    sdxl, changed, base = fresh(), fresh(), fresh()
    alchemy.load_lora(sdxl, path, 0.1)
    for layer, (down, up) in pairs.items():
        network, _, name = layer.partition(".")
        weight = changed.network(network).get_submodule(name).weight
        weight.data += 0.1 * ALPHA / RANK * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def outputs(sdxl):
        conditioning = sdxl.encode_prompt(["a dog"], (32, 32))
        return conditioning.context, sdxl.unet(x, 500, *conditioning.parts())

    expected = outputs(changed)
    for a, b in zip(outputs(sdxl), expected, strict=True):
        close(a, b, 1e-5)
    assert (expected[1] - outputs(base)[1]).norm() > 1e-2 * expected[1].norm()
    lora.merge(sdxl)
    close(outputs(sdxl)[1], expected[1], 1e-5)


# Refusing


def refused_whole(sdxl, path, *words):
    refused(lambda: alchemy.load_lora(sdxl, path), path, *words)
    assert not adapters(sdxl)  # nothing has been added


def test_a_lora_of_another_base_is_refused_with_the_layer_and_both_shapes(fresh, pairs, path):
    last = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k"
    wider = pairs | {last: (torch.zeros(RANK, 2048), torch.zeros(640, RANK))}
    tensors = written(wider, *SPELLINGS["kohya, the single file's blocks"])
    deeper = "lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q.lora_down.weight"
    save_file(tensors | {deeper: torch.zeros(1)}, path)
    sdxl = fresh()
    refused_whole(sdxl, path, "another base", last, "(12, 20)", "(640, 2048)", sdxl.source)


@pytest.mark.parametrize(
    "key, words",
    [
        ("lora_te1_text_model_encoder_layers_9_self_attn_q_proj.lora_down.weight", "1 of its "),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", "1 of its "),
        ("what.ever", "1 of its "),
        (f"{LAYER}.lora_magnitude_vector", "a DoRA"),
        (f"{kohya(LAYER)}.dora_scale", "a DoRA"),
        (f"{kohya(LAYER)}.oft_blocks", "an OFT"),
        (f"{kohya(LAYER)}.on_input", "an IA3"),
        (f"{kohya(LAYER)}.diff_b", "biases"),
        (f"{kohya(LAYER)}.w_norm", "norm layers"),
        (f"{kohya(LAYER)}.a1.weight", "a GLoRA"),
    ],
)
def test_a_key_that_is_not_read_is_named_and_nothing_is_added(fresh, pairs, path, key, words):
    tensors = written(pairs, *SPELLINGS["kohya, the single file's blocks"])
    save_file(tensors | {key: torch.ones(2, 2)}, path)
    refused_whole(fresh(), path, words, key)


DOWN, UP = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
ONE = {DOWN: torch.ones(2, 16), UP: torch.ones(16, 2)}
TWICE = {f"{LAYER}.lora.up.weight": torch.ones(16, 2)}


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({}, ["empty"]),
        ({DOWN: ONE[DOWN]}, [LAYER, "not one update"]),
        (ONE | TWICE, [LAYER, "twice"]),
        (ONE | {f"{LAYER}.alpha": torch.ones(2)}, ["alpha (2,)"]),
        (ONE | {f"{LAYER}.alpha": torch.tensor(float("nan"))}, [LAYER, "not finite"]),
        (ONE | {DOWN: torch.full((2, 16), float("inf"))}, [LAYER, "not finite"]),
        (ONE | {DOWN: torch.ones(2, 16, dtype=torch.int8)}, [LAYER, "not floating point"]),
        ({DOWN: torch.ones(2, 16), UP: torch.ones(16, 3)}, [LAYER, "(2, 16)", "(16, 3)"]),
        ({DOWN: torch.ones(16), UP: torch.ones(16)}, [LAYER, "(16,)"]),
        ({DOWN: torch.ones(2, 16, 1, 1), UP: torch.ones(16, 2)}, [LAYER, "(2, 16, 1, 1)"]),
        ({DOWN: torch.ones(0, 16), UP: torch.ones(16, 0)}, [LAYER, "(0, 16)"]),
    ],
)
def test_tensors_that_are_no_lora_are_refused(fresh, path, tensors, words):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    refused_whole(fresh(), path, *words)


@pytest.mark.parametrize(
    "header",
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
def test_a_damaged_header_about_alpha_is_refused(fresh, path, header):
    save_file(ONE, path, {"lora_adapter_metadata": header})
    refused_whole(fresh(), path, "lora_adapter_metadata")


# Writing


@pytest.fixture
def random_lora(fresh):
    """A checkpoint with a random adapter "default", and its pairs."""
    sdxl = fresh()
    alchemy.add_lora(sdxl, RANK, ALPHA)
    for i, layer in enumerate(lora.attention_layers(sdxl.unet).values()):
        generator = torch.Generator().manual_seed(i)
        layer.lora["default"].up.data = torch.randn(layer.out_features, RANK, generator=generator)
    return sdxl, {layer: pair[:2] for layer, pair in adapter(sdxl, "default").items()}


WRITTEN_AS = {
    "kohya": "kohya, the single file's blocks",
    "diffusers": "diffusers",
    "peft": "PEFT in diffusers",
}


@pytest.mark.parametrize("form", WRITTEN_AS)
def test_each_format_is_read_back_to_the_bit(random_lora, fresh, path, form):
    sdxl, pairs = random_lora
    alchemy.save_lora(sdxl, path, format=form)
    alpha = ALPHA
    if form != "kohya":  # alpha / rank is multiplied into up
        pairs = {layer: (down, up * (ALPHA / RANK)) for layer, (down, up) in pairs.items()}
        alpha = float(RANK)
    equal(loaded(fresh(), path), pairs, alpha)
    expected = written(pairs, *SPELLINGS[WRITTEN_AS[form]], alpha=form == "kohya")
    assert load_file(path).keys() == expected.keys()


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_the_header_holds_the_metadata_and_what_other_tools_show(random_lora, path, form):
    metadata = {"prompt": "a photo of a sks dog", "steps": 12, "targets": ["to_q"]}
    alchemy.save_lora(random_lora[0], path, format=form, metadata=metadata)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "alchemy.prompt": "a photo of a sks dog",
            "alchemy.steps": "12",
            "alchemy.targets": '["to_q"]',
            "alchemy.rank": "2",
            "alchemy.alpha": "3.0",
            "ss_network_dim": "2",
            "ss_network_alpha": "3.0",
            "ss_base_model_version": "sdxl_base_v1-0",
            "format": "pt",
        }


def test_an_unknown_adapter_or_format_is_refused(random_lora, path):
    sdxl, _ = random_lora
    refused(lambda: alchemy.save_lora(sdxl, path, name="other"), "'other'")
    known = "'comfy'", "kohya, diffusers, peft"
    refused(lambda: alchemy.save_lora(sdxl, path, format="comfy"), *known)
    assert not path.exists()
