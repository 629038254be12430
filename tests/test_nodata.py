"""Rasters with pixels without data: they count nowhere, and whatever make a raster is, its mask is that of its twin."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from conftest import FAST, draw_scene, mask_of, run
from PIL import Image
from tiffs import DEFLATE, LZW, tiff_of

from stego import Stego
from stego_parts.config import Config
from stego_parts.features import TokenCache, encode, image_views
from stego_parts.images import read_picture

SCENE = draw_scene(3)[0]
H, W = SCENE.shape[:2]
Y, X = np.mgrid[:H, :W]
COLLAR = (X + Y < 60) | (X + Y > H + W - 60)
VALID = ~COLLAR
GREY = SCENE.mean(2).round().astype(np.uint8)[..., None]
METRES = [(33550, 12, (0.5, 0.5, 0.0)), (34735, 3, (1, 1, 0, 2, 1024, 0, 1, 1, 3076, 0, 1, 9001))]


def filled(samples, value):
    """Samples (H, W, n) with a value in the collar."""
    return np.where(COLLAR[..., None], value, samples).astype(samples.dtype)


def rgba(top=255, kind=np.uint8):
    colors = SCENE.astype(kind) * (1 if kind == np.uint8 else 257)
    return np.concatenate([colors, (VALID * top).astype(kind)[..., None]], 2)


BASE = {"colour": tiff_of(filled(SCENE, 0), no_data="0"), "grey": tiff_of(filled(GREY, 0), no_data="0")}
F32 = GREY.astype(np.float32)
U16 = SCENE.astype(np.uint16) * 257
MAKES = {  # name: (its 8-bit twin, the raster)
    "uint8 tiles apart": ("colour", tiff_of(filled(SCENE, 0), no_data="0", tile=16, apart=True, compression=LZW)),
    "uint8 alpha": ("colour", tiff_of(rgba(), extra=[2])),
    "uint16 65535 pixel": ("grey", tiff_of(filled(GREY.astype(np.uint16), 65535), no_data="65535")),
    "uint16 0 apart": ("colour", tiff_of(filled(U16, 0), no_data="0", apart=True, compression=DEFLATE, predictor=2)),
    "uint16 0 strips": ("colour", tiff_of(filled(U16, 0), no_data="0", strip=7, order=">")),
    "uint16 alpha apart": ("colour", tiff_of(rgba(65535, np.uint16), extra=[2], apart=True, tile=32)),
    "int16 -32768": ("grey", tiff_of(filled(GREY.astype(np.int16), -32768), no_data="-32768", compression=LZW)),
    "int16 -9999 tiles": ("grey", tiff_of(filled(GREY.astype(np.int16), -9999), no_data="-9999", tile=64)),
    "int32 -2147483648": ("grey", tiff_of(filled(GREY.astype(np.int32), -(2**31)), no_data="-2147483648")),
    "uint32 4294967295": ("grey", tiff_of(filled(GREY.astype(np.uint32), 2**32 - 1), no_data="4294967295")),
    "float32 -9999": ("grey", tiff_of(filled(F32, -9999), no_data="-9999", compression=DEFLATE, predictor=3)),
    "float32 lowest": ("grey", tiff_of(filled(F32, np.finfo(np.float32).min), no_data="-3.4028234663852886e+38")),
    "float32 NaN": ("grey", tiff_of(filled(F32, np.nan), no_data="nan", tile=16)),
    "float32 NaN untold": ("grey", tiff_of(filled(F32, np.nan), order=">")),
    "float64 1e20": ("grey", tiff_of(filled(GREY / 255, 1e20), no_data="1e+20", strip=9)),
    "float32 colours -1 apart": (
        "colour",
        tiff_of(filled(SCENE.astype(np.float32) / 255, -1), no_data="-1", apart=True, tile=16, compression=LZW),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory):
    """A model that also adapts its centres to an image, which no data may move."""
    folder = tmp_path_factory.mktemp("collars")
    for i in range(4):
        (folder / f"{i}.tif").write_bytes(tiff_of(filled(draw_scene(i)[0], 0), no_data="0"))
    return Stego.fit(folder, clusters=4, backbone="tiny", steps=20, adaptation=8.0)


@pytest.mark.parametrize("name", MAKES)
def test_a_raster_has_the_mask_of_its_twin(tmp_path, colour_model, name):
    twin, content = MAKES[name]
    (tmp_path / "raster.tif").write_bytes(content)
    (tmp_path / "twin.tif").write_bytes(BASE[twin])
    masks = [colour_model.predict(tmp_path / f"{each}.tif", crf=False) for each in ("raster", "twin")]
    assert np.array_equal(*masks)
    assert (
        (masks[0][COLLAR] == 255).all()
        and (masks[0][VALID] < 4).all()
        and len(np.unique(masks[0][VALID])) > 1
    )


@pytest.mark.parametrize("crf, tile", [(True, 0), (True, 64)])
def test_no_data_is_255_with_a_crf_and_in_tiles(colour_model, crf, tile):
    mask = colour_model.predict(read_picture(io.BytesIO(BASE["colour"])), crf=crf, tile=tile)
    assert np.array_equal(mask == 255, COLLAR)


def test_without_a_tag_nothing_is_left_out():
    picture = read_picture(io.BytesIO(tiff_of(filled(SCENE, 0))))
    assert picture.valid is None and np.array_equal(np.asarray(picture.image), filled(SCENE, 0))
    assert read_picture(io.BytesIO(tiff_of(SCENE, no_data="none"))).valid is None
    assert read_picture(io.BytesIO(tiff_of(SCENE.astype(np.uint16), no_data="-9999"))).valid is None


def test_a_value_of_no_data_in_one_band_is_data():
    """As in GDAL: a pixel is empty where all its bands are."""
    part = filled(SCENE, 0)
    part[COLLAR, 1] = 9
    assert read_picture(io.BytesIO(tiff_of(part, no_data="0"))).valid is None


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_transparent_pixels_hold_no_data_in_every_format(tmp_path, colour_model, suffix):
    Image.fromarray(rgba()).save(tmp_path / f"a{suffix}", lossless=True)
    assert np.array_equal(colour_model.predict(tmp_path / f"a{suffix}", crf=False) == 255, COLLAR)
    Image.fromarray(rgba()).quantize(9).save(tmp_path / "a.gif", transparency=0)
    picture = read_picture(tmp_path / "a.gif")
    indices = np.asarray(Image.open(tmp_path / "a.gif"))
    assert np.array_equal(picture.valid, indices != Image.open(tmp_path / "a.gif").info["transparency"])


# ---- numbers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def survey(here, colour_model):
    """A folder with one GeoTIFF with a collar, half a metre a pixel."""
    (here / "survey").mkdir()
    (here / "survey/a.tif").write_bytes(tiff_of(filled(SCENE, 0), no_data="0", more=METRES))
    colour_model.save("m.pt")
    return here


def test_areas_and_shares_are_of_what_holds_data(survey):
    run("predict", "survey", "-m", "m.pt", "-o", "a.csv", "--format", "csv", *FAST)
    rows = list(csv.DictReader((survey / "a.csv").open(newline="")))
    assert sum(float(row["m2"]) for row in rows) == VALID.sum() / 4
    assert sum(int(row["pixels"]) for row in rows) == VALID.sum()
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-5)


def test_other_outputs_leave_it_out(survey):
    run("predict", "survey", "-m", "m.pt", "-o", "coco.json", "--format", "coco", *FAST)
    run("predict", "survey", "-m", "m.pt", "-o", "tif", "--format", "tif", *FAST)
    run("predict", "survey", "-m", "m.pt", "-o", "npz", "--format", "npz", *FAST)
    run("predict", "survey", "-m", "m.pt", "-o", "cut.png", "--format", "cutout", "--only", "0,1,2,3")
    assert (
        sum(each["area"] for each in json.loads((survey / "coco.json").read_text())["annotations"])
        == VALID.sum()
    )
    assert (
        np.array_equal(mask_of("tif/a.tif") == 255, COLLAR) and Image.open("tif/a.tif").tag_v2[42113] == "255"
    )
    assert np.array_equal(np.load("npz/a.npz")["probabilities"].sum(0) > 0.5, VALID)
    assert np.array_equal(mask_of("cut.png")[..., 3] > 127, VALID)
    run("show", "m.pt", "survey", "--sheet", "sheet.png")


# ---- the fit ---------------------------------------------------------------------------------------------------


class Means:
    """A backbone of patches of 8: the mean colour of each."""

    name = "means"
    patch = 8
    channels = 3

    def __call__(self, x):
        return torch.nn.functional.avg_pool2d(x, 8)


@pytest.mark.parametrize("views", ["five", "whole", "windows"])
def test_positions_without_data_are_not_sampled(tmp_path, views):
    """An image that is green but for a magenta part without data: all tokens and averages are green."""
    image = np.full((240, 320, 3), (0, 200, 0), np.uint8)
    image[:, :192] = (255, 0, 255)
    (tmp_path / "a.tif").write_bytes(tiff_of(image, no_data="255"))  # not the value of all its bands: data
    alpha = np.where(np.arange(320) < 192, 0, 255).astype(np.uint8)
    Image.fromarray(np.dstack([image, np.tile(alpha, (240, 1))])).save(tmp_path / "b.png")
    whole = encode(Means(), [tmp_path / "a.tif"], Config(views=views))
    cache = encode(Means(), [tmp_path / "b.png"], Config(views=views))
    green = image_views(tmp_path / "a.tif", "whole", 8).x[0, :, 0, -1]
    tokens = cache.sample(torch.arange(len(cache)), 500).flatten(0, 1)
    assert (tokens - green).abs().max() < 2.3  # half of the way to white, at the border of the data
    assert (whole.sample(torch.arange(len(whole)), 500) - green).abs().max() > 4
    normal = torch.nn.functional.normalize
    assert (cache.means @ normal(green, dim=0) > 0.99).all()
    left_out = {"five": 2, "whole": 0, "windows": 2}[views]  # crops that lie in it
    assert len(whole) - len(cache) == left_out
    assert cache.parts.tolist() == [i for i in range(len(whole)) if not left_out or i not in (0, 2)]


def test_an_image_without_any_data_is_left_out(tmp_path, caplog):
    Image.fromarray(np.zeros((96, 128, 4), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(SCENE).save(tmp_path / "b.png")
    model = Stego.fit(tmp_path, clusters=2, backbone="tiny", steps=2)
    assert model.config.crops == 5 and "a.png holds no data" in caplog.text
    assert (model.predict(tmp_path / "a.png") == 255).all()


def test_tiles_without_data_are_left_out(tmp_path, caplog):
    """Of a mosaic in four tiles, the one without data is no crop, and nobody is warned of it."""
    mosaic = np.tile(SCENE[:96, :96], (2, 2, 1))
    alpha = np.full(mosaic.shape[:2], 255, np.uint8)
    alpha[:96, :96] = 0
    Image.fromarray(np.dstack([mosaic, alpha])).save(tmp_path / "a.png")
    model = Stego.fit(tmp_path / "a.png", clusters=2, backbone="tiny", steps=2, tile=96)
    assert model.config.crops == 3 * 5 and not caplog.messages


def test_crops_are_numbered_without_those_that_hold_nothing():
    cache = TokenCache(2, 2, 4, 1)
    cache.add(0, torch.ones(2, 1, 2, 2), torch.tensor([[[True, False], [False, False]], [[False] * 2] * 2]))
    cache.add(1, torch.arange(8.0).view(2, 1, 2, 2) + 1)
    cache.finalize()
    assert cache.images.tolist() == [0, 1, 1] and cache.parts.tolist() == [0, 0, 1]
    assert sorted(cache.tokens[cache.rows[1]].flatten().tolist()) == [1, 2, 3, 4]


# ---- bands -----------------------------------------------------------------------------------------------------


def test_other_bands_are_a_setting_of_the_model(here):
    """Five bands, of which 3, 2, 1 are the colours: fit and predict see the same as of a picture of these."""
    (here / "five").mkdir()
    (here / "three").mkdir()
    for i in range(3):
        scene = draw_scene(i)[0]
        bands = np.concatenate([scene[..., ::-1], 255 - scene[..., :2]], 2)
        (here / f"five/{i}.tif").write_bytes(tiff_of(bands, photometric=1, extra=[0] * 4))
        Image.fromarray(scene).save(f"three/{i}.tif")
    common = ("--backbone", "tiny", "--steps", 5, "-k", 3)
    run("fit", "five", *common, "--set", "bands=3,2,1", "-o", "five.pt")
    run("fit", "three", *common, "-o", "three.pt")
    five = Stego.load("five.pt")
    assert five.config.bands == (3, 2, 1) and torch.equal(five.centers, Stego.load("three.pt").centers)
    run("predict", "five", "-m", "five.pt", "-o", "o5", *FAST)
    run("predict", "three", "-m", "three.pt", "-o", "o3", *FAST)
    for i in range(3):
        assert np.array_equal(mask_of(f"o5/{i}.png"), mask_of(f"o3/{i}.png"))
    assert "one or three numbers" in run("fit", "five", "--set", "bands=3,2", code=2).stderr
    assert "bands=9,2,1 needs 9" in run("fit", "five", *common, "--set", "bands=9,2,1", code=1).stderr
