"""What does an evaluation cost beyond the backbone, and what does one lattice for all rows of its table save?

    python bench/evaluation.py --data ../shared/data [--set camvid] [--images 24] [--threads 1] [--rounds 3]

Takes val images of a labelled set in turn: the backbone alone on every image and its mirror image, already in memory
as tensors; the whole evaluation without CRF from the files, target at most 1.3 times that: reading, both features,
four probes (clusters and linear, codes and raw features), upsampling, confusion matrices; then with the CRF, with a
lattice for each probe, and as it is, one for all. All alternate. Prints medians over rounds of processor seconds,
and ratios. The head, centres and probes are random.
"""

from pathlib import Path

import click
import numpy as np
import torch
from common import network_of, random_model, seconds

from cli_parts import evaluation
from cli_parts.evaluation import confusions, masks_of
from cli_parts.labels import folder_set
from stego import unit
from stego_parts.clusters import Probe
from stego_parts.features import to_tensor


def random_probes(model, classes: int) -> dict:
    sizes = {"stego": model.config.code_size, "backbone": model.backbone.channels}
    probes = {}
    for features, size in sizes.items():
        probes[features, "cluster"] = Probe(unit(torch.randn(classes, size)))
        probes[features, "linear"] = Probe(unit(torch.randn(classes, size)), torch.zeros(classes))
    return probes


def each_alone(features: dict, probes: dict, image, *, crf: bool) -> dict:
    """`masks_of` with a lattice for each probe."""
    masks = {}
    for key, probe in probes.items():
        masks |= masks_of(features, {key: probe}, image, crf=crf)
    return masks


@click.command()
@click.option("--data", default="../shared/data", type=Path)
@click.option("--set", "name", default="camvid")
@click.option("--backbone", default="tiny")
@click.option("--images", default=24)
@click.option("--threads", default=1)
@click.option("--rounds", default=3)
@torch.inference_mode()
def main(data, name, backbone, images, threads, rounds):
    torch.set_num_threads(threads)
    folder = data / name
    network = network_of(backbone)
    labelled = folder_set(folder / "images/val", folder / "labels/val", names=folder / "classes.txt")
    labelled.pairs = labelled.pairs[:images]
    model = random_model(network, len(labelled.classes))
    probes = random_probes(model, len(labelled.classes))
    inputs = []
    for i in range(len(labelled.pairs)):
        x = to_tensor(labelled.read(i)[0])[None]
        inputs.append(torch.cat([x, x.flip(-1)]))

    def whole(crf: bool, masks=masks_of):
        evaluation.masks_of = masks
        confusions(model, labelled, probes, crf=crf)

    stages = {
        "backbone alone": lambda: [network(x) for x in inputs],
        "without CRF": lambda: whole(False),
        "with CRF, each alone": lambda: whole(True, each_alone),
        "with CRF": lambda: whole(True),
    }
    times = {stage: [] for stage in stages}
    for _ in range(rounds):
        for stage, run in stages.items():
            times[stage].append(seconds(run)[1])
    medians = {stage: float(np.median(each)) for stage, each in times.items()}
    print(f"{len(inputs)} images of {name}, {backbone}, {threads} thread(s), medians of {rounds}")
    for stage, median in medians.items():
        print(f"{stage:21}{median:7.1f} s")
    print(f"without CRF / backbone alone {medians['without CRF'] / medians['backbone alone']:.2f}")
    print(f"with CRF / each alone       {medians['with CRF'] / medians['with CRF, each alone']:.2f}")


if __name__ == "__main__":
    main()
