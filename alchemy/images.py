"""Pictures: files to PIL, PIL to tensors in [-1,1] and back."""

import struct
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MOST_PIXELS = 100_000_000  # a small file can unpack to gigabytes


def read(path, mode="RGB"):
    """A picture, turned as its EXIF says, in that mode; alpha goes onto white, a mask's (mode "L") onto black. Raises ValueError that
    names the file and the fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and of size: our own limit is stated here
            with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise Image.DecompressionBombError
                picture = ImageOps.exif_transpose(picture)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{path}: more than {MOST_PIXELS // 10**6} million pixels; make it smaller"
        ) from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        struct.error,
    ) as error:  # Pillow's ways to say not a picture, or cut short
        raise ValueError(f"{path}: not a readable JPEG, PNG or WebP picture ({error})") from None
    if picture.mode.startswith("I"):  # 16 bits of grey; convert would cut off what is above 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(
            Image.new("RGBA", picture.size, "white" if mode == "RGB" else "black"), picture
        )
    return picture.convert(mode)


def to_tensor(picture):
    """A picture to (1,3,H,W) float32 in [-1,1]."""
    return (
        torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5
        - 1
    )


def to_image(tensor):
    """(3,H,W) in [-1,1] to an RGB picture."""
    return Image.fromarray(
        ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    )


def composite(picture, drawn, mask):
    """picture + mask · (drawn − picture), of one size, mask (H,W) in [0,1]; where mask is 0, the picture to the bit."""
    old, new = (np.asarray(p.convert("RGB"), dtype=np.float32) for p in (picture, drawn))
    return Image.fromarray(
        np.round(old + mask.cpu().numpy()[:, :, None] * (new - old)).astype(np.uint8)
    )
