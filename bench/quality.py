"""Does STEGO beat cosine k-means on the same backbone's features? (320 protocol, Hungarian matching.)

    python bench/quality.py --data DATA [--sets camvid,natural] [--seeds 3] [--backbone tiny] [--blocks 10] [--no-crf]
    python bench/quality.py --data DATA --presets --steps 400 --batch-size 16

For each labelled set DATA/NAME/{images,labels}/{train,val}, the images that are scored are of another place or time
than those that are fitted on: of CamVid one drive of train (dusk) is left out and scored, of the aerial tiles one
area; other sets are scored on val, and a set without labels of val on what it was fitted on. Features are computed
once. For each seed a head is trained and clustered with the backbone's own settings, as `stego fit` does it, and
compared with k-means on the features of the same views: plain, and with the evenness and the adaptation of the method.
Only what is above the better of both is the head's. Prints mIoU (+-: its standard deviation over the seeds), accuracy
in percent, and the ratio of mIoU to both, CRF against CRF. --blocks N: features after N blocks of a transformer,
normalised without affine parameters. --presets: the published hyper-parameters with their fixed b's for the default.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli_parts.labels import folder_pairs, read_pair
from cli_parts.scores import confusion_matrix, match_clusters, measure
from stego import cluster_codes, nearest_neighbors, shifts_from_data, train_head, unit
from stego_parts.backbones import load_backbone
from stego_parts.clusters import Probe, segment
from stego_parts.config import PRESETS, Config, fit_config
from stego_parts.features import TokenCache, encode, to_tensor
from stego_parts.vit import EPS

SIDE = 320  # pixels, or the next multiple of the patch
AERIAL = "aerial"
# Set: its folder, and how the names of those images of train begin that are scored in place of val
SETS = {
    "camvid": ("camvid", "0001TP"),
    "natural": ("natural", ""),
    "natural_coco": ("natural_coco", ""),
    "aerial6": (AERIAL, "dubai_t6_"),
    "aerial8": (AERIAL, "dubai_t8_"),
}
PLAIN = "k-means"
SAME = "k-means, as method"  # with its evenness and adaptation


class Split(NamedTuple):
    """A labelled set: the number of classes, images to fit on, (image, label) pairs to score."""

    classes: int
    images: list
    scored: list


class Scored(NamedTuple):
    """An image that is scored: features (2, C, h, w) float16 of it and its mirror image, picture, labels (H, W)."""

    features: Tensor
    picture: Image.Image
    label: np.ndarray


class Method(NamedTuple):
    """What is clustered, features (B, C, h, w) to (B, D, h, w), and by which centres (K, D)."""

    on_map: Callable[[Tensor], Tensor]
    centers: Tensor
    adaptation: float


Row = dict[tuple[str, bool], np.ndarray]  # (method, with CRF): (seeds, 2) mIoU and accuracy


def split_of(data: Path, name: str) -> Split:
    """The images of a set that are fitted on, and those that are scored."""
    folder, start = SETS.get(name, (name, ""))
    root = data / folder
    classes = len((root / "classes.txt").read_text().split())
    train = folder_pairs(root / "images/train", root / "labels/train")
    if start:
        scored = [pair for pair in train if pair[0].stem.startswith(start)]
        train = [pair for pair in train if pair not in scored]
    elif (root / "labels/val").exists():
        scored = folder_pairs(root / "images/val", root / "labels/val")
    else:
        scored = train
    return Split(classes, [image for image, _ in train], scored)


def cut(network: Any, blocks: int) -> Any:
    """A transformer that ends after some blocks, with a norm without affine parameters."""
    if not hasattr(network, "blocks"):
        raise click.BadParameter(f"{network.name} is no transformer; leave --blocks out.")
    network.blocks = network.blocks[:blocks]
    network.norm = nn.LayerNorm(network.channels, EPS, elementwise_affine=False)
    return network


@torch.inference_mode()
def scored_images(network: Any, pairs: list) -> list[Scored]:
    """The images that are scored, with their features."""
    side = -(-SIDE // network.patch) * network.patch  # rounded up: 322 for patches of 14
    found = []
    for pair in pairs:
        picture, label = read_pair(*pair, side=side)
        x = to_tensor(picture)[None]
        found.append(Scored(network(torch.cat([x, x.flip(-1)])).half(), picture, np.asarray(label)))
    return found


@torch.inference_mode()
def score(
    methods: dict[str, Method], images: list[Scored], classes: int, crf: bool
) -> dict[str, list[float]]:
    """{name: mIoU and accuracy in percent}; all have one lattice of the CRF."""
    confusion = {name: np.zeros((classes, len(method.centers)), np.int64) for name, method in methods.items()}
    for features, picture, label in images:
        described = [described_by(method, features.float()) for method in methods.values()]
        masks = segment(picture, described, crf=crf)
        for counts, mask in zip(confusion.values(), masks):
            counts += confusion_matrix(label, mask, n_classes=classes, n_clusters=counts.shape[1])
    found = {}
    for name, counts in confusion.items():
        result = measure(counts, match_clusters(counts))
        found[name] = [100 * result["miou"], 100 * result["accuracy"]]
    return found


def described_by(method: Method, features: Tensor) -> tuple[Tensor, Probe]:
    """Codes (1, D, h, w) from features (2, C, h, w) of an image and its mirror image, and the probe in this image."""
    plain, mirrored = method.on_map(features).chunk(2)  # (1, D, h, w) each
    codes = (plain + mirrored.flip(-1)) / 2
    return codes, Probe(method.centers, adaptation=method.adaptation).adapted(codes)


def raw_kmeans(cache: TokenCache, config: Config) -> Method:
    """A baseline: k-means on the backbone's features, with the evenness and the adaptation of a config."""
    torch.manual_seed(config.seed)
    return Method(nn.Identity(), cluster_codes(unit, cache, config)[0], config.adaptation)


def fitted(cache: TokenCache, config: Config) -> Method:
    """A head trained and clustered as `Stego.fit` does it."""
    torch.manual_seed(config.seed)
    neighbors = nearest_neighbors(cache.means, cache.images)
    config = replace(config, **shifts_from_data(cache, neighbors, config))
    head, _ = train_head(cache, neighbors, config)
    torch.manual_seed(config.seed)
    return Method(head.on_map, cluster_codes(head.describe, cache, config)[0], config.adaptation)


def run_set(network: Any, split: Split, variants: dict[str, Config], seeds: int, crf: bool) -> Row:
    """The scores of each method; the baselines have the views, evenness and adaptation of the first variant."""
    images = scored_images(network, split.scored)
    caches: dict[str | None, TokenCache] = {}
    for config in variants.values():
        torch.manual_seed(0)  # a bounded cache keeps random positions
        if config.views not in caches:
            caches[config.views] = encode(network, split.images, config)
    rows: dict[tuple[str, bool], list] = {}
    for seed in range(seeds):
        methods = fit_methods(caches, variants, seed)
        for sharp in (False, True) if crf else (False,):
            for name, values in score(methods, images, split.classes, sharp).items():
                rows.setdefault((name, sharp), []).append(values)
    return {key: np.array(values) for key, values in rows.items()}  # (seeds, 2) each


def fit_methods(caches: dict, variants: dict[str, Config], seed: int) -> dict[str, Method]:
    """Both baselines and the variants, fitted with a seed."""
    first = replace(next(iter(variants.values())), seed=seed)
    cache = caches[first.views]
    plain = raw_kmeans(cache, replace(first, evenness=0.0, adaptation=0.0))
    methods = {PLAIN: plain, SAME: raw_kmeans(cache, first)}
    for name, config in variants.items():
        methods[name] = fitted(caches[config.views], replace(config, seed=seed))
    return methods


def chosen(network: Any, presets: bool, **settings: Any) -> dict[str, Config]:
    """{method: config}: the default of the backbone, or every published set of hyper-parameters."""
    names = [name for name in PRESETS if name != "default"] if presets else ["default"]
    configs = {}
    for name in names:
        config = fit_config(name, backbone=network.name, **settings)
        configs["stego" if name == "default" else name] = config.on_backbone(network.name)
    return configs


def ratios(rows: Row, key: tuple[str, bool]) -> tuple[float, float]:
    """mIoU of a method over that of plain k-means, and over that of the better baseline."""
    crf = key[1]
    miou = rows[key][:, 0].mean()
    plain = rows[PLAIN, crf][:, 0].mean()
    same = rows[SAME, crf][:, 0].mean()
    return miou / plain, miou / max(plain, same)


def print_rows(name: str, rows: Row) -> None:
    """A line for each method: mIoU, its deviation, accuracy, both ratios."""
    for key, values in rows.items():
        miou, accuracy = values.mean(0)
        to_plain, to_better = ratios(rows, key)
        print_line(name, key, (miou, values[:, 0].std(), accuracy, to_plain, to_better))


def print_means(tables: list[Row]) -> None:
    """The same, means over the sets, and the least ratio to the better baseline."""
    for key in tables[0]:
        miou, accuracy = np.mean([rows[key] for rows in tables], (0, 1))
        spread = np.mean([rows[key][:, 0].std() for rows in tables])
        both = np.array([ratios(rows, key) for rows in tables])  # (sets, 2)
        print_line("mean", key, (miou, spread, accuracy, *both.mean(0)), f", at least {both[:, 1].min():.3f}")


def print_line(name: str, key: tuple[str, bool], values: tuple, ending: str = "") -> None:
    method, crf = key
    miou, spread, accuracy, to_plain, to_better = values
    print(
        f"{name:12} {method + ' + CRF' * crf:24} {miou:6.2f} {spread:5.2f} {accuracy:9.2f} {to_plain:8.3f} "
        f"{to_better:9.3f}{ending}",
        flush=True,
    )


def load_network(backbone: str, blocks: int | None) -> Any:
    """The network that NAME or NAME=FILE says, cut after some blocks."""
    name, _, weights = backbone.partition("=")
    network = load_backbone(name, weights=weights or None)
    return cut(network, blocks) if blocks else network


@click.command()
@click.option(
    "--data", default="../shared/data", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--sets", default=",".join(SETS), help="Any of these, or other folders of DATA.")
@click.option("--seeds", default=3)
@click.option("--backbone", default="tiny", help="A backbone's name, or NAME=FILE with its weights.")
@click.option("--blocks", type=int, help="Of a transformer, how many blocks.")
@click.option("--crf/--no-crf", default=True, help="Score with the CRF as well.")
@click.option("--presets", is_flag=True, help="The published hyper-parameters in place of the default.")
@click.option("--steps", type=int)
@click.option("--batch-size", type=int)
def main(
    data: Path,
    sets: str,
    seeds: int,
    backbone: str,
    blocks: int | None,
    crf: bool,
    presets: bool,
    **overrides: Any,
) -> None:
    network = load_network(backbone, blocks)
    print(f"{backbone}, {blocks or 'all'} blocks, seeds 0 to {seeds - 1}, percent")
    print(f"{'set':12} {'method':24} {'mIoU':>6} {'+-':>5} {'accuracy':>9} {'/ plain':>8} {'/ better':>9}")
    tables = []
    for name in sets.split(","):
        began = time.monotonic()
        split = split_of(data, name)
        variants = chosen(network, presets, clusters=split.classes, **overrides)
        tables.append(run_set(network, split, variants, seeds, crf))
        print_rows(name, tables[-1])
        seconds = time.monotonic() - began
        print(
            f"{name:12} fitted on {len(split.images)} images, scored on {len(split.scored)}; {seconds:.0f} s"
        )
    print_means(tables)


if __name__ == "__main__":
    main()
