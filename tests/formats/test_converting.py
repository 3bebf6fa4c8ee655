"""python -m alchemy.formats: LoRAs and embeddings under other names, and merged checkpoints."""

import pytest
import torch
from helpers.checkpoints import NETWORKS, refused, same, weights
from helpers.running import call_main, contents
from helpers.running import refused as run_refused
from helpers.spellings import ALPHA, RANK, SPELLINGS, adapter, adapters, unet_only, written
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alchemy
from alchemy.formats.__main__ import main
from alchemy.formats.embeddings import DIFFUSERS_FILES, KEYS, load_embedding

WRITTEN_AS = {
    "kohya": "kohya, the single file's blocks",
    "diffusers": "diffusers",
    "peft": "PEFT in diffusers",
}


def convert(*argv):
    main([str(argument) for argument in argv])


@pytest.fixture
def source(tmp_path, pairs):
    """A LoRA of all layers, in peft's names."""
    save_file(written(pairs, *SPELLINGS["PEFT"]), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "b.safetensors"


# LoRAs


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("to", WRITTEN_AS)
def test_converting_keeps_the_change_of_every_weight(
    pairs, fresh, tiny, source, target, spelling, to
):
    save_file(written(pairs, *SPELLINGS[spelling]), source, {"alchemy.prompt": "a dog"})
    convert(source, target, "--to", to, "--weights", tiny)
    sdxl = fresh()
    ours = adapter(sdxl, alchemy.load_lora(sdxl, target))
    assert ours.keys() == pairs.keys()
    for layer, (down, up, alpha, _) in ours.items():
        assert torch.equal(down, pairs[layer][0])
        expected = pairs[layer][1] * (ALPHA / RANK)
        assert torch.allclose(up * (alpha / RANK), expected, rtol=1e-6, atol=0)
    expected = written(pairs, *SPELLINGS[WRITTEN_AS[to]], alpha=to == "kohya")
    assert load_file(target).keys() == expected.keys()
    with safe_open(target, "pt") as file:
        assert file.metadata()["alchemy.prompt"] == "a dog"


def test_converting_needs_no_weights_of_sdxl_base_and_knows_its_names(source, target):
    layer = "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k"
    down, up = torch.ones(2, 2048), torch.ones(1280, 2)
    save_file({layer + ".lora_A.weight": down, layer + ".lora_B.weight": up}, source)
    run = source.parent / "run"  # a run's folder stands for the LoRA in it
    run.mkdir()
    source.rename(run / "lora.safetensors")
    convert(run, target, "--to", "kohya")
    stem = "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k"
    ends = ".lora_down.weight", ".lora_up.weight", ".alpha"
    assert load_file(target).keys() == {stem + end for end in ends}


def test_converting_overwrites_nothing_and_names_another_base(tiny, source, target):
    other = "made for another base", "SDXL base", "--weights"
    refused(lambda: convert(source, target, "--to", "kohya"), *other)
    to_kohya = "--to", "kohya", "--weights", tiny
    refused(lambda: convert(source, source, *to_kohya), "exists already")
    refused(lambda: convert(source, f"{target}.pt", *to_kohya), ".safetensors")
    assert not target.exists()


@pytest.mark.parametrize("to, warned", [("kohya", False), ("diffusers", True), ("peft", True)])
def test_converting_says_which_tools_ignore_the_file(tiny, source, target, capsys, to, warned):
    convert(source, target, "--to", to, "--weights", tiny)
    assert ("A1111 and kohya's tools ignore" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--to", "peft", "--scale", "2"), ("--scale needs --merge",)),
        (("--to", "peft", "--dtype", "float32"), ("--dtype needs --merge",)),
        (("--to", "peft", "--model-config", "folder"), ("--model-config needs --weights",)),
        (("--merge",), ("--merge needs --weights",)),
        (("--merge", "--weights", "w", "--scale", "nan"), ("--scale", "nan")),
        (("--merge", "--weights", "w", "--scale=-inf"), ("--scale", "-inf")),
    ],
)
def test_a_flag_without_effect_and_a_scale_that_is_no_number_are_refused(
    source, target, flags, words
):
    run_refused(call_main(main, source, target, *flags), *words)
    assert list(contents(source.parent)) == ["a.safetensors"]


# Embeddings


def random_rows(count=2):
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, width, generator=generator) for width in (8, 12)]


def embedding(rows):
    return dict(zip(KEYS, rows, strict=True))


def test_an_embedding_goes_to_diffusers_two_files_and_back_to_the_bit(tmp_path):
    rows, folder, one = random_rows(), tmp_path / "two", tmp_path / "one.safetensors"
    header = {"alchemy.token": "<my-dog>", "alchemy.steps": "9", "other": "x"}
    save_file(embedding(rows), tmp_path / "my-dog.safetensors", header)
    convert(tmp_path / "my-dog.safetensors", folder, "--to", "diffusers")
    for name, expected in zip(DIFFUSERS_FILES, rows, strict=True):
        stored = load_file(folder / name)
        assert stored.keys() == {"<my-dog>"} and torch.equal(stored["<my-dog>"], expected)
    convert(folder, one, "--to", "kohya")
    stored = load_file(one)
    assert stored.keys() == {*KEYS}
    assert all(torch.equal(stored[key], row) for key, row in embedding(rows).items())
    with safe_open(one, "pt") as file:
        expected = {"alchemy.token": "<my-dog>", "alchemy.steps": "9", "format": "pt"}
        assert file.metadata() == expected


def test_the_token_of_another_tools_embedding_is_the_files_name(tmp_path):
    vectors = {"clip_l": torch.ones(8), "clip_g": torch.ones(12)}  # of one vector: no rows
    save_file(vectors, tmp_path / "dotty.safetensors")
    convert(tmp_path / "dotty.safetensors", tmp_path / "two", "--to", "diffusers")
    shapes = [tuple(load_file(tmp_path / "two" / name)["dotty"].shape) for name in DIFFUSERS_FILES]
    assert shapes == [(1, 8), (1, 12)]


@pytest.mark.parametrize(
    "clip_l, clip_g, problem",
    [
        (torch.tensor(1.0), torch.tensor(1.0), "()"),
        (torch.ones(1, 8), torch.tensor(1.0), "()"),
        (torch.ones(0, 8), torch.ones(0, 12), "(0, 8)"),
        (torch.ones(1, 1, 8), torch.ones(1, 1, 12), "(1, 1, 8)"),
        (torch.ones(2, 8), torch.ones(12), "(2, 8) and (1, 12)"),
        (torch.full((1, 8), float("nan")), torch.ones(1, 12), "not finite"),
        (torch.ones(1, 8, dtype=torch.int8), torch.ones(1, 12), "not floating point"),
    ],
)
def test_tensors_that_are_no_embedding_are_refused(fresh, tmp_path, clip_l, clip_g, problem):
    path, words = tmp_path / "a.safetensors", ("no SDXL embedding", problem)
    save_file({"clip_l": clip_l, "clip_g": clip_g}, path)
    refused(lambda: load_embedding(fresh(), path), path, *words)
    refused(lambda: convert(path, tmp_path / "two", "--to", "diffusers"), path, *words)
    assert not (tmp_path / "two").exists()


def test_an_embedding_is_refused_in_a_form_that_does_not_exist(tiny, source, tmp_path):
    save_file(embedding(random_rows()), source)
    (tmp_path / "empty").mkdir()
    merge = "--merge", "--weights", tiny
    for path, target, flags, words in (
        (source, "b.safetensors", ("--to", "diffusers"), ["folder"]),
        (source, "b", ("--to", "kohya"), [".safetensors"]),
        (source, "b.safetensors", ("--to", "peft"), ["kohya, diffusers"]),
        (source, "b", merge, ["a.safetensors", "an embedding", "--embedding"]),
        (tmp_path / "empty", "b", ("--to", "kohya"), ["empty", DIFFUSERS_FILES[0], "nor a LoRA"]),
    ):
        run_refused(call_main(main, path, tmp_path / target, *flags), *words)
    assert list(contents(tmp_path)) == ["a.safetensors"] and not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["LoRA", "embedding"])
def test_missing_folders_are_made(tiny, source, tmp_path, kind):
    flags = ["--weights", tiny] if kind == "LoRA" else []
    if kind == "embedding":
        save_file(embedding(random_rows()), source)
    convert(source, tmp_path / "to/b/c.safetensors", "--to", "kohya", *flags)
    assert (tmp_path / "to/b/c.safetensors").exists()


# Embeddings bundled with a LoRA, as OneTrainer writes them


@pytest.fixture
def bundle(source, pairs):
    """A LoRA of the UNet with two embeddings; {token: rows}."""
    found = {"<my-dog>": random_rows(2), "<cat>": random_rows(1)}
    tensors = written(unet_only(pairs), *SPELLINGS["OneTrainer"])
    for token, rows in found.items():
        for key, tensor in embedding(rows).items():
            tensors[f"bundle_emb.{token}.{key}"] = tensor
    save_file(tensors, source)
    return found


def test_bundled_embeddings_become_tokens(bundle, fresh, source):
    sdxl = fresh()
    alchemy.load_lora(sdxl, source)
    tables = [encoder.text_model.embeddings.token_embedding for encoder in sdxl.text_encoders]
    for i, table in enumerate(tables):
        expected = [bundle[token][i] for token in sorted(bundle)]
        assert torch.equal(table.extra, torch.cat(expected))
    for token, rows in bundle.items():
        assert [len(t.tokens(token)) for t in sdxl.tokenizers] == [len(rows[0])] * 2


@pytest.mark.parametrize(
    "flags, files",
    [
        (("--to", "kohya"), ["my-dog.safetensors", "cat-embedding.safetensors"]),
        (("--to", "diffusers"), ["my-dog", "cat"]),
        (("--to", "peft"), ["my-dog", "cat"]),
        (("--merge", "--dtype", "float32"), ["my-dog.safetensors", "cat-embedding.safetensors"]),
    ],
)
def test_bundled_embeddings_are_written_beside_the_file(bundle, fresh, tiny, source, flags, files):
    target = source.with_name("cat.safetensors")  # also the name of an embedding
    convert(source, target, *flags, "--weights", tiny)
    assert not [key for key in load_file(target) if "bundle_emb" in key]
    sdxl, other = fresh(), fresh()
    alchemy.load_lora(other, source)
    for file in files:
        load_embedding(sdxl, target.with_name(file))
    ours, theirs = (s.encode_prompt(["<my-dog> and a <cat>"], (32, 32)) for s in (sdxl, other))
    assert torch.equal(ours.context, theirs.context)


@pytest.mark.parametrize("flags", [("--to", "kohya"), ("--merge",)])
def test_a_bundled_embedding_overwrites_nothing(bundle, tiny, source, target, flags):
    target.with_name("cat.safetensors").touch()
    words = "cat.safetensors exists already", "'<cat>'"
    refused(lambda: convert(source, target, *flags, "--weights", tiny), *words)
    assert not target.exists() and not target.with_name("my-dog.safetensors").exists()


def test_a_bundle_of_anything_else_is_refused(bundle, fresh, source):
    tensors, sdxl = load_file(source), fresh()
    save_file(tensors | {"bundle_emb.<cat>.t5": torch.ones(1, 8)}, source)
    refused(lambda: alchemy.load_lora(sdxl, source), source, "'<cat>' has clip_g, clip_l, t5")
    del tensors["bundle_emb.<cat>.clip_g"]
    save_file(tensors, source)
    refused(lambda: alchemy.load_lora(sdxl, source), source, "'<cat>' has clip_l, not")
    assert not adapters(sdxl)


# Merging


def test_a_merged_checkpoint_gives_the_outputs_of_base_and_lora(pairs, tiny, fresh, source, close):
    small = {layer: (0.1 * down, 0.1 * up) for layer, (down, up) in pairs.items()}
    save_file(written(small, *SPELLINGS["PEFT in diffusers"]), source)
    folder = source.with_name("whole")
    merge = "--merge", "--weights", tiny, "--dtype", "float32"
    convert(source, folder, *merge, "--scale", "0.5")
    merged, beside, base = alchemy.load(folder, "cpu"), fresh(), fresh()
    alchemy.load_lora(beside, source, 0.5)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def output(sdxl):
        return sdxl.unet(x, 500, *sdxl.encode_prompt(["a dog"], (32, 32)).parts())

    close(output(merged), output(beside), 1e-5)
    assert (output(merged) - output(base)).norm() > 1e-2 * output(base).norm()
    same(merged.vae, weights()["vae"])
    assert not adapters(merged)
    assert not [key for key in merged.unet.state_dict() if "lora" in key]


def test_a_merge_into_one_file_is_the_merge_into_a_folder(tiny, source, target):
    flags = "--merge", "--dtype", "float32", "--weights"
    convert(source, target, *flags, tiny)
    convert(source, target.with_name("b"), *flags, tiny)
    one, folder = (
        alchemy.load(target, "cpu", config=tiny),
        alchemy.load(target.with_name("b"), "cpu"),
    )
    # A single file needs no configurations to become a single file.
    again = target.with_name("c.safetensors")
    convert(source, again, *flags, target, "--model-config", tiny, "--scale", "0")
    for name in NETWORKS:
        same(one.network(name), folder.network(name).state_dict())
        same(alchemy.load(again, "cpu", config=tiny).network(name), one.network(name).state_dict())


def test_merging_overwrites_nothing_and_names_a_missing_base(tiny, source, tmp_path):
    (tmp_path / "b").mkdir()
    new = tmp_path / "c"
    there = source, tmp_path / "b", "--merge", "--weights", tiny
    refused(lambda: convert(*there), "exists already")
    refused(lambda: convert(source, new, "--merge"), "--weights")
    single = source, new, "--merge", "--weights", source
    refused(lambda: convert(*single), "a.safetensors", "--model-config")
    assert not new.exists()
