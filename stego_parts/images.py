"""One door in for images, one door out for masks and pictures.

Images come in as upright RGB whatever they were on disk; masks leave as 8-bit indexed pictures.
"""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngInfo

from stego_parts.depth import color_bands, holds_data, is_alpha, scale_to_8_bit, valid_pixels
from stego_parts.files import NOTE, PICTURE_NOTE, write_bytes
from stego_parts.tiff import WHITE_IS_ZERO, Tiff, no_data, read_tiff

Source = Any  # what read_picture takes

BACKDROP = (255, 255, 255)  # transparent pixels are shown on white
IGNORE = 255  # mask value of "no segment"
FIRST_COLOR = (0, 135, 195)  # of cluster 0
XYZ_OF_RGB = np.array(  # of linear sRGB (IEC 61966-2-1)
    [(0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041)]
)
DEEP_MODES = {
    f"{mode};16B": f"{mode};16L" for mode in ("RGB", "RGBA", "RGBX")
}  # of decoders: the other order
FILM = " If it is a film, take frames of it: `ffmpeg -i FILM -vf fps=10 frames/%05d.png`."
OTHER_KINDS = dict.fromkeys(".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .3gp .mts".split(), FILM)
OTHER_KINDS |= dict.fromkeys((".heic", ".heif"), " Store it as JPEG: `heif-convert IN.heic OUT.jpg`.")
TIFF = (".tif", ".tiff")
FORMS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"} | dict.fromkeys(TIFF, "TIFF")  # as Pillow says
LIGHTNESS = (35, 90)  # of CIELAB: neither near-black nor near-white
CHROMA = (25, 85)  # neither grey nor neon


# ---- the door in -----------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A part of an image file: its box (left, top, right, bottom) in pixels as displayed."""

    path: Path
    box: tuple[int, int, int, int]

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return f"{self.path} at {self.box[0]},{self.box[1]}"


class Picture(NamedTuple):
    """An image as everything here sees it: upright 8-bit RGB, and which pixels (H, W) hold data; None: all do."""

    image: Image.Image
    valid: np.ndarray | None = None

    def resized(self, image: Image.Image) -> "Picture":
        """The same with its image in another size."""
        return Picture(image, None if self.valid is None else self.positions(image.height, image.width))

    def positions(self, height: int, width: int) -> np.ndarray:
        """Which cells of a grid over the image hold data in half of their pixels: (height, width) bool."""
        if self.valid is None:
            return np.ones((height, width), bool)
        shares = Image.fromarray(self.valid.astype(np.uint8) * 255)
        return np.asarray(shares.resize((width, height), Image.Resampling.BOX)) >= 128

    def masked(self, mask: np.ndarray) -> np.ndarray:
        """A mask (H, W) uint8 of the image with IGNORE where there is no data."""
        return mask if self.valid is None else np.where(self.valid, mask, np.uint8(IGNORE))


_whole_image_lock = Lock()


def _whole_picture(path: Path, bands: tuple[int, ...]) -> Picture:
    """An image whose windows are read one after the other, decoded once: other threads wait for the first."""
    with _whole_image_lock:
        return _latest_picture(path, bands, os.stat(path).st_mtime_ns)


@lru_cache(1)
def _latest_picture(path: Path, bands: tuple[int, ...], changed: int) -> Picture:
    return read_picture(path, bands=bands)


def image_size(path: Path) -> tuple[int, int]:
    """Size (H, W) of an image file as displayed, from its head; errors as those of `read_image`."""
    with _as_errors(path, "an image"), open(path, "rb") as file:
        tiff = read_tiff(file)
        if tiff:
            return (tiff.width, tiff.height) if tiff.orientation > 4 else (tiff.height, tiff.width)
        file.seek(0)
        image = Image.open(file)
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        return (image.width, image.height) if turned else (image.height, image.width)


def read_image(source: Source, *, bands: tuple[int, ...] = ()) -> Image.Image:
    """The picture of `read_picture`, without a word on which pixels hold data."""
    return read_picture(source, bands=bands).image


def read_picture(source: Source, *, bands: tuple[int, ...] = ()) -> Picture:
    """A path or part of it, a binary file, a PIL image or an array (H, W, 3) uint8, as upright 8-bit RGB.

    EXIF rotation is applied, what has 16 bits or is float is scaled to 8 bits, transparency is laid on white; an
    animation shows its first frame. What is wholly transparent, NaN, or has the value that GDAL's tag names holds no
    data: it is white. bands: numbers, from 1, of the one or three that are shown; (): the first three.
    Raises FileNotFoundError, or ValueError: the file and what is wrong.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(f"Got an array {source.dtype} {source.shape}; an image must be uint8 (H, W, 3).")
        return Picture(Image.fromarray(source))
    if isinstance(source, Image.Image):
        return _to_picture(source, bands)
    if isinstance(source, Window):
        return _crop(_whole_picture(source.path, tuple(bands)), source.box)
    if hasattr(source, "read"):  # a pipe cannot be wound back: read it whole
        with _as_errors(getattr(source, "name", "the image"), "an image"):
            return _read_file(io.BytesIO(source.read()), bands)
    if not Path(source).is_file():  # a FIFO would block, a folder would confuse
        raise FileNotFoundError(f"{source} is not an image file.")
    if Path(source).suffix.lower() == ".mat":
        return Picture(Image.fromarray(np.ascontiguousarray(read_mat(source, "img")[..., :3])))
    with _as_errors(source, "an image"), open(source, "rb") as file:
        return _read_file(file, bands)


def _crop(picture: Picture, box: tuple[int, int, int, int]) -> Picture:
    left, top, right, bottom = box
    valid = None
    if picture.valid is not None:
        valid = picture.valid[top:bottom, left:right]
    return Picture(picture.image.crop(box), None if valid is None or valid.all() else valid)


def _read_file(file: BinaryIO, bands: tuple[int, ...]) -> Picture:
    """The picture in a binary file that can be wound back."""
    tiff = read_tiff(file)
    if tiff and _read_here(tiff, bands):
        return _tiff_picture(tiff, file, bands)
    file.seek(0)
    with Image.open(file) as image:
        _restore_depth(image, file)
        return _to_picture(image, bands, no_data=no_data(getattr(image, "tag_v2", {})))


def _read_here(tiff: Tiff, bands: tuple[int, ...]) -> bool:
    """Whether a TIFF file is read without Pillow; ValueError for one that neither reads right."""
    if tiff.is_pillows and not bands:
        return False
    if not tiff.is_readable and tiff.bands > 1 and (tiff.dtype.itemsize > 1 or bands):
        raise ValueError(
            f"{tiff.bands} bands of {tiff.dtype.name}, compression {tiff.compression}, photometric interpretation "
            f"{tiff.photometric}, are not read right; store it anew, with `gdal_translate -co COMPRESS=DEFLATE`, say"
        )
    if tiff.is_readable and tiff.height * tiff.width > 2 * (Image.MAX_IMAGE_PIXELS or np.inf):
        raise Image.DecompressionBombError
    return tiff.is_readable


def _tiff_picture(tiff: Tiff, file: BinaryIO, bands: tuple[int, ...]) -> Picture:
    """The picture in a TIFF file that Pillow would read wrong or not at all."""
    colors = color_bands(tiff.bands, bands, alpha=tiff.alpha, kind=tiff.dtype.name)
    alpha = [] if bands or tiff.alpha is None else [tiff.alpha]
    samples = _upright(tiff.read(file, colors + alpha), tiff.orientation)
    shown = samples[..., : len(colors)]
    data = holds_data(shown, tiff.no_data)
    opacity = None
    if alpha:
        opacity = _opacity(samples[..., -1])
    if opacity is not None:
        opaque = np.broadcast_to(opacity[..., None] > 0, shown.shape)
        data = opaque if data is None else data & opaque
    if tiff.dtype != np.uint8:
        shown = scale_to_8_bit(shown, data)
    if tiff.photometric == WHITE_IS_ZERO:
        shown = 255 - shown
    if len(colors) == 1:
        shown = np.repeat(shown, 3, 2)  # (H, W, 3)
    if opacity is not None:
        shown = np.concatenate([shown, opacity[..., None]], 2)  # (H, W, 4)
    return _on_backdrop(Image.fromarray(np.ascontiguousarray(shown)), valid_pixels(data))


def _opacity(alpha: np.ndarray) -> np.ndarray | None:
    """A band (H, W) of any type that is called alpha as (H, W) uint8, its largest value 255; None if it is no alpha."""
    largest = max(float(alpha.max()), 1e-12)
    opacity = (alpha * (255 / largest)).clip(0, 255).astype(np.uint8)
    return opacity if is_alpha(opacity) else None


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Samples (H, W, n) as they are displayed, by the EXIF number of how they are stored."""
    if orientation in (3, 4, 6, 7):
        samples = samples[::-1]
    if orientation in (2, 3, 7, 8):
        samples = samples[:, ::-1]
    return samples if orientation < 5 else samples.swapaxes(0, 1)


@contextmanager
def open_image(path: Path | str, what: str) -> Iterator[Image.Image]:
    """A Pillow image of a file; errors, those of decoding in the block too, become one ValueError."""
    with _as_errors(path, what), Image.open(path) as image:
        yield image


@contextmanager
def _as_errors(name: Any, what: str) -> Iterator[None]:
    """Whatever reading a file ends with, as one ValueError that names it."""
    start = f"Cannot read {name} as {what}"
    try:
        with warnings.catch_warnings():  # of a large photo; one twice as large is an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.3g} megapixels; if you trust it, "
            "raise the limit with --max-megapixels."
        ) from error
    except UnidentifiedImageError as error:
        advice = OTHER_KINDS.get(Path(str(name)).suffix.lower(), "")
        raise ValueError(f"{start} (no known format).{advice}") from error
    except Exception as error:  # decoders raise whatever a damaged file leads them to, struct.error say
        reason = getattr(error, "strerror", None) or str(error).strip() or "broken file"
        raise ValueError(f"{start} ({reason.splitlines()[0]}).") from error


def read_mat(path: Path | str, key: str) -> np.ndarray:
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


def _to_picture(image: Image.Image, bands: tuple[int, ...], *, no_data: float | None = None) -> Picture:
    """A picture of a Pillow image; no_data: the value of pixels without data."""
    image = ImageOps.exif_transpose(image)
    deep = image.mode == "F" or image.mode.startswith("I")
    data = None
    if deep or no_data is not None:
        samples = np.atleast_3d(np.asarray(image))  # (H, W, 1 or more)
        colors = sum(band not in "Aa" for band in image.getbands())
        data = holds_data(samples[..., :colors], no_data)
    if deep:
        image = Image.fromarray(scale_to_8_bit(samples, data)[..., 0])
    elif "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
    if bands:
        image = image.convert("RGB") if image.mode == "P" else image
        samples = np.atleast_3d(np.asarray(image))
        image = Image.fromarray(samples[..., color_bands(samples.shape[2], bands)].repeat(3 // len(bands), 2))
    elif image.mode == "RGBA" and not is_alpha(np.asarray(image.getchannel("A"))):
        image = image.convert("RGB")
    return _on_backdrop(image, valid_pixels(data))


def _on_backdrop(image: Image.Image, valid: np.ndarray | None) -> Picture:
    """What is transparent or holds no data laid on the backdrop; what is wholly transparent holds none."""
    if image.mode == "RGBA":
        opaque = np.asarray(image.getchannel("A")) > 0
        valid = opaque if valid is None else valid & opaque
        backdrop = Image.new("RGBA", image.size, BACKDROP)
        image = Image.alpha_composite(backdrop, image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if valid is None or valid.all():
        return Picture(image)
    image.paste(BACKDROP, mask=Image.fromarray(~valid))
    return Picture(image, valid)


def _restore_depth(image: ImageFile, file: BinaryIO) -> None:
    """Scale a picture of another kind than TIFF with 16 bits a channel by the bits that it uses, in place.

    Pillow keeps the first byte of each value, which is the high one, and knows both orders of bytes: reading them in
    the other order gives the low ones.
    """
    arguments: list = [tile[3] for tile in image.tile if tile[3]]
    modes = [each if isinstance(each, str) else each[0] for each in arguments]
    if not modes or any(mode not in DEEP_MODES for mode in modes):
        return
    tiles = image.tile
    high = np.asarray(image)  # (H, W, 3 or 4); loading empties image.tile
    file.seek(0)
    with Image.open(file) as again:
        make: Any = getattr(type(tiles[0]), "_make", tuple)  # named tuples since Pillow 11
        again.tile = [make((*tile[:3], _swapped(each))) for tile, each in zip(tiles, arguments)]
        colors = high[..., :3].astype(np.uint16) << 8 | np.asarray(again)[..., :3]
    data = np.repeat(high[..., 3:] > 0, 3, 2) if high.shape[2] == 4 else None
    image.paste(Image.fromarray(np.concatenate([scale_to_8_bit(colors, data), high[..., 3:]], 2)))


def _swapped(arguments: str | tuple) -> str | tuple:
    """The arguments of a decoder, the mode first or alone, with the other order of bytes."""
    if isinstance(arguments, str):
        return DEEP_MODES[arguments]
    return (DEEP_MODES[arguments[0]], *arguments[1:])


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
    grid = grid[fits]  # (n, 3)
    lab = lab[fits].T.copy()  # (3, n)
    colors = np.zeros((IGNORE + 1, 3), np.uint8)
    distance = np.full(len(grid), np.inf)
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


def write_image(
    image: Image.Image,
    path: Path | str,
    *,
    note: str = PICTURE_NOTE,
    form: str | None = None,
    tags: Any = None,
) -> None:
    """Save whole or not at all, in the format of the suffix, else in `form`.

    note: in the file, by which later runs know it for an output; tags: an ImageFileDirectory_v2 for a TIFF, in which
    the note is one.
    """
    form = FORMS.get(Path(path).suffix.lower(), form)
    if form is None:
        raise ValueError(f"Cannot tell the format of {path} from its suffix; use .png.")
    packed = io.BytesIO()
    text = PngInfo()
    if note:
        text.add_text(NOTE, note)
    options: dict[str, dict] = {
        "PNG": dict(pnginfo=text),
        "JPEG": dict(quality=90, comment=note),
        "TIFF": dict(compression="tiff_adobe_deflate", tiffinfo=tags),
    }
    image.save(packed, format=form, **options[form])
    write_bytes(packed.getvalue(), path)
