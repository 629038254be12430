"""Images too large to be seen at once (orthomosaics, slides, panoramas): the parts in which they are seen.

A model's `tile` is the side in pixels of what is seen as one image, in `fit` and `predict` alike, so that things have
the same scale in both. `fit` takes tiles as images; `predict` blends the codes of overlapping ones into one map, whose
clusters it then sharpens block by block.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stego_parts.features import BILINEAR, to_tensor
from stego_parts.images import Window, image_size
from stego_parts.running import Progress

OVERLAP = 1 / 3  # share of a window that the next one sees too
FADE = 4  # power of the distance to the border: codes that see less count less (labels of the whole: 99.3 -> 99.9 %)
BLOCK, MARGIN = 600, 96  # pixels the CRF labels at once, and what it sees around them: 1.4 of its sigmas


def starts(length: int, size: int, overlap: int = 0) -> list[int]:
    """Where pieces of `size` begin that cover `length`, at even steps, and overlap by at least so much."""
    count = max(-(-(length - overlap) // (size - overlap)), 1)
    return [round(i * (length - size) / max(count - 1, 1)) for i in range(count)]


def tiles_of(paths: Iterable[Path], side: int) -> list:
    """Each image, or the tiles that cover it if it is larger than `side` pixels; 0: all whole."""
    tiles: list = []
    for path in paths:
        try:
            width, height = image_size(path) if side else (0, 0)
        except (ValueError, FileNotFoundError):
            width = height = 0  # whoever reads it says what is wrong
        size = tile_side((width, height), side)
        corners = [(x, y) for y in starts(height, size) for x in starts(width, size)] if size else []
        tiles += [Window(path, (x, y, x + size, y + size)) for x, y in corners] or [path]
    return tiles


def tile_side(size: tuple[int, int], side: int) -> int:
    """Of the tiles of an image (width, height): not above its shorter side; 0 if it is seen whole."""
    return min(side, *size) if side and max(size) > side else 0


@torch.inference_mode()
def blended_codes(
    codes_of: Callable, image: Image.Image, tile: int, *, resolution: int, patch: int, progress: Progress
) -> Tensor:
    """Codes (1, D, h, w) of a large image, float16, of windows that see a tile as `resolution` pixels.

    codes_of: (1, 3, H, W) to (1, D, H / patch, W / patch). Where windows overlap their codes are averaged, each by
    its distance from the border. Memory: 2 D / patch ** 2 bytes a pixel seen, 218 MB for 100 megapixels and D = 70.
    """
    window = max(resolution // patch, 1)  # positions, as all lengths here
    w, h = (max(round(side * resolution / tile / patch), window) for side in image.size)
    size = (w * patch, h * patch)
    seen = image if image.size == size else image.resize(size, BILINEAR)
    (tops, rows), (lefts, columns) = (blend_weights(length, window) for length in (h, w))
    total = torch.empty(0)
    for i, (top, fade) in enumerate(zip(tops, rows)):
        for left, fade_x in zip(lefts, columns):
            box = (left * patch, top * patch, (left + window) * patch, (top + window) * patch)
            codes = codes_of(to_tensor(seen.crop(box))[None])  # (1, D, window, window)
            if not len(total):
                total = torch.zeros(1, codes.shape[1], h, w, dtype=torch.float16, device=codes.device)
            weight = (fade[:, None] * fade_x).to(codes)  # (window, window)
            total[..., top : top + window, left : left + window] += (codes * weight).half()
        progress("windows", i + 1, len(tops))
    return total


def blend_weights(length: int, window: int) -> tuple[list[int], Tensor]:
    """Starts of overlapping windows over `length` positions, and the weights of their positions (n, window).

    The weights of all windows at one position add up to 1.
    """
    first = starts(length, window, int(OVERLAP * window))
    rise = torch.arange(1, window + 1).float()
    weights = (torch.minimum(rise, rise.flip(0)) ** FADE).repeat(len(first), 1)  # (n, window)
    positions = torch.tensor(first)[:, None] + torch.arange(window)  # (n, window)
    total = torch.zeros(length).index_add_(0, positions.flatten(), weights.flatten())
    return first, weights / total[positions]


def label_blocks(
    label: Callable, image: Image.Image, codes: Tensor, tile: int, megapixels: float, *, progress: Progress
) -> np.ndarray:
    """The mask (H, W) uint8 of a large image with a map of codes (1, D, h, w), block by block, in bounded memory.

    label: (picture, its codes, megapixels at which its CRF runs) to the picture's mask. megapixels: of a tile.
    """
    mask, (height, width) = np.empty((image.height, image.width), np.uint8), codes.shape[2:]
    scale = min(1, math.sqrt(megapixels * 1e6) / tile)  # of the image for the CRF
    rows, columns = pieces(image.height, height, scale), pieces(image.width, width, scale)
    for done, y in enumerate(rows, 1):
        for x in columns:
            part = image.crop((x.seen.start, y.seen.start, x.seen.stop, y.seen.stop))
            share = megapixels * part.width * part.height / tile**2
            labels = label(part, codes[:, :, y.codes, x.codes].float(), share)
            mask[y.target, x.target] = labels[y.inside, x.inside]
        progress("blocks", done, len(rows))
    return mask


class Piece(NamedTuple):
    """Along one side of an image: the codes and pixels seen, margins included; the pixels labelled, of the image and
    of those seen."""

    codes: slice
    seen: slice
    target: slice
    inside: slice


def pieces(length: int, cells: int, scale: float) -> list[Piece]:
    """BLOCK pixels each of a side of `length` pixels, `cells` codes, that is brought down by `scale` for the CRF."""
    pixel, found = length / cells, []  # pixels of the image a code
    step, margin = (max(round(pixels / scale / pixel), 1) for pixels in (BLOCK, MARGIN))  # codes
    for first in range(0, cells, step):
        last = min(first + step, cells)
        codes = slice(max(first - margin, 0), min(last + margin, cells))
        low, start, end, high = (round(each * pixel) for each in (codes.start, first, last, codes.stop))
        found.append(Piece(codes, slice(low, high), slice(start, end), slice(start - low, end - low)))
    return found
