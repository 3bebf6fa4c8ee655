"""Pictures in and out. The files are written here byte by byte where that is the point."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from alchemy import images
from alchemy.formats.png import facts_of, save
from alchemy.extras.inspect import sheets
from helpers.planted import noise_picture


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, more=b""):
    """A PNG with the header given, whatever the rows (bytes, a filter byte before each) are."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + more
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def stored(tmp_path):
    """stored(bytes or picture, name, ...) -> path."""

    def store(content, name="picture.png", **how):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else content.save(path, **how)
        return path

    return store


def pixels(picture):
    return np.asarray(picture).tolist()


# What is read


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_picture_is_turned_as_its_exif_says(stored, name, orientation):
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16)), upright.paste("blue", (32, 0, 48, 16))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[
        orientation
    ]  # Image.Transpose: 0, 1 flips, 2, 3, 4 turns, 5, 6 both
    exif = Image.Exif()
    exif[0x112] = orientation
    read = images.read(
        stored(upright if undo is None else upright.transpose(undo), name, exif=exif, quality=95)
    )
    assert (
        read.size == (48, 32)
        and np.abs(np.asarray(read, dtype=int)[4:12, 4:12] - [255, 0, 0]).max() < 40
    )
    assert (
        np.abs(np.asarray(read, dtype=int)[4:12, 36:44] - [0, 0, 255]).max() < 40
        and np.asarray(read)[20:28, 4:44].min() > 215
    )


def test_alpha_goes_onto_white_and_a_masks_onto_black(stored):
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(100, 0, 200, 255), (100, 0, 200, 0), (0, 0, 0, 51)])
    assert pixels(images.read(stored(picture))) == [
        [[100, 0, 200], [255, 255, 255], [204, 204, 204]]
    ]
    mask = Image.new("LA", (3, 1))
    mask.putdata([(255, 255), (255, 0), (200, 51)])
    assert pixels(images.read(stored(mask), "L")) == [[255, 0, 40]]


def test_a_palettes_transparency_is_alpha_too(stored):
    picture = Image.new("P", (3, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.putdata([0, 1, 2])
    assert pixels(images.read(stored(picture, transparency=1))) == [
        [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    ]
    assert pixels(images.read(stored(picture, transparency=bytes([0, 51, 255])))) == [
        [[255, 255, 255], [204, 255, 204], [0, 0, 255]]
    ]
    assert pixels(
        images.read(
            stored(
                png(
                    2,
                    1,
                    8,
                    2,
                    bytes([0, 1, 2, 3, 4, 5, 6]),
                    chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)),
                )
            )
        )
    ) == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize(
    "colour, mode, values, wanted",
    [
        (0, "RGB", [0, 0x0101, 0x8080, 0xFFFF], [[0] * 3, [1] * 3, [128] * 3, [255] * 3]),
        (0, "L", [0, 0x0101, 0x8080, 0xFFFF], [0, 1, 128, 255]),
        (2, "RGB", [0, 0x8080, 0xFFFF], [[0, 128, 255]]),
        (4, "RGB", [0x8080, 0xFFFF, 0, 0], [[128] * 3, [255] * 3]),
    ],
)
def test_sixteen_bits_keep_their_upper_eight(stored, colour, mode, values, wanted):
    rows = b"\0" + struct.pack(f">{len(values)}H", *values)
    assert pixels(images.read(stored(png(len(wanted), 1, 16, colour, rows)), mode)) == [wanted]


def test_one_bit_grey_and_cmyk_become_rgb(stored):
    assert pixels(images.read(stored(png(4, 1, 1, 0, b"\0\xa0")))) == [
        [[255] * 3, [0] * 3, [255] * 3, [0] * 3]
    ]
    cmyk = images.read(stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg", quality=95))
    assert cmyk.mode == "RGB" and np.abs(np.asarray(cmyk, dtype=int) - [255, 0, 0]).max() <= 3


# What is not

BAD = {
    "a text": (b"hello, this is no picture", "not a readable JPEG, PNG or WebP picture"),
    "nothing": (b"", "not a readable"),
    "a bomb that Pillow knows": (
        png(50000, 50000, 8, 2, b"\0"),
        "more than 100 million pixels; make it smaller",
    ),
    "a bomb that Pillow only warns of": (
        png(10001, 10000, 8, 2, b"\0"),
        "more than 100 million pixels; make it smaller",
    ),
    "a bomb of text": (
        png(1, 1, 8, 2, b"\0abc", chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10**7))),
        "not a readable",
    ),
    "missing rows": (png(40, 40, 8, 2, b"\0"), "not a readable"),
    "a header of four bytes": (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0\0\0\1"),
        "not a readable",
    ),
    "EXIF cut short": (png(1, 1, 8, 2, b"\0abc", chunk(b"eXIf", b"II*\0\0\0")), "not a readable"),
    "a short pHYs chunk": (png(1, 1, 8, 2, b"\0abc", chunk(b"pHYs", b"\0\0\0")), "not a readable"),
}


@pytest.mark.parametrize("content, said", BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("error")
def test_what_is_no_picture_is_one_line_that_names_the_file(stored, content, said):
    path = stored(content)
    with pytest.raises(ValueError) as caught:
        images.read(path)
    assert str(caught.value).startswith(f"{path}: {said}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.99])
@pytest.mark.parametrize(
    "name, how",
    [("a.jpg", {}), ("b.jpg", dict(progressive=True)), ("a.png", {}), ("a.webp", {})],
    ids=lambda v: str(v),
)
def test_a_picture_cut_short_is_an_error_that_names_it(stored, name, how, share):
    path = stored(noise_picture(50, 70), name, **how)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size) - 2])
    with pytest.raises(ValueError, match=f"{name}: not a readable"):
        images.read(path)


def test_a_missing_file_a_folder_and_another_format_are_named(stored, tmp_path):
    for path, said in (
        (tmp_path / "none.png", "no such file"),
        (tmp_path, "not a readable"),
        (stored(Image.new("RGB", (4, 4)), "a.gif"), "not a readable"),
    ):
        with pytest.raises(ValueError, match=f"^{path}: {said}"):
            images.read(path)


def test_damaged_bytes_never_give_another_kind_of_error(stored):
    exif, rng = Image.Exif(), np.random.default_rng(0)
    exif[0x112] = 6
    for name in ("a.jpg", "a.png", "a.webp"):
        whole = stored(noise_picture(20, 30), name, exif=exif).read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 200), 3):
                damaged[place] = rng.integers(256)
            try:
                assert images.read(stored(bytes(damaged), name)).mode == "RGB"
            except ValueError as error:
                assert name in str(error)


# Tensors


def test_every_level_survives_the_way_to_a_tensor_and_back():
    picture = Image.fromarray(np.arange(768, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8))
    tensor = images.to_tensor(picture)
    assert (
        tensor.shape == (1, 3, 16, 16)
        and tensor.dtype == torch.float32
        and (tensor.min(), tensor.max()) == (-1, 1)
    )
    assert torch.equal(tensor[0, :, 0, 1], torch.tensor([3, 4, 5]) / 127.5 - 1)
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert np.array_equal(np.asarray(images.to_image(tensor[0].to(dtype))), np.asarray(picture))
    off = (
        torch.linspace(-0.49, 0.49, 256).view(1, 16, 16) / 127.5
    )  # rounded to the nearest, not down
    assert np.array_equal(np.asarray(images.to_image(tensor[0] + off)), np.asarray(picture))
    assert pixels(images.to_image(torch.tensor([-9.0, 0.1, 9.0]).view(3, 1, 1))) == [
        [[0, 140, 255]]
    ]


def test_composite_mixes_by_the_mask_and_rounds_to_the_nearest():
    old, new = (
        Image.fromarray(np.array([row], dtype=np.uint8))
        for row in ([[0, 100, 255]] * 4, [[255, 101, 0]] * 4)
    )
    mixed = images.composite(old, new, torch.tensor([[0.0, 0.3, 0.75, 1.0]]))
    assert pixels(mixed) == [[[0, 100, 255], [76, 100, 178], [191, 101, 64], [255, 101, 0]]]


@pytest.mark.parametrize("size", [(33, 47), (64, 10)])
def test_composite_is_the_picture_to_the_bit_where_the_mask_is_0(size):
    old, new = noise_picture(*size), noise_picture(*size, seed=1)
    mask = torch.rand(size).where(torch.rand(size) < 0.5, torch.zeros(()))
    mixed = np.asarray(images.composite(old, new, mask))
    assert np.array_equal(mixed[mask == 0], np.asarray(old)[mask == 0])
    assert np.array_equal(np.asarray(images.composite(old, new, torch.ones(size))), np.asarray(new))


# Facts

FACTS = {
    "prompt": "a photo of a “dog”, 犬, \x07 & <b>",
    "seed": 0,
    "lora": [["a.safetensors", 0.8]],
    "guidance": 5.0,
    "size": None,
}


def test_facts_return_from_a_png_with_the_pixels_to_the_bit(tmp_path):
    picture = noise_picture(20, 30)
    save(picture, tmp_path / "a.png", FACTS)
    assert facts_of(tmp_path / "a.png") == FACTS and pixels(
        images.read(tmp_path / "a.png")
    ) == pixels(picture)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_without_facts_is_an_error_that_names_it(stored, tmp_path):
    text = b"alchemy\0{not json"
    for path in (
        stored(noise_picture(4, 4), "bare.png"),
        stored(noise_picture(4, 4), "bare.jpg"),
        stored(png(1, 1, 8, 2, b"\0abc", chunk(b"tEXt", text)), "other.png"),
    ):
        with pytest.raises(ValueError, match=f"^{path}: has no facts of how it was made"):
            facts_of(path)
    with pytest.raises(ValueError, match="none.png: no such file"):
        facts_of(tmp_path / "none.png")
    assert json.loads(json.dumps(FACTS)) == FACTS


# Sheets


@pytest.mark.parametrize(
    "size, shown",
    [
        ((64, 64), (256, 256)),
        ((100, 150), (300, 450)),
        ((1024, 1024), (1024, 1024)),
        ((20, 400), (40, 800)),
        ((3000, 1500), (1024, 512)),
    ],
)
def test_a_sheet_shows_small_pictures_enlarged_sharply_and_huge_ones_reduced(size, shown):
    picture = noise_picture(*size[::-1])
    made = sheets.handy(picture)
    assert made.size == shown
    if shown > size:
        factor = shown[0] // size[0]
        assert np.array_equal(
            np.asarray(made)[factor // 2 :: factor, factor // 2 :: factor], np.asarray(picture)
        )


def test_a_sheet_holds_every_picture_under_its_label():
    red, green = (Image.new("RGB", (256, 256), colour) for colour in ("red", "green"))
    page = np.asarray(
        sheets.sheet(
            [
                [("a", red), ("a label much longer than its picture is wide, and cut", green)],
                [("b", green)],
            ]
        )
    )
    assert [(page == colour).all(-1).sum() for colour in ([255, 0, 0], [0, 128, 0])] == [
        256**2,
        2 * 256**2,
    ]
    dimmed = sheets.outlined(red, torch.eye(256))
    assert pixels(dimmed)[0][:2] == [[255, 0, 0], [89, 0, 0]] and pixels(
        sheets.grey(torch.tensor([[0, 0.5, 1]]))
    ) == [[0, 128, 255]]


def test_a_loss_curve_is_drawn_with_gaps_and_without_a_value():
    for values in ([], [float("nan")], [1.0], [0.5, float("inf"), 0.4, float("nan"), 0.3] * 20):
        assert sheets.curve(values).size == (512, 256)
