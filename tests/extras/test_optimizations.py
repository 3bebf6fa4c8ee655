"""fp8 weights, and what is computed once per sampling."""

from types import SimpleNamespace

import pytest
import saver_errors
import torch
import torch.nn.functional as F
from helpers.networks import down_up, linear, random_lora, unet_inputs

import alchemy
import alchemy.formats.checkpoint
from alchemy import attention, lora, pipeline
from alchemy.extras import fp8, optimizations
from alchemy.formats.saving import save_checkpoint


@pytest.fixture
def inputs(reference):
    return lambda dtype=torch.float32: unet_inputs(reference("unet_a"), 0, dtype)


def small_layer(dtype=torch.float32):
    """A linear layer with an adapter."""
    layer = linear(40, 24, dtype)
    lora.add_adapter(layer, "a", *down_up(40, 24, dtype=torch.float32), 2)
    return layer


# fp8


def test_a_weight_in_fp8_is_off_by_a_sixteenth_at_most():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 1000, generator=generator) * torch.logspace(-4, 2, 64)[:, None]
    weight[5], weight[6, 3] = 0, 1e4
    packed, scale = fp8.pack(weight)
    assert packed.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    weight = weight.double()
    off = (fp8.unpack(packed, scale, torch.float64) - weight).abs()
    # Below 2^-6 s, where e4m3 has no smaller exponent, the limit is half of its least step, 2^-9.
    least = weight.abs().amax(1, keepdim=True) / 2**17
    assert (off <= torch.maximum(weight.abs() / 16, least)).all()
    assert (off > weight.abs() / 20).any()
    assert packed.float().isfinite().all() and packed.float().abs().max() > 224


def test_scales_are_powers_of_two_so_unpacking_does_not_round():
    packed, scale = fp8.pack(linear(40, 24).weight)
    exact = fp8.unpack(packed, scale, torch.float64)
    assert (torch.frexp(scale)[0] == 0.5).all()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(fp8.unpack(packed, scale, dtype).double(), exact)


@pytest.mark.parametrize("rows", [2, 50])  # fewer than the inputs: the result is scaled, not W
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_fp8_layer_equals_the_linear_layer_of_the_unpacked_weight(dtype, rows):
    layer, x = small_layer(dtype), torch.randn(2, rows, 40, dtype=dtype, requires_grad=True)
    before, names = layer.bias.clone(), [name for name, _ in layer.named_parameters()]
    fp8.store_fp8(layer)
    assert torch.equal(layer.bias, before)
    assert [name for name, _ in layer.named_parameters()] == names
    weight = fp8.weight_of(layer).to(dtype)
    theirs = layer.lora["a"].apply_to(F.linear(x, weight, before), x, layer)
    ours = layer(x)
    assert torch.equal(ours, theirs)
    wanted = [x, *layer.lora["a"].parameters()]
    grad = torch.randn(ours.shape, dtype=dtype)
    gradients = [torch.autograd.grad(y, wanted, grad) for y in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == b.dtype and b.norm() > 0
        assert (a - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()


def test_training_keeps_only_the_packed_weights():
    layer, x = linear(1000, 500, torch.float32), torch.randn(4, 1000, requires_grad=True)

    def saved_bytes():
        saved = {}

        def note(t):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            result = layer(x)
        return sum(saved.values()), result

    plain, _ = saved_bytes()
    fp8.store_fp8(layer)
    packed, _ = saved_bytes()
    assert plain == 4 * 500 * 1000 and packed == 500 * 1000 + 4 * 500


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_on_an_fp8_base_equal_those_on_the_unpacked_one(network, inputs, checkpointing):
    ends = []
    for unpacked in (False, True):
        net = fp8.store_fp8(network("unet_a", torch.bfloat16))
        for layer in lora.layers(net).values() if unpacked else ():
            if isinstance(layer, fp8.FP8):
                weight = fp8.weight_of(layer).bfloat16()
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
                layer.__class__ = lora.LoRALinear
        parameters, net.checkpointing = random_lora(net), checkpointing
        with torch.autocast("cpu", torch.bfloat16):
            net(*inputs()).square().mean().backward()
        ends.append([p.grad for p in parameters])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b) and a.any()


def test_fp8_changes_the_miniatures_prediction_by_less_than_2_percent():
    off = saver_errors.fp8_errors(timesteps=(200, 981))
    assert min(off.values()) > 1e-4 and max(off.values()) < 0.02


def test_only_frozen_linear_layers_are_stored_and_only_once(network):
    net = network("unet_a", torch.float32)
    net.time_embedding.linear_1.weight.requires_grad_(True)
    fp8.store_fp8(net)
    stored = {name for name, p in net.named_parameters() if p.dtype == torch.float8_e4m3fn}
    linears = [name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)]
    expected = {f"{name}.weight" for name in linears} - {"time_embedding.linear_1.weight"}
    assert stored == expected and len(stored) == 178
    before = dict(net.named_parameters())
    fp8.store_fp8(net)
    assert all(p is before[name] for name, p in net.named_parameters())


def test_a_network_is_stored_as_it_is_read_and_again_when_it_is_read_again(tiny, monkeypatch):
    sdxl = alchemy.load(tiny, "cpu", "float32")
    optimizations.prepare(sdxl, fp8=True)
    built, waiting, pack = [], [], fp8.pack
    build = alchemy.formats.checkpoint.BUILD["unet"]

    def build_and_note(config):
        built.append(build(config))
        return built[-1]

    def pack_and_note(weight):
        read = [p for p in built[-1].parameters() if not p.is_meta and p.ndim == 2]
        waiting.append(sum(p.dtype == torch.float32 for p in read))
        return pack(weight)

    monkeypatch.setitem(alchemy.formats.checkpoint.BUILD, "unet", build_and_note)
    monkeypatch.setattr(fp8, "pack", pack_and_note)
    for _ in range(2):
        linears = [m for m in sdxl.unet.modules() if isinstance(m, torch.nn.Linear)]
        assert sdxl.unet is built[-1] and all(isinstance(m, fp8.FP8) for m in linears)
        sdxl.free("unet")
    assert len(waiting) == 2 * len(linears) and set(waiting) == {1}  # one matrix at a time
    for encoder in sdxl.text_encoders:
        assert not any(isinstance(m, fp8.FP8) for m in encoder.modules())


def test_an_fp8_base_refuses_to_merge_and_to_be_written(tiny, tmp_path):
    sdxl = alchemy.load(tiny, "cpu", "float32")
    optimizations.prepare(sdxl, fp8=True)
    random_lora(sdxl.unet)
    before = {name: p.clone().float() for name, p in sdxl.unet.named_parameters()}
    with pytest.raises(ValueError, match="stored in fp8.*--fp8-base"):
        lora.merge(sdxl.unet)
    with pytest.raises(ValueError, match="stored in fp8.*checkpoint"):
        save_checkpoint(sdxl, tmp_path / "whole")
    assert not list(tmp_path.iterdir())
    for name, p in sdxl.unet.named_parameters():
        assert torch.equal(p.float(), before[name])


@pytest.mark.parametrize(
    "device, compile, capability, named",
    [
        ("mps", False, None, "mps"),
        ("cuda", True, (8, 6), "8.9"),
        ("cuda", True, (8, 9), None),
        ("cuda", False, (7, 5), None),
    ],
)
def test_an_unsupported_device_is_named_early(monkeypatch, device, compile, capability, named):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    read = alchemy.formats.checkpoint.Reader(*[None] * 5)
    sdxl = SimpleNamespace(device=torch.device(device), loaded={}, read=read)
    if named:
        with pytest.raises(ValueError, match=f"--fp8-base.*{named}.*leave"):
            optimizations.prepare(sdxl, fp8=True, compile=compile)
    else:
        optimizations.prepare(sdxl, fp8=True, compile=compile)
    assert (sdxl.read.ready is None) == bool(named)


def test_merged_weights_are_not_stored():
    layer = small_layer()
    layer.merge()
    with pytest.raises(ValueError, match="unmerge"):
        fp8.store_fp8(layer)


# What is computed once per sampling


def counted(net):
    """A list that grows with each call of a cross-attention's `to_k`."""
    calls = []
    for name, layer in attention.attentions(net).items():
        if name.endswith("attn2"):
            layer.to_k.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_keys_and_values_are_computed_once_per_prompt_and_change_no_bit(network, inputs):
    net, given = network("unet_a", torch.float32), inputs()
    random_lora(net)
    other = [*given[:2], given[2] + 1, *given[3:]]
    with torch.no_grad():
        expected, of_other = net(*given), net(*other)
        calls = counted(net)
        with optimizations.cache_prompt_kv(net):
            for _ in range(3):
                assert torch.equal(net(*given), expected)
            assert len(calls) == len(set(calls)) == 15
            assert torch.equal(net(*other), of_other) and torch.equal(net(*given), expected)
            assert len(calls) == 45
        assert torch.equal(net(*given), expected) and len(calls) == 60
    assert not any("project_kv" in vars(m) for m in attention.attentions(net).values())


def test_another_scale_adapter_weight_or_value_recomputes_keys_and_values(network, inputs):
    def changes(net, parameters, given):
        yield
        parameters[11].mul_(2)  # of attn2.to_k
        yield
        with lora.lora_scale(net, 0):
            yield
        with lora.lora_scale(net, 0.5):
            yield
        for layer in lora.attention_layers(net).values():
            pair = down_up(layer.in_features, layer.out_features, dtype=torch.float32)
            lora.add_adapter(layer, "more", *pair, 2)
        yield
        given[2].add_(1)
        yield
        lora.merge(net)
        yield

    results = []
    for cached in (True, False):
        net, given = network("unet_a", torch.float32), inputs()
        parameters = random_lora(net)
        if cached:
            with torch.no_grad(), optimizations.cache_prompt_kv(net):
                results.append([net(*given).clone() for _ in changes(net, parameters, given)])
        else:
            with torch.no_grad():
                results.append([net(*given) for _ in changes(net, parameters, given)])
    assert len({float(x.sum()) for x in results[0][:6]}) == 6 and len(results[0]) == 7
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_keys_and_values_are_not_kept_while_gradients_are_wanted(network, inputs):
    net, given = network("unet_a", torch.float32), inputs()
    parameters = random_lora(net)
    net(*given).square().mean().backward()
    expected = [p.grad.clone() for p in parameters]
    with optimizations.cache_prompt_kv(net):
        with torch.no_grad():
            net(*given)
        for p in parameters:
            p.grad = None
        net(*given).square().mean().backward()
    for p, grad in zip(parameters, expected, strict=True):
        assert torch.equal(p.grad, grad)
    assert sum(grad.any() for grad in expected) > 200


def test_recorded_attention_is_the_same_with_cached_keys(network, inputs):
    net, given, seen = network("unet_a", torch.float32), inputs(), []
    names = ["mid_block.attentions.0.transformer_blocks.2.attn2"]
    with torch.no_grad(), attention.record_attention(net, names, lambda name, p: seen.append(p)):
        net(*given)
        with optimizations.cache_prompt_kv(net):
            net(*given)
            net(*given)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_steps_give_the_same_image_and_cast_adapters_once(tiny, dtype):
    sdxl = alchemy.load(tiny, "cpu", dtype)
    random_lora(sdxl.unet)
    size, options = sdxl.size, {"steps": 4}
    cond, unconditional = pipeline.encode_pair(sdxl, "a dog", None, size)
    expected = pipeline.sample(sdxl, cond, unconditional, 3, size, **options)
    calls, cast = counted(sdxl.unet), []

    def progress(steps):
        for step in optimizations.cached_steps(sdxl.unet, steps):
            cast.append({adapter.cast is not None for adapter in lora.adapters(sdxl)})
            yield step

    ours = pipeline.sample(sdxl, cond, unconditional, 3, size, progress=progress, **options)
    assert ours.tobytes() == expected.tobytes() and len(calls) == len(set(calls)) > 0
    assert cast == [{dtype == "bfloat16"}] * 4
    assert all(adapter.cast is None for adapter in lora.adapters(sdxl))
