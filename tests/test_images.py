"""The door in: every kind of file becomes upright RGB. The door out: masks as the conventions say."""

import io
import os
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from PIL import Image
from tiffs import DEFLATE, tiff_of

from stego_parts import depth, images
from stego_parts.images import distinct_colors, mask_image, read_image, to_lab, write_image

RAMP = np.linspace(0, 255, 16 * 12).reshape(12, 16)


def sixteen_bit():
    return Image.fromarray((RAMP * 257).round().astype(np.uint16))


def transparent_palette():
    image = Image.fromarray(RAMP.astype(np.uint8)).convert("P")
    image.info["transparency"] = 0
    return image


MODES = {  # name: (picture, file suffix, the grey or colour its last pixel must have, tolerance)
    "L": (Image.fromarray(RAMP.astype(np.uint8)), ".png", (255, 255, 255), 0),
    "1": (Image.fromarray(RAMP > 127), ".png", (255, 255, 255), 0),
    "RGB": (Image.new("RGB", (16, 12), (10, 200, 30)), ".png", (10, 200, 30), 0),
    "RGBA opaque": (Image.new("RGBA", (16, 12), (10, 200, 30, 255)), ".png", (10, 200, 30), 0),
    "RGBA clear": (Image.new("RGBA", (16, 12), (10, 200, 30, 0)), ".png", (255, 255, 255), 0),
    "LA": (Image.new("LA", (16, 12), (100, 0)), ".png", (255, 255, 255), 0),
    "P": (
        Image.new("RGB", (16, 12), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE),
        ".png",
        (10, 200, 30),
        2,
    ),
    "P transparent": (transparent_palette(), ".png", (255, 255, 255), 1),
    "I;16": (sixteen_bit(), ".png", (255, 255, 255), 0),
    "I;16 tiff": (sixteen_bit(), ".tif", (255, 255, 255), 0),
    "F 0..1": (Image.fromarray((RAMP / 255).astype(np.float32)), ".tif", (255, 255, 255), 0),
    "F any": (Image.fromarray((RAMP * 7 - 900).astype(np.float32)), ".tif", (255, 255, 255), 0),
    "CMYK": (Image.new("CMYK", (16, 12), (0, 255, 255, 0)), ".jpg", (254, 0, 0), 3),
    "YCbCr": (Image.new("RGB", (16, 12), (200, 30, 30)).convert("YCbCr"), ".jpg", (200, 30, 30), 4),
    "GIF": (Image.fromarray(RAMP.astype(np.uint8)), ".gif", (255, 255, 255), 1),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(tmp_path, name):
    image, suffix, last, tolerance = MODES[name]
    image.save(tmp_path / f"x{suffix}")
    got = read_image(tmp_path / f"x{suffix}")
    assert got.mode == "RGB" and got.size == (16, 12)
    assert np.abs(np.asarray(got)[-1, -1].astype(int) - last).max() <= tolerance


def deep(values, kind, path):
    Image.fromarray(np.asarray(values).astype(kind)).save(path)
    return np.asarray(read_image(path))[..., 0].astype(int)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, caplog):
    depth._warn_scaled.cache_clear()
    assert np.abs(deep((RAMP * 257).round(), np.uint16, tmp_path / "x.png") - RAMP).max() <= 1
    assert np.array_equal(deep(RAMP, np.uint16, tmp_path / "x.tif"), RAMP.astype(int)) and not caplog.messages


@pytest.mark.parametrize(
    "kind, top, white",
    [
        (np.uint16, 4095, 4095),  # a camera of 12 bits
        (np.uint16, 3000, 4095),
        (np.uint16, 16383, 16383),
        (np.int32, 100_000, 131071),
        (np.float32, 4095, 4095),
        (np.float32, 10, 15),
        (np.float32, 0.2, 0.25),  # reflectance of land
    ],
)
def test_values_are_scaled_by_the_bits_they_use(tmp_path, caplog, kind, top, white):
    """One hot pixel in a thousand does not count, and many files are one warning."""
    depth._warn_scaled.cache_clear()
    values = np.tile(RAMP / 255, (10, 10)) * top
    values[0, 0] = 1 if top < 1 else 60_000 if top < 60_000 else 2**30
    for name in ("a.tif", "b.tif"):
        got = deep(values, kind, tmp_path / name)
        assert got[0, 0] == 255 and np.abs(got - values * 255 / white)[:, 1:].max() <= 1
    assert [message for message in caplog.messages if f"up to {white:g}" in message] == caplog.messages
    assert len(caplog.messages) == 1


def png_of(values):
    """A PNG of 16 bits a channel (H, W, 3 or 4), written by the standard: Pillow writes none."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("top", [4095, 65535])
@pytest.mark.parametrize(
    "write", [png_of, tiff_of, partial(tiff_of, order=">"), partial(tiff_of, compression=DEFLATE)]
)
def test_deep_colours_keep_their_depth(write, top):
    """12 bits of 16 in each of three colours: all values come out, not the 16 that the first byte tells apart."""
    values = np.linspace(0, top, 12 * 16 * 3).round().reshape(12, 16, 3).astype(np.uint16)
    got = np.asarray(read_image(io.BytesIO(write(values))))
    assert np.abs(got - values * (255 / top)).max() <= 0.51


def test_deep_colours_keep_their_transparency():
    values = np.full((6, 8, 4), 4095, np.uint16) * np.array([1, 0, 0, 0], np.uint16)
    values[:, 4:, 3] = 65535
    got = np.asarray(read_image(io.BytesIO(png_of(values))))
    assert (got[:, :4] == 255).all() and (got[:, 4:] == (255, 0, 0)).all()


def test_a_black_deep_image_stays_black(tmp_path):
    assert deep(np.zeros((9, 9)), np.uint16, tmp_path / "a.tif").max() == 0
    assert deep(np.zeros((9, 9)), np.float32, tmp_path / "b.tif").max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """However it is stored, the red corner is shown top left."""
    shown = Image.new("RGB", (24, 16), "blue")
    shown.paste("red", (0, 0, 8, 8))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # PIL's transpositions
    stored = shown if undo is None else shown.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), np.asarray(shown))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


def test_unreadable_files(tmp_path, monkeypatch):
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").touch()
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:1500])
    for name in ("text.jpg", "empty.png", "cut.jpg"):
        with pytest.raises(ValueError, match=f"Cannot read .*{name}"):
            read_image(tmp_path / name)
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("none.jpg", "folder.jpg", "pipe.jpg"):
        with pytest.raises(FileNotFoundError, match=name):
            read_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="whole.jpg has more than 0.0002 megapixels.*--max-megapixels"):
        read_image(whole)
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\)"):
        read_image(np.zeros((4, 4)))


def test_lab_of_known_colours():
    """Published CIELAB values (D65) of the primaries of sRGB."""
    known = {
        (255, 255, 255): (100, 0, 0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
        (119, 119, 119): (50.03, 0, 0),
    }
    assert np.abs(to_lab(list(known)) - list(known.values())).max() < 0.05


def nearest(colours):
    """The smallest distance of two colours in CIELAB; just noticeable is 2.3."""
    lab = to_lab(colours)
    distance = np.linalg.norm(lab[:, None] - lab, axis=-1)
    return distance[~np.eye(len(lab), dtype=bool)].min()


@pytest.mark.parametrize("count, apart", [(8, 50), (27, 25), (255, 10)])
def test_colours_stay_apart(count, apart):
    """With the Pascal VOC palette it is 30, 7 and 1; and none is as dark as its darkest."""
    colours = distinct_colors(count)
    assert colours.shape == (count, 3) and colours.dtype == np.uint8
    assert nearest(colours) > apart and to_lab(colours)[:, 0].min() > 30
    assert np.array_equal(colours, distinct_colors()[:count]) and distinct_colors()[255].tolist() == [0, 0, 0]


def test_masks_are_indexed_8_bit_png(tmp_path):
    mask = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)
    write_image(mask_image(mask, distinct_colors(3)), tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P" and image.format == "PNG" and np.array_equal(np.asarray(image), mask)
        assert len(image.getpalette()) == 768
    header = (tmp_path / "m.png").read_bytes()
    assert header[24:26] == b"\x08\x03"  # 8 bits, indexed


def test_own_colours_are_kept():
    colours = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    rgb = np.asarray(mask_image(np.array([[0, 1]], np.uint8), colours).convert("RGB"))
    assert rgb.tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_readers_of_one_mosaic_decode_it_once(tmp_path, monkeypatch):
    """Sixteen threads that ask for windows of it at the same time, and for those of another one after that."""
    for name in ("a", "b"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    decoded = []
    together = threading.Barrier(16)
    read = images.read_picture

    def counted(source, **options):
        decoded.append(source)
        time.sleep(0.05)  # so that others come in between
        return read(source, **options)

    def window(i, name):
        together.wait()
        return np.asarray(read(images.Window(tmp_path / f"{name}.png", (4 * i, 0, 4 * i + 4, 64))).image)

    monkeypatch.setattr(images, "read_picture", counted)
    for name in ("a", "b"):
        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(window, range(16), name * 16))
        assert np.array_equal(np.concatenate(parts, 1), np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert decoded == [tmp_path / "a.png", tmp_path / "b.png"]


def test_a_mosaic_that_has_changed_is_read_anew(tmp_path):
    path = tmp_path / "mosaic.png"
    for level in (10, 200):
        Image.new("RGB", (64, 64), (level, 0, 0)).save(path)
        os.utime(path, (level, level))  # a clock may be too coarse
        assert read_image(images.Window(path, (0, 0, 32, 32))).getpixel((0, 0)) == (level, 0, 0)


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="suffix"):
        write_image(Image.new("RGB", (2, 2)), tmp_path / "x.xyz")


def test_a_binary_file_is_read(scenes):
    with open(scenes / "scene00.png", "rb") as file:
        assert read_image(file).size == (128, 96)
