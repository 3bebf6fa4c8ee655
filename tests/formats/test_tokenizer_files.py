"""The files that a tokenizer is read from, vocab.json or tokenizer.json, and bad ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from alchemy.tokenizer import BYTE_TO_SYMBOL, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "weights" / "mini"
BOS, EOS = 49406, 49407
NAMES = ("tokenizer", "tokenizer_2")


@pytest.fixture(scope="module")
def both():
    return [Tokenizer.from_folder(MINI / name) for name in NAMES]


@pytest.fixture(scope="module")
def reference():
    with safe_open(ROOT / "tests" / "reference" / "tokens.safetensors", "np") as file:
        return json.loads(file.metadata()["prompts"]), [
            file.get_tensor(name).tolist() for name in ("ids_1", "ids_2")
        ]


def lone_json(folder, name):
    """A tokenizer.json as transformers 5 writes it, from vocab.json and merges.txt."""
    vocab = json.loads((MINI / name / "vocab.json").read_text("utf-8"))
    lines = (MINI / name / "merges.txt").read_text("utf-8").split("\n")[1:]
    special = ["<|startoftext|>", "<|endoftext|>"]
    if name == "tokenizer_2":
        special.insert(0, "!")
    content = {
        "added_tokens": [{"id": vocab[token], "content": token} for token in special],
        "model": {"vocab": vocab, "merges": [line.split(" ") for line in lines if line]},
    }
    folder.mkdir(exist_ok=True)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return folder


def copy(folder, name="tokenizer"):
    folder.mkdir()
    for file in (MINI / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("n", [0, 1])
def test_tokenizer_json_alone_gives_the_same_ids(tmp_path, both, reference, n):
    alone = Tokenizer.from_folder(lone_json(tmp_path / "alone", NAMES[n]))
    assert alone.pad == both[n].pad
    assert [
        p for p, row in zip(reference[0], reference[1][n], strict=True) if alone(p) != row
    ] == []


def test_tokenizer_json_with_placeholders_keeps_its_padding(tmp_path):
    for name, pad in zip(NAMES, (EOS, 0), strict=True):
        file = lone_json(tmp_path / name, name) / "tokenizer.json"
        whole = json.loads(file.read_text("utf-8"))
        whole["added_tokens"].append({"id": 49408, "content": "<my-dog>", "normalized": True})
        file.write_text(json.dumps(whole), "utf-8")
        tokenizer = Tokenizer.from_folder(file.parent)
        assert (
            tokenizer("a <my-dog>")[:5] == [BOS, 320, 49408, EOS, pad]
            and tokenizer.add("<cat>") == 49409
        )


def test_folders_saved_by_transformers_give_its_ids(tmp_path, both, reference):
    transformers = pytest.importorskip("transformers")
    for n, name in enumerate(NAMES):
        theirs = transformers.AutoTokenizer.from_pretrained(MINI / name)
        assert theirs.pad_token_id == both[n].pad
        theirs.add_tokens("<My-Dog>")
        theirs.save_pretrained(tmp_path / name)
        ours = Tokenizer.from_folder(tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").unlink()
        alone = Tokenizer.from_folder(tmp_path / name)
        for prompt in [*reference[0], "a <my-dog>", "a<MY-DOG>!"]:
            ids = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
            assert ours(prompt) == alone(prompt) == ids, prompt
        ids = [i for i in both[n]("a café, 日本 🦄 don't!") if i != both[n].pad]
        assert ours.decode(ids) == theirs.decode(ids)


def test_the_padding_token_is_read_from_any_of_the_files(tmp_path):
    folder = copy(tmp_path / "t", "tokenizer_2")
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(folder).pad == 0
    (folder / "special_tokens_map.json").write_text(
        '{"pad_token": {"content": "!", "normalized": false}}'
    )
    assert Tokenizer.from_folder(folder).pad == 0
    (folder / "special_tokens_map.json").unlink()
    assert Tokenizer.from_folder(folder).pad == EOS
    assert Tokenizer.from_folder(folder, pad=0)("a!b")[:6] == [BOS, 320, 0, 321, EOS, 0]
    (folder / "added_tokens.json").write_text('{"<my-dog>": 49408}')
    assert Tokenizer.from_folder(folder)("a <my-dog>")[:5] == [BOS, 320, 49408, EOS, EOS]


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("vocab.json", None, r"t/vocab.json: cannot be read \(No such file"),
        ("merges.txt", None, "t/merges.txt: cannot be read"),
        ("vocab.json", '{"a": 1', "t/vocab.json: cannot be read"),
        ("vocab.json", '{"a": 1}', "t: not a CLIP vocabulary"),
        ("vocab.json", "[]", "t: not a CLIP vocabulary"),
        ("vocab.json", b"\xff\xfe\x00", "t/vocab.json: cannot be read"),
        ("merges.txt", "", "t: not a CLIP vocabulary"),
        ("merges.txt", "#version: 0.2\ni n\nt h\n", "t: the merges are incomplete"),
        ("special_tokens_map.json", "{", "t/special_tokens_map.json: cannot be read"),
        ("special_tokens_map.json", '{"pad_token": "<pad>"}', "t: not a CLIP vocabulary"),
    ],
)
def test_a_bad_folder_is_one_line_that_names_it(tmp_path, file, content, says):
    folder = copy(tmp_path / "t")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)


def test_a_missing_folder_and_a_bad_tokenizer_json_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*cannot be read"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    for content, says in (
        ("{", "tokenizer.json: cannot be read"),
        ("[1]", "not a CLIP vocabulary"),
        ("{}", "not a CLIP vocabulary"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=says):
            Tokenizer.from_folder(tmp_path)


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


def test_a_merges_file_without_blanks_is_read_in_linear_time(tmp_path):
    folder = copy(tmp_path / "t")
    merges = (folder / "merges.txt").read_text("utf-8")
    # A pattern such as (\\S+) (\\S+) would take minutes on this line.
    (folder / "merges.txt").write_text("#version: 0.2\n" + "x" * 1_000_000 + "\n" + merges, "utf-8")
    assert Tokenizer.from_folder(folder)("a dog")[:4] == [BOS, 320, 1929, EOS]
