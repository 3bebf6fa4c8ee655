"""Attention by its formula and recorded; what a transformer block consists of."""

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import unet_inputs

from alchemy import attention
from alchemy.blocks import ResnetBlock

NAMES = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.2.attn1",
)


@pytest.fixture
def call(reference, network):
    """A float64 network and its inputs."""
    return network("unet_a"), unet_inputs(reference("unet_a"))


def by_formula(layer, x, context):
    """Probabilities (B, heads, N, M) and result (B, N, C), one head after the other."""
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    d = q.shape[-1] // layer.heads
    probabilities, results = [], []
    for i in range(layer.heads):
        part = slice(i * d, (i + 1) * d)
        scores = torch.einsum("bnd,bmd->bnm", q[..., part], k[..., part]) / d**0.5
        probabilities.append(scores.softmax(-1))
        results.append(probabilities[-1] @ v[..., part])
    return torch.stack(probabilities, 1), layer.to_out[0](torch.cat(results, -1))


def test_the_callback_gets_the_probabilities_of_the_named_layers(call, close):
    net, given = call
    inputs, seen = {}, {}
    for name in NAMES:
        net.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0]})
        )
    with attention.record_attention(net, NAMES, lambda name, p: seen.update({name: p})):
        net(*given)
    assert list(seen) == list(NAMES)
    for name, p in seen.items():
        layer, x = net.get_submodule(name), inputs[name]
        context = given[2] if name.endswith("attn2") else x
        assert p.shape == (3, layer.heads, x.shape[1], context.shape[1])
        assert p.dtype == torch.float32
        assert torch.allclose(p.sum(-1), torch.ones(()), atol=1e-6)
        close(p, by_formula(layer, x, context)[0], 1e-6)


def test_recording_changes_no_bit_and_ends_with_the_context(call):
    net, given = call
    seen, plain = [], net(*given)
    known = attention.attentions(net)
    with attention.record_attention(net, known, lambda name, p: seen.append(name)):
        assert torch.equal(net(*given), plain)
    assert torch.equal(net(*given), plain) and len(seen) == 30
    with pytest.raises(KeyError), attention.record_attention(net, NAMES, print):
        raise KeyError
    assert all(layer.callbacks == () for layer in known.values())


def test_nested_recorders_both_get_the_probabilities(call):
    net, given = call
    outer, inner = [], []
    with attention.record_attention(net, NAMES, lambda name, p: outer.append((name, p))):
        with attention.record_attention(net, NAMES[:1], lambda name, p: inner.append((name, p))):
            net(*given)
        net(*given)
    assert [name for name, _ in outer] == [*NAMES, *NAMES]
    assert [name for name, _ in inner] == [NAMES[0]]
    assert torch.equal(outer[0][1], inner[0][1])


def test_attention_that_is_not_recorded_is_one_fused_call(call, monkeypatch):
    net, given = call
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *inputs: calls.append(1) or fused(*inputs)
    )
    monkeypatch.setattr(torch, "softmax", None)
    net(*given)
    assert len(calls) == len(attention.attentions(net)) > 0


def test_an_unknown_layer_is_refused(call):
    with (
        pytest.raises(ValueError, match="attn3"),
        attention.record_attention(call[0], ["mid_block.attn3"], print),
    ):
        pass


def test_attentions_are_listed_in_the_order_in_which_they_run(call):
    net, given = call
    ran = []
    for name, layer in attention.attentions(net).items():
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    net(*given)
    assert ran == list(attention.attentions(net)) and len(ran) == 30


def test_the_gate_is_the_second_half_through_the_exact_gelu():
    layer = attention.GEGLU(2, 2).double()
    layer.proj.weight.data = torch.cat([torch.eye(2), 3 * torch.eye(2)]).double()
    layer.proj.bias.data.zero_()
    x = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    expected = x * 3 * x * 0.5 * (1 + torch.erf(3 * x / 2**0.5))
    assert torch.allclose(layer(x), expected, rtol=1e-14)


def test_group_norm_eps_is_1e_5_in_the_unet_and_1e_6_in_transformers_and_the_vae(network):
    norms = torch.nn.GroupNorm
    assert {m.eps for m in network("vae").modules() if isinstance(m, norms)} == {1e-6}
    net = network("unet_a")
    assert net.conv_norm_out.eps == 1e-5
    for module in net.modules():
        if isinstance(module, attention.Transformer2D):
            assert module.norm.eps == 1e-6
        if isinstance(module, ResnetBlock):
            assert module.norm1.eps == module.norm2.eps == 1e-5
