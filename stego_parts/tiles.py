"""Images too large to be seen at once (orthomosaics, slides, panoramas): the parts in which they are seen.

A model's `tile` is the side in pixels of what is seen as one image, in `fit` and `predict` alike, so that things have
the same scale in both. `fit` takes tiles as images; `predict` blends the codes of overlapping ones into one map, whose
clusters it then sharpens block by block. An image that is not larger than a tile is seen and labelled whole.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stego_parts.features import BILINEAR, input_image, input_size, to_tensor
from stego_parts.images import Window, image_size
from stego_parts.running import Progress

OVERLAP = 1 / 3  # share of a window that the next one sees too
FADE = 4  # power of the distance to the border: codes that see less count less (labels of the whole: 99.3 -> 99.9 %)
BLOCK = 600  # pixels of the CRF's image that are labelled at once
MARGIN = 96  # pixels that the CRF sees around them: 1.4 of its sigmas

Codes = Callable[[Tensor], Tensor]  # images (1, 3, H, W) -> codes (1, D, H / patch, W / patch)
Label = Callable[
    [Image.Image, Tensor, float], np.ndarray
]  # picture, codes, megapixels of its CRF -> mask (H, W)


# ---- where tiles lie -------------------------------------------------------------------------------------------


def starts(length: int, size: int, overlap: int = 0) -> list[int]:
    """Where pieces of `size` begin that cover `length`, at even steps, and overlap by at least so much."""
    count = max(math.ceil((length - overlap) / (size - overlap)), 1)
    return [round(i * (length - size) / max(count - 1, 1)) for i in range(count)]


def tile_side(size: tuple[int, int], side: int) -> int:
    """Of the tiles of an image of size (H, W): not above its shorter side; 0 if it is seen whole."""
    return min(side, *size) if side and max(size) > side else 0


def tiles_of(paths: Iterable[Path], side: int) -> list[Path | Window]:
    """Each image, or the tiles that cover it if it is larger than `side` pixels; 0: all whole."""
    tiles: list[Path | Window] = []
    for path in paths:
        size = _size_if_readable(path) if side else (0, 0)
        tile = tile_side(size, side)
        if tile:
            tiles += _windows(path, size, tile)
        else:
            tiles.append(path)
    return tiles


def _size_if_readable(path: Path) -> tuple[int, int]:
    """Size (H, W) of an image file, (0, 0) of one that cannot be read: whoever reads it says what is wrong."""
    try:
        return image_size(path)
    except (ValueError, FileNotFoundError):
        return 0, 0


def _windows(path: Path, size: tuple[int, int], tile: int) -> list[Window]:
    """Squares that cover an image of size (H, W), row by row."""
    H, W = size
    windows = []
    for y in starts(H, tile):
        for x in starts(W, tile):
            windows.append(Window(path, (x, y, x + tile, y + tile)))
    return windows


# ---- codes -----------------------------------------------------------------------------------------------------


def image_codes(
    codes_of: Codes, image: Image.Image, tile: int, *, resolution: int, patch: int, progress: Progress
) -> tuple[Tensor, int]:
    """Codes (1, D, h, w) of one picture of any size, and the side of its tiles, 0 if it was seen whole."""
    side = tile_side((image.height, image.width), tile)
    if not side:
        return codes_of(to_tensor(input_image(image, patch, resolution=resolution))[None]), 0
    input_size((side, side), patch, resolution=resolution, name="A tile of the image")
    return blended_codes(codes_of, image, side, resolution=resolution, patch=patch, progress=progress), side


@torch.inference_mode()
def blended_codes(
    codes_of: Codes, image: Image.Image, tile: int, *, resolution: int, patch: int, progress: Progress
) -> Tensor:
    """Codes (1, D, h, w) of a large image, float16, of windows that see a tile as `resolution` pixels.

    Where windows overlap their codes are averaged, each by its distance from the border. Memory: 2 D / patch ** 2
    bytes a pixel seen, 218 MB for 100 megapixels and D = 70.
    """
    window = max(resolution // patch, 1)  # positions, as all lengths here
    scale = resolution / tile / patch  # positions a pixel
    h = max(round(image.height * scale), window)
    w = max(round(image.width * scale), window)
    size = (w * patch, h * patch)  # as Pillow has it
    image = image if image.size == size else image.resize(size, BILINEAR)
    tops, rows = blend_weights(h, window)
    lefts, columns = blend_weights(w, window)
    total = torch.empty(0)
    for i, (top, fade) in enumerate(zip(tops, rows)):
        for left, fade_x in zip(lefts, columns):
            box = (left * patch, top * patch, (left + window) * patch, (top + window) * patch)
            codes = codes_of(to_tensor(image.crop(box))[None])  # (1, D, window, window)
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


# ---- labels ----------------------------------------------------------------------------------------------------


def label_image(
    label: Label, image: Image.Image, codes: Tensor, tile: int, megapixels: float, *, progress: Progress
) -> np.ndarray:
    """The mask (H, W) uint8 of an image with a map of codes (1, D, h, w), of a large one block by block.

    tile: the side of its tiles, 0 if it was seen whole; megapixels: at which the CRF runs, of a tile or the image.
    """
    if not tile:
        return label(image, codes, megapixels)
    mask = np.empty((image.height, image.width), np.uint8)
    height, width = codes.shape[2:]
    scale = min(1, math.sqrt(megapixels * 1e6) / tile)  # of the image for the CRF
    rows = pieces(image.height, height, scale)
    columns = pieces(image.width, width, scale)
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
    pixel = length / cells  # pixels of the image a code
    step = max(round(BLOCK / scale / pixel), 1)  # codes
    margin = max(round(MARGIN / scale / pixel), 1)  # codes
    result = []
    for first in range(0, cells, step):
        last = min(first + step, cells)
        codes = slice(max(first - margin, 0), min(last + margin, cells))
        low = round(codes.start * pixel)
        start = round(first * pixel)
        end = round(last * pixel)
        high = round(codes.stop * pixel)
        result.append(Piece(codes, slice(low, high), slice(start, end), slice(start - low, end - low)))
    return result
