"""TIFF files that Pillow reads wrong or not at all: deep colours, bands apart, many bands, floats."""

import io
from itertools import product

import numpy as np
import pytest
from PIL import Image
from tiffs import DEFLATE, LZW, RAW, tiff_of

from stego_parts import depth
from stego_parts.images import image_size, read_image, read_picture

Y, X = np.mgrid[:37, :53]
COLORS = np.stack([(X * 4 + Y) % 251, (X + Y * 5) % 241, (X * Y) % 256], 2).astype(np.uint8)  # (37, 53, 3)
GREY = COLORS[..., :1]


@pytest.fixture(autouse=True)
def first_time():
    """Each test hears what is said once a run."""
    for each in (depth._warn_scaled, depth._say_bands, depth._say_no_alpha):
        each.cache_clear()


def seen(content: bytes, **options) -> np.ndarray:
    return np.asarray(read_image(io.BytesIO(content), **options))


LAYOUTS = [
    (tile, compression, predictor, order)
    for tile, compression, order in product((0, 16), (RAW, LZW, DEFLATE), "<>")
    for predictor in ((1,) if compression == RAW else (1, 2))
]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("tile, compression, predictor, order", LAYOUTS)
def test_bands_apart_are_those_side_by_side(kind, tile, compression, predictor, order):
    deep = COLORS.astype(kind) * (257 if kind == np.uint16 else 1)
    layout = dict(
        tile=tile, strip=0 if tile else 10, compression=compression, predictor=predictor, order=order
    )
    for apart in (False, True):
        assert np.array_equal(seen(tiff_of(deep, apart=apart, **layout)), COLORS)


@pytest.mark.parametrize("kind, scale", [(np.float32, 1 / 255), (np.float64, 1), (np.float16, 1)])
@pytest.mark.parametrize("apart, predictor, order", list(product((False, True), (1, 2, 3), "<>")))
def test_float_colours(kind, scale, apart, predictor, order):
    values = (COLORS * np.float64(scale)).astype(kind)
    content = tiff_of(values, apart=apart, compression=DEFLATE, predictor=predictor, order=order, tile=32)
    assert np.abs(seen(content).astype(int) - COLORS).max() <= (1 if kind == np.float16 else 0)


@pytest.mark.parametrize("kind, factor", [(np.uint8, 1), (np.int16, 1), (np.uint32, 65793), (np.int8, 0)])
def test_grey_of_any_type(kind, factor):
    values = (GREY * np.int64(factor)).astype(kind)
    assert np.array_equal(seen(tiff_of(values, compression=LZW)), (GREY * bool(factor)).repeat(3, 2))


def test_white_is_zero():
    deep = (255 - GREY).astype(np.uint16) * 257
    assert np.array_equal(seen(tiff_of(deep, photometric=0)), GREY.repeat(3, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation):
    """The same as of the 8-bit twin, which Pillow turns."""
    more = [(274, 3, [orientation])]
    (tmp_path / "deep.tif").write_bytes(tiff_of(COLORS.astype(np.uint16) * 257, apart=True, more=more))
    turned = seen(tiff_of(COLORS, more=more))
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.tif")), turned)
    assert image_size(tmp_path / "deep.tif") == turned.shape[:2]


def test_more_bands_than_colours(caplog):
    """The first three of five, said once; others by their numbers."""
    five = np.concatenate([COLORS, 255 - COLORS[..., :2]], 2)
    for apart in (False, True):
        assert np.array_equal(seen(tiff_of(five, photometric=1, extra=[0] * 4, apart=apart)), COLORS)
    assert len(caplog.messages) == 1
    assert "5 bands of uint8: the first three" in caplog.text and "bands=4,3,2" in caplog.text
    content = tiff_of(five, photometric=1, extra=[0] * 4, apart=True)
    assert np.array_equal(seen(content, bands=(5, 3, 2)), five[..., [4, 2, 1]])
    assert np.array_equal(seen(content, bands=(4,)), five[..., [3]].repeat(3, 2))
    assert np.array_equal(seen(content[:], bands=(3, 2, 1)), COLORS[..., ::-1])


def test_two_bands_are_grey(caplog):
    assert np.array_equal(seen(tiff_of(COLORS[..., :2], photometric=1, extra=[0])), GREY.repeat(3, 2))
    assert "2 bands of uint8: the first" in caplog.text


def test_other_bands_of_what_is_no_tiff(tmp_path):
    Image.fromarray(COLORS).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", bands=(3, 1, 2))), COLORS[..., [2, 0, 1]])
    with pytest.raises(ValueError, match=r"a\.png.*has 3 bands, and bands=4,3,2 needs 4"):
        read_image(tmp_path / "a.png", bands=(4, 3, 2))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("apart", [False, True])
def test_near_infrared_that_is_called_alpha(caplog, kind, apart):
    """As rasterio writes four bands: their colours stay as they are."""
    four = np.concatenate([COLORS, 255 - COLORS[..., :1]], 2).astype(kind)
    picture = read_picture(
        io.BytesIO(tiff_of(four * (1 if kind == np.uint8 else 257), extra=[2], apart=apart))
    )
    assert np.array_equal(np.asarray(picture.image), COLORS) and picture.valid is None
    assert len(caplog.messages) == 1 and "near infrared" in caplog.text
    assert np.array_equal(seen(tiff_of(four.astype(np.uint8), extra=[2]), bands=(4, 3, 2)), four[..., 3:0:-1])


@pytest.mark.parametrize("kind, top", [(np.uint8, 255), (np.uint16, 65535), (np.uint16, 1)])
@pytest.mark.parametrize("apart", [False, True])
def test_alpha_that_is_alpha(caplog, kind, top, apart):
    alpha = np.where(X < 10, 0, top)[..., None]
    deep = COLORS.astype(kind) * (1 if kind == np.uint8 else 257)
    picture = read_picture(
        io.BytesIO(tiff_of(np.concatenate([deep, alpha.astype(kind)], 2), extra=[2], apart=apart))
    )
    assert np.array_equal(picture.valid, X >= 10) and not caplog.messages
    assert np.array_equal(np.asarray(picture.image), np.where(X[..., None] < 10, 255, COLORS))


def test_what_cannot_be_read_right_is_refused(tmp_path):
    deep = COLORS.astype(np.uint16) * 257
    content = bytearray(tiff_of(deep, apart=True))
    at = content.index(b"\x03\x01\x03\x00")  # tag 259, a short
    content[at + 8 : at + 10] = (34712).to_bytes(2, "little")  # JPEG 2000
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tif.*3 bands of uint16, compression 34712.*gdal_translate"):
        read_image(tmp_path / "a.tif")
    (tmp_path / "b.tif").write_bytes(tiff_of(deep, apart=True)[:-9])
    with pytest.raises(ValueError, match=r"Cannot read .*b\.tif as an image \(it is cut short\)"):
        read_image(tmp_path / "b.tif")


def test_a_large_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.tif").write_bytes(tiff_of(COLORS.astype(np.uint16)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.tif has more than 0.0002 megapixels"):
        read_image(tmp_path / "a.tif")
