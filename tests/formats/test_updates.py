"""The update of a weight from each kind of LoRA file, against the formula written out."""

import json

import pytest
import torch
from helpers.checkpoints import refused
from safetensors.torch import save_file

import alchemy
from alchemy import lora

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # (16, 16)
CONV = "down_blocks.0.resnets.0.conv1"  # (8, 8, 3, 3)
RANK, ALPHA = 3, 1.5


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tucker(core, left, right):
    """core (r, s, k, k), left (r, out), right (s, in): a sum over r and s, one by one."""
    update = torch.zeros(left.shape[1], right.shape[1], *core.shape[2:])
    for r in range(len(left)):
        for s in range(len(right)):
            outer = torch.outer(left[r], right[s])
            update += outer[:, :, None, None] * core[r, s]
    return update


def kron(a, b):
    """The Kronecker product of a (m, n) and b (p, q, ...), element by element."""
    update = torch.zeros(len(a) * len(b), a.shape[1] * b.shape[1], *b.shape[2:])
    for i in range(len(a)):
        for j in range(a.shape[1]):
            rows = slice(i * len(b), (i + 1) * len(b))
            columns = slice(j * b.shape[1], (j + 1) * b.shape[1])
            update[rows, columns] = a[i, j] * b
    return update


def cases():
    """(name, layer, {part: tensor}, the expected update without alpha, the rank or None)."""
    a, b = random(16, RANK), random(RANK, 16, seed=1)
    c, d = random(16, RANK, seed=2), random(RANK, 16, seed=3)
    hada = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    yield "LoHa", LINEAR, hada, (a @ b) * (c @ d), RANK

    a, b = random(8, RANK), random(RANK, 72, seed=1)
    hada = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a + 1, "hada_w2_b": b - 1}
    product = (a @ b) * ((a + 1) @ (b - 1))
    yield "LoHa of a convolution", CONV, hada, product.view(8, 8, 3, 3), RANK

    t1, t2 = random(RANK, RANK, 3, 3), random(RANK, RANK, 3, 3, seed=1)
    a, b = random(RANK, 8), random(RANK, 8, seed=1)
    hada = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": b, "hada_w2_b": a}
    product = tucker(t1, a, b) * tucker(t2, b, a)
    yield "LoHa, Tucker", CONV, hada | {"hada_t1": t1, "hada_t2": t2}, product, RANK

    w1, w2 = random(4, 2), random(4, 8, seed=1)
    yield "LoKr", LINEAR, {"lokr_w1": w1, "lokr_w2": w2}, kron(w1, w2), None

    a, b = random(4, RANK), random(RANK, 8, seed=1)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}
    yield "LoKr, w2 a product", LINEAR, parts, kron(w1, a @ b), RANK

    c, d = random(4, 2, seed=2), random(2, 2, seed=3)
    parts = {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2": w2}
    yield "LoKr, w1 a product", LINEAR, parts, kron(c @ d, w2), 2

    parts = {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2_a": a, "lokr_w2_b": b}
    yield "LoKr, both products", LINEAR, parts, kron(c @ d, a @ b), RANK

    core, left, right = random(RANK, RANK, 3, 3), random(RANK, 4), random(RANK, 2, seed=1)
    w1 = random(2, 4)
    parts = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": left, "lokr_w2_b": right}
    yield "LoKr, Tucker", CONV, parts, kron(w1, tucker(core, left, right)), RANK

    a, b = random(4, RANK), random(RANK, 18, seed=1)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}
    yield "LoKr of a convolution", CONV, parts, kron(w1, (a @ b).view(4, 2, 3, 3)), RANK

    mid, down, up = random(RANK, 2, 3, 3), random(2, 8, 1, 1), random(8, RANK, 1, 1)
    parts = {"lora_mid.weight": mid, "lora_down.weight": down, "lora_up.weight": up}
    update = tucker(mid, up[:, :, 0, 0].T, down[:, :, 0, 0])
    yield "LoCon, Tucker", CONV, parts, update, RANK

    update = random(8, 8, 3, 3)
    yield "full, of a convolution", CONV, {"diff": update}, update, None
    yield "full", LINEAR, {"diff": random(16, 16)}, random(16, 16), None


CASES = {case[0]: case[1:] for case in cases()}


def write(path, layer, parts, alpha=ALPHA):
    stem = "lora_unet_" + layer.replace(".", "_")
    tensors = {f"{stem}.{part}": tensor.clone().contiguous() for part, tensor in parts.items()}
    save_file(tensors | {f"{stem}.alpha": torch.as_tensor(alpha)}, path)
    return path


@pytest.mark.parametrize("name", CASES)
def test_each_kind_is_its_formula_beside_the_weight_and_merged(fresh, path, name, close):
    layer, parts, update, rank = CASES[name]
    expected = 0.5 * update * (ALPHA / rank if rank else 1)
    sdxl = fresh()
    name = alchemy.load_lora(sdxl, write(path, layer, parts), 0.5)
    module = sdxl.unet.get_submodule(layer)
    close(module.lora[name].delta(), expected, 3e-6)

    x = random(2, 8, 5, 5) if update.ndim == 4 else random(2, 7, 16)
    base = module.weight.detach().clone()
    beside = module(x)
    lora.merge(sdxl)
    close(module.weight, base + expected, 3e-6)
    close(beside, module(x), 3e-6)
    lora.unmerge(sdxl)
    assert torch.equal(module.weight, base)


@pytest.mark.parametrize("name", CASES)
def test_parts_that_do_not_fit_are_refused(fresh, path, name):
    layer, parts, *_ = CASES[name]
    sdxl = fresh()
    for part in parts:
        missing = {key: tensor for key, tensor in parts.items() if key != part}
        wrong = parts | {part: torch.cat([parts[part]] * 2)}
        deeper = parts | {part: parts[part][None]}
        more = parts | {"diff": random(16, 16), "lokr_w1": random(2, 2)}
        for spoiled in (missing, wrong, deeper, more):
            if spoiled:
                write(path, layer, spoiled)
                refused(lambda: alchemy.load_lora(sdxl, path), path)
    assert not lora.adapters(sdxl)


def test_a_small_file_cannot_claim_a_huge_update(fresh, path):
    long = torch.ones(100_000, 1)
    hada = {f"hada_w{n}_a": long for n in "12"} | {f"hada_w{n}_b": long.T for n in "12"}
    lokr = {"lokr_w1_a": long, "lokr_w1_b": long.T, "lokr_w2": torch.ones(1, 1)}
    for parts in (hada, lokr, {"lokr_w1": long, "lokr_w2": long.T}):
        write(path, LINEAR, parts)
        refused(lambda: alchemy.load_lora(fresh(), path), path)


def test_an_update_of_full_rank_is_not_written_as_a_lora(fresh, path, tmp_path):
    sdxl, target = fresh(), tmp_path / "b.safetensors"
    alchemy.load_lora(sdxl, write(path, LINEAR, {"diff": random(16, 16)}), name="full")
    refused(lambda: alchemy.save_lora(sdxl, target, "full"), "full rank")
    assert not target.exists()


def alpha_of(sdxl, path):
    return sdxl.unet.get_submodule(LINEAR).lora[alchemy.load_lora(sdxl, path)].alpha


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ({"to_q": 8}, 8),  # the end of the name, after a dot
        ({"o_q": 8}, 2),  # not after a dot
        ({"attn1.to_q": 8}, 8),
        ({r"mid_block.*attn1\.to_q": 8}, 8),
        ({r"attn1\.to_[kv]": 8}, 2),
        ({"to_": 8}, 2),  # not up to the end
        ({"to_k": 4, "attn[12].to_q": 8, "to_q": 16}, 8),  # the first that matches
    ],
)
def test_alpha_pattern_holds_regular_expressions_as_in_peft(fresh, path, pattern, expected):
    metadata = json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": pattern})
    stem = f"unet.{LINEAR}"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 16)}
    tensors[f"{stem}.lora_B.weight"] = torch.ones(16, 2)
    save_file(tensors, path, {"lora_adapter_metadata": metadata})
    assert alpha_of(fresh(), path) == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bfloat16])
def test_an_alpha_of_any_real_dtype_is_read(fresh, path, dtype):
    parts = {"lora_down.weight": random(2, 16), "lora_up.weight": random(16, 2)}
    assert alpha_of(fresh(), write(path, LINEAR, parts, torch.tensor(4, dtype=dtype))) == 4
