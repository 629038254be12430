"""Labelled sets (App. A: Cityscapes-27, CocoStuff-27, Potsdam-3; your own) and their layouts on disk."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from stego_parts.files import find_images
from stego_parts.images import IGNORE, open_image, read_image, read_mat, square

log = logging.getLogger("stego")

SIDE = 320  # pixels (Sec. 4); rounded up to whole patches: 322 for patches of 14
UNKNOWN = -1  # in a lookup: a label id that the set does not know
CLASSES = {
    "cityscapes": """road,sidewalk,parking,rail track,building,wall,fence,guard rail,bridge,tunnel,pole,
polegroup,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,bus,caravan,
trailer,train,motorcycle,bicycle""",
    "cocostuff27": """electronic,appliance,food,furniture,indoor,kitchen,accessory,animal,outdoor,person,
sports,vehicle,ceiling,floor,food-stuff,furniture-stuff,rawmaterial,textile,wall,window,building,
ground,plant,sky,solid,structural,water""",
    "potsdam3": "roads and cars,buildings and clutter,trees and vegetation",
}
# the coarse class of CocoStuff's fine ids 0..181
COARSE_IDS = """
9 11 11 11 11 11 11 11 11 8 8 8 8 8 8 7 7 7 7 7 7 7 7 7 7 6 6 6 6 6 6 6 6 10 10 10 10 10 10 10 10 10 10 5 5 5
5 5 5 5 5 2 2 2 2 2 2 2 2 2 2 3 3 3 3 3 3 3 3 3 3 0 0 0 0 0 0 1 1 1 1 1 1 4 4 4 4 4 4 4 4 17 17 22 20 20 22
15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14 14 15 22 21 21 24 20 22 15 17 16 15
22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20 17 14 21 26 15 23 20 21 24 15 24 22 25 15 20 17 17 22
14 18 18 18 18 18 18 18 26 26 19 19 24"""
LAYOUTS = {
    "cityscapes": """leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
gtFine/{train,val}/CITY/*_gtFine_labelIds.png""",
    "cocostuff27": """images/{train,val}2017/*.jpg
annotations/{train,val}2017/*.png                 (ids 0..181, 255 = void)
curated/train2017/Coco164kFull_Stuff_Coarse.txt   (optional)
curated/val2017/Coco164kFull_Stuff_Coarse_7.txt   (optional)""",
    "potsdam3": """imgs/ID.mat   (key img)
gt/ID.mat     (key gt)
labelled_train.txt, labelled_test.txt   (one ID a line)""",
}


class Published(NamedTuple):
    """A published result in percent; preset: of the `fit` that repeats it, or ""."""

    name: str
    preset: str
    backbone: str
    accuracy: float
    miou: float
    linear_accuracy: float | None = None
    linear_miou: float | None = None


POTSDAM_ROW = "STEGO, DINO ViT-S/8 (mIoU and probe: released model)"
# STEGO's Tables 1 to 4 and App. A; k-means on DINOv2 features: later work.
PUBLISHED = {
    "cityscapes": [
        Published("STEGO, DINO ViT-B/8", "cityscapes", "dino_vitb8", 73.2, 21.0),
        Published("k-means, DINOv2 ViT-S/14", "", "dinov2_vits14", 49.5, 15.3),
    ],
    "cocostuff27": [
        Published("DINO alone", "", "dino_vits8", 30.5, 9.6, 66.8, 29.4),
        Published("STEGO, DINO ViT-S/8", "cocostuff-small", "dino_vits8_300ep", 48.3, 24.5, 74.4, 38.3),
        Published("STEGO, DINO ViT-B/8", "cocostuff", "dino_vitb8", 56.9, 28.2, 76.1, 41.0),
        Published("STEGO, MoCoV2", "", "mocov2", 48.4, 20.8, 70.7, 26.5),
        Published("k-means, DINOv2 ViT-S/14", "", "dinov2_vits14", 44.5, 22.9),
    ],
    "potsdam3": [
        # 77.0 is Table 4's, the other three are the released checkpoint's
        Published(POTSDAM_ROW, "potsdam", "dino_vits8_300ep", 77.0, 62.6, 85.8, 74.8),
        Published("k-means, DINOv2 ViT-S/14", "", "dinov2_vits14", 75.9, 61.0),
    ],
}
PRESET_OF = {"cityscapes": "cityscapes", "cocostuff27": "cocostuff", "potsdam3": "potsdam"}


def published_line(dataset: str, *, preset: str, backbone: str) -> str:
    """What a fit on a dataset with this preset and backbone repeats: the line that `fit --dataset` says."""
    repeated = [row for row in PUBLISHED[dataset] if row.preset]
    pairs = " or ".join(f"{row.backbone} with {row.preset}" for row in repeated)
    result = f"no published row of {dataset}, which took {pairs}"
    for row in repeated:
        if (row.preset, row.backbone) == (preset, backbone):
            result = f"the published row {row.name!r}, accuracy {row.accuracy}, mIoU {row.miou}"
    return f"Backbone {backbone}, preset {preset}: {result}."


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


def _lookup(classes, first: int = 0) -> np.ndarray:
    """classes[i] is the class of id first + i; ids before them and 255 are ignored, all others unknown."""
    lookup = np.full(256, UNKNOWN, np.int16)
    lookup[:first] = IGNORE
    lookup[first : first + len(classes)] = classes
    lookup[IGNORE] = IGNORE
    return lookup


def labelled_set(name: str, root: str | os.PathLike, split: str) -> LabelledSet:
    """A published dataset under root; split "train" or "val" (Potsdam: its test list).

    Raises ValueError for an unknown name, FileNotFoundError with the first missing path and the expected tree.
    """
    finders = {"cityscapes": _cityscapes, "cocostuff27": _cocostuff, "potsdam3": _potsdam}
    if name not in finders:
        raise ValueError(
            f"Unknown dataset {name!r}; choose one of {', '.join(finders)}, or give --images and --labels."
        )
    needed, pairs, source = finders[name](Path(root), split)
    for path in [*needed, *(path for pair in pairs for path in pair)]:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing. {name} under {root} should look like\n{LAYOUTS[name]}"
            )
    lookups = {
        "cityscapes": _lookup(range(27), first=7),
        "cocostuff27": _lookup(list(map(int, COARSE_IDS.split()))),
        "potsdam3": _lookup([0, 1, 2, 2, 0, 1]),
    }
    classes = [each.strip() for each in CLASSES[name].split(",")]
    return LabelledSet(name, classes, pairs, lookups[name], source)


def _cityscapes(root: Path, split: str) -> tuple[list, list, str]:
    """Paths that must be there, pairs (image path, label path), and which images these are, as the others."""
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    paths = sorted(images.glob("*/*_leftImg8bit.png"))
    names = [path.name.replace("leftImg8bit", "gtFine_labelIds") for path in paths]
    pairs = [(path, labels / path.parent.name / name) for path, name in zip(paths, names)]
    return [images, labels], pairs, f"all of {split}"


def _cocostuff(root: Path, split: str) -> tuple[list, list, str]:
    images, labels = root / f"images/{split}2017", root / f"annotations/{split}2017"
    curated = root / f"curated/{split}2017/Coco164kFull_Stuff_Coarse{'_7' if split == 'val' else ''}.txt"
    if curated.exists():
        stems, source = curated.read_text().split(), f"the curated list {curated.name}"
    else:
        stems = sorted(path.stem for path in images.glob("*.jpg"))
        source = f"all of {split}2017: no curated list, so not comparable with the published figures"
    return [images, labels], [(images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems], source


def _potsdam(root: Path, split: str) -> tuple[list, list, str]:
    listed = root / f"labelled_{'test' if split == 'val' else split}.txt"
    stems = listed.read_text().split() if listed.exists() else []
    return [listed], [(root / f"imgs/{stem}.mat", root / f"gt/{stem}.mat") for stem in stems], listed.name


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


def dataset_root(dataset: str, root) -> Path:
    return Path(root) if root else Path(os.environ.get("STEGO_DATA", "data")) / dataset


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
