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
ADDED, WHOLE = "added_tokens.json", "tokenizer.json"
CLIP = json.loads((SHIPPED / "tokenizer" / VOCAB).read_text("utf-8"))
OBJECT, NOT_CLIP, NO_ID = "not a valid JSON object", "not a CLIP vocabulary", "has the id"
NUMBER, NO_TEXT = "an id is a whole number", "must be a token's text"
MERGE = "not a pair that makes a token"


def clip(**changes):
    """CLIP's vocab with other or, for None, without some tokens."""
    return {token: i for token, i in (CLIP | changes).items() if i is not None}


@pytest.mark.parametrize(
    "file, content, words",
    [
        (VOCAB, None, "cannot be read (No such file"),
        (MERGES, None, "cannot be read (No such file"),
        (VOCAB, b'{"a": 1', OBJECT),
        (VOCAB, [], f"{OBJECT} (a JSON list"),
        (VOCAB, b"\xff\xfe\x00", OBJECT),
        (VOCAB, {"a": 1}, f"{NOT_CLIP}; of its tokens it lacks 513, such as "),
        (VOCAB, clip(**{"!</w>": None}), f"{NOT_CLIP}; of its tokens it lacks 1, such as !</w>"),
        (VOCAB, {"a": "b"}, f"'a' {NO_ID} 'b'; {NUMBER}"),
        (VOCAB, clip(dog=-1), f"'dog' {NO_ID} -1; {NUMBER}"),
        (VOCAB, clip(dog=1.0), f"'dog' {NO_ID} 1.0; {NUMBER}"),
        (VOCAB, clip(dog=True), f"'dog' {NO_ID} True; {NUMBER}"),
        (VOCAB, clip(dog=None, cat={}), f"'cat' {NO_ID} {{}}; {NUMBER}"),
        (VOCAB, clip(dog=2**70), f"'dog' {NO_ID} {2**70}; {NUMBER}"),
        (VOCAB, clip(dog=float("nan")), f"'dog' {NO_ID} nan; {NUMBER}"),
        (VOCAB, clip(dog=0), "'!' and 'dog' have the same id, 0"),
        (VOCAB, clip(日本=49408), "'日本' is not made of the symbols for bytes"),
        (VOCAB, clip(**{"": 49408}), "the token '' is not a text, or blank"),
        (MERGES, b"", "there are no merges"),
        (MERGES, b"\xff\xfe", "no UTF-8 text"),
        (MERGES, b"#version: 0.2\ni n\nt h\n", "the merges are incomplete"),
        (MERGES, b"i n\nq ~\n", f"['q', '~'] is {MERGE}"),
        (MERGES, b"i n\ni\n", f"['i'] is {MERGE}"),
        (SPECIAL, b"{", OBJECT),
        (SPECIAL, {"pad_token": "<pad>"}, "the padding is '<pad>', which is no token"),
        (SPECIAL, {"pad_token": 5}, f"pad_token is 5; it {NO_TEXT}"),
        (SPECIAL, {"pad_token": ["!"]}, f"pad_token is ['!']; it {NO_TEXT}"),
        (SPECIAL, {"pad_token": {"content": 5}}, f"pad_token is 5; it {NO_TEXT}"),
        (SPECIAL, {"pad_token": {"id": 5}}, f"pad_token is {{'id': 5}}; it {NO_TEXT}"),
        (ADDED, [], f"{OBJECT} (a JSON list"),
        (ADDED, {"<x>": -1}, f"'<x>' {NO_ID} -1; {NUMBER}"),
        (ADDED, {"<x>": "49408"}, f"'<x>' {NO_ID} '49408'; {NUMBER}"),
        (ADDED, {" ": 49408}, "the token ' ' is not a text, or blank"),
        (ADDED, {"<x>": 320}, f"'<x>' {NO_ID} 320, which does not fit"),
        (ADDED, {"dog": 49408}, f"'dog' {NO_ID} 49408, which does not fit"),
        (ADDED, {"<x>": 49408, "<y>": 49408}, "'<x>' and '<y>' have the same id, 49408"),
        (WHOLE, b"{", OBJECT),
        (WHOLE, [1], f"{OBJECT} (a JSON list"),
        (WHOLE, {}, NOT_CLIP),
        (WHOLE, {"model": [], "added_tokens": []}, NOT_CLIP),
        (WHOLE, {"model": {"vocab": [], "merges": []}, "added_tokens": []}, NOT_CLIP),
        (WHOLE, {"model": {"vocab": {}, "merges": {}}, "added_tokens": []}, NOT_CLIP),
        (WHOLE, {"model": {"vocab": {}, "merges": []}, "added_tokens": [5]}, NOT_CLIP),
        (
            WHOLE,
            {"model": {"vocab": CLIP, "merges": [["i", 5]]}, "added_tokens": []},
            f"['i', 5] is {MERGE}",
        ),
        (
            WHOLE,
            {
                "model": {"vocab": CLIP, "merges": []},
                "added_tokens": [{"content": ["x"], "id": 1}],
            },
            NOT_CLIP,
        ),
        (
            WHOLE,
            {"model": {"vocab": CLIP, "merges": []}, "added_tokens": [{"content": 3, "id": 1}]},
            "the token 3 is not a text",
        ),
    ],
)
def test_a_bad_file_is_one_line_that_names_it_and_the_value(folder, file, content, words):
    if file == WHOLE:
        (folder / VOCAB).unlink()
    if content is None:
        (folder / file).unlink()
    else:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / file).write_bytes(data)
    refused(lambda: Tokenizer.from_folder(folder), folder, file, words)


def test_a_missing_folder_is_named(tmp_path):
    refused(lambda: Tokenizer.from_folder(tmp_path / "nowhere"), "nowhere", "cannot be read")


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


def test_a_merges_file_without_blanks_is_refused_in_linear_time(folder):
    # A pattern such as (\\S+) (\\S+) would take minutes on this line.
    (folder / MERGES).write_text("#version: 0.2\n" + "x" * 1_000_000, "utf-8")
    refused(lambda: Tokenizer.from_folder(folder), MERGE)
