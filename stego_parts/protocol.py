"""The published evaluation protocol (STEGO Sec. 4 and App. A): what makes a number comparable.

Images and labels are resized to 320 on the shorter side and cropped to the central 320 x 320; codes are averaged with
those of the mirror image and upsampled; cluster probe and linear probe, each with and without a CRF; one confusion
matrix over the whole set, Hungarian matching, mIoU. In order: labelled sets, metrics, probes, the evaluation,
diagnostics (Sec. 3.1, App. A.6), correspondences of points (Fig. 2), the report.
"""

import json
import logging
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from crf import COMPAT, SMOOTH_COMPAT, SMOOTH_SXY, SRGB, SXY, dense_crf
from kmeans import CosineKMeans
from stego import CLUSTER_STARTS, class_scores, correspondence, nearest_neighbors, pixels, unit, unmirror
from stego_parts.datasets import PUBLISHED, SIDE, LabelledSet
from stego_parts.images import IGNORE, replacing, to_tensor
from stego_parts.maps import dot_products
from stego_parts.tokens import Progress, dense_features, no_progress, prefetch

log = logging.getLogger("stego")

PROBE_IMAGES = 2000  # train images that the probes are fitted on, drawn at random from larger sets
PROBE_ROWS = 400_000  # positions of them
PROBE_RATE = 5e-3  # Adam, linear probe (App. A.11)
PROBE_BATCH = 4096  # positions a step
ROUND = 50  # steps after which the loss of a linear probe is looked at
CONVERGED = 1e-3  # nats: a fall of the loss over a round below which it stands still
PATIENCE, ROUNDS = 3, 200  # rounds without a fall that end the training; the greatest number of rounds
DIAGNOSTIC_POINTS = 121  # positions an image whose pairs are looked at, as many as enter a training step
CURVE_POINTS = 200  # points of a precision-recall curve that are kept


# ---- metrics ---------------------------------------------------------------------------------------------------


def confusion_matrix(labels, clusters, *, n_classes: int, n_clusters: int) -> np.ndarray:
    """Pixel counts (n_classes, n_clusters) int64; rows are labels, columns clusters; label 255 is left out.

    labels, clusters: integer arrays of one shape. Raises ValueError on values outside the ranges.
    """
    labels, clusters = np.asarray(labels), np.asarray(clusters)
    if labels.shape != clusters.shape:
        raise ValueError(
            f"Labels are {labels.shape} and clusters {clusters.shape}; they must have one shape."
        )
    known = labels != IGNORE
    labels, clusters = labels[known].astype(np.int64), clusters[known].astype(np.int64)
    for name, values, size in (("label", labels, n_classes), ("cluster", clusters, n_clusters)):
        if values.size and (values.min() < 0 or values.max() >= size):
            raise ValueError(
                f"Got {name} values {values.min()}..{values.max()}; "
                f"they must lie in 0..{size - 1} (or be {IGNORE} to be ignored)."
            )
    flat = np.bincount(labels * n_clusters + clusters, minlength=n_classes * n_clusters)
    return flat.reshape(n_classes, n_clusters)


def match_clusters(confusion) -> np.ndarray:
    """Hungarian matching on pixel counts over the whole set (Sec. 4.1).

    confusion: (n_classes, K) counts. Returns (K,) int64: the class of each cluster, -1 for a cluster left over.
    """
    confusion = np.asarray(confusion)
    classes, clusters = linear_sum_assignment(confusion, maximize=True)
    assignment = np.full(confusion.shape[1], -1, dtype=np.int64)
    assignment[clusters] = classes
    return assignment


def scores(confusion, assignment) -> dict:
    """Accuracy, mIoU and IoU of each class once clusters are named.

    confusion: (n_classes, K) counts; assignment: (K,) class of each cluster or -1. Pixels of a cluster without a
    class count as errors (the reference drops them, which flatters). A class that occurs neither in the labels nor
    in the predictions has IoU NaN and is left out of the mean. Returns accuracy, miou (fractions), iou (n_classes,).
    """
    confusion, assignment = np.asarray(confusion), np.asarray(assignment)
    n_classes = confusion.shape[0]
    named = np.zeros((n_classes, n_classes + 1), dtype=np.int64)  # last column: clusters without a class
    np.add.at(named.T, assignment, confusion.T)  # -1 lands in the last column
    hit = named.diagonal()
    union = named.sum(1) + named[:, :n_classes].sum(0) - hit
    iou = np.where(union > 0, hit / np.maximum(union, 1), np.nan)
    total = named.sum()
    return {
        "accuracy": float(hit.sum() / total) if total else float("nan"),
        "miou": float(np.nanmean(iou)) if (union > 0).any() else float("nan"),
        "iou": iou,
    }


# ---- probes (Sec. 4.1) ------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """A linear map from features to K scores: weight (K, D), and bias (K,) or None for cluster centres."""

    weight: Tensor
    bias: Tensor | None = None


def cluster_map(
    codes: Tensor,
    centers: Tensor,
    size: tuple[int, int],
    *,
    bias: Tensor | None = None,
    pixels: Tensor | None = None,
) -> np.ndarray:
    """Cluster of each pixel from codes (1, D, h, w), upsampled to size (H, W), and unit centres (K, D): (H, W) uint8.

    bias: (K,) for a linear probe, whose weights then stand for the centres. pixels: the image (3, H, W) uint8 if a CRF
    is to sharpen the result. Without one, scores are upsampled in place of codes: the largest stays the largest.
    """
    if pixels is not None and bias is None:
        scores = class_scores(codes[0], centers, size)  # (K, H, W)
    else:
        scores = dot_products(codes, centers) + (0 if bias is None else bias[:, None, None])
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)[0]  # (K, H, W)
    if pixels is not None:
        scores = dense_crf(pixels, scores)
    return scores.max(0).indices.byte().cpu().numpy()  # ten times faster than argmax(0)


def class_shares(label: np.ndarray, classes: int, patch: int) -> Tensor:
    """Share of each class in the pixels of each patch: label (H, W) -> (H / patch * W / patch, classes) float32."""
    known = torch.from_numpy(label.astype(np.int64))
    shares = F.one_hot(known.clamp(max=classes), classes + 1)[
        ..., :classes
    ].float()  # (H, W, n); ignored: zero
    return F.avg_pool2d(shares.permute(2, 0, 1), patch).flatten(1).T  # (h * w, n)


def linear_probe(rows: Tensor, shares: Tensor, *, seed: int = 0) -> Probe:
    """Softmax regression from features (N, D) to shares of classes (N, n) by Adam, until the loss stands still.

    The cross entropy is that of the labelled pixels of each position. Features are standardised on the way, which
    changes the path and not the goal. When it stands still: CONVERGED, PATIENCE, ROUNDS.
    """
    rows, shares = rows[shares.sum(1) > 0], shares[shares.sum(1) > 0]
    if not len(rows):
        raise ValueError("Not one labelled pixel in the train images; the linear probe needs labels.")
    mean, deviation = rows.float().mean(0), rows.float().std(0, correction=0) + 1e-6
    layer = torch.nn.Linear(rows.shape[1], shares.shape[1]).to(rows.device)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimizer, generator = (
        torch.optim.Adam(layer.parameters(), lr=PROBE_RATE),
        torch.Generator().manual_seed(seed),
    )
    best, still = math.inf, 0
    for _ in range(ROUNDS):
        total = 0.0
        for part in torch.randint(len(rows), (ROUND, min(PROBE_BATCH, len(rows))), generator=generator):
            logits = layer((rows[part].float() - mean) / deviation)
            loss = -(shares[part] * logits.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        loss = total / ROUND
        best, still = (loss, 0) if loss < best - CONVERGED else (best, still + 1)
        if still == PATIENCE:
            break
    weight = layer.weight.detach() / deviation
    return Probe(weight, layer.bias.detach() - weight @ mean)


def probe_rows(model, labelled: LabelledSet, *, seed: int = 0, progress: Progress = no_progress) -> tuple[Tensor, Tensor]:
    """Backbone features (N, C) float16 and class shares (N, n) at random positions of random images of a set."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labelled.pairs), generator=generator)[:PROBE_IMAGES].tolist()
    patch, each = model.backbone.patch, max(PROBE_ROWS // len(chosen), 1)
    rows, shares = [], []
    for done, (image, label) in enumerate(
        prefetch(lambda i: labelled.read(i, side=protocol_side(patch)), chosen), 1
    ):
        with torch.inference_mode():
            features = dense_features(model.backbone, to_tensor(image)[None], model.device)  # (1, C, h, w)
        kept = torch.randperm(features[0, 0].numel(), generator=generator)[:each]
        rows.append(features[0].flatten(1).T.cpu()[kept].half())
        shares.append(class_shares(label, len(labelled.classes), patch)[kept])
        progress("probes", done, len(chosen))
    return torch.cat(rows).clone(), torch.cat(shares)


def protocol_side(patch: int) -> int:
    return math.ceil(SIDE / patch) * patch


def fit_probes(
    model, labelled: LabelledSet, *, train: LabelledSet | None = None, seed: int = 0, progress: Progress = no_progress
) -> dict:
    """{(features, probe): Probe} for features "stego" and "backbone", probes "cluster" and "linear".

    The model's own clusters need no fitting. The others are fitted on `train`; without it the backbone's clusters
    are found in the evaluated images themselves, and there is no linear probe.
    """
    probes = {("stego", "cluster"): Probe(model.centers)}
    rows, shares = probe_rows(model, train or labelled, seed=seed, progress=progress)
    kmeans = CosineKMeans(len(model.centers), n_init=CLUSTER_STARTS, seed=seed).fit(rows.float())
    probes["backbone", "cluster"] = Probe(kmeans.cluster_centers_.to(model.device))
    if model.linear is not None and len(model.linear[1]) == len(labelled.classes):
        probes["stego", "linear"] = Probe(*model.linear)  # comes with a released checkpoint
    if train is not None:
        with torch.inference_mode():
            codes = torch.cat([model.head(part.float().to(model.device)).cpu() for part in rows.split(65536)])
        for features, x in (("stego", codes.clone()), ("backbone", rows)):
            if (features, "linear") not in probes:
                probe = linear_probe(x, shares, seed=seed)
                probes[features, "linear"] = Probe(*(part.to(model.device) for part in probe))
    return probes


# ---- the evaluation (Sec. 4) ------------------------------------------------------------------------------------


def both_features(model, image: Image.Image) -> dict:
    """The model's codes and the backbone's features of an image, each averaged with its mirror's: (1, D, h, w)."""
    x = to_tensor(image)[None]
    seen = dense_features(model.backbone, torch.cat([x, x.flip(-1)]), model.device)  # (2, C, h, w)
    return {"stego": unmirror(model.head.on_map(seen)), "backbone": unmirror(seen)}


@torch.inference_mode()
def confusions(model, labelled: LabelledSet, probes: dict, *, crf: bool = True, progress: Progress = no_progress) -> dict:
    """{(features, probe, crf): (images, n_classes, K) int64} of every probe on every image, with and without CRF."""
    found = {(*key, sharp): [] for key in probes for sharp in ((False, True) if crf else (False,))}
    side = protocol_side(model.backbone.patch)
    pairs = prefetch(lambda i: labelled.read(i, side=side), range(len(labelled.pairs)))
    for done, (image, label) in enumerate(pairs, 1):
        features, picture = both_features(model, image), pixels(image).to(model.device)
        for (kind, probe, sharp), counts in found.items():
            weight, bias = probes[kind, probe]
            clusters = cluster_map(
                features[kind], weight, label.shape, bias=bias, pixels=picture if sharp else None
            )
            counts.append(
                confusion_matrix(label, clusters, n_classes=len(labelled.classes), n_clusters=len(weight))
            )
        progress("evaluate", done, len(labelled.pairs))
    return {key: np.stack(counts) for key, counts in found.items()}


def evaluate(
    model,
    labelled: LabelledSet,
    *,
    train: LabelledSet | None = None,
    crf: bool = True,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict:
    """Score a model on a labelled set by the published protocol, beside its backbone's raw features.

    train: labelled images for the linear probe and the backbone's clusters. Returns plain values, ready for JSON:
    dataset, classes, images, model, seed, protocol, published, and results, a list of {features, probe, crf, accuracy,
    miou, iou, confusion, assignment, image_accuracy}; shares are fractions, confusion is (n_classes, K) pixel counts.
    Raises ValueError for unreadable, unpaired or wrongly sized files and for a set without one labelled pixel.
    """
    probes = fit_probes(model, labelled, train=train, seed=seed, progress=progress)
    counts = confusions(model, labelled, probes, crf=crf, progress=progress)
    if not next(iter(counts.values())).sum():
        raise ValueError(f"Not one labelled pixel in {labelled.name}: nothing to score.")
    results = [
        dict(features=features, probe=probe, crf=sharp, **_result(each, probe))
        for (features, probe, sharp), each in counts.items()
    ]
    return dict(
        dataset=labelled.name,
        classes=labelled.classes,
        images=len(labelled.pairs),
        seed=seed,
        model={key: getattr(model.config, key) for key in ("backbone", "classes", "preset", "steps", "seed")},
        protocol=_protocol(model, labelled, train, crf),
        published=PUBLISHED.get(labelled.name, []),
        results=results,
    )


def _result(each: np.ndarray, probe: str) -> dict:
    """Scores of the confusions of all images (images, n_classes, K); a linear probe's outputs are classes already."""
    confusion = each.sum(0)
    assignment = match_clusters(confusion) if probe == "cluster" else np.arange(confusion.shape[1])
    found = scores(confusion, assignment)
    single = [scores(one, assignment)["accuracy"] for one in each]
    return dict(
        accuracy=found["accuracy"],
        miou=found["miou"],
        iou=found["iou"].tolist(),
        confusion=confusion.tolist(),
        assignment=assignment.tolist(),
        image_accuracy=single,
    )


def _protocol(model, labelled: LabelledSet, train: LabelledSet | None, crf: bool) -> str:
    side = protocol_side(model.backbone.patch)
    fitted = (
        f"linear probes and the backbone's k-means fitted on {min(len(train.pairs), PROBE_IMAGES)} train images "
        f"({train.source})"
        if train
        else "backbone's k-means fitted on the same images, no train labels"
    )
    return (
        f"{len(labelled.pairs)} images ({labelled.source}); shorter side to {side} (images bilinear, labels "
        f"nearest), centre crop {side} x {side}; averaged with the mirror image; "
        f"{'dense CRF, 10 iterations' if crf else 'no CRF'}; one confusion matrix, {len(model.centers)} clusters "
        f"matched with {len(labelled.classes)} classes (Hungarian), clusters left over count as errors; {fitted}"
    )


# ---- diagnostics (Sec. 3.1, App. A.6) ----------------------------------------------------------------------------


@torch.inference_mode()
def diagnose(model, labelled: LabelledSet, *, seed: int = 0, progress: Progress = no_progress) -> dict:
    """What do correspondences know about labels?

    curves: {kind: {recall, precision, average_precision}} of feature correspondences, code correspondences and the
    CRF's kernel as predictors of "these two positions of an image have one label" (Sec. 3.1), over all pairs of
    random positions of each image. couplings: {kind: (n, n) counts}: for each position (row: its label) the label of
    the position it corresponds with most in the nearest other image (App. A.6).
    """
    points = _points(model, labelled, seed, progress)
    found, same = {"backbone features": [], "codes": [], "CRF kernel": []}, []
    for point in points:
        upper = tuple(torch.triu_indices(len(point["label"]), len(point["label"]), 1))
        same.append(point["label"][upper[0]] == point["label"][upper[1]])
        weights = [correspondence(point[kind], point[kind]) for kind in ("backbone", "stego")] + [
            _crf_kernel(point)
        ]
        for values, weight in zip(found.values(), weights):
            values.append(weight[upper])
    same = torch.cat(same).numpy()
    if not same.any():
        raise ValueError(
            f"No two positions of one label in an image of {labelled.name}: nothing to diagnose."
        )
    curves = {name: precision_recall(torch.cat(values).numpy(), same) for name, values in found.items()}
    return dict(
        curves=curves, base_rate=float(same.mean()), couplings=_couplings(points, len(labelled.classes))
    )


def _points(model, labelled: LabelledSet, seed: int, progress) -> list[dict]:
    """Random labelled positions of each image: unit features (P, D) of both kinds, label, colour, place (P, 2)."""
    generator, patch = torch.Generator().manual_seed(seed), model.backbone.patch
    points = []
    for i in range(len(labelled.pairs)):
        image, label = labelled.read(i, side=protocol_side(patch))
        features = both_features(model, image)
        h, w = features["stego"].shape[2:]
        here = torch.from_numpy(
            label[patch // 2 :: patch, patch // 2 :: patch].astype(np.int64)
        ).flatten()  # (h * w,)
        known = (here != IGNORE).nonzero()[:, 0]
        at = known[torch.randperm(len(known), generator=generator)[:DIAGNOSTIC_POINTS]]
        y, x = at // w * patch + patch // 2, at % w * patch + patch // 2
        point = {
            kind: unit(value[0].flatten(1).T[at.to(value.device)]).cpu() for kind, value in features.items()
        }
        point |= dict(
            label=here[at],
            place=torch.stack([y, x], 1).float(),
            colour=pixels(image)[:, y, x].T.float(),
            mean=unit(features["backbone"].mean((2, 3))).cpu(),
        )
        points.append(point)
        progress("diagnose", i + 1, len(labelled.pairs))
    return points


def _crf_kernel(point: dict) -> Tensor:
    """The CRF's pairwise kernel between positions (App. A.9): (P, P)."""
    near, alike = (torch.cdist(point[key], point[key]).square() for key in ("place", "colour"))
    colour = torch.exp(-near / (2 * SXY**2) - alike / (2 * SRGB**2))
    return COMPAT * colour + SMOOTH_COMPAT * torch.exp(-near / (2 * SMOOTH_SXY**2))


def precision_recall(values: np.ndarray, positive: np.ndarray) -> dict:
    """Curve and average precision of values (N,) as a predictor of positive (N,) bool; equal values go together.

    Returns recall and precision (at most CURVE_POINTS evenly spaced points, from the largest value down) and
    average_precision, the sum of precision times the step in recall over all thresholds.
    """
    order = np.argsort(-values, kind="stable")
    last = np.append(
        np.flatnonzero(np.diff(values[order])), len(values) - 1
    )  # the last of each run of equal values
    hits = np.cumsum(positive[order])[last]
    precision, recall = hits / (last + 1), hits / hits[-1]
    average = float(np.sum(np.diff(recall, prepend=0) * precision))
    kept = np.unique(np.append(np.searchsorted(recall, np.linspace(0, 1, CURVE_POINTS - 1)), len(last) - 1))
    return dict(recall=recall[kept].tolist(), precision=precision[kept].tolist(), average_precision=average)


def _couplings(points: list[dict], classes: int) -> dict:
    """Label pairs (n, n) that each position's strongest correspondence with the nearest other image joins."""
    neighbors = nearest_neighbors(torch.cat([point["mean"] for point in points]), 1)[:, 0].tolist()
    counts = {name: np.zeros((classes, classes), np.int64) for name in ("backbone features", "codes")}
    for point, other in zip(points, neighbors):
        partner = points[other]
        if partner is point or not len(partner["label"]):
            continue
        for kind, count in zip(("backbone", "stego"), counts.values()):
            strongest = correspondence(point[kind], partner[kind]).argmax(1)
            np.add.at(count, (point["label"].numpy(), partner["label"][strongest].numpy()), 1)
    return {name: count.tolist() for name, count in counts.items()}


# ---- the report ------------------------------------------------------------------------------------------------


def headline(report: dict) -> dict:
    """The result a model is known by: its clusters, with the CRF where there was one."""
    return [
        result
        for result in report["results"]
        if (result["features"], result["probe"]) == ("stego", "cluster")
    ][-1]


def table(report: dict) -> str:
    """All scores in percent, published figures beside them, IoU of each class, and the protocol in one line."""
    name, rows = {"stego": "stego", "backbone": f"k-means, {report['model']['backbone']} alone"}, []
    for features in name:
        for crf in (False, True):
            found = {
                result["probe"]: result
                for result in report["results"]
                if (result["features"], result["crf"]) == (features, crf)
            }
            if found:
                cells = [
                    100 * found[probe][key] if probe in found else None
                    for probe in ("cluster", "linear")
                    for key in ("accuracy", "miou")
                ]
                rows.append((name[features] + (" + CRF" if crf else ""), cells))
    rows += [(f"{who} (published)", cells) for who, *cells in report["published"]]
    wide = max(len(text) for text in (report["dataset"], *(who for who, _ in rows)))
    lines = [
        f"{report['dataset']:{wide}}{'unsupervised':>18}{'linear probe':>18}",
        f"{'percent':{wide}}" + 2 * f"{'accuracy':>11}{'mIoU':>7}",
    ]
    lines += [_row(who, cells, wide) for who, cells in rows]
    best = headline(report)
    labelled = np.array(best["confusion"]).sum(1)
    clusters = {c: k for k, c in enumerate(best["assignment"])}
    lines += ["", f"{'class':20}{'IoU':>6}{'pixels':>8}  cluster   (stego{' + CRF' if best['crf'] else ''})"]
    lines += [
        f"{name:20}{'-' if np.isnan(iou) else f'{100 * iou:.1f}':>6}{share:>8.1%}  {clusters.get(i, '-')}"
        for i, (name, iou, share) in enumerate(zip(report["classes"], best["iou"], labelled / labelled.sum()))
    ]
    if "diagnostics" in report:
        lines += [
            "",
            "average precision of correspondences as predictors of equal labels (base rate "
            f"{report['diagnostics']['base_rate']:.3f})",
        ]
        lines += [
            f"{name:20}{curve['average_precision']:6.3f}"
            for name, curve in report["diagnostics"]["curves"].items()
        ]
    return "\n".join([*lines, "", f"protocol: {report['protocol']}"])


def _row(name: str, cells, wide: int) -> str:
    texts = ["-" if value is None else f"{value:.1f}" for value in cells]
    return f"{name:{wide}}" + "".join(f"{text:>{width}}" for text, width in zip(texts, (11, 7, 11, 7)))


def write_json(report: dict, path):
    """The whole report; NaN (a class that does not occur) becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    with replacing(path) as part:
        part.write_text(json.dumps(plain(report), allow_nan=False, indent=1))
