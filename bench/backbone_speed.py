"""The backbone's forward pass beside torchvision's VisionTransformer and beside the machine's matmul rate.

    OMP_NUM_THREADS=1 python bench/backbone_speed.py [--backbones dino_vits8,dino_vitb8] [--rounds 5]
    python bench/backbone_speed.py --threads 2

Two batches for each backbone: five crops as `fit` sees them, and an image of 320 x 424 with its mirror image
as `predict` does. Weights are random: they do not change the time. torchvision's network gets the same
weights and position embeddings, and takes its fast path. The floor is the time that the same number of
floating-point operations takes at the rate of the network's own products with weights (qkv, projection, two
of the MLP), alone and in the same shapes. All are measured in turn in every round; ratios are medians over
the rounds. The clock is CPU time on one thread, wall time on several. Memory is kept as in the command line.
"""

import re
import sys
import time
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn
from torchvision.models import VisionTransformer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli import keep_memory
from stego_parts.backbones import BACKBONES, ViT

BATCHES = {"5 crops": (5, 224, 224), "mirrored pair": (2, 320, 424)}
COLUMNS = (
    "backbone",
    "batch",
    "GFLOP",
    "matmul GFLOP/s",
    "floor, s",
    "torchvision, s",
    "ours, s",
    "torchvision / ours",
    "ours / floor",
    "largest difference",
)
RENAME = (  # our names -> torchvision's, applied in turn
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


class Torchvision(nn.Module):
    """The same function through the parts of torchvision's network."""

    def __init__(self, ours: ViT, spec):
        super().__init__()
        self.positions = ours.positions
        self.vit = VisionTransformer(
            image_size=spec.patch * spec.grid,
            patch_size=spec.patch,
            num_layers=spec.depth,
            num_heads=spec.heads,
            hidden_dim=spec.channels,
            mlp_dim=4 * spec.channels,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.vit.heads = nn.Identity()
        state = {}
        for key, value in ours.state_dict().items():
            for pattern, name in RENAME:
                key = re.sub(pattern, name, key)
            state[key] = value
        self.vit.load_state_dict(state)

    def forward(self, x):
        x = self.vit.conv_proj(x)  # (B, C, h, w)
        batch, _, h, w = x.shape
        positions = torch.cat([self.vit.encoder.pos_embedding[:, :1], self.positions(h, w)], 1)
        x = torch.cat([self.vit.class_token.expand(batch, -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + positions
        x = self.vit.encoder.ln(self.vit.encoder.layers(x))  # (B, 1 + h * w, C)
        return x[:, 1:].transpose(1, 2).reshape(batch, -1, h, w)


def random_vit(spec) -> ViT:
    torch.manual_seed(0)
    network = ViT(spec).eval().requires_grad_(False)
    for tokens in (network.cls_token, network.pos_embed):
        tokens.normal_(std=0.02)
    return network


def products(spec, rows: int):
    """A function that does one block's matrix products with weights, `rows` tokens, and its operations."""
    c, pairs = spec.channels, []
    for inner, outer in ((c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)):
        pairs.append((torch.randn(rows, inner), torch.randn(outer, inner).t(), torch.empty(rows, outer)))
    return lambda: [torch.mm(a, b, out=out) for a, b, out in pairs], 2 * rows * 12 * c * c


def operations(spec, batch: int, patches: int) -> int:
    """Floating-point operations of a forward pass: patch embedding, linear layers, attention's products."""
    c, tokens = spec.channels, 1 + spec.registers + patches
    return batch * (
        2 * patches * 3 * spec.patch**2 * c + spec.depth * (2 * tokens * 12 * c * c + 4 * tokens * tokens * c)
    )


def measured(functions: dict, rounds: int, clock) -> dict:
    """{name: seconds of every round}, taken in turn so that a busy spell hits all alike."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            began = clock()
            function()
            times[name].append(clock() - began)
    return {name: np.array(values[1:]) for name, values in times.items()}  # the first round warms up


def compared(ours: ViT, theirs: Torchvision, spec, size, rounds: int, clock) -> list:
    """Cells of one row of the table; size: images, height, width."""
    batch, h, w = size[0], round(size[1] / spec.patch), round(size[2] / spec.patch)
    x = torch.randn(batch, 3, h * spec.patch, w * spec.patch)
    multiply, work = products(spec, batch * (1 + h * w))
    half = partial(multiply_times, multiply, spec.depth // 2)
    times = measured(
        {"before": half, "theirs": partial(theirs, x), "ours": partial(ours, x), "after": half}, rounds, clock
    )
    total = operations(spec, batch, h * w)
    floor = (times["before"] + times["after"]) / (2 * (spec.depth // 2) * work) * total
    a, b = times["theirs"], times["ours"]
    figures = map(float, map(np.median, (floor, a, b, a / b, b / floor)))
    return [
        f"{total / 1e9:.0f}",
        f"{total / np.median(floor) / 1e9:.0f}",
        *(f"{value:.2f}" for value in figures),
        f"{(theirs(x) - ours(x)).abs().max():.1e}",
    ]


def multiply_times(multiply, times: int):
    for _ in range(times):
        multiply()


@click.command()
@click.option("--backbones", default="dino_vits8,dinov2_vits14,dino_vitb8")
@click.option("--rounds", default=5)
@click.option("--threads", default=1)
@torch.inference_mode()
def main(backbones, rounds, threads):
    keep_memory()
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    print(f"{threads} thread(s), medians of {rounds} rounds\n\n| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for name in backbones.split(","):
        spec = BACKBONES[name]
        ours = random_vit(spec)
        theirs = Torchvision(ours, spec).eval()
        for label, size in BATCHES.items():
            cells = compared(ours, theirs, spec, size, rounds, clock)
            print(f"| {name} | {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
