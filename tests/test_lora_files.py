"""LoRA files: every spelling of the names gives the same adapter, what does not fit is refused whole, what was written is read back exactly."""
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alchemy
from alchemy import lora
from alchemy.formats import layout
from checkpoints import refused, unet_modules, UNET, vocabulary_read_once  # noqa: F401
from running import tiny  # noqa: F401

RANK, ALPHA = 2, 3.0
HEADER = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": ALPHA, "unet.r": RANK})}


@pytest.fixture
def fresh(tiny):
    return lambda: alchemy.load(tiny, "cpu")


@pytest.fixture
def pairs(fresh):
    """{our layer: (down, up)} over every linear layer of the transformers."""
    made = torch.Generator().manual_seed(1)
    return {name: (torch.randn(RANK, m.in_features, generator=made), torch.randn(m.out_features, RANK, generator=made))
            for name, m in lora.layers(fresh().unet).items()}


def adapter(sdxl, name):
    """{layer: (down, up, alpha, scale)} of the adapter of that name."""
    return {layer: (a.down, a.up, a.alpha, a.scale) for layer, m in lora.layers(sdxl.unet).items() if name in m.lora for a in [m.lora[name]]}


def equal(ours, pairs, alpha=ALPHA, scale=1.0):
    assert ours.keys() == pairs.keys()
    for layer, (down, up, *rest) in ours.items():
        assert down.dtype == up.dtype == torch.float32
        assert torch.equal(down, pairs[layer][0]) and torch.equal(up, pairs[layer][1]) and rest == [alpha, scale], layer


def ldm(layer):
    """The layer by the blocks of the single file, walked from the other side: see checkpoints.unet_modules."""
    module = max((m for m in unet_modules(UNET) if layer.startswith(m + ".")), key=len)
    return unet_modules(UNET)[module] + layer.removeprefix(module)


def written(pairs, stem, down, up, alpha=True):
    tensors = {}
    for layer, (a, b) in pairs.items():
        tensors |= {stem(layer) + down: a, stem(layer) + up: b} | ({stem(layer) + ".alpha": torch.tensor(ALPHA)} if alpha else {})
    return {k: t.clone() for k, t in tensors.items()}


SPELLINGS = {
    "kohya, the single file's blocks": (lambda n: "lora_unet_" + ldm(n).replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
    "kohya, diffusers' blocks": (lambda n: "lora_unet_" + n.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
    "diffusers": (lambda n: "unet." + n, ".lora.down.weight", ".lora.up.weight"),
    "PEFT in diffusers": (lambda n: "unet." + n, ".lora_A.weight", ".lora_B.weight"),
    "PEFT": (lambda n: "base_model.model.unet." + n, ".lora_A.weight", ".lora_B.weight"),
    "PEFT with the adapter's name": (lambda n: "base_model.model.unet." + n, ".lora_A.default.weight", ".lora_B.default.weight"),
}


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
    equal(adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "a.safetensors")), pairs, alpha=float(RANK))


def test_alpha_is_read_from_the_header_as_diffusers_writes_it(fresh, pairs, tmp_path):
    tensors, sdxl = written(pairs, *SPELLINGS["PEFT in diffusers"], alpha=False), fresh()
    save_file(tensors, tmp_path / "a.safetensors", HEADER)
    equal(adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "a.safetensors")), pairs)
    own = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    told = {"unet.lora_alpha": ALPHA, "unet.alpha_pattern": {own: 9}, "unet.use_rslora": True}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    ours = adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "a.safetensors"))
    for layer, (*_, alpha, _) in ours.items():
        assert alpha == pytest.approx((9 if layer == own else ALPHA) * RANK ** 0.5)
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": "{"})
    refused(lambda: alchemy.load_lora(sdxl, tmp_path / "a.safetensors"), tmp_path / "a.safetensors", "lora_adapter_metadata")


def test_kohyas_names_of_sdxl_base_are_those_of_the_published_files():
    inside = "transformer_blocks.0.attn1.to_out.0"
    known = {f"down_blocks.{b}.attentions.{i}": f"input_blocks_{n}_1" for b, i, n in ((1, 0, 4), (1, 1, 5), (2, 0, 7), (2, 1, 8))}
    known |= {f"up_blocks.{b}.attentions.{i}": f"output_blocks_{3 * b + i}_1" for b in (0, 1) for i in (0, 1, 2)}
    known["mid_block.attentions.0"] = "middle_block_1"
    for ours, theirs in known.items():
        name = layout.single_file_name("unet", f"{ours}.{inside}", UNET_OF_SDXL)
        assert "lora_unet_" + name.replace(".", "_") == f"lora_unet_{theirs}_transformer_blocks_0_attn1_to_out_0"


class UNET_OF_SDXL:
    layers_per_block = 2


def test_half_precision_in_a_file_is_read_as_float32(fresh, pairs, tmp_path):
    save_file({k: t.bfloat16() for k, t in written(pairs, *SPELLINGS["diffusers"]).items()}, tmp_path / "a.safetensors")
    sdxl = fresh()
    rounded = {layer: tuple(t.bfloat16().float() for t in pair) for layer, pair in pairs.items()}
    equal(adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "a.safetensors")), rounded)


def test_files_come_beside_each_other_whatever_their_headers_say(fresh, pairs, tmp_path):
    sdxl = fresh()
    alchemy.add_lora(sdxl, RANK)
    for name in ("my.dog", "keys", "default"):  # dots, a dict's own words: no names for a module
        alchemy.save_lora(sdxl, tmp_path / f"{name}.safetensors", facts={"name": name})
    names = [alchemy.load_lora(sdxl, tmp_path / f"{name}.safetensors", 0.5) for name in ("my.dog", "keys", "default", "default")]
    assert len({*names, "default"}) == 5 and set(lora.names(sdxl.unet)) == {*names, "default"}
    assert alchemy.load_lora(sdxl, tmp_path / "keys.safetensors", name="mine") == "mine" in lora.names(sdxl.unet)


# Refusing

def refused_whole(sdxl, path, *words):
    line = refused(lambda: alchemy.load_lora(sdxl, path), path, *words)
    assert not lora.names(sdxl.unet)  # nothing of it was put on
    return line


def test_a_lora_of_another_base_is_refused_with_the_layer_and_both_shapes(fresh, pairs, tmp_path):
    stem, down, up = SPELLINGS["kohya, the single file's blocks"]
    last = "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k"
    wider = dict(pairs) | {last: (torch.zeros(RANK, 2048), torch.zeros(640, RANK))}
    deeper = written(wider, stem, down, up) | {"lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q" + down: torch.zeros(1)}
    save_file(deeper, tmp_path / "a.safetensors")
    sdxl = fresh()
    refused_whole(sdxl, tmp_path / "a.safetensors", "another base", last, "(12, 20)", "(640, 2048)", sdxl.source)


@pytest.mark.parametrize("key", ["lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", "what.ever",
                                 "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.dora_scale",
                                 "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight"])
def test_a_key_that_matches_nothing_is_named_and_nothing_is_put_on(fresh, pairs, tmp_path, key):
    tensors = written(pairs, *SPELLINGS["kohya, the single file's blocks"])
    save_file(tensors | {key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    refused_whole(fresh(), tmp_path / "a.safetensors", f"1 of its {len(tensors) + 1} keys", key)


def test_half_a_pair_a_layer_twice_and_an_alpha_of_many_are_refused(fresh, pairs, tmp_path):
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    one, path, sdxl = {name: pairs[name]}, tmp_path / "a.safetensors", fresh()
    stem, down, up = SPELLINGS["kohya, diffusers' blocks"]
    whole = written(one, stem, down, up)
    for spoiled, word in (({k: t for k, t in whole.items() if not k.endswith(up)}, stem(name) + down),
                          (whole | written(one, *SPELLINGS["diffusers"]), name), (whole | {stem(name) + ".alpha": torch.ones(2)}, stem(name) + ".alpha"),
                          ({}, "empty")):
        save_file(spoiled, path)
        refused_whole(sdxl, path, word)
    for a, b in ((torch.ones(2, 16), torch.ones(16, 3)), (torch.ones(16), torch.ones(16)), (torch.ones(2, 16, 1, 1), torch.ones(16, 2, 1, 1))):
        save_file(whole | {stem(name) + down: a, stem(name) + up: b}, path)
        refused_whole(sdxl, path, name, tuple(a.shape), tuple(b.shape))


# Writing

def random_adapter(sdxl, alpha=ALPHA):
    alchemy.add_lora(sdxl, RANK, alpha)
    for i, layer in enumerate(lora.attention_layers(sdxl.unet).values()):
        layer.lora["default"].up.data = torch.randn(layer.out_features, RANK, generator=torch.Generator().manual_seed(i))
    return {layer: pair[:2] for layer, pair in adapter(sdxl, "default").items()}


def test_kohyas_format_is_read_back_to_the_bit(fresh, tmp_path):
    sdxl, other = fresh(), fresh()
    pairs = random_adapter(sdxl)
    alchemy.save_lora(sdxl, tmp_path / "a.safetensors")
    equal(adapter(other, alchemy.load_lora(other, tmp_path / "a.safetensors")), pairs)
    # And under exactly these names:
    assert load_file(tmp_path / "a.safetensors").keys() == written(pairs, *SPELLINGS["kohya, the single file's blocks"]).keys()


def test_diffusers_format_is_read_back_to_the_bit_with_alpha_multiplied_into_up(fresh, tmp_path):
    sdxl, other = fresh(), fresh()
    pairs = random_adapter(sdxl)
    alchemy.save_lora(sdxl, tmp_path / "a.safetensors", format="diffusers")
    expected = {layer: (down, up * (ALPHA / RANK)) for layer, (down, up) in pairs.items()}
    equal(adapter(other, alchemy.load_lora(other, tmp_path / "a.safetensors")), expected, alpha=float(RANK))
    assert load_file(tmp_path / "a.safetensors").keys() == written(pairs, *SPELLINGS["diffusers"], alpha=False).keys()
    alchemy.save_lora(other, tmp_path / "b.safetensors", name=lora.names(other.unet)[0], format="diffusers")
    assert load_file(tmp_path / "b.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()


def test_the_header_holds_the_facts_and_what_other_tools_show(fresh, tmp_path):
    sdxl = fresh()
    random_adapter(sdxl)
    for form in ("kohya", "diffusers"):
        alchemy.save_lora(sdxl, tmp_path / "a.safetensors", format=form, facts={"prompt": "a photo of a sks dog", "steps": 12, "targets": ["to_q"]})
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert file.metadata() == {
                "alchemy.prompt": "a photo of a sks dog", "alchemy.steps": "12", "alchemy.targets": '["to_q"]', "alchemy.rank": "2", "alchemy.alpha": "3.0",
                "ss_network_dim": "2", "ss_network_alpha": "3.0", "ss_base_model_version": "sdxl_base_v1-0", "format": "pt"}


def test_only_what_is_there_is_saved_in_a_format_that_is_known(fresh, tmp_path):
    sdxl = fresh()
    random_adapter(sdxl)
    refused(lambda: alchemy.save_lora(sdxl, tmp_path / "a.safetensors", name="other"), "'other'")
    refused(lambda: alchemy.save_lora(sdxl, tmp_path / "a.safetensors", format="comfy"), "'comfy'", "kohya, diffusers")
    assert not list(Path(tmp_path).iterdir())
