"""`stego show --at`: what corresponds with marked points, against pictures of which one knows it (Fig. 2)."""

from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from conftest import run
from PIL import Image

import stego
from cli_parts import sheets as report
from cli_parts.drawing import VIVID
from cli_parts.sheets import HEATMAP_HEIGHT, correspondence_sheet
from stego import Stego
from stego_parts import config

RED, BLUE, GREEN = (200, 30, 30), (30, 30, 200), (30, 200, 30)
LINE, GAP = 18, 8  # pixels: a line of text, what is between pictures
TOP = GAP + LINE + GAP + LINE + GAP  # margin, headings, the first caption
ROW = LINE + GAP + HEATMAP_HEIGHT + GAP  # caption and pictures


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
    monkeypatch.setattr(report, "SHOWN", 2)
    one = halves(tmp_path / "one.png", RED, BLUE)
    others = [
        halves(tmp_path / f"{i}.png", *colours)
        for i, colours in enumerate([(GREEN, GREEN), (BLUE, RED), (GREEN, BLUE), (RED, BLUE), (GREEN, RED)])
    ]
    (tmp_path / "broken.png").write_text("no picture")
    seen = []
    monkeypatch.setattr(report, "image_rows", lambda rows, headings: seen.extend(headings))
    correspondence_sheet(Colours(), one, [(1, 2)], others=[*others, tmp_path / "broken.png"])
    assert seen[0] == "one.png" and sorted(seen[1:]) == ["1.png", "3.png"]


def test_show_at(here, scenes, monkeypatch):
    """Codes with a model; without others, those it was fitted on are found again by the relative path it notes."""
    monkeypatch.setattr(stego, "CLUSTER_ROWS", 2000)
    Path("pictures").mkdir()
    for i in range(3):
        Path(f"pictures/{i}.png").symlink_to(scenes / f"scene0{i}.png")
    Stego.fit("pictures", classes=2, backbone="tiny", steps=1, batch_size=8).save("model.pt")
    assert Stego.load("model.pt").config.images == ("pictures",)
    said = run("show", "pictures/0.png", "--at", "100,60", "--at", "5,5", "-m", "model.pt").stdout
    assert "2 points, 2 other images" in said and "correspondences.png" in said
    with Image.open("correspondences.png") as sheet:
        assert (
            sheet.height == GAP + LINE + GAP + 4 * ROW
            and 3 * HEATMAP_HEIGHT < sheet.width < 5 * HEATMAP_HEIGHT
        )
    run("show", "pictures/0.png", "pictures/1.png", "--at", "100,60", "--backbone", "tiny", "-o", "two.png")
    with Image.open("two.png") as sheet:
        assert (
            sheet.height == GAP + LINE + GAP + ROW and 2 * HEATMAP_HEIGHT < sheet.width < 3 * HEATMAP_HEIGHT
        )
    Path("pictures").rename("moved")
    result = run("show", "moved/0.png", "--at", "100,60", "-m", "model.pt", "-o", "alone.png")
    assert "are not here" in result.stderr and "0 other images" in result.stdout


def test_absolute_paths_stay_out_of_the_model(scenes):
    assert config.source_names([Path("a"), "b/*.png"]) == ("a", "b/*.png")
    assert config.source_names(["a", scenes]) == () and config.source_names(["a"] * 17) == ()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--at", "12"], "whole numbers, x and y"),
        (["--at", "1,-2"], "whole numbers"),
        (["--at", "a,b"], "a,b"),
        (["--at", "128,4"], "The point 128,4 is not in pictures/scene00.png, which is 128 x 96 pixels"),
        (["--at", "1,1", "--sheet", "s.png"], "With --at"),
        (["none.png", "--at", "1,1"], "No such file"),
        (["--at", "1,1", "-m", "model.pt", "--backbone", "tiny"], "With --at"),
        (["--backbone", "tiny"], "sheet"),
        (["--at", "1,1", "--backbone", "vgg"], "Unknown backbone 'vgg'"),
        (["--at", "1,1", "-m", "none.pt"], "No model at none.pt"),
        (["--at", "1,1", "-o", "out.xyz", "--backbone", "tiny"], "out.xyz is not a .png"),
    ],
)
def test_show_at_refuses(here, scenes, args, message):
    Path("pictures").symlink_to(scenes)
    result = run("show", "pictures/scene00.png", *args, code=2)
    assert message in result.stderr and not Path("correspondences.png").exists()
