"""Damaged files of every kind are read or refused in one line: no traceback, no endless work.

ALCHEMY_FUZZ=500 runs 500 cases of each kind.
"""

import json
import random
import shutil

import pytest
import torch
from helpers import fuzzing
from helpers.checkpoints import SHIPPED, vocabulary_read_once, write_folder  # noqa: F401
from helpers.spellings import SPELLINGS, written
from safetensors.torch import save

import alchemy
from alchemy import lora
from alchemy.formats.embeddings import read_embedding
from alchemy.formats.lora import read_lora
from alchemy.tokenizer import Tokenizer

CONFIG_FILES = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
)
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
METADATA = {
    "unet.lora_alpha": 2,
    "unet.alpha_pattern": {"attn1.to_q": 3, "mid_block.*to_k": 1.5},
    "unet.use_rslora": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def networks(folder):
    sdxl = alchemy.load(folder, "cpu")
    return {name: sdxl.network(name) for name in ("unet", "text_encoder", "text_encoder_2")}


def lora_tensors(networks):
    """A LoRA in kohya's names with one layer of every other kind of update."""
    pairs = {}
    for name in list(lora.layers(networks["unet"]))[:6]:
        shape = networks["unet"].get_submodule(name).weight.shape
        up = torch.ones(shape[0], 2, *[1] * (len(shape) - 2))
        pairs["unet." + name] = torch.ones(2, *shape[1:]), up
    tensors = written(pairs, *SPELLINGS["kohya, diffusers' blocks"])
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
    for n in "12":
        tensors[f"{stem}attn2_to_q.hada_w{n}_a"] = torch.ones(16, 2)
        tensors[f"{stem}attn2_to_q.hada_w{n}_b"] = torch.ones(2, 16)
        tensors[f"{stem}attn1_to_k.lokr_w{n}"] = torch.ones(4, 4)
    tensors[f"{stem}attn1_to_v.diff"] = torch.ones(16, 16)
    return tensors


def test_damaged_lora_files(networks, tmp_path):
    content = save(lora_tensors(networks))
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert len(read_lora(path, networks, "base")) >= 8
    results = set()
    for seed, damaged in fuzzing.spoiled(content, fuzzing.spoil_bytes):
        path.write_bytes(damaged)
        results.add(fuzzing.outcome(lambda: read_lora(path, networks, "base"), f"seed {seed}"))
    assert False in results


def random_tensor(rng):
    shape = [rng.choice((0, 1, 2, 3, 4, 12, 16)) for _ in range(rng.randint(0, 5))]
    kind = rng.choice((torch.float32, torch.float16, torch.int32, torch.bool, torch.complex64))
    tensor = torch.ones(shape).to(kind)
    return tensor * float("nan") if kind == torch.float32 and rng.random() < 0.2 else tensor


def test_lora_files_with_any_tensor_in_place_of_one(networks, tmp_path):
    tensors, path = lora_tensors(networks), tmp_path / "a.safetensors"
    for seed in range(2 * fuzzing.CASES):
        rng = random.Random(seed)
        key = rng.choice(list(tensors))
        path.write_bytes(save(tensors | {key: random_tensor(rng)}))
        fuzzing.outcome(lambda: read_lora(path, networks, "base"), f"seed {seed}, {key}")


def test_lora_files_with_a_damaged_header_of_peft(networks, tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(2, 16)}
    tensors[f"{LAYER}.lora_B.weight"] = torch.ones(16, 2)
    content = json.dumps(METADATA).encode()
    for seed, damaged in fuzzing.spoiled(content, fuzzing.spoil_json):
        text = damaged.decode("utf-8", "replace")
        path.write_bytes(save(tensors, {"lora_adapter_metadata": text}))
        fuzzing.outcome(lambda: read_lora(path, networks, "base"), f"seed {seed}: {text[:200]}")


def test_damaged_embeddings(tmp_path):
    path = tmp_path / "a.safetensors"
    content = save({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 12)})
    results = set()
    for seed, damaged in fuzzing.spoiled(content, fuzzing.spoil_bytes):
        path.write_bytes(damaged)
        results.add(fuzzing.outcome(lambda: read_embedding(path), f"seed {seed}"))
    for seed in range(fuzzing.CASES):
        rng = random.Random(seed)
        path.write_bytes(save({"clip_l": random_tensor(rng), "clip_g": random_tensor(rng)}))
        results.add(fuzzing.outcome(lambda: read_embedding(path), f"tensors of seed {seed}"))
    assert False in results


@pytest.mark.parametrize("file", CONFIG_FILES)
def test_damaged_configurations(folder, tmp_path, file):
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = (folder / file).read_bytes()

    def use():
        sdxl = alchemy.load(copy, "cpu")
        for name in sdxl.configs:
            sdxl.network(name)
        # What was accepted works.
        latents = torch.zeros(1, 4, 8, 8)
        sdxl.schedule.timesteps(4)
        sdxl.unet(latents, 10, *sdxl.encode_prompt(["a dog"]).parts())

    results = set()
    for seed, damaged in fuzzing.spoiled(content, fuzzing.spoil_json):
        (copy / file).write_bytes(damaged)
        results.add(fuzzing.outcome(use, f"seed {seed}: {damaged[:300]!r}"))
    assert results == {True, False}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_damaged_small_tokenizer_files(tmp_path, file):
    copy = shutil.copytree(SHIPPED / "tokenizer", tmp_path / "tokenizer")
    content = (copy / file).read_bytes()
    for seed, damaged in fuzzing.spoiled(content, fuzzing.spoil_json, fuzzing.CASES // 4):
        (copy / file).write_bytes(damaged)

        def use():
            assert len(Tokenizer.from_folder(copy)("a photo of a dog")) == 77

        fuzzing.outcome(use, f"seed {seed}: {damaged[:300]!r}")


@pytest.mark.parametrize("content", [b"[" * fuzzing.DEEP, b"[]", b"3", b'{"a": 1}', b"\xff"])
@pytest.mark.parametrize("file", ["vocab.json", "added_tokens.json"])
def test_a_damaged_vocabulary_is_refused(tmp_path, file, content):
    copy = shutil.copytree(SHIPPED / "tokenizer", tmp_path / "tokenizer")
    (copy / file).write_bytes(content)
    fuzzing.outcome(lambda: Tokenizer.from_folder(copy)("a dog"), f"{file}: {content[:20]!r}")
