"""Names in other letters than the built-in font's: a font of the system has them, or a number stands for the name."""

import logging
import os

import numpy as np
import pytest
from PIL import Image, ImageFont

from cli_parts import drawing, fonts, sheets
from cli_parts.drawing import Clusters
from stego_parts.images import distinct_colors

NAMES = ["Straße", "café", "niño", "дорога", "道路", "weg 道路 ß"]
GREY = Image.new("RGB", (400, 200), (128, 128, 128))
MASK = np.zeros((200, 400), np.uint8)


def system_font(text: str) -> str | None:
    """A font file of this system that has a text."""
    source = fonts._source_of(text)
    return ImageFont.truetype(source[0]).path if source else None


@pytest.fixture
def forget():
    """Nothing of what was found out about fonts before."""
    for function in (fonts._source_of, fonts._of_system, fonts._say_missing):
        function.cache_clear()
    yield
    for function in (fonts._source_of, fonts._of_system, fonts._say_missing):
        function.cache_clear()


@pytest.fixture
def no_fonts(monkeypatch, forget):
    """A system without a font and without fontconfig."""
    monkeypatch.setattr(fonts, "FONTS", ())
    monkeypatch.setenv("PATH", os.devnull)


def pictures(name: str, number: str = "0") -> list[np.ndarray]:
    """An overlay, a legend, a caption and a matrix with one name."""
    clusters = Clusters(distinct_colors(1), [name])
    shown = [
        drawing.overlay(GREY, MASK, clusters),
        drawing.with_legend(GREY, MASK, clusters),
        drawing.text_picture(drawing.cluster_name(0, [name])),
        sheets._confusion_picture(
            {"assignment": [0], "confusion": [[1]]}, sheets._readable_classes([name]), "t"
        ),
    ]
    return [np.asarray(picture) for picture in shown]


def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, others))


def test_the_built_in_font_writes_what_it_can(no_fonts, caplog):
    assert fonts.font(13, "road 7, sky") is fonts.font(13)
    assert not same(pictures("road"), pictures("0")) and not caplog.records


@pytest.mark.parametrize("name", NAMES)
def test_without_a_font_the_number_stands_for_the_name_and_it_is_said_once(no_fonts, caplog, name):
    with caplog.at_level(logging.WARNING, "stego"):
        assert same(pictures(name), pictures("0"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and repr(name) in said[0] and "Install" in said[0]


def test_letters_that_no_font_has_become_question_marks_in_names_of_files(no_fonts):
    assert np.array_equal(drawing.text_picture("дaß.jpg"), drawing.text_picture("?a?.jpg"))


@pytest.mark.parametrize("name", NAMES)
def test_a_font_of_the_system_writes_other_letters(forget, name):
    if not system_font(name):
        pytest.skip("no font here has these letters")
    letters = fonts.font(40, name)
    box = bytes(letters.getmask(fonts.NO_LETTER))
    assert all(bytes(letters.getmask(letter)) != box for letter in name if letter != " ")
    written = drawing.text_picture(name, 40)
    assert written.width == np.ceil(letters.getlength(name)) and not same(pictures(name), pictures("0"))


def test_composed_and_decomposed_letters_are_the_same():
    assert same(pictures("cafe\u0301"), pictures("caf\u00e9"))


def test_fontconfig_is_asked_for_what_the_list_lacks(monkeypatch, forget, tmp_path):
    path = system_font("дорога")
    if not path:
        pytest.skip("no font here has these letters")
    tool = tmp_path / "fc-match"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nprintf "0 {path}"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(fonts, "FONTS", ("no such font.ttf",))
    monkeypatch.setenv("PATH", str(tmp_path))
    fonts._source_of.cache_clear()
    assert fonts.font(20, "дорога").path == path
    assert ":charset=430 433 434 43e 440" in (tmp_path / "asked").read_text()
    assert fonts.readable("道\U0001f600", "7") == "7"  # what it answers lacks them


@pytest.mark.parametrize("answer", ["exit 1", "echo nonsense", "printf '0 /no/such/file.ttf'"])
def test_a_fontconfig_that_knows_nothing_is_no_failure(monkeypatch, forget, tmp_path, answer):
    (tmp_path / "fc-match").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "fc-match").chmod(0o755)
    monkeypatch.setattr(fonts, "FONTS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fonts.readable("дорога", "3") == "3"
