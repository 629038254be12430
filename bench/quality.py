"""Does STEGO beat cosine k-means on the same backbone's raw features? (320 protocol, Hungarian matching.)

    python bench/quality.py --data DATA [--sets camvid,aerial,natural] [--seeds 3] [--backbone tiny] [--no-crf]
    python bench/quality.py --data DATA --presets --steps 400 --batch-size 16

For each labelled set DATA/NAME/{images,labels}/{train,val}, the images that are scored are of another place or time
than those that are fitted on: of CamVid one drive of train (dusk) is left out and scored, of the aerial tiles one area;
other sets are scored on val, and a set without val on the images it was fitted on. Features are computed once. For each
seed a head is trained and clustered as `stego fit` does it, and k-means is run on the raw features of the same images.
Prints mIoU (+-: its standard deviation over the seeds) and accuracy in percent, and the ratio of mIoU to that of
k-means, CRF against CRF. --presets trains the published hyper-parameters with their fixed b's in place of the default.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from backbone import dictionary_backbone

from cli_parts.evaluation import Probe, class_maps
from cli_parts.labels import folder_pairs, read_pair
from cli_parts.scores import confusion_matrix, match_clusters, measure
from stego import cluster_codes, nearest_neighbors, shifts_from_data, train_head, unit
from stego_parts.backbones import load_backbone
from stego_parts.clusters import pixels, unmirror
from stego_parts.config import PRESETS, Config, fit_config
from stego_parts.features import encode, to_tensor

HELD_OUT = {"camvid": "0001TP", "aerial": "dubai_t6_"}  # stems of train that are scored in place of val


class Split(NamedTuple):
    """A labelled set: the number of classes, images to fit on, (image, label) pairs to score."""

    classes: int
    images: list
    scored: list


def split_of(folder: Path) -> Split:
    classes = len((folder / "classes.txt").read_text().split())
    train = folder_pairs(folder / "images/train", folder / "labels/train")
    if start := HELD_OUT.get(folder.name):
        scored = [pair for pair in train if pair[0].stem.startswith(start)]
        train = [pair for pair in train if pair not in scored]
    else:
        val = folder / "images/val"
        scored = folder_pairs(val, folder / "labels/val") if val.exists() else train
    return Split(classes, [image for image, _ in train], scored)


@torch.inference_mode()
def scored_images(network, pairs):
    """Mirror pairs of features (2, C, h, w) float16, pictures and label maps of the images that are scored."""
    found = []
    for image, label in (read_pair(*pair) for pair in pairs):
        x = to_tensor(image)[None]
        found.append((network(torch.cat([x, x.flip(-1)])).half(), pixels(image), label))
    return found


class Method(NamedTuple):
    """What is clustered, features (B, C, h, w) to (B, D, h, w), and by which centres (K, D)."""

    on_map: object
    centers: torch.Tensor
    adaptation: float = 0.0


@torch.inference_mode()
def score(method: Method, images, classes: int, crf: bool) -> tuple[float, float]:
    """mIoU and accuracy in percent."""
    confusion = np.zeros((classes, len(method.centers)), np.int64)
    for features, picture, label in images:
        codes = unmirror(method.on_map(features.float()))
        probes = {("codes", "cluster"): Probe(method.centers, adaptation=method.adaptation)}
        maps = class_maps({"codes": codes}, probes, label.shape, picture if crf else None)
        clusters = maps["codes", "cluster", crf]
        confusion += confusion_matrix(label, clusters, n_classes=classes, n_clusters=len(method.centers))
    result = measure(confusion, match_clusters(confusion))
    return 100 * result["miou"], 100 * result["accuracy"]


def raw_kmeans(cache, classes: int, seed: int) -> Method:
    """The baseline: k-means on the backbone's features."""
    torch.manual_seed(seed)
    return Method(
        lambda features: features, cluster_codes(unit, cache, Config(classes=classes, seed=seed))[0]
    )


def fitted(cache, config: Config, seed: int) -> Method:
    """A head trained and clustered as `Stego.fit` does it."""
    torch.manual_seed(seed)
    neighbors = nearest_neighbors(cache.means)
    config = replace(config, seed=seed, **shifts_from_data(cache, neighbors, config))
    head, _ = train_head(cache, neighbors, config)
    return Method(head.on_map, cluster_codes(head.describe, cache, config)[0], config.adaptation)


def run_set(network, split: Split, variants: dict, seeds: int, kinds) -> dict:
    """{(method, with CRF): (seeds, 2) mIoU and accuracy}; variants: {method: config}."""
    images, caches, rows = scored_images(network, split.scored), {}, {}
    for config in variants.values():
        torch.manual_seed(0)  # a bounded cache keeps random positions
        if config.views not in caches:
            caches[config.views] = encode(network, split.images, config)
    for seed in range(seeds):
        methods = {"k-means": raw_kmeans(next(iter(caches.values())), split.classes, seed)}
        for name, config in variants.items():
            methods[name] = fitted(caches[config.views], config, seed)
        for name, method in methods.items():
            for crf in kinds:
                rows.setdefault((name, crf), []).append(score(method, images, split.classes, crf))
    return {key: np.array(values) for key, values in rows.items()}


def chosen(presets: bool, **settings) -> dict:
    """{method: config}: the default of the bundled backbone, or every published set of hyper-parameters."""
    if not presets:
        return {"stego": fit_config(backbone="tiny", **settings)}
    return {name: fit_config(name, **settings) for name in PRESETS if name != "default"}


def print_rows(name: str, rows: dict):
    for (method, crf), values in rows.items():
        (miou, accuracy), spread = values.mean(0), values[:, 0].std()
        ratio = miou / rows["k-means", crf][:, 0].mean()
        print(
            f"{name:12} {method + ' + CRF' * crf:22} {miou:6.2f} {spread:5.2f} {accuracy:9.2f} {ratio:6.3f}",
            flush=True,
        )


def print_means(tables: list):
    """Means over the sets: of mIoU, of its standard deviation, of accuracy, of the ratio, and the least ratio."""
    for method, crf in tables[0]:
        values = [rows[method, crf] for rows in tables]
        ratios = [rows[method, crf][:, 0].mean() / rows["k-means", crf][:, 0].mean() for rows in tables]
        (miou, accuracy), spread = np.mean(values, (0, 1)), np.mean([each[:, 0].std() for each in values])
        print(
            f"{'mean':12} {method + ' + CRF' * crf:22} {miou:6.2f} {spread:5.2f} {accuracy:9.2f} "
            f"{np.mean(ratios):6.3f}, at least {min(ratios):.3f}"
        )


@click.command()
@click.option(
    "--data", default="../shared/data", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--sets", default="camvid,aerial,natural")
@click.option("--seeds", default=3)
@click.option(
    "--backbone", default="tiny", help="A backbone's name, NAME=FILE, or the patch dictionary: dictionary."
)
@click.option("--crf/--no-crf", default=True, help="Score with the CRF as well.")
@click.option("--presets", is_flag=True, help="The published hyper-parameters in place of the default.")
@click.option("--steps", type=int)
@click.option("--batch-size", type=int)
def main(data, sets, seeds, backbone, crf, presets, **overrides):
    name, _, weights = backbone.partition("=")
    network = (
        dictionary_backbone(data) if name == "dictionary" else load_backbone(name, weights=weights or None)
    )
    print(
        f"{backbone}, seeds 0 to {seeds - 1}, percent\n"
        f"{'set':12} {'method':22} {'mIoU':>6} {'+-':>5} {'accuracy':>9} {'ratio':>6}"
    )
    tables = []
    for folder in (data / each for each in sets.split(",")):
        began, split = time.monotonic(), split_of(folder)
        variants = chosen(presets, classes=split.classes, **overrides)
        tables.append(run_set(network, split, variants, seeds, (False, True) if crf else (False,)))
        print_rows(folder.name, tables[-1])
        print(
            f"{folder.name:12} fitted on {len(split.images)} images, scored on {len(split.scored)}; "
            f"{time.monotonic() - began:.0f} s"
        )
    print_means(tables)


if __name__ == "__main__":
    main()
