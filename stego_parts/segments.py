"""Segments as JSON: shares and COCO."""

from collections.abc import Sequence

import numpy as np

from stego_parts.images import IGNORE


def cluster_shares(mask: np.ndarray, labels: Sequence[str]) -> list[dict]:
    """What part of a mask (H, W) each cluster covers, 0 to 1; labels: (K,) str."""
    sizes = np.bincount(mask.ravel(), minlength=IGNORE + 1)[: len(labels)]
    return [
        {"cluster": k, "name": name, "share": round(size / mask.size, 6)}
        for k, (name, size) in enumerate(zip(labels, sizes.tolist()))
    ]


def coco_annotations(mask: np.ndarray) -> list[dict]:
    """COCO annotations of a mask (H, W), one a cluster: category_id its number, compressed RLE its place."""
    annotations = []
    for k in np.unique(mask[mask != IGNORE]).tolist():
        segment = mask == k
        rows, columns = np.flatnonzero(segment.any(1)), np.flatnonzero(segment.any(0))
        x, y, right, bottom = (int(i) for i in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        annotations.append(
            {
                "category_id": k,
                "segmentation": run_lengths(segment),
                "area": int(segment.sum()),
                "bbox": [x, y, right - x, bottom - y],
                "iscrowd": 0,
            }
        )
    return annotations


def run_lengths(segment: np.ndarray) -> dict:
    """COCO's compressed run-length encoding of a segment (H, W) bool.

    Lengths of runs in column order, outside first; from the fourth on the difference to the one two before;
    each in groups of five bits from the low end, the sixth says that more follow; a character is 48 + group.
    """
    column_order = segment.ravel(order="F")
    changes = np.flatnonzero(np.diff(column_order, prepend=False))
    runs = np.diff(changes, prepend=0, append=column_order.size)
    runs[3:] -= runs[1:-2].copy()
    characters = []
    for run in runs.tolist():
        more = True
        while more:
            group, run = run & 31, run >> 5
            more = run != (-1 if group & 16 else 0)  # the fifth bit is the sign
            characters.append(48 + group + 32 * more)
    return {"size": list(segment.shape), "counts": bytes(characters).decode()}
