"""Pictures and words about a model: what a fit did, what its clusters are, what corresponds, how an evaluation went."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cli_parts import drawing
from cli_parts.drawing import image_rows, line_chart, matrix_picture
from cli_parts.evaluation import both_features, headline, masks_of, protocol_side
from cli_parts.labels import LabelledSet
from stego import FitRecord, Stego, unit
from stego_parts import images
from stego_parts.checkpoint import training_warning
from stego_parts.clusters import mirror_averaged, segment
from stego_parts.config import RELEASED, SETTINGS, TERMS
from stego_parts.features import BILINEAR, Device, dense_features, five_boxes, input_image, to_tensor
from stego_parts.files import write_bytes
from stego_parts.running import Progress, no_progress, or_skip

SHEET_IMAGES, SHEET_SAMPLE = 24, 12  # images up to which the contact sheet shows all; how many of more
REGION = 1 / 3  # side of the squares that show what a cluster is, of the image's shorter side
REGIONS = 6  # of them for each cluster
SHOWN, CANDIDATES = 4, 300  # other images that a sheet of correspondences shows; among how many it looks
HEATMAP_HEIGHT = 200  # pixels: height of its pictures
CROP_HEIGHT = 112  # pixels: height of the crops that show nearest neighbours
CROPS = 6  # that are shown with their neighbours
FEATURES = "backbone features"
KNOWN = logging.DEBUG  # level at which images are skipped that the fit has named


def _usable(function: Callable, paths, stage: str, progress: Progress, level=logging.WARNING) -> Iterator:
    """(path, function(path)) of each image that can be used; another is said to be skipped, at a level."""
    for done, path in enumerate(paths, 1):
        if (result := or_skip(function, path, level=level)) is not None:
            yield path, result
        progress(stage, done, len(paths))


def _small_image(model: Stego, path: Path) -> Image.Image:
    """An image, as small as the backbone sees it."""
    return model.input_image(images.read_image(path))


def _write_pictures(pictures: dict[str, Image.Image], folder: Path | str):
    for name, picture in pictures.items():
        images.write_image(picture, Path(folder) / f"{name}.png")


# ---- a fit -----------------------------------------------------------------------------------------------------


def fit_sheet(models: Sequence[Stego], *, progress: Progress = no_progress) -> Image.Image:
    """The picture of a fit: its images, of many some that are evenly spread, beside their segments.

    The CRF works at the size of a picture on the sheet. Of several models with one head: `_comparison_sheet`.
    """
    model, paths = models[0], models[0].record.paths  # of large images, what was seen at once
    if len(models) > 1:
        return _comparison_sheet(models, paths, progress)
    if len(paths) > SHEET_IMAGES:
        paths = paths[:: len(paths) // SHEET_SAMPLE][:SHEET_SAMPLE]
    seen = _usable(partial(_small_image, model), paths, "picture", progress, KNOWN)
    size = math.prod(drawing.SHEET_CELL) / 1e6
    pairs = [(image, model.predict(image, crf_size=size)) for _, image in seen]
    return drawing.contact_sheet(pairs, model)


@torch.inference_mode()
def _comparison_sheet(models: Sequence[Stego], paths: Sequence[Path], progress: Progress) -> Image.Image:
    """At most SHEET_SAMPLE of the images, a row each, beside their segments by models with one head, without CRF."""
    paths, rows = paths[:: -(-len(paths) // SHEET_SAMPLE)], []
    for path, image in _usable(partial(_small_image, models[0]), paths, "picture", progress, KNOWN):
        codes = models[0].codes(to_tensor(image)[None])  # (1, D, h, w)
        described = [(codes, model.probe.adapted(codes)) for model in models]
        pictures = [drawing.cell(image)]
        for model, mask in zip(models, segment(image, described, crf=False)):
            pictures.append(drawing.cell(image, mask, model))
        rows.append((Path(path).name, pictures))
    return image_rows(rows, headings=["", *(f"{len(model.centers)} clusters" for model in models)])


def cluster_sheet(model: Stego, paths: Sequence[Path], *, progress: Progress = no_progress) -> Image.Image:
    """A picture of what each cluster is: its share of the training images, and regions of these images."""
    share = np.bincount(model.merged, model.share.numpy(), len(model.merged))  # (K,)
    rows = []
    for k, regions in enumerate(best_regions(model, paths, progress=progress)):
        if model.merged[k] == k:
            inside = [(picture, mask == k) for picture, mask in regions]
            name = drawing.cluster_name(k, model.labels)
            rows.append((f"{name}\n{share[k]:.1%}", tuple(model.colors[k].tolist()), inside))
    return drawing.region_sheet(rows)


@torch.inference_mode()
def best_regions(model: Stego, paths: Sequence[Path], *, progress: Progress = no_progress) -> list[list]:
    """What each cluster is: the squares of images that fit it best, REGIONS of them, at most one an image.

    The fit of a square is the mean over it of the cosine to the centre, 0 where another cluster is nearer.
    Returns for each cluster (picture, mask (side, side) uint8) pairs, the best first; clusters that share a name
    are one, the lowest of them.
    """
    best: list[list[tuple]] = [[] for _ in model.centers]  # of (fit, picture, mask)
    for _, picture in _usable(partial(_small_image, model), paths, "regions", progress):
        for k, region in _regions(model, picture).items():
            best[k] = sorted([*best[k], region], key=lambda each: -each[0])[:REGIONS]
    return [[(picture, mask) for _, picture, mask in regions] for regions in best]


def _regions(model: Stego, picture: Image.Image) -> dict[int, tuple[float, Image.Image, np.ndarray]]:
    """The square of a picture that fits each cluster best, and how well; clusters that are nowhere are left out."""
    codes = F.normalize(model.codes(to_tensor(picture)[None]), dim=1)  # (1, D, h, w)
    patch = model.backbone.patch
    probe = model.probe.adapted(codes)
    cosines = probe.dot_products(codes)[0]  # (K, h, w)
    mask = segment(picture, [(codes, probe)], crf=False)[0]
    won = cosines.clamp(min=0) * (cosines == cosines.amax(0))
    merged = torch.from_numpy(model.merged).to(won.device, torch.int64)
    won = torch.zeros_like(won).index_add_(0, merged, won)
    side = max(round(min(won.shape[1:]) * REGION), 1)
    fits = F.avg_pool2d(won, side, stride=1)  # (K, y, x)
    regions = {}
    for k, (fit, at) in enumerate(zip(*(each.tolist() for each in fits.flatten(1).max(1)))):
        x, y, size = at % fits.shape[2] * patch, at // fits.shape[2] * patch, side * patch
        if fit > 0:
            square = picture.crop((x, y, x + size, y + size))
            regions[k] = fit, square, mask[y : y + size, x : x + size].copy()
    return regions


def cluster_lines(model: Stego, changed: set | None = None) -> list[str]:
    """One line a cluster, those of one name in one: numbers, name, share of the training images, colour.

    changed: the clusters whose lines are wanted, if not all.
    """
    merged, width, lines = model.merged.tolist(), max(map(len, model.names)), []
    for k in sorted(set(merged)):
        members = [m for m, first in enumerate(merged) if first == k]
        if changed is None or changed & set(members):
            share, (r, g, b) = float(model.share[members].sum()), model.palette[k].tolist()
            bar = f"\x1b[38;2;{r};{g};{b}m{'#' * max(round(60 * share), 1)}\x1b[0m"  # colour on a terminal
            name, numbers = f"{model.names[k]:{width}} " if width else "", "+".join(map(str, members))
            lines.append(f"cluster {numbers:>3} {name}{share:6.1%} #{r:02x}{g:02x}{b:02x} {bar}")
    return lines


def description(model) -> list[str]:
    """How a model was made, for people."""
    c, lines = model.config, [f"backbone  {model.config.backbone}, weights {model.backbone_sha256[:12]}"]
    if c.preset == RELEASED:
        return [*lines, "training  a checkpoint of the reference implementation, which has no options in it"]
    settings = [(name, getattr(c, name)) for name in SETTINGS]
    values = [f"{name}={x:.3g}" if isinstance(x, float) else f"{name}={x}" for name, x in settings]
    count = c.crops if c.views == "whole" else c.crops // 5
    return [
        *lines,
        f"data      {count} images, {c.crops} crops",
        f"training  {c.steps} steps, preset {c.preset}, seed {c.seed}",
        f"settings  {' '.join(values)}",
    ]


def write_report(model: Stego, folder: Path | str):
    """Write how the fit went into a folder, as pictures (Fig. 14, 15) and a few words.

    loss.png and similarity.png over the steps; neighbors.png, some crops and their nearest neighbours; report.txt.
    Raises ValueError for a model that was not fitted in this process: the record of a fit is not saved.
    """
    if not ((record := model.record) and record.history):
        raise ValueError("This model has no history to report; a report is written right after fit.")
    history, steps = record.history, [entry["step"] for entry in record.history]
    means = {name: (steps, [entry[name] for entry in history]) for name in TERMS if name in history[-1]}
    loss = {"loss": (steps, [entry["loss"] for entry in history])}
    pictures = {
        "loss": line_chart(loss, title="Loss", x_label="step"),
        "similarity": line_chart(means, title="Mean similarity of codes", x_label="step"),
        "neighbors": _neighbor_rows(record, model.config.views),
    }
    _write_pictures(pictures, folder)
    text = "".join(f"{line}\n" for line in report_lines(model))
    write_bytes(text.encode(), Path(folder) / "report.txt")


def report_lines(model: Stego) -> list[str]:
    """The report in sentences."""
    record, last = model.record, model.record.history[-1]
    similar = ", ".join(f"{name} {last[name]:.2f}" for name in TERMS if name in last)
    return [
        f"{len(record.images.unique())} images, {len(record.images)} crops, {last['step'] + 1} steps.",
        f"Mean similarity of codes at the end: {similar}.",
        neighbor_line(record),
        f"The largest cluster covers {model.share.max():.0%}, the smallest {model.share.min():.1%}.",
        training_warning(record.history) or "Training looks sound.",
    ]


def neighbor_line(record: FitRecord) -> str:
    """How many of a crop's neighbours are of its own image, in words (App. A.12, Fig. 15)."""
    own = (record.images[record.neighbors] == record.images[:, None]).sum(1)  # (n,)
    count = record.neighbors.shape[1]
    shares = (torch.bincount(own, minlength=count + 1) / len(own)).tolist()
    return (
        f"Of a crop's {count} nearest neighbours, {own.float().mean():.1f} are of its own image; crops with 0, 1, ... "
        f"{count} such: {', '.join(f'{share:.0%}' for share in shares)}."
    )


def _neighbor_rows(record: FitRecord, views: str) -> Image.Image:
    """Some crops, evenly spread over all, each before its nearest neighbours."""
    count, shown = len(record.images), []
    for crop in range(0, count, max(count // CROPS, 1))[:CROPS]:
        crops = (crop, *record.neighbors[crop].tolist())
        try:
            pictures = [_crop_picture(record, each, views) for each in crops]
        except (ValueError, FileNotFoundError):
            continue  # an image is gone since
        shown.append((Path(record.paths[record.images[crop]]).name, pictures))
    return image_rows(shown, headings=("a crop", "its nearest neighbours"))


def _crop_picture(record: FitRecord, crop: int, views: str) -> Image.Image:
    """What a crop shows."""
    picture = images.read_image(record.paths[record.images[crop]])
    if views != "whole":
        picture = picture.crop(five_boxes(*picture.size)[crop % 5])
    return _of_height(picture, CROP_HEIGHT)


def _of_height(picture: Image.Image, height: int) -> Image.Image:
    return picture.resize((max(round(picture.width * height / picture.height), 1), height), BILINEAR)


# ---- correspondences of marked points (Fig. 2) -----------------------------------------------------------------


@torch.inference_mode()
def correspondence_sheet(
    network,
    image: Path | str,
    at: Sequence[tuple[int, int]],
    *,
    others: Sequence[Path] = (),
    model: Stego | None = None,
    device="cpu",
    progress: Progress = no_progress,
) -> Image.Image:
    """What corresponds with points of an image, in itself and in others: a row of coloured pictures a point.

    network: a backbone; model: one that was fitted on it, for rows of its codes too. image: a path; at: points
    (x, y) in its pixels; others: paths, of more than SHOWN those whose averaged features are nearest. Full colour
    is the point itself, none its mean correspondence with its image, or less (the centering of Eq. 3).
    Raises ValueError for a point outside of the image, or what cannot be read.
    """
    (width, height), seen = images.read_image(image).size, partial(_unit_maps, network=network, device=device)
    for x, y in at:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"The point {x},{y} is not in {image}, which is {width} x {height} pixels: "
                f"x is 0 to {width - 1}, y 0 to {height - 1}."
            )
    own = seen(image, model=model)
    if len(others) > SHOWN:
        others = _nearest_images(seen, own, others, progress)
    pictures = [own, *(seen(path, model=model) for path in others)]
    rows = [
        (f"{kind} at {x},{y}", _heatmaps(pictures, kind, (x, y), color))
        for (x, y), color in zip(at, itertools.cycle(drawing.VIVID))
        for kind in pictures[0][1]
    ]
    return image_rows(rows, headings=[Path(path).name for path in (image, *others)])


def _heatmaps(pictures: list, kind: str, at: tuple[int, int], color: drawing.Color) -> list[Image.Image]:
    """Pictures, of which the first has the point, coloured where their maps of one kind correspond with it.

    By more than the point's mean correspondence with its own image.
    """
    (picture, own), (x, y) = pictures[0], at
    h, w = own[kind].shape[1:]
    code = own[kind][:, int(y * h / picture.height), int(x * w / picture.width)]  # (D,)
    floor = float((code @ own[kind].flatten(1)).mean())
    shown = []
    for image, maps in pictures:
        image = _of_height(image, HEATMAP_HEIGHT)
        weight = (torch.einsum("chw,c->hw", maps[kind], code)[None, None] - floor) / max(1 - floor, 1e-6)
        weight = F.interpolate(weight, image.size[::-1], mode="bilinear", align_corners=False)  # (1, 1, H, W)
        shown.append(drawing.spotlight(image, weight[0, 0].clamp(0, 1).cpu().numpy(), color))
    drawing.mark(shown[0], x * shown[0].width / picture.width, y * shown[0].height / picture.height, color)
    return shown


def _unit_maps(
    path: Path, *, network: Any, device: Device, model: Stego | None = None
) -> tuple[Image.Image, dict[str, Tensor]]:
    """A picture, its unit features (C, h, w), averaged with its mirror's, and a model's codes (D, h, w)."""
    picture = images.read_image(path)
    x = to_tensor(input_image(picture, network.patch, name=path))[None]
    heads: dict[str, Callable] = {FEATURES: torch.nn.Identity()}
    if model:
        heads["codes"] = model.head.on_map
    maps = mirror_averaged(x, partial(dense_features, network, device=device), *heads.values())
    return picture, {kind: F.normalize(each[0], dim=0) for kind, each in zip(heads, maps)}


def _nearest_images(seen: Callable, own: tuple, paths, progress: Progress) -> list:
    """The SHOWN images whose averaged features are nearest to an image's own, of CANDIDATES spread over paths."""

    def mean(maps: dict) -> Tensor:
        return unit(maps[FEATURES].mean((1, 2)))  # (C,)

    paths, point = paths[:: math.ceil(len(paths) / CANDIDATES)], mean(own[1])
    others = _usable(lambda path: mean(seen(path)[1]), paths, "neighbors", progress)
    near = [(float(each @ point), path) for path, each in others]
    return [path for _, path in sorted(near, key=lambda each: -each[0])[:SHOWN]]


# ---- an evaluation ---------------------------------------------------------------------------------------------


def write_figures(report: dict, model: Stego, labelled: LabelledSet, folder: Path | str):
    """confusion.png, strips.png: where pixels of each class go, and examples."""
    best, classes = headline(report), report["classes"]
    columns = np.argsort([c if c >= 0 else len(classes) for c in best["assignment"]], kind="stable").tolist()
    names = [f"{k} {classes[c]}" if (c := best["assignment"][k]) >= 0 else f"{k} -" for k in columns]
    counts = np.array(best["confusion"], dtype=float)
    with np.errstate(invalid="ignore"):
        shares = counts / counts.sum(1, keepdims=True)  # a class that does not occur: NaN
    title = f"{report['dataset']}: clusters (with their classes) of the pixels of each class, %"
    confusion = matrix_picture(shares[:, columns], classes, names, title=title)
    _write_pictures({"confusion": confusion, "strips": _examples(best, model, labelled)}, folder)


@torch.inference_mode()
def _examples(best: dict, model: Stego, labelled: LabelledSet) -> Image.Image:
    """Image, label and prediction of the best, the median and the worst image by accuracy."""
    accuracy = np.array([np.nan if x is None else x for x in best["image_accuracy"]], dtype=float)
    ranked = np.argsort(-accuracy, kind="stable")[: np.isfinite(accuracy).sum()]  # NaN sorts last
    of_cluster = np.array([c if c >= 0 else images.IGNORE for c in best["assignment"]], np.uint8)
    palette, rows = images.distinct_colors(len(labelled.classes)), []
    probes = {("stego", "cluster"): model.probe}
    for what, i in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
        image, label = labelled.read(i, side=protocol_side(model.backbone.patch))
        found = masks_of(both_features(model, image), probes, image, crf=best["crf"])
        predicted = of_cluster[found["stego", "cluster", best["crf"]]]
        masks = [images.mask_image(mask, palette).convert("RGB") for mask in (label, predicted)]
        name = labelled.pairs[i][0].name
        rows.append((f"{what}: {name}, accuracy {accuracy[i]:.1%}", [image, *masks]))
    names = dict(zip(labelled.classes, palette.tolist()))
    return image_rows(rows, headings=("image", "label", "prediction"), names=names)
