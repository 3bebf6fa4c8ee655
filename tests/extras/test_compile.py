"""The UNet's blocks compiled: which, when, what they compute, and what is logged."""

import functools

import pytest
import torch
from helpers.networks import random_lora, unet_inputs
from helpers.running import call, good, photos, refused

from alchemy import attention, lora
from alchemy.blocks import ResnetBlock
from alchemy.extras import compile as compile_module
from alchemy.extras.compile import compile_blocks, missing, report_compile_time
from alchemy.extras.fp8 import store_fp8
from alchemy.extras.optimizations import cache_prompt_kv

ATTN1, ATTN2 = (f"mid_block.attentions.0.transformer_blocks.2.attn{n}" for n in (1, 2))
no_compiler = pytest.mark.skipif(
    missing(torch.device("cpu")) is not None, reason="there is no C++ compiler"
)


@pytest.fixture
def inputs(reference):
    return lambda: unet_inputs(reference("unet_a"), 0, torch.float32)


@pytest.fixture
def ran(monkeypatch):
    """A list of the blocks that ran compiled; no compiler runs."""
    blocks = []

    def compile(function, **_):
        return lambda block, *given: blocks.append(block) or function(block, *given)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(compile_module, "missing", lambda device: None)
    return blocks


@pytest.fixture
def traced(monkeypatch):
    """Stop behind the tracing; more variants than allowed are an error."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(compile_module, "missing", lambda device: None)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        yield
    torch._dynamo.reset()


def compile_the_middle(net):
    """Only the middle block, because each kind and size takes seconds."""
    compile_blocks(net)
    for name, module in net.named_modules():
        if not name.startswith("mid_block"):
            vars(module).pop("forward", None)


def test_all_blocks_are_compiled_except_while_attention_is_recorded(network, inputs, ran):
    net, given = network("unet_a", torch.float32), inputs()
    kinds = (attention.TransformerBlock, ResnetBlock)
    blocks = {m for m in net.modules() if isinstance(m, kinds)}
    with torch.no_grad():
        expected = net(*given)
        compile_blocks(net)
        assert torch._dynamo.config.optimize_ddp is False
        assert torch.equal(net(*given), expected) and set(ran) == blocks
        ran.clear()
        with attention.record_attention(net, [ATTN1], lambda name, p: None):
            assert torch.equal(net(*given), expected)
    assert blocks - set(ran) == {net.get_submodule(ATTN1.rpartition(".")[0])}


@no_compiler
def test_a_compiled_block_agrees_to_1e_5(network, close):
    net = network("unet_a", torch.float32)
    transformer = net.mid_block.attentions[0]
    block, x = (
        transformer.transformer_blocks[0],
        torch.randn(2, 9, transformer.proj_in.out_features),
    )
    kv = block.attn2.project_kv(torch.randn(2, 77, block.attn2.to_k.in_features))
    with torch.no_grad():
        expected = block(x, kv)
        compile_blocks(net)
        close(block(x, kv), expected, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


def test_traced_blocks_agree_with_adapters_at_any_scale_cached_and_recorded(
    network, inputs, close, traced
):
    net, given = network("unet_a", torch.float32), inputs()
    random_lora(net)

    def outputs():
        seen = []
        with torch.no_grad():
            yield net(*given)
            with lora.lora_scale(net, 0):
                yield net(*given)
            with lora.lora_scale(net, 0.3), cache_prompt_kv(net):
                yield net(*given)
                yield net(*given)
            with attention.record_attention(net, [ATTN2], lambda name, p: seen.append(p)):
                yield net(*given)
            yield seen[0]

    expected, keys = list(outputs()), list(net.state_dict())
    compile_the_middle(net)
    assert list(net.state_dict()) == keys
    for ours, theirs in zip(outputs(), expected, strict=True):
        close(ours, theirs, 1e-6)
    assert len({float(x.sum()) for x in expected[:3]}) == 3


def test_traced_blocks_give_the_same_gradients_with_checkpointing_and_fp8(network, inputs, traced):
    net, ends = network("unet_a", torch.float32), []
    parameters, net.checkpointing = random_lora(net), True
    store_fp8(net)
    for _ in range(2):
        net(*inputs()).square().mean().backward()
        ends.append([p.grad for p in parameters])
        for p in parameters:
            p.grad = None
        compile_the_middle(net)
    for a, b in zip(*ends, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() and b.norm() > 0


def test_a_missing_compiler_is_a_one_line_error(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    run = call("sample.py", "a dog", "--weights", tiny, "--compile")
    refused(run, "--compile needs a C++ compiler", "leave out --compile")
    assert "triton" in missing(torch.device("cuda"))


def test_the_compile_time_is_logged_if_the_first_step_was_slower(monkeypatch):
    now, logged = [0.0], []
    monkeypatch.setattr("alchemy.extras.compile.time.perf_counter", lambda: now[0])

    def steps(*seconds):
        for s in seconds:
            now[0] += s
            yield s

    seconds = [41.5, 0.5, 0.5, 0.7]
    assert list(report_compile_time(steps(*seconds), logged.append)) == seconds
    assert logged == ["compiled in 41 s: the first step took 41.5 s, the others 0.5 s"]
    list(report_compile_time(steps(0.6, 0.5), logged.append))
    list(report_compile_time(steps(9.0), logged.append))
    assert len(logged) == 1


@pytest.mark.parametrize(
    "script, argv",
    [
        ("sample.py", ("a dog",)),
        ("insert.py", ("a dog", "--class-word", "dog", "--token", "sks", "--threshold", 0.7)),
        ("train.py", ("--class-word", "dog", "--rank", 2, "--preview-every", 0, "--size", 16)),
    ],
)
def test_compile_compiles_in_every_script(tiny, lora_file, ran, tmp_path, script, argv):
    if script == "train.py":
        argv = (photos(tmp_path / "photos"), *argv, "--out", "run")
    else:
        argv = (*argv, "--lora", lora_file)
    good(call(script, *argv, "--weights", tiny, "--steps", 2, "--compile"))
    assert len(set(ran)) > 10
