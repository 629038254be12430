"""From codes to clusters: the one way from what is known of an image to its mask (Sec. 3.3, 4).

`predict`, `eval`, sheets, `show --at` and the ONNX file all go it:

    mirror_averaged      codes of an image, averaged with those of its mirror image
    Probe.adapted        the clusters' centres in this image
    segment              codes -> a mask of the image, with or without a CRF

Below: frames of videos, and the clusters of one model found again in another (`--match`).
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from crf import dense_crf, upsample_along_edges, working_size
from stego_parts.config import MAX_CLUSTERS, NOTICE
from stego_parts.features import BILINEAR, TokenCache
from stego_parts.images import Picture, distinct_colors

LOGIT_SCALE = 2.0  # cosine to a centre -> score of its cluster for the CRF (reference implementation)
CRF_SIZE = 0.5  # megapixels at which the CRF runs on larger photos
BLOCK_VALUES = 1_000_000  # numbers of a large photo that are upsampled at once: temporaries stay in cache
GPU_BLOCK_VALUES = 32_000_000  # the same on a GPU, which wants few large kernels: temporaries of 0.5 GB
ADAPTATION_ROWS = 100_000  # codes, at most, that stand for those of a large image
ADAPTATION_ROUNDS = 4  # assignments after which the centres of an image hardly move
# Of a frame against the average of those before it. Of a still scene with noise a fifth of the flicker is left, in a
# slow pan a third, in a fast one (2.5 % of the width a frame) nearly all; with 0.2 segments lag behind visibly.
FRAME_WEIGHT = 0.3
# Cosine of a code to the average below which something else has come into view; of noise: 0.99.
SAME_THING = 0.8
CROWD_ROWS = 500  # codes that stand for all where crowding is measured
CROWD_SHARPNESS = 10.0  # crowding: mean of exp(10 (cosine - 1)), which halves at an angle of 21 degrees
MATCH_ROWS = 100_000  # codes that both models label
# Intersection over union from which clusters of two models are one: a Dice score of a half
MATCH_OVERLAP = 1 / 3

log = logging.getLogger("stego")
Maps = Callable[[Tensor], Tensor]  # images (B, 3, H, W) or features (B, C, h, w) -> maps (B, D, h, w)


# ---- codes of an image -----------------------------------------------------------------------------------------


def mirror_averaged(x: Tensor, features: Maps, *heads: Maps) -> list[Tensor]:
    """What each head makes of the features of images, averaged with that of the mirror images (Sec. 4).

    x: normalised images (B, 3, H, W); features: (B, 3, H, W) to (B, C, h, w); heads: (B, C, h, w) to (B, D, h, w).
    Returns a map (B, D, h, w) of each head.
    """
    both = features(torch.cat([x, x.flip(-1)]))  # (2B, C, h, w)
    maps = []
    for head in heads:
        plain, mirrored = head(both).chunk(2)  # (B, D, h, w) each
        maps.append((plain + mirrored.flip(-1)) / 2)
    return maps


# ---- scores of clusters ----------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """What tells clusters, or classes, by codes: linear scores of each.

    weight: (K, D), of clusters their centres, unit rows; bias: (K,), of centres None: their scores are cosines.
    merged: (K,) uint8, the cluster that stands for each, if some are one; adaptation: see `adapted_centers`.
    """

    weight: Tensor
    bias: Tensor | None = None
    merged: np.ndarray | None = None
    adaptation: float = 0.0

    def adapted(self, codes: Tensor, picture: Picture | None = None) -> "Probe":
        """The same for the image with these codes (1, D, h, w), whose centres are its own.

        picture: the image, if some of it may hold no data, which then says nothing.
        """
        if picture is not None and picture.valid is not None:
            valid = torch.from_numpy(picture.positions(*codes.shape[2:])).to(codes.device)  # (h, w)
            codes = codes[..., valid][..., None] if valid.any() else codes  # (1, D, n, 1)
        centers = adapted_centers(codes, self.weight, self.adaptation)
        return self._replace(weight=centers, adaptation=0.0)

    def dot_products(self, codes: Tensor) -> Tensor:
        """Codes (B, D, h, w) -> linear scores (B, K, h, w); of centres and codes of unit length, cosines."""
        scores = torch.einsum("bdhw,kd->bkhw", codes, self.weight)
        return scores if self.bias is None else scores + self.bias[:, None, None]

    def logits(self, codes: Tensor, size: tuple[int, int]) -> Tensor:
        """Codes (1, D, h, w), upsampled to size (H, W), -> scores for softmax (K, H, W).

        Of centres, LOGIT_SCALE x cosine.
        """
        if self.bias is not None:
            scores = self.dot_products(codes)
            return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)[0]
        logits = codes.new_empty(len(self.weight), *size)
        for rows, block in upsample_row_blocks(codes[0], *size):  # (D, rows, W)
            cosines = self.dot_products(F.normalize(block, dim=0)[None])  # (1, K, rows, W)
            logits[:, rows] = LOGIT_SCALE * cosines[0]
        return logits

    def merge(self, mask: np.ndarray) -> np.ndarray:
        """A mask (H, W) of scores' numbers, with the clusters in it that stand for them."""
        return mask if self.merged is None else self.merged[mask]


def adapted_centers(codes: Tensor, centers: Tensor, weight: float) -> Tensor:
    """Centres (K, D) moved towards those codes (1, D, h, w) of one image that are nearest to them.

    One drive is darker than the next, and all its codes lie a little aside. So what a cluster's mean direction is in
    an image is estimated anew, with the centre as the prior: the MAP adaptation of speech recognition (Gauvain & Lee
    1994), on the sphere. weight: of the codes of the whole image together, against one of each centre; with 0, as
    in STEGO, all images have the same centres.
    """
    rows = codes[0].flatten(1)  # (D, h * w)
    every = math.ceil(rows.shape[1] / ADAPTATION_ROWS)
    rows = F.normalize(rows[:, ::every].float(), dim=0).T  # (n, D)
    adapted = centers
    for _ in range(ADAPTATION_ROUNDS if weight else 0):
        members = F.one_hot((rows @ adapted.T).argmax(1), len(centers)).to(rows.dtype)  # (n, K)
        adapted = F.normalize(centers + weight / len(rows) * members.T @ rows, dim=1)
    return adapted


def upsample_row_blocks(maps: Tensor, height: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Maps (C, h, w) upsampled bilinearly, in blocks of rows: yields (rows, (C, rows, width)), in bounded memory."""
    channels, h, _ = maps.shape
    wide = F.interpolate(maps[None], (h, width), mode="bilinear", align_corners=False)[0]  # (C, h, width)
    values = GPU_BLOCK_VALUES if maps.is_cuda else BLOCK_VALUES
    for rows in torch.arange(height).split(max(values // (width * channels), 1)):
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


# ---- what k-means sees ------------------------------------------------------------------------------------------


def resample_by_density(codes: Tensor, evenness: float) -> Tensor:
    """As many rows drawn from codes (N, D), each with a chance of one over (how crowded its direction is) ** evenness.

    k-means splits what is frequent; a mean over classes asks for what is rare as well. 0 leaves the rows as they are.
    """
    if not evenness:
        return codes
    some = torch.randperm(len(codes))[:CROWD_ROWS].to(codes.device)
    near = F.normalize(codes[some], dim=1).T  # (D, n)
    crowd = []
    for part in codes.split(8192):
        cosine = F.normalize(part, dim=1) @ near  # (rows, n)
        crowd.append((CROWD_SHARPNESS * (cosine - 1)).exp().mean(1))
    chance = torch.cat(crowd).cpu() ** -evenness  # (N,)
    drawn = torch.multinomial(chance, len(codes), replacement=True)
    return codes[drawn.to(codes.device)]


# ---- masks -----------------------------------------------------------------------------------------------------


def segment(
    image: Image.Image, described: Sequence[tuple[Tensor, Probe]], *, crf: bool, crf_size: float = CRF_SIZE
) -> list[np.ndarray]:
    """Masks (H, W) uint8 of an RGB picture, one of each (codes (1, D, h, w), probe of this image).

    crf: sharpen them with a dense CRF that works on crf_size megapixels; all have one lattice.
    """
    if not crf:
        size = (image.height, image.width)
        masks = [upsampled_argmax(probe.dot_products(codes)[0], *size) for codes, probe in described]
    else:
        shares = probabilities(image, described, crf=True, crf_size=crf_size)
        picture = pixels(image).to(shares[0].device)
        masks = [upsample_along_edges(picture, share).cpu().numpy() for share in shares]
    return [probe.merge(mask) for mask, (_, probe) in zip(masks, described)]


def probabilities(
    image: Image.Image, described: Sequence[tuple[Tensor, Probe]], *, crf: bool, crf_size: float = CRF_SIZE
) -> list[Tensor]:
    """Probabilities (K, h, w) of each (codes (1, D, h, w), probe) at `crf.working_size` of an RGB picture."""
    height, width = working_size((image.height, image.width), megapixels=crf_size)
    logits = [probe.logits(codes, (height, width)) for codes, probe in described]  # (K, h, w) each
    if not crf:
        return [each.softmax(0) for each in logits]
    most = max(map(len, logits))
    padded = [F.pad(each, (0, 0, 0, 0, 0, most - len(each)), value=-math.inf) for each in logits]
    small = pixels(image.resize((width, height), BILINEAR)).to(logits[0].device)  # (3, h, w)
    shares = dense_crf(
        small, torch.stack(padded)
    )  # (n, most, h, w); what a probe does not have is impossible
    return [share[: len(each)] for share, each in zip(shares, logits)]


def pixels(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)


# ---- names of clusters -----------------------------------------------------------------------------------------


def check_name(k: int, name: str, count: int) -> None:
    """ValueError for a name that a person cannot give to cluster k of `count`; "" takes a name away."""
    if not 0 <= k < count:
        raise ValueError(f"There is no cluster {k}; the model has 0 to {count - 1}.")
    if name.isdecimal() or {",", "="} & set(name) or not name.isprintable() or name != name.strip():
        raise ValueError(
            f"Got the name {name!r}; use a word that is no number, without comma and equals sign."
        )


def select_clusters(labels: Sequence[str], wanted: Iterable[str]) -> list[int]:
    """The clusters that numbers or labels mean, in any case; labels: of each cluster its name, or else its number."""
    asked = {str(each).strip().casefold() for each in wanted}
    folded = [label.casefold() for label in labels]
    unknown = asked - {str(k) for k in range(len(labels))} - set(folded)
    if unknown:
        names = sorted({label for k, label in enumerate(labels) if label != str(k)})
        raise ValueError(
            f"The model has no cluster {min(unknown)!r}; it has the numbers 0 to {len(labels) - 1} and the "
            f"names {', '.join(names) or '(none yet)'}."
        )
    chosen = {label for k, label in enumerate(folded) if asked & {label, str(k)}}
    return [k for k, label in enumerate(folded) if label in chosen]


# ---- frames of a video -----------------------------------------------------------------------------------------


class FrameAverage:
    """Codes (1, D, h, w) of a frame of a video -> averaged with those before; called with each frame in turn.

    Scores are linear in the codes. Where something else has come into view, its codes stand alone: what moves leaves no
    trail, and a cut needs nothing more.
    """

    def __init__(self) -> None:
        self.codes: Tensor | None = None

    def __call__(self, codes: Tensor) -> Tensor:
        if self.codes is not None and self.codes.shape == codes.shape:
            same = F.cosine_similarity(codes, self.codes)[:, None] > SAME_THING  # (1, 1, h, w)
            codes = torch.where(same, torch.lerp(self.codes, codes, FRAME_WEIGHT), codes)
        self.codes = codes
        return codes


# ---- clusters of an earlier model ------------------------------------------------------------------------------


def check_same_features(earlier: Any, network: Any) -> None:
    """ValueError if an earlier model sees other features than a new fit on this backbone."""
    if (earlier.backbone_sha256, earlier.head.linear.in_features) != (network.sha256, network.channels):
        raise ValueError(
            f"The model to match was fitted on {earlier.config.backbone} weights {earlier.backbone_sha256[:12]}…, "
            f"this fit uses {network.name} {network.sha256[:12]}…; clusters are compared on the same features: "
            "choose that backbone, or do not match."
        )


@torch.inference_mode()
def match_clusters_to(earlier: Any, model: Any, cache: TokenCache) -> dict[int, int]:
    """{number in the model: number in the earlier one}, by what both say about the same tokens.

    Hungarian matching on intersection over union; pairs that overlap less than MATCH_OVERLAP are left out.
    """
    from scipy.optimize import linear_sum_assignment  # here: a third of a second that no prediction needs

    each = max(MATCH_ROWS // len(cache), 1)
    K = len(model.centers)
    L = len(earlier.centers)
    joint = torch.zeros(K, L)  # how many tokens each pair of clusters shares
    for crops in torch.arange(len(cache)).split(256):
        tokens = cache.sample(crops, each).flatten(0, 1)  # (N, C)
        here = (model.head.describe(tokens) @ model.centers.T).argmax(1)  # (N,)
        tokens = tokens.to(earlier.device)  # a GPU that this fit leaves alone, say
        there = (earlier.head.describe(tokens) @ earlier.centers.T).argmax(1).to(here.device)
        joint += torch.bincount(here * L + there, minlength=K * L).view(K, L).cpu()
    union = joint.sum(1, keepdim=True) + joint.sum(0) - joint
    overlap = joint / union.clamp(min=1)
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    pairs = dict(zip(rows.tolist(), columns.tolist()))
    return {k: m for k, m in pairs.items() if overlap[k, m] >= MATCH_OVERLAP}


def inherit_ids(model: Any, earlier: Any, same: dict[int, int]) -> None:
    """Renumber: clusters that are the earlier model's, {number here: number there}, get its numbers, names, colours.

    The others get the numbers that are left over, and colours that the earlier model does not use. A number that
    this smaller model does not have is lost, its name and colour are kept.
    """
    order = inherited_order(len(model.centers), same)
    model.centers = model.centers[order]
    model.share = model.share[order]
    model.palette = inherited_colors(order, same, earlier.palette)
    model.names = [earlier.names[same[k]] if k in same else "" for k in order]
    lost = [f"{m}={name}" for m, name in enumerate(earlier.names) if name and m not in same.values()]
    ending = f"; lost: {', '.join(lost)}" if lost else ""
    log.log(NOTICE, "%d of %d clusters matched%s", len(same), len(earlier.centers), ending)


def inherited_order(count: int, same: dict[int, int]) -> list[int]:
    """Which of `count` clusters gets each number."""
    inherited = {number: k for k, number in same.items() if number < count}
    rest = iter(sorted(set(range(count)) - set(inherited.values())))
    return [inherited[number] if number in inherited else next(rest) for number in range(count)]


def inherited_colors(order: Sequence[int], same: dict[int, int], palette: np.ndarray) -> np.ndarray:
    """Colours (K, 3) uint8 of clusters in their order: the earlier model's, or ones not in its palette (L, 3)."""
    used = {tuple(color) for color in palette.tolist()}
    free = [color for color in distinct_colors(MAX_CLUSTERS).tolist() if tuple(color) not in used]
    free += [color for m, color in enumerate(palette.tolist()) if m not in same.values()]
    new = iter(free)
    colors = [palette[same[k]].tolist() if k in same else next(new) for k in order]
    return np.array(colors, np.uint8)  # (K, 3)
