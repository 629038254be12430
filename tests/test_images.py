"""The door in: every kind of file becomes upright RGB. The door out: masks as the conventions say."""

import os

import numpy as np
import pytest
from PIL import Image

from stego_parts.drawing import contact_sheet, overlay
from stego_parts.images import (
    find_images,
    five_crops,
    mask_image,
    read_image,
    replacing,
    square,
    to_tensor,
    voc_palette,
    write_image,
)

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


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    sixteen_bit().save(tmp_path / "x.png")
    assert np.abs(np.asarray(read_image(tmp_path / "x.png"))[..., 0] - RAMP).max() <= 1


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
    with pytest.raises(ValueError, match="too large"):
        read_image(whole)
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\)"):
        read_image(np.zeros((4, 4)))


def test_find_images(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.tif", "sub/deep/d.webp", "notes.txt", "sub/e.jpg.bak"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    places = lambda sources: [str(place) for _, place in find_images(sources)]  # noqa: E731
    assert places(tmp_path) == ["a.PNG", "b.jpg", "sub/c.tif", "sub/deep/d.webp"]
    assert places([str(tmp_path / "sub"), tmp_path / "b.jpg"]) == ["c.tif", "deep/d.webp", "b.jpg"]
    assert places(str(tmp_path / "*.jpg")) == ["b.jpg"]
    assert places(str(tmp_path / "**/*.tif")) == ["sub/c.tif"]
    assert places([tmp_path, tmp_path / "b.jpg"]) == places(tmp_path)  # each once
    for source, message in ((tmp_path / "none", "No such file"), (tmp_path / "*.bmp", "matches no file")):
        with pytest.raises(FileNotFoundError, match=message):
            find_images(source)
    (tmp_path / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="No images in"):
        find_images(tmp_path / "void")


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    (tmp_path / "a[1].jpg").touch()
    assert [path.name for path, _ in find_images(tmp_path / "a[1].jpg")] == ["a[1].jpg"]


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    assert [place.name for _, place in find_images(tmp_path)] == ["a.jpg"]


def test_to_tensor_is_normalised():
    x = to_tensor(Image.new("RGB", (3, 2), (255, 0, 128)))
    assert x.shape == (3, 2, 3)
    assert x[:, 0, 0].tolist() == pytest.approx(
        [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    )


def test_five_crops_cover_the_corners_and_the_centre():
    image = Image.fromarray(np.arange(10 * 8 * 3, dtype=np.uint8).reshape(10, 8, 3))
    array, crops = np.asarray(image), [np.asarray(crop) for crop in five_crops(image)]
    for crop, (y, x) in zip(crops, ((0, 0), (0, 4), (5, 0), (5, 4), (2, 2))):
        assert np.array_equal(crop, array[y : y + 5, x : x + 4])
    assert square(image, 4).size == (4, 4)


def test_palette_is_voc_shifted_by_one():
    palette = voc_palette()
    voc = [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128, 128, 128),
        (64, 0, 0),
        (192, 0, 0),
    ]
    assert [tuple(colour) for colour in palette[:9]] == voc[1:]
    assert tuple(palette[255]) == (0, 0, 0) and len({tuple(c) for c in palette}) == 256


def test_masks_are_indexed_8_bit_png(tmp_path):
    mask = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)
    write_image(mask_image(mask, voc_palette(3)), tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P" and image.format == "PNG" and np.array_equal(np.asarray(image), mask)
        assert len(image.getpalette()) == 768
    header = (tmp_path / "m.png").read_bytes()
    assert header[24:26] == b"\x08\x03"  # 8 bits, indexed


def test_own_colours_are_kept():
    colours = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    rgb = np.asarray(mask_image(np.array([[0, 1]], np.uint8), colours).convert("RGB"))
    assert rgb.tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_replacing_is_all_or_nothing(tmp_path):
    target = tmp_path / "new" / "out.txt"
    with replacing(target) as part:
        part.write_text("one")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), replacing(target) as part:
        part.write_text("tw")
        raise KeyboardInterrupt
    assert target.read_text() == "one" and [p.name for p in target.parent.iterdir()] == ["out.txt"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="suffix"):
        write_image(Image.new("RGB", (2, 2)), tmp_path / "x.xyz")


def test_overlay_and_sheet():
    image, mask = Image.new("RGB", (40, 30), "white"), np.zeros((30, 40), np.uint8)
    mask[:, 20:] = 1
    blended = np.asarray(overlay(image, mask, voc_palette()))
    assert blended.shape == (30, 40, 3) and blended[5, 5].tolist() == [191, 127, 127]
    assert blended[5, 20].max() < 90  # the line between segments
    sheet = contact_sheet([(image, mask)] * 4, voc_palette())
    assert sheet.width == 3 * (2 * 240 + 16) + 8 and sheet.mode == "RGB"
