"""From prompts to Conditioning, with the reference encoders; Conditioning; repr."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import vocabulary_read_once, write_folder  # noqa: F401

import alchemy
from alchemy.sdxl import SDXL, Conditioning

NETWORKS = {"text_encoder": "text_1", "text_encoder_2": "text_2"}


class Rows:
    """A tokenizer for which a prompt is the number of a row of the reference; "" is row 4."""

    def __init__(self, ids):
        self.ids = ids.tolist()

    def __call__(self, prompt):
        return self.ids[int(prompt or 4)]

    def truncated_text(self, prompt):
        return ""


@pytest.fixture
def sdxl(reference, network):
    """A checkpoint with the two reference encoders."""
    configs = {
        "unet": SimpleNamespace(sample_size=16),
        "vae": SimpleNamespace(block_out_channels=(1, 1, 1)),
    }
    return SDXL(
        "stub",
        lambda name, dtype: network(NETWORKS[name], dtype),
        configs,
        [Rows(reference(name)["inputs/ids"]) for name in NETWORKS.values()],
        None,
        torch.device("cpu"),
        torch.float64,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole checkpoint with the real vocabulary."""
    return alchemy.load(write_folder(tmp_path_factory.mktemp("checkpoint")), "cpu", torch.float64)


def test_context_is_both_hidden_states_and_pooled_is_the_second_encoders(sdxl, reference, close):
    made = sdxl.encode_prompt(["1", "2"])
    hidden = [reference(name)["outputs/hidden"][1:3] for name in NETWORKS.values()]
    close(made.context, torch.cat(hidden, dim=-1), 1e-9)
    close(made.pooled, reference("text_2")["outputs/pooled"][1:3], 1e-9)


def test_each_tokenizer_feeds_its_own_encoder(tiny):
    made = tiny.encode_prompt(["a dog"])
    ids = [torch.tensor([tokenizer("a dog")]) for tokenizer in tiny.tokenizers]
    assert not torch.equal(*ids)  # they pad differently
    outputs = [encoder(i)[0] for encoder, i in zip(tiny.text_encoders, ids, strict=True)]
    assert torch.equal(made.context, torch.cat(outputs, dim=-1))


def test_none_is_zeros_or_the_empty_prompt_as_the_checkpoint_says(sdxl, reference, close):
    made = sdxl.encode_prompt([None, "", "1"])
    assert not made.context[0].any() and not made.pooled[0].any()
    assert torch.equal(made.time_ids[0], made.time_ids[1])
    close(made.pooled[1:], reference("text_2")["outputs/pooled"][[4, 1]], 1e-9)
    close(made.context[1:, :, :6], reference("text_1")["outputs/hidden"][[4, 1]], 1e-9)
    sdxl.zeros_for_none = False
    again = sdxl.encode_prompt([None, "", "1"])
    close(again.context[0], made.context[1], 1e-12)
    close(again.pooled[0], made.pooled[1], 1e-12)


def test_a_batch_of_prompts_equals_the_single_ones(tiny):
    prompts = ["a photo of a dog", None, "", "a very long walk on a very long beach, " * 3, "x"]
    together = tiny.encode_prompt(prompts)
    alone = Conditioning.cat([tiny.encode_prompt([prompt]) for prompt in prompts])
    for a, b in zip(together.parts(), alone.parts(), strict=True):
        assert a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_long_prompt_is_cut_with_a_warning_that_quotes_the_rest(tiny):
    with pytest.warns(UserWarning, match="these words are cut off: 'zebra quartz'"):
        cut = tiny.encode_prompt(["word " * 75 + "zebra quartz"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = tiny.encode_prompt(["word " * 75])
    assert torch.equal(cut.context, fits.context) and torch.equal(cut.pooled, fits.pooled)


@pytest.mark.parametrize(
    "size, expected", [((96, 128), [96, 128, 0, 0, 96, 128]), (None, [64, 64, 0, 0, 64, 64])]
)
def test_time_ids_are_original_crop_target_height_first_float32(sdxl, size, expected):
    made = sdxl.encode_prompt(["1", "2"], size)
    assert made.time_ids.tolist() == [expected] * 2
    moved = made.at_size((833, 1217), original=(2047, 3001), crop=(5, 7))
    assert moved.time_ids.tolist() == [[2047, 3001, 5, 7, 833, 1217]] * 2  # bfloat16 rounds these
    assert moved.time_ids.dtype == made.time_ids.dtype == torch.float32
    assert moved.context is made.context and moved.pooled is made.pooled


@pytest.mark.parametrize(
    "encoder, parameter, named",
    [
        (0, "text_model.encoder.layers.0.mlp.fc1.weight", "first text encoder's context"),
        (1, "text_model.encoder.layers.0.mlp.fc1.weight", "second text encoder's context"),
        (1, "text_projection.weight", "pooled vector"),
    ],
)
def test_what_became_nan_is_named(sdxl, encoder, parameter, named):
    sdxl.text_encoders[encoder].get_parameter(parameter)[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=f"{named}.*--dtype"):
        sdxl.encode_prompt(["1"])


def test_repr_names_checkpoint_dtype_device_networks_and_loras(tiny):
    tiny.free("vae")
    alchemy.add_lora(tiny, 2, name="panda")
    assert repr(tiny).startswith(f"SDXL({tiny.source!r}, float64 on cpu; networks in memory: ")
    assert "unet" in repr(tiny) and "vae" not in repr(tiny) and "LoRAs: panda" in repr(tiny)


@pytest.mark.parametrize("prompts", ["a dog", [["a dog"]], [5]])
def test_what_is_not_a_list_of_prompts_is_refused(tiny, prompts):
    with pytest.raises(ValueError, match="prompt"):
        tiny.encode_prompt(prompts)
