"""The UNet against diffusers (tests/reference/unet_a, unet_b): odd sides, odd batch, heads that differ per level, depths 1/1/3."""

import math

import pytest
import torch

from alchemy.unet import UNet, UNetConfig, timestep_embedding

NAMES, CALLS = ("unet_a", "unet_b"), (0, 1, 2)
ORDER = ("latents", "t", "context", "pooled", "time_ids")


def inputs(stored, call, dtype=torch.float64):
    given = stored.group(f"inputs/{call}/")
    return [
        given[name].to(dtype if name in ("latents", "context", "pooled") else given[name].dtype)
        for name in ORDER
    ]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NAMES)
def test_prediction_in_float64(name, call, reference, network, close, exact):
    stored = reference(name)
    close(network(name)(*inputs(stored, call)), stored[f"outputs/{call}"], exact)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_to_3e_6(name, call, reference, network, close):
    stored = reference(name)
    close(
        network(name, torch.float32)(*inputs(stored, call, torch.float32)),
        stored[f"outputs/{call}"],
        3e-6,
    )


@pytest.mark.parametrize("call", CALLS)
def test_sinusoids_are_those_of_the_reference_to_the_last_bit_or_so(call, reference):
    stored = reference("unet_a")
    for key, dim in (("t", 12), ("time_ids", 6)):
        ours = timestep_embedding(stored[f"inputs/{call}/{key}"].flatten(), dim)
        assert (
            ours.dtype == torch.float32
            and (ours - stored[f"sinusoid/{call}/{key}"]).abs().max() < 2e-7
        )


def test_sinusoid_is_cosines_then_sines_by_hand():
    got = timestep_embedding(torch.tensor([7.0]), 6)[0].tolist()
    angles = [7 * 10000 ** (-k / 3) for k in range(3)]
    assert got == pytest.approx(
        [math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-6
    )


def test_a_number_for_t_holds_for_the_whole_batch(reference, network):
    net, (latents, _, *told) = network("unet_a"), inputs(reference("unet_a"), 0)
    assert torch.equal(net(latents, 481, *told), net(latents, torch.tensor([481.0] * 3), *told))


def test_images_of_a_batch_do_not_see_each_other(reference, network, close):
    net, given = network("unet_a"), inputs(reference("unet_a"), 0)
    close(net(*(part[1:2] for part in given)), net(*given)[1:2], 1e-12)


def test_t_and_time_ids_stay_float32_on_a_half_network(reference, network):
    net, (latents, _, context, pooled, _) = (
        network("unet_a", torch.bfloat16),
        inputs(reference("unet_a"), 0, torch.float32),
    )
    t, sizes, seen = (
        torch.tensor([965.55, 999.0, 501.0]),
        torch.tensor([[833.0, 1217, 15, 33, 2047, 1023]]).repeat(3, 1),
        {},
    )
    for name in ("time_embedding", "add_embedding"):
        net.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
    out = net(latents, t, context, pooled, sizes)
    assert torch.equal(seen["time_embedding"], timestep_embedding(t, 12).bfloat16())
    assert torch.equal(
        seen["add_embedding"][:, 10:], timestep_embedding(sizes.flatten(), 6).view(3, 36).bfloat16()
    )
    assert out.dtype == torch.float32  # the caller's, so that the sampler computes in it


def test_pooled_stands_before_the_sizes(reference, network):
    net, given, seen = network("unet_b"), inputs(reference("unet_b"), 1), []
    net.add_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(*given)
    assert torch.equal(seen[0][:, :10], given[3])


def test_checkpointing_changes_neither_output_nor_gradient(reference, network):
    net, (latents, *told) = network("unet_a"), inputs(reference("unet_a"), 0)
    results = []
    for net.checkpointing in (False, True):
        x = latents.clone().requires_grad_()
        out = net(x, *told)
        results.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_single_number_in_the_configuration_holds_for_each_level():
    config = UNetConfig.from_config({"transformer_layers_per_block": 2, "attention_head_dim": 8})
    assert config.transformer_layers_per_block == (2, 2, 2) and config.attention_head_dim == (
        8,
        8,
        8,
    )


def test_the_configuration_is_sdxls_by_default():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet().parameters()) == 2_567_463_684
