"""Scores: from pixel counts to accuracy and mIoU (STEGO Sec. 4.1), and all of them as text and as a file.

*Scores* are what `evaluation.evaluate` returns: plain values, as they go into a JSON file.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stego_parts.files import write_bytes
from stego_parts.images import IGNORE

STEGO = "stego"  # features: what the model clusters
BACKBONE = "backbone"  # features: the backbone's own
CLUSTER = "cluster"  # probe: clusters found without labels
LINEAR = "linear"  # probe: a classifier trained on labels


# ---- metrics ----------------------------------------------------------------------------------------------


def confusion_matrix(labels: Any, clusters: Any, *, n_classes: int, n_clusters: int) -> np.ndarray:
    """Pixel counts (n_classes, n_clusters) int64; rows are labels, columns clusters; no pixels of label 255.

    labels, clusters: integer arrays of one shape. Raises ValueError on values outside the ranges.
    """
    labels = np.asarray(labels)
    clusters = np.asarray(clusters)
    if labels.shape != clusters.shape:
        raise ValueError(
            f"Labels are {labels.shape} and clusters {clusters.shape}; they must have one shape."
        )
    known = labels != IGNORE
    labels = labels[known].astype(np.int64)
    clusters = clusters[known].astype(np.int64)
    for name, values, size in (("label", labels, n_classes), ("cluster", clusters, n_clusters)):
        if values.size and (values.min() < 0 or values.max() >= size):
            raise ValueError(
                f"Got {name} values {values.min()}..{values.max()}; "
                f"they must lie in 0..{size - 1} (or be {IGNORE} to be ignored)."
            )
    flat = np.bincount(labels * n_clusters + clusters, minlength=n_classes * n_clusters)
    return flat.reshape(n_classes, n_clusters)


def match_clusters(confusion: Any) -> np.ndarray:
    """Hungarian matching on pixel counts over the whole set (Sec. 4.1).

    confusion: (n_classes, K) counts. Returns (K,) int64: the class of each cluster, -1 for a cluster left over.
    """
    from scipy.optimize import linear_sum_assignment  # here: a third of a second that no fit needs

    confusion = np.asarray(confusion)
    classes, clusters = linear_sum_assignment(confusion, maximize=True)
    assignment = np.full(confusion.shape[1], -1, dtype=np.int64)
    assignment[clusters] = classes
    return assignment


def measure(confusion: Any, assignment: Any) -> dict[str, Any]:
    """Accuracy, mIoU and IoU of each class once clusters are named.

    confusion: (n_classes, K) counts; assignment: (K,) class of each cluster or -1. Pixels of a cluster
    without a class count as errors (the reference implementation drops them). A class that occurs neither in
    the labels nor in the predictions has IoU NaN and is left out of the mean. Returns plain values: accuracy, miou
    (fractions), iou (of each class), assignment.
    """
    confusion = np.asarray(confusion)
    assignment = np.asarray(assignment)
    n_classes = confusion.shape[0]
    named = np.zeros((n_classes, n_classes + 1), dtype=np.int64)  # last column: clusters without a class
    np.add.at(named.T, assignment, confusion.T)  # -1 lands in the last column
    hit = named.diagonal()
    union = named.sum(1) + named[:, :n_classes].sum(0) - hit
    iou = np.where(union > 0, hit / np.maximum(union, 1), np.nan)
    total = named.sum()
    return {
        "accuracy": float(hit.sum() / total) if total else float("nan"),
        "miou": float(np.nanmean(iou)) if (union > 0).any() else float("nan"),
        "iou": iou.tolist(),
        "assignment": assignment.tolist(),
    }


# ---- the scores as text and as a file ----------------------------------------------------------------------


def headline(scores: dict[str, Any]) -> dict[str, Any]:
    """The result a model is known by: its clusters, with the CRF where there was one."""
    clusters = [each for each in scores["results"] if (each["features"], each["probe"]) == (STEGO, CLUSTER)]
    return clusters[-1]


class _Row(NamedTuple):
    """A line of the scores: a name, and percentages: accuracy and mIoU of clusters, of a linear probe."""

    name: str
    percentages: Sequence[float | None]

    def text(self, wide: int) -> str:
        numbers = ["-" if value is None else f"{value:.1f}" for value in self.percentages]
        return f"{self.name:{wide}}" + "".join(map(str.rjust, numbers, (11, 7, 11, 7)))


def format_scores(scores: dict[str, Any]) -> str:
    """All scores in percent, with the published ones, IoU of each class, and the protocol in one line."""
    rows = [*_measured_rows(scores), *_published_rows(scores)]
    wide = max(len(text) for text in (scores["dataset"], *(row.name for row in rows)))
    lines = [
        f"{scores['dataset']:{wide}}{'unsupervised':>18}{'linear probe':>18}",
        f"{'percent':{wide}}" + 2 * f"{'accuracy':>11}{'mIoU':>7}",
        *(row.text(wide) for row in rows),
        "",
        *_class_lines(scores),
        "",
        f"protocol: {scores['protocol']}",
    ]
    return "\n".join(lines)


def _measured_rows(scores: dict[str, Any]) -> list[_Row]:
    """What was measured, the model before its backbone; clusters and linear probe of the same features in one row."""
    names = {STEGO: "stego", BACKBONE: f"k-means, {scores['model']['backbone']} alone"}
    rows: dict[str, list[float | None]] = {}
    for features, name in names.items():
        for result in scores["results"]:
            if result["features"] != features:
                continue
            row = name + (" + CRF" if result["crf"] else "")
            first = 0 if result["probe"] == CLUSTER else 2
            _fill_in(rows.setdefault(row, [None] * 4), first, result)
            if result["many_to_one"]:
                _fill_in(rows.setdefault(f"{row}, many-to-one", [None] * 4), first, result["many_to_one"])
    named = [_Row(name, percentages) for name, percentages in rows.items()]
    return sorted(named, key=lambda row: (row.name.startswith("k-means"), "CRF" in row.name))


def _fill_in(percentages: list[float | None], first: int, measures: dict[str, Any]) -> None:
    percentages[first] = 100 * measures["accuracy"]
    percentages[first + 1] = 100 * measures["miou"]


def _published_rows(scores: dict[str, Any]) -> list[_Row]:
    figures = ("accuracy", "miou", "linear_accuracy", "linear_miou")
    return [
        _Row(f"{row['name']} (published)", [row[figure] for figure in figures]) for row in scores["published"]
    ]


def _class_lines(scores: dict[str, Any]) -> list[str]:
    """IoU, share of the labelled pixels and cluster of each class, of the headline."""
    best = headline(scores)
    pixels = np.array(best["confusion"]).sum(1)  # (n_classes,)
    cluster_of = {number: cluster for cluster, number in enumerate(best["assignment"])}
    lines = [f"{'class':20}{'IoU':>6}{'pixels':>8}  cluster   (stego{' + CRF' if best['crf'] else ''})"]
    for number, name in enumerate(scores["classes"]):
        iou = best["iou"][number]
        percent = "-" if np.isnan(iou) else f"{100 * iou:.1f}"
        share = pixels[number] / pixels.sum()
        lines.append(f"{name:20}{percent:>6}{share:>8.1%}  {cluster_of.get(number, '-')}")
    return lines


def write_json(scores: dict[str, Any], path: Path | str) -> None:
    """All scores; NaN (a class that does not occur) becomes null."""
    plain = json.loads(json.dumps(scores), parse_constant=lambda nan: None)
    write_bytes(json.dumps(plain, indent=1).encode(), path)
