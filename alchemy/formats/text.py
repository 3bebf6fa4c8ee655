"""Text files."""

from pathlib import Path


def read_text(path):
    """The text of a UTF-8 file, without its byte order mark. Raises ValueError that names the file where it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: no UTF-8 text (at byte {error.start}); save it as UTF-8"
        ) from None
