"""The part of each photo that is trained on, so that the background of five photos is not."""

from pathlib import Path

from PIL import Image, ImageOps

from .. import images
from ..extras.inspect.sheets import grey
from ..sdxl import SDXL
from ..segmentation import binarize, segment

CHOICES = "alpha, segment, or a folder with an image of each photo's name, white on the subject"


def mask_of(how: str, path: Path, sdxl: SDXL | None, word: str | None) -> Image.Image:
    """The mask of a photo, PIL of mode "L" and of its size.

    how: "alpha", the photo's own channel; "segment", where the model's attention finds the word;
    or a folder with a file of the photo's name. Raises ValueError where there is no mask, or one
    of another size.
    """
    photo = images.read(path)
    if how == "segment":
        return segment_mask(path, photo, sdxl, word)
    if how == "alpha":
        mask = alpha_channel(path)
    else:
        mask_path = find_mask(Path(how), Path(path))
        mask = images.read(mask_path, "L")
        if mask.size != photo.size:
            raise ValueError(
                f"{mask_path} is {mask.width}x{mask.height} and {path} is "
                f"{photo.width}x{photo.height}; a mask must have its photo's size"
            )
    if not mask.getextrema()[1]:
        raise ValueError(f"{path}: its mask is empty, so nothing would be trained")
    return mask


def segment_mask(path: Path, photo: Image.Image, sdxl: SDXL, word: str) -> Image.Image:
    try:
        soft_mask = segment(sdxl, photo, word)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return grey(binarize(soft_mask, sdxl.defaults["threshold"], sdxl.defaults["dilate"]))


def alpha_channel(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        if "A" not in opened.getbands() and "transparency" not in opened.info:
            raise ValueError(f"{path} has no alpha channel; --mask takes {CHOICES}")
        return ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A")


def find_mask(folder: Path, photo: Path) -> Path:
    """The image in the folder with the photo's name, of any suffix."""
    for file in sorted(folder.glob("*")):
        is_image = file.suffix.lower() in images.SUFFIXES
        if file.stem == photo.stem and is_image and not file.samefile(photo):
            return file
    raise ValueError(f"{folder}: no mask named {photo.stem} in it; --mask takes {CHOICES}")
