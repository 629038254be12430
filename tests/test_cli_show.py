"""`stego show`: how a model was made, its sheet, `--at`."""

from pathlib import Path

import numpy as np
import pytest
from conftest import GAP, LINE, ROW, run
from PIL import Image

import stego
from cli_parts.sheets import HEATMAP_HEIGHT
from stego import Stego


def test_show_says_how_the_model_was_made(copy):
    run("name", copy, "1=ground")
    model, shown = Stego.load(copy), run("show", copy).stdout
    c = model.config
    said = (
        "tiny|12 images, 60 crops|60 steps|preset default|batch_size=8|seed 0|ground|"
        + model.backbone_sha256[:12]
    )
    for text in (*said.split("|"), f"b_rand={c.b_rand:.3g}", f"#{bytes(model.palette[0].tolist()).hex()}"):
        assert text in shown, text
    assert shown.count("cluster ") == 3 and f"{model.share[0]:.1%}" in shown
    assert run("show").stdout == run("show", "-m", copy).stdout == shown  # ./stego.pt unless named


def test_sheet_and_images_belong_together(copy, scenes):
    assert "images and a sheet" in run("show", copy, scenes, code=2).stderr
    assert "images and a sheet" in run("show", copy, "--sheet", "s.png", code=2).stderr
    assert "images and a sheet" in run("show", copy, scenes, "--sheet", "s.png", "-o", "t.png", code=2).stderr
    assert "No model at none.pt" in run("show", "none.pt", code=2).stderr


def test_a_point_with_the_model_named_first(copy, scenes):
    run("show", copy, scenes / "scene00.png", "--at", "9,9", "-o", "a.png")
    run("show", scenes / "scene00.png", "--at", "9,9", "-m", copy, "-o", "b.png")
    assert np.array_equal(Image.open("a.png"), Image.open("b.png"))


def test_show_at(here, scenes, monkeypatch):
    """Codes with a model; without others, those it was fitted on are found again by the relative path it notes."""
    monkeypatch.setattr(stego, "CLUSTER_ROWS", 2000)
    Path("pictures").mkdir()
    for i in range(3):
        Path(f"pictures/{i}.png").symlink_to(scenes / f"scene0{i}.png")
    Stego.fit("pictures", clusters=2, backbone="tiny", steps=1, batch_size=8).save("model.pt")
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
