"""CLIP's byte-level BPE: a prompt becomes exactly 77 ids, BOS + at most 75 pieces + EOS + padding.

The text is normalised, split into words by Unicode category, and the UTF-8 bytes of each word are merged pair by pair in the order
learnt (Sennrich et al. 2016). The ids are those of transformers' CLIPTokenizer, which leaves out the ftfy and html.unescape of
OpenAI's own code. "(word:1.2)" has no meaning here: signs, letters and digits like any others.
"""

import json
import re
import unicodedata
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

BOS, EOS, ROOM = "<|startoftext|>", "<|endoftext|>", 75
WHITE = re.compile(
    "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
)  # Python's \s also takes \x1c-\x1f
FIXED = re.compile(r"<\|(?:start|end)oftext\|>|'(?:s|t|re|ve|m|ll|d)")
RUN = re.compile(
    r" |L+|N|[MS]+"
)  # of categories: a numeral stands alone, a mark (M) is no letter but a sign
# A byte is written as one visible character: itself where it is printable Latin-1, else the next from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE = {b: chr(b) for b in PRINTABLE} | {
    b: chr(256 + n) for n, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))
}
UNBYTE = {char: byte for byte, char in BYTE.items()}


def normalise(text):
    # Lower case one character at a time: "ΟΔΟΣ".lower() heeds the neighbours and ends in ς, the reference in σ.
    return "".join(char.lower() for char in WHITE.sub(" ", unicodedata.normalize("NFC", text)))


def split(text):
    """Yield (word, joined) of normalised text; joined: it touches the word before, with neither a gap nor a sign between."""
    sorts, start = (
        "".join(c if c == " " else re.sub("[^LNM]", "S", unicodedata.category(c)[0]) for c in text),
        0,
    )
    while start < len(text):
        fixed = FIXED.match(
            text, start
        )  # only where a word starts: in `"'s` the apostrophe belongs to the signs
        end = (fixed or RUN.match(sorts, start)).end()
        word, joined = (
            text[start:end],
            start > 0 and not {*sorts[start - 1 : start + 1]} & {" ", "S"},
        )
        if (
            fixed and word[0] == "<"
        ):  # "<|ENDOFTEXT|>" where only the lower case is special: its "|>" takes no further signs
            yield from ((part, False) for part in (word[:2], word[2:-2], word[-2:]))
        elif word != " ":
            yield word, joined
        start = end


def letters(text):
    return [BYTE[byte] for byte in text.encode("utf-8", "replace")]


def read(file, default=None):
    try:
        text = file.read_text(encoding="utf-8") if default is None or file.exists() else default
        return json.loads(text) if file.suffix == ".json" else text
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None


class Tokenizer:
    """`special` maps literal tokens to their ids. The padding token is looked for in the text as typed, the others after normalisation
    and so in any case of letters. Tokenizer 2 pads with "!", so "!" is id 0 there, wherever it stands."""

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        pad: int,
        special: dict[str, int],
    ):
        self.vocab, self.pad, self.rank = vocab, pad, {pair: n for n, pair in enumerate(merges)}
        self.special = {normalise(token): (i,) for token, i in special.items()}
        self.written = {i: token for token, i in vocab.items()} | {
            i: "".join(letters(token)) for token, i in special.items()
        }

    @classmethod
    def from_folder(cls, path, pad: int | None = None):
        """Read vocab.json, merges.txt and the small files beside them, or a tokenizer.json as transformers 5 saves it."""
        folder = Path(path)
        try:
            names = read(folder / "tokenizer_config.json", "{}") | read(
                folder / "special_tokens_map.json", "{}"
            )
            if (folder / "vocab.json").exists() or not (folder / "tokenizer.json").exists():
                vocab, added = read(folder / "vocab.json"), read(folder / "added_tokens.json", "{}")
                merges = re.findall(
                    r"(\S+) (\S+)", read(folder / "merges.txt")
                )  # the header is one more pair, that never occurs
            else:
                whole = read(folder / "tokenizer.json")
                vocab, added = (
                    whole["model"]["vocab"],
                    {token["content"]: token["id"] for token in whole["added_tokens"]},
                )
                merges = [
                    tuple(pair.split() if isinstance(pair, str) else pair)
                    for pair in whole["model"]["merges"]
                ]
            if (
                vocab[EOS] == 49407 and vocab["".join(merges[-1])] != 49405
            ):  # a file cut short would give other ids
                raise ValueError(
                    f"{folder}: the merges are incomplete, the last of them is {merges[-1]}"
                )
            special = {BOS: vocab[BOS], EOS: vocab[EOS], **added}
            # Where no file names the padding: tokenizer.json has "!" (0) beside BOS and EOS if it is that, and then placeholders.
            token = names.get("pad_token") or min(special.keys() - {BOS}, key=special.get)
            token = token["content"] if isinstance(token, dict) else token
            pad = (special.get(token) or vocab[token]) if pad is None else pad
            return cls(vocab, merges, pad, special)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{folder}: not a CLIP vocabulary ({type(error).__name__}: {error})"
            ) from None

    def __call__(self, text: str) -> list[int]:
        ids = [i for word, _ in self._words(text) for i in word][
            :ROOM
        ]  # EOS is never cut off: the pooled vector is there
        return [self.vocab[BOS], *ids, self.vocab[EOS]] + [self.pad] * (ROOM - len(ids))

    def pieces(self, text: str) -> list[tuple[int, str]]:
        """Id and spelling of every piece, none cut off; the first stands at position 1 of the 77."""
        return [(i, self.decode([i])) for ids, _ in self._words(text) for i in ids]

    def find(self, text: str, word: str) -> list[list[int]]:
        """The positions within the 77 of each occurrence of a word or phrase that touches no other letter or digit."""
        words, sought = [*self._words(text), ([], False)], self._words(word)
        starts = [*accumulate((len(ids) for ids, _ in words), initial=1)]
        spans = [
            (starts[n], starts[n + len(sought)])
            for n in range(len(words) - len(sought))
            if words[n : n + len(sought)] == sought and not words[n + len(sought)][1]
        ]  # sought begins unjoined
        return [[*range(start, end)] for start, end in spans if start < end <= ROOM + 1]

    def lost(self, text: str) -> str:
        """The words that do not fit, the first of them whole even where only its end is cut off; "" if all fit."""
        words = self._words(text)
        fits = sum(end <= ROOM for end in accumulate(len(ids) for ids, _ in words))
        return "".join(
            " " * (not joined) + self.decode(ids) for ids, joined in words[fits:]
        ).strip()

    def add(self, token: str, count: int = 1) -> int:
        """A placeholder with `count` ids of its own, from the one returned on, matched wherever it stands, inside words too."""
        plain = normalise(token).strip()
        if (
            not plain
            or {plain, plain + "</w>"} & self.vocab.keys()
            or plain in self.special
            or self.written[self.pad] in token
        ):
            raise ValueError(
                f'"{token}" is blank, a token already or has one in it: choose another, such as "<my-dog>"'
            )
        self.special[normalise(token)] = ids = (
            *range(max(self.written) + 1, max(self.written) + 1 + count),
        )
        self.written |= dict.fromkeys(ids, "".join(letters(token)))
        return ids[0]

    def decode(self, ids) -> str:
        text = "".join(self.written[i] for i in ids).replace("</w>", BYTE[ord(" ")])
        return bytes(UNBYTE[char] for char in text).decode("utf-8", "replace").strip()

    def _words(self, text):
        # (ids, joined) of every word. Special tokens are cut out first, the longest where several start.
        tokens = sorted(
            (token for token, i in self.special.items() if i != (self.pad,)), key=len, reverse=True
        )
        words, pattern = [], "(" + "|".join(map(re.escape, tokens)) + ")"
        for n, typed in enumerate(text.split(self.written[self.pad])):
            words += [([self.pad], False)] * (n > 0)
            for m, part in enumerate(re.split(pattern, normalise(typed))):
                words += (
                    [([*self.special[part]], False)]
                    if m % 2
                    else [(self._merge(word), joined) for word, joined in split(part)]
                )
        return words

    @lru_cache(maxsize=1 << 16)
    def _merge(self, word):
        # The ids of one word: join the neighbours whose pair was learnt first, wherever they stand, until no pair is known.
        parts = (
            "".join(f" {letter} " for letter in letters(word))[:-1] + "</w> "
        )  # the end of a word has pieces of its own
        while pairs := self.rank.keys() & pairwise(parts.split()):
            first, second = min(pairs, key=self.rank.get)
            parts = parts.replace(f" {first}  {second} ", f" {first}{second} ")
        return [self.vocab.get(part, self.vocab[EOS]) for part in parts.split()]
