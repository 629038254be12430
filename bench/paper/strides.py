"""What a backbone pass costs at each stride of a ResNet-50, beside ViT-S/8: random weights, 320 x 320, in one run.

    OMP_NUM_THREADS=1 python bench/paper/strides.py [--side 320] [--rounds 4]

Prints the best processor time of a pass and its ratio to ViT-S/8's.
"""

import sys
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from stego_parts.backbones import BACKBONES, ViT
from stego_parts.resnet import DILATED, ResNet50


@click.command()
@click.option("--side", default=320)
@click.option("--rounds", default=4)
@torch.inference_mode()
def main(side, rounds):
    networks = {"dino_vits8": ViT(BACKBONES["dino_vits8"]).eval()}
    networks |= {f"ResNet-50, stride {stride}": ResNet50(stride).eval() for stride in DILATED}
    x, best = torch.randn(1, 3, side, side), dict.fromkeys(networks, float("inf"))
    for _ in range(rounds):
        for name, network in networks.items():
            began = time.process_time()
            network(x)
            best[name] = min(best[name], time.process_time() - began)
    for name, seconds in best.items():
        print(f"{name:22}{seconds:8.3f} s  x {seconds / best['dino_vits8']:.2f}")


if __name__ == "__main__":
    main()
