"""Sheets of pictures: clusters, correspondences (Fig. 2), the report of a fit."""

from copy import copy as shallow_copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GAP, LINE, ROW, TOP, run
from PIL import Image

from cli_parts import drawing, sheets
from cli_parts.drawing import VIVID
from cli_parts.sheets import HEATMAP_HEIGHT, best_regions, correspondence_sheet

RED, BLUE, GREEN = (200, 30, 30), (30, 30, 200), (30, 200, 30)


class Colours:
    """A stand-in backbone: the mean colour of each patch, about grey."""

    patch, channels = 8, 3

    def __call__(self, x):
        return F.avg_pool2d(x, 8)


def halves(path, left, right, *, size=(64, 48)):
    """A picture of two colours side by side."""
    picture = Image.new("RGB", size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    picture.save(path)
    return path


def tint(sheet, row: int, x: int, y: int) -> np.ndarray:
    """How far the pixel of a sheet is from grey, 0 to 255."""
    return np.ptp(np.asarray(sheet)[TOP + row * ROW + y, GAP + x].astype(int))


def test_what_is_alike_is_coloured(tmp_path):
    """Red on the left of the first picture, on the right of the second; each row has the colour of its point."""
    one, other = halves(tmp_path / "a.png", RED, BLUE), halves(tmp_path / "b.png", GREEN, RED)
    sheet = correspondence_sheet(Colours(), one, [(10, 20), (60, 40)], others=[other])
    width = round(64 * HEATMAP_HEIGHT / 48)
    second = width + 8  # where the second picture begins
    assert sheet.size == (2 * (width + GAP) + GAP, GAP + LINE + GAP + 2 * ROW)
    assert tint(sheet, 0, 10, 100) > 100 and tint(sheet, 0, width - 10, 100) < 5
    assert tint(sheet, 0, second + width - 10, 100) > 100 and tint(sheet, 0, second + 10, 100) < 5
    assert tint(sheet, 1, width - 10, 100) > 100 and tint(sheet, 1, 10, 100) < 5
    assert max(tint(sheet, 1, second + x, 100) for x in (10, width - 10)) < 5  # no blue in the second picture
    for row, colour in enumerate(VIVID[:2]):
        pixel = np.asarray(sheet)[TOP + row * ROW + 100, GAP + (10 if row == 0 else width - 10)]
        assert pixel.argmax() == np.argmax(colour)
    x, y = 10 * width // 64, 20 * HEATMAP_HEIGHT // 48  # the first point is ringed in white
    assert (np.asarray(sheet)[TOP + y - 8 : TOP + y + 9, GAP + x - 8 : GAP + x + 9].min(2) == 255).any()


def test_of_many_others_the_nearest_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(sheets, "SHOWN", 2)
    one = halves(tmp_path / "one.png", RED, BLUE)
    others = [
        halves(tmp_path / f"{i}.png", *colours)
        for i, colours in enumerate([(GREEN, GREEN), (BLUE, RED), (GREEN, BLUE), (RED, BLUE), (GREEN, RED)])
    ]
    (tmp_path / "broken.png").write_text("no picture")
    seen = []
    monkeypatch.setattr(sheets, "image_rows", lambda rows, headings: seen.extend(headings))
    correspondence_sheet(Colours(), one, [(1, 2)], others=[*others, tmp_path / "broken.png"])
    assert seen[0] == "one.png" and sorted(seen[1:]) == ["1.png", "3.png"]


def test_sheet_shows_regions_of_each_cluster(copy, scenes, model, monkeypatch):
    result = run("show", copy, scenes / "sub", "--sheet", "sheet.png")
    assert "4 images" in result.stdout
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 4 * 100 and sheet.height > 2 * 100
    paths = sorted(scenes.rglob("*.png"))[:8]
    plain = shallow_copy(model)
    plain.config = replace(model.config, adaptation=0.0)  # one set of centres, so that images can be compared
    monkeypatch.setattr("cli_parts.sheets.REGIONS", 3)
    regions = best_regions(plain, paths)
    masks = [plain.predict(path, crf=False) for path in paths]
    for k, row in enumerate(regions):
        assert len(row) == 3
        shares = [(mask == k).mean() for _, mask in row]
        assert np.mean(shares) > 0.5 and min(shares) > 1.2 * np.mean([(mask == k).mean() for mask in masks])
        assert all(picture.size == mask.shape == (104, 104) for picture, mask in row)


def test_tiles_are_shown_at_the_scale_of_the_fit(copy, scenes, model):
    """A sheet of an image is that of its tiles as images; a tile, however small, is not cut again."""
    tiled = shallow_copy(model)
    tiled.config = replace(model.config, tile=64)
    tiled.save("tiled.pt")
    with Image.open(scenes / "scene00.png") as image:  # 96 x 128
        parts = [image.crop((x, y, x + 64, y + 64)) for y in (0, 32) for x in (0, 64)]
    for number, part in enumerate(parts):
        part.save(f"part{number}.png")
    files = [f"part{number}.png" for number in range(4)]
    run("show", "stego.pt", *files, "--sheet", "parts.png")
    assert "4 images" in run("show", "tiled.pt", scenes / "scene00.png", "--sheet", "whole.png").stdout
    assert np.array_equal(Image.open("whole.png"), Image.open("parts.png"))
    for (_, _, whole), (_, _, mask) in zip(sheets.segmented(model, files), sheets.segmented(tiled, files)):
        assert np.array_equal(whole, mask)


@pytest.mark.parametrize("count, shown", [(1, 1), (24, 24), (25, 12), (300, 12)])
def test_all_images_are_on_the_sheet_up_to_24(model, scenes, monkeypatch, count, shown):
    seen = []
    monkeypatch.setattr(drawing, "contact_sheet", lambda pairs, clusters: seen.extend(pairs))
    monkeypatch.setattr(
        type(model), "predict", lambda self, seen, **options: np.zeros(seen.image.size[::-1], np.uint8)
    )
    record = replace(model.record, paths=[scenes / "scene00.png"] * count, images=torch.arange(count))
    monkeypatch.setattr(model, "record", record)
    sheets.fit_sheet([model])
    assert len(seen) == shown


def test_clusters_of_one_name_are_one_row_of_the_sheet(model, scenes, monkeypatch):
    rows = []
    monkeypatch.setattr(drawing, "region_sheet", rows.extend)
    monkeypatch.setattr(model, "names", ["", "thing", "thing"])
    sheets.cluster_sheet(model, sorted(scenes.glob("*.png"))[:3])
    assert [caption.split("\n")[0] for caption, _, _ in rows] == ["0", "1 thing"]
    shares = [float(caption.split("\n")[1].rstrip("%")) for caption, _, _ in rows]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert all(inside.any() for _, _, regions in rows for _, inside in regions)
