"""Does STEGO beat cosine k-means on the same backbone's raw features? (FACTS section 3: 320 protocol, Hungarian.)

    python bench/quality.py --data ../shared/data --crf [--sets camvid,aerial,natural] [--seeds 3] [--backbone tiny]
    python bench/quality.py --data ../shared/data --presets --steps 400 --batch-size 16

For each labelled set DATA/<name>/{images,labels}/{train,val}: features of the train images are computed once; for each
seed a head is trained and clustered as `stego fit` does it, and k-means is run on the raw features of the same
positions, plain (the baseline) and with the evenness of the default; all are scored on val. --presets trains the
published hyper-parameters with their fixed b's in place of the default. Prints mIoU and accuracy in percent, mean over
seeds with the spread, and the ratio to the baseline.
"""

import sys
import time
from pathlib import Path

import click
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from backbone import dictionary_backbone  # noqa: E402

from stego import (  # noqa: E402
    PRESETS,
    balanced_shifts,
    cluster_codes,
    fit_config,
    nearest_neighbors,
    pixels,
    train_head,
    unit,
    unmirror,
)
from stego_parts.backbones import load_backbone  # noqa: E402
from stego_parts.datasets import folder_pairs, read_pair  # noqa: E402
from stego_parts.images import find_images, to_tensor  # noqa: E402
from stego_parts.protocol import cluster_map, confusion_matrix, match_clusters, scores  # noqa: E402
from stego_parts.tokens import encode  # noqa: E402

VITS8_COCOSTUFF = dict(b_self=0.08, b_knn=0.02, b_rand=0.66)  # FACTS section 2, beside the presets


@torch.inference_mode()
def val_features(network, folder):
    """Mirror pairs of features (2, C, h, w), pictures and label maps of a set's val images."""
    found = []
    for image, label in (
        read_pair(*pair) for pair in folder_pairs(folder / "images/val", folder / "labels/val")
    ):
        x = to_tensor(image)[None]
        found.append((network(torch.cat([x, x.flip(-1)])), image, label))
    return found


@torch.inference_mode()
def score(code_map, centers, val, classes, crf):
    """mIoU and accuracy in percent of clusters on val images."""
    confusion = np.zeros((classes, len(centers)), np.int64)
    for features, image, label in val:
        codes = unmirror(code_map(features))
        found = cluster_map(codes, centers, label.shape, pixels=pixels(image) if crf else None)
        confusion += confusion_matrix(label, found, n_classes=classes, n_clusters=len(centers))
    result = scores(confusion, match_clusters(confusion))
    return 100 * result["miou"], 100 * result["accuracy"]


def fit_head(cache, config):
    """A head trained as `Stego.fit` does it."""
    neighbors = nearest_neighbors(cache.means[: len(cache)])
    if config["balance"] == "auto":
        config = config | balanced_shifts(cache, neighbors, centering=config["centering"])
    return train_head(cache, neighbors, config)


def scored(code_map, centers, val, classes, crf):
    """[(suffix of the method's name, (mIoU, accuracy))], without and perhaps with the CRF."""
    return [
        (" + CRF" if with_crf else "", score(code_map, centers, val, classes, with_crf))
        for with_crf in ([False, True] if crf else [False])
    ]


def raw_rows(cache, val, classes, evenness, seed, crf):
    """k-means on raw features: the baseline, and with our way of clustering."""
    for name, even in {"raw k-means": 0.0, "raw, even": evenness}.items():
        torch.manual_seed(seed)
        centers, _ = cluster_codes(unit, cache, classes, evenness=even, seed=seed)
        for suffix, result in scored(lambda x: x, centers, val, classes, crf and not even):
            yield name + suffix, result


def stego_rows(name, cache, val, classes, config, seed, crf):
    torch.manual_seed(seed)
    head = fit_head(cache, config)
    centers, _ = cluster_codes(head.describe, cache, classes, evenness=config["evenness"], seed=seed)
    for suffix, result in scored(head.on_map, centers, val, classes, crf):
        yield name + suffix, result


def run_set(network, folder, classes, variants, seeds, crf):
    """{method: [(mIoU, accuracy) for each seed]}; variants: {method: config}."""
    caches, val, rows = {}, val_features(network, folder), {}
    torch.manual_seed(0)  # encode keeps random positions
    for name, config in variants.items():
        views = config["views"]
        if views not in caches:
            caches[views] = encode(
                network, [path for path, _ in find_images(folder / "images/train")], views=views
            )
    for seed in range(seeds):
        found = []
        if "stego" in variants:
            found += raw_rows(caches["windows"], val, classes, variants["stego"]["evenness"], seed, crf)
        for name, config in variants.items():
            found += stego_rows(name, caches[config["views"]], val, classes, config, seed, crf)
        for name, result in found:
            rows.setdefault(name, []).append(result)
    return rows


def chosen(presets: bool, classes: int, overrides: dict) -> dict:
    """{method: config}: the default, or every published set of hyper-parameters."""
    if not presets:
        return {"stego": fit_config(classes=classes, **overrides)}
    named = {name: fit_config(classes=classes, preset=name, **overrides) for name in PRESETS}
    return named | {"vits8-cocostuff": named["small"] | VITS8_COCOSTUFF}


@click.command()
@click.option("--data", default="../shared/data", type=Path)
@click.option("--sets", default="camvid,aerial,natural")
@click.option("--seeds", default=3)
@click.option(
    "--backbone", default="tiny", help="A backbone's name, or the learned patch dictionary: dictionary."
)
@click.option("--crf", is_flag=True, help="Score with the CRF as well.")
@click.option("--presets", is_flag=True, help="The published hyper-parameters in place of the default.")
@click.option("--steps", type=int)
@click.option("--batch-size", type=int)
def main(data, sets, seeds, backbone, crf, presets, **overrides):
    network, ratios = dictionary_backbone(data) if backbone == "dictionary" else load_backbone(backbone), {}
    print(f"{'set':8} {'method':16} {'mIoU':>6} {'+-':>5} {'acc':>6}  seeds 0..{seeds - 1}, {backbone}")
    for name in sets.split(","):
        began = time.monotonic()
        classes = len((data / name / "classes.txt").read_text().split())
        rows = run_set(network, data / name, classes, chosen(presets, classes, overrides), seeds, crf)
        for method, results in rows.items():
            miou, accuracy = np.array(results).T
            base = np.mean(rows["raw k-means"], 0)[0] if "raw k-means" in rows else np.nan
            ratios.setdefault(method, []).append((miou.mean(), miou.mean() / base))
            print(
                f"{name:8} {method:16} {miou.mean():6.2f} {miou.std():5.2f} {accuracy.mean():6.2f}  "
                f"{np.round(miou, 1)}  x {miou.mean() / base:.3f}",
                flush=True,
            )
        print(f"{name:8} {time.monotonic() - began:.0f} s", flush=True)
    for method, found in ratios.items():
        print(f"mean     {method:16} {np.mean(found, 0)[0]:6.2f}  x {np.mean(found, 0)[1]:.3f}")


if __name__ == "__main__":
    main()
