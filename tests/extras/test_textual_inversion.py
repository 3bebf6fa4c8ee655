"""Textual Inversion: the new rows and nothing else are trained; files are those of other tools."""

from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import refused
from helpers.running import call, contents, good, photos
from helpers.running import refused as run_refused
from helpers.training import make_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alchemy
from alchemy.dataset import EncodeEveryStep
from alchemy.formats.embeddings import DIFFUSERS_FILES, load_embedding, save_embedding
from alchemy.methods import textual_inversion as ti
from alchemy.methods.outputs import embedding_name
from alchemy.training import denoising_loss

TOKEN, EOS = "<my-dog>", 49407
METHOD = ("--method", "textual-inversion", "--token", TOKEN, "--preview-every", 0)
FLAGS = (*METHOD, "--class-word", "dog", "--vectors", 2, "--steps", 3)
LOGS = ["log.csv", "log.jsonl", "loss.png"]
KEPT = ["settings.json", "state.safetensors"]


@pytest.fixture
def sdxl(tiny):
    return alchemy.load(tiny, "cpu")  # with its own tokenizers, which change too


@pytest.fixture
def base(tiny, tmp_path):
    photos(tmp_path / "photos")
    return "train.py", "photos", "--weights", tiny


def random_rows(sdxl, count=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(count, table.embedding_dim, generator=rng) for table in ti.tables(sdxl)]


def test_a_token_of_two_vectors_is_two_ids_and_pooling_finds_the_end(sdxl):
    plain = sdxl.encode_prompt(["a dog and a cat"], (32, 32))
    ti.add_word(sdxl, TOKEN, random_rows(sdxl))
    ids = sdxl.tokenizers[0](f"a {TOKEN} dog")
    assert ids[2:4] == [49408, 49409] and ids[5] == EOS
    assert sdxl.tokenizers[1](f"a {TOKEN}")[2:5] == [49408, 49409, EOS]
    again = sdxl.encode_prompt(["a dog and a cat"], (32, 32))
    for a, b in zip(plain.parts(), again.parts()):  # other prompts keep every bit
        assert torch.equal(a, b)


def test_hidden_states_are_those_of_a_table_with_the_rows(sdxl, tiny):
    rows = random_rows(sdxl)
    ti.add_word(sdxl, TOKEN, rows)
    ours = sdxl.encode_prompt([f"a {TOKEN} dog"], (32, 32))
    other = alchemy.load(tiny, "cpu")
    other.tokenizers = sdxl.tokenizers
    for encoder, new in zip(other.text_encoders, rows):
        embeddings = encoder.text_model.embeddings
        table = torch.cat([embeddings.token_embedding.weight, new])
        embeddings.token_embedding = torch.nn.Embedding.from_pretrained(table)
    theirs = other.encode_prompt([f"a {TOKEN} dog"], (32, 32))
    assert torch.equal(ours.context, theirs.context) and torch.equal(ours.pooled, theirs.pooled)


def test_the_gradient_goes_to_the_used_rows_alone(sdxl):
    ti.add_word(sdxl, "<other>", random_rows(sdxl, 1))
    extra = [p.requires_grad_(True) for p in ti.add_word(sdxl, TOKEN, random_rows(sdxl))]
    batch = make_batch(sdxl.schedule, 1, torch.float32, prompt=f"a {TOKEN}")
    denoising_loss(sdxl, batch, EncodeEveryStep(sdxl, (32, 32))).mean().backward()
    for p in extra:  # <other> comes first
        assert p.grad[0].abs().max() == 0 and p.grad[1:].abs().amax(1).min() > 0
    for network in sdxl.loaded.values():
        for p in network.parameters():
            assert p.grad is None or any(p is q for q in extra)


def test_initial_rows_are_those_of_the_words_tokens_repeated(sdxl):
    rows = ti.start_rows(sdxl, "xyzzy", 5)
    for tokenizer, table, new in zip(sdxl.tokenizers, ti.tables(sdxl), rows):
        ids = [token_id for token_id, _ in tokenizer.tokens("xyzzy")]
        assert 2 <= len(ids) <= 4
        assert torch.equal(new, table.weight[[ids[k % len(ids)] for k in range(5)]].float())
    refused(lambda: ti.start_rows(sdxl, " ", 2), "--init-word", "no token")


def test_a_token_that_exists_and_rows_that_do_not_fit_are_refused(sdxl):
    for token in ("dog", "Dog", " dog "):
        refused(lambda token=token: ti.add_word(sdxl, token, random_rows(sdxl)), "token already")
    refused(lambda: ti.add_word(sdxl, TOKEN, random_rows(sdxl)[::-1]), "do not fit")
    ti.add_word(sdxl, TOKEN, random_rows(sdxl))
    refused(lambda: ti.add_word(sdxl, TOKEN, random_rows(sdxl)), "token already")


def test_a_sample_gets_one_of_the_templates_the_same_again(sdxl):
    batch = make_batch(sdxl.schedule, 3, torch.float32)
    prompts = ti.build_prompts(TOKEN, style=False)
    get_batch = ti.vary_prompts(lambda *_: replace(batch), prompts, 5)
    first = [get_batch(step, 0).prompts for step in range(20)]
    assert set(sum(first, [])) == set(prompts)
    assert [get_batch(step, 0).prompts for step in range(20)] == first


@pytest.mark.parametrize("form, name", [("kohya", "word.safetensors"), ("diffusers", "word")])
def test_a_saved_embedding_is_read_back_to_the_bit(sdxl, tmp_path, form, name):
    ti.add_word(sdxl, "<first>", random_rows(sdxl, 1, seed=3))
    rows = random_rows(sdxl)
    ti.add_word(sdxl, TOKEN, rows)
    paths = save_embedding(sdxl, tmp_path / name, TOKEN, form)
    files = [load_file(path) for path in paths]
    if form == "kohya":
        stored = [files[0]["clip_l"], files[0]["clip_g"]]
    else:
        assert [path.name for path in paths] == [*DIFFUSERS_FILES]
        stored = [file[TOKEN] for file in files]
    assert all(torch.equal(a, b) for a, b in zip(stored, rows))
    expected = sdxl.encode_prompt([f"a {TOKEN} dog"], (32, 32))
    assert load_embedding(sdxl, tmp_path / name, "<again>") == "<again>"
    again = sdxl.encode_prompt(["a <again> dog"], (32, 32))
    assert torch.equal(expected.context, again.context)
    assert torch.equal(expected.pooled, again.pooled)


def test_another_tools_file_has_its_name_as_token_and_others_are_refused(sdxl, tmp_path):
    rows = random_rows(sdxl)
    both = {"clip_g": rows[1], "clip_l": rows[0]}
    save_file(both, tmp_path / "mydog.safetensors")
    assert load_embedding(sdxl, tmp_path / "mydog.safetensors") == "mydog"
    bad = (
        ("old", {"emb_params": rows[0]}, ("no SDXL embedding", "emb_params", "clip_l")),
        ("wide", {"clip_g": rows[0].clone(), "clip_l": rows[0]}, ("do not fit",)),
        ("dog", both, ("token already", "rename it")),
    )
    for name, tensors, words in bad:
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        refused(lambda path=path: load_embedding(sdxl, path), path.name, *words)


@pytest.mark.parametrize(
    "token, name",
    [
        ("<my-dog>", "my-dog"),
        ("sks", "sks"),
        ("<a dog/../x>", "a-dog-..-x"),
        ("<käse_2>", "käse_2"),
        ("<>", "embedding"),
        ("<lora>", "lora-embedding"),
        ("State", "State-embedding"),
        ("a" * 300, "a" * 100),
        ("狗" * 80, "狗" * 33),
        ("..", "embedding"),
    ],
)
def test_an_embeddings_file_is_named_after_its_token(token, name):
    assert embedding_name(token) == name


def test_train_py_writes_an_embedding_that_sample_py_uses(base, tiny, lora_file):
    run = good(call(*base, *FLAGS, "--out", "run"))
    assert sorted(contents("run")) == [*LOGS, "my-dog.safetensors", *KEPT]
    assert f"'{TOKEN}' starts from 'dog', 2 vectors" in run.err
    sample = ("sample.py", f"a photo of a {TOKEN}", "--weights", tiny)
    embedding = ("--embedding", "run/my-dog.safetensors")
    good(call(*sample, "--out", "0.png"))
    good(call(*sample, "--out", "1.png", *embedding))
    assert contents(".")["0.png"] != contents(".")["1.png"]
    wrong = (
        (("--embedding", lora_file), ("no SDXL embedding", "--lora")),
        (("--lora", "run/my-dog.safetensors"), ("an embedding", "--embedding")),
    )
    for flags, words in wrong:
        run_refused(call("sample.py", "a dog", "--weights", tiny, *flags), *words)
    for prompt, more, warned in (
        ("a dog", (), True),
        (f"a {TOKEN.upper()}", (), False),
        ("a dog", ("--negative-prompt", TOKEN), False),
    ):
        run = good(call("sample.py", prompt, "--weights", tiny, *embedding, *more))
        assert (f"'{TOKEN}' is in no prompt" in run.err) == warned


def test_overwriting_removes_the_earlier_embedding_and_no_other_file(base, tmp_path):
    flags = (*base, *FLAGS, "--out", "run", "--steps", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/my-dog.safetensors").write_bytes(b"of someone else")
    run_refused(call(*flags), "run holds a run already")
    (tmp_path / "run/other.safetensors").write_bytes(b"of someone else")
    kept = [*LOGS, "other.safetensors", *KEPT]
    for more, written in (
        ((), ["my-dog.safetensors"]),
        (("--token", "<cat>"), ["cat.safetensors"]),
        (("--format", "diffusers"), [f"embedding/{name}" for name in DIFFUSERS_FILES]),
    ):
        good(call(*flags, *more, "--overwrite"))
        assert sorted(contents("run")) == sorted([*kept, *written])
    lora = ("--class-word", "dog", "--steps", 1, "--preview-every", 0, "--out", "run")
    good(call(*base, *lora, "--overwrite"))
    assert sorted(contents("run")) == sorted([*kept, "lora.safetensors"])


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), ["--init-word"]),
        (("--class-word", "dog", "--token", "cat"), ["token already"]),
        (("--class-word", "dog", "--token", "Hoto"), ["--token 'Hoto'", "training prompts"]),
        (("--class-word", "dog", "--class-images", 3), ["--class-images"]),
        (("--class-word", "dog", "--vectors", 70), ["--vectors 70", "77 tokens"]),
    ],
)
def test_flags_that_cannot_work_for_a_token_are_refused(base, flags, words):
    run_refused(call(*base, "--method", "textual-inversion", "--out", "run", *flags), *words)
    assert not contents("run")


def test_the_header_names_the_token_and_no_lora(base):
    good(call(*base, *METHOD, "--init-word", "dog", "--steps", 1, "--vectors", 66, "--out", "run"))
    with safe_open("run/my-dog.safetensors", "pt") as file:
        header = file.metadata()
    found = {k.removeprefix("alchemy."): v for k, v in header.items() if k.startswith("alchemy.")}
    expected = {"base": "tiny", "steps": "1", "seed": "0", "name": "run", "token": TOKEN}
    assert found == expected | {"prompt": f"a photo of a {TOKEN}"}
