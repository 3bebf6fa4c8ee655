"""Our learned words in diffusers: the same hidden states, from either kind of file."""
import pytest

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import alchemy  # noqa: E402
from alchemy.formats.embeddings import TWO, load_embedding, save_embedding  # noqa: E402
from alchemy.methods import textual_inversion as ti  # noqa: E402
from test_checkpoints import built  # noqa: E402

TOKEN = "<my-dog>"


@torch.no_grad()
@pytest.mark.parametrize("form", ["a1111", "diffusers"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_the_same_hidden_states(tmp_path, form, vectors):
    pipe = built()
    pipe.save_pretrained(tmp_path / "saved")
    sdxl = alchemy.load(tmp_path / "saved", "cpu")
    made = torch.Generator().manual_seed(1)
    ti.add_word(sdxl, TOKEN, [torch.randn(vectors, table.embedding_dim, generator=made) for table in ti.tables(sdxl)])
    path = tmp_path / ("word" if form == "diffusers" else "word.safetensors")
    save_embedding(sdxl, path, TOKEN, form)

    if form == "a1111":
        rows = [load_file(path)[key] for key in ("clip_l", "clip_g")]
    else:
        rows = [load_file(path / name)[TOKEN] for name in TWO]
    for r, encoder, tokenizer in zip(rows, (pipe.text_encoder, pipe.text_encoder_2), (pipe.tokenizer, pipe.tokenizer_2)):
        pipe.load_textual_inversion(r, token=TOKEN, text_encoder=encoder, tokenizer=tokenizer)
    # The official config's eos_token_id is 2, and transformers then pools at the highest id, which is now the new word's. Told the true one, it
    # pools at the end, as we do.
    pipe.text_encoder_2.text_model.eos_token_id = 49407
    theirs, _, pooled, _ = pipe.encode_prompt(f"a photo of a {TOKEN} on the grass", do_classifier_free_guidance=False)
    for sdxl in (sdxl, alchemy.load(tmp_path / "saved", "cpu")):
        if TOKEN not in sdxl.tokenizers[0].special:
            assert load_embedding(sdxl, path) == TOKEN
        ours = sdxl.encode_prompt([f"a photo of a {TOKEN} on the grass"], (32, 32))
        assert (ours.context - theirs).norm() <= 3e-6 * theirs.norm() and (ours.pooled - pooled).norm() <= 3e-6 * pooled.norm()
