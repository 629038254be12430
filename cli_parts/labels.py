"""Labelled sets, published or your own: which label belongs to which image, and how both are read.

A *label id* is a value in a label map; a *class* is what it stands for, a number from 0. In what `read` returns, pixels
of no class are IGNORE.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cli_parts.datasets import by_name, dataset_root
from stego_parts.files import find_images, read_lines
from stego_parts.images import IGNORE, image_size, open_image, read_image, read_mat, square

SIDE = 320  # pixels (Sec. 4); rounded up to whole patches: 322 for patches of 14
IDS = 256  # label ids are 0..255
UNKNOWN = -1  # in a lookup: a label id that the set does not know
MOSTLY = 0.5  # share of ignored pixels from which it is said
# What to do about a picture of another mode than an 8-bit one, before its name
CONVERT = {
    "I;16": "if its values are 0..255, store them in 8 bits: `Image.fromarray(np.array(label).astype(np.uint8))`",
    "RGB": "if it is grey, keep one channel: `label.getchannel(0)`; if its colours stand for classes, "
    "write the number of the class in place of each colour",
}
STRETCHED = {"L;2": 85, "L;4": 17}  # Pillow's names of how grey values are packed

log = logging.getLogger("stego")
Pair = tuple[Path, Path | None]  # an image and its label map, if it has one


@dataclass
class LabelledSet:
    """Images with label maps, or without: then classes is empty and each label None.

    pairs: (image path, label path or None); classes: their names; lookup: (256,) int16, the class of each
    label id, IGNORE or UNKNOWN; source: which images these are, in words.
    """

    name: str
    classes: list[str]
    pairs: list[Pair]
    lookup: np.ndarray | None
    source: str

    @property
    def paths(self) -> list[Path]:
        """All files of the set."""
        return [path for pair in self.pairs for path in pair if path]

    def read(
        self, index: int, *, side: int = SIDE, bands: tuple[int, ...] = ()
    ) -> tuple[Image.Image, np.ndarray | None]:
        """Image and label of a pair, as `read_pair`."""
        image, label = self.pairs[index]
        return read_pair(image, label, lookup=self.lookup, side=side, bands=bands)


def sets_to_score(
    *,
    dataset: str | None = None,
    root: Path | None = None,
    images: Path | None = None,
    labels: Path | None = None,
    names: Path | None = None,
    train_images: Path | None = None,
    train_labels: Path | None = None,
    ignore: int | None = None,
) -> tuple[LabelledSet, LabelledSet | None]:
    """The set to score on, published or of one's own, and the train images or None; arguments as the options."""
    if bool(dataset) == bool(images):
        raise ValueError("Give a --dataset, or your own --images and --labels.")
    if dataset and (labels or names or train_images or train_labels or ignore is not None):
        raise ValueError(
            "A --dataset brings its own labels, names, ignored label and train images; leave them out."
        )
    if bool(images) != bool(labels) or (train_labels and not train_images):
        raise ValueError("Images and labels belong together: give both folders.")
    if dataset:
        root = dataset_root(dataset, root)
        return labelled_set(dataset, root, "val"), train_split(dataset, root)
    folders = [(images, labels)]
    if train_labels:
        folders.append((train_images, train_labels))
    labelled, *train = folder_sets(folders, names=names, ignore=IGNORE if ignore is None else ignore)
    if train_images and not train_labels:
        train = [image_set(train_images)]
    return labelled, train[0] if train else None


def image_set(source: Path | str) -> LabelledSet:
    """Images without labels: a file, folder or pattern."""
    pairs: list[Pair] = [(path, None) for path, _ in find_images(source)]
    return LabelledSet(str(source), [], pairs, None, f"all of {source}, without labels")


# ---- published datasets --------------------------------------------------------------------------------------


def labelled_set(name: str, root: str | os.PathLike, split: str) -> LabelledSet:
    """A published dataset under root; split "train" or "val" (Potsdam: its test list).

    Raises ValueError for an unknown name, FileNotFoundError with the first missing path and the expected tree.
    """
    dataset = by_name(name)
    files = dataset.find(Path(root), split)
    paired = [path for pair in files.pairs for path in pair]
    missing = [f"{path} is missing" for path in [*files.needed, *paired] if not path.exists()]
    if not (missing or paired):
        missing = [f"No image in {files.needed[0]}"]
    if missing:
        raise FileNotFoundError(f"{missing[0]}. {name} under {root} should look like\n{dataset.layout}")
    lookup = _empty_lookup(IGNORE)
    for label_id, number in enumerate(dataset.class_of_id):
        lookup[label_id] = IGNORE if number is None else number
    return LabelledSet(name, list(dataset.classes), list(files.pairs), lookup, files.source)


def train_split(dataset: str, root: Path) -> LabelledSet | None:
    """The train split, for the linear probe and the baseline; None, with a warning, where only val is there."""
    try:
        return labelled_set(dataset, root, "train")
    except FileNotFoundError as error:
        log.warning("No linear probe, and the baseline's clusters not from the train split: %s", error)
        return None


def _empty_lookup(ignore: int) -> np.ndarray:
    """(256,) int16: one label id is ignored, all others are unknown."""
    lookup = np.full(IDS, UNKNOWN, np.int16)
    lookup[ignore] = IGNORE
    return lookup


# ---- your own ------------------------------------------------------------------------------------------------


def folder_set(images: Path, labels: Path, *, names: Path | None = None, ignore: int = IGNORE) -> LabelledSet:
    """Your own images and labels, two folders: `folder_sets` of one."""
    return folder_sets([(images, labels)], names=names, ignore=ignore)[0]


def folder_sets(
    folders: Sequence[tuple], *, names: Path | None = None, ignore: int = IGNORE
) -> list[LabelledSet]:
    """Your own sets, each a folder of images and one of label maps (see `folder_pairs`), all with the same classes.

    names: a text file, one class a line in the order of the label ids; without it the classes are those up to the
    largest label id. ignore: the label id of pixels of no class. Says where the labels of the first set, which is
    the one to score, look as if another one were meant.
    """
    paired = [folder_pairs(images, labels) for images, labels in folders]
    counts = [count_ids(pairs) for pairs in paired]
    listed = None if names is None else read_lines(names)
    ids = class_ids(
        np.concatenate(counts).sum(0), ignore=ignore, count=None if listed is None else len(listed)
    )
    count = len(ids if listed is None else listed)
    if not 1 <= count <= len(ids):
        raise ValueError(
            f"Got {count} classes in {names or folders[0][1]}; there must be 1 to {IGNORE}, "
            f"beside the label {ignore}, which is ignored."
        )
    _say_what_is_ignored(counts[0].sum(0), ignore)
    lookup = _empty_lookup(ignore)
    lookup[ids] = np.arange(len(ids))
    for pairs, rows in zip(paired, counts):
        for (_, label), row in zip(pairs, rows):
            _check_ids(row, lookup, label)
    classes = listed or [f"class {label_id}" for label_id in ids]
    note = "" if ignore == IGNORE else f", label {ignore} ignored"
    return [
        LabelledSet(str(images), classes, list(pairs), lookup, f"all of {images}{note}")
        for (images, _), pairs in zip(folders, paired)
    ]


def class_ids(counts: np.ndarray, *, ignore: int, count: int | None) -> list[int]:
    """The label ids of the classes, in their order: those from 0 on without the ignored one.

    counts: (256,) pixels of each label id; count: of classes, None: up to the largest label id. 255 is far from all
    others, so where it is not ignored and occurs, it is the last class.
    """
    ids = [label_id for label_id in range(IDS - 1) if label_id != ignore]
    last = [IDS - 1] if ignore != IDS - 1 and counts[IDS - 1] else []
    if count is not None:
        return [*ids[: max(count - len(last), 0)], *last]
    used = np.flatnonzero(counts[ids])
    return [*ids[: int(used.max(initial=-1)) + 1], *last]


def count_ids(pairs: Sequence[tuple[Path, Path]]) -> np.ndarray:
    """Pixels of each label id in the label map of each pair: (pairs, 256) int64.

    Raises ValueError for a label map of another size than its image.
    """
    counts = []
    for image, label in pairs:
        ids = read_label(label)
        _check_size(ids, label, image_size(image))
        counts.append(_pixels_of_ids(ids))
    return np.stack(counts)


def _say_what_is_ignored(counts: np.ndarray, ignore: int) -> None:
    """Warn of labels that leave nothing to tell apart, or little: masks of 0 and 255, say. counts: see `class_ids`."""
    used = [label_id for label_id in np.flatnonzero(counts) if label_id != ignore]
    advice = "If it is a class too, give another value with --ignore: 254, say, or 0 where 0 is no class."
    share = counts[ignore] / counts.sum()
    if len(used) == 1 and counts[ignore]:
        log.warning(
            "Beside %d, which is ignored (%.0f%% of the pixels), the labels have the one value %d: one class is always "
            "right. %s",
            ignore,
            100 * share,
            used[0],
            advice,
        )
    elif share > MOSTLY:
        log.warning(
            "%.0f%% of the pixels have the label %d, which is ignored. %s", 100 * share, ignore, advice
        )


def folder_pairs(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Images and label maps of two folders, in the order of the images.

    Paired by the path below the folders, without suffix; images that find none in this way, by the stem where no other
    image and no other label has it. Raises ValueError naming the first image without a label, or what is ambiguous.
    """
    found = find_images(images)
    labels_found = find_images(labels, outputs=True)  # the masks of another model are labels too
    images_at = _grouped(found, _key)
    labels_at = _grouped(labels_found, _key)
    images_of_stem = _grouped(found, _stem)
    labels_of_stem = _grouped(labels_found, _stem)
    pairs = []
    missing = []
    for path, place in found:
        key = _key(place)
        stem = _stem(place)
        if key in labels_at:
            pairs.append((path, _only_one(images_at[key], labels_at[key])))
        elif stem in labels_of_stem:
            pairs.append((path, _only_one(images_of_stem[stem], labels_of_stem[stem])))
        else:
            missing.append(path)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(found)} images have no label of the same path or stem in {labels}: "
            f"the first is {missing[0]}."
        )
    return pairs


def _key(place: Path) -> str:
    return str(place.with_suffix(""))


def _stem(place: Path) -> str:
    return place.stem


def _grouped(found: Iterable[tuple[Path, Path]], name: Callable[[Path], str]) -> dict[str, list[Path]]:
    """Files (path, place below its folder) by a name of their places."""
    groups = defaultdict(list)
    for path, place in found:
        groups[name(place)].append(path)
    return dict(groups)


def _only_one(images: list[Path], labels: list[Path]) -> Path:
    """The label of the images of one name; ValueError unless there is one of both."""
    if len(labels) > 1:
        raise ValueError(
            f"Two labels for one image: {labels[0]} and {labels[1]} for {images[0]}; keep one, or give both folders "
            "the same tree."
        )
    if len(images) > 1:
        raise ValueError(
            f"Two images for one label: {images[0]} and {images[1]} for {labels[0]}; keep one, or give both folders "
            "the same tree."
        )
    return labels[0]


# ---- reading -------------------------------------------------------------------------------------------------


def read_label(path: Path | str) -> np.ndarray:
    """Label ids of a picture of 1, 2, 4 or 8 bits, or of a MATLAB file under the key gt: (H, W) uint8."""
    if Path(path).suffix.lower() == ".mat":
        return read_mat(path, "gt")
    with open_image(path, "a label map") as file:
        if file.format == "JPEG":
            raise ValueError("it is a JPEG, which changes values; make the label map again, as PNG")
        if file.mode not in ("1", "L", "P"):
            advice = CONVERT["I;16" if file.mode.startswith(("I", "F")) else "RGB"]
            raise ValueError(
                f"it has mode {file.mode}; a label map has one value of 0..255 a pixel: {advice}"
            )
        factor = _stretch(file)
        return np.array(file).astype(np.uint8) // factor


def _stretch(picture: Any) -> int:
    """By how much Pillow multiplies the values of a grey picture of few bits, so that the largest is white."""
    packing = picture.tile[0][3] if picture.tile else ""
    return next((factor for name, factor in STRETCHED.items() if packing and name in packing), 1)


def read_pair(
    image_path: Path,
    label_path: Path | None,
    *,
    lookup: np.ndarray | None = None,
    side: int = SIDE,
    bands: tuple[int, ...] = (),
) -> tuple[Image.Image, np.ndarray | None]:
    """The central square of an image (side x side RGB) and of its label map: (side, side) uint8, or None.

    lookup: see LabelledSet; bands: see `read_picture`. Raises ValueError for two sizes or an unknown label id.
    """
    image = read_image(image_path, bands=bands)
    if label_path is None:
        return square(image, side), None
    ids = read_label(label_path)
    _check_size(ids, label_path, (image.height, image.width))
    if lookup is not None:
        _check_ids(_pixels_of_ids(ids), lookup, label_path)
        ids = lookup[ids].astype(np.uint8)
    label = ImageOps.fit(Image.fromarray(ids), (side, side), method=Image.Resampling.NEAREST)
    return square(image, side), np.asarray(label)


def _pixels_of_ids(ids: np.ndarray) -> np.ndarray:
    """Pixels of each label id in (H, W) uint8: (256,) int64."""
    return np.bincount(ids.ravel(), minlength=IDS)


def _check_size(ids: np.ndarray, path: Path, size: tuple[int, int]) -> None:
    """ValueError for label ids (H, W) of another size than their image's."""
    if ids.shape != size:
        raise ValueError(
            f"{path} is {ids.shape[1]} x {ids.shape[0]} pixels and its image {size[1]} x {size[0]}; "
            "they must have one size."
        )


def _check_ids(counts: np.ndarray, lookup: np.ndarray, path: Path) -> None:
    """ValueError for pixels, counts (256,) of each label id, of an id that the lookup does not know."""
    unknown = np.flatnonzero((counts > 0) & (lookup == UNKNOWN))
    if len(unknown):
        known = np.flatnonzero((lookup != UNKNOWN) & (lookup != IGNORE))
        ignored = np.flatnonzero(lookup == IGNORE)
        raise ValueError(
            f"{path} has the label {unknown[0]}; labels lie in {known[0]}..{known[-1]}, "
            f"or are {ignored[-1]} to be ignored. Check --names, or the kind of label file."
        )
