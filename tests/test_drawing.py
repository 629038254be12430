"""Pictures for people: what is where on them, by pixels whose colours are known."""

import numpy as np
import pytest
from PIL import Image

from cli_parts.drawing import (
    Clusters,
    contact_sheet,
    flow,
    image_rows,
    matrix_picture,
    overlay,
    region_sheet,
    with_legend,
)
from stego_parts.images import IGNORE, distinct_colors

PALETTE = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
GREY = Image.new("RGB", (200, 120), (128, 128, 128))


def halves():
    mask = np.zeros((120, 200), np.uint8)
    mask[:, 100:] = 1
    return mask


def test_overlay_has_colours_and_a_thin_line():
    shown = np.asarray(overlay(GREY, halves(), Clusters(PALETTE), opacity=0.5)).astype(int)
    assert (
        np.abs(shown[60, 50] - [189, 64, 64]).max() <= 1 and np.abs(shown[60, 150] - [64, 189, 64]).max() <= 1
    )
    assert shown[60, 100].min() > 185  # the line between them
    assert (shown[:, 101:] == shown[60, 150]).all() and (shown[:, :100] == shown[60, 50]).all()


def test_large_regions_have_their_names_at_their_centres():
    plain = np.asarray(overlay(GREY, halves(), Clusters(PALETTE))).astype(int)
    text = np.abs(np.asarray(overlay(GREY, halves(), Clusters(PALETTE, ["0", "road"]))) - plain).max(2) > 0
    for region, x in ((text[:, :100], 50), (text[:, 100:], 50)):
        rows, columns = np.nonzero(region)
        assert abs((columns.min() + columns.max()) / 2 - x) < 6 and len(rows) > 20
        assert rows.min() >= 20 and rows.max() < 100
    small = halves()
    small[:] = 0
    small[50:56, 50:56] = 1
    texts = [np.asarray(overlay(GREY, small, Clusters(PALETTE, ["0", name]))) for name in ("1", "road")]
    assert np.array_equal(*texts)  # no room for either


def test_a_name_without_room_gives_way_to_its_number():
    with_name = overlay(GREY, halves(), Clusters(PALETTE, ["0", "a name that is far too long"]))
    assert np.array_equal(
        np.asarray(with_name), np.asarray(overlay(GREY, halves(), Clusters(PALETTE, ["0", "1"])))
    )


def test_contact_sheet_has_every_picture_and_a_legend():
    one, four = (contact_sheet([(GREY, halves())] * n, Clusters(PALETTE, ["0", "road", "2"])) for n in (1, 4))
    assert four.width > 2.5 * one.width and one.height < four.height < 2 * one.height
    legend = np.asarray(one)[-30:].reshape(-1, 3)
    present = [(legend == color).all(1).sum() > 50 for color in PALETTE]
    assert present == [True, True, False]


def test_regions_of_other_clusters_are_pale_and_columns_are_two():
    picture, inside = Image.new("RGB", (20, 20), "black"), np.zeros((20, 20), bool)
    inside[:, :10] = True
    rows = [(f"{k}\n1 %", (250, 0, 0), [(picture, inside)]) for k in range(4)]
    sheet = np.asarray(region_sheet(rows))
    cell = sheet[8:128, -128:-8]
    assert cell[:, :55].max() < 10  # half of the region each, but where they meet
    assert cell[:, 65:].min() > 180 and cell[:, 65:].max() < 210
    assert sheet.shape[0] == 8 + 2 * 128 and (sheet[60, 8:21] == (250, 0, 0)).all()


def test_pictures_flow_into_lines():
    red, blue = Image.new("RGB", (40, 10), "red"), Image.new("RGB", (40, 20), "blue")
    sheet = np.asarray(flow([red, blue, red], 90, gap=4))
    assert sheet.shape == (34, 84, 3)
    assert sheet[5, 5].tolist() == [255, 0, 0] and sheet[5, 60].tolist() == [0, 0, 255]
    assert sheet[26, 5].tolist() == [255, 0, 0] and sheet[26, 60].min() == 255


def test_rows_have_headings_above_their_columns():
    plain = image_rows([("x", [GREY, GREY])])
    headed = np.asarray(image_rows([("x", [GREY, GREY])], headings=("image", "label")))
    assert headed.shape[0] - plain.height == 26 and headed.shape[1] == plain.width
    for left in (8, 8 + 208):
        assert headed[8:26, left : left + 60].min() < 100


def test_matrix_has_its_shares_and_names():
    matrix = np.array([[1, 0], [np.nan, np.nan]])
    picture = matrix_picture(matrix, ["sky", "road"], ["0 sky", "1 road"], title="t")
    pixels = np.asarray(picture).reshape(-1, 3).tolist()
    assert pixels.count([30, 95, 175]) > 200  # the full share
    assert pixels.count([200, 200, 200]) > 800  # two unknown


def test_sheets_of_nothing():
    assert contact_sheet([], Clusters(distinct_colors(3), ["0", "1", "2"])).mode == "RGB"
    assert region_sheet([]).mode == "RGB"


def test_pictures_stay_as_they_are_where_nothing_is_kept():
    image, mask = Image.new("RGB", (40, 30), "white"), np.full((30, 40), IGNORE, np.uint8)
    assert np.array_equal(np.asarray(overlay(image, mask, Clusters(distinct_colors()))), np.asarray(image))


@pytest.mark.parametrize("width", [20, 300, 4000])
def test_legend_shows_the_clusters_present(width):
    mask = np.zeros((50, width), np.uint8)
    mask[:, :3] = 2
    palette = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
    shown = np.asarray(
        with_legend(Image.new("RGB", (width, 50), "white"), mask, Clusters(palette, ["road", "1", "sky"]))
    )
    strip = shown[50:].reshape(-1, 3)
    have = [(strip == colour).all(1).sum() for colour in palette]
    assert have[0] > 80 and have[1] == 0 and have[2] > 80
    assert (strip.max(1) < 60).any() and shown.shape[1] >= width  # there is writing
