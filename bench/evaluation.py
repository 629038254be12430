"""What does an evaluation cost beyond the backbone, and what does one lattice for all rows of its table save?

    python bench/evaluation.py --data ../shared/data [--set camvid] [--images 24] [--threads 1] [--rounds 3]

Takes val images of a labelled set in turn: the backbone alone on every image and its mirror image, already in memory
as tensors; the whole evaluation without CRF from the files, target at most 1.3 times that: reading, both features,
four probes (clusters and linear, codes and raw features), upsampling, confusion matrices; then with the CRF, with a
lattice for each probe, and as it is, one for all. All alternate. Prints medians over rounds of processor seconds,
and ratios. The head, centres and probes are random.
"""

import sys
import time
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli_parts import evaluation as protocol
from cli_parts.evaluation import Probe, class_maps, confusions
from cli_parts.labels import folder_set
from stego import Head, Stego, fit_config, unit
from stego_parts.backbones import load_backbone
from stego_parts.features import to_tensor


def random_model(network, classes: int) -> Stego:
    config = fit_config(classes=classes, backbone=network.name)
    head = Head(network.channels, config.code_size).requires_grad_(False).eval()
    centers = unit(torch.randn(classes, config.code_size))
    model = Stego(config, head, centers, torch.ones(classes) / classes, backbone_sha256=network.sha256)
    model._backbone = network
    return model


def random_probes(model, classes: int) -> dict:
    sizes = {"stego": model.config.code_size, "backbone": model.backbone.channels}
    biases = {"cluster": None, "linear": torch.zeros(classes)}
    return {
        (features, probe): Probe(unit(torch.randn(classes, size)), bias)
        for features, size in sizes.items()
        for probe, bias in biases.items()
    }


def each_alone(features: dict, probes: dict, size, image=None) -> dict:
    """`class_maps` with a lattice for each probe."""
    maps = (class_maps(features, {key: probe}, size, image) for key, probe in probes.items())
    return dict(item for each in maps for item in each.items())


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
    folder, network = data / name, load_backbone(backbone)
    labelled = folder_set(folder / "images/val", folder / "labels/val", names=folder / "classes.txt")
    labelled.pairs = labelled.pairs[:images]
    model, inputs = random_model(network, len(labelled.classes)), []
    probes = random_probes(model, len(labelled.classes))
    for i in range(len(labelled.pairs)):
        x = to_tensor(labelled.read(i)[0])[None]
        inputs.append(torch.cat([x, x.flip(-1)]))

    def evaluation(crf: bool, maps=class_maps):
        protocol.class_maps = maps
        confusions(model, labelled, probes, crf=crf)

    stages = {
        "backbone alone": lambda: [network(x) for x in inputs],
        "without CRF": lambda: evaluation(False),
        "with CRF, each alone": lambda: evaluation(True, each_alone),
        "with CRF": lambda: evaluation(True),
    }
    times = {stage: [] for stage in stages}
    for _ in range(rounds):
        for stage, run in stages.items():
            began = time.process_time()
            run()
            times[stage].append(time.process_time() - began)
    medians = {stage: float(np.median(each)) for stage, each in times.items()}
    print(f"{len(inputs)} images of {name}, {backbone}, {threads} thread(s), medians of {rounds}")
    for stage, seconds in medians.items():
        print(f"{stage:21}{seconds:7.1f} s")
    print(f"without CRF / backbone alone {medians['without CRF'] / medians['backbone alone']:.2f}")
    print(f"with CRF / each alone       {medians['with CRF'] / medians['with CRF, each alone']:.2f}")


if __name__ == "__main__":
    main()
