"""Own labels: which belongs to which image, what their values mean, what is said of those that mislead."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cli_parts.labels import folder_set, folder_sets, image_set, read_label, read_pair, sets_to_score
from stego_parts.images import IGNORE


def picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def rgb(label):
    return np.random.default_rng(0).integers(0, 255, (*label.shape, 3), dtype=np.uint8)


@pytest.fixture
def own(tmp_path):
    for i, stem in enumerate("ab"):
        label = np.full((40, 60), i, np.uint8)
        label[:5] = IGNORE
        picture(tmp_path / f"images/{stem}.jpg", rgb(label))
        picture(tmp_path / f"labels/{stem}.png", label)
    return tmp_path


def test_own_folders(own):
    labelled = folder_set(own / "images", own / "labels")
    assert labelled.classes == ["class 0", "class 1"] and [p.stem for p, _ in labelled.pairs] == ["a", "b"]
    assert np.unique(labelled.read(1)[1]).tolist() == [1, IGNORE]
    (own / "names.txt").write_text("wall\nfloor plan\ndoor\n")
    assert folder_set(own / "images", own / "labels", names=own / "names.txt").classes == [
        "wall",
        "floor plan",
        "door",
    ]


def test_more_names_than_labels_can_tell_apart(own):
    (own / "names.txt").write_text("\n".join(f"thing {i}" for i in range(256)))
    with pytest.raises(ValueError, match="Got 256 classes in .*names.txt; there must be 1 to 255"):
        folder_set(own / "images", own / "labels", names=own / "names.txt")


def test_pairs_go_by_stem_not_by_order(own):
    (own / "labels/a.png").rename(own / "labels/z.png")
    with pytest.raises(ValueError, match="1 of 2 images have no label of the same path or stem.*a.jpg"):
        folder_set(own / "images", own / "labels")


def test_two_labels_for_one_image(own):
    picture(own / "labels/a.bmp", np.zeros((40, 60), np.uint8))
    with pytest.raises(ValueError, match="Two labels for one image"):
        folder_set(own / "images", own / "labels")


def test_labels_of_another_size_value_or_kind(own):
    labelled = folder_set(own / "images", own / "labels")
    picture(own / "labels/a.png", np.full((40, 60), 7, np.uint8))
    with pytest.raises(ValueError, match=r"a.png has the label 7; labels lie in 0..1, or are 255"):
        labelled.read(0)
    picture(own / "labels/a.png", np.zeros((40, 61), np.uint8))
    with pytest.raises(ValueError, match="61 x 40 pixels and its image 60 x 40"):
        labelled.read(0)
    picture(own / "labels/a.png", rgb(np.zeros((40, 60))))
    with pytest.raises(ValueError, match="a.png as a label map .*mode RGB"):
        labelled.read(0)
    (own / "labels/a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="Cannot read .*a.png as a label map"):
        labelled.read(0)


def test_a_label_that_does_not_fit_is_found_before_anything_is_scored(own):
    (own / "names.txt").write_text("wall\n")
    with pytest.raises(ValueError, match=r"b.png has the label 1; labels lie in 0..0, or are 255"):
        folder_set(own / "images", own / "labels", names=own / "names.txt")
    picture(own / "labels/b.png", np.zeros((40, 61), np.uint8))
    with pytest.raises(ValueError, match="61 x 40 pixels and its image 60 x 40"):
        folder_set(own / "images", own / "labels")


def test_pair_is_the_central_square_with_untouched_label_values(own):
    label = np.zeros((40, 80), np.uint8)
    label[:, 30:50], label[:, :20] = 9, 200  # 200 lies outside the central square
    picture(own / "labels/a.png", label)
    picture(own / "images/a.jpg", rgb(label))
    image, ids = read_pair(own / "images/a.jpg", own / "labels/a.png", side=320)
    assert image.size == (320, 320) and ids.shape == (320, 320)
    assert np.unique(ids).tolist() == [0, 9] and (ids[:, 80:240] == 9).all() and (ids == 9).mean() == 0.5


def test_images_without_labels(own):
    unlabelled = image_set(own / "images")
    picture, label = unlabelled.read(0)
    assert picture.size == (320, 320) and label is None and unlabelled.classes == []
    assert len(unlabelled.pairs) == 2 and str(own / "images") in unlabelled.source


# ---- values ----------------------------------------------------------------------------------------------------


def striped(values, shares, side=40):
    """A label map (side, side) uint8 whose rows have these values, with these shares of them."""
    rows = np.repeat(np.array(values, np.uint8), [round(share * side) for share in shares])
    return np.repeat(rows[:, None], side, 1)


def one_image(folder, label):
    picture(folder / "images/a.png", rgb(label))
    picture(folder / "labels/a.png", label)
    return folder / "images", folder / "labels"


def test_binary_masks_are_said_to_have_one_class(tmp_path, caplog):
    labelled = folder_set(*one_image(tmp_path, striped([0, 255], [0.75, 0.25])))
    assert labelled.classes == ["class 0"]
    assert "Beside 255, which is ignored (25% of the pixels)" in caplog.text
    assert "the one value 0" in caplog.text and "--ignore" in caplog.text


def test_binary_masks_have_two_classes_where_255_is_not_ignored(tmp_path, caplog):
    labelled = folder_set(*one_image(tmp_path, striped([0, 255], [0.75, 0.25])), ignore=254)
    label = labelled.read(0, side=40)[1]
    assert labelled.classes == ["class 0", "class 255"] and not caplog.text
    assert (label == 1).mean() == 0.25 and (label == 0).mean() == 0.75
    assert "label 254 ignored" in labelled.source


def test_names_of_binary_masks(tmp_path):
    (tmp_path / "names.txt").write_text("ground\nroof\n", encoding="utf-8-sig")
    folders = one_image(tmp_path, striped([0, 255], [0.5, 0.5]))
    labelled = folder_set(*folders, names=tmp_path / "names.txt", ignore=254)
    assert labelled.classes == ["ground", "roof"]
    assert np.unique(labelled.read(0, side=40)[1]).tolist() == [0, 1]


def test_0_ignored(tmp_path, caplog):
    """Many label maps count their classes from 1."""
    labelled = folder_set(*one_image(tmp_path, striped([0, 1, 3], [0.25, 0.5, 0.25])), ignore=0)
    label = labelled.read(0, side=40)[1]
    assert labelled.classes == ["class 1", "class 2", "class 3"] and not caplog.text
    assert {value: (label == value).mean() for value in (IGNORE, 0, 2)} == {IGNORE: 0.25, 0: 0.5, 2: 0.25}
    picture(tmp_path / "labels/a.png", striped([7], [1]))
    with pytest.raises(ValueError, match="label 7; labels lie in 1..3, or are 0 to be ignored"):
        labelled.read(0)


def test_the_share_of_what_is_ignored_is_named(tmp_path, caplog):
    folder_set(*one_image(tmp_path, striped([0, 1, 255], [0.2, 0.2, 0.6])))
    assert "60% of the pixels have the label 255, which is ignored" in caplog.text


def test_no_word_of_a_seam_that_is_ignored(tmp_path, caplog):
    folder_set(*one_image(tmp_path, striped([0, 1, 255], [0.4, 0.3, 0.3])))
    assert not caplog.text


def test_a_class_that_occurs_in_one_set_only_is_one_of_both(tmp_path):
    val = one_image(tmp_path / "val", striped([0, 1], [0.5, 0.5]))
    train = one_image(tmp_path / "train", striped([0, 255], [0.5, 0.5]))
    sets = folder_sets([val, train], ignore=254)
    assert [each.classes for each in sets] == 2 * [["class 0", "class 1", "class 255"]]
    assert np.unique(sets[1].read(0, side=40)[1]).tolist() == [0, 2]


def test_nothing_but_what_is_ignored(tmp_path):
    with pytest.raises(ValueError, match="0 classes in .*labels; there must be 1 to 255"):
        folder_set(*one_image(tmp_path, striped([255], [1])))


def test_a_dataset_has_its_own_ignored_label():
    with pytest.raises(ValueError, match="brings its own labels, names, ignored label"):
        sets_to_score(dataset="potsdam3", ignore=0)


# ---- kinds of files ----------------------------------------------------------------------------------------------


def grey_png(label, bits):
    """A grey PNG file of so many bits a pixel, which Pillow does not write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    each = np.unpackbits(label[..., None], axis=2)[..., 8 - bits :]  # (H, W, bits)
    rows = [b"\0" + np.packbits(row).tobytes() for row in each]
    head = struct.pack(">IIBBBBB", label.shape[1], label.shape[0], bits, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["grey", "indexed"])
def test_labels_of_few_bits(tmp_path, bits, mode):
    label = (np.arange(24) % 2**bits).astype(np.uint8).reshape(4, 6)
    if mode == "indexed":
        image = Image.fromarray(label, "P")
        image.putpalette([k % 256 for k in range(3 * 2**bits)])
        image.save(tmp_path / "a.png", bits=bits)
    else:
        (tmp_path / "a.png").write_bytes(grey_png(label, bits))
    read = read_label(tmp_path / "a.png")
    assert read.dtype == np.uint8 and np.array_equal(read, label)


@pytest.mark.parametrize(
    "label, mode, advice",
    [
        (np.zeros((8, 8), np.uint16), "I;16", "store them in 8 bits: .*astype"),
        (np.zeros((8, 8), np.int32), "I", "store them in 8 bits: .*astype"),
        (np.zeros((8, 8, 3), np.uint8), "RGB", "getchannel.*the number of the class in place of each colour"),
        (np.zeros((8, 8, 4), np.uint8), "RGBA", "getchannel"),
    ],
)
def test_how_to_convert_other_modes(tmp_path, label, mode, advice):
    Image.fromarray(label).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif as a label map .*mode {mode}; .*{advice}"):
        read_label(tmp_path / "a.tif")


# ---- one name in several folders ---------------------------------------------------------------------------------


def trees(root, images, labels):
    """Folders images and labels with these files; the i-th label map has the value i everywhere."""
    for name in images:
        picture(root / "images" / name, np.zeros((8, 8, 3), np.uint8))
    for value, name in enumerate(labels):
        picture(root / "labels" / name, np.full((8, 8), value, np.uint8))
    return root / "images", root / "labels"


def paired(folders):
    labelled = folder_set(*folders)
    images, _ = folders
    return {
        str(path.relative_to(images)): int(labelled.read(i)[1].max())
        for i, (path, _) in enumerate(labelled.pairs)
    }


def test_a_jpeg_is_no_label_map(tmp_path):
    label = np.random.default_rng(0).integers(0, 3, (16, 16), dtype=np.uint8)
    Image.fromarray(label).save(tmp_path / "a.jpg", quality=100)
    assert (np.array(Image.open(tmp_path / "a.jpg")) != label).any()
    with pytest.raises(ValueError, match=r"a.jpg as a label map .it is a JPEG.*PNG"):
        read_label(tmp_path / "a.jpg")


def test_one_name_in_several_folders(tmp_path):
    folders = trees(tmp_path, ["x/1.jpg", "y/1.jpg", "2.jpg"], ["y/1.png", "x/1.png", "2.png"])
    assert paired(folders) == {"x/1.jpg": 1, "y/1.jpg": 0, "2.jpg": 2}


def test_other_trees_are_paired_by_stems_that_are_unique(tmp_path):
    folders = trees(tmp_path, ["x/1.jpg", "y/2.jpg"], ["all/2.png", "all/1.png"])
    assert paired(folders) == {"x/1.jpg": 1, "y/2.jpg": 0}


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (["x/1.jpg", "y/1.jpg"], ["1.png"], "Two images for one label: .*x/1.jpg and .*y/1.jpg for .*1.png"),
        (["x/1.jpg", "y/1.jpg"], ["x/1.png"], "Two images for one label: .*x/1.jpg and .*y/1.jpg"),
        (["1.jpg", "1.bmp"], ["1.png"], "Two images for one label: .*1.bmp and .*1.jpg"),
        (["1.jpg"], ["x/1.png", "y/1.png"], "Two labels for one image: .*x/1.png and .*y/1.png for .*1.jpg"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path, images, labels, message):
    with pytest.raises(ValueError, match=message):
        folder_set(*trees(tmp_path, images, labels))
