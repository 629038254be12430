"""The published evaluation protocol (STEGO Sec. 4 and App. A): metrics that make a number comparable."""

import numpy as np
from scipy.optimize import linear_sum_assignment

IGNORE = 255  # label value of pixels that take no part


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
