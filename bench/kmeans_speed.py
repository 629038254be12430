"""CosineKMeans against scikit-learn's MiniBatchKMeans on a million codes of a model fitted for it: time and inertia.

    python bench/kmeans_speed.py --images DATA/unlabelled [--limit 600] [--clusters 27] [--rows 1000000] [--seeds 3]

Both get the same codes, already of length one, and as many threads. scikit-learn runs with its defaults, with our batch
and with our batch and number of starts. "cosine": mean of 1 - cosine to the nearest centre, brought to length one.
"squared": mean squared distance of the codes from the mean of their cluster, which is what scikit-learn minimises.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kmeans import CosineKMeans
from stego import nearest_neighbors, shifts_from_data, train_head
from stego_parts.backbones import load_backbone
from stego_parts.config import fit_config
from stego_parts.features import encode
from stego_parts.files import find_images


@torch.inference_mode()
def unit_codes(head, cache, rows: int):
    """Codes (rows, D) of length one at random positions of all crops."""
    each = -(-rows // len(cache))
    parts = (head(cache.sample(crops, each)).flatten(0, 1) for crops in torch.arange(len(cache)).split(256))
    return F.normalize(torch.cat(list(parts))[:rows], dim=1)


def inertias(codes, centers) -> tuple[float, float]:
    """The two measures of the docstring for centres (K, D) of any length."""
    centers = F.normalize(centers, dim=1)
    nearest = [(part @ centers.T).max(1) for part in codes.split(65_536)]
    labels = torch.cat([each.indices for each in nearest])
    sums = torch.zeros_like(centers).index_add_(0, labels, codes)  # (K, D)
    counts = labels.bincount(minlength=len(centers)).clamp(min=1)
    cosine = sum(float((1 - each.values).sum()) for each in nearest) / len(codes)
    return cosine, float(1 - (sums.square().sum(1) / counts).sum() / len(codes))


@click.command()
@click.option("--images", default="../shared/data/unlabelled")
@click.option("--limit", default=600)
@click.option("--clusters", default=27)
@click.option("--rows", default=1_000_000)
@click.option("--seeds", default=3)
@click.option("--threads", default=1)
def main(images, limit, clusters, rows, seeds, threads):
    torch.set_num_threads(threads)  # scikit-learn's: OMP_NUM_THREADS
    torch.manual_seed(0)
    paths = [path for path, _ in find_images(images)][:limit]
    config = fit_config(clusters=clusters).on_backbone("tiny")
    cache = encode(load_backbone("tiny"), paths, config)
    neighbors = nearest_neighbors(cache.means, cache.images)
    head, _ = train_head(cache, neighbors, replace(config, **shifts_from_data(cache, neighbors, config)))
    codes = unit_codes(head, cache, rows).clone()
    theirs = {
        "scikit-learn": {},
        "  batch 4096": dict(batch_size=4096),
        "  batch 4096, 3 starts": dict(batch_size=4096, n_init=3),
    }
    print(
        f"{len(codes)} x {codes.shape[1]} codes of {len(paths)} images, {clusters} clusters, {threads} thread(s)"
    )
    print(f"{'means of ' + str(seeds) + ' seeds':24} seconds  ratio   cosine  squared")
    runs = {"CosineKMeans": lambda seed: CosineKMeans(clusters, seed=seed).fit(codes).cluster_centers_}
    for name, options in theirs.items():
        runs[name] = lambda seed, options=options: torch.from_numpy(
            MiniBatchKMeans(clusters, random_state=seed, **options).fit(codes.numpy()).cluster_centers_
        )
    ours = None
    for name, run in runs.items():
        found = []
        for seed in range(seeds):
            began = time.perf_counter()
            centers = run(seed)
            found.append((time.perf_counter() - began, *inertias(codes, centers)))
        seconds, cosine, squared = torch.tensor(found).mean(0).tolist()
        ours = ours or seconds
        print(f"{name:24} {seconds:7.2f} {seconds / ours:6.2f} {cosine:8.4f} {squared:8.4f}")


if __name__ == "__main__":
    main()
