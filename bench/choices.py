"""Two choices of ours against the reference's, on val: sampling on the grid, and k-means for the clusters.

    python bench/choices.py --data ../shared/data [--sets aerial] [--seeds 3] [--steps 1000] [--backbone tiny]

* grid or bilinear: the reference samples continuous positions and blends four tokens; we read single tokens. (Here
  the features are blended before the head; the reference blends codes after it. The head is nearly linear.)
* k-means or probe: the reference learns centres by gradient (Adam 5e-3, loss - mean max cos); we run mini-batch
  k-means on the codes of the finished head. Codes are detached in both, so the probe is trained on the same ones.

Prints mIoU in percent for each seed, the mean and the spread.
"""

import sys
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from quality import fit_head, score, val_features  # noqa: E402

from stego import cluster_codes, fit_config, unit  # noqa: E402
from stego_parts.backbones import load_backbone  # noqa: E402
from stego_parts.images import find_images  # noqa: E402
from stego_parts.tokens import TokenCache, encode  # noqa: E402


class BilinearCache(TokenCache):
    """Samples continuous positions, blending the four tokens around each."""

    def sample(self, crops, count):
        side = int(self.tokens.shape[1] ** 0.5)
        at = torch.rand(2, len(crops), count) * (side - 1)
        low = at.floor().long().clamp(max=side - 2)
        y, x = at - low
        rows = crops[:, None]
        blended = 0
        for dy in (0, 1):
            for dx in (0, 1):
                weight = (y if dy else 1 - y) * (x if dx else 1 - x)  # (B, count)
                position = (low[0] + dy) * side + low[1] + dx
                blended = blended + weight[..., None] * self.tokens[rows, position].float()
        return blended


def probe_centers(head, cache, classes, *, steps=1000):
    """The paper's cluster probe: centres learned by gradient on detached codes."""
    centers = torch.nn.Parameter(torch.randn(classes, head.size))
    optimizer = torch.optim.Adam([centers], lr=5e-3)
    for _ in range(steps):
        crops = torch.randint(len(cache), (16,))
        codes = unit(head.describe(cache.sample(crops, 121))).flatten(0, 1)  # (B * P, D)
        loss = -(codes @ unit(centers).T).max(1).values.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return unit(centers.detach())


@click.command()
@click.option("--data", default="../shared/data", type=Path)
@click.option("--sets", default="aerial")
@click.option("--seeds", default=3)
@click.option("--steps", default=1000)
@click.option("--backbone", default="tiny")
def main(data, sets, seeds, steps, backbone):
    network = load_backbone(backbone)
    for name in sets.split(","):
        folder = data / name
        classes = len((folder / "classes.txt").read_text().split())
        cache = encode(network, [path for path, _ in find_images(folder / "images/train")])
        val, found = val_features(network, folder), {}
        for seed in range(seeds):
            for sampling, kind in (("grid", TokenCache), ("bilinear", BilinearCache)):
                cache.__class__ = kind
                torch.manual_seed(seed)
                head = fit_head(cache, fit_config(classes=classes, steps=steps))
                cache.__class__ = TokenCache
                centers = {
                    "k-means": cluster_codes(head.describe, cache, classes, seed=seed)[0],
                    "probe": probe_centers(head, cache, classes),
                }
                for method, center in centers.items():
                    miou, _ = score(head.on_map, center, val, classes, False)
                    found.setdefault((sampling, method), []).append(miou)
        for choice, mious in found.items():
            print(
                f"{name:8} {choice[0]:9} {choice[1]:8} {np.mean(mious):6.2f} +- {np.std(mious):.2f}  "
                f"{np.round(mious, 1)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
