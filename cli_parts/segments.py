"""Segments as numbers and outlines: shares, connected regions, and the documents that hold them.

A mask is (H, W) uint8, IGNORE where there is no segment. clusters: {number: name} of those that are wanted.
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from stego_parts.images import IGNORE

COLUMNS = ("image", "cluster", "name", "pixels", "share", "m2")  # of a table


# ---- regions ---------------------------------------------------------------------------------------------------


class Region(NamedTuple):
    """Pixels of one cluster that touch by their sides: a segment (h, w) bool, its upper left corner at x, y."""

    cluster: int
    x: int
    y: int
    inside: np.ndarray


def regions(mask: np.ndarray, min_area: int = 0) -> Iterator[Region]:
    """The connected regions of a mask of at least so many pixels, cluster by cluster."""
    from scipy.ndimage import find_objects, label  # here: a tenth of a second that masks do not need

    for k in np.unique(mask[mask != IGNORE]).tolist():
        numbered, _ = label(mask == k)
        for n, (rows, columns) in enumerate(find_objects(numbered), 1):
            inside = numbered[rows, columns] == n
            if inside.sum() >= min_area:
                yield Region(k, columns.start, rows.start, inside)


def outline(region: Region) -> np.ndarray:
    """The outer outline along pixel edges: its corners (n, 2) as x, y, clockwise, no three on a line.

    A point where four pixels meet is a corner if one or three of them are inside, and two corners if two are that
    touch only there; each of the two belongs to one of the pixels, so that the outline does not cross itself.
    Edges join corners in pairs: first and second, third and fourth, ... of a row of points, and of a column.
    """
    pixels = np.pad(region.inside, 1)
    nw = pixels[:-1, :-1]  # (h + 1, w + 1), as the next three
    ne = pixels[:-1, 1:]
    sw = pixels[1:, :-1]
    se = pixels[1:, 1:]
    falling = nw & se & ~(ne | sw)
    rising = ne & sw & ~(nw | se)
    y, x = np.nonzero(nw ^ ne ^ sw ^ se | falling | rising)
    index = np.repeat(np.arange(len(y)), 1 + (falling | rising)[y, x])
    second = np.diff(index, prepend=-1) == 0  # the corner to the right of two at a point
    y = y[index]
    x = x[index]
    by_column = np.lexsort((second ^ rising[y, x], y, x))  # which of the two is the upper one
    beside = np.arange(len(x)) ^ 1
    above = np.empty_like(by_column)
    above[by_column] = by_column[beside]
    across = beside.tolist()
    down = above.tolist()
    corners = [0, 1]
    while down[corners[-1]]:
        corners.append(down[corners[-1]])
        corners.append(across[corners[-1]])
    return np.stack([x + region.x, y + region.y], 1)[corners]


# ---- shares ----------------------------------------------------------------------------------------------------


def cluster_shares(
    mask: np.ndarray, clusters: dict[int, str], area: float | None = None, *, valid: np.ndarray | None = None
) -> list[dict]:
    """What each cluster covers of a mask: pixels, their share of those that hold data, m2 by the area of a pixel.

    area: in square metres, if it is known; valid: which pixels hold data, (H, W) bool; None: all do.
    """
    count = max(mask.size if valid is None else int(valid.sum()), 1)
    sizes = np.bincount(mask.ravel(), minlength=IGNORE + 1).tolist()
    rows = []
    for k, name in clusters.items():
        row = {"cluster": k, "name": name, "pixels": sizes[k], "share": round(sizes[k] / count, 6)}
        rows.append(row | ({"m2": round(sizes[k] * area, 6)} if area else {}))
    return rows


def table(images: list[dict]) -> str:
    """The shares of images as CSV, a line a cluster of an image."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for image in images:
        writer.writerows({"image": image["file_name"], **each} for each in image["clusters"])
    return file.getvalue()


# ---- COCO ------------------------------------------------------------------------------------------------------


def coco_annotations(mask: np.ndarray, min_area: int = 0) -> list[dict]:
    """COCO annotations of a mask, one a region, category 1 for cluster 0: compressed RLE, and the outer outline."""
    return [
        {
            "category_id": region.cluster + 1,
            "segmentation": run_lengths(region, mask.shape),
            "polygons": [outline(region).ravel().tolist()],
            "area": int(region.inside.sum()),
            "bbox": [region.x, region.y, *region.inside.shape[::-1]],
            "iscrowd": 0,
        }
        for region in regions(mask, min_area)
    ]


def run_lengths(region: Region, size: tuple[int, ...]) -> dict:
    """COCO's compressed run-length encoding of a region in an image of a size (H, W).

    Lengths of runs in column order, outside first; from the fourth on the difference to the one two before;
    each in groups of five bits from the low end, the sixth says that more follow; a character is 48 + group.
    """
    height, width = size
    columns, rows = np.nonzero(np.diff(np.pad(region.inside, ((1, 1), (0, 0))), axis=0).T)
    changes = (region.x + columns) * height + region.y + rows
    joined = np.flatnonzero(np.diff(changes) == 0)  # a run that goes on at the top of the next column
    changes = np.delete(changes, [*joined, *(joined + 1)])
    runs = np.diff(changes[changes < height * width], prepend=0, append=height * width)
    runs[3:] -= runs[1:-2].copy()
    characters = []
    for run in runs.tolist():
        more = True
        while more:
            group = run & 31
            run = run >> 5
            more = run != (-1 if group & 16 else 0)  # the fifth bit is the sign
            characters.append(48 + group + 32 * more)
    return {"size": [height, width], "counts": bytes(characters).decode()}


def coco_document(images: list[dict], clusters: dict[int, str]) -> str:
    """A COCO file of images with their annotations."""
    annotations = [(i, each) for i, image in enumerate(images, 1) for each in image["annotations"]]
    heads = [{key: image[key] for key in ("file_name", "height", "width")} for image in images]
    document = {
        "info": {"description": "segments found by stego"},
        "images": [{"id": i, **head} for i, head in enumerate(heads, 1)],
        "categories": [{"id": k + 1, "name": name} for k, name in clusters.items()],
        "annotations": [{"id": n, "image_id": i, **each} for n, (i, each) in enumerate(annotations, 1)],
    }
    return json.dumps(document)
