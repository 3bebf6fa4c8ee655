"""The VAE against diffusers at factor 4 and 8 (tests/reference/vae, vae_8)."""

import pytest
import torch

from alchemy.blocks import Downsample
from alchemy.vae import VAEConfig

NAMES = ("vae", "vae_8")


def channels(tensor):
    """Channel by channel, so that a small one is not drowned by a large one."""
    return tensor.unbind(1)


@pytest.mark.parametrize("name", NAMES)
def test_encode_gives_scaled_mean_and_std_in_float64(name, reference, network, close):
    stored = reference(name)
    mean, std = network(name).encode(stored["inputs/images"].double())
    for ours, theirs in (
        (mean, stored["outputs/mean_scaled"]),
        (std, stored["outputs/std_scaled"]),
    ):
        for a, b in zip(channels(ours), channels(theirs)):
            close(a, b, 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_decode_takes_scaled_latents_in_float64(name, reference, network, close):
    stored = reference(name)
    close(network(name).decode(stored["inputs/latents"].double()), stored["outputs/decoded"], 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_to_3e_6(name, reference, network, close):
    stored, vae = reference(name), network(name, torch.float32)
    mean, std = vae.encode(stored["inputs/images"])
    close(mean, stored["outputs/mean_scaled"], 3e-6)
    close(std, stored["outputs/std_scaled"], 3e-6)
    close(vae.decode(stored["inputs/latents"]), stored["outputs/decoded"], 3e-6)


def test_scaling_factor_is_applied_once_each_way(reference, network, close):
    stored, vae = reference("vae"), network("vae")
    assert vae.config.scaling_factor == 0.13025
    mean, _ = vae.encode(stored["inputs/images"].double())
    close(mean / 0.13025, stored["outputs/mean"], 1e-9)
    latents = stored["inputs/latents"].double()
    close(vae.decoder(vae.post_quant_conv(latents / 0.13025)), stored["outputs/decoded"], 1e-9)


def test_log_variance_is_clamped_at_minus_30(reference, network, close):
    stored, vae = reference("vae"), network("vae")
    _, log_variance = vae.quant_conv(vae.encoder(stored["inputs/images"].double())).chunk(2, dim=1)
    assert (
        log_variance[:, 0].min() < -30 < log_variance[:, 0].max()
    )  # so that the reference does pin the clamp
    _, std = vae.encode(stored["inputs/images"].double())
    assert std[:, 0].min().item() == pytest.approx(
        0.13025 * torch.tensor(-15.0, dtype=torch.float64).exp().item(), rel=1e-12
    )


def test_log_variance_is_clamped_at_20(network):
    vae = network("vae")
    vae.quant_conv.bias[5] = 50
    _, std = vae.encode(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert torch.allclose(
        std[:, 1], torch.tensor(0.13025).double() * torch.tensor(10.0).double().exp(), rtol=1e-7
    )


def test_encoder_pads_right_and_bottom_only():
    down = Downsample(1, padding=0).double()
    torch.nn.init.zeros_(down.conv.weight), torch.nn.init.zeros_(down.conv.bias)
    down.conv.weight.data[0, 0, 0, 0] = (
        1  # the kernel's first corner: it sees the padding only if that is left or top
    )
    picture = torch.arange(1.0, 17.0, dtype=torch.float64).view(1, 1, 4, 4)
    assert torch.equal(down(picture), picture[:, :, ::2, ::2])


def test_what_is_not_finite_raises_and_is_not_shown(network):
    vae = network("vae")
    vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="bfloat16"):
        vae.decode(torch.zeros(1, 4, 2, 2, dtype=torch.float64))


def test_a_half_precision_vae_gives_float32_latents_and_pictures(reference, network, close):
    stored, vae = reference("vae"), network("vae", torch.bfloat16)
    mean, std = vae.encode(stored["inputs/images"])
    assert mean.dtype == std.dtype == torch.float32 and vae.decode(mean).dtype == torch.float32
    close(mean, stored["outputs/mean_scaled"], 0.05)


def test_configuration_defaults_are_sdxls():
    assert VAEConfig.from_config({}) == VAEConfig() and VAEConfig().block_out_channels == (
        128,
        256,
        512,
        512,
    )
    assert VAEConfig().scaling_factor == 0.13025 and VAEConfig().force_upcast
