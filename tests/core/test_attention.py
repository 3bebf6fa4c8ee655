"""Attention, computed by hand and watched; what a transformer block is made of."""

import pytest
import torch
import torch.nn.functional as F

from alchemy import attention
from alchemy.blocks import ResnetBlock
from alchemy.vae import MidAttention

ORDER = ("latents", "t", "context", "pooled", "time_ids")
NAMES = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "mid_block.attentions.0.transformer_blocks.2.attn1",
)


@pytest.fixture
def call(reference, network):
    """A float64 network and its inputs."""
    given = reference("unet_a").group("inputs/0/")
    return network("unet_a"), [
        given[k].double() if k in ("latents", "context", "pooled") else given[k] for k in ORDER
    ]


def by_hand(layer, x, context):
    """Probabilities (B, heads, N, M) and result (B, N, C), one head after the other."""
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    d, probabilities, results = q.shape[-1] // layer.heads, [], []
    for i in range(layer.heads):
        part = slice(i * d, (i + 1) * d)
        probabilities.append(
            torch.einsum("bnd,bmd->bnm", q[..., part], k[..., part]).div(d**0.5).softmax(-1)
        )
        results.append(probabilities[-1] @ v[..., part])
    return torch.stack(probabilities, 1), layer.to_out[0](torch.cat(results, -1))


def make(dim=12, heads=3, context_dim=None):
    torch.manual_seed(0)
    return attention.Attention(dim, heads, context_dim).double().requires_grad_(False)


@pytest.mark.parametrize("context_dim", [None, 7])
def test_attention_is_softmax_of_q_k_by_root_d_times_v(context_dim, close):
    layer, x = make(context_dim=context_dim), torch.randn(2, 6, 12, dtype=torch.float64)
    context = torch.randn(2, 4, context_dim, dtype=torch.float64) if context_dim else None
    close(
        layer(x, None if context is None else layer.project_kv(context)),
        by_hand(layer, x, x if context is None else context)[1],
        1e-12,
    )


def test_watch_gives_the_probabilities_of_the_layers_asked_for(call, close):
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
        x = inputs[name]
        context = given[2] if name.endswith("attn2") else x
        assert (
            p.shape == (3, net.get_submodule(name).heads, x.shape[1], context.shape[1])
            and p.dtype == torch.float32
        )
        assert torch.allclose(p.sum(-1), torch.ones(()), atol=1e-6)
        close(p, by_hand(net.get_submodule(name), x, context)[0], 1e-6)


def test_watching_changes_no_bit_and_leaves_no_trace(call):
    net, given = call
    seen, plain = [], net(*given)
    with attention.record_attention(
        net, list(attention.attentions(net)), lambda name, p: seen.append(name)
    ):
        assert torch.equal(net(*given), plain)
    count = len(seen)
    assert torch.equal(net(*given), plain) and len(seen) == count == 30
    assert all(layer.callbacks == () for layer in attention.attentions(net).values())


def test_one_watch_within_another_both_see_the_same(call):
    net, given = call
    outer, inner = [], []
    with attention.record_attention(net, NAMES, lambda name, p: outer.append((name, p))):
        with attention.record_attention(net, NAMES[:1], lambda name, p: inner.append((name, p))):
            net(*given)
        net(*given)
    assert [name for name, _ in outer] == [*NAMES, *NAMES] and [name for name, _ in inner] == [
        NAMES[0]
    ]
    assert torch.equal(outer[0][1], inner[0][1])


def test_watching_ends_when_something_fails_inside(call):
    net, _ = call
    with pytest.raises(KeyError), attention.record_attention(net, NAMES, print):
        raise KeyError
    assert all(layer.callbacks == () for layer in attention.attentions(net).values())


def test_unwatched_attention_is_one_fused_call(call, monkeypatch):
    net, given = call
    fused, calls = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *inputs: calls.append(inputs) or fused(*inputs),
    )
    monkeypatch.setattr(torch, "softmax", None)
    net(*given)
    assert len(calls) == len(attention.attentions(net)) > 0


def test_an_unknown_layer_is_refused(call):
    with pytest.raises(ValueError, match="attn3"):
        with attention.record_attention(call[0], ["mid_block.attn3"], print):
            pass


def test_attentions_are_named_in_the_order_in_which_they_run(call):
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
    assert torch.allclose(layer(x), x * 3 * x * 0.5 * (1 + torch.erf(3 * x / 2**0.5)), rtol=1e-14)


def test_a_transformer_block_is_three_residual_lines(close):
    torch.manual_seed(0)
    block = attention.TransformerBlock(8, 2, 5).double().requires_grad_(False)
    for parameter in block.parameters():
        parameter += 0.3 * torch.randn_like(parameter)  # the three norms begin alike
    x, context = torch.randn(2, 4, 8).double(), torch.randn(2, 3, 5).double()
    y = x + by_hand(block.attn1, block.norm1(x), block.norm1(x))[1]
    y = y + by_hand(block.attn2, block.norm2(y), context)[1]
    h, gate = block.ff.net[0].proj(block.norm3(y)).chunk(2, -1)
    close(block(x, block.attn2.project_kv(context)), y + block.ff.net[2](h * F.gelu(gate)), 1e-12)


def test_group_norm_eps_is_1e_6_before_a_transformer_and_in_the_vae_1e_5_in_the_unets_resnets(
    network,
):
    eps = {
        name: {m.eps for m in network(name).modules() if isinstance(m, torch.nn.GroupNorm)}
        for name in ("unet_a", "vae")
    }
    assert eps == {"unet_a": {1e-5, 1e-6}, "vae": {1e-6}}
    net = network("unet_a")
    assert {m.norm.eps for m in net.modules() if isinstance(m, attention.Transformer2D)} == {1e-6}
    assert (
        {e for m in net.modules() if isinstance(m, ResnetBlock) for e in (m.norm1.eps, m.norm2.eps)}
        == {net.conv_norm_out.eps}
        == {1e-5}
    )
    assert MidAttention(8, 4).group_norm.eps == 1e-6
