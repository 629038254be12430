"""Large images in parts: the same things at the same scale as in one piece, in bounded memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_scene, run
from PIL import Image

import stego
from stego import Stego
from stego_parts import tiles
from stego_parts.images import Window, image_size, read_image
from stego_parts.tiles import blend_weights, pieces, starts, tiles_of

AERIAL = Path(__file__).parents[2] / "shared/data/aerial/images/train"


def agreement(model, mosaic: np.ndarray, tile: int, **options) -> float:
    """Share of the pixels that get one label seen whole and in parts, at the same scale."""
    height, width = mosaic.shape[:2]
    whole = model.predict(mosaic, tile=0, resolution=height, crf_size=height * width / 1e6, **options)
    parts = model.predict(mosaic, tile=tile, resolution=tile, crf_size=tile**2 / 1e6, **options)
    assert parts.shape == (height, width) and len(np.unique(parts)) > 1
    return (whole == parts).mean()


def mosaic_of(pictures, columns: int) -> np.ndarray:
    rows = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)]
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def local(scenes):
    """A model whose features tell of their neighbourhood only: what else is in the image does not change them."""
    return Stego.fit(scenes, clusters=3, backbone="tiny_detail", steps=60, batch_size=8)


@pytest.mark.parametrize("crf", [False, True])
def test_parts_have_the_labels_of_the_whole(local, monkeypatch, crf):
    """Blocks much smaller than the mosaic, so that there are seams to see."""
    monkeypatch.setattr(tiles, "BLOCK", 200)
    mosaic = mosaic_of([draw_scene(i, 192, 256)[0] for i in range(6)], 3)  # (384, 768, 3)
    assert agreement(local, mosaic, 192, crf=crf) > 0.98


@pytest.mark.skipif(not AERIAL.exists(), reason="needs ../shared/data/aerial")
def test_an_orthomosaic_has_no_seams(monkeypatch):
    monkeypatch.setattr(tiles, "BLOCK", 400)
    monkeypatch.setattr(stego, "CLUSTER_ROWS", 5000)  # clusters that a few starts do not find in real images
    monkeypatch.setattr(stego, "CLUSTER_STARTS", 12)
    pictures = [
        np.asarray(Image.open(AERIAL / f"dubai_t7_p00{p}_r{r}c{c}.jpg").convert("RGB").resize((320, 320)))
        for r in (0, 1)
        for p, c in ((1, 0), (1, 1), (2, 0))
    ]
    mosaic = mosaic_of(pictures, 3)  # (640, 960, 3)
    model = Stego.fit(sorted(AERIAL.glob("dubai_t7*.jpg"))[:8], clusters=5, backbone="tiny_detail", steps=60)
    assert agreement(model, mosaic, 320, crf=False) > 0.99


def test_windows_cover_and_their_weights_add_up_to_one():
    for length in (40, 41, 79, 80, 200):
        first, weights = blend_weights(length, 40)
        total, lone = torch.zeros(length), torch.zeros(length)
        for start, weight in zip(first, weights):
            total[start : start + 40] += weight
            lone[start : start + 40] += 1
        assert torch.allclose(total, torch.ones(length)) and lone.max() <= 3
        overlaps = np.diff(first) - 40
        assert first[-1] == length - 40 and (len(first) == 1 or max(overlaps) <= -13)


@pytest.mark.parametrize(("length", "cells", "scale"), [(1000, 125, 1.0), (5003, 60, 0.3), (90, 9, 1.0)])
def test_pieces_label_every_pixel_once(length, cells, scale):
    count = np.zeros(length, int)
    for piece in pieces(length, cells, scale):
        count[piece.target] += 1
        assert piece.target.start - piece.seen.start == piece.inside.start >= 0
        assert piece.inside.stop - piece.inside.start == piece.target.stop - piece.target.start
        assert piece.seen.start == round(piece.codes.start * length / cells)
        assert piece.seen.stop == round(piece.codes.stop * length / cells)
    assert (count == 1).all()


def test_tiles_cover_larger_images_alone(tmp_path):
    sizes = {"small": (200, 100), "wide": (500, 120), "large": (450, 400)}
    paths = [tmp_path / f"{name}.png" for name in sizes]
    for path, size in zip(paths, sizes.values()):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = tiles_of([*paths, tmp_path / "broken.png"], 200)
    assert found[0] == paths[0] and found[-1] == tmp_path / "broken.png"
    for path, side in zip(paths[1:], (120, 200)):
        seen = np.zeros(image_size(path), int)
        whole = np.asarray(Image.open(path))
        for window in (each for each in found if isinstance(each, Window) and each.path == path):
            left, top, right, bottom = window.box
            assert (right - left, bottom - top) == (side, side)
            assert (np.asarray(read_image(window)) == whole[top:bottom, left:right]).all()
            seen[top:bottom, left:right] += 1
        assert seen.min() == 1 and seen.max() <= 4
    assert tiles_of(paths, 0) == paths


def test_size_as_displayed(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg") == (40, 30)  # (H, W)
    assert read_image(tmp_path / "turned.jpg").size == (30, 40)


@pytest.mark.usefixtures("short_sheet")
def test_fit_on_one_large_image(here):
    """One mosaic alone: its tiles are the images; predict sees it at the scale of the fit, as the command does."""
    mosaic = mosaic_of([draw_scene(i, 160, 160)[0] for i in range(4)], 2)  # (320, 320, 3)
    Image.fromarray(mosaic).save("mosaic.png")
    run("fit", "mosaic.png", "-k", 3, "--backbone", "tiny", "--steps", 20, "--set", "tile=160")
    fitted = Stego.load("stego.pt")
    assert (fitted.config.tile, fitted.config.crops) == (160, 4 * 5) and Path("stego-fit.png").exists()
    small = dict(crf=False, resolution=160)
    run("predict", "mosaic.png", "-o", "mask.png", "--no-crf", "--resolution", 160)
    mask, whole = np.asarray(Image.open("mask.png")), fitted.predict("mosaic.png", tile=0, **small)
    assert (mask == fitted.predict("mosaic.png", tile=160, **small)).all() and (mask != whole).any()
    run("predict", "mosaic.png", "-o", "whole.png", "--no-crf", "--resolution", 160, "--tile", 0)
    assert (np.asarray(Image.open("whole.png")) == whole).all()


def test_arrays_of_a_large_image_are_brought_down(model):
    mosaic = mosaic_of([draw_scene(i)[0] for i in range(4)], 2)
    q = model.probabilities(mosaic, tile=96, resolution=96, crf=False, crf_size=0.01)
    assert q.shape[0] == 3 and q[0].size <= 10_100 and np.allclose(q.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("tile", [4, -640])
def test_a_tile_is_no_smaller_than_a_patch(model, tile):
    """Of 4 pixels, each seen as 320, a photo would become 80 times as wide: 4 was meant as a number of tiles."""
    with pytest.raises(
        ValueError, match=f"A tile of the image is {tile} x {tile} pixels, smaller than one patch"
    ):
        model.predict(np.zeros((12, 16, 3), np.uint8), tile=tile)


def test_starts_are_even():
    assert starts(100, 100) == [0] and starts(101, 100) == [0, 1] and starts(300, 100) == [0, 100, 200]
