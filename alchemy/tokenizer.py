"""CLIP's byte-level BPE: a prompt becomes exactly 77 ids, BOS + at most 75 tokens + EOS + padding.

The text is normalized and split into words by Unicode category; the UTF-8 bytes of each word are
then merged pair by pair in the order in which the pairs were learned (Sennrich et al. 2016).
The ids equal those of transformers' CLIPTokenizer, which omits the ftfy and html.unescape steps of
OpenAI's code. Weighted syntax such as "(word:1.2)" has no meaning here.
"""

import heapq
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
MAX_TOKENS = 75  # of the prompt itself; with BOS and EOS, 77 positions

# Unicode white space. Python's \s also matches \x1c to \x1f, the reference does not.
WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
# Matched as a whole where a word starts: in `"'s` the apostrophe belongs to the other signs.
LITERALS = re.compile(r"<\|(?:start|end)oftext\|>|'(?:s|t|re|ve|m|ll|d)")


def byte_to_symbol() -> dict[int, str]:
    """One visible character per byte: printable Latin-1 stands for itself, others from U+0100."""
    symbols = {}
    shifted = 256
    for byte in range(256):
        if 33 <= byte < 127 or 161 <= byte < 173 or byte >= 174:
            symbols[byte] = chr(byte)
        else:
            symbols[byte] = chr(shifted)
            shifted += 1
    return symbols


BYTE_TO_SYMBOL = byte_to_symbol()
SYMBOL_TO_BYTE = {symbol: byte for byte, symbol in BYTE_TO_SYMBOL.items()}


def byte_symbols(text: str) -> list[str]:
    """The UTF-8 bytes of the text, each as its visible character."""
    return [BYTE_TO_SYMBOL[byte] for byte in text.encode("utf-8", "replace")]


def normalize(text: str) -> str:
    """NFC, runs of white space to one blank, lower case."""
    text = WHITE_SPACE.sub(" ", unicodedata.normalize("NFC", text))
    # Character by character: "ΟΔΟΣ".lower() is context-sensitive and ends in ς, the reference in σ.
    return "".join(char.lower() for char in text)


def char_class(char: str) -> str:
    """ " " for a blank, "L" for a letter, "N" for a number, "M" for a mark, "S" for the rest."""
    if char == " ":
        return char
    category = unicodedata.category(char)[0]
    return category if category in "LNM" else "S"


def word_end(text: str, start: int) -> int:
    """End of the word that starts at `start`: letters, one number, or a run of anything else."""
    first = char_class(text[start])
    end = start + 1
    if first == "N":
        return end
    # A mark is not a letter: it continues a run of signs and ends a run of letters.
    allowed = "L" if first == "L" else "MS"
    while end < len(text) and char_class(text[end]) in allowed:
        end += 1
    return end


def split_words(text: str) -> Iterator[tuple[str, bool]]:
    """Normalized text as (word, joined) pairs; joined: no blank and no sign precedes the word."""
    start = 0
    while start < len(text):
        if text[start] == " ":
            start += 1
            continue
        literal = LITERALS.match(text, start)
        end = literal.end() if literal else word_end(text, start)
        word = text[start:end]
        if literal and word.startswith("<"):
            # "<|ENDOFTEXT|>" is not special, but its "|>" does not absorb the signs that follow.
            yield word[:2], False
            yield word[2:-2], False
            yield word[-2:], False
        else:
            touches = start > 0 and char_class(text[start - 1]) not in " S"
            yield word, touches and char_class(text[start]) != "S"
        start = end


class Word(NamedTuple):
    """The ids of a word, and whether it continues the word before (see split_words)."""

    ids: list[int]
    joined: bool


class Tokenizer:
    """Prompts to ids.

    vocab: {token: id}. merges: pairs of tokens, the first learned first. pad: id of the padding.
    special: {literal text: id}; these are matched anywhere, inside words too. The padding token is
    matched in the text as typed, the others after normalization and so in any case of letters.
    SDXL's second tokenizer pads with "!", so every "!" has id 0 there.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        pad: int,
        special: dict[str, int],
    ):
        self.vocab = vocab
        self.pad = pad
        self.merge_ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.special = {normalize(token): [i] for token, i in special.items()}
        self.id_to_token = {i: token for token, i in vocab.items()}
        for token, i in special.items():
            self.id_to_token[i] = "".join(byte_symbols(token))

    @classmethod
    def from_folder(cls, path: str | Path, pad: int | None = None) -> "Tokenizer":
        """Read vocab.json, merges.txt and the small files beside them, or a tokenizer.json alone.

        Raises ValueError, in one line that names the file, if it cannot be read or is incomplete.
        """
        from .formats.vocabulary import read_vocabulary

        return cls(*read_vocabulary(Path(path), pad))

    def __call__(self, text: str) -> list[int]:
        """The 77 ids of a prompt: cut to 75 first, so that EOS, the pooled position, remains."""
        ids = self.ids(text)[:MAX_TOKENS]
        padding = [self.pad] * (MAX_TOKENS - len(ids))
        return [self.vocab[BOS], *ids, self.vocab[EOS], *padding]

    def ids(self, text: str) -> list[int]:
        """The ids of a text alone, not truncated."""
        ids = []
        for word in self.words(text):
            ids += word.ids
        return ids

    def tokens(self, text: str) -> list[tuple[int, str]]:
        """(id, text) of every token, not truncated; the first is at position 1 of the 77."""
        return [(i, self.decode([i])) for i in self.ids(text)]

    def find(self, text: str, phrase: str) -> list[list[int]]:
        """Positions within the 77 of each occurrence of a word or phrase.

        An occurrence must not touch another letter or number, and must fit before the cut.
        """
        words = self.words(text)
        searched = self.words(phrase)
        length = len(self.ids(phrase))
        occurrences = []
        position = 1  # of the first token of words[n]; BOS is at 0
        for n, word in enumerate(words):
            end = n + len(searched)
            continues = end < len(words) and words[end].joined
            fits = position + length <= MAX_TOKENS + 1
            if searched and words[n:end] == searched and not continues and fits:
                occurrences.append([*range(position, position + length)])
            position += len(word.ids)
        return occurrences

    def truncated_text(self, text: str) -> str:
        """The words beyond the 75th token; a word that is cut in two is listed whole."""
        count = 0
        rest = ""
        for word in self.words(text):
            count += len(word.ids)
            if count > MAX_TOKENS:
                rest += ("" if word.joined else " ") + self.decode(word.ids)
        return rest.strip()

    def add(self, token: str, count: int = 1) -> int:
        """Add a placeholder of `count` new, consecutive ids; return the first of them.

        Raises ValueError if the token is blank, exists already, or contains the padding token.
        """
        plain = normalize(token).strip()
        exists = plain in self.special or plain in self.vocab or plain + "</w>" in self.vocab
        if not plain or exists or self.id_to_token[self.pad] in token:
            raise ValueError(
                f'"{token}" is blank, a token already or contains one; '
                'choose another, such as "<my-dog>"'
            )
        first = max(self.id_to_token) + 1
        ids = [*range(first, first + count)]
        self.special[normalize(token)] = ids
        self.id_to_token |= dict.fromkeys(ids, "".join(byte_symbols(token)))
        return first

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, in lower case; words are separated by one blank."""
        symbols = "".join(self.id_to_token[i] for i in ids)
        symbols = symbols.replace("</w>", BYTE_TO_SYMBOL[32])
        data = bytes(SYMBOL_TO_BYTE[symbol] for symbol in symbols)
        return data.decode("utf-8", "replace").strip()

    def words(self, text: str) -> list[Word]:
        """The words of a text; a special token is a word of its own."""
        special = {token: ids for token, ids in self.special.items() if ids != [self.pad]}
        # The longest first, so that of two that start alike the longer one matches.
        longest_first = sorted(special, key=len, reverse=True)
        pattern = "(" + "|".join(map(re.escape, longest_first)) + ")"
        words = []
        for n, typed in enumerate(text.split(self.id_to_token[self.pad])):
            if n > 0:
                words.append(Word([self.pad], joined=False))
            for part in re.split(pattern, normalize(typed)):
                if part in special:
                    words.append(Word(special[part], joined=False))
                    continue
                for word, joined in split_words(part):
                    symbols = self.merge(byte_symbols(word))
                    ids = [self.vocab.get(symbol, self.vocab[EOS]) for symbol in symbols]
                    words.append(Word(ids, joined))
        return words

    def merge(self, symbols: list[str]) -> list[str]:
        """Merge the pair of neighbours that was learned first, wherever it occurs, and repeat.

        A heap holds (rank, left position) of every known pair, so that a word of n bytes takes
        O(n log n). An entry is outdated if the symbol at its position has changed since.
        """
        symbols = [*symbols[:-1], symbols[-1] + "</w>"]  # tokens that end a word are distinct
        end = len(symbols)
        before = [*range(-1, end - 1)]
        after = [*range(1, end + 1)]

        def rank(left: int) -> int | None:
            right = after[left] if left >= 0 else end
            if right == end:
                return None
            return self.merge_ranks.get((symbols[left], symbols[right]))

        heap = [(rank(n), n) for n in range(end) if rank(n) is not None]
        heapq.heapify(heap)
        while heap:
            # All occurrences of the best pair, left to right, before any pair that they create.
            best = heap[0][0]
            lefts = []
            while heap and heap[0][0] == best:
                lefts.append(heapq.heappop(heap)[1])
            for left in lefts:
                if rank(left) != best:
                    continue
                right = after[left]
                symbols[left] += symbols[right]
                symbols[right] = ""
                after[left] = after[right]
                if after[left] < end:
                    before[after[left]] = left
                for position in (before[left], left):
                    if rank(position) is not None:
                        heapq.heappush(heap, (rank(position), position))
        return [symbol for symbol in symbols if symbol]
