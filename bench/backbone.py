"""How good are a backbone's raw features, and how fast? (The protocol of `eval`: train on train, score on val.)

    python bench/backbone.py tiny [dino_vits8 ...] --data ../shared/data [--sets camvid,aerial,natural] [--seeds 3]

A name may be followed by a weight file, tiny=FILE.

For each labelled set DATA/<name>/{images,labels}/{train,val}: a linear probe, and cosine k-means with as many clusters
as classes and Hungarian matching (mean over seeds). Printed in percent, accuracy / mIoU, with the baselines in the same
table: the same network before any training, colour and position, and a dictionary of image patches (256 atoms of
whitened 8 x 8 patches, triangle activations, four scales, 128 principal components). Then milliseconds an image of
320 x 320 as a ratio to dino_vits8's layout with random weights, measured in turn in this run.
"""

import math
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
from pretrain import IMAGE_SIDE, find_images, learn_dictionary
from pretrain import square as square_tensor

from cli_parts.evaluation import PROBE_ROWS, class_shares, linear_probe
from cli_parts.labels import SIDE, folder_pairs, read_pair
from cli_parts.scores import confusion_matrix, match_clusters, measure
from kmeans import CosineKMeans
from stego_parts.backbones import BACKBONES, TINY_FILE, ViT, checkpoint_path, load_backbone
from stego_parts.clusters import Probe, mirror_averaged, upsampled_argmax
from stego_parts.features import to_tensor
from stego_parts.tiny import Detail, Dictionary

UNLABELLED = (
    "unlabelled",
    "camvid/images/train",
    "aerial/images/train",
    "natural/images/train",
    "natural_coco/images/train",
)  # what tiny and the dictionary are learned from
DICTIONARY_IMAGES = 2000  # a dictionary of 256 atoms needs no more
KMEANS_ROWS = 200_000  # positions of the train images that k-means is fitted on


# ---- baselines -------------------------------------------------------------------------------------------------


class ColourAndPosition(nn.Module):
    """Mean colour of a square of 8 x 8 pixels, and where it lies in the image."""

    patch, channels = 8, 5

    def forward(self, x: Tensor) -> Tensor:
        colour = F.avg_pool2d(x, self.patch)  # (B, 3, h, w)
        y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in colour.shape[2:]), indexing="ij")
        return torch.cat([colour, torch.stack([y, x]).expand(len(colour), -1, -1, -1)], 1)  # (B, 5, h, w)


def untrained(seed: int = 0) -> Detail:
    """The bundled network as it is before it has seen an image: random atoms, trunk and head."""
    torch.manual_seed(seed)
    network = Detail()
    for name, buffer in network.dictionary.named_buffers():
        if name in ("whiten", "atom", "project"):
            buffer.normal_(std=buffer[0].numel() ** -0.5)
    return network


def dictionary_backbone(data: Path, *, seed: int = 0) -> Dictionary:
    """The patch dictionary of the table, a backbone of 128 channels learned from images that tiny was learned from."""
    paths = find_images([data / name for name in UNLABELLED])
    paths = [paths[i] for i in np.linspace(0, len(paths) - 1, min(DICTIONARY_IMAGES, len(paths))).astype(int)]
    images = torch.stack([square_tensor(path, IMAGE_SIDE) for path in paths])
    return learn_dictionary(images, Dictionary(256, 128), whitened=False, seed=seed)


# ---- probes ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def features(network, folder: Path, split: str, *, mirror: bool):
    """Features (N, C, h, w) float16 and label maps [(SIDE, SIDE) uint8] of a split."""
    maps, labels = [], []
    for pair in folder_pairs(folder / "images" / split, folder / "labels" / split):
        image, label = read_pair(*pair, side=math.ceil(SIDE / network.patch) * network.patch)
        x = to_tensor(image)[None]
        seen = mirror_averaged(x, network, nn.Identity())[0] if mirror else network(x)  # (1, C, h, w)
        maps.append(seen.half())
        labels.append(label)
    return torch.cat(maps), labels


def train_rows(maps: Tensor, labels, classes: int, patch: int):
    """Features (n, C) and shares of classes (n, classes) of at most PROBE_ROWS positions, drawn at random."""
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    shares = torch.cat([class_shares(label, classes, patch) for label in labels])
    kept = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:PROBE_ROWS]
    return rows[kept], shares[kept]


def percent(maps: Tensor, labels, classes: int, weight: Tensor, bias: Tensor | None = None) -> np.ndarray:
    """(accuracy, mIoU) in percent of a linear probe, or without bias of clusters after Hungarian matching."""
    confusion = np.zeros((classes, classes), np.int64)
    for x, label in zip(maps, labels):
        scores = Probe(weight, bias).dot_products(x[None].float())[0]  # (classes, h, w)
        mask = upsampled_argmax(scores, *label.shape)
        confusion += confusion_matrix(label, mask, n_classes=classes, n_clusters=classes)
    result = measure(confusion, match_clusters(confusion) if bias is None else np.arange(classes))
    return 100 * np.array([result["accuracy"], result["miou"]])


def measure_both(network, folder: Path, seeds: int):
    """Linear probe and k-means, each (accuracy, mIoU) in percent, on one labelled set."""
    classes = len((folder / "classes.txt").read_text().split())
    maps, labels = features(network, folder, "train", mirror=False)
    rows, shares = train_rows(maps, labels, classes, network.patch)
    val = features(network, folder, "val", mirror=True)
    sample, clusters = rows[:KMEANS_ROWS].float(), []
    for seed in range(seeds):
        clusters.append(percent(*val, classes, CosineKMeans(classes, seed=seed).fit(sample).cluster_centers_))
    return percent(*val, classes, *linear_probe(rows, shares)[:2]), np.mean(clusters, 0)


# ---- speed -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def milliseconds(networks: dict, rounds: int = 5) -> dict:
    """Median time of one 320 x 320 image for each network, taken in turn so that a busy spell hits all alike."""
    times = {name: [] for name in networks}
    for _ in range(rounds + 1):  # the first round warms up
        for name, network in networks.items():
            side = SIDE // network.patch * network.patch
            x, began = torch.randn(1, 3, side, side), time.perf_counter()
            network(x)
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def file_size(name: str) -> str:
    path = TINY_FILE if name == "tiny" else checkpoint_path(name) if name in BACKBONES else None
    return f"{path.stat().st_size / 1e6:.1f}" if path and path.exists() else "-"


def print_quality(networks: dict, data: Path, sets, seeds: int):
    print("Linear probe and cosine k-means on raw features, accuracy / mIoU in percent\n")
    columns = [f"{name} {what}" for name in sets for what in ("linear", "k-means")]
    print("| backbone | " + " | ".join(columns) + " | mean mIoU linear, k-means |")
    print("|---" * (len(columns) + 2) + "|")
    for name, network in networks.items():
        found = np.array([measure_both(network, data / folder, seeds) for folder in sets])  # (sets, 2, 2)
        cells = [f"{accuracy:.1f} / {miou:.1f}" for accuracy, miou in found.reshape(-1, 2)]
        print(
            f"| {name} | " + " | ".join(cells) + " | {:.1f}, {:.1f} |".format(*found[:, :, 1].mean(0)),
            flush=True,
        )


@click.command()
@click.argument("names", nargs=-1)
@click.option(
    "--data", default="../shared/data", show_default=True, type=click.Path(exists=True, path_type=Path)
)
@click.option("--sets", default="camvid,aerial,natural", show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Runs of k-means that are averaged.")
@click.option("--no-baselines", is_flag=True)
@click.option("--only", type=click.Choice(["quality", "speed"]))
def main(names, data, sets, seeds, no_baselines, only):
    """Table of the backbones NAMES (default tiny) and the baselines."""
    networks = {
        name: load_backbone(*name.split("=")[:1], weights=name.partition("=")[2] or None)
        for name in names or ("tiny",)
    }
    reference = ViT(BACKBONES["dino_vits8"]).eval()
    if not no_baselines:
        networks |= {
            "tiny_detail, untrained": untrained(),
            "dictionary": dictionary_backbone(data),
            "colour and position": ColourAndPosition(),
        }
    if only != "speed":
        print_quality(networks, data, sets.split(","), seeds)
    if only != "quality":
        times = milliseconds({**networks, "dino_vits8 layout": reference})
        print("\n| backbone | ms an image | share of dino_vits8 | file, MB |\n|---|---|---|---|")
        for name, value in times.items():
            print(f"| {name} | {value:.0f} | {value / times['dino_vits8 layout']:.2f} | {file_size(name)} |")
        print(f"\n320 x 320, CPU, {torch.get_num_threads()} thread(s), medians of 5")


if __name__ == "__main__":
    main()
