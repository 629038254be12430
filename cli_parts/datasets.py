"""The published datasets (App. A: Cityscapes-27, CocoStuff-27, Potsdam-3): one record each.

Nothing heavy is imported here: the help texts name the datasets.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Published(NamedTuple):
    """A published result in percent; preset: of the `fit` that repeats it, or ""."""

    name: str
    preset: str
    backbone: str
    accuracy: float
    miou: float
    linear_accuracy: float | None = None
    linear_miou: float | None = None


class Files(NamedTuple):
    """The files of a split: paths that must be there, (image, label) pairs, and which images these are, in words."""

    needed: list[Path]
    pairs: list[tuple[Path, Path]]
    source: str


class Dataset(NamedTuple):
    """A published dataset.

    classes: names in the order of their numbers; class_of_id: the class of each label id from 0, None: ignored, as
    255 is; find: (root, split) -> its files; layout: the expected tree, for people; published: rows that `eval`
    shows beside its own; preset: of `fit --dataset`.
    """

    name: str
    classes: tuple[str, ...]
    class_of_id: tuple[int | None, ...]
    find: Callable[[Path, str], Files]
    layout: str
    published: tuple[Published, ...]
    preset: str


def by_name(name: str) -> Dataset:
    """A published dataset; ValueError for an unknown name."""
    if name not in DATASETS:
        raise ValueError(
            f"Unknown dataset {name!r}; choose one of {', '.join(DATASETS)}, or give --images and --labels."
        )
    return DATASETS[name]


def dataset_root(name: str, root: str | os.PathLike | None) -> Path:
    """The folder of a dataset: root, or the place where it is looked for if none is given."""
    return Path(root) if root else Path(os.environ.get("STEGO_DATA", "data")) / name


def published_line(dataset: Dataset, *, preset: str, backbone: str) -> str:
    """What a fit on a dataset with this preset and backbone repeats: the line that `fit --dataset` says."""
    repeated = [row for row in dataset.published if row.preset]
    pairs = " or ".join(f"{row.backbone} with {row.preset}" for row in repeated)
    result = f"no published row of {dataset.name}, which took {pairs}"
    for row in repeated:
        if (row.preset, row.backbone) == (preset, backbone):
            result = f"the published row {row.name!r}, accuracy {row.accuracy}, mIoU {row.miou}"
    return f"Backbone {backbone}, preset {preset}: {result}."


# ---- Cityscapes --------------------------------------------------------------------------------------------


def _find_cityscapes(root: Path, split: str) -> Files:
    images = root / "leftImg8bit" / split
    labels = root / "gtFine" / split
    pairs = []
    for image in sorted(images.glob("*/*_leftImg8bit.png")):
        name = image.name.replace("leftImg8bit", "gtFine_labelIds")
        pairs.append((image, labels / image.parent.name / name))
    return Files([images, labels], pairs, f"all of {split}")


CITYSCAPES = Dataset(
    name="cityscapes",
    classes=(
        *("road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge"),
        *("tunnel", "pole", "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky"),
        *("person", "rider", "car", "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle"),
    ),
    class_of_id=(*[None] * 7, *range(27)),
    find=_find_cityscapes,
    layout="""leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
gtFine/{train,val}/CITY/*_gtFine_labelIds.png""",
    published=(
        Published("STEGO, DINO ViT-B/8", "cityscapes", "dino_vitb8", 73.2, 21.0),
        Published("k-means, DINOv2 ViT-S/14", "", "dinov2_vits14", 49.5, 15.3),  # later work
    ),
    preset="cityscapes",
)


# ---- CocoStuff ---------------------------------------------------------------------------------------------


def _find_cocostuff(root: Path, split: str) -> Files:
    images = root / f"images/{split}2017"
    labels = root / f"annotations/{split}2017"
    suffix = "_7" if split == "val" else ""
    curated = root / f"curated/{split}2017/Coco164kFull_Stuff_Coarse{suffix}.txt"
    if curated.exists():
        stems = curated.read_text().split()
        source = f"the curated list {curated.name}"
    else:
        stems = sorted(path.stem for path in images.glob("*.jpg"))
        source = f"all of {split}2017: no curated list, so not comparable with the published figures"
    pairs = [(images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]
    return Files([images, labels], pairs, source)


# the coarse class of CocoStuff's fine ids 0..181
COARSE_IDS = """
9 11 11 11 11 11 11 11 11 8 8 8 8 8 8 7 7 7 7 7 7 7 7 7 7 6 6 6 6 6 6 6 6 10 10 10 10 10 10 10 10 10 10 5 5 5
5 5 5 5 5 2 2 2 2 2 2 2 2 2 2 3 3 3 3 3 3 3 3 3 3 0 0 0 0 0 0 1 1 1 1 1 1 4 4 4 4 4 4 4 4 17 17 22 20 20 22
15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14 14 15 22 21 21 24 20 22 15 17 16 15
22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20 17 14 21 26 15 23 20 21 24 15 24 22 25 15 20 17 17 22
14 18 18 18 18 18 18 18 26 26 19 19 24"""
COCOSTUFF = Dataset(
    name="cocostuff27",
    classes=(
        *(
            "electronic",
            "appliance",
            "food",
            "furniture",
            "indoor",
            "kitchen",
            "accessory",
            "animal",
            "outdoor",
        ),
        *("person", "sports", "vehicle", "ceiling", "floor", "food-stuff", "furniture-stuff", "rawmaterial"),
        *("textile", "wall", "window", "building", "ground", "plant", "sky", "solid", "structural", "water"),
    ),
    class_of_id=tuple(map(int, COARSE_IDS.split())),
    find=_find_cocostuff,
    layout="""images/{train,val}2017/*.jpg
annotations/{train,val}2017/*.png                 (ids 0..181, 255 = void)
curated/train2017/Coco164kFull_Stuff_Coarse.txt   (optional)
curated/val2017/Coco164kFull_Stuff_Coarse_7.txt   (optional)""",
    published=(
        Published("DINO alone", "", "dino_vits8", 30.5, 9.6, 66.8, 29.4),
        Published("STEGO, DINO ViT-S/8", "cocostuff-small", "dino_vits8_300ep", 48.3, 24.5, 74.4, 38.3),
        Published("STEGO, DINO ViT-B/8", "cocostuff", "dino_vitb8", 56.9, 28.2, 76.1, 41.0),
        Published("STEGO, MoCoV2", "", "mocov2", 48.4, 20.8, 70.7, 26.5),
        Published("k-means, DINOv2 ViT-S/14", "", "dinov2_vits14", 44.5, 22.9),  # later work
    ),
    preset="cocostuff",
)


# ---- Potsdam -----------------------------------------------------------------------------------------------


def _find_potsdam(root: Path, split: str) -> Files:
    listed = root / ("labelled_test.txt" if split == "val" else f"labelled_{split}.txt")
    stems = listed.read_text().split() if listed.exists() else []
    pairs = [(root / f"imgs/{stem}.mat", root / f"gt/{stem}.mat") for stem in stems]
    return Files([listed], pairs, listed.name)


POTSDAM_ROW = "STEGO, DINO ViT-S/8 (mIoU and probe: released model)"
POTSDAM = Dataset(
    name="potsdam3",
    classes=("roads and cars", "buildings and clutter", "trees and vegetation"),
    class_of_id=(0, 1, 2, 2, 0, 1),
    find=_find_potsdam,
    layout="""imgs/ID.mat   (key img)
gt/ID.mat     (key gt)
labelled_train.txt, labelled_test.txt   (one ID a line)""",
    published=(
        # 77.0 is Table 4's, the other three are the released checkpoint's
        Published(POTSDAM_ROW, "potsdam", "dino_vits8_300ep", 77.0, 62.6, 85.8, 74.8),
        Published("k-means, DINOv2 ViT-S/14", "", "dinov2_vits14", 75.9, 61.0),  # later work
    ),
    preset="potsdam",
)

DATASETS = {each.name: each for each in (CITYSCAPES, COCOSTUFF, POTSDAM)}
