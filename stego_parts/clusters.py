"""Maps of codes and scores: averaged with the mirror image, upsampled in bounded memory, compared with centres."""

import logging
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stego_parts.config import MAX_CLASSES, NOTICE
from stego_parts.features import TokenCache
from stego_parts.images import distinct_colors

ROWS = 100_000  # codes that both models label
# intersection over union from which clusters of two models are one: a Dice score of a half
MATCH_OVERLAP = 1 / 3

log = logging.getLogger("stego")

LOGIT_SCALE = 2.0  # cosine to a centre -> class score for the CRF (reference implementation)
ADAPTATION_ROWS = 100_000  # codes, at most, that stand for those of a large image
ADAPTATION_ROUNDS = 4  # assignments after which the centres of an image hardly move
# Of a frame against the average of those before it. Of a still scene with noise a fifth of the flicker is left, in a
# slow pan a third, in a fast one (2.5 % of the width a frame) nearly all; with 0.2 segments lag behind visibly.
FRAME_WEIGHT = 0.3
# Cosine of a code to the average below which something else has come into view; of noise: 0.99.
SAME_THING = 0.8
BLOCK_VALUES = 1_000_000  # numbers of a large photo that are upsampled at once: temporaries stay in cache


def unmirror(both: Tensor) -> Tensor:
    """Maps of images and then of their mirror images (2B, D, h, w) -> their average, upright (B, D, h, w)."""
    plain, mirrored = both.chunk(2)  # (B, D, h, w) each
    return (plain + mirrored.flip(-1)) / 2


def upsample_row_blocks(maps: Tensor, height: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Maps (C, h, w) upsampled bilinearly, in blocks of rows: yields (rows, (C, rows, width)), in bounded memory."""
    channels, h, _ = maps.shape
    wide = F.interpolate(maps[None], (h, width), mode="bilinear", align_corners=False)[0]  # (C, h, width)
    for rows in torch.arange(height).split(max(BLOCK_VALUES // (width * channels), 1)):
        y = ((rows + 0.5) * h / height - 0.5).clamp(0, h - 1).to(maps.device)
        above = y.floor().long()
        below = (above + 1).clamp(max=h - 1)
        yield slice(rows[0], rows[-1] + 1), torch.lerp(wide[:, above], wide[:, below], (y - above)[:, None])


def upsampled_argmax(scores: Tensor, height: int, width: int) -> np.ndarray:
    """argmax over K of scores (K, h, w) upsampled bilinearly to (height, width) uint8.

    Scores linear in the codes may be upsampled in place of the codes: the length of a code scales all its scores.
    """
    mask = np.empty((height, width), np.uint8)
    for rows, block in upsample_row_blocks(scores, height, width):  # (K, rows, width)
        mask[rows] = block.max(0).indices.byte().cpu().numpy()  # ten times faster than argmax
    return mask


def class_scores(codes: Tensor, centers: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores for softmax: LOGIT_SCALE x cosine of codes (D, h, w), upsampled to size (H, W), to centres: (K, H, W)."""
    scores = codes.new_empty(len(centers), *size)
    for rows, block in upsample_row_blocks(codes, *size):  # (D, rows, W)
        scores[:, rows] = LOGIT_SCALE * dot_products(F.normalize(block, dim=0)[None], centers)[0]
    return scores


def dot_products(codes: Tensor, centers: Tensor) -> Tensor:
    """Codes (B, D, h, w) with centres (K, D): (B, K, h, w), cosines where both have length one."""
    return torch.einsum("bdhw,kd->bkhw", codes, centers)


def adapted_centers(codes: Tensor, centers: Tensor, weight: float) -> Tensor:
    """Centres (K, D) moved towards those codes (1, D, h, w) of one image that are nearest to them.

    One drive is darker than the next, and all its codes lie a little aside. So what a cluster's mean direction is in
    an image is estimated anew, with the centre as the prior: the MAP adaptation of speech recognition (Gauvain & Lee
    1994), on the sphere. weight: of the codes of the whole image together, against one of each centre; with 0, as
    in STEGO, all images have the same centres.
    """
    rows = codes[0].flatten(1)  # (D, h * w)
    rows = F.normalize(rows[:, :: -(-rows.shape[1] // ADAPTATION_ROWS)].float(), dim=0).T  # (n, D)
    adapted = centers
    for _ in range(ADAPTATION_ROUNDS if weight else 0):
        members = F.one_hot((rows @ adapted.T).argmax(1), len(centers)).to(rows.dtype)  # (n, K)
        adapted = F.normalize(centers + weight / len(rows) * members.T @ rows, dim=1)
    return adapted


class FrameAverage:
    """Codes (1, D, h, w) of a frame of a video -> averaged with those before; called with each frame in turn.

    Scores are linear in the codes. Where something else has come into view, its codes stand alone: what moves leaves no
    trail, and a cut needs nothing more.
    """

    def __init__(self):
        self.codes: Tensor | None = None

    def __call__(self, codes: Tensor) -> Tensor:
        if self.codes is not None and self.codes.shape == codes.shape:
            same = F.cosine_similarity(codes, self.codes)[:, None] > SAME_THING  # (1, 1, h, w)
            codes = torch.where(same, torch.lerp(self.codes, codes, FRAME_WEIGHT), codes)
        self.codes = codes
        return codes


def pixels(image) -> Tensor:
    """RGB picture -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W) uint8


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
