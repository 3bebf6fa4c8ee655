"""Text and JSON files."""

import json
from pathlib import Path

from ..files import check_no_pipe

LONGEST = 120  # characters of a name or a reason that a message quotes


def shorten(text: object) -> str:
    """At most LONGEST characters of a text, for a message of one line."""
    text = " ".join(str(text).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises ValueError that names the file if it is not UTF-8, or a pipe.
    """
    check_no_pipe(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: no UTF-8 text (at byte {error.start}); save it as UTF-8"
        ) from None


def parse_json_object(text: str | bytes) -> dict:
    """A JSON object as a dict. Raises ValueError for any other text, however deeply nested."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value


def read_json_object(path: str | Path) -> dict:
    """The JSON object in a file, as a dict. Raises ValueError that names the file."""
    check_no_pipe(path)
    try:
        return parse_json_object(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a valid JSON object ({shorten(error)})") from None
