"""`stego name`: names of clusters, and clusters that share one."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAST, run
from PIL import Image

from stego import Stego


def test_names_are_kept(here, scenes, saved):
    (here / "stego.pt").write_bytes(saved.read_bytes())
    shown = run("name", "stego.pt", "0=sky", "2=brick wall", "1=Straße").stdout
    assert "sky" in shown and "brick wall" in shown and "Straße" in shown
    before, after = Stego.load(saved), Stego.load("stego.pt")
    assert before.names == ["", "", ""] and after.names == ["sky", "Straße", "brick wall"]
    assert torch.equal(before.centers, after.centers) and np.array_equal(before.palette, after.palette)
    assert torch.equal(before.head.linear.weight, after.head.linear.weight) and before.config == after.config
    assert run("name", "stego.pt", "1=").stdout.count("cluster ") == 1  # what changed
    assert Stego.load("stego.pt").labels == ["sky", "1", "brick wall"]


@pytest.mark.parametrize(
    "given, code, message",
    [
        ("road", 2, "3=road"),
        ("x=road", 2, "3=road"),
        ("-1=road", 2, ""),
        ("3=road", 2, "has 0 to 2"),
        ("0=7", 2, "no number"),
        ("0=a,b", 2, "without comma"),
        ("0=a=b", 2, "without comma"),
        ("0=a\tb", 2, "without"),
    ],
)
def test_bad_names(here, saved, given, code, message):
    before = saved.read_bytes()
    assert message in run("name", saved, given, code=code).stderr
    assert saved.read_bytes() == before


@pytest.mark.parametrize("wrong", ["grass", "0", "grass=0", "stego.pt"])
def test_what_is_no_name_is_repeated(here, wrong):
    assert f"Got '{wrong}'; name clusters by number" in run("name", wrong, code=2).stderr


def test_clusters_with_one_name_are_one_until_it_is_taken_away(copy, scenes):
    """One number in masks, one colour, one line, one row of JSON and one COCO category."""
    run("predict", scenes / "sub", "-o", "apart", *FAST)
    share = Stego.load(copy).share
    lines = run("name", "0=ground", "2=ground").stdout
    assert re.search(rf"cluster 0\+2 ground +{float(share[0] + share[2]):.1%}", lines)
    assert lines.count("cluster ") == 1 and run("show").stdout.count("cluster ") == 2
    run("predict", scenes / "sub", "-o", "one", "--overlay", *FAST)
    for place in sorted(Path("apart").iterdir()):
        before, after = (Image.open(folder / place.name) for folder in (place.parent, Path("one")))
        assert np.array_equal(np.where(np.asarray(before) == 2, 0, before), np.asarray(after))
        assert after.getpalette()[:3] == after.getpalette()[6:9] == before.getpalette()[:3]
    run("predict", scenes / "sub", "-o", "s.json", "--format", "json", *FAST)
    run("predict", scenes / "sub", "-o", "c.json", "--format", "coco", *FAST)
    images, coco = (json.loads(Path(name).read_text()) for name in ("s.json", "c.json"))
    for image in images["images"]:
        assert [row["name"] for row in image["clusters"]] == ["ground", "1"]
        assert sum(row["share"] for row in image["clusters"]) == pytest.approx(1, abs=1e-5)
    assert coco["categories"] == [{"id": 1, "name": "ground"}, {"id": 2, "name": "1"}]
    assert {each["category_id"] for each in coco["annotations"]} <= {1, 2}
    run("name", "0=", "2=")
    run("predict", scenes / "sub", "-o", "again", *FAST)
    for place in Path("apart").iterdir():
        assert np.array_equal(Image.open(place), Image.open(Path("again") / place.name))
