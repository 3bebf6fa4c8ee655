"""The UNet against diffusers (unet_a, unet_b): odd sides, odd batch, heads and depths that vary."""

import pytest
import torch
from helpers.networks import unet_inputs

from alchemy.unet import UNet, UNetConfig, timestep_embedding

NAMES, CALLS = ("unet_a", "unet_b"), (0, 1, 2)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NAMES)
def test_prediction_in_float64_and_to_3e_6_in_float32(name, call, reference, network, close, exact):
    stored = reference(name)
    for dtype, tolerance in ((torch.float64, exact), (torch.float32, 3e-6)):
        net, given = network(name, dtype), unet_inputs(stored, call, dtype)
        close(net(*given), stored[f"outputs/{call}"], tolerance)


@pytest.mark.parametrize("call", CALLS)
def test_timestep_embeddings_equal_the_reference_to_float32_rounding(call, reference):
    stored = reference("unet_a")
    for key, dim in (("t", 12), ("time_ids", 6)):
        ours = timestep_embedding(stored[f"inputs/{call}/{key}"].flatten(), dim)
        assert ours.dtype == torch.float32
        assert (ours - stored[f"sinusoid/{call}/{key}"]).abs().max() < 2e-7


def test_a_number_for_t_is_for_the_whole_batch(reference, network):
    net, (latents, _, *rest) = network("unet_a"), unet_inputs(reference("unet_a"))
    assert torch.equal(net(latents, 481, *rest), net(latents, torch.tensor([481.0] * 3), *rest))


def test_samples_of_a_batch_are_independent(reference, network, close):
    net, given = network("unet_a"), unet_inputs(reference("unet_a"))
    close(net(*(part[1:2] for part in given)), net(*given)[1:2], 1e-12)


def test_t_and_time_ids_stay_float32_in_a_bfloat16_network(reference, network):
    net = network("unet_a", torch.bfloat16)
    latents, _, context, pooled, _ = unet_inputs(reference("unet_a"), 0, torch.float32)
    t = torch.tensor([965.55, 999.0, 501.0])
    sizes = torch.tensor([[833.0, 1217, 15, 33, 2047, 1023]]).repeat(3, 1)
    seen = {}
    for name in ("time_embedding", "add_embedding"):
        net.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
    out = net(latents, t, context, pooled, sizes)
    assert torch.equal(seen["time_embedding"], timestep_embedding(t, 12).bfloat16())
    assert torch.equal(seen["add_embedding"][:, :10], pooled.bfloat16())  # pooled comes first
    expected = timestep_embedding(sizes.flatten(), 6).view(3, 36).bfloat16()
    assert torch.equal(seen["add_embedding"][:, 10:], expected)
    assert out.dtype == torch.float32  # that of the latents, in which the sampler computes


def test_checkpointing_changes_neither_output_nor_gradient(reference, network):
    net, (latents, *rest) = network("unet_a"), unet_inputs(reference("unet_a"))
    results = []
    for net.checkpointing in (False, True):
        x = latents.clone().requires_grad_()
        out = net(x, *rest)
        results.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_in_place_activations_change_no_bit(reference, network):
    net, given = network("unet_a"), unet_inputs(reference("unet_a"))
    with torch.no_grad():
        in_place = net(*given)
    assert torch.equal(in_place, net(*given))


def test_a_single_number_in_the_configuration_is_for_every_level():
    config = UNetConfig.from_config({"transformer_layers_per_block": 2, "attention_head_dim": 8})
    assert config.transformer_layers_per_block == (2, 2, 2)
    assert config.attention_head_dim == (8, 8, 8)


def test_the_default_configuration_is_sdxls():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet().parameters()) == 2_567_463_684
