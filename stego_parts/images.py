"""One door in for images, one door out for masks and pictures.

Images come in as upright RGB whatever they were on disk; masks leave as 8-bit indexed PNG, and every file is
written under a temporary name and renamed, so that a reader never sees half of one.
"""

import glob
import io
import logging
import math
import os
import secrets
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor

log = logging.getLogger("stego")
Sources = str | os.PathLike | Iterable  # files, folders and patterns

IMAGE_SUFFIXES = set(".jpg .jpeg .png .bmp .tif .tiff .webp .gif .ppm .pgm .pnm .jp2".split())
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB 0..1: all backbones were trained so
BACKDROP = (255, 255, 255)  # transparent pixels are shown on white
IGNORE = 255  # mask value of "no segment"
WHITE_PERCENTILE = 99.9  # of the values of a deep image: what its brightest pixels but a few hot ones reach
SCALE_SAMPLE = 4_000_000  # values of a deep image, about, whose percentiles are taken
FIRST_COLOR = (0, 135, 195)  # of cluster 0
XYZ_OF_RGB = np.array(  # of linear sRGB (IEC 61966-2-1)
    [(0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041)]
)
PIPE = "-"  # stdin as an image, stdout as an output
TIFF = (".tif", ".tiff")
FORMS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"} | dict.fromkeys(TIFF, "TIFF")  # as Pillow says
NOTE = "stego"  # key of the note in PNG
DOUBLE, SHORT, ASCII = 12, 3, 2  # types of TIFF tags
PIXEL_SCALE, TRANSFORMATION, GEO_KEYS, NO_DATA, DESCRIPTION = 33550, 34264, 34735, 42113, 270  # TIFF tags
MODEL_TYPE, LINEAR_UNIT, PROJECTED, METRE = 1024, 3076, 1, 9001  # of GEO_KEYS: two keys, a value of each
GEO_TAGS = dict.fromkeys((PIXEL_SCALE, 33922, TRANSFORMATION, 34736), DOUBLE)  # GeoTIFF 1.1
GEO_TAGS |= {GEO_KEYS: SHORT, 34737: ASCII, 42112: ASCII, NO_DATA: ASCII}  # the last two are GDAL's
LIGHTNESS, CHROMA = (35, 90), (25, 85)  # CIELAB: neither near-black nor near-white, neither grey nor neon


# ---- the door in -----------------------------------------------------------------------------------------------


def find_images(sources: Sources, *, exclude: Iterable = ()) -> list[tuple[Path, Path]]:
    """The images that files, folders (recursive) and glob patterns name, sorted, each once.

    Follows links to folders; leaves out hidden files, and what lies in `exclude` (outputs: files and folders),
    unless the source lies there too. Returns (path, place) pairs; place is where an image lies below what
    named it, for outputs that mirror the tree. Raises FileNotFoundError for a source without images.
    """
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    real_path = cache(lambda path: Path(os.path.realpath(path)))
    outputs, images = [real_path(path) for path in exclude], {}
    for source in sources:
        for path, place in _expand(Path(source)):
            real, root = real_path(path.parent) / path.name, real_path(path.parents[len(place.parts) - 1])
            if not any(real.is_relative_to(each) and not root.is_relative_to(each) for each in outputs):
                images.setdefault(os.path.abspath(path), (path, place))
    if not images:
        raise FileNotFoundError(
            f"No images but outputs in {', '.join(map(str, sources))}; give other images."
        )
    return list(images.values())


def _expand(source: Path) -> list[tuple[Path, Path]]:
    if source.is_dir():
        images = sorted(path for path in _visible_files(source) if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise FileNotFoundError(f"No images in {source}; looked for {suffixes} in it and below.")
        return [(path, path.relative_to(source)) for path in images]
    if source.is_file():
        return [(source, Path(source.name))]
    if source.exists():
        raise FileNotFoundError(f"{source} is neither a file nor a folder; give images, folders or patterns.")
    if not glob.has_magic(str(source)):
        raise FileNotFoundError(f"No such file or folder: {source}.")
    matches = [path for path in map(Path, sorted(glob.glob(str(source), recursive=True))) if path.is_file()]
    if not matches:
        raise FileNotFoundError(f"The pattern {source} matches no file.")
    root = next(parent for parent in source.parents if not glob.has_magic(str(parent)))
    return [(path, path.relative_to(root)) for path in matches]


def _visible_files(source: Path) -> Iterator[Path]:
    """The files in a folder and below that are not hidden; each folder once, links to folders last."""
    seen, pending = set(), [source]
    for top in pending:  # grows on the way
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if (real := os.path.realpath(folder)) in seen:  # a loop of links
                folders.clear()
                continue
            seen.add(real)
            pending += [path for name in folders if (path := Path(folder, name)).is_symlink()]
            files = (Path(folder, name) for name in names if not name.startswith("."))
            yield from (path for path in files if path.is_file())


def output_names(places: Iterable[Path], suffix: str) -> list[Path]:
    """Where the output of each image goes below the output folder: its place, with another suffix.

    Images that share a stem keep their full names, except one that has the suffix already: a.png and a.gif
    become a.png and a.gif.png. Only equal places get equal names.
    """
    places = list(places)
    short = [place.with_suffix(suffix) for place in places]
    full = [place.with_name(place.name + suffix) for place in places]
    count = Counter(short)
    names = [s if count[s] == 1 or s == place else f for s, f, place in zip(short, full, places)]
    count = Counter(names)  # a.gif.png may be an image itself
    return [name if count[name] == 1 else f for name, f in zip(names, full)]


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


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32, normalised as the backbones expect."""
    rgb = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)  # (3, H, W)
    return (rgb - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def five_crops(image: Image.Image) -> list[Image.Image]:
    """Four corners and the centre, each half as high and half as wide (Sec. 4, five-crop)."""
    return [image.crop(box) for box in five_boxes(*image.size)]


def five_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of the four corners and the centre, each half as wide and half as high."""
    w, h = max(width // 2, 1), max(height // 2, 1)
    right, bottom = width - w, height - h
    corners = [(x, y) for y in (0, bottom) for x in (0, right)] + [(right // 2, bottom // 2)]
    return [(x, y, x + w, y + h) for x, y in corners]


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


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name if the block ends well and vanishes if not."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"Cannot write {path}: it is a folder or a device; name a file.")
    part = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
        log.info("Wrote %s", path)
    except OSError as error:  # its own words name the temporary file
        raise type(error)(f"Cannot write {path} ({(error.strerror or str(error)).lower()}).") from error
    finally:
        with suppress(OSError):  # it has another name now, or never was
            part.unlink()


def write_bytes(content: bytes, path: Path | str):
    """Write a file whole or not at all, or to stdout."""
    if str(path) == PIPE:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        with replacing(path) as part:
            part.write_bytes(content)


def mask_image(mask: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Indexed picture of a mask (H, W) uint8; always 256 palette entries, fewer make Pillow pack 4 bits."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    full = distinct_colors()
    full[: min(len(palette), IGNORE)] = palette[:IGNORE]
    image.putpalette(full.tobytes())
    return image


def write_image(image: Image.Image, path: Path | str, *, note="", form: str | None = None, tags=()):
    """Save whole or not at all, with a note in it, in the format of the suffix, else in `form`.

    tags: of the GeoTIFF that a TIFF is a mask of.
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
        "TIFF": dict(compression="tiff_adobe_deflate", tiffinfo=mask_tags(tags, note)),
    }
    image.save(packed, format=form, **options[form])
    write_bytes(packed.getvalue(), path)


# ---- place on Earth --------------------------------------------------------------------------------------------


def geo_tags(source) -> dict:
    """The GeoTIFF tags of an image file that have the right type; {} of what is no TIFF file."""
    if getattr(source, "suffix", "").lower() not in TIFF:
        return {}
    with open_image(source, "an image") as image:
        tags = getattr(image, "tag_v2", {})  # the suffix may be wrong
        return {tag: tags[tag] for tag, kind in GEO_TAGS.items() if tag in tags and tags.tagtype[tag] == kind}


def pixel_area(tags: dict) -> float | None:
    """Square metres that a pixel covers on the map of a GeoTIFF; None where its unit is another or unknown."""
    # after a head of four: key, where its value is (0: here), how many, value; ...
    entries = iter(np.ravel(tags.get(GEO_KEYS, ())).tolist()[4:])
    keys = {key: value for key, place, _, value in zip(*[entries] * 4) if place == 0}
    if keys.get(MODEL_TYPE) != PROJECTED or keys.get(LINEAR_UNIT, METRE) != METRE:
        return None
    scale, matrix = np.ravel(tags.get(PIXEL_SCALE, ())), np.ravel(tags.get(TRANSFORMATION, ()))
    area = 0.0
    if len(scale) >= 2:
        area = abs(float(scale[0] * scale[1]))
    elif len(matrix) == 16:
        area = abs(float(matrix[0] * matrix[5] - matrix[1] * matrix[4]))
    return area if 0 < area < math.inf else None


def mask_tags(tags, note: str) -> ImageFileDirectory_v2:
    """The tags of a TIFF mask: those of its image but for the value of no data, and a note."""
    directory = ImageFileDirectory_v2()
    for tag, value in {**dict(tags), NO_DATA: str(IGNORE), DESCRIPTION: note}.items():
        directory.tagtype[tag] = GEO_TAGS.get(tag, ASCII)
        directory[tag] = value.encode("latin-1") if isinstance(value, str) else value
    return directory
