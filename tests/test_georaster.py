"""Masks and tables of images that have a place on Earth."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST, mask_of, run
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from cli_parts.georaster import geo_tags, pixel_area

PLACE = {
    33550: (12, (0.5, 0.25, 0.0)),
    33922: (12, (0.0, 0.0, 0.0, 366000.5, 5621000.25, 0.0)),
    34735: (3, (1, 1, 0, 4, 1024, 0, 1, 1, 1026, 34737, 13, 0, 3072, 0, 1, 25832, 3076, 0, 1, 9001)),
    34736: (12, (6378137.0, 298.257222101)),
    34737: (2, "K\u00f6ln, Gitter|"),
    42113: (2, "0"),
}
# What GDAL notes of an image's values: a program that reads the mask would scale its numbers
VALUES = {42112: (2, "<GDALMetadata><Item name='OFFSET' sample='0' role='offset'>-0.1</Item></GDALMetadata>")}


def save_geotiff(source, target, place):
    """A picture as TIFF with tags, {tag: (type, value)}."""
    tags = ImageFileDirectory_v2()
    for tag, (kind, value) in place.items():
        tags.tagtype[tag] = kind
        tags[tag] = value.encode("latin-1") if kind == 2 else value
    Image.open(source).save(target, tiffinfo=tags)


@pytest.fixture
def survey(here, scenes):
    """A folder with two GeoTIFFs, of which one has no place, and a picture."""
    (here / "survey").mkdir()
    save_geotiff(scenes / "scene00.png", "survey/a.tif", PLACE | VALUES)
    save_geotiff(scenes / "scene01.png", "survey/b.tif", {})
    Image.open(scenes / "scene02.png").save("survey/c.png")
    return here / "survey"


def test_a_tiff_mask_lies_where_its_image_does(here, survey, named):
    run("predict", survey / "a.tif", "-o", "mask.tif", *FAST)
    run("predict", survey, "-o", "tif", "--format", "tif", "--overlay", *FAST)
    run("predict", survey, "-o", "png", *FAST)
    piped = run("predict", survey / "a.tif", "-o", "-", "--format", "tif", *FAST).stdout_bytes
    assert sorted(os.listdir("tif")) == sorted(f"{x}.{y}" for x in "abc" for y in ("tif", "overlay.jpg"))
    given = dict(input=(survey / "a.tif").read_bytes())
    run("predict", "-", "-o", "stdin.tif", *FAST, **given)
    Path("a.cog").write_bytes(given["input"])
    run("predict", "a.cog", "-o", "cog.tif", *FAST)
    for name in ("mask.tif", "tif/a.tif", "stdin.tif", "cog.tif", io.BytesIO(piped)):
        with Image.open(name) as mask:
            assert (mask.format, mask.mode, mask.tag_v2[259]) == (
                "TIFF",
                "P",
                8,
            )  # 259: compression, 8: deflate
            for tag, (kind, value) in (PLACE | {42113: (2, "255")}).items():
                assert (mask.tag_v2.tagtype[tag], mask.tag_v2[tag]) == (kind, value)
            assert 42112 not in mask.tag_v2
    for name in "abc":
        with Image.open(f"tif/{name}.tif") as tif, Image.open(f"png/{name}.png") as png:
            assert np.array_equal(np.asarray(tif), np.asarray(png)) and tif.getpalette() == png.getpalette()
            assert name == "a" or not tif.tag_v2.keys() & (PLACE.keys() - {42113})
    said = [run("predict", survey, "-o", "tif", "--format", "tif", *more, *FAST, "--skip-existing").stdout
            for more in ([], ["--overlay"], ["--only", "sky"])]  # fmt: skip
    assert [line.count(", 3 skipped") for line in said] == [1, 1, 0]


def test_tables(here, survey, named):
    run("predict", survey, "-o", "shares.csv", "--format", "csv", *FAST)
    run("predict", survey, "-o", "masks", *FAST)
    run("predict", survey, "-o", "shares.json", "--format", "json", *FAST)
    rows = list(csv.DictReader((here / "shares.csv").open(newline="")))
    assert [*rows[0]] == "image cluster name pixels share m2".split()
    assert [(row["image"], row["name"]) for row in rows] == [
        (image, name) for image in ("a.tif", "b.tif", "c.png") for name in ("sky", "1", "block")
    ]
    for row in rows:
        mask = mask_of(here / "masks" / f"{row['image'][0]}.png")
        pixels = int((mask == int(row["cluster"])).sum())
        assert int(row["pixels"]) == pixels and float(row["share"]) == pytest.approx(
            pixels / mask.size, abs=1e-6
        )
        assert row["m2"] == (str(pixels / 8) if row["image"] == "a.tif" else "")
    places = [image["clusters"] for image in json.loads((here / "shares.json").read_text())["images"]]
    assert places[0][1]["m2"] == places[0][1]["pixels"] / 8 and "m2" not in places[1][1]
    run("predict", survey, "--format", "csv", "--only", "sky", *FAST)
    assert (here / "stego-out/shares.csv").read_text().count("\n") == 4


@pytest.mark.parametrize(
    "keys, more, area",
    [
        ((1024, 0, 1, 1), {}, 0.125),  # the unit is not said: that of the projection
        ((1024, 0, 1, 1, 3076, 0, 1, 9003), {}, None),  # US survey feet
        ((1024, 0, 1, 2), {}, None),  # degrees
        ((1025, 0, 1, 1), {}, None),
        ((1024, 0, 1, 1), {33550: (12, 0.5)}, None),  # cut short
        ((1024, 0, 1, 1), {33550: (12, (float("nan"), 1.0, 0.0))}, None),
        ((1024, 0, 1, 1), {33550: (3, (1, 1, 0))}, None),  # whole numbers
        (
            (1024, 0, 1, 1),
            {34264: (12, (0.0, 2.0, 0.0, 9.0, 3.0, 0.0, *[0.0] * 10)), 33550: (2, "x")},
            6,
        ),  # turned
    ],
)
def test_square_metres_of_a_pixel(here, scenes, keys, more, area):
    directory = {34735: (3, (1, 1, 0, len(keys) // 4, *keys))}
    save_geotiff(scenes / "scene00.png", "a.tif", PLACE | directory | more)
    assert pixel_area(geo_tags(here / "a.tif")) == area


def test_what_is_no_tiff_has_no_place(here, scenes):
    Image.open(scenes / "scene00.png").save("wrong.tif", format="PNG")
    for source in (scenes / "scene00.png", here / "wrong.tif", io.BytesIO(b"read")):
        assert geo_tags(source) == {} and pixel_area({}) is None
