"""The files of a CLIP tokenizer, each value checked: vocab.json and merges.txt with the small files
beside them, or a tokenizer.json alone."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..tokenizer import BOS, BYTE_TO_SYMBOL, EOS
from .configs import read_config
from .text import read_json_object, read_text, shorten

MAX_ID = 1 << 20  # the text encoders' own limit is checked when a checkpoint is loaded
SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # the second overrides
LAST_MERGED = {49407: 49405}  # of CLIP: {id of EOS: id that the last merge makes}


class Vocabulary(NamedTuple):
    """The arguments of Tokenizer."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    pad: int
    special: dict[str, int]


def read_vocabulary(folder: Path, pad: int | None = None) -> Vocabulary:
    """The vocabulary in a folder. pad: id of the padding, where it is not that of the files.

    Raises ValueError, in one line that names the file, if it cannot be read, is incomplete, or has
    a value that cannot be.
    """
    vocab_path, added_path = folder / "vocab.json", folder / "added_tokens.json"
    merges_path, path = folder / "merges.txt", folder / "tokenizer.json"
    if vocab_path.exists() or not path.exists():
        vocab, pairs = read_json_object(vocab_path), read_merges(merges_path)
        added = read_config(added_path)
    else:
        vocab_path = added_path = merges_path = path
        vocab, pairs, added = read_tokenizer_json(path)
    check_vocab(vocab_path, vocab)
    check_added(added_path, added, vocab)
    merges = check_merges(merges_path, pairs, vocab)

    special = {BOS: vocab[BOS], EOS: vocab[EOS], **added}
    if pad is None:
        # If no file names the padding, it is the special token with the lowest id: "!" (0) if
        # tokenizer.json lists it, else EOS. Placeholders have higher ids.
        token = read_pad_token(folder) or min(special.keys() - {BOS}, key=special.get)
        pad = special.get(token, vocab.get(token))
        if pad is None:
            raise ValueError(
                f"{folder}: by {' or '.join(SMALL_FILES)} the padding is {shorten(repr(token))}, "
                "which is no token"
            )
    return Vocabulary(vocab, merges, pad, special)


def read_merges(path: Path) -> list[list[str]]:
    """The pairs of a merges.txt, a line each, after a first line with the version."""
    try:
        lines = read_text(path).split("\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return [line.split() for line in lines if line.strip() and not line.startswith("#version")]


def read_tokenizer_json(path: Path) -> tuple[dict, list, dict]:
    """(vocab, merges, added tokens) of a tokenizer.json; their values are not checked yet."""
    content = read_json_object(path)
    model, listed = content.get("model"), content.get("added_tokens")
    try:
        vocab, pairs = model["vocab"], model["merges"]
        added = {token["content"]: token["id"] for token in listed}
    except (KeyError, TypeError, IndexError):
        vocab = pairs = added = None
    if not isinstance(vocab, dict) or not isinstance(pairs, list):
        raise ValueError(
            f"{path}: not a CLIP vocabulary, which has model.vocab, model.merges and added_tokens "
            "with content and id"
        )
    # "a b", or, since transformers 4.45, ["a", "b"]
    pairs = [pair.split() if isinstance(pair, str) else pair for pair in pairs]
    return vocab, pairs, added


def read_pad_token(folder: Path) -> str | None:
    """The text of the padding token, from the small files; None if they do not name it."""
    found = None
    for name in SMALL_FILES:
        token = read_config(folder / name).get("pad_token")
        token = token.get("content", token) if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise ValueError(
                f"{folder / name}: pad_token is {shorten(repr(token))}; it must be a token's text"
            )
        found = token or found
    return found


def check_ids(path: Path, ids: dict) -> None:
    """Raise ValueError unless {token: id} has text, and ids that are whole numbers, each once."""
    tokens = {}
    for token, i in ids.items():
        name = shorten(repr(token))
        if not isinstance(token, str) or not token.strip():
            raise ValueError(f"{path}: the token {name} is not a text, or blank")
        if type(i) is not int or not 0 <= i < MAX_ID:
            raise ValueError(
                f"{path}: {name} has the id {shorten(repr(i))}; an id is a whole number from 0"
            )
        if i in tokens:
            raise ValueError(f"{path}: {shorten(repr(tokens[i]))} and {name} have the same id, {i}")
        tokens[i] = token


def check_vocab(path: Path, vocab: dict) -> None:
    """Raise ValueError if vocab lacks a token that every text may need, or has an odd one."""
    check_ids(path, vocab)
    symbols = set(BYTE_TO_SYMBOL.values())
    needed = {BOS, EOS, *symbols, *(symbol + "</w>" for symbol in symbols)}
    missing = sorted(needed - vocab.keys())
    if missing:
        raise ValueError(
            f"{path}: not a CLIP vocabulary; of its tokens it lacks {len(missing)}, "
            f"such as {missing[0]}"
        )
    if not symbols.issuperset("".join(vocab)):
        odd = next(token for token in vocab if not symbols.issuperset(token))
        raise ValueError(f"{path}: {shorten(repr(odd))} is not made of the symbols for bytes")


def check_added(path: Path, added: dict, vocab: dict[str, int]) -> None:
    """Raise ValueError if an added token has the id of another, or another id in vocab."""
    check_ids(path, added)
    tokens = {i: token for token, i in vocab.items()}
    for token, i in added.items():
        if tokens.get(i, token) != token or vocab.get(token, i) != i:
            raise ValueError(
                f"{path}: {shorten(repr(token))} has the id {i}, which does not fit the vocabulary"
            )


def check_merges(path: Path, pairs: Iterable, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs as tuples. Raises ValueError if one makes no token, or the last are missing."""
    merges = []
    for pair in pairs:
        is_pair = isinstance(pair, list) and list(map(type, pair)) == [str, str]
        if not is_pair or "".join(pair) not in vocab:
            raise ValueError(
                f"{path}: {shorten(repr(pair))} is not a pair that makes a token of the vocabulary"
            )
        merges.append(tuple(pair))
    if not merges:
        raise ValueError(f"{path}: there are no merges; download it again")
    # A truncated file would silently change ids.
    made = vocab["".join(merges[-1])]
    if LAST_MERGED.get(vocab[EOS], made) != made:
        raise ValueError(f"{path}: the merges are incomplete, the last of them is {merges[-1]}")
    return merges
