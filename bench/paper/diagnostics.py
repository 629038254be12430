"""What do correspondences know about labels? (Sec. 3.1, Fig. 3; App. A.6, Fig. 10)

    python bench/paper/diagnostics.py MODEL --images val/ --labels val_labels/ [--names FILE] [-o FOLDER]

Takes the correspondences of backbone features, those of codes and the CRF's kernel as predictors of "these
two positions of an image have one label". Prints the average precision of each; writes precision-recall.png,
the curves, and couplings-*.png: which labels the strongest couplings between neighbouring images join.
"""

import sys
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cli_parts.drawing import line_chart, matrix_picture
from cli_parts.evaluation import both_features, protocol_side
from cli_parts.labels import LabelledSet, folder_set
from crf import COMPAT, SMOOTH_COMPAT, SMOOTH_SXY, SRGB, SXY
from stego import Stego, correspondence, nearest_neighbors, unit
from stego_parts.clusters import pixels
from stego_parts.images import IGNORE, write_image

DIAGNOSTIC_POINTS = 121  # positions of an image whose pairs are compared, as many as enter a training step
CURVE_POINTS = 200  # points of a precision-recall curve that are drawn


@torch.inference_mode()
def diagnose(model: Stego, labelled: LabelledSet, *, seed: int = 0) -> dict:
    """What do correspondences know about labels?

    curves: {kind: {recall, precision, average_precision}} of feature correspondences, code correspondences
    and the CRF's kernel as predictors of "these two positions of an image have one label" (Sec. 3.1), over
    all pairs of random positions of each image. couplings: {kind: (n, n) counts}: for each position (row: its
    label) the label of the position it corresponds with most in the nearest other image (App. A.6).
    """
    points = _points(model, labelled, seed)
    weights_of, same = {"backbone features": [], "codes": [], "CRF kernel": []}, []
    for point in points:
        upper = tuple(torch.triu_indices(len(point["label"]), len(point["label"]), 1))
        same.append(point["label"][upper[0]] == point["label"][upper[1]])
        weights = [correspondence(point[kind], point[kind]) for kind in ("backbone", "stego")] + [
            _crf_kernel(point)
        ]
        for values, weight in zip(weights_of.values(), weights):
            values.append(weight[upper])
    same = torch.cat(same).numpy()
    if not same.any():
        raise ValueError(
            f"No two positions of one label in an image of {labelled.name}: nothing to diagnose."
        )
    curves = {name: precision_recall(torch.cat(values).numpy(), same) for name, values in weights_of.items()}
    return dict(
        curves=curves, base_rate=float(same.mean()), couplings=_couplings(points, len(labelled.classes))
    )


def _points(model: Stego, labelled: LabelledSet, seed: int) -> list[dict]:
    """Random labelled positions of each image: unit features (P, D), label, colour, place (P, 2)."""
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
    return points


def _crf_kernel(point: dict) -> Tensor:
    """The CRF's pairwise kernel between positions (App. A.9): (P, P)."""
    near, alike = (torch.cdist(point[key], point[key]).square() for key in ("place", "colour"))
    colour = torch.exp(-near / (2 * SXY**2) - alike / (2 * SRGB**2))
    return COMPAT * colour + SMOOTH_COMPAT * torch.exp(-near / (2 * SMOOTH_SXY**2))


def precision_recall(values: np.ndarray, positive: np.ndarray) -> dict:
    """Curve and average precision of values (N,) as a predictor of positive (N,) bool; equal values go
    together.

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


def figures(diagnostics: dict, classes: list[str]) -> dict:
    """{name: picture}: the curves, and the couplings of features and of codes."""
    pictures = {
        "precision-recall": line_chart(
            {
                f"{name} (AP {curve['average_precision']:.3f})": (curve["recall"], curve["precision"])
                for name, curve in diagnostics["curves"].items()
            },
            title="Correspondences as predictors of equal labels",
            x_label="recall",
            y_label="precision",
            y_range=(0, 1),
        )
    }
    for name, count in diagnostics["couplings"].items():
        with np.errstate(invalid="ignore"):  # a class that does not occur: NaN
            shares = np.array(count, float) / np.sum(count, 1, keepdims=True)
        title = f"Labels joined by the strongest couplings, {name}, %"
        pictures[f"couplings-{name.split()[-1]}"] = matrix_picture(shares, classes, classes, title=title)
    return pictures


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.option("--images", required=True, type=click.Path(exists=True))
@click.option("--labels", required=True, type=click.Path(exists=True))
@click.option("--names", type=click.Path(exists=True))
@click.option("-o", "--output", default="diagnostics", type=Path, help="Folder of the figures.")
@click.option("--seed", default=0)
def main(model, images, labels, names, output, seed):
    labelled = folder_set(images, labels, names=names)
    diagnostics = diagnose(Stego.load(model), labelled, seed=seed)
    print(f"{len(labelled.pairs)} images, base rate {diagnostics['base_rate']:.3f}; average precision:")
    for name, curve in diagnostics["curves"].items():
        print(f"{name:20}{curve['average_precision']:6.3f}")
    for name, picture in figures(diagnostics, labelled.classes).items():
        write_image(picture, output / f"{name}.png")


if __name__ == "__main__":
    main()
