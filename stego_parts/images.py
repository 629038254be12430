"""One door in for images, one door out for masks and pictures.

Images come in as upright RGB whatever they were on disk; masks leave as 8-bit indexed pictures.
"""

import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from stego_parts.files import write_bytes

log = logging.getLogger("stego")

BACKDROP = (255, 255, 255)  # transparent pixels are shown on white
IGNORE = 255  # mask value of "no segment"
WHITE_PERCENTILE = 99.9  # of the values of a deep image: what its brightest pixels but a few hot ones reach
SCALE_SAMPLE = 4_000_000  # values of a deep image, about, whose percentiles are taken
FIRST_COLOR = (0, 135, 195)  # of cluster 0
XYZ_OF_RGB = np.array(  # of linear sRGB (IEC 61966-2-1)
    [(0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041)]
)
TIFF = (".tif", ".tiff")
FORMS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"} | dict.fromkeys(TIFF, "TIFF")  # as Pillow says
NOTE = "stego"  # key of the note in PNG
LIGHTNESS, CHROMA = (35, 90), (25, 85)  # CIELAB: neither near-black nor near-white, neither grey nor neon


# ---- the door in -----------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A part of an image file: its box (left, top, right, bottom) in pixels as displayed."""

    path: Path
    box: tuple[int, int, int, int]

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return f"{self.path} at {self.box[0]},{self.box[1]}"


@lru_cache(1)  # its windows are read one after the other
def _whole_image(path: Path) -> Image.Image:
    return read_image(path)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file as displayed, from its head; errors as those of `read_image`."""
    with open_image(path, "an image") as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        return image.size[::-1] if turned else image.size


def read_image(source: Path | str | BinaryIO | Image.Image | np.ndarray | Window) -> Image.Image:
    """An upright 8-bit RGB picture of a path or part of it, a binary file, a PIL image or an array (H, W, 3) uint8.

    EXIF rotation is applied, what has 16 bits or is float is scaled to 8 bits, transparency is laid on white; an
    animation shows its first frame. Raises FileNotFoundError, or ValueError: the file and what is wrong.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(f"Got an array {source.dtype} {source.shape}; an image must be uint8 (H, W, 3).")
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    if isinstance(source, Window):
        return _whole_image(source.path).crop(source.box)
    name = source
    if hasattr(source, "read"):  # a pipe cannot be wound back: read it whole
        name, source = str(getattr(source, "name", "the image")), io.BytesIO(source.read())
    elif not Path(source).is_file():  # a FIFO would block, a folder would confuse
        raise FileNotFoundError(f"{source} is not an image file.")
    if Path(name).suffix.lower() == ".mat":
        return Image.fromarray(np.ascontiguousarray(read_mat(source, "img")[..., :3]))
    with open_image(source, "an image", name=name) as image:
        _restore_depth(image, source)
        return _to_rgb(image)


@contextmanager
def open_image(path, what: str, *, name=None) -> Iterator[Image.Image]:
    """A Pillow image of a path or file; errors, those of decoding in the block too, become one ValueError."""
    name = path if name is None else name
    try:
        with warnings.catch_warnings():  # of a large photo; one twice as large is an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.3g} megapixels; if you trust it, "
            "raise the limit with --max-megapixels."
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"Cannot read {name} as {what} (no known format).") from error
    except Exception as error:  # decoders raise whatever a damaged file leads them to, struct.error say
        reason = getattr(error, "strerror", None) or str(error).strip() or "broken file"
        raise ValueError(f"Cannot read {name} as {what} ({reason.splitlines()[0]}).") from error


def read_mat(path, key: str) -> np.ndarray:
    """The whole numbers 0..255 under `key` in a MATLAB file, as Potsdam-3 comes: uint8, whatever their type there.

    ValueError for anything else.
    """
    from scipy.io import loadmat  # here: an eighth of a second that only Potsdam needs

    try:
        array = loadmat(path).get(key)
    except Exception as error:  # scipy documents no errors of its own: struct, zlib, Type-, MatReadError, ...
        raise ValueError(f"Cannot read {path} as a MATLAB file ({error}).") from error
    dims = {"img": 3, "gt": 2}[key]
    sound = isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.ndim == dims and array.size
    if not sound or (dims == 3 and array.shape[2] < 3):
        raise ValueError(f"{path} has no array of {dims} dimensions of whole numbers under the key {key!r}.")
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"{path} has values {array.min()}..{array.max()} under {key!r}; 0..255 are needed.")
    return array.astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scale_to_8_bit(np.asarray(image))).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, BACKDROP)
        image = Image.alpha_composite(backdrop, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _restore_depth(image: Image.Image, source):
    """Scale a picture with 16 bits a channel by the bits that it uses, in place.

    Pillow keeps the first byte of each value and knows both orders of bytes: reading them in either gives all.
    """
    given = [tile[3] for tile in image.tile]  # arguments of the decoder, the order of bytes first or alone
    modes = [str(each[0] if isinstance(each, tuple) and each else each) for each in given]
    if not modes or any(mode[:-1] not in ("RGB;16", "RGBA;16", "RGBX;16") for mode in modes):
        return
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    swapped = [mode[:-1] + other[mode[-1]] for mode in modes]
    swapped = [(mode, *args[1:]) if isinstance(args, tuple) else mode for mode, args in zip(swapped, given)]
    tiles, high = image.tile, np.asarray(image)  # (H, W, 3 or 4); loading empties image.tile
    if hasattr(source, "seek"):
        source.seek(0)
    with Image.open(source) as again:
        make = getattr(type(tiles[0]), "_make", tuple)  # named tuples since Pillow 11
        again.tile = [make((*tile[:3], args)) for tile, args in zip(tiles, swapped)]
        colors = high[..., :3].astype(np.uint16) << 8 | np.asarray(again)[..., :3]
    image.paste(Image.fromarray(np.concatenate([_scale_to_8_bit(colors), high[..., 3:]], 2)))


def _scale_to_8_bit(grey: np.ndarray) -> np.ndarray:
    """Deep greys (H, W) or colours (H, W, C) by the bits that their values use, 12 of 16, say.

    Floats up to 1 are shares of white. Where there are negative values, the least is black and the largest white.
    """
    every = math.ceil(math.sqrt(grey.size / SCALE_SAMPLE))
    sample = np.nan_to_num(grey[::every, ::every].astype(np.float64), posinf=0, neginf=0)
    low, high = np.percentile(sample, [100 - WHITE_PERCENTILE, WHITE_PERCENTILE]).tolist()
    if low < 0:
        white = high - low
    else:
        low, floor = 0.0, 1e-12 if grey.dtype.kind == "f" else 255
        white = max(2.0 ** math.frexp(high)[1] - (high >= 1), floor)  # 1, 3, 7, ... or 1/2, 1/4, ...
        if white not in (1, 255, 65535):
            _warn_scaled(white)
    scaled = np.empty(grey.shape, np.uint8)
    for row, values in enumerate(grey):  # a row at a time, in little memory
        values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0) - low
        scaled[row] = (values * (255 / max(white, 1e-12))).clip(0, 255).round()
    return scaled


@cache
def _warn_scaled(white: float):
    """Once for all images."""
    log.warning("Images with values up to %g are scaled to that, not to the range of their type.", white)


def square(image: Image.Image, side: int) -> Image.Image:
    """Shorter side to `side` pixels, then the centre side x side."""
    return ImageOps.fit(image, (side, side), method=Image.Resampling.BILINEAR)


# ---- the door out ----------------------------------------------------------------------------------------------


def distinct_colors(count: int = IGNORE + 1) -> np.ndarray:
    """The colours of clusters (count, 3) uint8, the first furthest apart; entry 255, no cluster, is black."""
    return _distinct_colors()[:count].copy()


@cache
def _distinct_colors() -> np.ndarray:
    """Each colour is as far in CIELAB from all before it as LIGHTNESS and CHROMA let it be."""
    levels = np.arange(0, 256, 15)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = to_lab(grid)
    ranges = ((lab[:, 0], LIGHTNESS), (np.hypot(lab[:, 1], lab[:, 2]), CHROMA))
    fits = np.all([(low < values) & (values < high) for values, (low, high) in ranges], 0)
    grid, lab = grid[fits], lab[fits].T.copy()  # (n, 3), (3, n)
    colors, distance = np.zeros((IGNORE + 1, 3), np.uint8), np.full(len(grid), np.inf)
    latest = int(np.abs(grid - FIRST_COLOR).sum(1).argmin())
    for k in range(IGNORE):
        colors[k] = grid[latest]
        distance = np.minimum(distance, ((lab - lab[:, latest, None]) ** 2).sum(0))
        latest = int(distance.round(6).argmax())  # rounded: the same colours on every machine
    return colors


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB colours (n, 3), 0 to 255 -> CIELAB (n, 3) under daylight (D65): as far apart as they look."""
    linear = np.asarray(rgb, float) / 255
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    f = linear @ XYZ_OF_RGB.T / XYZ_OF_RGB.sum(1)  # (n, 3), shares of white
    f = np.where(f > (6 / 29) ** 3, np.cbrt(f), f * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def mask_image(mask: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Indexed picture of a mask (H, W) uint8; always 256 palette entries, fewer make Pillow pack 4 bits."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    full = distinct_colors()
    full[: min(len(palette), IGNORE)] = palette[:IGNORE]
    image.putpalette(full.tobytes())
    return image


def write_image(image: Image.Image, path: Path | str, *, note="", form: str | None = None, tags=None):
    """Save whole or not at all, with a note in it, in the format of the suffix, else in `form`.

    tags: an ImageFileDirectory_v2 for a TIFF, in which the note is one.
    """
    form = FORMS.get(Path(path).suffix.lower(), form)
    if form is None:
        raise ValueError(f"Cannot tell the format of {path} from its suffix; use .png.")
    packed, text = io.BytesIO(), PngInfo()
    if note:
        text.add_text(NOTE, note)
    options = {
        "PNG": dict(pnginfo=text),
        "JPEG": dict(quality=90, comment=note),
        "TIFF": dict(compression="tiff_adobe_deflate", tiffinfo=tags),
    }
    image.save(packed, format=form, **options[form])
    write_bytes(packed.getvalue(), path)
