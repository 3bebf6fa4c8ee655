"""Which part of a photo is to be learned: its mask, so that the background of five photos is not."""

from pathlib import Path

from PIL import Image, ImageOps

from .. import images
from ..extras.inspect.sheets import grey
from ..segmentation import binarize, segment

HOW = "alpha, segment, or a folder with a picture of each photo's name, white where the subject is"


def mask_of(how, path, sdxl, word):
    """The mask of a photo, PIL of mode L and of its size. how: "alpha", the photo's own channel; "segment", where the model sees the word; or
    a folder with a file of the photo's name, of any suffix. Raises ValueError where there is none, or of another size."""
    photo = images.read(path)
    if how == "segment":
        try:
            return grey(
                binarize(
                    segment(sdxl, photo, word), sdxl.defaults["threshold"], sdxl.defaults["dilate"]
                )
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if how == "alpha":
        with Image.open(path) as opened:
            if "A" not in opened.getbands() and "transparency" not in opened.info:
                raise ValueError(f"{path} has no alpha channel; --mask takes {HOW}")
            mask = ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A")
    else:
        found = [
            file
            for file in sorted(Path(how).glob("*"))
            if file.stem == Path(path).stem
            and file.suffix.lower() in images.SUFFIXES
            and not file.samefile(path)
        ]
        if not found:
            raise ValueError(f"{how}: no mask of {Path(path).name} in it; --mask takes {HOW}")
        mask = images.read(found[0], "L")
        if mask.size != photo.size:
            raise ValueError(
                f"{found[0]} is {mask.width}x{mask.height}, {path} {photo.width}x{photo.height}: a mask has to be of its photo's size"
            )
    if not mask.getextrema()[1]:
        raise ValueError(f"{path}: its mask is empty: nothing would be learned")
    return mask
