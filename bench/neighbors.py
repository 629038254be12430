"""The table of nearest neighbours: time and memory, against scikit-learn and a matrix product.

    python bench/neighbors.py [--rows 100000] [--channels 384] [--threads 2]

Rows are drawn around centres with noise. The search runs beside scikit-learn's on --compare of the rows. Memory is the
peak of the whole process, PyTorch and the rows included.
"""

import resource
import sys
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stego import NEIGHBORS, nearest_neighbors


def timed(function) -> tuple[float, float, object]:
    """Seconds on the clock, seconds of CPU, and the result."""
    began, used = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - began, time.process_time() - used, result


def peak() -> float:
    """GB that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def drawn(rows: int, channels: int):
    """Unit rows around rows / 50 centres, as many directions as 50 images of a scene would have."""
    centers = torch.randn(max(rows // 50, 1), channels)
    x = torch.randn(rows, channels)
    for part in torch.arange(rows).split(65_536):
        x[part] = F.normalize(x[part] + centers[torch.randint(len(centers), part.shape)], dim=1)
    return x


def compare(x, ours):
    """scikit-learn's brute force on the same rows, and whether both find the same."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=NEIGHBORS + 1, algorithm="brute").fit(
        x.numpy()
    )  # euclidean: its fast route
    clock, cpu, theirs = timed(lambda: search.kneighbors(return_distance=False, n_neighbors=NEIGHBORS))
    theirs = torch.from_numpy(theirs)
    return clock, cpu, float((ours[:, :, None] == theirs[:, None]).any(2).float().mean())


@click.command()
@click.option("--rows", default=100_000)
@click.option("--channels", default=384)
@click.option("--compare", "compared", default=20_000)
@click.option("--threads", default=2)
@torch.inference_mode()
def main(rows, channels, compared, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = drawn(rows, channels)
    a = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / min(timed(lambda: a @ a)[1] for _ in range(5))  # operations a second of CPU
    print(f"{len(x)} x {x.shape[1]} rows ({x.nbytes / 1e9:.2f} GB), {threads} thread(s)")
    clock, cpu, _ = timed(lambda: nearest_neighbors(x, torch.arange(len(x))))
    products = 2 * len(x) ** 2 * x.shape[1] / rate
    print(
        f"exact: {clock:.0f} s, CPU {cpu:.0f} s, {cpu / products:.2f} of the bare matrix products ({rate / 1e9:.0f} "
        f"Gflop/s and thread), {peak():.2f} GB at the peak"
    )
    part = x[:compared]
    clock, cpu, found = timed(lambda: nearest_neighbors(part, torch.arange(len(part))))
    their_clock, their_cpu, same = compare(part, found)
    print(
        f"{len(part)} rows: {clock:.1f} s (CPU {cpu:.1f}), scikit-learn {their_clock:.1f} s (CPU {their_cpu:.1f}), "
        f"ratio of CPU {their_cpu / cpu:.2f}; {same:.2%} of the neighbours are the same"
    )


if __name__ == "__main__":
    main()
