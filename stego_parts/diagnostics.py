"""Is a fit sound? Whether training collapsed, and how many clusters the images support."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kmeans import CosineKMeans

# mean code similarity of unrelated images above which a run has collapsed; good runs: 0 to 0.1
COLLAPSED = 0.5
SCATTERED = 0.15  # the same within an image, below which it has scattered; good runs: 0.4 to 0.6
# What -k auto chooses from; on two clusters, bright and dark, halves agree in any images.
COUNTS = (3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 29, 35, 42)
SPLITS = 4  # halvings of the images behind -k auto
ROWS_EACH = 10  # codes a cluster that a half needs at least


def training_warning(history: list[dict]) -> str | None:
    """In words, if the codes have collapsed or scattered (App. A.11), with what to try; else None.

    A run of fewer than five measurements is too short to tell.
    """
    if len(history) < 5:
        return None
    rand, same = (np.mean([each.get(name, np.nan) for each in history[-5:]]) for name in ("rand", "self"))
    if rand > COLLAPSED:
        return (
            f"The codes of unrelated images are alike (mean similarity {rand:.2f}, at best near 0): training has "
            "collapsed. Try --preset default, a larger --set b_rand=B, or more varied images."
        )
    if same < SCATTERED:
        return (
            f"The codes within an image have nothing in common (mean similarity {same:.2f}): training has "
            "scattered. Try --preset default, or a smaller --set b_self=B and b_knn=B."
        )
    return None


def cluster_agreement(
    sample_halves: Callable[[], list[Tensor]], *, seed: int = 0, progress=lambda stage, done, total: None
) -> dict[int, list[float]]:
    """How much two halves of the images agree on K clusters, for each K of COUNTS and each of SPLITS splits.

    Clusters that are there are found again in other images (stability: Ben-Hur et al. 2002, Lange et al. 2004). Each
    half (N, D), drawn anew by sample_halves, is clustered on its own, then both label the same codes; agreement is the
    adjusted Rand index, 0 by chance.
    """
    agreement: dict[int, list[float]] = {}
    for split in range(SPLITS):
        halves = sample_halves()
        common = torch.cat(halves)
        for done, count in enumerate(count for count in COUNTS if count * ROWS_EACH <= min(map(len, halves))):
            labels = [
                CosineKMeans(count, seed=seed + side, n_init=2, max_iter=60).fit(codes).predict(common)
                for side, codes in enumerate(halves)
            ]
            agreement.setdefault(count, []).append(adjusted_rand_index(*labels))
            progress("classes", split * len(COUNTS) + done + 1, SPLITS * len(COUNTS))
    if not agreement:
        raise ValueError(
            "There are too few positions to tell how many classes they make; give more images, or a number."
        )
    return agreement


def adjusted_rand_index(a: Tensor, b: Tensor) -> float:
    """Agreement of two labellings (N,) int64 beyond chance: 1 for the same parts, 0 for unrelated ones.

    Hubert & Arabie 1985.
    """

    def pairs(counts: Tensor) -> float:
        counts = counts.cpu().double()  # mps has no float64
        return float((counts * (counts - 1) / 2).sum())

    both = a * (int(b.max()) + 1) + b
    joint, left, right = (pairs(torch.bincount(labels)) for labels in (both, a, b))
    chance = left * right / max(len(a) * (len(a) - 1) / 2, 1)
    most = (left + right) / 2
    return (joint - chance) / (most - chance) if most > chance else 1.0


def plausible_counts(agreement: dict[int, list[float]]) -> list[int]:
    """Numbers of clusters whose mean agreement is within a standard error of the best: the first is the one to take.

    The smallest of what cannot be told apart (the one-standard-error rule, Breiman et al. 1984).
    """
    means = {count: float(np.mean(scores)) for count, scores in agreement.items()}
    best = max(means, key=lambda count: means[count])
    error = np.std(agreement[best], ddof=1) / math.sqrt(len(agreement[best]))
    return [count for count, mean in means.items() if mean >= means[best] - error]
