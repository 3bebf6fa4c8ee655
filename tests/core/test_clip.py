"""Both text encoders against transformers (tests/reference/text_1, text_2), and what the UNet is told of a prompt."""

from types import SimpleNamespace

import pytest
import torch

from alchemy.sdxl import SDXL
from alchemy.clip import ACTIVATIONS, TextConfig

NAMES = ("text_1", "text_2")
ROWS = {
    "padded with 0": 0,
    "padded with EOS": 1,
    "ids above EOS": 2,
    "one such id twice": 3,
    "no word": 4,
    "no padding": 5,
    "EOS among words": 6,
}


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_the_penultimate_ones_in_float64(name, reference, network, close):
    stored = reference(name)
    hidden, _ = network(name)(stored["inputs/ids"])
    close(hidden, stored["outputs/hidden"], 1e-9)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_pooled_is_the_projected_state_at_the_first_eos(row, reference, network, close):
    stored = reference("text_2")
    _, pooled = network("text_2")(stored["inputs/ids"][row : row + 1])
    close(pooled, stored["outputs/pooled"][row : row + 1], 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_float32_agrees_to_3e_6(name, reference, network, close):
    stored = reference(name)
    hidden, pooled = network(name, torch.float32)(stored["inputs/ids"])
    close(hidden, stored["outputs/hidden"], 3e-6)
    if name == "text_2":
        close(pooled, stored["outputs/pooled"], 3e-6)


def test_the_first_encoder_has_no_pooled_vector(reference, network):
    assert network("text_1")(reference("text_1")["inputs/ids"])[1] is None


def test_a_token_does_not_see_what_follows_it(reference, network):
    ids = reference("text_2")["inputs/ids"][:1].clone()
    net = network("text_2")
    before = net(ids)[0]
    ids[0, 40:] = 321
    assert torch.equal(net(ids)[0][:, :40], before[:, :40])


def test_activations_by_hand():
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS["quick_gelu"](x), x / (1 + torch.exp(-1.702 * x)), rtol=1e-14)
    assert torch.allclose(ACTIVATIONS["gelu"](x), x * 0.5 * (1 + torch.erf(x / 2**0.5)), rtol=1e-14)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="hidden_act"):
        TextConfig.from_config({"hidden_act": "relu"})


# What the UNet is told: a checkpoint with the two reference encoders, and a tokenizer that returns rows of the reference.


class Rows:
    """A tokenizer for which a prompt is the number of a row; "" is the row without a word."""

    def __init__(self, ids):
        self.ids = ids.tolist()

    def __call__(self, prompt):
        return self.ids[int(prompt or 4)]

    def truncated_text(self, prompt):
        return "much" if prompt == "5" else ""


@pytest.fixture
def sdxl(reference, network):
    names = {"text_encoder": "text_1", "text_encoder_2": "text_2"}
    tokenizers = [Rows(reference(name)["inputs/ids"]) for name in NAMES]
    configs = {
        "unet": SimpleNamespace(sample_size=16),
        "vae": SimpleNamespace(block_out_channels=(1, 1, 1)),
    }
    return SDXL(
        "stub",
        lambda name, dtype: network(names[name], dtype),
        configs,
        tokenizers,
        None,
        torch.device("cpu"),
        torch.float64,
    )


def test_context_is_both_hidden_states_side_by_side_and_pooled_the_seconds(sdxl, reference, close):
    told, one, two = sdxl.encode_prompt(["1", "2"]), reference("text_1"), reference("text_2")
    close(
        told.context,
        torch.cat([one["outputs/hidden"][1:3], two["outputs/hidden"][1:3]], dim=-1),
        1e-9,
    )
    close(told.pooled, two["outputs/pooled"][1:3], 1e-9)


def test_time_ids_are_height_before_width_original_crop_target_in_float32(sdxl):
    told = sdxl.encode_prompt(["1", "2"], (833, 1217), original=(2047, 3001), crop=(5, 7))
    assert (
        told.time_ids.tolist() == [[2047, 3001, 5, 7, 833, 1217]] * 2
        and told.time_ids.dtype == torch.float32
    )


def test_original_size_is_the_size_unless_given_and_that_the_checkpoints(sdxl):
    assert sdxl.encode_prompt(["1"], (96, 128)).time_ids.tolist() == [[96, 128, 0, 0, 96, 128]]
    assert sdxl.encode_prompt(["1"]).time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]


def test_none_is_zeros_and_the_empty_prompt_is_encoded(sdxl, reference, close):
    told = sdxl.encode_prompt([None, "", "1"])
    assert not told.context[0].any() and not told.pooled[0].any() and told.time_ids[0].any()
    close(told.pooled[1:], reference("text_2")["outputs/pooled"][[4, 1]], 1e-9)
    close(told.context[1:, :, :6], reference("text_1")["outputs/hidden"][[4, 1]], 1e-9)


def test_none_is_encoded_too_where_the_checkpoint_says_so(sdxl, close):
    told = sdxl.encode_prompt([""])
    sdxl.zeros_for_none = False
    for ours, theirs in zip(sdxl.encode_prompt([None]).parts(), told.parts()):
        close(ours, theirs, 1e-7 if ours.dtype == torch.float32 else 1e-12)


def test_a_prompt_that_is_cut_warns_of_the_lost_words(sdxl):
    with pytest.warns(UserWarning, match="much"):
        sdxl.encode_prompt(["1", "5"])
