"""Labelled sets, published or your own: which label belongs to which image, and how both are read."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cli_parts.datasets import by_name, dataset_root
from stego_parts.files import find_images
from stego_parts.images import IGNORE, open_image, read_image, read_mat, square

SIDE = 320  # pixels (Sec. 4); rounded up to whole patches: 322 for patches of 14
UNKNOWN = -1  # in a lookup: a label id that the set does not know

log = logging.getLogger("stego")


@dataclass
class LabelledSet:
    """Images with label maps, or without: then classes is empty and each label None.

    pairs: (image path, label path or None); classes: their names; lookup: (256,) int16, the class of each
    label id, IGNORE or UNKNOWN; source: which images these are, in words.
    """

    name: str
    classes: list[str]
    pairs: list[tuple]
    lookup: np.ndarray | None
    source: str

    @property
    def paths(self) -> list:
        """All files of the set."""
        return [path for pair in self.pairs for path in pair if path]

    def read(self, index: int, *, side: int = SIDE):
        return read_pair(*self.pairs[index], lookup=self.lookup, side=side)


def image_set(source) -> LabelledSet:
    """Images without labels: a file, folder or pattern."""
    pairs = [(path, None) for path, _ in find_images(source)]
    return LabelledSet(str(source), [], pairs, None, f"all of {source}, without labels")


def _lookup(classes) -> np.ndarray:
    """classes[i] is the class of id i; 255 is ignored, all others are unknown."""
    lookup = np.full(256, UNKNOWN, np.int16)
    lookup[: len(classes)] = classes
    lookup[IGNORE] = IGNORE
    return lookup


def labelled_set(name: str, root: str | os.PathLike, split: str) -> LabelledSet:
    """A published dataset under root; split "train" or "val" (Potsdam: its test list).

    Raises ValueError for an unknown name, FileNotFoundError with the first missing path and the expected tree.
    """
    dataset = by_name(name)
    files = dataset.find(Path(root), split)
    for path in [*files.needed, *(path for pair in files.pairs for path in pair)]:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing. {name} under {root} should look like\n{dataset.layout}"
            )
    lookup = _lookup([IGNORE if number is None else number for number in dataset.class_of_id])
    return LabelledSet(name, list(dataset.classes), files.pairs, lookup, files.source)


def folder_set(images, labels, *, names=None) -> LabelledSet:
    """Your own images and labels: two folders, paired by file stem.

    names: a text file, one class a line in the order of the label values; without it the labels are searched
    for their largest value. 255 is ignored.
    """
    pairs = folder_pairs(images, labels)
    if names is not None:
        classes = [line.strip() for line in Path(names).read_text().splitlines() if line.strip()]
    else:
        labelled = (read_label(label) for _, label in pairs)
        largest = max(ids[ids != IGNORE].astype(int).max(initial=-1) for ids in labelled)
        classes = [f"class {i}" for i in range(largest + 1)]
    if not 1 <= len(classes) <= IGNORE:
        raise ValueError(f"Got {len(classes)} classes in {names or labels}; there must be 1 to {IGNORE}.")
    return LabelledSet(str(images), classes, pairs, _lookup(range(len(classes))), f"all of {images}")


def folder_pairs(images, labels) -> list[tuple[Path, Path]]:
    """Images and label maps of two folders, paired by file stem, in the order of the images.

    Raises ValueError naming the first image without a label, or two labels of one stem.
    """
    by_stem = {}
    for path, _ in find_images(labels):
        if path.stem in by_stem:
            raise ValueError(f"Two labels for one image: {by_stem[path.stem]} and {path}; keep one.")
        by_stem[path.stem] = path
    pairs = [(path, by_stem.get(path.stem)) for path, _ in find_images(images)]
    if missing := [path for path, label in pairs if label is None]:
        raise ValueError(
            f"{len(missing)} of {len(pairs)} images have no label of the same stem in {labels}: "
            f"the first is {missing[0]}."
        )
    return pairs


def sets_to_score(dataset, root, images, labels, names, train_images, train_labels):
    """The set to score on, published or of one's own, and the train split or None."""
    if bool(dataset) == bool(images):
        raise ValueError("Give a --dataset, or your own --images and --labels.")
    if dataset and (labels or names or train_images or train_labels):
        raise ValueError("A --dataset brings its own labels, names and train images; leave them out.")
    if bool(images) != bool(labels) or (train_labels and not train_images):
        raise ValueError("Images and labels belong together: give both folders.")
    if dataset:
        root = dataset_root(dataset, root)
        return labelled_set(dataset, root, "val"), train_split(dataset, root)
    labelled = folder_set(images, labels, names=names)
    if not train_labels:
        return labelled, image_set(train_images) if train_images else None
    train = folder_set(train_images, train_labels, names=names)
    larger = max(labelled, train, key=lambda each: len(each.classes))  # a class may occur in one only
    for each in (labelled, train):
        each.classes, each.lookup = larger.classes, larger.lookup
    return labelled, train


def train_split(dataset, root):
    """The train split, for the linear probe and the baseline; None, with a warning, where only val is there."""
    try:
        return labelled_set(dataset, root, "train")
    except FileNotFoundError as error:
        log.warning("No linear probe, and the baseline's clusters not from the train split: %s", error)
        return None


def read_label(path) -> np.ndarray:
    """Label ids of a picture of mode L or P, or of a MATLAB file under the key gt: (H, W) uint8."""
    if Path(path).suffix.lower() == ".mat":
        return read_mat(path, "gt")
    with open_image(path, "a label map") as file:
        if file.mode not in ("L", "P"):
            raise ValueError(f"it has mode {file.mode}; a label map has one 8-bit value a pixel")
        return np.array(file)


def read_pair(
    image_path, label_path, *, lookup=None, side: int = SIDE
) -> tuple[Image.Image, np.ndarray | None]:
    """The central square of an image (side x side RGB) and of its label map: (side, side) uint8, or None.

    lookup: see LabelledSet. Raises ValueError for two sizes or an unknown id.
    """
    image = read_image(image_path)
    if label_path is None:
        return square(image, side), None
    ids = read_label(label_path)
    if ids.shape != image.size[::-1]:
        raise ValueError(
            f"{label_path} is {ids.shape[1]} x {ids.shape[0]} pixels and its image {image.width} x "
            f"{image.height}; they must have one size."
        )
    if lookup is not None:
        unknown = np.flatnonzero((np.bincount(ids.ravel(), minlength=256) > 0) & (lookup == UNKNOWN))
        if len(unknown):
            known = np.flatnonzero(lookup != UNKNOWN)[:-1]
            raise ValueError(
                f"{label_path} has the label {unknown[0]}; labels lie in {known[0]}..{known[-1]}, "
                f"or are {IGNORE} to be ignored. Check --names, or the kind of label file."
            )
        ids = lookup[ids].astype(np.uint8)
    label = ImageOps.fit(Image.fromarray(ids), (side, side), method=Image.Resampling.NEAREST)
    return square(image, side), np.asarray(label)
