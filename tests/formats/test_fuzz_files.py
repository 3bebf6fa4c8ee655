"""Damaged files of every kind are read or refused in one line: no traceback, no endless work.

ALCHEMY_FUZZ=500 runs 500 cases of each kind.
"""

import json
import random
import shutil

import pytest
import torch
from helpers import fuzzing
from helpers.checkpoints import SHIPPED
from helpers.spellings import SPELLINGS, written
from safetensors.torch import save

import alchemy
from alchemy import lora
from alchemy.formats.checkpoint import JSON_FILES
from alchemy.formats.embeddings import bundled_embeddings, read_embedding
from alchemy.formats.lora import read_lora
from alchemy.tokenizer import Tokenizer

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
METADATA = {
    "unet.lora_alpha": 2,
    "unet.alpha_pattern": {"attn1.to_q": 3, "mid_block.*to_k": 1.5},
    "unet.use_rslora": False,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.fixture(scope="module")
def networks(tiny):
    sdxl = alchemy.load(tiny, "cpu")
    return {name: sdxl.network(name) for name in ("unet", "text_encoder", "text_encoder_2")}


@pytest.fixture(scope="module")
def tensors(networks):
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


def outcomes(read, path, cases):
    """Whether each (case, content) of a file is read, or refused in one line."""
    results = set()
    for case, content in cases:
        path.write_bytes(content)
        results.add(fuzzing.outcome(read, f"{case}: {content[:300]!r}"))
    return results


def random_tensor(rng):
    shape = [rng.choice((0, 1, 2, 3, 4, 12, 16)) for _ in range(rng.randint(0, 5))]
    kind = rng.choice((torch.float32, torch.float16, torch.int32, torch.bool, torch.complex64))
    tensor = torch.ones(shape).to(kind)
    return tensor * float("nan") if kind == torch.float32 and rng.random() < 0.2 else tensor


def other_tensors(tensors, count):
    """(case, file) with any tensor in place of one."""
    for seed in fuzzing.seeds(count):
        rng = random.Random(seed)
        key = rng.choice(list(tensors))
        yield f"seed {seed}, {key}", save(tensors | {key: random_tensor(rng)})


def test_damaged_lora_files(networks, tensors, path):
    content = save(tensors)
    path.write_bytes(content)
    assert len(read_lora(path, networks, "base")) >= 8
    read = lambda: read_lora(path, networks, "base")  # noqa: E731
    assert False in outcomes(read, path, fuzzing.spoiled(content, fuzzing.spoil_bytes))
    assert False in outcomes(read, path, other_tensors(tensors, 2 * fuzzing.CASES))


def test_lora_files_with_a_damaged_header_of_peft(networks, path):
    ends = {".lora_A.weight": torch.ones(2, 16), ".lora_B.weight": torch.ones(16, 2)}
    pair = {LAYER + end: tensor for end, tensor in ends.items()}

    def cases():
        for seed, damaged in fuzzing.spoiled(json.dumps(METADATA).encode(), fuzzing.spoil_json):
            text = damaged.decode("utf-8", "replace")
            yield f"seed {seed}: {text[:200]}", save(pair, {"lora_adapter_metadata": text})

    outcomes(lambda: read_lora(path, networks, "base"), path, cases())


@pytest.mark.parametrize("prefix", ["", "bundle_emb.<dog>."])
def test_damaged_embeddings(path, prefix):
    rows = {f"{prefix}clip_l": torch.ones(2, 8), f"{prefix}clip_g": torch.ones(2, 12)}

    def read():
        return bundled_embeddings(path) if prefix else read_embedding(path)

    assert False in outcomes(read, path, fuzzing.spoiled(save(rows), fuzzing.spoil_bytes))
    assert False in outcomes(read, path, other_tensors(rows, fuzzing.CASES))


@pytest.mark.parametrize("file", JSON_FILES)
def test_damaged_configurations(copy, file):
    def use():
        sdxl = alchemy.load(copy, "cpu")
        for name in sdxl.configs:
            sdxl.network(name)
        # What was accepted works.
        latents = torch.zeros(1, 4, 8, 8)
        sdxl.schedule.timesteps(4)
        sdxl.unet(latents, 10, *sdxl.encode_prompt(["a dog"]).parts())

    cases = fuzzing.spoiled((copy / file).read_bytes(), fuzzing.spoil_json)
    assert outcomes(use, copy / file, cases) == {True, False}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_damaged_small_tokenizer_files(tmp_path, file):
    folder = shutil.copytree(SHIPPED / "tokenizer", tmp_path / "tokenizer")

    def use():
        assert len(Tokenizer.from_folder(folder)("a photo of a dog")) == 77

    content = (folder / file).read_bytes()
    cases = fuzzing.spoiled(content, fuzzing.spoil_json, fuzzing.CASES // 4)
    outcomes(use, folder / file, cases)


@pytest.mark.parametrize("content", [b"[" * fuzzing.DEEP, b"[]", b"3", b'{"a": 1}', b"\xff"])
@pytest.mark.parametrize("file", ["vocab.json", "added_tokens.json"])
def test_a_damaged_vocabulary_is_refused(tmp_path, file, content):
    folder = shutil.copytree(SHIPPED / "tokenizer", tmp_path / "tokenizer")
    (folder / file).write_bytes(content)
    fuzzing.outcome(lambda: Tokenizer.from_folder(folder)("a dog"), f"{file}: {content[:20]!r}")
