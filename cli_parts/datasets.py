"""Published datasets (App. A: Cityscapes-27, CocoStuff-27, Potsdam-3) and their layouts on disk."""

import os
from pathlib import Path
from typing import NamedTuple

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


def dataset_root(dataset: str, root) -> Path:
    return Path(root) if root else Path(os.environ.get("STEGO_DATA", "data")) / dataset
