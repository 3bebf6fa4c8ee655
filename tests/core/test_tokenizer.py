"""The tokenizer against transformers' ids, rule by rule; positions, truncation, added tokens."""

import json
import unicodedata
from itertools import chain
from pathlib import Path

import pytest
from safetensors import safe_open

from alchemy.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "weights" / "mini"
BOS, EOS = 49406, 49407
NAMES = ("tokenizer", "tokenizer_2")


@pytest.fixture(scope="module")
def both():
    return [Tokenizer.from_folder(MINI / name) for name in NAMES]


@pytest.fixture
def one(both):
    return both[0]


@pytest.fixture
def fresh():
    return Tokenizer.from_folder(MINI / "tokenizer_2")


@pytest.fixture(scope="module")
def reference():
    with safe_open(ROOT / "tests" / "reference" / "tokens.safetensors", "np") as file:
        prompts = json.loads(file.metadata()["prompts"])
        return prompts, [file.get_tensor(name).tolist() for name in ("ids_1", "ids_2")]


# Ids


@pytest.mark.parametrize("n", [0, 1])
def test_ids_equal_the_reference(both, reference, n):
    prompts, ids = reference
    groups = json.loads((ROOT / "tests" / "reference" / "prompts.json").read_text("utf-8"))
    assert prompts == list(chain(*groups.values()))
    for prompt, row in zip(prompts, ids[n], strict=True):
        assert both[n](prompt) == row, prompt


def test_tokenizer_1_pads_with_eos_and_tokenizer_2_with_0(both):
    start = [BOS, 320, 1125, 539, 320, 1929, EOS]
    assert both[0]("a photo of a dog") == start + [EOS] * 70
    assert both[1]("a photo of a dog") == start + [0] * 70
    assert both[0]("") == [BOS] + [EOS] * 76
    assert both[1]("") == [BOS, EOS] + [0] * 75


@pytest.mark.parametrize("count", [74, 75, 76, 77, 200])
def test_a_long_prompt_is_cut_to_75_tokens_and_keeps_eos(both, count):
    for tokenizer in both:
        ids = tokenizer("dog " * count)
        assert len(ids) == 77 and ids.index(EOS) == min(count, 75) + 1


# Text rules


def test_text_is_composed_and_lower_case_does_not_depend_on_the_context(one):
    assert one("cafe\u0301") == one("caf\u00e9") != one("cafe")
    assert one("ΟΔΟΣ") == one("οδοσ") != one("οδος")
    assert len(one("a \udcff dog")) == 77  # a surrogate from the command line


def test_white_space_is_unicodes_not_pythons(one):
    for char in map(chr, range(0x110000)):
        if unicodedata.category(char)[0] == "Z" or char in "\t\n\v\f\r\x85":
            assert one(f"a{char}{char}b") == one("a b"), hex(ord(char))
    for char in "\x1c\x1d\x1e\x1f\u200b\u180e":
        assert one(f"a{char}b") != one("a b"), hex(ord(char))


@pytest.mark.parametrize(
    "text, words",
    [
        ("cat2024,dog", ["cat", "2", "0", "2", "4", ",", "dog"]),
        ("it's", ["it", "'s"]),
        ("\"'s", ["\"'", "s"]),  # a contraction starts a word
        ("(word:1.2)", ["(", "word", ":", "1", ".", "2", ")"]),
        ("&amp;", ["&", "amp", ";"]),  # no html.unescape
    ],
)
def test_words_are_letters_one_number_or_other_signs(one, text, words):
    assert [token for _, token in one.tokens(text)] == words


def test_an_exclamation_mark_is_the_padding_token_of_tokenizer_2(both):
    assert both[0]("a!b")[:5] == [BOS, 320, 256, 321, EOS]
    assert both[1]("a!b")[:5] == [BOS, 320, 0, 321, EOS]
    assert both[1]("wow!!")[:5] == [BOS, 2781, 0, 0, EOS]
    assert 0 not in both[1]("！¡")[: both[1]("！¡").index(EOS)]  # only the ASCII one


def test_literal_special_tokens_become_their_ids(both):
    for tokenizer in both:
        assert tokenizer("a<|endoftext|>b")[:5] == [BOS, 320, EOS, 321, EOS]
        assert tokenizer("<|STARTOFTEXT|> b")[:4] == [BOS, BOS, 321, EOS]
    # The padding token is matched before lower-casing, the other one after it.
    assert both[0]("<|ENDOFTEXT|>")[1] != EOS
    assert both[1]("<|ENDOFTEXT|>")[1] == EOS


# Byte-pair merging


def test_all_occurrences_of_a_pair_merge_before_a_pair_that_they_create():
    merges = [("b", "c"), ("abc", "a"), ("a", "bc")]
    tokenizer = Tokenizer({"<|endoftext|>": 0}, merges, 0, {"<|endoftext|>": 0})
    assert tokenizer.merge([*"abcabcx"]) == ["abc", "abc", "x</w>"]


# Positions


@pytest.mark.parametrize(
    "text, phrase, positions",
    [
        ("a cat and a caterpillar, cats; the cat's CAT", "Cat", [[2], [10], [12]]),
        ("caterpillar concatenate cats", "cat", []),
        ("cat2 2cat e\u0301cat", "cat", []),
        ("124 24 1 24", "24", [[4, 5], [7, 8]]),
        ("2 4", "24", []),
        ("24", "2 4", []),
        ("हिन्दी", "ह", []),  # a mark follows: not a letter, but the word goes on
        ("(cat) cat-like my_cat <cat>", "cat", [[2], [4], [9], [11]]),
        ("dog " * 80, "dog", [[p] for p in range(1, 76)]),
        ("a " * 74 + "golden retriever", "golden", [[75]]),
        ("a " * 74 + "golden retriever", "golden retriever", []),  # cut in two
        ("a dog", "cat", []),
        ("a dog", "", []),
        ("", "dog", []),
    ],
)
def test_find_gives_the_positions_of_whole_words_before_the_cut(one, text, phrase, positions):
    assert one.find(text, phrase) == positions


def test_find_takes_words_of_several_tokens_and_phrases(both):
    text = "Golden Retriever, xqzzyv golden-retriever, goldenretriever golden  retriever"
    for tokenizer in both:
        ids = tokenizer(text)
        [rare] = tokenizer.find(text, "xqzzyv")
        assert len(rare) > 1 and tokenizer.decode(ids[p] for p in rare) == "xqzzyv"
        first, second = tokenizer.find(text, "golden retriever")
        assert first == [1, 2]
        assert tokenizer.decode(ids[p] for p in second) == "golden retriever"
        assert second[1] == ids.index(EOS) - 1


def test_tokens_stand_at_their_positions_and_are_not_cut(both):
    text = "a caterpillaresque 🦄, don't! 日本"
    for tokenizer in both:
        tokens = tokenizer.tokens(text)
        assert [i for i, _ in tokens] == tokenizer(text)[1 : len(tokens) + 1]
        assert "".join(token for _, token in tokens).startswith("acaterpillaresque")
        assert len(tokenizer.tokens("dog " * 100)) == 100


@pytest.mark.parametrize(
    "text, rest",
    [
        ("", ""),
        ("dog " * 75, ""),
        ("dog " * 75 + "red cat", "red cat"),
        ("dog " * 75 + "in 2024 at no2", "in 2024 at no2"),
        ("dog " * 74 + "caterpillaresque 🦄", "caterpillaresque 🦄"),  # whole, if cut in two
    ],
)
def test_truncated_text_is_what_does_not_fit(both, text, rest):
    assert [tokenizer.truncated_text(text) for tokenizer in both] == [rest, rest]


def test_decode_returns_the_text(both):
    for tokenizer in both:
        ids = tokenizer("A café, 日本 🦄 don't")
        assert tokenizer.decode(ids[1 : ids.index(EOS)]) == "a café , 日本 🦄 don 't"
    assert tokenizer.decode(ids).startswith("<|startoftext|>a café")


# Added tokens


def test_an_added_token_gets_the_next_id_and_matches_literally(fresh):
    before = fresh("a dog")
    added = [fresh.add(token) for token in ("<my-dog>", "<my-dog>_1", "<häuschen>")]
    assert added == [49408, 49409, 49410]
    assert fresh("a <my-dog>")[:4] == [BOS, 320, 49408, EOS]
    assert fresh("a <MY-DOG>")[2] == 49408  # in any case of letters
    ids = fresh("x<my-dog>_1, <my-dog>s")  # the longer of two that match
    assert ids[:7] == [BOS, 343, 49409, 267, 49408, 338, EOS]
    assert fresh("a dog") == before
    assert fresh.find("a <my-dog> and a <my-dog>", "<my-dog>") == [[2], [5]]
    assert fresh.tokens("<my-dog> <häuschen>") == [(49408, "<my-dog>"), (49410, "<häuschen>")]
    assert fresh("<my-dog> " * 80)[75:] == [49408, EOS]


def test_a_token_that_exists_or_is_blank_is_refused(fresh):
    fresh.add("<my-dog>")
    existing = ["dog", "cactus", "!", "<|endoftext|>", "<|EndOfText|>", "<my-dog>", "<My-Dog>"]
    for token in [*existing, "", "  "]:
        with pytest.raises(ValueError, match="token already"):
            fresh.add(token)


def test_one_long_word_takes_lookups_in_proportion_to_its_length(fresh):
    class Counting(dict):
        count = 0

        def get(self, pair):
            Counting.count += 1
            return super().get(pair)

    fresh.merge_ranks = Counting(fresh.merge_ranks)
    counts = []
    for length in (2_000, 20_000):
        Counting.count = 0
        fresh.merge(["a", "b"] * (length // 2))
        counts.append(Counting.count)
    assert counts[1] < 11 * counts[0] and counts[0] < 20 * 2_000
