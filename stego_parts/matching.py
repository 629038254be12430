"""Clusters of a new model that are those of an earlier one keep its numbers, names and colours (`--match`)."""

import logging

import numpy as np
import torch

from stego_parts.config import MAX_CLASSES
from stego_parts.features import NOTICE, TokenCache
from stego_parts.images import distinct_colors

ROWS = 100_000  # codes that both models label
# intersection over union from which clusters of two models are one: a Dice score of a half
MATCH_OVERLAP = 1 / 3

log = logging.getLogger("stego")


def check_same_features(earlier, network):
    """ValueError if an earlier model sees other features than a new fit on this backbone."""
    if (earlier.backbone_sha256, earlier.head.linear.in_features) != (network.sha256, network.channels):
        raise ValueError(
            f"The model to match was fitted on {earlier.config.backbone} weights {earlier.backbone_sha256[:12]}…, "
            f"this fit uses {network.name} {network.sha256[:12]}…; clusters are compared on the same features: "
            "choose that backbone, or do not match."
        )


@torch.inference_mode()
def match_clusters_to(earlier, model, cache: TokenCache) -> dict[int, int]:
    """{number in the model: number in the earlier one}, by what both say about the same tokens.

    Hungarian matching on intersection over union; pairs that overlap less than MATCH_OVERLAP are left out.
    """
    from scipy.optimize import linear_sum_assignment  # here: a third of a second that no prediction needs

    each, K, L = max(ROWS // len(cache), 1), len(model.centers), len(earlier.centers)
    joint = torch.zeros(K, L)
    for crops in torch.arange(len(cache)).split(256):
        tokens = cache.sample(crops, each).flatten(0, 1)  # (N, C)
        k, other = ((m.head.describe(tokens) @ m.centers.T).argmax(1) for m in (model, earlier))
        joint += torch.bincount(k * L + other, minlength=K * L).view(K, L).cpu()
    overlap = joint / (joint.sum(1, keepdim=True) + joint.sum(0) - joint).clamp(min=1)
    pairs = zip(*(side.tolist() for side in linear_sum_assignment(overlap, maximize=True)))
    return {k: m for k, m in pairs if overlap[k, m] >= MATCH_OVERLAP}


def inherit_ids(model, earlier, same: dict[int, int]):
    """Renumber: clusters that are the earlier model's, {number here: number there}, get its numbers, names, colours.

    The others get the numbers that are left over, and colours that the earlier model does not use. A number that
    this smaller model does not have is lost, its name and colour are kept.
    """
    K = len(model.centers)
    number = {k: m for k, m in same.items() if m < K}
    free = iter(sorted(set(range(K)) - set(number.values())))
    order = sorted(range(K), key=lambda k: number[k] if k in number else next(free))
    model.centers, model.share = model.centers[order], model.share[order]
    used = set(map(tuple, earlier.palette.tolist()))
    kept = [earlier.palette[m] for m in range(len(earlier.palette)) if m not in same.values()]
    unused = [color for color in distinct_colors(MAX_CLASSES) if tuple(color.tolist()) not in used]
    new = iter(unused + kept)
    model.palette = np.array([earlier.palette[same[k]] if k in same else next(new) for k in order], np.uint8)
    model.names = [earlier.names[same[k]] if k in same else "" for k in order]
    names = [f"{m}={name}" for m, name in enumerate(earlier.names) if name and m not in same.values()]
    lost = "; lost: " + ", ".join(names) if names else ""
    log.log(NOTICE, "%d of %d clusters matched%s", len(same), len(earlier.centers), lost)
