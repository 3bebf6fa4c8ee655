"""The UNet's blocks compiled: one through the whole compiler, those in the middle as far as what is traced (the backend aot_eager)."""

import functools

import pytest
import torch

from alchemy import attention, lora
from alchemy.extras import optimizations
from alchemy.extras.compile import missing
from test_optimizations import adapted, inputs  # noqa: F401

no_compiler = pytest.mark.skipif(
    missing(torch.device("cpu")) is not None, reason="no C++ compiler here"
)


@pytest.fixture
def traced(monkeypatch):
    """Compiling stops behind what is traced; and more variants than are allowed are an error."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile, backend="aot_eager"))
    monkeypatch.setattr("alchemy.extras.compile.missing", lambda device: None)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        yield
    torch._dynamo.reset()


def compile_the_middle(net):
    """Only there, since it takes seconds for each kind and size."""
    optimizations.compile_blocks(net)
    for name, module in net.named_modules():
        if not name.startswith("mid_block"):
            vars(module).pop("forward", None)


@no_compiler
def test_a_compiled_block_agrees_with_the_one_it_is_to_1e_5(network, close):
    net = network("unet_a", torch.float32)
    block, x = (
        net.mid_block.attentions[0].transformer_blocks[0],
        torch.randn(2, 9, net.mid_block.attentions[0].proj_in.out_features),
    )
    told = block.attn2.project_kv(torch.randn(2, 77, block.attn2.to_k.in_features))
    with torch.no_grad():
        expected = block(x, told)
        optimizations.compile_blocks(net)
        close(block(x, told), expected, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


def test_what_is_traced_agrees_with_adapters_at_any_scale_once_and_where_it_is_watched(
    network, inputs, close, traced
):
    net, given, names = (
        network("unet_a", torch.float32),
        inputs(),
        ["mid_block.attentions.0.transformer_blocks.2.attn2"],
    )
    adapted(net)

    def ways():
        seen = []
        with torch.no_grad():
            yield net(*given)
            with lora.lora_scale(net, 0):
                yield net(*given)
            with lora.lora_scale(net, 0.3), optimizations.cache_prompt_kv(net):
                yield net(*given)
                yield net(*given)
            with attention.record_attention(net, names, lambda name, p: seen.append(p)):
                yield net(*given)
            yield seen[0]

    expected, keys = list(ways()), list(net.state_dict())
    compile_the_middle(net)
    assert list(net.state_dict()) == keys
    for ours, theirs in zip(ways(), expected):
        close(ours, theirs, 1e-6)
    assert len({float(x.sum()) for x in expected[:3]}) == 3


def test_what_is_traced_teaches_the_same_with_checkpointing_and_in_fp8(network, inputs, traced):
    net, ends = network("unet_a", torch.float32), []
    parameters, net.checkpointing = adapted(net), True
    optimizations.store_fp8(net)
    for _ in range(2):
        net(*inputs()).square().mean().backward()
        ends.append([p.grad for p in parameters])
        for p in parameters:
            p.grad = None
        compile_the_middle(net)
    for a, b in zip(*ends):
        assert (a - b).norm() <= 1e-5 * b.norm() and b.norm() > 0
