"""Our learned words in diffusers, and its here: the same hidden states, from either kind of file."""

import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_checkpoints import built, pipe, saved  # noqa: E402, F401

import alchemy  # noqa: E402
from alchemy.formats.__main__ import main as convert  # noqa: E402
from alchemy.formats.embeddings import DIFFUSERS_FILES, load_embedding, save_embedding  # noqa: E402
from alchemy.methods import textual_inversion as ti  # noqa: E402

TOKEN = "<my-dog>"
PROMPT = f"a photo of a {TOKEN} on the grass"


@pytest.fixture
def taught(saved):
    """taught(vectors): ours with a random word."""

    def make(vectors):
        sdxl, made = alchemy.load(saved, "cpu"), torch.Generator().manual_seed(1)
        ti.add_word(
            sdxl,
            TOKEN,
            [
                torch.randn(vectors, table.embedding_dim, generator=made)
                for table in ti.tables(sdxl)
            ],
        )
        return sdxl

    return make


def agree(sdxl, pipe):
    # The official config's eos_token_id is 2, and transformers then pools at the highest id, which is now the new word's. Told the true one, it
    # pools at the end, as we do.
    pipe.text_encoder_2.text_model.eos_token_id = 49407
    theirs, _, pooled, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    ours = sdxl.encode_prompt([PROMPT], (32, 32))
    assert (ours.context - theirs).norm() <= 3e-6 * theirs.norm() and (
        ours.pooled - pooled
    ).norm() <= 3e-6 * pooled.norm()


def both(pipe):
    return zip((pipe.text_encoder, pipe.text_encoder_2), (pipe.tokenizer, pipe.tokenizer_2))


@torch.no_grad()
@pytest.mark.parametrize("form", ["kohya", "diffusers", "diffusers, converted"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_our_files_give_the_same_hidden_states_there(saved, taught, tmp_path, form, vectors):
    sdxl, pipe, path = (
        taught(vectors),
        built(),
        tmp_path / ("two" if form == "diffusers" else "my-dog.safetensors"),
    )
    save_embedding(sdxl, path, TOKEN, "diffusers" if form == "diffusers" else "kohya")
    if form == "diffusers, converted":
        convert([str(path), str(tmp_path / "converted"), "--to", "diffusers"])
        path = tmp_path / "converted"
    # Of one file with both, as its guides say: each encoder's rows by their key. Of diffusers' own, the files themselves, and the token in them.
    sources = (
        [(load_file(path)[key], TOKEN) for key in ("clip_l", "clip_g")]
        if form == "kohya"
        else [(path / name, None) for name in DIFFUSERS_FILES]
    )
    for (source, token), (encoder, tokenizer) in zip(sources, both(pipe)):
        pipe.load_textual_inversion(
            source, token=token, text_encoder=encoder, tokenizer=tokenizer, local_files_only=True
        )
    agree(sdxl, pipe)
    again = alchemy.load(saved, "cpu")
    assert load_embedding(again, path) == TOKEN
    agree(again, pipe)


@torch.no_grad()
@pytest.mark.parametrize("vectors", [1, 3])
def test_files_as_its_training_script_writes_them_give_the_same_hidden_states_here(
    saved, tmp_path, vectors
):
    pipe, words = built(), [TOKEN, *(f"{TOKEN}_{k}" for k in range(1, vectors))]
    for name, (encoder, tokenizer) in zip(DIFFUSERS_FILES, both(pipe)):
        tokenizer.add_tokens(words)
        encoder.resize_token_embeddings(len(tokenizer))
        table, ids = encoder.get_input_embeddings().weight, tokenizer.convert_tokens_to_ids(words)
        table[ids] = torch.randn(
            vectors, table.shape[1], generator=torch.Generator().manual_seed(2)
        )
        save_file(
            {TOKEN: table[min(ids) : max(ids) + 1].detach().cpu().clone()},
            tmp_path / name,
            {"format": "pt"},
        )
    sdxl = alchemy.load(saved, "cpu")
    assert load_embedding(sdxl, tmp_path) == TOKEN
    agree(sdxl, pipe)


@torch.no_grad()
def test_its_pooled_vector_stands_at_the_learned_word_and_not_at_the_end(saved, taught, tmp_path):
    sdxl, pipe, path = taught(2), built(), tmp_path / "my-dog.safetensors"
    save_embedding(sdxl, path, TOKEN, "kohya")
    for key, (encoder, tokenizer) in zip(("clip_l", "clip_g"), both(pipe)):
        pipe.load_textual_inversion(
            load_file(path)[key],
            token=TOKEN,
            text_encoder=encoder,
            tokenizer=tokenizer,
            local_files_only=True,
        )
    encoder, tokenizer = pipe.text_encoder_2, pipe.tokenizer_2
    assert encoder.config.eos_token_id == 2  # as the official config has it
    named = pipe.maybe_convert_prompt(PROMPT, tokenizer)
    ids = tokenizer(named, padding="max_length", max_length=77, return_tensors="pt").input_ids
    there, end = int(ids.argmax()), int((ids[0] == 49407).nonzero()[0])
    assert ids[0, there] > 49407 and there < end
    states, pooled = (
        encoder(ids).last_hidden_state[0],
        pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)[2],
    )
    ours = sdxl.encode_prompt([PROMPT], (32, 32)).pooled
    for position, found in ((there, pooled), (end, ours)):
        expected = encoder.text_projection(states[position])
        assert (found[0] - expected).norm() <= 3e-6 * expected.norm()
    assert (pooled - ours).norm() > 0.1 * ours.norm()
