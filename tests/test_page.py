"""The page about a model: what is on it, that it opens from disk, and that names are only names."""

import os
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import run
from networks import Mean
from PIL import Image

import stego
from cli_parts import page
from stego import Stego
from stego_parts.checkpoint import FitRecord

VOID = {"meta", "img", "input", "br"}
HOSTILE = '<script>alert("x")</script> & Straße'


class Page(HTMLParser):
    """The tags of a page, which have to be closed in order, its text, and what it loads."""

    def __init__(self, file):
        super().__init__()
        self.tags, self.open, self.text, self.sources, self.styles = [], [], "", [], []
        self.feed(file.read_text("utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.styles.append(values.get("style", ""))
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def fitted(scenes, monkeypatch):
    """A model right after its fit, of whose clusters two have names."""
    monkeypatch.setattr(stego, "load_backbone", lambda *args, **options: Mean())
    return Stego.fit(scenes, clusters=3, steps=12)


def test_a_page_after_a_fit_has_everything(fitted, tmp_path):
    fitted.rename({0: "sky", 1: "road"})
    file = tmp_path / "index.html"
    page.write_page(fitted, file, fitted.record.paths)
    shown = Page(file)
    assert shown.tags.count("input") == page.PICTURES and shown.tags.count("svg") == 2
    for text in (
        "0 sky",
        "1 road",
        f"{fitted.share[0]:.1%}",
        "12 steps",
        "nearest neighbours",
        "scene00.png",
    ):
        assert text in shown.text, text
    for color in fitted.colors:
        assert f"border-color:#{bytes(color.tolist()).hex()}" in shown.styles
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jpg")}
    assert set(shown.sources) == made and len(made) > 2 * page.PICTURES  # all of it beside the page


def test_photo_and_segments_lie_on_each_other(fitted, tmp_path):
    page.write_page(fitted, tmp_path / "a.html", fitted.record.paths[:1])
    photo, segments = (Image.open(tmp_path / f"a-pictures/{name}0.jpg") for name in ("photo", "segments"))
    assert photo.size == segments.size and not np.array_equal(np.asarray(photo), np.asarray(segments))


def test_names_are_escaped(fitted, scenes, tmp_path):
    fitted.rename({0: HOSTILE})
    path = tmp_path / '<img src=x onerror="y">&.png'
    path.write_bytes((scenes / "scene00.png").read_bytes())
    page.write_page(fitted, tmp_path / "page.html", [path])
    shown = Page(tmp_path / "page.html")
    assert "script" not in shown.tags and f"0 {HOSTILE}" in shown.text and path.name in shown.text
    assert "x" not in shown.sources


def test_a_page_of_any_name_finds_its_pictures(copy, scenes):
    run("show", copy, scenes / "scene00.png", "--sheet", "50%41 #1&.HTML")
    sources = Page(copy.parent / "50%41 #1&.HTML").sources
    assert sources and all((copy.parent / unquote(urlsplit(source).path)).is_file() for source in sources)


@pytest.mark.long
def test_a_photo_whose_name_is_no_text(fitted, scenes, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes((scenes / "scene00.png").read_bytes())
    page.write_page(fitted, tmp_path / "page.html", [path])
    assert "caf?.png" in Page(tmp_path / "page.html").text


def test_clusters_of_one_name_are_one_card(fitted, tmp_path):
    fitted.rename({1: "thing", 2: "thing"})
    page.write_page(fitted, tmp_path / "page.html", fitted.record.paths[:2])
    shown = Page(tmp_path / "page.html")
    assert shown.tags.count("section") == 2 and f"{fitted.share[1:].sum():.1%}" in shown.text


def test_show_writes_a_page_where_the_sheet_is_html(copy, scenes):
    result = run("show", copy, scenes / "sub", "--sheet", "sheet.html")
    assert "sheet sheet.html" in result.stdout
    shown = Page(copy.parent / "sheet.html")
    assert shown.tags.count("section") == 3 and shown.tags.count("input") == 4
    assert "Training" not in shown.text  # a model that was read tells nothing about it
    assert "would overwrite" in run("show", copy, scenes, "--sheet", copy, code=2).stderr


def test_images_are_evenly_spread():
    assert page.spread([*"abcdefghij"], 3) == ["a", "d", "g"] and page.spread(["a"], 6) == ["a"]


def test_neighbours_in_words(tmp_path):
    record = FitRecord(
        [tmp_path / "a.png", tmp_path / "b.png"],
        torch.arange(2).repeat_interleave(5),
        torch.arange(5).repeat(2),
        torch.tensor([[1, 5]] * 5 + [[8, 9]] * 5),
        [],
    )
    assert (
        page.neighbor_sentences(record, "five")[0]
        == "upper left of a.png: nearest to upper right of a.png, upper left of b.png."
    )
    assert page.neighbor_sentences(record, "whole")[0] == "a.png: nearest to a.png, b.png."
    assert page.neighbor_line(record).startswith(
        "Of a crop's 2 nearest neighbours, 1.5 are of its own image; 0%"
    )


def points_of(svg: str) -> list[list[list[float]]]:
    """The points of each curve, in units of the chart."""
    lines = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline")
    return [[[float(x) for x in pair.split(",")] for pair in line.get("points").split()] for line in lines]


def test_curves_go_where_their_values_are():
    nan = float("nan")
    width, height = page.CHART
    svg = page.curve_svg({"a": [(0, 1), (5, 2), (7, nan), (10, 3)], "b <&": []}, x_label="step")
    assert points_of(svg) == [[[0, height], [width / 2, height / 2], [width, 0]], []]
    texts = [each.text for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "step" in texts and "b <&" in texts and {"0", "2", "4", "6", "8", "10"} <= set(texts)


@pytest.mark.parametrize("points", [[], [(3, 7)], [(0, 2), (1, 2)], [(0, 1e-9), (1, 2e9)]])
def test_curves_of_hardly_anything(points):
    numbers = np.array([*points_of(page.curve_svg({"a": points}, x_label="x"))[0]])
    assert np.isfinite(numbers).all()
