"""PNG files that say how they were made."""

import json

from PIL import Image, PngImagePlugin

from .. import images
from ..files import replace


def save(picture, path, facts, write=replace):
    """A PNG whose text chunk "alchemy" holds facts (a dict) as JSON. write: files.replace or create; returns the path."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("alchemy", json.dumps(facts, ensure_ascii=False))
    return write(path, lambda new: picture.save(new, "PNG", pnginfo=info))


def check(path, wanted):
    """Raise ValueError, naming the first that differs, where a PNG's facts are not these (a dict; it may have more)."""
    found = facts_of(path)
    for name, value in json.loads(json.dumps(wanted)).items():
        if found.get(name) != value:
            raise ValueError(
                f"{path} was drawn with other settings ({name} {found.get(name)!r}, not {value!r}): name another folder"
            )


def facts_of(path):
    """The facts in a PNG's text chunk. Raises ValueError where it has none."""
    images.read(path)
    with Image.open(path) as picture:
        picture.load()  # the chunk may stand behind the pixels
        text = picture.info.get("alchemy")
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(
            f"{path}: has no facts of how it was made (only PNG files written here have)"
        ) from None
