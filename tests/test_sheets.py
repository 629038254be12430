"""Sheets of pictures: clusters, correspondences (Fig. 2), the report of a fit."""

from copy import copy as shallow_copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GAP, LINE, ROW, TOP, run
from networks import Mean
from PIL import Image

import stego
from cli_parts import drawing, sheets
from cli_parts.drawing import VIVID
from cli_parts.sheets import HEATMAP_HEIGHT, best_regions, correspondence_sheet
from stego import Stego
from stego_parts.config import Config

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


@pytest.mark.parametrize("count, shown", [(1, 1), (24, 24), (25, 12), (300, 12)])
def test_all_images_are_on_the_sheet_up_to_24(model, scenes, monkeypatch, count, shown):
    seen = []
    monkeypatch.setattr(drawing, "contact_sheet", lambda pairs, clusters: seen.extend(pairs))
    monkeypatch.setattr(
        type(model), "predict", lambda self, seen, **options: np.zeros(seen.image.size[::-1], np.uint8)
    )
    monkeypatch.setattr(model, "record", replace(model.record, paths=[scenes / "scene00.png"] * count))
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


def test_report_draws_the_history(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(stego, "load_backbone", lambda *args, **options: Mean())
    model = Stego.fit(scenes, clusters=2, steps=12)
    sheets.write_report(model, tmp_path)
    names = ["loss", "neighbors", "report", "similarity"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == names
    assert (
        "12 steps" in (words := (tmp_path / "report.txt").read_text())
        and sheets.neighbor_line(model.record) in words
    )
    assert [entry["step"] for entry in model.record.history] == [0, 10, 11]
    model.save(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="right after fit"):
        sheets.write_report(Stego.load(tmp_path / "m.pt"), tmp_path)


def test_a_crop_of_the_record_is_the_part_of_the_image_it_says(tmp_path):
    """Two images in quarters of one colour each: crop 5 is the upper left quarter of the second image."""
    for name, first in (("a", 10), ("b", 110)):
        quarters = np.array([[first, first + 20], [first + 40, first + 60]], np.uint8)
        Image.fromarray(quarters.repeat(40, 0).repeat(40, 1)).convert("RGB").save(tmp_path / f"{name}.png")
    of = torch.arange(2).repeat_interleave(5)  # (10,)
    neighbors = torch.tensor([[1, 5]] * 10)  # one of image 0, one of image 1
    record = stego.FitRecord(
        [tmp_path / "a.png", tmp_path / "b.png"], of, torch.arange(10) % 5, neighbors, []
    )
    shown = [
        sheets._crop_picture(record, crop, Config(views="five")).getpixel((3, 3))[0] for crop in (0, 1, 5, 8)
    ]
    assert shown == [10, 30, 110, 170]
    assert sheets._crop_picture(record, 7, Config(views="whole")).getpixel((3, 3))[0] == 110
    assert sheets.neighbor_line(record).startswith("Of a crop's 2 nearest neighbours, 1.0 are")
    mixed = replace(record, neighbors=torch.tensor([[1, 5]] * 5 + [[6, 7]] * 3 + [[1, 2]] * 2))
    assert sheets.neighbor_line(mixed).endswith("2 such: 20%, 50%, 30%.")
