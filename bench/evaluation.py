"""What does an evaluation without CRF cost beyond the backbone? (Target: at most 1.3 times the backbone's own time.)

    python bench/evaluation.py --data ../shared/data [--set camvid] [--backbone tiny] [--threads 2] [--rounds 3]

Takes the val images of a labelled set in turn: the backbone alone on every image and its mirror image, already in
memory as tensors, then the whole evaluation from the files: reading, both features, four probes (clusters and linear,
codes and raw features), upsampling, confusion matrices. Prints medians over rounds of seconds, and the ratio. The
head, centres and probes are random: timing needs no fitted ones.
"""

import sys
import time
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stego import Head, Stego, fit_config, unit  # noqa: E402
from stego_parts.backbones import load_backbone  # noqa: E402
from stego_parts.datasets import folder_set  # noqa: E402
from stego_parts.images import to_tensor  # noqa: E402
from stego_parts.protocol import Probe, confusions  # noqa: E402


def random_model(network, classes: int) -> Stego:
    config = fit_config(classes=classes) | {"backbone": network.name}
    head = Head(network.channels, config["code_size"]).requires_grad_(False).eval()
    centers = unit(torch.randn(classes, config["code_size"]))
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


@click.command()
@click.option("--data", default="../shared/data", type=Path)
@click.option("--set", "name", default="camvid")
@click.option("--backbone", default="tiny")
@click.option("--threads", default=2)
@click.option("--rounds", default=3)
@torch.inference_mode()
def main(data, name, backbone, threads, rounds):
    torch.set_num_threads(threads)
    folder, network = data / name, load_backbone(backbone)
    labelled = folder_set(folder / "images/val", folder / "labels/val", names=folder / "classes.txt")
    classes = len(labelled.classes)
    model, inputs = random_model(network, classes), []
    probes = random_probes(model, classes)
    for i in range(len(labelled.pairs)):
        x = to_tensor(labelled.read(i)[0])[None]
        inputs.append(torch.cat([x, x.flip(-1)]))
    times = {"backbone": [], "evaluation": []}
    for _ in range(rounds):
        began = time.perf_counter()
        for x in inputs:
            network(x)
        middle = time.perf_counter()
        confusions(model, labelled, probes, crf=False)
        times["backbone"].append(middle - began)
        times["evaluation"].append(time.perf_counter() - middle)
    alone, whole = (float(np.median(values)) for values in times.values())
    print(f"{len(inputs)} images of {name}, {backbone}, {threads} thread(s), medians of {rounds}")
    print(f"backbone alone {alone:.1f} s, evaluation without CRF {whole:.1f} s: ratio {whole / alone:.2f}")


if __name__ == "__main__":
    main()
