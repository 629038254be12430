"""The published evaluation protocol (STEGO Sec. 4 and App. A): what makes a number comparable.

Images and labels are resized to 320 on the shorter side and cropped to the central 320 x 320; codes are averaged with
those of the mirror image and upsampled; cluster probe and linear probe, each with and without a CRF; one confusion
matrix over the whole set, Hungarian matching, mIoU. In order: metrics, probes, the evaluation, its report.
"""

import json
import logging
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cli_parts.datasets import DATASETS
from cli_parts.labels import SIDE, LabelledSet
from kmeans import CosineKMeans
from stego import CLUSTER_STARTS, Stego
from stego_parts.clusters import Probe, mirror_averaged, segment
from stego_parts.config import RELEASED
from stego_parts.features import dense_features, to_tensor
from stego_parts.files import find_images, write_bytes
from stego_parts.images import IGNORE
from stego_parts.running import Progress, no_progress, or_skip, prefetch

log = logging.getLogger("stego")

PROBE_IMAGES = 2000  # train images that the probes are fitted on, drawn at random from larger sets
PROBE_ROWS = 400_000  # positions of them
PROBE_RATE = 5e-3  # Adam, linear probe (App. A.11)
PROBE_BATCH = 4096  # positions a step
ROUND = 50  # steps after which the loss of a linear probe is looked at
CONVERGED = 1e-3  # nats: a fall of the loss over a round below which it stands still
PATIENCE, ROUNDS = 3, 200  # rounds without a fall that end the training; the greatest number of rounds
SPARE_CLUSTERS = (
    "%d clusters for %d classes: those left over count as errors. Rows named many-to-one give each cluster to "
    "its majority class, by the labels: compare them with nothing published."
)


# ---- metrics ----------------------------------------------------------------------------------------------


def confusion_matrix(labels, clusters, *, n_classes: int, n_clusters: int) -> np.ndarray:
    """Pixel counts (n_classes, n_clusters) int64; rows are labels, columns clusters; no pixels of label 255.

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

    confusion: (n_classes, K) counts; assignment: (K,) class of each cluster or -1. Pixels of a cluster
    without a class count as errors (the reference implementation drops them). A class that occurs neither in
    the labels nor in the predictions has IoU NaN and is left out of the mean. Returns plain values: accuracy, miou
    (fractions), iou (of each class), assignment.
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
        "iou": iou.tolist(),
        "assignment": assignment.tolist(),
    }


# ---- probes (Sec. 4.1) ------------------------------------------------------------------------------------


def masks_of(features: dict, probes: dict, image: Image.Image, *, crf: bool) -> dict:
    """What probes {(features, probe): Probe} say of each pixel: {(features, probe, with CRF): (H, W) uint8}.

    features: maps {features: (1, D, h, w)} of the image; crf: also what they say after a CRF.
    """
    described = []
    for (kind, _), probe in probes.items():
        codes = features[kind]
        described.append((codes, probe.adapted(codes)))
    masks = {}
    for sharp in (False, True) if crf else (False,):
        for key, mask in zip(probes, segment(image, described, crf=sharp)):
            masks[(*key, sharp)] = mask
    return masks


def class_shares(label: np.ndarray, classes: int, patch: int) -> Tensor:
    """Share of each class in the pixels of each patch: label (H, W) -> (H / patch * W / patch, classes)."""
    known = torch.from_numpy(label.astype(np.int64)).clamp(max=classes)
    shares = F.one_hot(known, classes + 1)[..., :classes].float()  # (H, W, n); ignored: zero
    return F.avg_pool2d(shares.permute(2, 0, 1), patch).flatten(1).T  # (h * w, n)


def linear_probe(rows: Tensor, shares: Tensor, *, seed: int = 0, progress: Progress = no_progress) -> Probe:
    """Softmax regression from features (N, D) to shares of classes (N, n) by Adam, until the loss stands still.

    The cross entropy is that of the labelled pixels of each position. Features are standardised on the way,
    which changes the path and not the goal. When it stands still: CONVERGED, PATIENCE, ROUNDS.
    """
    rows, shares = rows[shares.sum(1) > 0], shares[shares.sum(1) > 0]
    if not len(rows):
        raise ValueError("Not one labelled pixel in the train images; the linear probe needs labels.")
    mean, deviation = rows.float().mean(0), rows.float().std(0, correction=0) + 1e-6
    layer = torch.nn.Linear(rows.shape[1], shares.shape[1]).to(rows.device)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=PROBE_RATE)
    generator = torch.Generator().manual_seed(seed)
    best, still = math.inf, 0
    for done in range(ROUNDS):
        progress("probe", done, ROUNDS)
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
    progress("probe", ROUNDS, ROUNDS)
    weight = layer.weight.detach() / deviation
    return Probe(weight, layer.bias.detach() - weight @ mean)


def probe_rows(
    model: Stego, images: LabelledSet, *, seed: int = 0, progress: Progress = no_progress
) -> tuple[Tensor, Tensor]:
    """Backbone features (N, C) float16 and class shares (N, n) at random positions of random images of a set.

    Of a set without labels n is 0, and images that cannot be read are named in a warning and left out.
    """
    generator, n = torch.Generator().manual_seed(seed), len(images.classes)
    chosen = torch.randperm(len(images.pairs), generator=generator)[:PROBE_IMAGES].tolist()
    patch, each = model.backbone.patch, max(PROBE_ROWS // len(chosen), 1)
    # images with labels are asked for by name
    read = images.read if n else partial(or_skip, images.read)
    rows, shares = [], []
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


def protocol_side(patch: int) -> int:
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
    if paths := images_of(model):
        source = f"the images that the model was fitted on ({', '.join(map(str, model.config.images))})"
    else:
        paths, source = [path for path, _ in labelled.pairs], "the scored images themselves"
    return LabelledSet(labelled.name, [], [(path, None) for path in paths], None, source)


def fit_probes(
    model: Stego,
    labelled: LabelledSet,
    *,
    train: LabelledSet,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict:
    """{(features, probe): Probe} for features "stego" and "backbone", probes "cluster" and "linear".

    The model's own clusters need no fitting. The others are fitted on `train`: the backbone's clusters, as
    many as the model has, and where it has labels the linear probes.
    """
    probes = {("stego", "cluster"): model.probe}
    rows, shares = probe_rows(model, train, seed=seed, progress=progress)
    progress("k-means", 0, 1)
    kmeans = CosineKMeans(cluster_count(model), n_init=CLUSTER_STARTS, seed=seed).fit(rows.float())
    progress("k-means", 1, 1)
    probes["backbone", "cluster"] = Probe(kmeans.cluster_centers_.to(model.device))
    if model.linear is not None and len(model.linear[1]) == len(labelled.classes):
        probes["stego", "linear"] = Probe(*model.linear)  # comes with a released checkpoint
    if train.classes:
        with torch.inference_mode():
            describe = model.head.describe  # what is clustered, and what both_features gives
            codes = [describe(part.float().to(model.device)).cpu() for part in rows.split(65536)]
        for features, x in (("stego", torch.cat(codes).clone()), ("backbone", rows)):
            if (features, "linear") not in probes:
                probe = linear_probe(x, shares, seed=seed, progress=progress)
                probes[features, "linear"] = Probe(*(part.to(model.device) for part in probe[:2]))
    return probes


def cluster_count(model: Stego) -> int:
    """Clusters of a model, those with one name counted once."""
    return len(np.unique(model.merged))


# ---- the evaluation (Sec. 4) ------------------------------------------------------------------------------


def both_features(model: Stego, image: Image.Image) -> dict[str, Tensor]:
    """What is clustered and the backbone's features of an image, averaged with its mirror's: (1, D, h, w)."""
    seen = partial(dense_features, model.backbone, device=model.device, exact=True)
    codes, features = mirror_averaged(to_tensor(image)[None], seen, model.head.on_map, torch.nn.Identity())
    return {"stego": codes, "backbone": features}


@torch.inference_mode()
def confusions(
    model: Stego, labelled: LabelledSet, probes: dict, *, crf: bool = True, progress: Progress = no_progress
) -> dict:
    """{(features, probe, crf): (images, n_classes, K) int64} of every probe on every image, also after a CRF."""
    side, n, counts = protocol_side(model.backbone.patch), len(labelled.classes), {}
    read = partial(labelled.read, side=side, bands=model.config.bands)
    pairs = prefetch(read, range(len(labelled.pairs)))
    for done, (image, label) in enumerate(pairs, 1):
        for key, mask in masks_of(both_features(model, image), probes, image, crf=crf).items():
            matrix = confusion_matrix(label, mask, n_classes=n, n_clusters=len(probes[key[:2]].weight))
            counts.setdefault(key, []).append(matrix)
        progress("evaluate", done, len(labelled.pairs))
    return {key: np.stack(matrices) for key, matrices in counts.items()}


def evaluate(
    model: Stego,
    labelled: LabelledSet,
    *,
    train: LabelledSet | None = None,
    crf: bool = True,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict:
    """Score a model on a labelled set by the published protocol, beside its backbone's raw features.

    train: images for the backbone's clusters, see `baseline_images` for the default, and if they have labels for the
    linear probes. Returns plain values, ready for JSON: dataset, classes, images, clusters, model, seed, protocol,
    published (see `datasets.Published`), and results, a list of {features, probe, crf, accuracy, miou, iou, confusion,
    assignment, image_accuracy, many_to_one}; shares are fractions, confusion is (n_classes, K) pixel counts,
    many_to_one the scores with each cluster in its majority class, or None where clusters are not more than classes.
    Raises ValueError for unreadable, unpaired or wrongly sized files and for a set without one labelled pixel.
    """
    train, clusters = train or baseline_images(model, labelled), cluster_count(model)
    if spare := clusters > len(labelled.classes):
        log.warning(SPARE_CLUSTERS, clusters, len(labelled.classes))
    probes = fit_probes(model, labelled, train=train, seed=seed, progress=progress)
    counts = confusions(model, labelled, probes, crf=crf, progress=progress)
    if not next(iter(counts.values())).sum():
        raise ValueError(f"Not one labelled pixel in {labelled.name}: nothing to score.")
    results = [
        dict(features=features, probe=probe, crf=sharp, **_result(each, probes[features, probe], spare))
        for (features, probe, sharp), each in counts.items()
    ]
    published = DATASETS[labelled.name].published if labelled.name in DATASETS else ()
    told = ("backbone", "clusters", "preset") + (() if model.config.preset == RELEASED else ("steps", "seed"))
    return dict(
        dataset=labelled.name,
        classes=labelled.classes,
        images=len(labelled.pairs),
        clusters=clusters,
        seed=seed,
        model={key: getattr(model.config, key) for key in told},
        protocol=_protocol(model, labelled, train, probes, crf),
        published=[row._asdict() for row in published],
        results=results,
    )


def _result(counts: np.ndarray, probe: Probe, spare: bool) -> dict:
    """Scores of the confusions of all images (images, n_classes, K); a linear probe names classes itself."""
    confusion, many_to_one = counts.sum(0), None
    if probe.bias is not None:
        assignment = np.arange(confusion.shape[1])
    else:
        assignment = match_clusters(confusion)
        if probe.merged is not None:  # what has become part of another cluster matches nothing
            assignment[probe.merged != np.arange(len(assignment))] = -1
        many_to_one = scores(confusion, confusion.argmax(0)) if spare else None
    accuracies = [scores(one, assignment)["accuracy"] for one in counts]
    rest = dict(confusion=confusion.tolist(), image_accuracy=accuracies, many_to_one=many_to_one)
    return scores(confusion, assignment) | rest


def _protocol(model: Stego, labelled: LabelledSet, train: LabelledSet, probes: dict, crf: bool) -> str:
    """What was done, and what the reference implementation does differently."""
    side, clusters, n = protocol_side(model.backbone.patch), cluster_count(model), len(labelled.classes)
    used = f"{min(len(train.pairs), PROBE_IMAGES)} images ({train.source})"
    linear = "no linear probe: no train labels"
    if ("stego", "linear") in probes:
        linear = "linear probe of the checkpoint" if model.linear else "linear probes fitted on their labels"
    differences = ["images bilinear (reference: nearest)"]
    if train.classes:
        differences.append(
            f"linear probes to convergence on {side} x {side} crops (reference: along with the head)"
        )
    if model.config.adaptation:
        differences.append("centres adapted to each image (reference: the same for all)")
    if clusters > n:
        differences.append("clusters left over count as errors (reference: dropped)")
    return (
        f"{len(labelled.pairs)} images ({labelled.source}); shorter side to {side}, labels nearest, centre "
        f"crop {side} x {side}; backbone in float32, averaged with the mirror image; "
        f"{'dense CRF, 10 iterations' if crf else 'no CRF'}; one confusion matrix, {clusters} clusters "
        f"matched with {n} classes (Hungarian); the backbone's k-means fitted on {used}; {linear}; "
        f"{'; '.join(differences)}"
    )


# ---- the report -------------------------------------------------------------------------------------------


def headline(report: dict) -> dict:
    """The result a model is known by: its clusters, with the CRF where there was one."""
    return [r for r in report["results"] if (r["features"], r["probe"]) == ("stego", "cluster")][-1]


def table(report: dict) -> str:
    """All scores in percent, with the published ones, IoU of each class, and the protocol in one line."""
    rows = _rows(report)
    wide = max(len(text) for text in (report["dataset"], *(name for name, _ in rows)))
    lines = [
        f"{report['dataset']:{wide}}{'unsupervised':>18}{'linear probe':>18}",
        f"{'percent':{wide}}" + 2 * f"{'accuracy':>11}{'mIoU':>7}",
    ]
    for name, cells in rows:
        texts = ["-" if value is None else f"{value:.1f}" for value in cells]
        lines.append(f"{name:{wide}}" + "".join(f"{t:>{width}}" for t, width in zip(texts, (11, 7, 11, 7))))
    best = headline(report)
    labelled = np.array(best["confusion"]).sum(1)
    clusters = {c: k for k, c in enumerate(best["assignment"])}
    lines += ["", f"{'class':20}{'IoU':>6}{'pixels':>8}  cluster   (stego{' + CRF' if best['crf'] else ''})"]
    lines += [
        f"{name:20}{'-' if np.isnan(iou) else f'{100 * iou:.1f}':>6}{share:>8.1%}  {clusters.get(i, '-')}"
        for i, (name, iou, share) in enumerate(zip(report["classes"], best["iou"], labelled / labelled.sum()))
    ]
    return "\n".join([*lines, "", f"protocol: {report['protocol']}"])


def _rows(report: dict) -> list[tuple]:
    """(name, four percentages or None) of what was measured, and of what was published."""
    names, rows = {"stego": "stego", "backbone": f"k-means, {report['model']['backbone']} alone"}, {}
    for result in report["results"]:
        name = names[result["features"]] + (" + CRF" if result["crf"] else "")
        first = 0 if result["probe"] == "cluster" else 2
        for suffix, part in (("", result), (", many-to-one", result["many_to_one"])):
            if part:
                cells = rows.setdefault(name + suffix, [None] * 4)
                cells[first : first + 2] = 100 * part["accuracy"], 100 * part["miou"]
    ordered = sorted(rows.items(), key=lambda row: (row[0].startswith("k-means"), "CRF" in row[0]))
    figures = ("accuracy", "miou", "linear_accuracy", "linear_miou")
    published = [(f"{row['name']} (published)", [row[key] for key in figures]) for row in report["published"]]
    return ordered + published


def write_json(report: dict, path):
    """The whole report; NaN (a class that does not occur) becomes null."""
    plain = json.loads(json.dumps(report), parse_constant=lambda nan: None)
    write_bytes(json.dumps(plain, indent=1).encode(), path)
