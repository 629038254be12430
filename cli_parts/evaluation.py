"""The published evaluation protocol (STEGO Sec. 4 and App. A): what makes a number comparable.

Images and labels are resized to 320 on the shorter side and cropped to the central 320 x 320; codes are averaged with
those of the mirror image and upsampled; cluster probe and linear probe, each with and without a CRF; one confusion
matrix over the whole set, Hungarian matching, mIoU. In order: what probes are fitted on, probes, the evaluation.
"""

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cli_parts.datasets import DATASETS
from cli_parts.labels import SIDE, LabelledSet
from cli_parts.scores import BACKBONE, CLUSTER, LINEAR, STEGO, confusion_matrix, match_clusters, measure
from kmeans import CosineKMeans
from stego import CLUSTER_STARTS, Stego
from stego_parts.clusters import Probe, mirror_averaged, segment
from stego_parts.config import RELEASED
from stego_parts.features import dense_features, to_tensor
from stego_parts.files import find_images
from stego_parts.optimizers import lbfgs
from stego_parts.running import Progress, no_progress, or_skip, prefetch, side_by_side

log = logging.getLogger("stego")

PROBE_IMAGES = 2000  # train images that the probes are fitted on, drawn at random from larger sets
PROBE_ROWS = 400_000  # positions of them
PROBE_BLOCK = 16_384  # positions at once
WHITENING_ROWS = 20_000  # positions that tell how features vary together
WHITENING_FLOOR = 1e-4  # of the mean variance, added to that of each direction
TINY = 1e-12  # of features that do not vary at all
START_ROWS = 25_000  # positions on which the linear probe is fitted first
ROUNDS = 100  # steps of L-BFGS, at most: on START_ROWS and on all
CONVERGED = 5e-5  # nats: a fall of the loss in a step below which it stands still
SPARE_CLUSTERS = (
    "%d clusters for %d classes: those left over count as errors. Rows named many-to-one give each cluster to "
    "its majority class, by the labels: compare them with nothing published."
)

ProbeKey = tuple[str, str]  # features, probe
Probes = dict[ProbeKey, Probe]


# ---- what the probes are fitted on ------------------------------------------------------------------------


def protocol_side(patch: int) -> int:
    """Side of the squares that are scored, in pixels: whole patches."""
    return math.ceil(SIDE / patch) * patch


def images_of(model: Stego | None) -> list[Path]:
    """The images a model was fitted on, as far as it tells and they are there; without a model none."""
    if model is None or not model.config.images:
        return []
    try:
        return [path for path, _ in find_images(model.config.images)]
    except FileNotFoundError as error:
        log.warning("The images that the model was fitted on are not here: %s", error)
        return []


def baseline_images(model: Stego, labelled: LabelledSet) -> LabelledSet:
    """Where the backbone's clusters come from without train images: the model's images, else the scored."""
    paths = images_of(model)
    if paths:
        source = f"the images that the model was fitted on ({', '.join(map(str, model.config.images))})"
    else:
        paths = [path for path, _ in labelled.pairs]
        source = "the scored images themselves"
    return LabelledSet(labelled.name, [], [(path, None) for path in paths], None, source)


def class_shares(label: np.ndarray, classes: int, patch: int) -> Tensor:
    """Share of each class in the pixels of each patch: label (H, W) -> (H / patch * W / patch, classes)."""
    known = torch.from_numpy(label.astype(np.int64)).clamp(max=classes)
    shares = F.one_hot(known, classes + 1)[..., :classes].float()  # (H, W, n); ignored: zero
    return F.avg_pool2d(shares.permute(2, 0, 1), patch).flatten(1).T  # (h * w, n)


def probe_rows(
    model: Stego, images: LabelledSet, *, seed: int = 0, progress: Progress = no_progress
) -> tuple[Tensor, Tensor]:
    """Backbone features (N, C) float16 and class shares (N, n) at random positions of random images of a set.

    Of a set without labels n is 0, and images that cannot be read are named in a warning and left out.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(images.classes)
    chosen = torch.randperm(len(images.pairs), generator=generator)[:PROBE_IMAGES].tolist()
    patch = model.backbone.patch
    each = max(PROBE_ROWS // len(chosen), 1)
    # images with labels are asked for by name
    read = images.read if n else partial(or_skip, images.read)
    rows = []
    shares = []
    pairs = prefetch(partial(read, side=protocol_side(patch), bands=model.config.bands), chosen)
    for done, pair in enumerate(pairs, 1):
        if pair is not None:
            image, label = pair
            with torch.inference_mode():
                x = to_tensor(image)[None]
                features = dense_features(model.backbone, x, model.device, exact=True)  # (1, C, h, w)
            kept = torch.randperm(features[0, 0].numel(), generator=generator)[:each]
            rows.append(features[0].flatten(1).T.cpu()[kept].half())
            shares.append(class_shares(label, n, patch)[kept] if n else torch.empty(len(kept), 0))
        progress("baseline", done, len(chosen))
    if not rows:
        raise ValueError(f"None of the images of {images.name} could be used; give other --train-images.")
    return torch.cat(rows).clone(), torch.cat(shares)


# ---- probes (Sec. 4.1) ------------------------------------------------------------------------------------


def fit_probes(
    model: Stego,
    labelled: LabelledSet,
    *,
    train: LabelledSet,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Probes:
    """{(features, probe): Probe} for features "stego" and "backbone", probes "cluster" and "linear".

    The model's own clusters need no fitting. The others are fitted on `train`: the backbone's clusters, as
    many as the model has, and where it has labels the linear probes.
    """
    probes = {(STEGO, CLUSTER): model.probe}
    rows, shares = probe_rows(model, train, seed=seed, progress=progress)
    progress("k-means", 0, 1)
    kmeans = CosineKMeans(cluster_count(model), n_init=CLUSTER_STARTS, seed=seed)
    kmeans.fit(rows.float())
    progress("k-means", 1, 1)
    probes[BACKBONE, CLUSTER] = Probe(kmeans.cluster_centers_.to(model.device))
    if own := released_linear(model, labelled):
        probes[STEGO, LINEAR] = own
    if not train.classes:
        return probes
    if (STEGO, LINEAR) not in probes:
        probes[STEGO, LINEAR] = _linear_on_device(model, _codes(model, rows), shares, progress)
    probes[BACKBONE, LINEAR] = _linear_on_device(model, rows, shares, progress)
    return probes


def released_linear(model: Stego, labelled: LabelledSet) -> Probe | None:
    """The linear probe that a released checkpoint comes with, if it tells as many classes as there are labels of."""
    if model.linear is None or len(model.linear[1]) != len(labelled.classes):
        return None
    return Probe(*model.linear)


def cluster_count(model: Stego) -> int:
    """Clusters of a model, those with one name counted once."""
    return len(np.unique(model.merged))


@torch.inference_mode()
def _codes(model: Stego, rows: Tensor) -> Tensor:
    """What is clustered (N, D) of features (N, C), as `both_features` gives it."""
    parts = [model.head.describe(part.float().to(model.device)).cpu() for part in rows.split(PROBE_BLOCK)]
    return torch.cat(parts)


def _linear_on_device(model: Stego, rows: Tensor, shares: Tensor, progress: Progress) -> Probe:
    probe = linear_probe(rows, shares, progress=progress)
    assert probe.bias is not None
    return Probe(probe.weight.to(model.device), probe.bias.to(model.device))


def linear_probe(rows: Tensor, shares: Tensor, *, progress: Progress = no_progress) -> Probe:
    """Softmax regression from features (N, D) to shares of classes (N, n) by L-BFGS, until the loss stands still.

    The cross entropy is that of the labelled pixels of each position. Features are whitened on the way, and the first
    steps see a part of the positions, which changes the path and not the goal. When it stands still: CONVERGED, ROUNDS.
    """
    labelled = shares.sum(1) > 0
    if not labelled.any():
        raise ValueError("Not one labelled pixel in the train images; the linear probe needs labels.")
    rows = rows[labelled]
    shares = shares[labelled]
    mean, whitening = _whitening(rows[:: max(len(rows) // WHITENING_ROWS, 1)].float())
    solution = torch.zeros(shares.shape[1] * (rows.shape[1] + 1))  # (n * (D + 1),)
    every = max(len(rows) // START_ROWS, 1)
    progress("probe", 0, 1)
    for some in (slice(None, None, every), slice(None)):
        data = dict(rows=rows[some], shares=shares[some], mean=mean, whitening=whitening)
        solution = lbfgs(partial(_probe_loss, **data), solution, steps=ROUNDS, fall=CONVERGED)
    progress("probe", 1, 1)
    return Probe(*_unwhitened(solution, shares.shape[1], mean, whitening))


def _whitening(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) of rows (N, D) and a matrix (D, D) after which they vary alike in all directions."""
    mean = rows.mean(0)
    centered = rows - mean
    variance, directions = torch.linalg.eigh(centered.T @ centered / len(rows))
    variance = variance.clamp(min=0)
    floor = WHITENING_FLOOR * variance.mean() + TINY
    return mean, directions / (variance + floor).sqrt()


def _unwhitened(solution: Tensor, classes: int, mean: Tensor, whitening: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (n, D) and bias (n,) for features as they are, of a probe (n * (D + 1),) of whitened ones."""
    both = solution.view(classes, -1)  # (n, D + 1)
    weight = both[:, :-1] @ whitening.T
    return weight, both[:, -1] - weight @ mean


def _probe_loss(
    solution: Tensor, rows: Tensor, shares: Tensor, mean: Tensor, whitening: Tensor
) -> tuple[float, Tensor]:
    """The loss of a linear probe (n * (D + 1),) of whitened features, and its gradient."""
    weight, bias = _unwhitened(solution, shares.shape[1], mean, whitening)
    loss = 0.0
    of_weight = torch.zeros_like(weight)
    of_bias = torch.zeros_like(bias)
    for block, share in zip(rows.split(PROBE_BLOCK), shares.split(PROBE_BLOCK)):
        x = block.float()
        log_chance = (x @ weight.T + bias).log_softmax(1)  # (B, n)
        loss -= float((share * log_chance).sum())
        residual = log_chance.exp() * share.sum(1, keepdim=True) - share  # (B, n)
        of_weight += residual.T @ x
        of_bias += residual.sum(0)
    of_whitened = (of_weight - of_bias[:, None] * mean) @ whitening  # (n, D)
    gradient = torch.cat([of_whitened, of_bias[:, None]], 1) / len(rows)  # (n, D + 1)
    return loss / len(rows), gradient.flatten()


# ---- the evaluation (Sec. 4) ------------------------------------------------------------------------------


def both_features(model: Stego, image: Image.Image) -> dict[str, Tensor]:
    """What is clustered and the backbone's features of an image, averaged with its mirror's: (1, D, h, w)."""
    features = partial(dense_features, model.backbone, device=model.device, exact=True)
    codes, averaged = mirror_averaged(
        to_tensor(image)[None], features, model.head.on_map, torch.nn.Identity()
    )
    return {STEGO: codes, BACKBONE: averaged}


def masks_of(
    maps: dict[str, Tensor], probes: Probes, image: Image.Image, *, crf: bool
) -> dict[tuple[str, str, bool], np.ndarray]:
    """What probes {(features, probe): Probe} say of each pixel: {(features, probe, with CRF): (H, W) uint8}.

    maps: of the image, (1, D, h, w) of each kind of features; crf: also what they say after a CRF.
    """
    described = []
    for (features, _), probe in probes.items():
        codes = maps[features]
        described.append((codes, probe.adapted(codes)))
    masks = {}
    for with_crf in (False, True) if crf else (False,):
        found = segment(image, described, crf=with_crf)
        for (features, name), mask in zip(probes, found):
            masks[features, name, with_crf] = mask
    return masks


def confusions(
    model: Stego, labelled: LabelledSet, probes: Probes, *, crf: bool = True, progress: Progress = no_progress
) -> dict[tuple[str, str, bool], np.ndarray]:
    """{(features, probe, crf): (images, n_classes, K) int64} of every probe on every image, also after a CRF."""
    side = protocol_side(model.backbone.patch)
    n_classes = len(labelled.classes)

    @torch.inference_mode()
    def count(pair: tuple[Image.Image, np.ndarray]) -> dict[tuple[str, str, bool], np.ndarray]:
        image, label = pair
        matrices = {}
        for key, mask in masks_of(both_features(model, image), probes, image, crf=crf).items():
            n_clusters = len(probes[key[:2]].weight)
            matrices[key] = confusion_matrix(label, mask, n_classes=n_classes, n_clusters=n_clusters)
        return matrices

    counts: dict[tuple[str, str, bool], list[np.ndarray]] = {}
    pairs = prefetch(partial(labelled.read, side=side, bands=model.config.bands), range(len(labelled.pairs)))
    for done, matrices in enumerate(side_by_side(count, pairs, model.device), 1):
        for key, matrix in matrices.items():
            counts.setdefault(key, []).append(matrix)
        progress("evaluate", done, len(labelled.pairs))
    return {key: np.stack(each) for key, each in counts.items()}


def evaluate(
    model: Stego,
    labelled: LabelledSet,
    *,
    train: LabelledSet | None = None,
    crf: bool = True,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Score a model on a labelled set by the published protocol, beside its backbone's raw features.

    train: images for the backbone's clusters, see `baseline_images` for the default, and if they have labels for the
    linear probes. Returns the scores, plain values: dataset, classes, images, clusters, model, seed, protocol,
    published (see `datasets.Published`), and results, a list of {features, probe, crf, accuracy, miou, iou, confusion,
    assignment, image_accuracy, many_to_one}; shares are fractions, confusion is (n_classes, K) pixel counts,
    many_to_one the measures with each cluster in its majority class, or None where clusters are not more than classes.
    Raises ValueError for unreadable, unpaired or wrongly sized files and for a set without one labelled pixel.
    """
    train = train or baseline_images(model, labelled)
    clusters = cluster_count(model)
    spare = clusters > len(labelled.classes)
    if spare:
        log.warning(SPARE_CLUSTERS, clusters, len(labelled.classes))
    probes = fit_probes(model, labelled, train=train, seed=seed, progress=progress)
    counts = confusions(model, labelled, probes, crf=crf, progress=progress)
    if not next(iter(counts.values())).sum():
        raise ValueError(f"Not one labelled pixel in {labelled.name}: nothing to score.")
    results = []
    for (features, name, with_crf), matrices in counts.items():
        result = _result(matrices, probes[features, name], spare)
        results.append({"features": features, "probe": name, "crf": with_crf, **result})
    published = DATASETS[labelled.name].published if labelled.name in DATASETS else ()
    return {
        "dataset": labelled.name,
        "classes": labelled.classes,
        "images": len(labelled.pairs),
        "clusters": clusters,
        "seed": seed,
        "model": _model_facts(model),
        "protocol": _protocol(model, labelled, train, probes, crf),
        "published": [row._asdict() for row in published],
        "results": results,
    }


def _model_facts(model: Stego) -> dict[str, Any]:
    """What the scores say about the model; a released checkpoint does not tell its steps and seed."""
    names = ["backbone", "clusters", "preset"]
    if model.config.preset != RELEASED:
        names += ["steps", "seed"]
    return {name: getattr(model.config, name) for name in names}


def _result(counts: np.ndarray, probe: Probe, spare: bool) -> dict[str, Any]:
    """Measures of the confusions of all images (images, n_classes, K); spare: there are more clusters than classes."""
    confusion = counts.sum(0)
    many_to_one = None
    if probe.bias is not None:  # a linear probe names classes itself
        assignment = np.arange(confusion.shape[1])
    else:
        # what has become part of another cluster matches nothing
        kept = slice(None) if probe.merged is None else np.unique(probe.merged)
        assignment = np.full(confusion.shape[1], -1)
        assignment[kept] = match_clusters(confusion[:, kept])
        if spare:
            many_to_one = measure(confusion, confusion.argmax(0))
    return {
        **measure(confusion, assignment),
        "confusion": confusion.tolist(),
        "image_accuracy": [measure(matrix, assignment)["accuracy"] for matrix in counts],
        "many_to_one": many_to_one,
    }


def _protocol(model: Stego, labelled: LabelledSet, train: LabelledSet, probes: Probes, crf: bool) -> str:
    """What was done, and what the reference implementation does differently."""
    side = protocol_side(model.backbone.patch)
    clusters = cluster_count(model)
    n_classes = len(labelled.classes)
    used = f"{min(len(train.pairs), PROBE_IMAGES)} images ({train.source})"
    linear = "no linear probe: no train labels"
    if (STEGO, LINEAR) in probes:
        own = released_linear(model, labelled)
        linear = "linear probe of the checkpoint" if own else "linear probes fitted on their labels"
    differences = ["images bilinear (reference: nearest)"]
    if train.classes:
        differences.append(
            f"linear probes to convergence on {side} x {side} crops (reference: along with the head)"
        )
    if model.config.adaptation:
        differences.append("centres adapted to each image (reference: the same for all)")
    if clusters > n_classes:
        differences.append("clusters left over count as errors (reference: dropped)")
    return (
        f"{len(labelled.pairs)} images ({labelled.source}); shorter side to {side}, labels nearest, centre "
        f"crop {side} x {side}; backbone in float32, averaged with the mirror image; "
        f"{'dense CRF, 10 iterations' if crf else 'no CRF'}; one confusion matrix, {clusters} clusters "
        f"matched with {n_classes} classes (Hungarian); the backbone's k-means fitted on {used}; {linear}; "
        f"{'; '.join(differences)}"
    )
