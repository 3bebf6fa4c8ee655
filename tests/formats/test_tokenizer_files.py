"""The files that a tokenizer is read from, vocab.json or tokenizer.json, and bad ones."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkpoints import SHIPPED, refused
from safetensors import safe_open

from alchemy.tokenizer import BYTE_TO_SYMBOL, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
BOS, EOS = 49406, 49407
NAMES = ("tokenizer", "tokenizer_2")


@pytest.fixture(scope="module")
def reference():
    """[(prompt, ids of tokenizer 1, ids of tokenizer 2)]."""
    with safe_open(ROOT / "tests" / "reference" / "tokens.safetensors", "np") as file:
        ids = [file.get_tensor(name).tolist() for name in ("ids_1", "ids_2")]
        return list(zip(json.loads(file.metadata()["prompts"]), *ids, strict=True))


def tokenizer_json(name):
    """A tokenizer.json as transformers 5 writes it, from vocab.json and merges.txt."""
    vocab = json.loads((SHIPPED / name / "vocab.json").read_text("utf-8"))
    lines = (SHIPPED / name / "merges.txt").read_text("utf-8").split("\n")[1:]
    special = ["<|startoftext|>", "<|endoftext|>"]
    if name == "tokenizer_2":
        special.insert(0, "!")
    return {
        "added_tokens": [{"id": vocab[token], "content": token} for token in special],
        "model": {"vocab": vocab, "merges": [line.split(" ") for line in lines if line]},
    }


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    """A copy of the first tokenizer to spoil."""
    return shutil.copytree(SHIPPED / "tokenizer", tmp_path / "t")


def test_tokenizer_json_alone_gives_the_same_ids(tmp_path, reference, name):
    content, pad = tokenizer_json(name), 0 if name == "tokenizer_2" else EOS
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    alone = Tokenizer.from_folder(tmp_path)
    assert alone.pad == pad
    column = 1 + NAMES.index(name)
    assert [row[0] for row in reference if alone(row[0]) != row[column]] == []

    # Placeholders, which have higher ids, leave the padding as it is.
    content["added_tokens"].append({"id": 49408, "content": "<my-dog>", "normalized": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer("a <my-dog>")[:5] == [BOS, 320, 49408, EOS, pad]
    assert tokenizer.add("<cat>") == 49409


def test_folders_saved_by_transformers_give_its_ids(tmp_path, reference, name):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.from_folder(SHIPPED / name)
    theirs = transformers.AutoTokenizer.from_pretrained(SHIPPED / name)
    assert theirs.pad_token_id == ours.pad
    ids = [i for i in ours("a café, 日本 🦄 don't!") if i != ours.pad]
    assert ours.decode(ids) == theirs.decode(ids)
    theirs.add_tokens("<My-Dog>")
    theirs.save_pretrained(tmp_path)
    saved = Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    alone = Tokenizer.from_folder(tmp_path)
    for prompt in [*(row[0] for row in reference), "a <my-dog>", "a<MY-DOG>!"]:
        ids = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert saved(prompt) == alone(prompt) == ids, prompt


def test_the_padding_token_is_read_from_any_of_the_files(tmp_path):
    folder = shutil.copytree(SHIPPED / "tokenizer_2", tmp_path / "t")
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(folder).pad == 0
    as_object = '{"pad_token": {"content": "!", "normalized": false}}'
    (folder / "special_tokens_map.json").write_text(as_object)
    assert Tokenizer.from_folder(folder).pad == 0
    (folder / "special_tokens_map.json").unlink()
    assert Tokenizer.from_folder(folder).pad == EOS
    assert Tokenizer.from_folder(folder, pad=0)("a!b")[:6] == [BOS, 320, 0, 321, EOS, 0]
    (folder / "added_tokens.json").write_text('{"<my-dog>": 49408}')
    assert Tokenizer.from_folder(folder)("a <my-dog>")[:5] == [BOS, 320, 49408, EOS, EOS]


VOCAB, MERGES, SPECIAL = "vocab.json", "merges.txt", "special_tokens_map.json"


@pytest.mark.parametrize(
    "file, content, words",
    [
        (VOCAB, None, "t/vocab.json: cannot be read (No such file"),
        (MERGES, None, "t/merges.txt: cannot be read"),
        (VOCAB, b'{"a": 1', "t/vocab.json: cannot be read"),
        (VOCAB, b'{"a": 1}', "t: not a CLIP vocabulary"),
        (VOCAB, b"[]", "t: not a CLIP vocabulary"),
        (VOCAB, b"\xff\xfe\x00", "t/vocab.json: cannot be read"),
        (MERGES, b"", "t: not a CLIP vocabulary"),
        (MERGES, b"#version: 0.2\ni n\nt h\n", "t: the merges are incomplete"),
        (SPECIAL, b"{", "t/special_tokens_map.json: cannot be read"),
        (SPECIAL, b'{"pad_token": "<pad>"}', "t: not a CLIP vocabulary"),
    ],
)
def test_a_bad_folder_is_one_line_that_names_it(folder, file, content, words):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    refused(lambda: Tokenizer.from_folder(folder), words)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot be read"),
        ("{", "tokenizer.json: cannot be read"),
        ("[1]", "not a CLIP vocabulary"),
        ("{}", "not a CLIP vocabulary"),
    ],
)
def test_a_missing_folder_and_a_bad_tokenizer_json_are_named(tmp_path, content, words):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    folder = tmp_path if content else tmp_path / "nowhere"
    refused(lambda: Tokenizer.from_folder(folder), folder, words)


def test_every_byte_has_its_own_visible_character():
    assert sorted(BYTE_TO_SYMBOL) == list(range(256)) and len(set(BYTE_TO_SYMBOL.values())) == 256
    assert all(char.isprintable() and char != " " for char in BYTE_TO_SYMBOL.values())


def test_importing_the_tokenizer_needs_only_the_standard_library():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'alchemy')!r}); import tokenizer; "
        "print(*({'torch', 'numpy', 'regex'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip() == ""


def test_a_merges_file_without_blanks_is_read_in_linear_time(folder):
    merges = (folder / MERGES).read_text("utf-8")
    # A pattern such as (\\S+) (\\S+) would take minutes on this line.
    (folder / MERGES).write_text("#version: 0.2\n" + "x" * 1_000_000 + "\n" + merges, "utf-8")
    assert Tokenizer.from_folder(folder)("a dog")[:4] == [BOS, 320, 1929, EOS]
