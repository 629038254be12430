"""What does a GPU do for fit and predict, and how much of what it can do is used?

    python bench/gpu.py --images DATA/camvid/images/train [--limit 400] [--backbones dinov2_vits14,dino_vitb8]

The ceiling is the card's rate in a large bfloat16 matrix product. A backbone's share of it counts the products of its
transformer alone, at the batch of `fit` and at the mirrored pair of `predict`, in the default precision (float16) and
in the exact one (float32). Then the stages of a fit, and predictions from file to mask with and without the CRF, on the
device and on the CPU with all its threads, as images or steps a second and as ratios; the CPU sees --cpu-limit of the
images. Weights are random but for tiny: they do not change the time.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from common import network_of, random_model

from cli_parts.outputs import Job, Writer
from crf import dense_crf
from stego import Stego, cluster_codes, nearest_neighbors, shifts_from_data, train_head
from stego_parts.backbones import BACKBONES
from stego_parts.clusters import pixels
from stego_parts.config import fit_config
from stego_parts.features import GPU_IMAGES, RESOLUTION, dense_features, encode, input_size
from stego_parts.files import find_images
from stego_parts.images import read_image

SIDE = 8192  # of the matrices whose product is the ceiling
PHOTO = (480, 640)  # (H, W), pixels: of the CRF's image and of what a backbone sees a smaller copy of
CLUSTERS = 27
PREDICTED = 100  # images
ROUNDS = 5


def finish(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: str, rounds: int = ROUNDS) -> float:
    """The best of several calls on the clock, after one to warm up."""
    function()
    finish(device)
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        finish(device)
        found.append(time.perf_counter() - began)
    return min(found)


def ceiling(device: str, side: int) -> float:
    """FLOP a second of a product of two bfloat16 matrices."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    calls = 10
    return 2 * side**3 * calls / seconds(lambda: [a @ a for _ in range(calls)], device)


def transformer_flops(network: Any, h: int, w: int) -> float:
    """FLOP of the products in a transformer for one image of h x w patches."""
    spec = BACKBONES[network.name]
    n = network.prefix + h * w
    c = spec.channels
    block = 24 * n * c**2 + 4 * n**2 * c  # qkv, projection and both of the MLP; both of attention
    return spec.depth * block + 2 * h * w * c * 3 * spec.patch**2


@torch.inference_mode()
def backbone_rows(name: str, device: str, top: float) -> None:
    """Images a second of a backbone, and its share of the ceiling."""
    network = network_of(name).to(device)
    height, width = input_size(PHOTO, network.patch)
    flops = transformer_flops(network, height // network.patch, width // network.patch)
    for batch in (2, GPU_IMAGES):
        x = torch.randn(batch, 3, height, width, device=device)
        for exact in (False, True):
            took = seconds(lambda: dense_features(network, x, device, exact=exact), device)
            rate = batch / took
            precision = "float32" if exact else "default"
            print(
                f"{name}, {height} x {width}, batch {batch}, {precision}: {rate:.1f} images/s, "
                f"{rate * flops / 1e12:.1f} TFLOP/s, {rate * flops / top:.1%} of the ceiling",
                flush=True,
            )


def clocked(function: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What one call returns, and its seconds."""
    finish(device)
    began = time.perf_counter()
    result = function()
    finish(device)
    return result, time.perf_counter() - began


def stages(network: Any, paths: list, steps: int, device: str) -> dict[str, float]:
    """{stage: images or steps a second, or seconds} of a fit."""
    config = fit_config(clusters=CLUSTERS, steps=steps).on_backbone(network.name)
    encode(network, paths[:16], config, device=device)  # warm up
    cache, features = clocked(lambda: encode(network, paths, config, device=device), device)
    neighbors = nearest_neighbors(cache.means, cache.images, device=device)
    config = replace(config, **shifts_from_data(cache, neighbors, config))
    train_head(cache, neighbors, replace(config, steps=20))
    (head, _), training = clocked(lambda: train_head(cache, neighbors, config), device)
    _, clusters = clocked(lambda: cluster_codes(head.describe, cache, config), device)
    return {
        "features, images/s": len(paths) / features,
        "training, steps/s": steps / training,
        "k-means, fits/s": 1 / clusters,
    }


def on_device(model: Stego, device: str) -> Stego:
    """A copy of a model on a device."""
    there = Stego(
        model.config, copy.deepcopy(model.head), model.centers, model.share, backbone_sha256="", device=device
    )
    there._backbone = copy.deepcopy(model._backbone).to(device)
    return there


def predictions(network: Any, paths: list, device: str) -> dict[str, float]:
    """{what: images a second} of `stego predict`, from files to masks, start-up not counted."""
    model = on_device(random_model(network, CLUSTERS), device)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(path, Path(path.name), {"mask": Path(folder) / f"{path.stem}.png"}) for path in paths]
        for crf in (False, True):
            writer = Writer(model, "mask", None, 0, {"crf": crf, "resolution": RESOLUTION, "smooth": False})
            list(writer.results(jobs[:4]))
            _, took = clocked(lambda: list(writer.results(jobs)), device)
            found[f"predict{', CRF' if crf else ''}, images/s"] = len(jobs) / took
    return found


def crf_rates(path: Path, device: str) -> dict[str, float]:
    """{what: images a second} of the CRF alone."""
    image = pixels(read_image(path).resize(PHOTO[::-1])).to(device)
    torch.manual_seed(0)
    scores = torch.randn(CLUSTERS, *PHOTO).to(device)
    return {"CRF alone, images/s": 1 / seconds(lambda: dense_crf(image, scores), device, rounds=2)}


@click.command()
@click.option("--images", multiple=True, default=["../shared/data/camvid/images/train"])
@click.option("--backbones", default="dinov2_vits14,dino_vitb8")
@click.option("--limit", default=400, help="Images.")
@click.option("--cpu-limit", default=32, help="Images that the CPU sees.")
@click.option("--steps", default=300)
@click.option("--device", default="cuda")
@click.option("--side", default=SIDE, help="Of the matrices of the ceiling.")
def main(images, backbones, limit, cpu_limit, steps, device, side):
    paths = [path for path, _ in find_images(images)][:limit]
    top = ceiling(device, side)
    card = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    print(f"{card}, {torch.get_num_threads()} threads; ceiling {top / 1e12:.1f} TFLOP/s in bfloat16")
    for name in backbones.split(","):
        backbone_rows(name, device, top)
    print(f"{'':37} {device:>9} {'CPU':>9} {'ratio':>7}")
    compare("", crf_rates(paths[0], device), crf_rates(paths[0], "cpu"))
    for name in ("tiny", *backbones.split(",")[:1]):
        there = network_of(name).to(device)
        network = network_of(name)
        few = paths[:cpu_limit]
        gpu = stages(there, paths, steps, device) | predictions(there, paths[:PREDICTED], device)
        cpu = stages(network, few, max(steps // 10, 1), "cpu") | predictions(network, few[:8], "cpu")
        compare(name, gpu, cpu)


def compare(name: str, gpu: dict[str, float], cpu: dict[str, float]) -> None:
    """Rates of both, and their ratio."""
    for what, rate in gpu.items():
        print(f"{name:14} {what:22} {rate:9.2f} {cpu[what]:9.2f} {rate / cpu[what]:7.1f}", flush=True)


if __name__ == "__main__":
    main()
