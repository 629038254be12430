"""Accuracy, mIoU and matching against slow direct computations."""

import itertools

import numpy as np
import pytest

from cli_parts.scores import confusion_matrix, match_clusters, measure
from stego_parts.images import IGNORE


def count(labels, clusters, n, k):
    return [
        [sum(1 for a, b in zip(labels, clusters) if a == i and b == j) for j in range(k)] for i in range(n)
    ]


def best_hits(counts, n, k):
    """The most pixels any one-to-one naming of clusters gets right, by trying all."""
    names = list(range(n)) + [-1] * max(k - n, 0)
    return max(
        sum(counts[c][j] for j, c in enumerate(naming) if c >= 0)
        for naming in itertools.permutations(names, k)
    )


def direct_scores(labels, clusters, assignment, n):
    """Accuracy and mIoU by sets of pixels."""
    pixels = [(a, assignment[b]) for a, b in zip(labels, clusters) if a != IGNORE]
    ious = []
    for c in range(n):
        union = sum(1 for a, b in pixels if a == c or b == c)
        if union:
            ious.append(sum(1 for a, b in pixels if a == b == c) / union)
    return sum(1 for a, b in pixels if a == b) / len(pixels), sum(ious) / len(ious)


@pytest.mark.parametrize("n, k", [(3, 3), (4, 4), (3, 5), (5, 3), (1, 1), (1, 4), (4, 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_direct_computation(n, k, seed):
    rng = np.random.default_rng(seed)
    labels, clusters = rng.integers(0, n, 60), rng.integers(0, k, 60)
    labels[rng.random(60) < 0.2] = IGNORE
    if n > 2:
        labels[labels == 1] = 0  # a class that never occurs
    counts = count(labels, clusters, n, k)
    confusion = confusion_matrix(labels, clusters, n_classes=n, n_clusters=k)
    assert confusion.tolist() == counts and confusion.dtype == np.int64
    assignment = match_clusters(confusion)
    used = assignment[assignment >= 0]
    assert len(set(used)) == len(used) == min(n, k)
    accuracy, miou = direct_scores(labels, clusters, assignment, n)
    result = measure(confusion, assignment)
    assert result["accuracy"] == accuracy == best_hits(counts, n, k) / confusion.sum()
    assert result["miou"] == pytest.approx(miou, abs=1e-12)


def test_clusters_without_a_class_are_errors():
    confusion = np.array([[50, 0, 30], [0, 20, 0]])
    assignment = match_clusters(confusion)
    assert assignment.tolist() == [0, 1, -1]
    assert measure(confusion, assignment)["accuracy"] == 0.7
    assert measure(confusion, assignment)["iou"] == [50 / 80, 1.0]


def test_clusters_may_share_a_class():
    result = measure(np.array([[50, 0, 30], [0, 20, 10]]), [0, 1, 0])
    assert result["accuracy"] == 100 / 110 and result["iou"] == [80 / 90, 20 / 30]


def test_matching_is_over_the_set_and_not_greedy():
    confusion = np.array([[10, 9], [9, 0]])  # greedy would take 10 + 0
    assert match_clusters(confusion).tolist() == [1, 0]


@pytest.mark.parametrize(
    "labels, clusters, message",
    [
        ([0, 3], [0, 0], "label values 0..3"),
        ([0, 1], [0, 7], "cluster values 0..7"),
        ([0, -1], [0, 0], "-1"),
        ([0, 1, 1], [0, 1], "one shape"),
    ],
)
def test_values_out_of_range(labels, clusters, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(labels, clusters, n_classes=2, n_clusters=2)


def test_no_labelled_pixel():
    confusion = confusion_matrix([IGNORE], [0], n_classes=2, n_clusters=2)
    assert np.isnan(measure(confusion, match_clusters(confusion))["miou"])
