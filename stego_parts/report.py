"""Pictures and words about a model: what a fit did, what corresponds, where an evaluation went well and badly."""

import itertools
import logging
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stego import pixels, unit, unmirror
from stego_parts.datasets import LabelledSet
from stego_parts.drawing import line_chart, mark, matrix_picture, spotlight, strips
from stego_parts.images import IGNORE, mask_image, read_image, to_tensor, voc_palette, write_image
from stego_parts.protocol import _side, both_features, cluster_map, headline
from stego_parts.tokens import BILINEAR, backbone_size

log = logging.getLogger("stego")

SHOWN, CANDIDATES = (
    4,
    300,
)  # other images that a sheet of correspondences shows, and among how many it looks for them
LIT_HEIGHT = 200  # pixels: height of its pictures
POINT_COLOURS = ((255, 40, 40), (40, 210, 40), (70, 110, 255), (255, 190, 0), (230, 60, 230), (0, 200, 220))


@torch.inference_mode()
def correspondence_sheet(
    network, image, at, *, others=(), model=None, device="cpu", progress=None
) -> Image.Image:
    """What corresponds with points of an image, in itself and in others: a row of coloured pictures a point.

    network: a backbone; model: one that was fitted on it, for rows of its codes too. image: a path; at: points (x, y)
    in its pixels; others: paths, of more than SHOWN those whose averaged features are nearest. Full colour is the
    point itself, none its mean correspondence with its image, or less (the centering of Eq. 3).
    Raises ValueError for a point outside of the image, or what cannot be read.
    """
    picture = read_image(image)
    for x, y in at:
        if not (0 <= x < picture.width and 0 <= y < picture.height):
            raise ValueError(
                f"The point {x},{y} is not in {image}, which is {picture.width} x {picture.height} "
                f"pixels: x is 0 to {picture.width - 1}, y 0 to {picture.height - 1}."
            )
    own = _unit_maps(network, model, picture, image, device)
    if len(others) > SHOWN:
        others = _nearest_images(
            network, unit(own["backbone features"].mean((1, 2))), others, device, progress
        )
    pictures = [(picture, own)]
    for path in others:
        pictures.append((other := read_image(path), _unit_maps(network, model, other, path, device)))
    rows, names = [], ", ".join(Path(path).name for path in others)
    for (x, y), colour in zip(at, itertools.cycle(POINT_COLOURS)):
        for kind, maps in own.items():
            h, w = maps.shape[1:]
            code = maps[:, int(y * h / picture.height), int(x * w / picture.width)]  # (D,)
            floor = float((code @ maps.flatten(1)).mean())
            lit = [_lit(each, code, found[kind], floor, colour) for each, found in pictures]
            mark(lit[0], x * lit[0].width / picture.width, y * lit[0].height / picture.height, colour)
            rows.append((f"{kind} at {x},{y}" + (f"; {names}" if names else ""), lit))
    return strips(rows, legend={})


def _unit_maps(network, model, picture: Image.Image, name, device) -> dict:
    """Unit features (C, h, w) of a picture, averaged with its mirror's, and the model's codes (D, h, w)."""
    x = to_tensor(picture.resize(backbone_size(picture, network.patch, name=name), BILINEAR))[None].to(device)
    seen = network(torch.cat([x, x.flip(-1)]))  # (2, C, h, w)
    found = {"backbone features": seen} | ({"codes": model.head.on_map(seen)} if model else {})
    return {kind: F.normalize(unmirror(maps)[0], dim=0) for kind, maps in found.items()}


def _nearest_images(network, mean: Tensor, paths, device, progress) -> list:
    """The SHOWN images whose averaged features are nearest to a unit vector (C,), of CANDIDATES spread over paths."""
    paths, near = list(paths)[:: math.ceil(len(paths) / CANDIDATES)], []
    for done, path in enumerate(paths, 1):
        try:
            maps = _unit_maps(network, None, read_image(path), path, device)["backbone features"]
            near.append((float(unit(maps.mean((1, 2))) @ mean), path))
        except (ValueError, FileNotFoundError) as error:
            log.warning("Skipped: %s", error)
        if progress:
            progress("neighbors", done, len(paths))
    return [path for _, path in sorted(near, key=lambda each: -each[0])[:SHOWN]]


def _lit(picture: Image.Image, code: Tensor, maps: Tensor, floor: float, colour) -> Image.Image:
    """A picture coloured where its unit features (C, h, w) correspond with a unit vector (C,) by more than floor."""
    picture = picture.resize(
        (max(round(picture.width * LIT_HEIGHT / picture.height), 1), LIT_HEIGHT), BILINEAR
    )
    weight = (torch.einsum("chw,c->hw", maps, code) - floor) / max(1 - floor, 1e-6)
    weight = F.interpolate(weight[None, None], size=picture.size[::-1], mode="bilinear", align_corners=False)[
        0, 0
    ]
    return spotlight(picture, weight.clamp(0, 1).cpu().numpy(), colour)


def write_figures(report: dict, model, labelled: LabelledSet, folder) -> list[Path]:
    """confusion.png, strips.png, with diagnostics also precision-recall.png and couplings-*.png; returns their paths."""
    best, classes = headline(report), report["classes"]
    columns = np.argsort([c if c >= 0 else len(classes) for c in best["assignment"]], kind="stable")
    pictures = {
        "confusion": matrix_picture(
            _rows_to_one(best["confusion"])[:, columns],
            classes,
            [f"cluster {k}" for k in columns],
            title=f"{report['dataset']}: where the pixels of each class go, %",
        ),
        "strips": _strips(best, model, labelled),
    }
    if "diagnostics" in report:
        curves = report["diagnostics"]["curves"]
        pictures["precision-recall"] = line_chart(
            {
                f"{name} (AP {curve['average_precision']:.3f})": (curve["recall"], curve["precision"])
                for name, curve in curves.items()
            },
            title="Correspondences as predictors of equal labels",
            x_label="recall",
            y_label="precision",
            y_range=(0, 1),
        )
        for name, count in report["diagnostics"]["couplings"].items():
            pictures[f"couplings-{name.split()[-1]}"] = matrix_picture(
                _rows_to_one(count),
                classes,
                classes,
                title=f"Labels joined by the strongest couplings, {name}, %",
            )
    for name, picture in pictures.items():
        write_image(picture, Path(folder) / f"{name}.png")
    return [Path(folder) / f"{name}.png" for name in pictures]


def _rows_to_one(counts) -> np.ndarray:
    counts = np.array(counts, dtype=float)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)  # a class that does not occur: NaN


@torch.inference_mode()
def _strips(best: dict, model, labelled: LabelledSet) -> Image.Image:
    """Image, label and prediction of the best, the median and the worst image by accuracy."""
    accuracy = np.array([np.nan if x is None else x for x in best["image_accuracy"]], dtype=float)
    ranked = np.argsort(-accuracy, kind="stable")[: np.isfinite(accuracy).sum()]  # NaN sorts last
    names = np.array([c if c >= 0 else IGNORE for c in best["assignment"]], np.uint8)  # of each cluster
    palette = voc_palette(len(labelled.classes))
    rows = []
    for what, i in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
        image, label = labelled.read(i, side=_side(model.backbone.patch))
        codes, picture = both_features(model, image)["stego"], pixels(image).to(model.device)
        clusters = cluster_map(codes, model.centers, label.shape, pixels=picture if best["crf"] else None)
        masks = [mask_image(mask, palette).convert("RGB") for mask in (label, names[clusters])]
        rows.append(
            (f"{what}: {labelled.pairs[i][0].name}, accuracy {100 * accuracy[i]:.1f} %", [image, *masks])
        )
    return strips(rows, legend=dict(zip(labelled.classes, palette.tolist())))
