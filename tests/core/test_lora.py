"""LoRA against peft (tests/reference/lora: rank 4, alpha 6, on unet_a), its life cycle, and its dtypes."""

from types import SimpleNamespace

import pytest
import torch

from alchemy import lora

SCALES = (1.0, 0.7)
ORDER = ("latents", "t", "context", "pooled", "time_ids")


@pytest.fixture
def inputs(reference):
    def of(dtype=torch.float64):
        given = reference("unet_a").group("inputs/0/")
        return [
            given[k].to(dtype) if k in ("latents", "context", "pooled") else given[k] for k in ORDER
        ]

    return of


@pytest.fixture
def adapted(reference, network):
    """adapted(scale, dtype of the network, dtype of the adapter): unet_a with the reference's LoRA."""

    def make(scale, base=torch.float64, adapter=torch.float64):
        net, stored = network("unet_a", base), reference("lora")
        for name, layer in lora.attention_layers(net).items():
            down, up = (
                stored[f"lora/unet.{name}.lora.{part}.weight"].to(adapter)
                for part in ("down", "up")
            )
            lora.add_adapter(layer, "subject", down, up, float(stored.facts["alpha"]), scale)
        return net

    return make


def linear(c_in=5, c_out=7, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return lora.LoRALinear(c_in, c_out, dtype=dtype)


def pair(c_in=5, c_out=7, rank=2, seed=1):
    made = torch.Generator().manual_seed(seed)
    return (
        torch.randn(s, generator=made, dtype=torch.float64) for s in ((rank, c_in), (c_out, rank))
    )


@pytest.mark.parametrize("scale", SCALES)
def test_forward_beside_the_weight_in_float64(scale, reference, adapted, inputs, close, exact):
    close(adapted(scale)(*inputs()), reference("lora")[f"outputs/scale_{scale}"], exact)


@pytest.mark.parametrize("scale", SCALES)
def test_merged_weights_and_forward_in_float64(scale, reference, adapted, inputs, close, exact):
    net, stored = adapted(scale), reference("lora")
    lora.merge(net)
    for name, weight in stored.group(f"merged/scale_{scale}/").items():
        close(net.get_parameter(name), weight, 1e-9)
    close(net(*inputs()), stored[f"outputs/scale_{scale}"], exact)


def test_float32_agrees_to_3e_6(reference, adapted, inputs, close):
    net = adapted(1.0, torch.float32, torch.float32)
    close(net(*inputs(torch.float32)), reference("lora")["outputs/scale_1.0"], 3e-6)
    lora.merge(net)
    close(net(*inputs(torch.float32)), reference("lora")["outputs/scale_1.0"], 3e-6)


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
    assert all(
        torch.equal(net.get_parameter(name), value) for name, value in base.named_parameters()
    )
    assert torch.equal(net(*inputs(dtype)), before)


def test_merging_rounds_once_to_the_weights_dtype():
    layer, (down, up) = linear(dtype=torch.bfloat16), pair()
    before = layer.weight.detach().clone()
    lora.add_adapter(layer, "a", down.float(), up.float(), 2)
    layer.merge()
    assert torch.equal(layer.weight, (before.float() + up.float() @ down.float()).bfloat16())


def test_the_factor_is_scale_times_alpha_by_rank():
    layer, (down, up) = linear(), pair(rank=4)
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    before = layer(x)
    lora.add_adapter(layer, "a", down, up, 6, 0.5)
    assert torch.allclose(layer(x) - before, 0.5 * 6 / 4 * x @ down.T @ up.T, rtol=1e-12)
    assert torch.allclose(layer.lora["a"].delta(), 0.75 * up @ down, rtol=1e-12)


def test_several_adapters_add_each_at_its_scale(close):
    layer, x = linear(), torch.randn(3, 5, dtype=torch.float64)
    expected = layer(x)
    for name, scale in (("a", 1.0), ("b", -0.3)):
        down, up = pair(rank=3, seed=len(layer.lora))
        lora.add_adapter(layer, name, down, up, 3, scale)
        expected = expected + scale * x @ down.T @ up.T
    close(layer(x), expected, 1e-12)
    layer.merge()
    close(layer(x), expected, 1e-12)


def test_adapters_are_float32_on_a_bfloat16_base_and_learn_there(network, inputs):
    net = network("unet_a", torch.bfloat16)
    base = net(*inputs(torch.float32))
    parameters = lora.add_lora(SimpleNamespace(unet=net), rank=4)
    assert len(parameters) == 240 and all(
        p.dtype == torch.float32 and p.requires_grad for p in parameters
    )
    out = net(*inputs(torch.float32))
    assert torch.equal(out, base)  # up is zero: before the first step nothing has changed
    out.square().mean().backward()
    # what learns first is up; down's gradient is zero as long as up is
    assert all(p.grad.dtype == torch.float32 for p in parameters) and all(
        p.grad.any() for p in parameters[1::2]
    )
    assert all(p.grad is None for name, p in net.named_parameters() if ".lora." not in name)


def test_the_keys_of_the_base_stay_as_they_are(network):
    net = network("unet_a")
    keys = list(net.state_dict())
    lora.add_lora(SimpleNamespace(unet=net), rank=2, name="dog")
    assert [key for key in net.state_dict() if ".lora." not in key] == keys


def test_a_fresh_adapter_is_uniform_by_the_layers_inputs_and_the_same_for_a_seed(network):
    nets = [network("unet_a") for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1)):
        lora.add_lora(SimpleNamespace(unet=net), rank=64, seed=seed)
    one, same, other = (lora.attention_layers(net) for net in nets)
    for name, layer in one.items():
        down, bound = layer.lora["default"].down, layer.in_features**-0.5
        assert (
            0.98 * bound < down.abs().max() <= bound and abs(down.std() * 3**0.5 / bound - 1) < 0.1
        )
        assert torch.equal(down, same[name].lora["default"].down) and not torch.equal(
            down, other[name].lora["default"].down
        )
        assert layer.lora["default"].alpha == 64 and not layer.lora["default"].up.any()


def test_an_adapter_that_does_not_fit_is_refused_with_both_shapes():
    layer = linear()
    for c_in, c_out in ((6, 7), (5, 8), (7, 5)):
        with pytest.raises(ValueError, match=r"\(2, %d\).*\(7, 5\)" % c_in):
            lora.add_adapter(layer, "a", *pair(c_in, c_out), 2)
    with pytest.raises(ValueError):
        lora.add_adapter(layer, "a", torch.zeros(2, 5), torch.zeros(7, 3), 2)
    assert not layer.lora


def test_nothing_is_put_on_merged_weights():
    layer = linear()
    lora.add_adapter(layer, "a", *pair(), 2)
    layer.merge()
    with pytest.raises(ValueError, match="unmerge"):
        lora.add_adapter(layer, "b", *pair(), 2)


def test_a_name_taken_is_replaced():
    layer, x = linear(), torch.randn(3, 5, dtype=torch.float64)
    lora.add_adapter(layer, "a", *pair(seed=1), 2)
    lora.add_adapter(layer, "a", *pair(seed=2), 2)
    fresh = linear()
    lora.add_adapter(fresh, "a", *pair(seed=2), 2)
    assert len(layer.lora) == 1 and torch.equal(layer(x), fresh(x))


def test_scales_come_back_after_scaled_even_when_it_fails(adapted, network, inputs):
    net = adapted(0.7)
    before, base = net(*inputs()), network("unet_a")(*inputs())
    with pytest.raises(KeyError), lora.lora_scale(net, 0):
        assert torch.equal(net(*inputs()), base)
        raise KeyError
    assert torch.equal(net(*inputs()), before)


def test_a_rank_below_1_is_refused(network):
    with pytest.raises(ValueError, match="rank"):
        lora.add_lora(SimpleNamespace(unet=network("unet_a")), rank=0)
