"""Which blocks are compiled, when, and what is said of it; no compiler runs."""

import pytest
import torch

from alchemy import attention
from alchemy.extras import optimizations
from alchemy.blocks import ResnetBlock
from alchemy.extras.compile import missing, report_compile_time
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import call, good, lora_file, photos, quick, refused, tiny  # noqa: F401
from test_optimizations import inputs  # noqa: F401


@pytest.fixture
def ran(monkeypatch):
    """A list of the blocks that ran as compiled ones."""
    blocks = []

    def compile(function, **_):
        return lambda block, *given: blocks.append(block) or function(block, *given)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr("alchemy.extras.compile.missing", lambda device: None)
    return blocks


def test_each_kind_of_block_is_compiled_and_one_that_is_watched_runs_as_it_is_written(
    network, inputs, ran
):
    net, given, name = (
        network("unet_a", torch.float32),
        inputs(),
        "mid_block.attentions.0.transformer_blocks.2.attn1",
    )
    blocks = {m for m in net.modules() if isinstance(m, (attention.TransformerBlock, ResnetBlock))}
    with torch.no_grad():
        expected = net(*given)
        optimizations.compile_blocks(net)
        assert torch._dynamo.config.optimize_ddp is False
        assert torch.equal(net(*given), expected) and set(ran) == blocks
        ran.clear()
        with attention.record_attention(net, [name], lambda name, p: None):
            assert torch.equal(net(*given), expected)
    assert blocks - set(ran) == {net.get_submodule(name.rpartition(".")[0])}


def test_without_a_compiler_there_is_one_line(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    refused(
        call("sample.py", "a dog", "--weights", tiny, "--compile"),
        "--compile needs a C++ compiler",
        "leave out --compile",
    )
    assert "triton" in missing(torch.device("cuda"))


def test_how_long_compiling_took_is_told_by_the_first_step_and_only_then(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr("alchemy.extras.compile.time.perf_counter", lambda: now[0])

    def steps(*seconds):
        for s in seconds:
            now[0] += s
            yield s

    assert list(report_compile_time(steps(41.5, 0.5, 0.5, 0.7), said.append)) == [41.5, 0.5, 0.5, 0.7]
    assert said == ["compiled in 41 s: the first step took 41.5 s, the others 0.5 s"]
    list(report_compile_time(steps(0.6, 0.5), said.append)), list(report_compile_time(steps(9.0), said.append))
    assert len(said) == 1


@pytest.mark.parametrize(
    "script, argv",
    [
        ("sample.py", ("a dog",)),
        ("insert.py", ("a dog", "--class-word", "dog", "--token", "sks", "--threshold", 0.7)),
        ("train.py", ("--class-word", "dog", "--rank", 2, "--preview-every", 0, "--size", 16)),
    ],
)
def test_the_scripts_compile_what_they_run(tiny, lora_file, ran, tmp_path, script, argv):
    argv = (
        (photos(tmp_path / "photos"), *argv, "--out", "run")
        if script == "train.py"
        else (*argv, "--lora", lora_file)
    )
    good(call(script, *argv, "--weights", tiny, "--steps", 2, "--compile"))
    assert len(set(ran)) > 10
    ran.clear()
    good(
        call(
            script,
            *argv,
            "--weights",
            tiny,
            "--steps",
            2,
            *(("--overwrite",) if script == "train.py" else ()),
        )
    )
    assert not ran
