"""The tokenizer (alchemy/tokenizer.py) against transformers' ids, rule by rule, and what else it promises."""

import json
import sys
import unicodedata
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from alchemy.tokenizer import Tokenizer  # noqa: E402

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
        return json.loads(file.metadata()["prompts"]), [
            file.get_tensor(name).tolist() for name in ("ids_1", "ids_2")
        ]


# The ids


@pytest.mark.parametrize("n", [0, 1])
def test_ids_equal_the_reference(both, reference, n):
    prompts, ids = reference
    assert len(prompts) >= 320 and all(len(row) == 77 for row in ids[n])
    assert [p for p, row in zip(prompts, ids[n]) if both[n](p) != row] == []


def test_reference_holds_the_prompts_of_the_list(reference):
    sys.path.insert(0, str(ROOT / "tests" / "reference"))
    from prompts import PROMPTS

    assert reference[0] == PROMPTS


def test_a_literal_prompt_has_the_known_ids(both):
    start = [BOS, 320, 1125, 539, 320, 1929, EOS]
    assert both[0]("a photo of a dog") == start + [EOS] * 70
    assert both[1]("a photo of a dog") == start + [0] * 70
    assert both[0]("") == [BOS] + [EOS] * 76 and both[1]("") == [BOS, EOS] + [0] * 75


def test_first_eos_ends_the_text_and_padding_follows(both):
    for tokenizer, pad in zip(both, (EOS, 0)):
        assert tokenizer.pad == pad
        ids = tokenizer("a dog, a cat")
        end = ids.index(EOS)
        assert end == 1 + len(tokenizer.tokens("a dog, a cat")) and set(ids[end + 1 :]) == {pad}


@pytest.mark.parametrize("count", [74, 75, 76, 77, 200])
def test_truncation_keeps_eos(both, count):
    for tokenizer in both:
        ids = tokenizer("dog " * count)
        assert len(ids) == 77 and ids.index(EOS) == min(count, 75) + 1


# The text rules


def test_lower_case_is_per_character_so_sigma_is_not_final(one):
    assert one("ΟΔΟΣ") == one("οδοσ") != one("οδος")


def test_composed_and_decomposed_accents_are_one(one):
    assert one("cafe\u0301") == one("caf\u00e9") != one("cafe")


def test_white_space_is_unicodes_not_pythons(one):
    for char in map(chr, range(0x110000)):
        if unicodedata.category(char)[0] == "Z" or char in "\t\n\v\f\r\x85":
            assert one(f"a{char}{char}b") == one("a b"), hex(ord(char))
    for char in "\x1c\x1d\x1e\x1f\u200b\u180e":
        assert one(f"a{char}b") != one("a b"), hex(ord(char))


def test_split_takes_letters_together_digits_alone_and_a_contraction_only_at_the_start_of_a_word(
    one,
):
    spelled = lambda text: [piece for _, piece in one.tokens(text)]  # noqa: E731
    assert spelled("cat2024,dog") == ["cat", "2", "0", "2", "4", ",", "dog"]
    assert spelled("it's") == ["it", "'s"] and spelled("\"'s") == ["\"'", "s"]
    assert spelled("(word:1.2)") == ["(", "word", ":", "1", ".", "2", ")"]
    assert spelled("&amp;") == ["&", "amp", ";"]  # no html.unescape


def test_exclamation_mark_is_special_in_tokenizer_2_only(both):
    assert both[0]("a!b")[:5] == [BOS, 320, 256, 321, EOS]
    assert both[1]("a!b")[:5] == [BOS, 320, 0, 321, EOS]
    assert both[1]("wow!!")[:5] == [BOS, 2781, 0, 0, EOS]
    assert 0 not in both[1]("！¡")[: both[1]("！¡").index(EOS)]  # only the ASCII one


def test_literal_special_tokens_become_their_ids(both):
    for tokenizer in both:
        assert tokenizer("a<|endoftext|>b")[:5] == [BOS, 320, EOS, 321, EOS]
        assert tokenizer("<|STARTOFTEXT|> b")[:4] == [BOS, BOS, 321, EOS]
    # the padding token is looked for before lower-casing, the other one after it
    assert both[0]("<|ENDOFTEXT|>")[1] != EOS and both[1]("<|ENDOFTEXT|>")[1] == EOS


def test_a_bad_byte_of_the_command_line_is_no_crash(one):
    assert len(one("a \udcff dog")) == 77


# Words and their positions


def test_find_gives_every_occurrence(one):
    text = "a cat and a caterpillar, cats; the cat's CAT"
    ids = one(text)
    found = one.find(text, "cat")
    assert found == one.find(text, "Cat") == [[2], [10], [12]]
    assert all(ids[p] == 2368 for [p] in found)


def test_find_is_not_inside_other_words(one):
    assert one.find("caterpillar concatenate cats", "cat") == []
    assert one.find("cat2 2cat e\u0301cat", "cat") == []
    assert one.find("124 24 1 24", "24") == [[4, 5], [7, 8]]
    assert one.find("2 4", "24") == one.find("24", "2 4") == []
    assert one.find("हिन्दी", "ह") == []  # the mark that follows is no letter, but the word goes on
    assert one.find("(cat) cat-like my_cat <cat>", "cat") == [[2], [4], [9], [11]]


def test_find_words_of_several_tokens_and_phrases(both):
    text = "Golden Retriever, xqzzyv golden-retriever, goldenretriever golden  retriever"
    for tokenizer in both:
        ids = tokenizer(text)
        [strange] = tokenizer.find(text, "xqzzyv")
        assert len(strange) > 1 and tokenizer.decode(ids[p] for p in strange) == "xqzzyv"
        first, second = tokenizer.find(text, "golden retriever")
        assert first == [1, 2] and tokenizer.decode(ids[p] for p in second) == "golden retriever"
        assert second[1] == ids.index(EOS) - 1


def test_find_leaves_out_what_the_limit_cuts(one):
    assert one.find("dog " * 80, "dog") == [[p] for p in range(1, 76)]
    text = "a " * 74 + "golden retriever"
    assert one.find(text, "golden") == [[75]] and one.find(text, "golden retriever") == []
    assert one.find("a dog", "cat") == one.find("a dog", "") == one.find("", "dog") == []


def test_pieces_stand_at_their_positions(both):
    text = "a caterpillaresque 🦄, don't! 日本"
    for tokenizer in both:
        pieces = tokenizer.tokens(text)
        assert [i for i, _ in pieces] == tokenizer(text)[1 : len(pieces) + 1]
        assert "".join(piece for _, piece in pieces).startswith("acaterpillaresque")
    assert len(tokenizer.tokens("dog " * 100)) == 100


def test_lost_names_the_words_that_do_not_fit(both):
    for tokenizer in both:
        assert tokenizer.truncated_text("") == tokenizer.truncated_text("dog " * 75) == ""
        assert tokenizer.truncated_text("dog " * 75 + "red cat") == "red cat"
        assert (
            tokenizer.truncated_text("dog " * 75 + "in 2024 at no2") == "in 2024 at no2"
        )  # a numeral is a word of its own, but written as it was
        assert (
            tokenizer.truncated_text("dog " * 74 + "caterpillaresque 🦄") == "caterpillaresque 🦄"
        )  # whole, though its start fits


def test_decode_is_the_text_again(both):
    for tokenizer in both:
        ids = tokenizer("A café, 日本 🦄 don't")
        assert tokenizer.decode(ids[1 : ids.index(EOS)]) == "a café , 日本 🦄 don 't"
    assert tokenizer.decode(ids).startswith("<|startoftext|>a café")


# New tokens


def test_add_gives_the_next_id_and_matches_literally(fresh):
    before = fresh("a dog")
    assert (
        fresh.add("<my-dog>") == 49408
        and fresh.add("<my-dog>_1") == 49409
        and fresh.add("<häuschen>") == 49410
    )
    assert fresh("a <my-dog>")[:4] == [BOS, 320, 49408, EOS]
    assert (
        fresh("a <MY-DOG>")[2] == 49408
    )  # found after lower-casing, as transformers finds an added token
    assert fresh("x<my-dog>_1, <my-dog>s")[:7] == [
        BOS,
        343,
        49409,
        267,
        49408,
        338,
        EOS,
    ]  # the longest of two
    assert fresh("a dog") == before
    assert fresh.find("a <my-dog> and a <my-dog>", "<my-dog>") == [[2], [5]]
    assert fresh.tokens("<my-dog> <häuschen>") == [(49408, "<my-dog>"), (49410, "<häuschen>")]
    assert fresh("<my-dog> " * 80)[75:] == [49408, EOS]


@pytest.mark.parametrize(
    "token", ["dog", "cactus", "!", "<|endoftext|>", "<|EndOfText|>", "", "  "]
)
def test_add_refuses_what_exists(fresh, token):
    with pytest.raises(ValueError, match="token already"):
        fresh.add(token)


def test_add_refuses_a_second_time_in_any_case(fresh):
    fresh.add("<my-dog>")
    for token in ("<my-dog>", "<My-Dog>"):
        with pytest.raises(ValueError, match="token already"):
            fresh.add(token)
