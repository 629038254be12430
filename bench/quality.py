"""Does STEGO beat cosine k-means on the same backbone's raw features? (FACTS section 3: 320 protocol, Hungarian.)

    python bench/quality.py --data ../shared/data [--sets camvid,aerial,natural] [--seeds 3] [--backbone tiny] [--crf]

For each labelled set DATA/<name>/{images,labels}/{train,val}: features of the train images are computed once; for each
seed a head is trained and clustered as `stego fit` does it, and k-means is run on the raw features of the same
crops; both are scored on val. Prints mIoU and accuracy in percent, mean over seeds with the spread, and the ratio.
"""

import sys
import time
from pathlib import Path

import click
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from backbone import dictionary_backbone  # noqa: E402

from stego import balanced_shifts, cluster_codes, encode, fit_config, nearest_neighbors, pixels, train_head, unit  # noqa: E402
from stego_backbones import load_backbone  # noqa: E402
from stego_images import find_images, to_tensor  # noqa: E402
from stego_protocol import (cluster_map, confusion_matrix, folder_pairs, match_clusters, read_pair,  # noqa: E402
                            scores)


@torch.inference_mode()
def val_features(network, folder):
    """Mirror pairs of features (2, C, h, w), pictures and label maps of a set's val images."""
    found = []
    for image, label in (read_pair(*pair) for pair in folder_pairs(folder / "images/val", folder / "labels/val")):
        x = to_tensor(image)[None]
        found.append((network(torch.cat([x, x.flip(-1)])), image, label))
    return found


@torch.inference_mode()
def score(code_map, centers, val, classes, crf):
    """mIoU and accuracy in percent of clusters on val images."""
    confusion = np.zeros((classes, len(centers)), np.int64)
    for features, image, label in val:
        plain, mirrored = code_map(features).chunk(2)
        found = cluster_map((plain + mirrored.flip(-1)) / 2, centers, label.shape, pixels=pixels(image) if crf else None)
        confusion += confusion_matrix(label, found, n_classes=classes, n_clusters=len(centers))
    result = scores(confusion, match_clusters(confusion))
    return 100 * result["miou"], 100 * result["accuracy"]


def head_map(head):
    return lambda x: head(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


def fit_head(cache, config):
    """A head trained as `Stego.fit` does it."""
    neighbors = nearest_neighbors(cache.means)
    if config["balance"] == "auto":
        config = config | balanced_shifts(cache, neighbors, centering=config["centering"])
    return train_head(cache, neighbors, config)


def run_set(network, folder, classes, seeds, crf, overrides):
    """Rows (method, [(mIoU, accuracy) for each seed])."""
    cache = encode(network, [path for path, _ in find_images(folder / "images/train")])
    val = val_features(network, folder)
    rows = {"raw k-means": [], "stego": []} | ({"stego + CRF": []} if crf else {})
    for seed in range(seeds):
        torch.manual_seed(seed)
        centers, _ = cluster_codes(unit, cache, classes, seed=seed)
        rows["raw k-means"].append(score(lambda x: x, centers, val, classes, False))
        torch.manual_seed(seed)
        head = fit_head(cache, fit_config(classes=classes, **overrides))
        centers, _ = cluster_codes(head, cache, classes, seed=seed)
        rows["stego"].append(score(head_map(head), centers, val, classes, False))
        if crf:
            rows["stego + CRF"].append(score(head_map(head), centers, val, classes, True))
    return rows


@click.command()
@click.option("--data", default="../shared/data", type=Path)
@click.option("--sets", default="camvid,aerial,natural")
@click.option("--seeds", default=3)
@click.option("--backbone", default="tiny", help="A backbone's name, or the learned patch dictionary: dictionary.")
@click.option("--crf", is_flag=True)
@click.option("--steps", type=int)
@click.option("--preset", help="A published preset with its b's instead of the default.")
def main(data, sets, seeds, backbone, crf, **overrides):
    network, ratios = dictionary_backbone(data) if backbone == "dictionary" else load_backbone(backbone), []
    print(f"{'set':8} {'method':12} {'mIoU':>6} {'+-':>5} {'acc':>6}  seeds 0..{seeds - 1}, {backbone}")
    for name in sets.split(","):
        began = time.monotonic()
        classes = len((data / name / "classes.txt").read_text().split())
        rows = run_set(network, data / name, classes, seeds, crf, overrides)
        for method, results in rows.items():
            miou, accuracy = np.array(results).T
            print(f"{name:8} {method:12} {miou.mean():6.2f} {miou.std():5.2f} {accuracy.mean():6.2f}", flush=True)
        ratios.append(np.mean(rows["stego"], 0)[0] / np.mean(rows["raw k-means"], 0)[0])
        print(f"{name:8} stego / raw  {ratios[-1]:6.3f}   ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"mean of the ratios {np.mean(ratios):.3f}")


if __name__ == "__main__":
    main()
