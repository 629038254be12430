"""The paper's ablations on labelled folders: Table 2 (0-clamp, five-crop, centering, CRF), Table 5 (terms of the loss).

    python bench/paper/ablation.py --data ../shared/data [--sets camvid,aerial,natural] [--seeds 3] [--json FILE]

For each set DATA/<name>/{images,labels}/{train,val} with classes.txt: features are computed once for each way of
cutting images up and shared by all rows; a row trains a head with its switches and scores it on val by the 320
protocol: clusters without labels, and a linear probe on the train labels. The b's are taken from the data, as the
published ones suit DINO; clusters are plain cosine k-means, but for the row of `stego fit`'s own default. Results go
to the JSON file as they come, seed by seed, and those in it are not computed again. Prints both tables in Markdown:
accuracy / mIoU in percent, means of the seeds (standard deviation).
"""

import json
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from cli_parts.evaluation import (
    Probe,
    class_maps,
    confusion_matrix,
    linear_probe,
    match_clusters,
    probe_rows,
    scores,
)
from cli_parts.labels import folder_set
from stego import cluster_codes, nearest_neighbors, shifts_from_data, train_head, unit
from stego_parts.backbones import load_backbone
from stego_parts.clusters import pixels, unmirror
from stego_parts.config import Config, fit_config
from stego_parts.features import encode, to_tensor
from stego_parts.files import find_images, replacing

PAPER = dict(evenness=0.0, views="five")  # what the paper's whole method has and `fit`'s default has not
TABLE_2 = {  # {row: options of fit}; the last but one is scored with the CRF as well
    "features alone": None,
    "STEGO, none of them": dict(PAPER, views="whole", zero_clamp=False, centering=False),
    "+ 0-clamp": dict(PAPER, views="whole", centering=False),
    "+ 5-crop": dict(PAPER, centering=False),
    "+ centering": PAPER,
    "default of `stego fit`": {},
}
FULL, CRF = "+ centering", "+ CRF"
TABLE_5 = {
    "all three": PAPER,
    "without self": dict(PAPER, lambda_self=0.0),
    "without KNN": dict(PAPER, lambda_knn=0.0),
    "without random": dict(PAPER, lambda_rand=0.0),
    "self alone": dict(PAPER, lambda_knn=0.0, lambda_rand=0.0),
    "KNN alone": dict(PAPER, lambda_self=0.0, lambda_rand=0.0),
    "random alone": dict(PAPER, lambda_self=0.0, lambda_knn=0.0),
}
SAME = {"all three": FULL}  # rows of Table 5 that are rows of Table 2
PUBLISHED = {
    "STEGO, none of them": 7.3,
    "+ 0-clamp": 21.3,
    "+ 5-crop": 23.4,
    "+ centering": 24.0,
    "+ CRF": 24.5,
}
PAPERS = "paper (ViT-S/8, CocoStuff)"  # its unsupervised mIoU; rows of other backbones need weights and are left out


class LabelledFeatures:
    """The backbone's features of a set, each kind computed when first asked for."""

    def __init__(self, folder: Path, network):
        self.folder, self.network = folder, network
        self.classes = (folder / "classes.txt").read_text().split()

    @cache
    def tokens(self, views: str):
        torch.manual_seed(0)  # encode keeps random positions
        paths = [path for path, _ in find_images(self.folder / "images/train")]
        return encode(self.network, paths, Config(views=views))

    @cache
    def val(self):
        names = self.folder / "classes.txt"
        labelled = folder_set(self.folder / "images/val", self.folder / "labels/val", names=names)
        pairs = (labelled.read(i) for i in range(len(labelled.pairs)))
        with torch.inference_mode():
            return [(self._both(image), image, label) for image, label in pairs]

    def _both(self, image):
        """Features of an image and its mirror image (2, C, h, w)."""
        x = to_tensor(image)[None]
        return self.network(torch.cat([x, x.flip(-1)])).half()

    @cache
    def train_rows(self):
        train = folder_set(
            self.folder / "images/train", self.folder / "labels/train", names=self.folder / "classes.txt"
        )
        return probe_rows(SimpleNamespace(backbone=self.network, device="cpu"), train)


def fit_head(cache, config: Config):
    """A head trained as `stego fit` does it."""
    neighbors = nearest_neighbors(cache.means)
    return train_head(cache, neighbors, replace(config, **shifts_from_data(cache, neighbors, config)))[0]


@torch.inference_mode()
def scored(data: LabelledFeatures, code_map, centers, probe, *, crf: bool) -> tuple:
    """Accuracy and mIoU in percent of clusters, and of the linear probe."""
    n, side = len(data.classes), {"cluster": len(centers), "linear": len(data.classes)}
    confusion = {kind: np.zeros((n, columns), np.int64) for kind, columns in side.items()}
    probes = {("codes", "cluster"): Probe(centers), ("codes", "linear"): probe}
    for features, image, label in data.val():
        codes, picture = unmirror(code_map(features.float())), pixels(image) if crf else None
        maps = class_maps({"codes": codes}, probes, label.shape, picture)
        for kind in side:
            mask = maps["codes", kind, crf]
            confusion[kind] += confusion_matrix(label, mask, n_classes=n, n_clusters=side[kind])
    results = (
        scores(confusion["cluster"], match_clusters(confusion["cluster"])),
        scores(confusion["linear"], np.arange(n)),
    )
    return tuple(100 * result[key] for result in results for key in ("accuracy", "miou"))


def run_row(data: LabelledFeatures, row: str, options: dict | None, steps: int, seed: int) -> dict:
    """{row: scores} of one row and seed; the whole method's with the CRF too."""
    config = fit_config(
        classes=len(data.classes), seed=seed, steps=steps, **(PAPER if options is None else options)
    )
    tokens, (rows, shares) = data.tokens(config.views), data.train_rows()
    torch.manual_seed(seed)
    head = unit if options is None else fit_head(tokens, config)
    centers = cluster_codes(head, tokens, config)[0]
    with torch.inference_mode():
        codes = rows if options is None else torch.cat([head(part.float()) for part in rows.split(65536)])
    probe = linear_probe(codes.clone(), shares, seed=seed)
    code_map = (lambda features: features) if options is None else head.on_map
    found = {row: scored(data, code_map, centers, probe, crf=False)}
    if row == FULL:
        found[CRF] = scored(data, code_map, centers, probe, crf=True)
    return found


def table(title: str, rows, sets, results: dict, *, published=None) -> list[str]:
    """A Markdown table: accuracy / mIoU, each as mean (standard deviation) over seeds, for each set."""
    columns = [f"{name}, {kind}" for name in sets for kind in ("unsupervised", "linear probe")]
    columns += [PAPERS] if published else []
    lines = [f"**{title}**", "", "| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        cells = []
        for name in sets:
            seeds = [
                value
                for key, value in results.items()
                if key.rsplit("/", 1)[0] == f"{name}/{SAME.get(row, row)}"
            ]
            values = list(zip(np.mean(seeds, 0), np.std(seeds, 0))) if seeds else [(np.nan, np.nan)] * 4
            texts = [f"{mean:.1f} ({spread:.1f})" for mean, spread in values]
            cells += [" / ".join(texts[:2]), " / ".join(texts[2:])]
        cells += [str(published.get(row, "-"))] if published else []
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


@click.command()
@click.option("--data", default="../shared/data", type=Path)
@click.option("--sets", default="camvid,aerial,natural")
@click.option("--seeds", default=3)
@click.option("--steps", default=300)
@click.option("--backbone", default="tiny")
@click.option("--json", "file", default="ablation.json", type=Path)
def main(data, sets, seeds, steps, backbone, file):
    network, sets = load_backbone(backbone), sets.split(",")
    setting = dict(backbone=network.sha256, steps=steps)
    state = json.loads(file.read_text()) if file.exists() else dict(setting, results={})
    if setting != {key: state[key] for key in setting}:
        raise click.UsageError(
            f"{file} is of another backbone or number of steps; name another file with --json."
        )
    features = {name: LabelledFeatures(data / name, network) for name in sets}
    todo = TABLE_2 | {row: options for row, options in TABLE_5.items() if row not in SAME}
    for seed in range(seeds):
        for name in sets:
            for row, options in todo.items():
                if f"{name}/{row}/{seed}" in state["results"]:
                    continue
                began, found = time.monotonic(), run_row(features[name], row, options, steps, seed)
                state["results"] |= {f"{name}/{each}/{seed}": values for each, values in found.items()}
                with replacing(file) as part:
                    part.write_text(json.dumps(state, indent=1))
                print(f"{name} {seed} {found} {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    rows = list(TABLE_2)
    rows.insert(rows.index(FULL) + 1, CRF)
    print(
        "\n".join(
            [
                *table("Table 2", rows, sets, state["results"], published=PUBLISHED),
                "",
                *table("Table 5", TABLE_5, sets, state["results"]),
            ]
        )
    )


if __name__ == "__main__":
    main()
