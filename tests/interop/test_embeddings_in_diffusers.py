"""Our embeddings in diffusers, and its here: the same hidden states, from either kind of file."""

# ruff: noqa: E402, F401, F811  fixtures are imported and given as arguments
import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import built, pipe, saved

import alchemy
from alchemy.formats.__main__ import main as convert
from alchemy.formats.embeddings import (
    DIFFUSERS_FILES,
    KEYS,
    load_embedding,
    save_embedding,
)
from alchemy.methods import textual_inversion as ti

TOKEN = "<my-dog>"
PROMPT = f"a photo of a {TOKEN} on the grass"


def with_token(folder, vectors):
    """A checkpoint with a token of random rows."""
    sdxl, generator = alchemy.load(folder, "cpu"), torch.Generator().manual_seed(1)
    widths = [table.embedding_dim for table in ti.tables(sdxl)]
    ti.add_word(sdxl, TOKEN, [torch.randn(vectors, w, generator=generator) for w in widths])
    return sdxl


def both(pipe):
    encoders = pipe.text_encoder, pipe.text_encoder_2
    return list(zip(encoders, (pipe.tokenizer, pipe.tokenizer_2), strict=True))


def load_there(pipe, sources, token=None):
    """Each encoder's rows, from a tensor or a file, as the guides of diffusers do it."""
    for source, (encoder, tokenizer) in zip(sources, both(pipe), strict=True):
        options = {"text_encoder": encoder, "tokenizer": tokenizer, "local_files_only": True}
        pipe.load_textual_inversion(source, token=token, **options)


def agree(sdxl, pipe):
    # The official config's eos_token_id is 2, with which transformers pools at the highest id, now
    # that of the new token. With the true one, it pools at the end, as we do.
    pipe.text_encoder_2.text_model.eos_token_id = 49407
    context, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    ours = sdxl.encode_prompt([PROMPT], (32, 32))
    assert (ours.context - context).norm() <= 3e-6 * context.norm()
    assert (ours.pooled - pooled).norm() <= 3e-6 * pooled.norm()


@torch.no_grad()
@pytest.mark.parametrize("form", ["kohya", "diffusers", "diffusers, converted"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_our_files_give_the_same_hidden_states_there(saved, tmp_path, form, vectors):
    sdxl, theirs = with_token(saved, vectors), built()
    path = tmp_path / ("two" if form == "diffusers" else "my-dog.safetensors")
    save_embedding(sdxl, path, TOKEN, "diffusers" if form == "diffusers" else "kohya")
    if form == "diffusers, converted":
        convert([str(path), str(tmp_path / "converted"), "--to", "diffusers"])
        path = tmp_path / "converted"
    if form == "kohya":
        load_there(theirs, [load_file(path)[key] for key in KEYS], TOKEN)
    else:
        load_there(theirs, [path / name for name in DIFFUSERS_FILES])
    agree(sdxl, theirs)
    again = alchemy.load(saved, "cpu")
    assert load_embedding(again, path) == TOKEN
    agree(again, theirs)


@torch.no_grad()
@pytest.mark.parametrize("vectors", [1, 3])
def test_the_files_of_its_training_script_give_the_same_hidden_states_here(
    saved,
    tmp_path,
    vectors,
):
    theirs, words = built(), [TOKEN, *(f"{TOKEN}_{k}" for k in range(1, vectors))]
    for name, (encoder, tokenizer) in zip(DIFFUSERS_FILES, both(theirs), strict=True):
        tokenizer.add_tokens(words)
        encoder.resize_token_embeddings(len(tokenizer))
        table, ids = encoder.get_input_embeddings().weight, tokenizer.convert_tokens_to_ids(words)
        generator = torch.Generator().manual_seed(2)
        table[ids] = torch.randn(vectors, table.shape[1], generator=generator)
        rows = table[min(ids) : max(ids) + 1].detach().cpu().clone()
        save_file({TOKEN: rows}, tmp_path / name, {"format": "pt"})
    sdxl = alchemy.load(saved, "cpu")
    assert load_embedding(sdxl, tmp_path) == TOKEN
    agree(sdxl, theirs)


@torch.no_grad()
def test_its_pooled_vector_is_at_the_new_token_and_not_at_the_end(saved, tmp_path):
    sdxl, theirs, path = with_token(saved, 2), built(), tmp_path / "my-dog.safetensors"
    save_embedding(sdxl, path, TOKEN, "kohya")
    load_there(theirs, [load_file(path)[key] for key in KEYS], TOKEN)
    encoder, tokenizer = both(theirs)[1]
    assert encoder.config.eos_token_id == 2  # as in the official config
    prompt = theirs.maybe_convert_prompt(PROMPT, tokenizer)
    ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    highest, end = int(ids.argmax()), int((ids[0] == 49407).nonzero()[0])
    assert ids[0, highest] > 49407 and highest < end
    states = encoder(ids).last_hidden_state[0]
    pooled = theirs.encode_prompt(PROMPT, do_classifier_free_guidance=False)[2]
    ours = sdxl.encode_prompt([PROMPT], (32, 32)).pooled
    for position, found in ((highest, pooled), (end, ours)):
        expected = encoder.text_projection(states[position])
        assert (found[0] - expected).norm() <= 3e-6 * expected.norm()
    assert (pooled - ours).norm() > 0.1 * ours.norm()
