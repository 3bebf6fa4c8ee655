"""The pointers of alchemy/WALK.md: each quoted code stands in the line that it names.

    python tests/test_walk.py --fix        # finds the lines again, after the code has moved
"""
import re
import sys
from pathlib import Path

import pytest

WALK = Path(__file__).resolve().parents[1] / "alchemy" / "WALK.md"
POINTER = re.compile(r"\[(\S+\.py):(\d+)\]\(\1#L(\d+)\) `([^`]+)`")


def line_of(name, code):
    """The number of the one line of a file that has this code in it. Raises ValueError where there is none, or several."""
    found = [number for number, line in enumerate((WALK.parent / name).read_text(encoding="utf-8").splitlines(), 1) if code in line]
    if len(found) != 1:
        raise ValueError(f"WALK.md quotes {name}, where this stands {len(found)} times and not once: {code}")
    return found[0]


def fixed(text):
    def renumber(match):
        name, _, _, code = match.groups()
        number = line_of(name, code)
        return f"[{name}:{number}]({name}#L{number}) `{code}`"
    return POINTER.sub(renumber, text)


POINTERS = [match.groups() for match in POINTER.finditer(WALK.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name, number, link, code", POINTERS, ids=[f"{name}:{number}" for name, number, *_ in POINTERS])
def test_the_quoted_code_stands_where_the_walk_says(name, number, link, code):
    stands = line_of(name, code)
    assert stands == int(number) == int(link), f"{name}: it is line {stands}, not {number}; run: python tests/test_walk.py --fix"


def test_every_link_into_the_code_quotes_it():
    assert len(re.findall(r"\.py#L", WALK.read_text(encoding="utf-8"))) == len(POINTERS) > 30


def test_fix_finds_every_line_again_and_names_code_that_is_gone():
    text = WALK.read_text(encoding="utf-8")
    assert fixed(POINTER.sub(r"[\1:7](\1#L8) `\4`", text)) == text
    with pytest.raises(ValueError, match="quotes loop.py, where this stands 0 times and not once: x = y / 3"):
        fixed("[loop.py:7](loop.py#L7) `x = y / 3`")


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(__doc__)
    WALK.write_text(fixed(WALK.read_text(encoding="utf-8")), encoding="utf-8")
