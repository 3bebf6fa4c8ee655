"""Linear layers in fp8: their error, what they keep in memory, what they refuse."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import alchemy
import alchemy.formats.checkpoint
from alchemy import lora
from alchemy.extras import optimizations
from alchemy.formats.folder import save_checkpoint
from alchemy.extras import fp8
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import tiny  # noqa: F401
import saver_errors

ORDER = ("latents", "t", "context", "pooled", "time_ids")


@pytest.fixture
def inputs(reference):
    def of(dtype=torch.float32):
        given = reference("unet_a").group("inputs/0/")
        return [
            given[k].to(
                dtype if k in ("latents", "context", "pooled") else given[k].dtype, copy=True
            )
            for k in ORDER
        ]  # the reference stays

    return of


def linear(c_in=40, c_out=24, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return lora.LoRALinear(c_in, c_out, dtype=dtype).requires_grad_(False)


def pair(layer, seed=1):
    made = torch.Generator().manual_seed(seed)
    return (
        torch.randn(s, generator=made) for s in ((2, layer.in_features), (layer.out_features, 2))
    )


def adapted(net, seed=0):
    """A LoRA on a network that changes what it says; the parameters."""
    parameters = lora.add_lora(SimpleNamespace(unet=net), 2)
    for i, p in enumerate(parameters):
        p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i))
    return parameters


def test_a_weight_in_fp8_is_off_by_a_sixteenth_of_itself_at_most():
    weight = (
        torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-4, 2, 64)[:, None]
    )
    weight[5], weight[6, 3] = 0, 1e4
    packed, scale = fp8.pack(weight)
    off = (fp8.unpack(packed, scale, torch.float64) - weight.double()).abs()
    assert (
        packed.dtype == torch.float8_e4m3fn
        and scale.dtype == torch.float32
        and scale.shape == (64, 1)
    )
    # Below 2^-6 · s, where e4m3 has no exponent left, half of its least step, 2^-9, is the limit.
    assert (
        off
        <= torch.maximum(
            weight.double().abs() / 16, weight.double().abs().amax(1, keepdim=True) / 2**17
        )
    ).all()
    assert (
        (off > weight.abs() / 20).any()
        and packed.float().isfinite().all()
        and packed.float().abs().max() > 224
    )


def test_its_scales_are_powers_of_two_so_that_unpacking_rounds_nothing():
    packed, scale = fp8.pack(linear().weight)
    exact = fp8.unpack(packed, scale, torch.float64)
    assert (torch.frexp(scale)[0] == 0.5).all()
    assert all(
        torch.equal(fp8.unpack(packed, scale, dtype).double(), exact)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_layer_in_fp8_is_a_linear_layer_of_the_unpacked_weight_and_so_is_its_gradient(dtype):
    layer, x = linear(dtype=dtype), torch.randn(2, 3, 40, dtype=dtype, requires_grad=True)
    lora.add_adapter(layer, "a", *pair(layer), 2)
    before, names = layer.bias.clone(), [name for name, _ in layer.named_parameters()]
    fp8.store_fp8(layer)
    weight = fp8.weight_of(layer).to(dtype)
    theirs = layer.lora["a"].apply_to(F.linear(x, weight, before), x, layer)
    ours = layer(x)
    assert (
        torch.equal(ours, theirs)
        and torch.equal(layer.bias, before)
        and [name for name, _ in layer.named_parameters()] == names
    )
    wanted = [x, *layer.lora["a"].parameters()]
    grad = torch.randn(ours.shape, dtype=dtype)
    for a, b in zip(
        torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(theirs, wanted, grad)
    ):
        assert (
            a.dtype == b.dtype
            and (a - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()
            and b.norm() > 0
        )


def kept_for_backward(function):
    """Bytes of all that is saved for the backward pass while function runs."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
        lambda t: t,
    ):
        result = function()
    return result, sum(saved.values())


def test_training_keeps_the_packed_weights_alone():
    layer, x = linear(1000, 500), torch.randn(4, 1000, requires_grad=True)
    _, plain = kept_for_backward(lambda: layer(x))
    fp8.store_fp8(layer)
    _, packed = kept_for_backward(lambda: layer(x))
    assert plain == 4 * 500 * 1000 and packed == 500 * 1000 + 4 * 500


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_learns_on_an_fp8_base_as_on_the_unpacked_one_also_under_autocast(
    network, inputs, checkpointing
):
    ends = []
    for unpacked in (False, True):
        net = optimizations.store_fp8(network("unet_a", torch.bfloat16))
        if unpacked:
            for layer in lora.layers(net).values():
                if isinstance(layer, fp8.FP8):
                    layer.weight, layer.__class__ = (
                        torch.nn.Parameter(fp8.weight_of(layer).bfloat16(), requires_grad=False),
                        lora.LoRALinear,
                    )
        parameters, net.checkpointing = adapted(net), checkpointing
        with torch.autocast("cpu", torch.bfloat16):
            net(*inputs()).square().mean().backward()
        ends.append([p.grad for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*ends)) and all(g.any() for g in ends[0])


def test_of_the_miniatures_unet_fp8_takes_off_less_than_a_hundredth_of_its_prediction():
    off = saver_errors.fp8_errors(timesteps=(200, 981))
    assert 1e-4 < min(off.values()) and max(off.values()) < 0.01


def test_what_learns_what_is_no_linear_layer_and_what_is_stored_already_stays(network):
    net = network("unet_a", torch.float32)
    net.time_embedding.linear_1.weight.requires_grad_(True)
    optimizations.store_fp8(net)
    eighth = {name for name, p in net.named_parameters() if p.dtype == torch.float8_e4m3fn}
    linears = {
        f"{name}.weight" for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert eighth == linears - {"time_embedding.linear_1.weight"} and len(eighth) == 178
    before = {name: p for name, p in net.named_parameters()}
    optimizations.store_fp8(net)
    assert all(p is before[name] for name, p in net.named_parameters())


def test_a_network_that_is_freed_and_read_again_is_stored_again_and_never_whole_in_memory(
    tiny, monkeypatch
):
    sdxl = alchemy.load(tiny, "cpu", "float32")
    optimizations.prepare(sdxl, fp8=True)
    most, pack = [], fp8.pack
    monkeypatch.setattr(fp8, "pack", lambda weight: most.append(weight.numel()) or pack(weight))
    first = sdxl.unet
    sdxl.free("unet")
    assert sdxl.unet is not first and all(
        isinstance(m, fp8.FP8) for m in sdxl.unet.modules() if isinstance(m, torch.nn.Linear)
    )
    assert not any(
        isinstance(m, fp8.FP8) for encoder in sdxl.text_encoders for m in encoder.modules()
    )
    seen = []
    monkeypatch.setattr(
        fp8,
        "pack",
        lambda weight: (
            seen.append(
                sum(
                    p.dtype == torch.float32 and p.ndim == 2 and not p.is_meta
                    for p in sdxl.reading.parameters()
                )
            )
            or pack(weight)
        ),
    )
    build = alchemy.formats.checkpoint.empty
    monkeypatch.setattr(
        alchemy.formats.checkpoint,
        "empty",
        lambda *a: setattr(sdxl, "reading", build(*a)) or sdxl.reading,
    )
    sdxl.free("unet")
    assert (
        sdxl.unet is sdxl.reading and set(seen) == {1} and len(seen) == len(most) / 2
    )  # one matrix at a time waits to be packed


def test_an_fp8_base_refuses_to_merge_and_to_be_written(tiny, tmp_path):
    sdxl = alchemy.load(tiny, "cpu", "float32")
    optimizations.prepare(sdxl, fp8=True)
    adapted(sdxl.unet)
    before = {name: p.clone() for name, p in sdxl.unet.named_parameters()}
    with pytest.raises(ValueError, match="stored in fp8.*--fp8-base"):
        lora.merge(sdxl.unet)
    with pytest.raises(ValueError, match="stored in fp8.*checkpoint"):
        save_checkpoint(sdxl, tmp_path / "whole")
    assert not list(tmp_path.iterdir())
    assert all(
        torch.equal(p.float(), before[name].float()) for name, p in sdxl.unet.named_parameters()
    )


@pytest.mark.parametrize(
    "device, compile, capability, named",
    [
        ("mps", False, None, "mps"),
        ("cuda", True, (8, 6), "8.9"),
        ("cuda", True, (8, 9), None),
        ("cuda", False, (7, 5), None),
    ],
)
def test_a_device_that_cannot_is_named_before_anything_is_read(
    monkeypatch, device, compile, capability, named
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    sdxl = SimpleNamespace(
        device=torch.device(device), loaded={}, read=alchemy.formats.checkpoint.Reader(*[None] * 5)
    )
    if named:
        with pytest.raises(ValueError, match=f"--fp8-base.*{named}.*leave"):
            optimizations.prepare(sdxl, fp8=True, compile=compile)
    else:
        optimizations.prepare(sdxl, fp8=True, compile=compile)
    assert (sdxl.read.ready is None) == bool(named)


def test_merged_weights_are_not_stored():
    layer = linear()
    lora.add_adapter(layer, "a", *pair(layer), 2)
    layer.merge()
    with pytest.raises(ValueError, match="unmerge"):
        fp8.store_fp8(layer)
