"""Damage bytes and JSON at random, with fixed seeds; count what the code makes of it.

ALCHEMY_FUZZ=N runs N cases per kind of file instead of 40 (CI runs 500); ALCHEMY_FUZZ_SEED is
the first of their seeds, which are 0, 1, 2, ... by default.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterator

CASES = int(os.environ.get("ALCHEMY_FUZZ", "40"))
FIRST_SEED = int(os.environ.get("ALCHEMY_FUZZ_SEED", "0"))
SECONDS = 20  # of one case, on a busy machine
DEEP = 100_000  # levels of nested JSON
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**70,
    0.5,
    -1e300,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "é" * 5000,
    [],
    [0],
    [1, 2],
    ["a"],
    {},
    {"a": 1},
)


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, insert, or repeat a piece."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(4)
        # Half of the damage goes to the start, where the headers are.
        place = rng.randrange(max(1, min(len(data), rng.choice((600, len(data))))))
        if kind == 0 and data:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randint(1, 40))
        else:
            data[place:place] = data[place : place + rng.randint(1, 200)]
    return bytes(data)


def spoil_value(value: object, rng: random.Random) -> object:
    """Replace, remove or add one value somewhere in a JSON value."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    spoiled = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(spoiled)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.15:
        del spoiled[key]
    else:
        spoiled[key] = spoil_value(spoiled[key], rng)
    return spoiled


def spoil_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON file with other values, nested too deeply, or with damaged bytes."""
    kind = rng.random()
    if kind < 0.1:
        return spoil_bytes(content, rng)
    if kind < 0.15:
        opening = rng.choice((b"[", b'{"a":'))
        return opening * DEEP
    value = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        value = spoil_value(value, rng)
    return json.dumps(value).encode()


def seeds(cases: int = CASES) -> range:
    """The seeds of so many cases."""
    return range(FIRST_SEED, FIRST_SEED + cases)


def spoiled(content: bytes, spoil: Callable, cases: int = CASES) -> Iterator[tuple[int, bytes]]:
    """(seed, damaged content) of every case."""
    for seed in seeds(cases):
        yield seed, spoil(content, random.Random(seed))


def outcome(action: Callable[[], object], what: str) -> bool:
    """True if action succeeds, False if it raises ValueError with one short line, in time.

    Anything else fails the test; `what` names the case.
    """
    start = time.monotonic()
    try:
        action()
        done = True
    except ValueError as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < 1000, f"{what}: {line[:2000]!r}"
        done = False
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
    assert time.monotonic() - start < SECONDS, f"{what} took too long"
    return done
