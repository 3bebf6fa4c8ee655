"""Image files in, tensors and composites out. Files are written byte by byte where that matters."""

import struct
import zlib

import numpy as np
import pytest
import torch
from helpers.planted import noise_picture
from PIL import Image

from alchemy import images


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, color, rows, more=b""):
    """A PNG file with that header; rows: bytes, with a filter byte before each row."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


@pytest.fixture
def stored(tmp_path):
    """stored(bytes or image, name, ...) -> path."""

    def store(content, name="image.png", **options):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path, **options)
        return path

    return store


def pixels(image):
    return np.asarray(image).tolist()


def with_pixels(mode, values):
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_an_image_is_turned_upright_as_its_exif_says(stored, name, orientation):
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    upright.paste("blue", (32, 0, 48, 16))
    # Image.Transpose that undoes each orientation: 0, 1 are flips; 2, 3, 4 turns; 5, 6 both.
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    exif = Image.Exif()
    exif[0x112] = orientation
    turned = upright if undo is None else upright.transpose(undo)
    image = images.read(stored(turned, name, exif=exif, quality=95))
    array = np.asarray(image, dtype=int)
    assert image.size == (48, 32)
    assert np.abs(array[4:12, 4:12] - [255, 0, 0]).max() < 40
    assert np.abs(array[4:12, 36:44] - [0, 0, 255]).max() < 40
    assert array[20:28, 4:44].min() > 215


def test_transparency_goes_onto_white_and_a_masks_onto_black(stored):
    image = with_pixels("RGBA", [(100, 0, 200, 255), (100, 0, 200, 0), (0, 0, 0, 51)])
    expected = [[[100, 0, 200], [255, 255, 255], [204, 204, 204]]]
    assert pixels(images.read(stored(image))) == pixels(images.as_image(image)) == expected
    mask = with_pixels("LA", [(255, 255), (255, 0), (200, 51)])
    assert pixels(images.read(stored(mask), "L")) == [[255, 0, 40]]
    assert torch.equal(images.as_mask(mask, (1, 3)), torch.tensor([[255.0, 0, 40]]) / 255)

    palette = with_pixels("P", [0, 1, 2])
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    one = images.read(stored(palette, transparency=1))
    assert pixels(one) == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    several = images.read(stored(palette, transparency=bytes([0, 51, 255])))
    assert pixels(several) == [[[255, 255, 255], [204, 255, 204], [0, 0, 255]]]
    color_key = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    keyed = images.read(stored(png(2, 1, 8, 2, bytes([0, 1, 2, 3, 4, 5, 6]), color_key)))
    assert pixels(keyed) == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize(
    "color, mode, values, expected",
    [
        (0, "RGB", [0, 0x0101, 0x8080, 0xFFFF], [[0] * 3, [1] * 3, [128] * 3, [255] * 3]),
        (0, "L", [0, 0x0101, 0x8080, 0xFFFF], [0, 1, 128, 255]),
        (2, "RGB", [0, 0x8080, 0xFFFF], [[0, 128, 255]]),
        (4, "RGB", [0x8080, 0xFFFF, 0, 0], [[128] * 3, [255] * 3]),
    ],
)
def test_sixteen_bits_keep_their_upper_eight(stored, color, mode, values, expected):
    rows = b"\0" + struct.pack(f">{len(values)}H", *values)
    path = stored(png(len(expected), 1, 16, color, rows))
    assert pixels(images.read(path, mode)) == [expected]


def test_other_modes_and_formats_become_rgb(stored):
    one_bit = images.read(stored(png(4, 1, 1, 0, b"\0\xa0")))
    assert pixels(one_bit) == [[[255] * 3, [0] * 3, [255] * 3, [0] * 3]]
    cmyk = images.read(stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg", quality=95))
    assert cmyk.mode == "RGB" and np.abs(np.asarray(cmyk, dtype=int) - [255, 0, 0]).max() <= 3
    for name in ("a.bmp", "a.tiff"):
        original = noise_picture(5, 7)
        assert pixels(images.read(stored(original, name))) == pixels(original)


BAD_FILES = {
    "text": (b"hello, this is no image", "not a readable image (JPEG, PNG, WebP, BMP or TIFF)"),
    "empty": (b"", "not a readable"),
    "a bomb that Pillow refuses": (png(50000, 50000, 8, 2, b"\0"), "more than 100 million pixels"),
    "a bomb that Pillow opens": (png(10001, 10000, 8, 2, b"\0"), "more than 100 million pixels"),
    "a bomb of text": (
        png(1, 1, 8, 2, b"\0abc", chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10**7))),
        "not a readable",
    ),
    "a line": (png(600, 10, 8, 2, b"\0"), "600x10 is longer than 50:1; crop it"),
    "missing rows": (png(40, 40, 8, 2, b"\0"), "not a readable"),
    "a short header": (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0\0\0\1"), "not a readable"),
    "short EXIF": (png(1, 1, 8, 2, b"\0abc", chunk(b"eXIf", b"II*\0\0\0")), "not a readable"),
    "a short pHYs": (png(1, 1, 8, 2, b"\0abc", chunk(b"pHYs", b"\0\0\0")), "not a readable"),
}


def check_refused(path, message):
    with pytest.raises(ValueError) as caught:
        images.read(path)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.filterwarnings("error")
def test_a_bad_file_is_one_line_that_names_it(stored, content, message):
    check_refused(stored(content), message)


def test_a_missing_file_a_folder_and_another_format_are_named(stored, tmp_path):
    check_refused(tmp_path / "none.png", "no such file")
    check_refused(tmp_path, "not a readable")
    check_refused(stored(Image.new("RGB", (4, 4)), "a.gif"), "not a readable")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("name", ["a.jpg", "progressive.jpg", "a.png", "a.webp"])
def test_a_truncated_file_is_an_error_that_names_it(stored, name, share):
    options = {"progressive": True} if name.startswith("progressive") else {}
    path = stored(noise_picture(50, 70), name, **options)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size) - 2])
    check_refused(path, "not a readable")


def test_every_pixel_value_survives_the_way_to_a_tensor_and_back():
    image = Image.fromarray(np.arange(768, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8))
    tensor = images.to_tensor(image)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert torch.equal(tensor[0, :, 0, 1], torch.tensor([3, 4, 5]) / 127.5 - 1)
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert pixels(images.to_image(tensor[0].to(dtype))) == pixels(image)
    off = torch.linspace(-0.49, 0.49, 256).view(1, 16, 16) / 127.5  # rounded to the nearest
    assert pixels(images.to_image(tensor[0] + off)) == pixels(image)
    clamped = images.to_image(torch.tensor([-9.0, 0.1, 9.0]).view(3, 1, 1))
    assert pixels(clamped) == [[[0, 140, 255]]]


def test_composite_mixes_by_the_mask_and_rounds_to_the_nearest():
    old = Image.fromarray(np.array([[[0, 100, 255]] * 4], dtype=np.uint8))
    new = Image.fromarray(np.array([[[255, 101, 0]] * 4], dtype=np.uint8))
    mixed = images.composite(old, new, torch.tensor([[0.0, 0.3, 0.75, 1.0]]))
    assert pixels(mixed) == [[[0, 100, 255], [76, 100, 178], [191, 101, 64], [255, 101, 0]]]
    assert pixels(images.composite(old, new, torch.zeros(1, 4))) == pixels(old)


def test_an_image_or_mask_may_be_a_path_and_anything_else_is_an_error(stored):
    path = stored(noise_picture(4, 6))
    grey = images.as_mask(images.read(path, "L"), (4, 6))
    assert pixels(images.as_image(str(path))) == pixels(noise_picture(4, 6))
    assert torch.equal(images.as_mask(path, (4, 6)), grey) and grey.max() <= 1
    assert images.as_mask(np.ones((4, 6), dtype=bool), (4, 6)).dtype == torch.float32
    for call, message in (
        (lambda: images.as_image(torch.zeros(3, 4, 4)), "the image is a Tensor; give a PIL image"),
        (lambda: images.as_image(Image.new("L", (2000, 10))), "longer than 50:1"),
        (lambda: images.as_mask(torch.ones(6, 4), (4, 6)), "^the mask is 4x6, the image 6x4"),
        (lambda: images.as_mask(torch.zeros(4, 6), (4, 6)), "the mask is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
