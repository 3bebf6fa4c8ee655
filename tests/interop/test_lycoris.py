"""Files that LyCORIS itself trains and saves: the same change of the UNet's output here."""

# ruff: noqa: E402, F401, F811  fixtures are imported and given as arguments
import pytest

lycoris = pytest.importorskip("lycoris")
diffusers = pytest.importorskip("diffusers")

import torch
from safetensors.torch import save_file
from test_checkpoints import built, pipe, saved
from test_lora_in_diffusers import agree, inputs, output

import alchemy

PRESET = {
    "enable_conv": True,
    "target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
}


@torch.no_grad()
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("algo", ["lora", "loha", "lokr", "full"])
def test_a_network_of_lycoris_has_the_same_output(saved, inputs, tmp_path, algo, tucker):
    unet = built().unet
    base = output(unet, *inputs)
    lycoris.LycorisNetwork.apply_preset(PRESET)
    torch.manual_seed(0)
    network = lycoris.create_lycoris(
        unet, 1.0, linear_dim=3, linear_alpha=2.0, algo=algo, use_tucker=tucker, bypass_mode=False
    )
    network.apply_to()
    for parameter in network.parameters():
        if parameter.ndim > 1:  # not the biases of a full update, which are not read here
            parameter.data += 0.05 * torch.randn_like(parameter)
    state = {key: tensor.contiguous().clone() for key, tensor in network.state_dict().items()}
    state = {key: tensor for key, tensor in state.items() if not key.endswith(".diff_b")}
    save_file(state, tmp_path / "a.safetensors")
    assert any("hada" in key for key in state) == (algo == "loha")
    sdxl = alchemy.load(saved, "cpu")
    alchemy.load_lora(sdxl, tmp_path / "a.safetensors")
    agree(sdxl.unet(*inputs), output(unet, *inputs), base)
