"""What is not finite is named where it first shows: no black picture, and nothing taught of it."""

import pytest
import torch

import alchemy
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import tiny  # noqa: F401


def spoil(network, name, value=float("nan")):
    weight = network.get_parameter(name).data
    weight[(0,) * weight.ndim] = value


@pytest.mark.parametrize("encoder", [0, 1])
def test_a_prompt_whose_encoding_is_not_finite_is_named(tiny, encoder):
    sdxl = alchemy.load(tiny, "cpu")
    spoil(sdxl.text_encoders[encoder], "text_model.encoder.layers.0.mlp.fc1.weight", float("inf"))
    with pytest.raises(
        FloatingPointError,
        match=f"the {('first', 'second')[encoder]} text encoder's context.*NaN or infinite.*--dtype",
    ):
        sdxl.encode_prompt(["a dog"])


def test_a_pooled_vector_that_is_not_finite_is_named(tiny):
    sdxl = alchemy.load(tiny, "cpu")
    spoil(sdxl.text_encoders[1], "text_projection.weight")
    with pytest.raises(FloatingPointError, match="pooled vector"):
        sdxl.encode_prompt(["a dog"])


def test_a_photo_that_the_vae_encodes_to_nan_is_named(tiny):
    sdxl = alchemy.load(tiny, "cpu")
    spoil(sdxl.vae, "encoder.conv_in.weight")
    with pytest.raises(FloatingPointError, match="VAE encoded to NaN.*bfloat16 or float32"):
        sdxl.vae.encode(torch.zeros(1, 3, 16, 16))
