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
from cli_parts.drawing import image_rows, matrix_picture
from cli_parts.evaluation import both_features, masks_of, protocol_side
from cli_parts.fonts import readable
from cli_parts.labels import LabelledSet
from cli_parts.scores import headline
from stego import Stego, unit
from stego_parts import images
from stego_parts.clusters import mirror_averaged, segment
from stego_parts.config import RELEASED, SETTINGS
from stego_parts.features import BILINEAR, Device, dense_features, input_image, to_tensor
from stego_parts.running import Progress, no_progress, or_skip, side_by_side

SHEET_IMAGES = 24  # images up to which the contact sheet shows all
SHEET_SAMPLE = 12  # how many of more it shows
REGION = 1 / 3  # side of the squares that show what a cluster is, of the image's shorter side
REGIONS = 6  # of them for each cluster
SHOWN = 4  # other images that a sheet of correspondences shows
CANDIDATES = 300  # among how many it looks for them
HEATMAP_HEIGHT = 200  # pixels: height of its pictures
FEATURES = "backbone features"
KNOWN = logging.DEBUG  # level at which images are skipped that another stage names

UnitMaps = tuple[Image.Image, dict[str, Tensor]]  # a picture; {kind: unit map (C, h, w)}


def _usable(
    function: Callable, paths: Sequence[Path], stage: str, progress: Progress
) -> Iterator[tuple[Path, Any]]:
    """(path, function(path)) of each image that can be used; another is said to be skipped."""
    for done, path in enumerate(paths, 1):
        result = or_skip(function, path)
        if result is not None:
            yield path, result
        progress(stage, done, len(paths))


def _small_picture(model: Stego, path: Path) -> images.Picture:
    """An image, as small as the backbone sees it."""
    picture = model.read(path)
    return picture.resized(input_image(picture.image, model.backbone.patch))


def _write_pictures(pictures: dict[str, Image.Image], folder: Path | str) -> None:
    """Write pictures {name: picture} as PNG into a folder."""
    for name, picture in pictures.items():
        images.write_image(picture, Path(folder) / f"{name}.png")


# ---- a fit -----------------------------------------------------------------------------------------------------


def fit_sheet(models: Sequence[Stego], *, progress: Progress = no_progress) -> Image.Image:
    """The picture of a fit: its images, of many some that are evenly spread, beside their segments.

    The CRF works at the size of a picture on the sheet. Of several models with one head: `_comparison_sheet`.
    """
    model = models[0]
    paths = fit_images(model)
    if len(models) > 1:
        return _comparison_sheet(models, paths, progress)
    if len(paths) > SHEET_IMAGES:
        paths = paths[:: len(paths) // SHEET_SAMPLE][:SHEET_SAMPLE]
    pairs = ((image, mask) for _, image, mask in segmented(model, paths, progress=progress))
    return drawing.contact_sheet(pairs, model)


def fit_images(model: Stego) -> list[Path]:
    """The images that a fit in this process used; of large ones in tiles, the tiles."""
    if model.record is None:
        raise ValueError("This model was not fitted in this process; its images are shown right after fit.")
    return [model.record.paths[i] for i in model.record.images.unique()]


def segmented(
    model: Stego, paths: Sequence[Path], *, progress: Progress = no_progress
) -> Iterator[tuple[Path, Image.Image, np.ndarray]]:
    """(path, picture, mask (H, W) uint8) of images, as small as the backbone sees them, the next ones meanwhile.

    The CRF works at the size of a picture on a sheet.
    """
    size = math.prod(drawing.SHEET_CELL) / 1e6
    _ = model.backbone  # is loaded here, not by each thread

    def segment_one(path: Path) -> tuple[Path, Image.Image, np.ndarray] | None:
        picture = or_skip(_small_picture, model, path, level=KNOWN)
        return picture and (path, picture.image, model.predict(picture, tile=0, crf_size=size))

    for done, result in enumerate(side_by_side(segment_one, paths, model.device), 1):
        if result is not None:
            yield result
        progress("picture", done, len(paths))


@torch.inference_mode()
def _comparison_sheet(models: Sequence[Stego], paths: Sequence[Path], progress: Progress) -> Image.Image:
    """At most SHEET_SAMPLE of the images, a row each, beside their segments by models with one head, without CRF."""
    some = paths[:: math.ceil(len(paths) / SHEET_SAMPLE)]
    rows = []
    for path, small in _usable(partial(_small_picture, models[0]), some, "picture", progress):
        image = small.image
        codes = models[0].codes(to_tensor(image)[None])  # (1, D, h, w)
        described = [(codes, model.probe.adapted(codes, small)) for model in models]
        pictures = [drawing.cell(image)]
        for model, mask in zip(models, segment(image, described, crf=False)):
            pictures.append(drawing.cell(image, small.masked(mask), model))
        rows.append((Path(path).name, pictures))
    headings = ["", *(f"{len(model.centers)} clusters" for model in models)]
    return image_rows(rows, headings=headings)


def cluster_shares(model: Stego) -> np.ndarray:
    """Each cluster's share of the training images (K,), those of one name together, at the lowest of them."""
    return np.bincount(model.merged, model.share.numpy(), len(model.merged))


def cluster_sheet(model: Stego, paths: Sequence[Path], *, progress: Progress = no_progress) -> Image.Image:
    """A picture of what each cluster is: its share of the training images, and regions of these images."""
    share = cluster_shares(model)
    rows = []
    for k, regions in enumerate(best_regions(model, paths, progress=progress)):
        if model.merged[k] == k:
            inside = [(picture, mask == k) for picture, mask in regions]
            caption = f"{drawing.cluster_name(k, model.labels)}\n{share[k]:.1%}"
            rows.append((caption, tuple(model.colors[k].tolist()), inside))
    return drawing.region_sheet(rows)


@torch.inference_mode()
def best_regions(
    model: Stego, paths: Sequence[Path], *, progress: Progress = no_progress
) -> list[list[tuple[Image.Image, np.ndarray]]]:
    """What each cluster is: the squares of images that fit it best, REGIONS of them, at most one an image.

    The fit of a square is the mean over it of the cosine to the centre, 0 where another cluster is nearer.
    Returns for each cluster (picture, mask (side, side) uint8) pairs, the best first; clusters that share a name
    are one, the lowest of them.
    """
    best: list[list[tuple]] = [[] for _ in model.centers]  # of (fit, picture, mask)
    for _, picture in _usable(partial(_small_picture, model), paths, "regions", progress):
        for k, region in _regions(model, picture).items():
            best[k].append(region)
            best[k].sort(key=_fit_of, reverse=True)
            del best[k][REGIONS:]
    pairs = []
    for regions in best:
        pairs.append([(picture, mask) for _, picture, mask in regions])
    return pairs


def _fit_of(region: tuple[float, Image.Image, np.ndarray]) -> float:
    return region[0]


def _regions(model: Stego, small: images.Picture) -> dict[int, tuple[float, Image.Image, np.ndarray]]:
    """The square of a picture that fits each cluster best: {k: (fit, square, mask (side, side) uint8)}.

    Clusters that are nowhere are left out.
    """
    picture = small.image
    codes = F.normalize(model.codes(to_tensor(picture)[None]), dim=1)  # (1, D, h, w)
    probe = model.probe.adapted(codes, small)
    cosines = probe.dot_products(codes)[0]  # (K, h, w)
    mask = small.masked(segment(picture, [(codes, probe)], crf=False)[0])  # (H, W)
    won = cosines.clamp(min=0) * (cosines == cosines.amax(0))
    won = won * torch.from_numpy(small.positions(*won.shape[1:])).to(won.device)
    merged = torch.from_numpy(model.merged).to(won.device, torch.int64)
    won = torch.zeros_like(won).index_add_(0, merged, won)
    side = max(round(min(won.shape[1:]) * REGION), 1)
    fits = F.avg_pool2d(won, side, stride=1)  # (K, y, x)
    best = fits.flatten(1).max(1)
    patch = model.backbone.patch
    size = side * patch
    regions = {}
    for k, fit in enumerate(best.values.tolist()):
        y, x = divmod(int(best.indices[k]), fits.shape[2])
        top = y * patch
        left = x * patch
        if fit > 0:
            square = picture.crop((left, top, left + size, top + size))
            regions[k] = fit, square, mask[top : top + size, left : left + size].copy()
    return regions


def hex_color(color: np.ndarray) -> str:
    """A colour (3,) uint8 as #rrggbb."""
    return f"#{bytes(color.tolist()).hex()}"


def cluster_lines(model: Stego, changed: set[int] | None = None) -> list[str]:
    """One line a cluster, those of one name in one: numbers, name, share of the training images, colour.

    changed: the clusters whose lines are wanted, if not all.
    """
    merged = model.merged.tolist()
    width = max(map(len, model.names))
    lines = []
    for k in sorted(set(merged)):
        members = [m for m, first in enumerate(merged) if first == k]
        if changed is not None and not changed.intersection(members):
            continue
        share = float(model.share[members].sum())
        r, g, b = model.palette[k].tolist()
        bar = f"\x1b[38;2;{r};{g};{b}m{'#' * max(round(60 * share), 1)}\x1b[0m"  # colour on a terminal
        name = f"{model.names[k]:{width}} " if width else ""
        numbers = "+".join(map(str, members))
        lines.append(f"cluster {numbers:>3} {name}{share:6.1%} {hex_color(model.palette[k])} {bar}")
    return lines


def description(model: Stego) -> list[str]:
    """How a model was made, for people: a line each."""
    config = model.config
    lines = [f"backbone  {config.backbone}, weights {model.backbone_sha256[:12]}"]
    if config.preset == RELEASED:
        return [*lines, "training  a checkpoint of the reference implementation, which has no options in it"]
    values = []
    for name in SETTINGS:
        value = getattr(config, name)
        values.append(f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}")
    count = config.crops if config.views == "whole" else config.crops // 5
    return [
        *lines,
        f"data      {count} images, {config.crops} crops",
        f"training  {config.steps} steps, preset {config.preset}, seed {config.seed}",
        f"settings  {' '.join(values)}",
    ]


def _of_height(picture: Image.Image, height: int) -> Image.Image:
    return picture.resize((max(round(picture.width * height / picture.height), 1), height), BILINEAR)


# ---- correspondences of marked points (Fig. 2) -----------------------------------------------------------------


@torch.inference_mode()
def correspondence_sheet(
    network: Any,
    image: Path | str,
    at: Sequence[tuple[int, int]],
    *,
    others: Sequence[Path] = (),
    model: Stego | None = None,
    device: Device = "cpu",
    progress: Progress = no_progress,
) -> Image.Image:
    """What corresponds with points of an image, in itself and in others: a row of coloured pictures a point.

    network: a backbone; model: one that was fitted on it, for rows of its codes too. image: a path; at: points
    (x, y) in its pixels; others: paths, of more than SHOWN those whose averaged features are nearest. Full colour
    is the point itself, none its mean correspondence with its image, or less (the centering of Eq. 3).
    Raises ValueError for a point outside of the image, or what cannot be read.
    """
    maps_of = partial(_unit_maps, network=network, device=device)
    own = maps_of(image, model=model)
    _check_points(image, own[0], at)
    if len(others) > SHOWN:
        others = _nearest_images(maps_of, own, others, progress)
    pictures = [own, *(maps_of(path, model=model) for path in others)]
    rows = []
    for (x, y), color in zip(at, itertools.cycle(drawing.VIVID)):
        for kind in own[1]:
            rows.append((f"{kind} at {x},{y}", _heatmaps(pictures, kind, (x, y), color)))
    return image_rows(rows, headings=[Path(path).name for path in (image, *others)])


def _check_points(image: Path | str, picture: Image.Image, at: Sequence[tuple[int, int]]) -> None:
    """ValueError for a point (x, y) outside of the picture of an image."""
    width, height = picture.size
    for x, y in at:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"The point {x},{y} is not in {image}, which is {width} x {height} pixels: "
                f"x is 0 to {width - 1}, y 0 to {height - 1}."
            )


def _heatmaps(
    pictures: Sequence[UnitMaps], kind: str, at: tuple[int, int], color: drawing.Color
) -> list[Image.Image]:
    """Pictures, of which the first has the point (x, y), coloured where their maps of one kind correspond with it.

    By more than the point's mean correspondence with its own image.
    """
    picture, own = pictures[0]
    x, y = at
    h, w = own[kind].shape[1:]
    code = own[kind][:, int(y * h / picture.height), int(x * w / picture.width)]  # (D,)
    floor = float((code @ own[kind].flatten(1)).mean())
    shown = []
    for image, maps in pictures:
        small = _of_height(image, HEATMAP_HEIGHT)
        weight = torch.einsum("chw,c->hw", maps[kind], code)[None, None]  # (1, 1, h, w)
        weight = (weight - floor) / max(1 - floor, 1e-6)
        weight = F.interpolate(weight, small.size[::-1], mode="bilinear", align_corners=False)  # (1, 1, H, W)
        shown.append(drawing.spotlight(small, weight[0, 0].clamp(0, 1).cpu().numpy(), color))
    first = shown[0]
    drawing.mark(first, x * first.width / picture.width, y * first.height / picture.height, color)
    return shown


def _unit_maps(path: Path | str, *, network: Any, device: Device, model: Stego | None = None) -> UnitMaps:
    """A picture, its unit features (C, h, w), averaged with its mirror's, and a model's codes (D, h, w)."""
    picture = images.read_image(path, bands=model.config.bands if model else ())
    x = to_tensor(input_image(picture, network.patch, name=path))[None]  # (1, 3, H, W)
    heads: dict[str, Callable] = {FEATURES: torch.nn.Identity()}
    if model:
        heads["codes"] = model.head.on_map
    maps = mirror_averaged(x, partial(dense_features, network, device=device), *heads.values())
    return picture, {kind: F.normalize(each[0], dim=0) for kind, each in zip(heads, maps)}


def _nearest_images(
    maps_of: Callable[[Path], UnitMaps], own: UnitMaps, paths: Sequence[Path], progress: Progress
) -> list[Path]:
    """The SHOWN images whose averaged features are nearest to an image's own, of CANDIDATES spread over paths."""

    def mean(maps: UnitMaps) -> Tensor:
        return unit(maps[1][FEATURES].mean((1, 2)))  # (C,)

    def likeness(path: Path) -> float:
        return float(mean(maps_of(path)) @ mean(own))

    some = paths[:: math.ceil(len(paths) / CANDIDATES)]
    cosines = dict(_usable(likeness, some, "neighbors", progress))
    return sorted(cosines, key=cosines.__getitem__, reverse=True)[:SHOWN]


# ---- an evaluation ---------------------------------------------------------------------------------------------


def write_figures(scores: dict, model: Stego, labelled: LabelledSet, folder: Path | str) -> None:
    """confusion.png, strips.png: where pixels of each class go, and examples; scores: what `evaluate` found."""
    best = headline(scores)
    classes = _readable_classes(scores["classes"])
    title = f"{scores['dataset']}: clusters (with their classes) of the pixels of each class, %"
    confusion = _confusion_picture(best, classes, title)
    _write_pictures({"confusion": confusion, "strips": _examples(best, model, labelled)}, folder)


def _readable_classes(classes: Sequence[str]) -> list[str]:
    """The names of classes; for one that no font has, its number."""
    return [readable(name, str(c)) for c, name in enumerate(classes)]


def _confusion_picture(best: dict, classes: Sequence[str], title: str) -> Image.Image:
    """The matrix (classes, K) of one result; each cluster stands below the class that it was matched with."""
    matched = best["assignment"]  # (K,) class, -1 for none
    order = np.argsort([c if c >= 0 else len(classes) for c in matched], kind="stable").tolist()
    names = []
    for k in order:
        names.append(f"{k} {classes[matched[k]]}" if matched[k] >= 0 else f"{k} -")
    counts = np.array(best["confusion"], dtype=float)
    with np.errstate(invalid="ignore"):
        shares = counts / counts.sum(1, keepdims=True)  # a class that does not occur: NaN
    return matrix_picture(shares[:, order], classes, names, title=title)


@torch.inference_mode()
def _examples(best: dict, model: Stego, labelled: LabelledSet) -> Image.Image:
    """Image, label and prediction of the best, the median and the worst image by accuracy."""
    accuracy = np.array([np.nan if x is None else x for x in best["image_accuracy"]], dtype=float)
    ranked = np.argsort(-accuracy, kind="stable")[: np.isfinite(accuracy).sum()]  # NaN sorts last
    of_cluster = np.array([c if c >= 0 else images.IGNORE for c in best["assignment"]], np.uint8)
    palette = images.distinct_colors(len(labelled.classes))
    probes = {("stego", "cluster"): model.probe}
    rows = []
    for what, i in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
        image, label = labelled.read(i, side=protocol_side(model.backbone.patch), bands=model.config.bands)
        found = masks_of(both_features(model, image), probes, image, crf=best["crf"])
        predicted = of_cluster[found["stego", "cluster", best["crf"]]]  # (H, W)
        masks = [images.mask_image(mask, palette).convert("RGB") for mask in (np.asarray(label), predicted)]
        name = labelled.pairs[i][0].name
        rows.append((f"{what}: {name}, accuracy {accuracy[i]:.1%}", [image, *masks]))
    names = dict(zip(_readable_classes(labelled.classes), palette.tolist()))
    return image_rows(rows, headings=("image", "label", "prediction"), names=names)
