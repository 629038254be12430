"""`stego show --at`: what corresponds with marked points, against pictures of which one knows it (Fig. 2)."""

from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from conftest import run
from PIL import Image

import stego
from stego import Stego
from stego_parts import drawing, report
from stego_parts.report import HEATMAP_HEIGHT, POINT_COLORS, correspondence_sheet

RED, BLUE, GREEN = (200, 30, 30), (30, 30, 200), (30, 200, 30)
ROW = 13 + 8 + HEATMAP_HEIGHT + 8  # caption, gap, pictures, gap of `strips`
END = 8 + 25  # its last gap and an empty legend


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


def lit(sheet, row: int, x: int, y: int) -> np.ndarray:
    """How far the pixel of a sheet is from grey, 0 to 255."""
    return np.ptp(np.asarray(sheet)[8 + row * ROW + 21 + y, 8 + x].astype(int))


def test_what_is_alike_is_coloured(tmp_path):
    """Red on the left of the first picture, on the right of the second; each row has the colour of its point."""
    one, other = halves(tmp_path / "a.png", RED, BLUE), halves(tmp_path / "b.png", GREEN, RED)
    sheet = correspondence_sheet(Colours(), one, [(10, 20), (60, 40)], others=[other])
    wide = round(64 * HEATMAP_HEIGHT / 48)
    second = wide + 8  # where the second picture begins
    assert sheet.size == (2 * (wide + 8) + 8, 2 * ROW + END)
    assert lit(sheet, 0, 10, 100) > 100 and lit(sheet, 0, wide - 10, 100) < 5
    assert lit(sheet, 0, second + wide - 10, 100) > 100 and lit(sheet, 0, second + 10, 100) < 5
    assert lit(sheet, 1, wide - 10, 100) > 100 and lit(sheet, 1, 10, 100) < 5
    assert max(lit(sheet, 1, second + x, 100) for x in (10, wide - 10)) < 5  # no blue in the second picture
    for row, colour in enumerate(POINT_COLORS[:2]):
        pixel = np.asarray(sheet)[8 + row * ROW + 121, 8 + (10 if row == 0 else wide - 10)]
        assert pixel.argmax() == np.argmax(colour)
    x, y = 10 * wide // 64, 20 * HEATMAP_HEIGHT // 48  # the first point is ringed in white
    assert (np.asarray(sheet)[8 + 21 + y - 8 : 8 + 21 + y + 9, 8 + x - 8 : 8 + x + 9].min(2) == 255).any()


def test_of_many_others_the_nearest_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SHOWN", 2)
    one = halves(tmp_path / "one.png", RED, BLUE)
    others = [
        halves(tmp_path / f"{i}.png", *colours)
        for i, colours in enumerate([(GREEN, GREEN), (BLUE, RED), (GREEN, BLUE), (RED, BLUE), (GREEN, RED)])
    ]
    (tmp_path / "broken.png").write_text("no picture")
    seen = []
    monkeypatch.setattr(drawing, "strips", lambda rows, legend: seen.extend(caption for caption, _ in rows))
    correspondence_sheet(Colours(), one, [(1, 2)], others=[*others, tmp_path / "broken.png"])
    assert seen[0] in ("backbone features at 1,2; 1.png, 3.png", "backbone features at 1,2; 3.png, 1.png")


def test_show_at(here, scenes, monkeypatch):
    """Codes with a model; without others, those it was fitted on are found again by the relative path it notes."""
    monkeypatch.setattr(stego, "CLUSTER_ROWS", 2000)
    Path("pictures").mkdir()
    for i in range(3):
        Path(f"pictures/{i}.png").symlink_to(scenes / f"scene0{i}.png")
    Stego.fit("pictures", classes=2, backbone="tiny", steps=1, batch_size=8).save("model.pt")
    assert Stego.load("model.pt").config["images"] == ["pictures"]
    said = run("show", "pictures/0.png", "--at", "100,60", "--at", "5,5", "-m", "model.pt").stdout
    assert "2 points, 2 other images" in said and "correspondences.png" in said
    with Image.open("correspondences.png") as sheet:
        assert sheet.height == 4 * ROW + END and 3 * HEATMAP_HEIGHT < sheet.width < 5 * HEATMAP_HEIGHT
    run("show", "pictures/0.png", "pictures/1.png", "--at", "100,60", "--backbone", "tiny", "-o", "two.png")
    with Image.open("two.png") as sheet:
        assert sheet.height == ROW + END and 2 * HEATMAP_HEIGHT < sheet.width < 3 * HEATMAP_HEIGHT
    Path("pictures").rename("moved")
    result = run("show", "moved/0.png", "--at", "100,60", "-m", "model.pt", "-o", "alone.png")
    assert "name others" in result.stderr and "0 other images" in result.stdout


def test_absolute_paths_stay_out_of_the_model(scenes):
    assert stego._given([Path("a"), "b/*.png"]) == ["a", "b/*.png"]
    assert stego._given(["a", scenes]) == [] and stego._given(["a"] * 17) == []


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--at", "12"], 2, "whole numbers, x and y"),
        (["--at", "1,-2"], 2, "whole numbers"),
        (["--at", "a,b"], 2, "a,b"),
        (["--at", "128,4"], 1, "The point 128,4 is not in pictures/scene00.png, which is 128 x 96 pixels"),
        (["--at", "1,1", "--sheet", "s.png"], 2, "With --at"),
        (["none.png", "--at", "1,1"], 1, "No such file"),
        (["--at", "1,1", "-m", "model.pt", "--backbone", "tiny"], 2, "With --at"),
        (["--backbone", "tiny"], 2, "sheet"),
        (["--at", "1,1", "--backbone", "vgg"], 1, "Unknown backbone 'vgg'"),
        (["--at", "1,1", "-m", "none.pt"], 1, "No model at none.pt"),
        (["--at", "1,1", "-o", "out.xyz", "--backbone", "tiny"], 1, "Cannot tell the format"),
    ],
)
def test_show_at_refuses(here, scenes, args, code, message):
    Path("pictures").symlink_to(scenes)
    result = run("show", "pictures/scene00.png", *args, code=code)
    assert message in result.stderr and not Path("correspondences.png").exists()
