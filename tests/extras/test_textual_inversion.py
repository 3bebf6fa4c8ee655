"""A learned word: its rows and nothing else are learned, files of it are those of other tools."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alchemy
from alchemy.command.results import file_name
from alchemy.formats.embeddings import DIFFUSERS_FILES, load_embedding, save_embedding
from alchemy.methods import textual_inversion as ti
from alchemy.training import denoising_loss
from helpers.checkpoints import refused
from helpers.lessons import batch
from helpers.running import call, contents, good, lora_file, photos, quick, tiny  # noqa: F401
from helpers.running import refused as run_refused
from test_resume import stopped  # noqa: F401

TOKEN, EOS = "<my-dog>", 49407
FLAGS = (
    "--method",
    "textual-inversion",
    "--token",
    TOKEN,
    "--class-word",
    "dog",
    "--vectors",
    2,
    "--steps",
    3,
    "--preview-every",
    0,
)


@pytest.fixture
def sdxl(tiny):
    return alchemy.load(tiny, "cpu")  # with tokenizers of its own, since they learn too


def rows(sdxl, count=2, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(count, table.embedding_dim, generator=made) for table in ti.tables(sdxl)]


def test_a_word_of_two_vectors_is_two_ids_wherever_it_stands_and_pooling_finds_the_end(sdxl):
    plain = sdxl.encode_prompt(["a dog and a cat"], (32, 32))
    ti.add_word(sdxl, TOKEN, rows(sdxl))
    ids = sdxl.tokenizers[0](f"a {TOKEN} dog")
    assert (
        ids[2:4] == [49408, 49409]
        and ids[5] == EOS
        and sdxl.tokenizers[1](f"a {TOKEN}")[2:5] == [49408, 49409, EOS]
    )
    again = sdxl.encode_prompt(["a dog and a cat"], (32, 32))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parts(), again.parts())
    )  # other prompts are as they were, to the bit


def test_its_hidden_states_are_those_of_a_table_that_has_the_rows(sdxl, tiny):
    made = rows(sdxl)
    ti.add_word(sdxl, TOKEN, made)
    ours = sdxl.encode_prompt([f"a {TOKEN} dog"], (32, 32))
    other = alchemy.load(tiny, "cpu")
    other.tokenizers = sdxl.tokenizers
    for encoder, r in zip(other.text_encoders, made):
        table = encoder.text_model.embeddings.token_embedding
        table = getattr(table, "weight", table)
        encoder.text_model.embeddings.token_embedding = torch.nn.Embedding.from_pretrained(
            torch.cat([table, r])
        )
    theirs = other.encode_prompt([f"a {TOKEN} dog"], (32, 32))
    assert torch.equal(ours.context, theirs.context) and torch.equal(ours.pooled, theirs.pooled)


def test_the_gradient_goes_to_the_rows_alone_and_only_to_those_that_are_used(sdxl):
    ti.add_word(sdxl, "<other>", rows(sdxl, 1))
    both = [p.requires_grad_(True) for p in ti.add_word(sdxl, TOKEN, rows(sdxl))]
    live, drawn = ti.Live(sdxl, (32, 32)), batch(1, torch.float32)
    drawn = type(drawn)(**drawn.__dict__ | {"prompts": [f"a {TOKEN}"]})
    denoising_loss(sdxl, drawn, live).mean().backward()
    for p in both:
        assert (
            p.grad[0].abs().max() == 0 and p.grad[1:].abs().amax(1).min() > 0
        )  # <other> stands first
    assert not [
        p
        for network in sdxl.loaded.values()
        for p in network.parameters()
        if p.grad is not None and all(p is not q for q in both)
    ]


def test_it_starts_from_a_words_pieces_over_and_over(sdxl):
    for tokenizer, table, made in zip(
        sdxl.tokenizers, ti.tables(sdxl), ti.start_rows(sdxl, "xyzzy", 5)
    ):
        ids = [i for i, _ in tokenizer.tokens("xyzzy")]
        assert 2 <= len(ids) <= 4
        assert torch.equal(made, table.weight[[ids[k % len(ids)] for k in range(5)]].float())
    refused(lambda: ti.start_rows(sdxl, " ", 2), "empty")


def test_a_token_that_exists_and_rows_that_do_not_fit_are_refused(sdxl):
    for token in ("dog", "Dog", " dog "):
        refused(lambda: ti.add_word(sdxl, token, rows(sdxl)), "token already")
    refused(lambda: ti.add_word(sdxl, TOKEN, rows(sdxl)[::-1]), "do not fit")
    ti.add_word(sdxl, TOKEN, rows(sdxl))
    refused(lambda: ti.add_word(sdxl, TOKEN, rows(sdxl)), "token already")


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_what_was_saved_is_read_back_to_the_bit(sdxl, tiny, tmp_path, form):
    ti.add_word(sdxl, "<first>", rows(sdxl, 1, seed=3))
    made = rows(sdxl)
    ti.add_word(sdxl, TOKEN, made)
    paths = save_embedding(
        sdxl, tmp_path / ("word" if form == "diffusers" else "word.safetensors"), TOKEN, form
    )
    told = sdxl.encode_prompt([f"a {TOKEN} dog"], (32, 32))
    kept = [load_file(path) for path in paths]
    if form == "kohya":
        assert torch.equal(kept[0]["clip_l"], made[0]) and torch.equal(kept[0]["clip_g"], made[1])
    else:
        assert [path.name for path in paths] == [*DIFFUSERS_FILES] and all(
            torch.equal(k[TOKEN], r) for k, r in zip(kept, made)
        )
    assert (
        load_embedding(
            sdxl, tmp_path / ("word" if form == "diffusers" else "word.safetensors"), "<again>"
        )
        == "<again>"
    )
    again = sdxl.encode_prompt(["a <again> dog"], (32, 32))
    assert torch.equal(told.context, again.context) and torch.equal(told.pooled, again.pooled)


def test_another_tools_file_is_called_by_its_name_and_a_strange_one_refused(sdxl, tmp_path):
    made = rows(sdxl)
    save_file({"clip_g": made[1], "clip_l": made[0]}, tmp_path / "mydog.safetensors")
    assert load_embedding(sdxl, tmp_path / "mydog.safetensors") == "mydog"
    save_file({"emb_params": made[0]}, tmp_path / "old.safetensors")
    refused(
        lambda: load_embedding(sdxl, tmp_path / "old.safetensors"),
        "old.safetensors",
        "no SDXL embedding",
        "emb_params",
        "clip_l",
    )
    save_file({"clip_g": made[0].clone(), "clip_l": made[0]}, tmp_path / "wide.safetensors")
    refused(
        lambda: load_embedding(sdxl, tmp_path / "wide.safetensors"),
        "wide.safetensors",
        "do not fit",
    )
    save_file({"clip_g": made[1], "clip_l": made[0]}, tmp_path / "dog.safetensors")
    refused(
        lambda: load_embedding(sdxl, tmp_path / "dog.safetensors"),
        "dog.safetensors",
        "token already",
        "rename it",
    )


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
        ("..", "embedding"),
    ],
)
def test_the_file_is_named_after_the_token_since_other_tools_call_it_by_that(token, name):
    assert file_name(token) == name


def test_train_writes_the_word_and_sample_and_insert_use_it(tiny, tmp_path, lora_file):
    photos(tmp_path / "photos")
    run = good(call("train.py", "photos", "--weights", tiny, *FLAGS, "--out", "run"))
    assert (
        sorted(contents("run")) == ["loss.png", "my-dog.safetensors", "settings.json"]
        and f"'{TOKEN}' learns from 'dog'" in run.err
    )
    drawn = [
        good(
            call(
                "sample.py", f"a photo of a {TOKEN}", "--weights", tiny, "--out", f"{k}.png", *flags
            )
        ).err
        for k, flags in enumerate(((), ("--embedding", "run/my-dog.safetensors")))
    ]
    assert (
        f"is '{TOKEN}' in a prompt" in drawn[1] and contents(".")["0.png"] != contents(".")["1.png"]
    )
    run_refused(
        call("sample.py", "a dog", "--weights", tiny, "--embedding", lora_file),
        "no SDXL embedding",
        "--lora",
    )
    run_refused(
        call("sample.py", "a dog", "--weights", tiny, "--lora", "run/my-dog.safetensors"),
        "an embedding",
        "--embedding",
    )
    warned = [
        f"'{TOKEN}' is in no prompt"
        in good(
            call(
                "sample.py",
                prompt,
                "--weights",
                tiny,
                "--embedding",
                "run/my-dog.safetensors",
                *flags,
            )
        ).err
        for prompt, flags in (
            ("a dog", ()),
            (f"a {TOKEN.upper()}", ()),
            ("a dog", ("--negative-prompt", TOKEN)),
        )
    ]
    assert warned == [True, False, False]


def test_training_resumes_to_the_same_bits(tiny, tmp_path, stopped):
    photos(tmp_path / "photos")
    flags = ("train.py", "photos", "--weights", tiny, *FLAGS, "--style", "--init-word", "photo")
    good(call(*flags, "--out", "whole"))
    assert stopped((*flags, "--out", "half"), step=1).status == 143
    good(call("train.py", "--out", "half", "--resume"))
    run_refused(call("train.py", "--out", "half", "--resume"), "half: this run is finished")
    one, two = (load_file(f"{name}/my-dog.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_started_again_takes_the_earlier_word_away_and_no_other_file(tiny, tmp_path):
    photos(tmp_path / "photos")
    run = ("train.py", "photos", "--weights", tiny, *FLAGS, "--out", "run")
    good(call(*run, "--steps", 1))
    (tmp_path / "run/other.safetensors").write_bytes(b"of someone else")
    run_refused(call(*run, "--token", "<cat>"), "run holds a run already")
    good(call(*run, "--steps", 1, "--token", "<cat>", "--overwrite"))
    assert sorted(contents("run")) == [
        "cat.safetensors",
        "loss.png",
        "other.safetensors",
        "settings.json",
    ]
    good(call(*run, "--steps", 1, "--format", "diffusers", "--overwrite"))
    assert sorted(contents("run")) == [
        *(f"embedding/{name}" for name in DIFFUSERS_FILES),
        "loss.png",
        "other.safetensors",
        "settings.json",
    ]
    good(
        call(
            "train.py",
            "photos",
            "--weights",
            tiny,
            "--class-word",
            "dog",
            "--steps",
            1,
            "--preview-every",
            0,
            "--out",
            "run",
            "--overwrite",
        )
    )
    assert sorted(contents("run")) == [
        "lora.safetensors",
        "loss.png",
        "other.safetensors",
        "settings.json",
    ]


def test_a_word_that_is_there_without_its_run_is_not_written_over(tiny, tmp_path):
    photos(tmp_path / "photos")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/my-dog.safetensors").write_bytes(b"of someone else")
    run_refused(
        call("train.py", "photos", "--weights", tiny, *FLAGS, "--out", "run"),
        "run holds a run already",
    )


def test_flags_that_make_no_sense_for_a_word_are_refused(tiny, tmp_path):
    photos(tmp_path / "photos")
    base = (
        "train.py",
        "photos",
        "--weights",
        tiny,
        "--method",
        "textual-inversion",
        "--out",
        "run",
    )
    run_refused(call(*base), "--init-word")
    run_refused(call(*base, "--class-word", "dog", "--token", "cat"), "token already")
    run_refused(
        call(*base, "--class-word", "dog", "--token", "Hoto"),
        "--token 'Hoto'",
        "prompts that it is taught with",
    )
    run_refused(call(*base, "--class-word", "dog", "--class-pictures", 3), "--class-pictures")


def test_more_vectors_than_a_prompt_has_room_for_are_refused(tiny, tmp_path):
    photos(tmp_path / "photos")
    base = ("train.py", "photos", "--weights", tiny, *FLAGS, "--out", "run")
    run_refused(call(*base, "--vectors", 70), "--vectors 70", "77 tokens")
    assert not contents("run")
    good(call(*base, "--vectors", 66, "--steps", 1))


def test_the_header_tells_of_the_word_and_of_no_lora(tiny, tmp_path):
    photos(tmp_path / "photos")
    good(
        call(
            "train.py",
            "photos",
            "--weights",
            tiny,
            "--method",
            "textual-inversion",
            "--token",
            TOKEN,
            "--init-word",
            "dog",
            "--steps",
            1,
            "--preview-every",
            0,
            "--out",
            "run",
        )
    )
    with safe_open("run/my-dog.safetensors", "pt") as file:
        facts = {
            key.removeprefix("alchemy."): value
            for key, value in file.metadata().items()
            if key.startswith("alchemy.")
        }
    assert facts == {
        "base": "tiny",
        "steps": "1",
        "seed": "0",
        "name": "run",
        "token": TOKEN,
        "prompt": f"a photo of a {TOKEN}",
    }
