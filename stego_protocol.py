"""The published evaluation protocol (STEGO Sec. 4 and App. A): what makes a number comparable.

Images and labels are resized to 320 on the shorter side and cropped to the central 320 x 320; codes are averaged with
those of the mirror image and upsampled; one confusion matrix over the whole set, Hungarian matching, mIoU.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from crf import dense_crf
from stego import class_scores
from stego_images import IGNORE, find_images, read_image, square

SIDE = 320  # pixels (Sec. 4)


# ---- pairs of image and label ----------------------------------------------------------------------------------

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


def read_pair(image_path, label_path, *, side: int = SIDE) -> tuple[Image.Image, np.ndarray]:
    """The central square of an image (side x side RGB) and of its label map (side, side) uint8, nearest neighbour."""
    image = read_image(image_path)
    with Image.open(label_path) as file:
        if file.mode not in ("L", "P"):
            raise ValueError(f"{label_path} is a picture of mode {file.mode}; a label map has one 8-bit value a pixel.")
        label = Image.fromarray(np.asarray(file))
    if label.size != image.size:
        raise ValueError(f"{label_path} is {label.size} and its image {image.size} (width, height); "
                         "they must have one size.")
    return square(image, side), np.asarray(ImageOps.fit(label, (side, side), method=Image.Resampling.NEAREST))


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


# ---- probes ----------------------------------------------------------------------------------------------------

def cluster_map(codes: Tensor, centers: Tensor, size: tuple[int, int], *, pixels: Tensor | None = None) -> np.ndarray:
    """Cluster of each pixel from codes (1, D, h, w), upsampled to size (H, W), and unit centres (K, D): (H, W) uint8.

    pixels: the image (3, H, W) uint8 if a CRF is to sharpen the result.
    """
    scores = class_scores(codes, centers, size)[0]                           # (K, H, W)
    if pixels is not None:
        scores = dense_crf(pixels, scores)
    return scores.argmax(0).byte().cpu().numpy()
