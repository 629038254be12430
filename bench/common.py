"""What several benches need: models with random heads, clocks."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stego import Head, Stego, unit
from stego_parts.backbones import BACKBONES, ViT, load_backbone
from stego_parts.config import fit_config


def network_of(name: str) -> Any:
    """tiny, or another backbone with random weights, which do not change the time."""
    if name == "tiny":
        return load_backbone(name)
    network: Any = ViT(BACKBONES[name]).eval().requires_grad_(False)
    network.name = name
    network.sha256 = "random"
    return network


def random_model(network: Any, clusters: int) -> Stego:
    """A model over a backbone with a head and centres at random."""
    config = fit_config(clusters=clusters).on_backbone(network.name)
    head = Head(network.channels, config.code_size).requires_grad_(False).eval()
    centers = unit(torch.randn(clusters, config.code_size))
    shares = torch.ones(clusters) / clusters
    model = Stego(config, head, centers, shares, backbone_sha256=network.sha256)
    model._backbone = network
    return model


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """What a call takes on the clock and of CPU time."""
    began = time.perf_counter()
    used = time.process_time()
    function()
    return time.perf_counter() - began, time.process_time() - used


def median_seconds(function: Callable[[], Any], runs: int) -> float:
    """The median of several calls, on the clock."""
    return statistics.median(seconds(function)[0] for _ in range(runs))
