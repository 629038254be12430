"""The published evaluation protocol (STEGO Sec. 4 and App. A): what makes a number comparable.

Images and labels are resized to 320 on the shorter side and cropped to the central 320 x 320; codes are averaged with
those of the mirror image and upsampled; cluster probe and linear probe, each with and without a CRF; one confusion
matrix over the whole set, Hungarian matching, mIoU. In order: labelled sets, metrics, probes, the evaluation,
diagnostics (Sec. 3.1, App. A.6), correspondences of points (Fig. 2), the report.
"""

import itertools
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.datasets import Cityscapes

from crf import COMPAT, SMOOTH_COMPAT, SMOOTH_SXY, SRGB, SXY, dense_crf
from kmeans import CosineKMeans
from stego import (BILINEAR, CLUSTER_STARTS, ahead, along, backbone_size, class_scores, correspondence,
                   dense_features, nearest_neighbors, pixels, unit, unmirror)
from stego_images import (IGNORE, find_images, line_chart, mark, mask_image, matrix_picture, opened, read_image,
                          read_mat, replacing, spotlight, square, strips, to_tensor, voc_palette, write_image)

log = logging.getLogger("stego")

SIDE = 320               # pixels (Sec. 4); rounded up to whole patches: 322 for patches of 14
PROBE_IMAGES = 2000      # train images that the probes are fitted on, drawn at random from larger sets
PROBE_ROWS = 400_000     # positions of them
PROBE_RATE = 5e-3        # Adam, linear probe (App. A.11)
PROBE_BATCH = 4096       # positions a step
ROUND = 50               # steps after which the loss of a linear probe is looked at
CONVERGED = 1e-3         # nats: a fall of the loss over a round below which it stands still
PATIENCE, ROUNDS = 3, 200  # rounds without a fall that end the training; the greatest number of rounds
DIAGNOSTIC_POINTS = 121  # positions an image whose pairs are looked at, as many as enter a training step
CURVE_POINTS = 200       # points of a precision-recall curve that are kept
SHOWN, CANDIDATES = 4, 300  # other images that a sheet of correspondences shows, and among how many it looks for them
LIT_HEIGHT = 200         # pixels: height of its pictures
POINT_COLOURS = ((255, 40, 40), (40, 210, 40), (70, 110, 255), (255, 190, 0), (230, 60, 230), (0, 200, 220))
UNKNOWN = -1             # in a lookup: a label id that the set does not know


# ---- labelled sets (App. A: Cityscapes-27, CocoStuff-27, Potsdam-3; your own) -----------------------------------

@dataclass
class LabelledSet:
    """Images with label maps.

    pairs: (image path, label path); classes: their names; lookup: (256,) int16, the class of each label id, IGNORE
    or UNKNOWN; source: which images these are, in words.
    """
    name: str
    classes: list
    pairs: list
    lookup: np.ndarray
    source: str

    def read(self, index: int, *, side: int = SIDE):
        return read_pair(*self.pairs[index], lookup=self.lookup, side=side)


CITYSCAPES = """road,sidewalk,parking,rail track,building,wall,fence,guard rail,bridge,tunnel,pole,polegroup,
traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,bus,caravan,trailer,train,motorcycle,bicycle"""
COCOSTUFF = """electronic,appliance,food,furniture,indoor,kitchen,accessory,animal,outdoor,person,sports,vehicle,
ceiling,floor,food-stuff,furniture-stuff,rawmaterial,textile,wall,window,building,ground,plant,sky,solid,structural,
water"""
POTSDAM = "roads and cars,buildings and clutter,trees and vegetation"
COARSE = [  # CocoStuff: the coarse class of fine ids 0..181
    9, 11, 11, 11, 11, 11, 11, 11, 11, 8, 8, 8, 8, 8, 8, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 6, 6, 6, 6, 6, 6, 6, 6,
    10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3,
    3, 3, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4, 4, 17, 17, 22, 20, 20, 22, 15,
    25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13, 13, 13, 13, 13, 22, 26, 14, 14, 15, 22, 21,
    21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17, 25, 16, 21, 17, 22, 16, 21, 21, 25, 21, 26, 21, 24, 20, 17,
    14, 21, 26, 15, 23, 20, 21, 24, 15, 24, 22, 25, 15, 20, 17, 17, 22, 14, 18, 18, 18, 18, 18, 18, 18, 26, 26,
    19, 19, 24,
]
LAYOUTS = {
    "cityscapes": """leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
gtFine/{train,val}/CITY/*_gtFine_labelIds.png""",
    "cocostuff27": """images/{train,val}2017/*.jpg
annotations/{train,val}2017/*.png                                  (ids 0..181, 255 = void)
curated/train2017/Coco164kFull_Stuff_Coarse.txt, curated/val2017/Coco164kFull_Stuff_Coarse_7.txt   (optional)""",
    "potsdam3": """imgs/ID.mat   (key img)
gt/ID.mat     (key gt)
labelled_train.txt, labelled_test.txt   (one ID a line)""",
}
# Accuracy and mIoU in percent, unsupervised and linear probe (Tables 1 to 4 and App. A; DINOv2: later work).
PUBLISHED = {
    "cityscapes": [("STEGO, DINO ViT-B/8", 73.2, 21.0, None, None),
                   ("k-means, DINOv2 ViT-S/14", 49.5, 15.3, None, None)],
    "cocostuff27": [("DINO alone", 30.5, 9.6, 66.8, 29.4), ("STEGO, DINO ViT-S/8", 48.3, 24.5, 74.4, 38.3),
                    ("STEGO, DINO ViT-B/8", 56.9, 28.2, 76.1, 41.0), ("STEGO, MoCoV2", 43.1, 19.6, 65.9, 26.0),
                    ("k-means, DINOv2 ViT-S/14", 44.5, 22.9, None, None)],
    "potsdam3": [("STEGO, DINO ViT-S/8", 77.0, 62.6, 85.8, 74.8),
                 ("k-means, DINOv2 ViT-S/14", 75.9, 61.0, None, None)],
}
PRESET_OF = {"cityscapes": "cityscapes", "cocostuff27": "cocostuff", "potsdam3": "potsdam"}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _lookup(classes, first: int = 0) -> np.ndarray:
    """classes[i] is the class of id first + i; ids before them and 255 are ignored, all others unknown."""
    lookup = np.full(256, UNKNOWN, np.int16)
    lookup[:first] = IGNORE
    lookup[first:first + len(classes)] = classes
    lookup[IGNORE] = IGNORE
    return lookup


def labelled_set(name: str, root, split: str) -> LabelledSet:
    """A published dataset under root; split "train" or "val" (Potsdam: its test list).

    Raises ValueError for an unknown name, FileNotFoundError naming the first missing path and the expected tree.
    """
    makers = {"cityscapes": _cityscapes, "cocostuff27": _cocostuff, "potsdam3": _potsdam}
    if name not in makers:
        raise ValueError(f"Unknown dataset {name!r}; choose one of {', '.join(makers)}, or give --images and --labels.")
    found = makers[name](Path(root), split)
    for path in [path for pair in found.pairs for path in pair]:
        _need(path, name, root)
    return found


def _need(path: Path, name: str, root):
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. {name} under {root} should look like\n{LAYOUTS[name]}")


def _cityscapes(root: Path, split: str) -> LabelledSet:
    for folder in ("leftImg8bit", "gtFine"):
        _need(root / folder / split, "cityscapes", root)
    found = Cityscapes(str(root), split=split, mode="fine", target_type="semantic")
    pairs = sorted((Path(image), Path(label[0])) for image, label in zip(found.images, found.targets))
    return LabelledSet("cityscapes", _names(CITYSCAPES), pairs, _lookup(range(27), first=7), f"all of {split}")


def _cocostuff(root: Path, split: str) -> LabelledSet:
    images, labels = root / f"images/{split}2017", root / f"annotations/{split}2017"
    _need(images, "cocostuff27", root)
    _need(labels, "cocostuff27", root)
    curated = root / f"curated/{split}2017/Coco164kFull_Stuff_Coarse{'_7' if split == 'val' else ''}.txt"
    if curated.exists():
        stems, source = curated.read_text().split(), f"the curated list {curated.name}"
    else:
        stems = sorted(path.stem for path in images.glob("*.jpg"))
        source = f"all of {split}2017: no curated list, so not comparable with the published figures"
    pairs = [(images / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems]
    return LabelledSet("cocostuff27", _names(COCOSTUFF), pairs, _lookup(COARSE), source)


def _potsdam(root: Path, split: str) -> LabelledSet:
    listed = root / f"labelled_{'test' if split == 'val' else split}.txt"
    _need(listed, "potsdam3", root)
    pairs = [(root / f"imgs/{stem}.mat", root / f"gt/{stem}.mat") for stem in listed.read_text().split()]
    return LabelledSet("potsdam3", _names(POTSDAM), pairs, _lookup([0, 1, 2, 2, 0, 1]), listed.name)


def folder_set(images, labels, *, names=None) -> LabelledSet:
    """Your own images and labels: two folders, paired by file stem.

    names: a text file, one class a line in the order of the label values; without it the labels are looked through
    for their largest value. 255 is ignored.
    """
    pairs = folder_pairs(images, labels)
    if names is not None:
        classes = [line.strip() for line in Path(names).read_text().splitlines() if line.strip()]
    else:
        largest = max(_largest(read_label(label)) for _, label in pairs)
        classes = [f"class {i}" for i in range(largest + 1)]
    if not 1 <= len(classes) <= IGNORE:
        raise ValueError(f"Got {len(classes)} classes in {names or labels}; there must be 1 to {IGNORE}.")
    return LabelledSet(str(images), classes, pairs, _lookup(range(len(classes))), f"all of {images}")


def _largest(label: np.ndarray) -> int:
    known = label[label != IGNORE]
    return int(known.max()) if known.size else -1


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
    missing = [path for path, label in pairs if label is None]
    if missing:
        raise ValueError(f"{len(missing)} of {len(pairs)} images have no label of the same stem in {labels}: "
                         f"the first is {missing[0]}.")
    return pairs


def read_label(path) -> np.ndarray:
    """Label ids of a picture of mode L or P, or of a MATLAB file under the key gt: (H, W) uint8."""
    if Path(path).suffix.lower() == ".mat":
        return read_mat(path, "gt")
    with opened(path, "a label map") as file:
        if file.mode not in ("L", "P"):
            raise ValueError(f"it has mode {file.mode}; a label map has one 8-bit value a pixel")
        return np.array(file)


def read_pair(image_path, label_path, *, lookup=None, side: int = SIDE) -> tuple[Image.Image, np.ndarray]:
    """The central square of an image (side x side RGB) and of its label map (side, side) uint8, nearest neighbour.

    lookup: (256,) the class of each label id, see LabelledSet. Raises ValueError for two sizes or an unknown id.
    """
    image, ids = read_image(image_path), read_label(label_path)
    if ids.shape != image.size[::-1]:
        raise ValueError(f"{label_path} is {ids.shape[1]} x {ids.shape[0]} pixels and its image {image.width} x "
                         f"{image.height}; they must have one size.")
    if lookup is not None:
        unknown = [i for i in np.flatnonzero(np.bincount(ids.ravel(), minlength=256)) if lookup[i] == UNKNOWN]
        if unknown:
            known = np.flatnonzero(lookup != UNKNOWN)[:-1]
            raise ValueError(f"{label_path} holds the label {unknown[0]}; labels lie in {known[0]}..{known[-1]}, "
                             f"or are {IGNORE} to be ignored. Check --names, or the kind of label file.")
        ids = lookup[ids].astype(np.uint8)
    label = ImageOps.fit(Image.fromarray(ids), (side, side), method=Image.Resampling.NEAREST)
    return square(image, side), np.asarray(label)


# ---- metrics ---------------------------------------------------------------------------------------------------

def confusion_matrix(labels, clusters, *, n_classes: int, n_clusters: int) -> np.ndarray:
    """Pixel counts (n_classes, n_clusters) int64; rows are labels, columns clusters; label 255 is left out.

    labels, clusters: integer arrays of one shape. Raises ValueError on values outside the ranges.
    """
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    if labels.shape != clusters.shape:
        raise ValueError(f"Labels are {labels.shape} and clusters {clusters.shape}; they must have one shape.")
    known = labels != IGNORE
    labels, clusters = labels[known].astype(np.int64), clusters[known].astype(np.int64)
    for name, values, size in (("label", labels, n_classes), ("cluster", clusters, n_clusters)):
        if values.size and (values.min() < 0 or values.max() >= size):
            raise ValueError(f"Got {name} values {values.min()}..{values.max()}; "
                             f"they must lie in 0..{size - 1} (or be {IGNORE} to be ignored).")
    flat = np.bincount(labels * n_clusters + clusters, minlength=n_classes * n_clusters)
    return flat.reshape(n_classes, n_clusters)


def match_clusters(confusion) -> np.ndarray:
    """Hungarian matching on pixel counts over the whole set (Sec. 4.1).

    confusion: (n_classes, K) counts. Returns (K,) int64: the class of each cluster, -1 for a cluster left over.
    """
    confusion = np.asarray(confusion)
    classes, clusters = linear_sum_assignment(confusion, maximize=True)
    assignment = np.full(confusion.shape[1], -1, dtype=np.int64)
    assignment[clusters] = classes
    return assignment


def scores(confusion, assignment) -> dict:
    """Accuracy, mIoU and IoU of each class once clusters are named.

    confusion: (n_classes, K) counts; assignment: (K,) class of each cluster or -1. Pixels of a cluster without a
    class count as errors (the reference drops them, which flatters). A class that occurs neither in the labels nor
    in the predictions has IoU NaN and is left out of the mean. Returns accuracy, miou (fractions), iou (n_classes,).
    """
    confusion, assignment = np.asarray(confusion), np.asarray(assignment)
    n_classes = confusion.shape[0]
    named = np.zeros((n_classes, n_classes + 1), dtype=np.int64)             # last column: clusters without a class
    np.add.at(named.T, assignment, confusion.T)                              # -1 lands in the last column
    hit = named.diagonal()
    union = named.sum(1) + named[:, :n_classes].sum(0) - hit
    iou = np.where(union > 0, hit / np.maximum(union, 1), np.nan)
    total = named.sum()
    return {"accuracy": float(hit.sum() / total) if total else float("nan"),
            "miou": float(np.nanmean(iou)) if (union > 0).any() else float("nan"), "iou": iou}


# ---- probes (Sec. 4.1) ------------------------------------------------------------------------------------------

class Probe(NamedTuple):
    """A linear map from features to K scores: weight (K, D), and bias (K,) or None for cluster centres."""
    weight: Tensor
    bias: Tensor | None = None


def cluster_map(codes: Tensor, centers: Tensor, size: tuple[int, int], *, bias: Tensor | None = None,
                pixels: Tensor | None = None) -> np.ndarray:
    """Cluster of each pixel from codes (1, D, h, w), upsampled to size (H, W), and unit centres (K, D): (H, W) uint8.

    bias: (K,) for a linear probe, whose weights then stand for the centres. pixels: the image (3, H, W) uint8 if a CRF
    is to sharpen the result. Without one, scores are upsampled in place of codes: the largest stays the largest.
    """
    if pixels is not None and bias is None:
        scores = class_scores(codes[0], centers, size)                       # (K, H, W)
    else:
        scores = along(codes, centers) + (0 if bias is None else bias[:, None, None])
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)[0]  # (K, H, W)
    if pixels is not None:
        scores = dense_crf(pixels, scores)
    return scores.max(0).indices.byte().cpu().numpy()                        # ten times faster than argmax(0)


def class_shares(label: np.ndarray, classes: int, patch: int) -> Tensor:
    """Share of each class in the pixels of each patch: label (H, W) -> (H / patch * W / patch, classes) float32."""
    known = torch.from_numpy(label.astype(np.int64))
    shares = F.one_hot(known.clamp(max=classes), classes + 1)[..., :classes].float()  # (H, W, n); ignored: zero
    return F.avg_pool2d(shares.permute(2, 0, 1), patch).flatten(1).T         # (h * w, n)


def linear_probe(rows: Tensor, shares: Tensor, *, seed: int = 0) -> Probe:
    """Softmax regression from features (N, D) to shares of classes (N, n) by Adam, until the loss stands still.

    The cross entropy is that of the labelled pixels of each position. Features are standardised on the way, which
    changes the path and not the goal. When it stands still: CONVERGED, PATIENCE, ROUNDS.
    """
    rows, shares = rows[shares.sum(1) > 0], shares[shares.sum(1) > 0]
    if not len(rows):
        raise ValueError("Not one labelled pixel in the train images; the linear probe needs labels.")
    mean, deviation = rows.float().mean(0), rows.float().std(0, correction=0) + 1e-6
    layer = torch.nn.Linear(rows.shape[1], shares.shape[1]).to(rows.device)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimizer, generator = torch.optim.Adam(layer.parameters(), lr=PROBE_RATE), torch.Generator().manual_seed(seed)
    best, still = math.inf, 0
    for _ in range(ROUNDS):
        total = 0.0
        for part in torch.randint(len(rows), (ROUND, min(PROBE_BATCH, len(rows))), generator=generator):
            logits = layer((rows[part].float() - mean) / deviation)
            loss = -(shares[part] * logits.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        loss = total / ROUND
        best, still = (loss, 0) if loss < best - CONVERGED else (best, still + 1)
        if still == PATIENCE:
            break
    weight = layer.weight.detach() / deviation
    return Probe(weight, layer.bias.detach() - weight @ mean)


def probe_rows(model, labelled: LabelledSet, *, seed: int = 0, progress=None) -> tuple[Tensor, Tensor]:
    """Backbone features (N, C) float16 and class shares (N, n) at random positions of random images of a set."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labelled.pairs), generator=generator)[:PROBE_IMAGES].tolist()
    patch, each = model.backbone.patch, max(PROBE_ROWS // len(chosen), 1)
    rows, shares = [], []
    for done, (image, label) in enumerate(ahead(lambda i: labelled.read(i, side=_side(patch)), chosen), 1):
        with torch.inference_mode():
            features = dense_features(model.backbone, to_tensor(image)[None], model.device)  # (1, C, h, w)
        kept = torch.randperm(features[0, 0].numel(), generator=generator)[:each]
        rows.append(features[0].flatten(1).T.cpu()[kept].half())
        shares.append(class_shares(label, len(labelled.classes), patch)[kept])
        if progress:
            progress("probes", done, len(chosen))
    return torch.cat(rows).clone(), torch.cat(shares)


def _side(patch: int) -> int:
    return math.ceil(SIDE / patch) * patch


def fit_probes(model, labelled: LabelledSet, *, train: LabelledSet | None = None, seed: int = 0,
               progress=None) -> dict:
    """{(features, probe): Probe} for features "stego" and "backbone", probes "cluster" and "linear".

    The model's own clusters need no fitting. The others are fitted on `train`; without it the backbone's clusters
    are found in the evaluated images themselves, and there is no linear probe.
    """
    probes = {("stego", "cluster"): Probe(model.centers)}
    rows, shares = probe_rows(model, train or labelled, seed=seed, progress=progress)
    kmeans = CosineKMeans(len(model.centers), n_init=CLUSTER_STARTS, seed=seed).fit(rows.float())
    probes["backbone", "cluster"] = Probe(kmeans.cluster_centers_.to(model.device))
    if model.linear is not None and len(model.linear[1]) == len(labelled.classes):
        probes["stego", "linear"] = Probe(*model.linear)                     # comes with a released checkpoint
    if train is not None:
        with torch.inference_mode():
            codes = torch.cat([model.head(part.float().to(model.device)).cpu() for part in rows.split(65536)])
        for features, x in (("stego", codes.clone()), ("backbone", rows)):
            if (features, "linear") not in probes:
                probe = linear_probe(x, shares, seed=seed)
                probes[features, "linear"] = Probe(*(part.to(model.device) for part in probe))
    return probes


# ---- the evaluation (Sec. 4) ------------------------------------------------------------------------------------

def both_features(model, image: Image.Image) -> dict:
    """The model's codes and the backbone's features of an image, each averaged with its mirror's: (1, D, h, w)."""
    x = to_tensor(image)[None]
    seen = dense_features(model.backbone, torch.cat([x, x.flip(-1)]), model.device)  # (2, C, h, w)
    return {"stego": unmirror(model.head.on_map(seen)), "backbone": unmirror(seen)}


@torch.inference_mode()
def confusions(model, labelled: LabelledSet, probes: dict, *, crf: bool = True, progress=None) -> dict:
    """{(features, probe, crf): (images, n_classes, K) int64} of every probe on every image, with and without CRF."""
    found = {(*key, sharp): [] for key in probes for sharp in ((False, True) if crf else (False,))}
    side = _side(model.backbone.patch)
    pairs = ahead(lambda i: labelled.read(i, side=side), range(len(labelled.pairs)))
    for done, (image, label) in enumerate(pairs, 1):
        features, picture = both_features(model, image), pixels(image).to(model.device)
        for (kind, probe, sharp), counts in found.items():
            weight, bias = probes[kind, probe]
            clusters = cluster_map(features[kind], weight, label.shape, bias=bias, pixels=picture if sharp else None)
            counts.append(confusion_matrix(label, clusters, n_classes=len(labelled.classes), n_clusters=len(weight)))
        if progress:
            progress("evaluate", done, len(labelled.pairs))
    return {key: np.stack(counts) for key, counts in found.items()}


def evaluate(model, labelled: LabelledSet, *, train: LabelledSet | None = None, crf: bool = True, seed: int = 0,
             progress=None) -> dict:
    """Score a model on a labelled set by the published protocol, beside its backbone's raw features.

    train: labelled images for the linear probe and the backbone's clusters. Returns plain values, ready for JSON:
    dataset, classes, images, model, seed, protocol, published, and results, a list of {features, probe, crf, accuracy,
    miou, iou, confusion, assignment, image_accuracy}; shares are fractions, confusion is (n_classes, K) pixel counts.
    Raises ValueError for unreadable, unpaired or wrongly sized files and for a set without one labelled pixel.
    """
    probes = fit_probes(model, labelled, train=train, seed=seed, progress=progress)
    counts = confusions(model, labelled, probes, crf=crf, progress=progress)
    if not next(iter(counts.values())).sum():
        raise ValueError(f"Not one labelled pixel in {labelled.name}: nothing to score.")
    results = [dict(features=features, probe=probe, crf=sharp, **_result(each, probe))
               for (features, probe, sharp), each in counts.items()]
    return dict(dataset=labelled.name, classes=labelled.classes, images=len(labelled.pairs), seed=seed,
                model={key: model.config[key] for key in ("backbone", "classes", "preset", "steps", "seed")},
                protocol=_protocol(model, labelled, train, crf),
                published=PUBLISHED.get(labelled.name, []), results=results)


def _result(each: np.ndarray, probe: str) -> dict:
    """Scores of the confusions of all images (images, n_classes, K); a linear probe's outputs are classes already."""
    confusion = each.sum(0)
    assignment = match_clusters(confusion) if probe == "cluster" else np.arange(confusion.shape[1])
    found = scores(confusion, assignment)
    single = [scores(one, assignment)["accuracy"] for one in each]
    return dict(accuracy=found["accuracy"], miou=found["miou"], iou=found["iou"].tolist(), confusion=confusion.tolist(),
                assignment=assignment.tolist(), image_accuracy=single)


def _protocol(model, labelled: LabelledSet, train: LabelledSet | None, crf: bool) -> str:
    side = _side(model.backbone.patch)
    fitted = (f"linear probes and the backbone's k-means fitted on {min(len(train.pairs), PROBE_IMAGES)} train images "
              f"({train.source})" if train else "backbone's k-means fitted on the same images, no train labels")
    return (f"{len(labelled.pairs)} images ({labelled.source}); shorter side to {side} (images bilinear, labels "
            f"nearest), centre crop {side} x {side}; averaged with the mirror image; "
            f"{'dense CRF, 10 iterations' if crf else 'no CRF'}; one confusion matrix, {len(model.centers)} clusters "
            f"matched with {len(labelled.classes)} classes (Hungarian), clusters left over count as errors; {fitted}")


# ---- diagnostics (Sec. 3.1, App. A.6) ----------------------------------------------------------------------------

@torch.inference_mode()
def diagnose(model, labelled: LabelledSet, *, seed: int = 0, progress=None) -> dict:
    """What do correspondences know about labels?

    curves: {kind: {recall, precision, average_precision}} of feature correspondences, code correspondences and the
    CRF's kernel as predictors of "these two positions of an image have one label" (Sec. 3.1), over all pairs of
    random positions of each image. couplings: {kind: (n, n) counts}: for each position (row: its label) the label of
    the position it corresponds with most in the nearest other image (App. A.6).
    """
    points = _points(model, labelled, seed, progress)
    found, same = {"backbone features": [], "codes": [], "CRF kernel": []}, []
    for point in points:
        upper = tuple(torch.triu_indices(len(point["label"]), len(point["label"]), 1))
        same.append(point["label"][upper[0]] == point["label"][upper[1]])
        weights = [correspondence(point[kind], point[kind]) for kind in ("backbone", "stego")] + [_crf_kernel(point)]
        for values, weight in zip(found.values(), weights):
            values.append(weight[upper])
    same = torch.cat(same).numpy()
    if not same.any():
        raise ValueError(f"No two positions of one label in an image of {labelled.name}: nothing to diagnose.")
    curves = {name: precision_recall(torch.cat(values).numpy(), same) for name, values in found.items()}
    return dict(curves=curves, base_rate=float(same.mean()), couplings=_couplings(points, len(labelled.classes)))


def _points(model, labelled: LabelledSet, seed: int, progress) -> list[dict]:
    """Random labelled positions of each image: unit features (P, D) of both kinds, label, colour, place (P, 2)."""
    generator, patch = torch.Generator().manual_seed(seed), model.backbone.patch
    points = []
    for i in range(len(labelled.pairs)):
        image, label = labelled.read(i, side=_side(patch))
        features = both_features(model, image)
        h, w = features["stego"].shape[2:]
        here = torch.from_numpy(label[patch // 2::patch, patch // 2::patch].astype(np.int64)).flatten()  # (h * w,)
        known = (here != IGNORE).nonzero()[:, 0]
        at = known[torch.randperm(len(known), generator=generator)[:DIAGNOSTIC_POINTS]]
        y, x = at // w * patch + patch // 2, at % w * patch + patch // 2
        point = {kind: unit(value[0].flatten(1).T[at.to(value.device)]).cpu() for kind, value in features.items()}
        point |= dict(label=here[at], place=torch.stack([y, x], 1).float(), colour=pixels(image)[:, y, x].T.float(),
                      mean=unit(features["backbone"].mean((2, 3))).cpu())
        points.append(point)
        if progress:
            progress("diagnose", i + 1, len(labelled.pairs))
    return points


def _crf_kernel(point: dict) -> Tensor:
    """The CRF's pairwise kernel between positions (App. A.9): (P, P)."""
    near, alike = (torch.cdist(point[key], point[key]).square() for key in ("place", "colour"))
    colour = torch.exp(-near / (2 * SXY ** 2) - alike / (2 * SRGB ** 2))
    return COMPAT * colour + SMOOTH_COMPAT * torch.exp(-near / (2 * SMOOTH_SXY ** 2))


def precision_recall(values: np.ndarray, positive: np.ndarray) -> dict:
    """Curve and average precision of values (N,) as a predictor of positive (N,) bool; equal values go together.

    Returns recall and precision (at most CURVE_POINTS evenly spaced points, from the largest value down) and
    average_precision, the sum of precision times the step in recall over all thresholds.
    """
    order = np.argsort(-values, kind="stable")
    last = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)  # the last of each run of equal values
    hits = np.cumsum(positive[order])[last]
    precision, recall = hits / (last + 1), hits / hits[-1]
    average = float(np.sum(np.diff(recall, prepend=0) * precision))
    kept = np.unique(np.append(np.searchsorted(recall, np.linspace(0, 1, CURVE_POINTS - 1)), len(last) - 1))
    return dict(recall=recall[kept].tolist(), precision=precision[kept].tolist(), average_precision=average)


def _couplings(points: list[dict], classes: int) -> dict:
    """Label pairs (n, n) that each position's strongest correspondence with the nearest other image joins."""
    neighbors = nearest_neighbors(torch.cat([point["mean"] for point in points]), 1)[:, 0].tolist()
    counts = {name: np.zeros((classes, classes), np.int64) for name in ("backbone features", "codes")}
    for point, other in zip(points, neighbors):
        partner = points[other]
        if partner is point or not len(partner["label"]):
            continue
        for kind, count in zip(("backbone", "stego"), counts.values()):
            strongest = correspondence(point[kind], partner[kind]).argmax(1)
            np.add.at(count, (point["label"].numpy(), partner["label"][strongest].numpy()), 1)
    return {name: count.tolist() for name, count in counts.items()}


# ---- correspondences of marked points (Fig. 2) ------------------------------------------------------------------

@torch.inference_mode()
def correspondence_sheet(network, image, at, *, others=(), model=None, device="cpu", progress=None) -> Image.Image:
    """What corresponds with points of an image, in itself and in others: a row of coloured pictures a point.

    network: a backbone; model: one that was fitted on it, for rows of its codes too. image: a path; at: points (x, y)
    in its pixels; others: paths, of more than SHOWN those whose averaged features are nearest. Full colour is the
    point itself, none its mean correspondence with its image, or less (the centering of Eq. 3).
    Raises ValueError for a point outside of the image, or what cannot be read.
    """
    picture = read_image(image)
    for x, y in at:
        if not (0 <= x < picture.width and 0 <= y < picture.height):
            raise ValueError(f"The point {x},{y} is not in {image}, which is {picture.width} x {picture.height} "
                             f"pixels: x is 0 to {picture.width - 1}, y 0 to {picture.height - 1}.")
    own = _unit_maps(network, model, picture, image, device)
    if len(others) > SHOWN:
        others = _nearest_images(network, unit(own["backbone features"].mean((1, 2))), others, device, progress)
    pictures = [(picture, own)]
    for path in others:
        pictures.append((other := read_image(path), _unit_maps(network, model, other, path, device)))
    rows, names = [], ", ".join(Path(path).name for path in others)
    for (x, y), colour in zip(at, itertools.cycle(POINT_COLOURS)):
        for kind, maps in own.items():
            h, w = maps.shape[1:]
            code = maps[:, int(y * h / picture.height), int(x * w / picture.width)]  # (D,)
            floor = float((code @ maps.flatten(1)).mean())
            lit = [_lit(each, code, found[kind], floor, colour) for each, found in pictures]
            mark(lit[0], x * lit[0].width / picture.width, y * lit[0].height / picture.height, colour)
            rows.append((f"{kind} at {x},{y}" + (f"; {names}" if names else ""), lit))
    return strips(rows, legend={})


def _unit_maps(network, model, picture: Image.Image, name, device) -> dict:
    """Unit features (C, h, w) of a picture, averaged with its mirror's, and the model's codes (D, h, w)."""
    x = to_tensor(picture.resize(backbone_size(picture, network.patch, name=name), BILINEAR))[None].to(device)
    seen = network(torch.cat([x, x.flip(-1)]))                               # (2, C, h, w)
    found = {"backbone features": seen} | ({"codes": model.head.on_map(seen)} if model else {})
    return {kind: F.normalize(unmirror(maps)[0], dim=0) for kind, maps in found.items()}


def _nearest_images(network, mean: Tensor, paths, device, progress) -> list:
    """The SHOWN images whose averaged features are nearest to a unit vector (C,), of CANDIDATES spread over paths."""
    paths, near = list(paths)[::math.ceil(len(paths) / CANDIDATES)], []
    for done, path in enumerate(paths, 1):
        try:
            maps = _unit_maps(network, None, read_image(path), path, device)["backbone features"]
            near.append((float(unit(maps.mean((1, 2))) @ mean), path))
        except (ValueError, FileNotFoundError) as error:
            log.warning("Skipped: %s", error)
        if progress:
            progress("neighbors", done, len(paths))
    return [path for _, path in sorted(near, key=lambda each: -each[0])[:SHOWN]]


def _lit(picture: Image.Image, code: Tensor, maps: Tensor, floor: float, colour) -> Image.Image:
    """A picture coloured where its unit features (C, h, w) correspond with a unit vector (C,) by more than floor."""
    picture = picture.resize((max(round(picture.width * LIT_HEIGHT / picture.height), 1), LIT_HEIGHT), BILINEAR)
    weight = (torch.einsum("chw,c->hw", maps, code) - floor) / max(1 - floor, 1e-6)
    weight = F.interpolate(weight[None, None], size=picture.size[::-1], mode="bilinear", align_corners=False)[0, 0]
    return spotlight(picture, weight.clamp(0, 1).cpu().numpy(), colour)


# ---- the report ------------------------------------------------------------------------------------------------

def headline(report: dict) -> dict:
    """The result a model is known by: its clusters, with the CRF where there was one."""
    return [result for result in report["results"] if (result["features"], result["probe"]) == ("stego", "cluster")][-1]


def table(report: dict) -> str:
    """All scores in percent, published figures beside them, IoU of each class, and the protocol in one line."""
    name, rows = {"stego": "stego", "backbone": f"k-means, {report['model']['backbone']} alone"}, []
    for features in name:
        for crf in (False, True):
            found = {result["probe"]: result for result in report["results"]
                     if (result["features"], result["crf"]) == (features, crf)}
            if found:
                cells = [100 * found[probe][key] if probe in found else None
                         for probe in ("cluster", "linear") for key in ("accuracy", "miou")]
                rows.append((name[features] + (" + CRF" if crf else ""), cells))
    rows += [(f"{who} (published)", cells) for who, *cells in report["published"]]
    wide = max(len(text) for text in (report["dataset"], *(who for who, _ in rows)))
    lines = [f"{report['dataset']:{wide}}{'unsupervised':>18}{'linear probe':>18}",
             f"{'percent':{wide}}" + 2 * f"{'accuracy':>11}{'mIoU':>7}"]
    lines += [_row(who, cells, wide) for who, cells in rows]
    best = headline(report)
    labelled = np.array(best["confusion"]).sum(1)
    clusters = {c: k for k, c in enumerate(best["assignment"])}
    lines += ["", f"{'class':20}{'IoU':>6}{'pixels':>8}  cluster   (stego{' + CRF' if best['crf'] else ''})"]
    lines += [f"{name:20}{'-' if np.isnan(iou) else f'{100 * iou:.1f}':>6}{share:>8.1%}  {clusters.get(i, '-')}"
              for i, (name, iou, share) in enumerate(zip(report["classes"], best["iou"], labelled / labelled.sum()))]
    if "diagnostics" in report:
        lines += ["", "average precision of correspondences as predictors of equal labels (base rate "
                      f"{report['diagnostics']['base_rate']:.3f})"]
        lines += [f"{name:20}{curve['average_precision']:6.3f}"
                  for name, curve in report["diagnostics"]["curves"].items()]
    return "\n".join([*lines, "", f"protocol: {report['protocol']}"])


def _row(name: str, cells, wide: int) -> str:
    texts = ["-" if value is None else f"{value:.1f}" for value in cells]
    return f"{name:{wide}}" + "".join(f"{text:>{width}}" for text, width in zip(texts, (11, 7, 11, 7)))


def write_json(report: dict, path):
    """The whole report; NaN (a class that does not occur) becomes null."""
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value
    with replacing(path) as part:
        part.write_text(json.dumps(plain(report), allow_nan=False, indent=1))


def write_figures(report: dict, model, labelled: LabelledSet, folder) -> list[Path]:
    """confusion.png, strips.png, with diagnostics also precision-recall.png and couplings-*.png; returns their paths.
    """
    best, classes = headline(report), report["classes"]
    columns = np.argsort([c if c >= 0 else len(classes) for c in best["assignment"]], kind="stable")
    pictures = {"confusion": matrix_picture(_rows_to_one(best["confusion"])[:, columns], classes,
                                            [f"cluster {k}" for k in columns],
                                            title=f"{report['dataset']}: where the pixels of each class go, %"),
                "strips": _strips(best, model, labelled)}
    if "diagnostics" in report:
        curves = report["diagnostics"]["curves"]
        pictures["precision-recall"] = line_chart(
            {f"{name} (AP {curve['average_precision']:.3f})": (curve["recall"], curve["precision"])
             for name, curve in curves.items()},
            title="Correspondences as predictors of equal labels", x_label="recall", y_label="precision",
            y_range=(0, 1))
        for name, count in report["diagnostics"]["couplings"].items():
            pictures[f"couplings-{name.split()[-1]}"] = matrix_picture(
                _rows_to_one(count), classes, classes, title=f"Labels joined by the strongest couplings, {name}, %")
    for name, picture in pictures.items():
        write_image(picture, Path(folder) / f"{name}.png")
    return [Path(folder) / f"{name}.png" for name in pictures]


def _rows_to_one(counts) -> np.ndarray:
    counts = np.array(counts, dtype=float)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)                         # a class that does not occur: NaN


@torch.inference_mode()
def _strips(best: dict, model, labelled: LabelledSet) -> Image.Image:
    """Image, label and prediction of the best, the median and the worst image by accuracy."""
    accuracy = np.array([np.nan if x is None else x for x in best["image_accuracy"]], dtype=float)
    ranked = np.argsort(-accuracy, kind="stable")[:np.isfinite(accuracy).sum()]  # NaN sorts last
    names = np.array([c if c >= 0 else IGNORE for c in best["assignment"]], np.uint8)  # of each cluster
    palette = voc_palette(len(labelled.classes))
    rows = []
    for what, i in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
        image, label = labelled.read(i, side=_side(model.backbone.patch))
        codes, picture = both_features(model, image)["stego"], pixels(image).to(model.device)
        clusters = cluster_map(codes, model.centers, label.shape, pixels=picture if best["crf"] else None)
        masks = [mask_image(mask, palette).convert("RGB") for mask in (label, names[clusters])]
        rows.append((f"{what}: {labelled.pairs[i][0].name}, accuracy {100 * accuracy[i]:.1f} %", [image, *masks]))
    return strips(rows, legend=dict(zip(labelled.classes, palette.tolist())))
