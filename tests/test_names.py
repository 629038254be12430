"""Knowing one's clusters: names, `stego show` with its sheet, and ids that outlive a new fit."""

import json
import re
from copy import copy as shallow_copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

from cli_parts.drawing import region_sheet
from cli_parts.sheets import best_regions, description
from stego import Stego
from stego_parts.clusters import inherit_ids, match_clusters_to
from stego_parts.config import Config
from stego_parts.features import TokenCache, encode
from stego_parts.images import distinct_colors


@pytest.fixture
def copy(here, saved):
    (here / "stego.pt").write_bytes(saved.read_bytes())
    return here / "stego.pt"


# ---- names -----------------------------------------------------------------------------------------------------


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


def test_one_name_for_two_clusters(saved):
    model = Stego.load(saved)
    model.rename({0: "ground", 2: "ground"})
    assert model.select(["Ground"]) == model.select([2]) == [0, 2]
    assert model.select(["1", "ground"]) == [0, 1, 2]


FAST = ["--no-crf", "--resolution", 96]


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


# ---- show ------------------------------------------------------------------------------------------------------


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


def test_sheet_and_images_belong_together(copy, scenes):
    assert "images and a sheet" in run("show", copy, scenes, code=2).stderr
    assert "images and a sheet" in run("show", copy, "--sheet", "s.png", code=2).stderr
    assert "No model at none.pt" in run("show", "none.pt", code=2).stderr


def test_a_point_with_the_model_named_first(copy, scenes):
    run("show", copy, scenes / "scene00.png", "--at", "9,9", "-o", "a.png")
    run("show", scenes / "scene00.png", "--at", "9,9", "-m", copy, "-o", "b.png")
    assert np.array_equal(Image.open("a.png"), Image.open("b.png"))


def test_regions_of_other_clusters_are_pale():
    picture, mask = Image.new("RGB", (20, 20), "black"), np.zeros((20, 20), np.uint8)
    mask[:, 10:] = 1
    colors = [tuple(color.tolist()) for color in distinct_colors(2)]
    sheet = np.asarray(
        region_sheet([("a", colors[0], [(picture, mask == 0)]), ("b", colors[1], [])], columns=1)
    )
    black, pale = (
        (sheet.max(2) < 10).sum(1).max(),
        ((sheet.min(2) > 180) & (sheet.max(2) < 200)).sum(1).max(),
    )
    assert black == pytest.approx(pale, rel=0.1) and black > 30  # half of the region each


def test_models_of_the_reference_implementation(here, saved):
    model = Stego.load(saved)
    model.config = replace(model.config, preset="released")
    assert any("a checkpoint of the reference implementation" in line for line in description(model))
    with pytest.raises(ValueError, match="cannot be written again"):
        model.save("released.pt")


# ---- fit --match -----------------------------------------------------------------------------------------------


def test_the_same_data_fitted_anew_keeps_numbers_names_and_colours(scenes, tmp_path):
    two = [scenes / "scene00.png", scenes / "scene01.png"]
    options = dict(classes=3, backbone="tiny", steps=20, batch_size=8)
    earlier = Stego.fit(two, **options)
    inherit_ids(earlier, earlier, {0: 2, 1: 0, 2: 1})  # another order than by share
    earlier.rename({0: "a", 1: "b", 2: "c"})
    earlier.palette = np.array([[9, 0, 0], [0, 9, 0], [0, 0, 9]], np.uint8)
    earlier.save(tmp_path / "earlier.pt")
    again = Stego.fit(two, match=tmp_path / "earlier.pt", **options)
    assert again.names == ["a", "b", "c"] and np.array_equal(again.palette, earlier.palette)
    image = np.asarray(Image.open(scenes / "scene00.png").convert("RGB"))
    before, after = (model.predict(image, crf=False, resolution=160) for model in (earlier, again))
    assert (before == after).mean() > 0.99


def test_clusters_correspond_by_what_they_cover(scenes, model):
    cache = encode(model.backbone, sorted(scenes.rglob("*.png"))[:3], Config(views="whole"))
    other = Stego(model.config, model.head, model.centers[[2, 0, 1]], model.share, backbone_sha256="")
    assert match_clusters_to(model, other, cache) == {0: 2, 1: 0, 2: 1}


def test_a_small_part_of_a_cluster_is_not_the_cluster(model):
    """Directions in the plane: half a circle is no twelfth of it, but nearly the half turned."""
    head = torch.nn.Identity()
    head.describe = head.forward  # what is clustered: points themselves

    def around(count, turned=0.0):
        angle = torch.arange(count) * (2 * torch.pi / count) + turned
        directions = torch.stack([angle.cos(), angle.sin()], 1)
        return Stego(model.config, head, directions, torch.ones(count), backbone_sha256="")

    cache = TokenCache(1, 1, 720, 2)
    cache.add(0, around(720, 0.001).centers.T[None, :, None])  # (1, 2, 1, 720)
    cache.finalize()
    assert match_clusters_to(around(2), around(12), cache) == {}
    assert match_clusters_to(around(2), around(2, 0.5), cache) == {0: 0, 1: 1}
    assert match_clusters_to(around(2), around(2, 0.5 + torch.pi), cache) == {0: 1, 1: 0}


@pytest.mark.parametrize(
    "classes, same, shares, names",
    [
        (3, {0: 1}, [1, 0, 2], ["", "b", ""]),
        (3, {}, [0, 1, 2], ["", "", ""]),
        (2, {1: 2}, [0, 1], ["", "c"]),  # number 2 is gone, the name stays
        (4, {3: 0, 0: 2}, [3, 1, 0, 2], ["a", "", "c", ""]),
    ],
)
def test_take_over(model, classes, same, shares, names):
    earlier = Stego(model.config, model.head, model.centers, model.share, backbone_sha256="")
    earlier.names = ["a", "b", "c"]
    new = Stego(model.config, model.head, torch.eye(classes, 70), torch.arange(classes), backbone_sha256="")
    inherit_ids(new, earlier, same)
    assert new.names == names
    assert new.share.tolist() == shares and new.centers.argmax(1).tolist() == shares
    colours = {tuple(colour) for colour in new.palette.tolist()}
    assert len(colours) == classes
    for m in same.values():
        assert tuple(earlier.palette[m]) in colours
    assert len(colours & {tuple(colour) for colour in earlier.palette.tolist()}) == len(same)


def test_many_clusters_still_have_colours(model):
    full = Stego(model.config, model.head, torch.eye(255), torch.ones(255), backbone_sha256="")
    new = Stego(model.config, model.head, torch.eye(255), torch.ones(255), backbone_sha256="")
    inherit_ids(new, full, {k: 254 - k for k in range(100)})
    assert len({tuple(colour) for colour in new.palette.tolist()}) == 255


def test_only_models_over_the_same_features_match(here, scenes, saved):
    state = torch.load(saved, weights_only=True)
    torch.save(state | {"backbone_sha256": "0" * 64}, "other.pt")
    args = ("fit", scenes / "scene00.png", "-k", 2, "--backbone", "tiny", "--steps", 1, "--match")
    assert "clusters are compared on the same features" in run(*args, "other.pt", code=2).stderr
    assert "No model at none.pt" in run(*args, "none.pt", code=2).stderr
