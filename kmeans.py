"""Cosine (spherical) mini-batch k-means in torch.

STEGO segments by clustering codes by direction (Sec. 4): each pixel joins the centre of largest cosine. Spherical
k-means is Dhillon & Modha 2001, mini-batches are Sculley 2010, the seeding is Arthur & Vassilvitskii 2007.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 65_536  # rows compared with the centres at once: 7 MB of cosines for 27 centres
SEEDING_ROWS = 200  # rows per cluster that take part in the k-means++ seeding
FORGET = 0.9  # weight of the past in the running sums: about the last ten batches set a centre
STARVED = 0.02  # a centre with less than this share of a fair part (1 / K) is seeded anew
REPAIR_EVERY = 10  # batches between two looks for starved centres
LEARNED = ("cluster_centers_", "inertia_", "_sums", "_counts", "_batches")  # by the best of the starts


class CosineKMeans:
    """Mini-batch k-means under cosine similarity, in the shape scikit-learn users know.

    Args:
        n_clusters: number of centres K, at least 1.
        n_init: independent starts; the one of lowest inertia is kept.
        max_iter: mini-batches per start.
        batch_size: rows of one mini-batch.
        seed: same seed, same rows, same threads: same centres; of several starts also with other threads.

    Learned: `cluster_centers_` (K, d) unit rows, `inertia_` mean of 1 - cosine over the rows last fitted.
    """

    def __init__(
        self, n_clusters: int, *, n_init: int = 3, max_iter: int = 100, batch_size: int = 4096, seed: int = 0
    ) -> None:
        if n_clusters < 1:
            raise ValueError(f"n_clusters is {n_clusters}; k-means needs at least 1 cluster.")
        self.n_clusters = n_clusters
        self.n_init = n_init
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self.cluster_centers_: Any = None
        self.inertia_ = math.inf
        self._batches = 0

    def fit(self, x: Tensor) -> "CosineKMeans":
        """Cluster the rows of x (N, d), float, any length of row; zero rows are left out of the fit.

        Raises ValueError if x is not a matrix of at least K finite, non-zero rows.
        """
        x = _unit_rows(x)
        kept = x.norm(dim=1) > 0  # (N,)
        if not kept.all():
            x = x[kept]  # (N, d)
        seeds = torch.randint(2**62, (self.n_init,), generator=self._generator).tolist()
        best = min(_side_by_side(partial(self._start, x), seeds, x.device), key=lambda start: start.inertia_)
        self.__dict__ |= {name: best.__dict__[name] for name in LEARNED}
        return self

    def _start(self, x: Tensor, seed: int) -> "CosineKMeans":
        """One start on unit rows x (N, d): this k-means with what it has learned."""
        start = copy(self)
        start._generator = torch.Generator().manual_seed(seed)
        start.cluster_centers_ = None
        start._batches = 0
        for i in range(self.max_iter):
            start._step(start._draw(x, self.batch_size), last=i + 1 == self.max_iter)
        start.inertia_ = start._mean_distance(x)
        return start

    def partial_fit(self, x: Tensor) -> "CosineKMeans":
        """Move the centres by one mini-batch x (B, d); the first batch also seeds them, so it needs B >= K rows."""
        return self._step(_unit_rows(x))

    def _step(self, x: Tensor, *, last: bool = False) -> "CosineKMeans":
        """`partial_fit` on rows of unit length; after the last batch nothing would refine a centre that is moved."""
        if self.cluster_centers_ is None:
            self.cluster_centers_ = self._seed_centers(self._draw(x, SEEDING_ROWS * self.n_clusters))
            self._sums = torch.zeros_like(self.cluster_centers_)  # (K, d)
            self._counts = x.new_zeros(self.n_clusters)
        cosine, label = _nearest(x, self.cluster_centers_)
        member = F.one_hot(label, self.n_clusters).to(x.dtype)  # (B, K)
        self._sums.mul_(FORGET).add_(member.T @ x)  # (K, d); index_add_ is not deterministic on CUDA
        self._counts.mul_(FORGET).add_(member.sum(0))
        alive = (self._counts > 1e-6) & (self._sums.norm(dim=1) > 1e-6)
        self.cluster_centers_[alive] = F.normalize(self._sums[alive], dim=1)
        self._batches += 1
        if self._batches % REPAIR_EVERY == 0 and not last:
            self._repair(x, cosine)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Index of the nearest centre for each row of x (N, d) -> (N,) int64."""
        if self.cluster_centers_ is None:
            raise ValueError("This CosineKMeans has no centres yet; call fit(x) before predict(x).")
        return torch.cat([_nearest(part, self.cluster_centers_)[1] for part in x.split(CHUNK)])

    def _seed_centers(self, x: Tensor) -> Tensor:
        """k-means++ on rows x (n, d): each new centre is the best of a few drawn by distance to those we have."""
        if len(x) < self.n_clusters:
            raise ValueError(
                f"Got {len(x)} non-zero rows for {self.n_clusters} clusters; k-means needs at least one row a cluster, "
                "partial_fit in its first batch: give more rows or ask for fewer clusters."
            )
        centers = [x[torch.randint(len(x), (), generator=self._generator)]]
        distance = 1 - x @ centers[0]  # (n,) half the squared chord
        while len(centers) < self.n_clusters:
            weight = distance.clamp(min=1e-12).cpu()
            drawn = torch.multinomial(weight, self._trials, replacement=True, generator=self._generator)
            candidate = torch.minimum(distance[:, None], 1 - x @ x[drawn].T)  # (n, trials)
            best = int(candidate.sum(0).argmin())
            centers.append(x[drawn[best]])
            distance = candidate[:, best]
        return torch.stack(centers)  # (K, d)

    @property
    def _trials(self) -> int:
        """Rows among which a new centre is chosen, the usual greedy variant."""
        return 2 + int(math.log(self.n_clusters))

    def _repair(self, x: Tensor, cosine: Tensor) -> None:
        """Put starved centres on the rows of this batch that are served worst."""
        starved = (self._counts < STARVED * self._counts.sum() / self.n_clusters).nonzero()[:, 0]
        worst = cosine.argsort()[: max(len(x) // 20, 1)]  # the worst twentieth
        for k in starved.tolist():
            row = x[worst[torch.randint(len(worst), (), generator=self._generator)]]
            self.cluster_centers_[k] = row
            self._sums[k] = row
            self._counts[k] = 1.0

    def _draw(self, x: Tensor, count: int) -> Tensor:
        """Random rows of x, `count` of them, a row may come twice; all of them where there are no more."""
        rows = _random_rows(len(x), count, self._generator)
        return x if rows is None else x.index_select(0, rows.to(x.device))  # five times as fast as x[rows]

    def _mean_distance(self, x: Tensor) -> float:
        total = sum(float((1 - _nearest(part, self.cluster_centers_)[0]).sum()) for part in x.split(CHUNK))
        return total / len(x)


def _unit_rows(x: Tensor) -> Tensor:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"Got {x.dtype} of shape {tuple(x.shape)}; k-means needs floating point rows (N, d)."
        )
    x = F.normalize(x.float(), dim=1)
    if not torch.isfinite(x.sum()):  # 40 times as fast as looking at each
        raise ValueError("Got NaN or infinite values; k-means needs finite rows.")
    return x


def _random_rows(rows: int, count: int, generator: torch.Generator) -> Tensor | None:
    """Numbers of `count` random rows; None: all of them, where there are no more."""
    return None if rows <= count else torch.randint(rows, (count,), generator=generator)


def _nearest(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine (N,) and its centre (N,) int64, for unit rows (rows of any length for the index alone)."""
    return (x.to(centers.dtype) @ centers.T).max(dim=1)


def _side_by_side(
    start: Callable[[int], CosineKMeans], seeds: list[int], device: torch.device
) -> Iterator[CosineKMeans]:
    """The starts; on the CPU as many at once as torch has threads, each with one of them."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield from map(start, seeds)
        return
    try:
        # one step on two threads takes three quarters of the time
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(start, seeds)
    finally:
        torch.set_num_threads(threads)  # for threads that begin later
