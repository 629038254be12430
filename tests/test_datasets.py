"""Labelled sets in their official layouts: label ids, lists, and what is said when something is missing."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from cli_parts.datasets import COCOSTUFF, DATASETS, POTSDAM, published_line
from cli_parts.labels import labelled_set
from stego_parts.config import PRESETS
from stego_parts.images import IGNORE, read_image

SHARED = Path(__file__).parents[2] / "shared"


def picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def every_id(count, side=16):
    """A label map of side x side pixels, squares of the ids 0..count - 1 and 255 in rows."""
    ids = np.append(np.arange(count), IGNORE).astype(np.uint8)
    return np.repeat(np.repeat(np.resize(ids, (side, side)), 8, 0), 8, 1)


def rgb(label):
    return np.random.default_rng(0).integers(0, 255, (*label.shape, 3), dtype=np.uint8)


@pytest.fixture
def cityscapes(tmp_path):
    for split, city in (("train", "aachen"), ("val", "frankfurt")):
        label = every_id(34)
        picture(tmp_path / f"leftImg8bit/{split}/{city}/{city}_000000_000001_leftImg8bit.png", rgb(label))
        picture(tmp_path / f"gtFine/{split}/{city}/{city}_000000_000001_gtFine_labelIds.png", label)
    return tmp_path


@pytest.fixture
def cocostuff(tmp_path):
    for split in ("train", "val"):
        for stem in ("000000000001", "000000000002"):
            label = every_id(182)
            picture(tmp_path / f"images/{split}2017/{stem}.jpg", rgb(label))
            picture(tmp_path / f"annotations/{split}2017/{stem}.png", label)
    return tmp_path


@pytest.fixture
def potsdam(tmp_path):
    for stem in ("2_10_0_0", "2_10_0_1"):
        label = every_id(6)
        for folder, key, value in (
            ("imgs", "img", np.dstack([rgb(label), label])),
            ("gt", "gt", label.astype(np.int32)),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            savemat(tmp_path / folder / f"{stem}.mat", {key: value})
    (tmp_path / "labelled_train.txt").write_text("2_10_0_0\n")
    (tmp_path / "labelled_test.txt").write_text("2_10_0_1\n")
    return tmp_path


def class_of_id(labelled):
    """{id: class} as the label maps come out, from the squares drawn by every_id."""
    _, label = labelled.read(0, side=128)
    ids = every_id(int((labelled.lookup >= 0).sum()) - 1)
    return {int(i): set(label[ids == i].tolist()) for i in np.unique(ids)}


def test_every_cityscapes_id(cityscapes):
    found = class_of_id(labelled_set("cityscapes", cityscapes, "val"))
    assert found == {
        i: {i - 7 if 7 <= i <= 33 else IGNORE} for i in [*range(34), 255]
    }  # id -1 is stored as 255
    names = labelled_set("cityscapes", cityscapes, "train").classes
    assert [names[i - 7] for i in (7, 11, 17, 23, 26, 33)] == [
        "road",
        "building",
        "pole",
        "sky",
        "car",
        "bicycle",
    ]
    assert len(names) == 27


def test_every_potsdam_id(potsdam):
    labelled = labelled_set("potsdam3", potsdam, "val")
    assert class_of_id(labelled) == {0: {0}, 4: {0}, 1: {1}, 5: {1}, 2: {2}, 3: {2}, 255: {IGNORE}}
    assert [image.stem for image, _ in labelled.pairs] == [
        "2_10_0_1"
    ] and labelled.source == "labelled_test.txt"
    assert np.array_equal(
        np.asarray(read_image(labelled.pairs[0][0])), rgb(every_id(6))
    )  # RGB of four channels


def test_every_cocostuff_id(cocostuff):
    labelled = labelled_set("cocostuff27", cocostuff, "val")
    found = class_of_id(labelled)
    name = {i: labelled.classes[min(found[i])] for i in range(182)}
    assert found[255] == {IGNORE} and len(labelled.classes) == 27
    spots = {
        0: "person",
        1: "vehicle",
        15: "animal",
        46: "kitchen",
        61: "furniture",
        71: "electronic",
        156: "sky",
        168: "plant",
        181: "solid",
        177: "water",
        148: "ground",
    }
    table = SHARED / "cocostuff27.csv"
    if table.exists():
        rows = list(csv.DictReader(table.open()))
        assert [labelled.lookup[int(row["fine_id"])] for row in rows] == [
            int(row["coarse_id"]) for row in rows
        ]
        assert len(rows) == 182
        spots = {i: labelled.classes[int(rows[i]["coarse_id"])] for i in spots}
    assert {i: name[i] for i in spots} == spots


def test_cocostuff_lists(cocostuff):
    assert len(labelled_set("cocostuff27", cocostuff, "train").pairs) == 2
    assert "not comparable" in labelled_set("cocostuff27", cocostuff, "train").source
    for split, name in (("train", "Coarse.txt"), ("val", "Coarse_7.txt")):
        listed = cocostuff / f"curated/{split}2017/Coco164kFull_Stuff_{name}"
        listed.parent.mkdir(parents=True)
        listed.write_text("000000000002\n")
        labelled = labelled_set("cocostuff27", cocostuff, split)
        assert [image.stem for image, _ in labelled.pairs] == ["000000000002"] and name in labelled.source


@pytest.mark.parametrize(
    "name, missing",
    [
        ("cityscapes", "leftImg8bit"),
        ("cityscapes", "gtFine/val"),
        ("cocostuff27", "images/val2017"),
        ("cocostuff27", "annotations/val2017/000000000002.png"),
        ("potsdam3", "labelled_test.txt"),
        ("potsdam3", "gt/2_10_0_1.mat"),
    ],
)
def test_first_missing_path_and_the_expected_tree(name, missing, request):
    root = request.getfixturevalue({"cocostuff27": "cocostuff", "potsdam3": "potsdam"}.get(name, name))
    (root / missing).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError) as caught:
        labelled_set(name, root, "val")
    assert missing in str(caught.value) and DATASETS[name].layout in str(caught.value)


@pytest.mark.parametrize(
    "name, empty", [("cityscapes", "leftImg8bit/val"), ("potsdam3", "labelled_test.txt")]
)
def test_a_split_without_images(name, empty, request):
    """Images one folder too deep, or an empty list."""
    root = request.getfixturevalue({"potsdam3": "potsdam"}.get(name, name))
    if (root / empty).is_dir():
        (root / empty).rename(root / "val")
        (root / empty).mkdir()
        (root / "val").rename(root / empty / "val")
    else:
        (root / empty).write_text("\n")
    with pytest.raises(FileNotFoundError) as caught:
        labelled_set(name, root, "val")
    assert f"No image in {root / empty}" in str(caught.value) and DATASETS[name].layout in str(caught.value)


def test_unknown_dataset(tmp_path):
    with pytest.raises(ValueError, match="Unknown dataset 'ade20k'; choose one of"):
        labelled_set("ade20k", tmp_path, "val")


def test_broken_matlab_file(potsdam):
    (potsdam / "imgs/2_10_0_1.mat").write_bytes(b"MATLAB 5.0" + bytes(300))
    with pytest.raises(ValueError, match="2_10_0_1.mat"):
        labelled_set("potsdam3", potsdam, "val").read(0)
    savemat(potsdam / "imgs/2_10_0_1.mat", {"other": np.zeros(3)})
    with pytest.raises(ValueError, match="no array of 3 dimensions of whole numbers under the key 'img'"):
        labelled_set("potsdam3", potsdam, "val").read(0)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.int64, np.uint16])
def test_matlab_labels_of_any_integer_type(potsdam, kind):
    savemat(potsdam / "gt/2_10_0_1.mat", {"gt": every_id(6).astype(kind)})
    assert class_of_id(labelled_set("potsdam3", potsdam, "val"))[255] == {IGNORE}


@pytest.mark.parametrize(
    "value, message", [(-1, "values -1..0"), (256, "values 0..256"), (0.5, "no array of 2 dimensions")]
)
def test_matlab_labels_that_are_none(potsdam, value, message):
    label = np.zeros((128, 128), type(value) if isinstance(value, float) else np.int32)
    label[3, 5] = value
    savemat(potsdam / "gt/2_10_0_1.mat", {"gt": label})
    with pytest.raises(ValueError, match=f"2_10_0_1.mat has {message}"):
        labelled_set("potsdam3", potsdam, "val").read(0)


def test_published_rows():
    """Table 2's MoCo v2, not Table 5's; each row that a preset repeats has that preset's backbone."""
    rows = {row.name: row[3:] for row in COCOSTUFF.published}
    assert rows["STEGO, MoCoV2"] == (48.4, 20.8, 70.7, 26.5)
    assert any("released" in row.name and row.miou == 62.6 for row in POTSDAM.published)
    repeated = [row for each in DATASETS.values() for row in each.published if row.preset]
    assert len(repeated) == 4 and all(PRESETS[row.preset]["backbone"] == row.backbone for row in repeated)
    for dataset in DATASETS.values():  # what `fit --dataset` alone repeats
        backbone = PRESETS[dataset.preset]["backbone"]
        assert "the published row" in published_line(dataset, preset=dataset.preset, backbone=backbone)
        assert "no published row" in published_line(dataset, preset=dataset.preset, backbone="tiny")


def test_published_line():
    line = published_line(DATASETS["cityscapes"], preset="cityscapes", backbone="dino_vitb8")
    assert "dino_vitb8" in line and "'STEGO, DINO ViT-B/8', accuracy 73.2, mIoU 21.0" in line
    line = published_line(COCOSTUFF, preset="cocostuff", backbone="tiny")
    assert "no published row" in line and "dino_vits8_300ep with cocostuff-small" in line
