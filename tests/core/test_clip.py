"""Both text encoders against transformers (tests/reference/text_1, text_2)."""

import pytest
import torch

from alchemy.clip import TextConfig

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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 3e-6)])
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_the_penultimate_ones(name, dtype, tolerance, reference, network, close):
    stored = reference(name)
    hidden, pooled = network(name, dtype)(stored["inputs/ids"])
    close(hidden, stored["outputs/hidden"], tolerance)
    assert (pooled is None) == (name == "text_1")


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_pooled_is_the_projected_state_at_the_first_eos(row, reference, network, close):
    stored = reference("text_2")
    _, pooled = network("text_2")(stored["inputs/ids"][row : row + 1])
    close(pooled, stored["outputs/pooled"][row : row + 1], 1e-9)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="hidden_act"):
        TextConfig.from_config({"hidden_act": "relu"})
