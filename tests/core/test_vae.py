"""The VAE against diffusers (tests/reference: vae, factor 4; vae_8, factor 8); strips."""

import pytest
import torch
from helpers.counting import peak

from alchemy import vae as vae_module
from alchemy.blocks import Downsample
from alchemy.vae import VAE, VAEConfig

NAMES = ("vae", "vae_8")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 3e-6)])
@pytest.mark.parametrize("name", NAMES)
def test_encode_and_decode_use_scaled_latents(name, dtype, tolerance, reference, network, close):
    stored, vae = reference(name), network(name, dtype)
    mean, std = vae.encode(stored["inputs/images"].to(dtype))
    for channel in range(4):  # their scales differ
        close(mean[:, channel], stored["outputs/mean_scaled"][:, channel], tolerance)
        close(std[:, channel], stored["outputs/std_scaled"][:, channel], tolerance)
    close(vae.decode(stored["inputs/latents"].to(dtype)), stored["outputs/decoded"], tolerance)


def test_log_variance_is_clamped_at_minus_30_and_20(reference, network):
    stored, vae = reference("vae"), network("vae")
    _, log_variance = vae.quant_conv(vae.encoder(stored["inputs/images"].double())).chunk(2, dim=1)
    assert log_variance[:, 0].min() < -30 < log_variance[:, 0].max()  # the reference pins it
    _, std = vae.encode(stored["inputs/images"].double())
    smallest = 0.13025 * torch.tensor(-15.0, dtype=torch.float64).exp().item()
    assert std[:, 0].min().item() == pytest.approx(smallest, rel=1e-12)

    vae.quant_conv.bias[5] = 50
    _, std = vae.encode(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    largest = 0.13025 * torch.tensor(10.0).double().exp()
    assert torch.allclose(std[:, 1], largest, rtol=1e-7)


def test_the_encoder_pads_right_and_bottom_only():
    down = Downsample(1, padding=0).double()
    torch.nn.init.zeros_(down.conv.weight)
    torch.nn.init.zeros_(down.conv.bias)
    # The kernel's first corner meets the padding only if that is left or top.
    down.conv.weight.data[0, 0, 0, 0] = 1
    image = torch.arange(1.0, 17.0, dtype=torch.float64).view(1, 1, 4, 4)
    assert torch.equal(down(image), image[:, :, ::2, ::2])


def test_nan_raises_and_names_the_dtypes_that_work(network):
    vae = network("vae")
    vae.decoder.conv_out.bias[0] = vae.encoder.conv_in.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="VAE decoded to NaN.*bfloat16 or float32"):
        vae.decode(torch.zeros(1, 4, 2, 2, dtype=torch.float64))
    with pytest.raises(FloatingPointError, match="VAE encoded to NaN.*bfloat16 or float32"):
        vae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.float64))


def test_a_bfloat16_vae_returns_float32_latents_and_images(reference, network, close):
    stored, vae = reference("vae"), network("vae", torch.bfloat16)
    mean, std = vae.encode(stored["inputs/images"])
    assert mean.dtype == std.dtype == vae.decode(mean).dtype == torch.float32
    close(mean, stored["outputs/mean_scaled"], 0.05)


def test_the_default_configuration_is_sdxls():
    config = VAEConfig.from_config({})
    assert config.scaling_factor == 0.13025 and config.force_upcast


# Strips


@pytest.mark.parametrize("pixels", [1, 24, 60, 200, 1 << 20])
@pytest.mark.parametrize("name", NAMES)
def test_strips_have_no_seams_and_agree_to_1e_12(name, pixels, network, close, monkeypatch):
    vae = network(name)
    latents = torch.randn(2, 4, 11, 6, generator=torch.Generator().manual_seed(0)).double()
    images = torch.randn(1, 3, 40, 24, generator=torch.Generator().manual_seed(1)).double()
    whole, encoded = vae.decode(latents), vae.encode(images)
    monkeypatch.setattr(vae_module, "STRIPS_ABOVE", 100)  # pixels: the coarse levels stay whole
    monkeypatch.setattr(vae_module, "STRIP_PIXELS", pixels)  # one row at least
    with torch.no_grad():
        close(vae.decode(latents), whole, 1e-12)
        for ours, theirs in zip(vae.encode(images), encoded, strict=True):
            close(ours, theirs, 1e-12)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 3e-6), (torch.bfloat16, 0.02)])
def test_strips_agree_in_lower_precision(dtype, tol, network, close, monkeypatch):
    vae = network("vae_8", dtype).to(memory_format=torch.channels_last)
    latents = torch.randn(1, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents)
    monkeypatch.setattr(vae_module, "STRIPS_ABOVE", 100)
    monkeypatch.setattr(vae_module, "STRIP_PIXELS", 300)
    with torch.no_grad():
        close(vae.decode(latents), whole, tol)


@pytest.mark.parametrize("side, gigabytes", [(1024, 1.65), (2048, 3.6)])
def test_peak_memory_of_decoding_in_bfloat16(side, gigabytes):
    with torch.device("meta"):
        vae = VAE().to(torch.bfloat16).requires_grad_(False)
        latents = torch.empty(1, 4, side // 8, side // 8)
    with torch.no_grad():
        assert peak(lambda: vae.decode(latents)) < gigabytes * 1e9
