"""LoRA against peft (tests/reference/lora: rank 4, alpha 6, on unet_a), its life cycle, dtypes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.networks import down_up, linear, random_lora, unet_inputs

import alchemy
from alchemy import lora

F64 = torch.float64
MINI = Path(__file__).resolve().parents[2] / "weights" / "mini"


@pytest.fixture
def inputs(reference):
    return lambda dtype=torch.float64: unet_inputs(reference("unet_a"), 0, dtype)


@pytest.fixture
def adapted(reference, network):
    """adapted(scale, dtype of the network, dtype of the adapter): unet_a with that LoRA."""

    def make(scale, base=torch.float64, adapter=torch.float64):
        net, stored = network("unet_a", base), reference("lora")
        alpha = float(stored.header["alpha"])
        for name, layer in lora.attention_layers(net).items():
            key = f"lora/unet.{name}.lora"
            down, up = stored[f"{key}.down.weight"], stored[f"{key}.up.weight"]
            lora.add_adapter(layer, "subject", down.to(adapter), up.to(adapter), alpha, scale)
        return net

    return make


@pytest.mark.parametrize("dtype, scale", [(F64, 1.0), (F64, 0.7), (torch.float32, 1.0)])
def test_beside_the_weights_and_merged(dtype, scale, reference, adapted, inputs, close, exact):
    tolerance = exact if dtype == F64 else 3e-6
    net, stored = adapted(scale, dtype, dtype), reference("lora")
    close(net(*inputs(dtype)), stored[f"outputs/scale_{scale}"], tolerance)
    lora.merge(net)
    for name, weight in stored.group(f"merged/scale_{scale}/").items():
        close(net.get_parameter(name), weight, tolerance)
    close(net(*inputs(dtype)), stored[f"outputs/scale_{scale}"], tolerance)


def test_the_layers_are_those_that_peft_adapts(reference, network):
    theirs = {key.split(".lora.")[0].removeprefix("lora/unet.") for key in reference("lora")}
    theirs = {key for key in theirs if "/" not in key}
    assert set(lora.attention_layers(network("unet_a"))) == theirs and len(theirs) == 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_0_is_bit_equal_to_no_adapter(dtype, network, adapted, inputs):
    base = network("unet_a", dtype)(*inputs(dtype))
    net = adapted(0.0, dtype, torch.float32)
    assert torch.equal(net(*inputs(dtype)), base)
    lora.merge(net)
    assert torch.equal(net(*inputs(dtype)), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_every_bit(dtype, network, adapted, inputs):
    net, base = adapted(1.0, dtype, torch.float32), network("unet_a", dtype)
    before = net(*inputs(dtype))
    lora.merge(net)
    assert not torch.equal(net(*inputs(dtype)), before)
    lora.unmerge(net)
    for name, value in base.named_parameters():
        assert torch.equal(net.get_parameter(name), value)
    assert torch.equal(net(*inputs(dtype)), before)


def test_merging_rounds_once_to_the_dtype_of_the_weight():
    layer, (down, up) = linear(dtype=torch.bfloat16), down_up(dtype=torch.float32)
    before = layer.weight.detach().clone()
    lora.add_adapter(layer, "a", down, up, 2)
    layer.merge()
    assert torch.equal(layer.weight, (before.float() + up @ down).bfloat16())


def test_adapters_are_summed_each_at_its_scale_times_alpha_by_rank(close):
    layer, x = linear(), torch.randn(3, 2, 5, dtype=torch.float64)
    expected = layer(x)
    for name, alpha, scale in (("a", 3, 1.0), ("b", 6, -0.3)):
        down, up = down_up(rank=4, seed=len(layer.lora))
        lora.add_adapter(layer, name, down, up, alpha, scale)
        expected = expected + scale * alpha / 4 * x @ down.T @ up.T
    close(layer(x), expected, 1e-12)
    layer.merge()
    close(layer(x), expected, 1e-12)


def test_a_new_adapter_changes_nothing_and_is_trained_in_float32(network, inputs):
    net = network("unet_a", torch.bfloat16)
    base, keys = net(*inputs(torch.float32)), list(net.state_dict())
    parameters = lora.add_lora(SimpleNamespace(unet=net), rank=4)
    assert [key for key in net.state_dict() if ".lora." not in key] == keys
    assert len(parameters) == 240
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters)
    out = net(*inputs(torch.float32))
    assert torch.equal(out, base)
    out.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in parameters)
    assert all(p.grad.any() for p in parameters[1::2])  # of up; down's is zero while up is
    assert all(p.grad is None for name, p in net.named_parameters() if ".lora." not in name)


def test_down_is_uniform_within_1_by_root_in_and_depends_on_the_seed(network):
    nets = [network("unet_a") for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        lora.add_lora(SimpleNamespace(unet=net), rank=64, seed=seed)
    one, same, other = (lora.attention_layers(net) for net in nets)
    for name, layer in one.items():
        down, bound = layer.lora["default"].down, layer.in_features**-0.5
        assert 0.98 * bound < down.abs().max() <= bound
        assert abs(down.std() * 3**0.5 / bound - 1) < 0.1
        assert torch.equal(down, same[name].lora["default"].down)
        assert not torch.equal(down, other[name].lora["default"].down)
        assert layer.lora["default"].alpha == 64 and not layer.lora["default"].up.any()


def test_an_adapter_that_does_not_fit_is_refused_with_its_shapes(network):
    layer = linear()
    for c_in, c_out in ((6, 7), (5, 8), (7, 5)):
        with pytest.raises(ValueError, match=rf"\(2, {c_in}\).*\(7, 5\)"):
            lora.add_adapter(layer, "a", *down_up(c_in, c_out), 2)
    with pytest.raises(ValueError):
        lora.add_adapter(layer, "a", torch.zeros(2, 5), torch.zeros(7, 3), 2)
    assert not layer.lora
    with pytest.raises(ValueError, match="rank"):
        lora.add_lora(SimpleNamespace(unet=network("unet_a")), rank=0)


def test_an_adapter_replaces_one_of_its_name():
    layer, fresh, x = linear(), linear(), torch.randn(3, 5, dtype=torch.float64)
    lora.add_adapter(layer, "a", *down_up(seed=1), 2)
    lora.add_adapter(layer, "a", *down_up(seed=2), 2)
    lora.add_adapter(fresh, "a", *down_up(seed=2), 2)
    assert len(layer.lora) == 1 and torch.equal(layer(x), fresh(x))


def test_lora_scale_is_restored_even_after_an_error(adapted, network, inputs):
    net = adapted(0.7)
    before, base = net(*inputs()), network("unet_a")(*inputs())
    with pytest.raises(KeyError), lora.lora_scale(net, 0):
        assert torch.equal(net(*inputs()), base)
        raise KeyError
    assert torch.equal(net(*inputs()), before)


def test_set_lora_scale_sets_all_adapters_or_those_of_a_name():
    net = torch.nn.Sequential(linear(), linear(7, 7))
    for name in ("a", "b"):
        lora.add_adapter(net[0], name, *down_up(), 2)
    lora.add_adapter(net[1], "a", *down_up(7), 2)
    lora.set_lora_scale(net, 0.5)
    lora.set_lora_scale(net, 0.25, "a")
    assert [net[0].lora[name].scale for name in "ab"] == [0.25, 0.5]
    assert net[1].lora["a"].scale == 0.25
    with pytest.raises(ValueError, match="no LoRA is called 'c'"):
        lora.set_lora_scale(net, 1.0, "c")


def test_merged_layers_take_no_adapter_and_no_scale():
    layer = linear()
    lora.add_adapter(layer, "a", *down_up(), 2)
    layer.merge()
    with pytest.raises(ValueError, match="unmerge"):
        lora.add_adapter(layer, "b", *down_up(), 2)
    with pytest.raises(ValueError, match="unmerge"), lora.lora_scale(layer, 0):
        pass


# Adapters cast once


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cast_adapters_changes_no_bit_of_output_and_gradients(network, inputs, checkpointing):
    results = []
    for cast in (False, True):
        net = network("unet_a", torch.bfloat16)
        net.checkpointing = checkpointing
        parameters = random_lora(net, 4)
        dtype = torch.bfloat16 if cast else torch.float32  # float32: nothing to cast
        for _ in range(2):  # gradients accumulate in float32
            with lora.cast_adapters(net, dtype):
                out = net(*inputs(torch.bfloat16))
                out.float().square().mean().backward()
        assert all(a.cast is None for a in lora.adapters(net))
        results.append([out, *(p.grad for p in parameters)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours.any()
    assert all(p.grad.dtype == torch.float32 for p in parameters)


def test_cast_adapters_leaves_out_adapters_without_a_gradient(network, inputs):
    net = network("unet_a", torch.bfloat16)
    parameters = random_lora(net)
    for layer in lora.attention_layers(net).values():
        down, up = down_up(layer.in_features, layer.out_features, dtype=torch.float32)
        lora.add_adapter(layer, "frozen", down, up, 2, scale=0.0)
    with lora.cast_adapters(net, torch.bfloat16):
        net(*inputs(torch.bfloat16)).float().square().mean().backward()
    assert all(p.grad is not None for p in parameters)
    assert all(a.down.grad is None for a in lora.adapters(net, "frozen"))


def test_gradients_in_bfloat16_are_within_3_percent_of_float32_on_the_miniature():
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        sdxl = alchemy.load(MINI, "cpu", dtype)
        parameters = random_lora(sdxl.unet, 4, std=0.02)
        conditioning = sdxl.encode_prompt(["a photo of a dog", "a panda"], (64, 64))
        generator = torch.Generator().manual_seed(0)
        x_t, target = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
        with lora.cast_adapters(sdxl.unet, dtype):
            out = sdxl.unet(x_t, torch.tensor([700.0, 300.0]), *conditioning.parts())
            (out - target).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    exact, rounded = gradients
    assert (rounded - exact).norm() < 0.03 * exact.norm()
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.9996
