"""One door in for images, one door out for masks and pictures.

Images come in as upright RGB whatever they were on disk; masks leave as 8-bit indexed PNG (Pascal VOC palette), and
every file is written under a temporary name and renamed, so that a reader never sees half of one.
"""

import glob
import io
import logging
import os
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from stego_backbones import MEAN, STD

log = logging.getLogger("stego")

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pnm", ".jp2"}
BACKDROP = (255, 255, 255)  # transparent pixels are shown on white
IGNORE = 255                # mask value of "no segment"
SHEET_CELL = 240            # pixels: longer side of a picture on the contact sheet
SHEET_GAP = 8               # pixels between them
FONT = 13                   # pixels: height of the letters in charts
INK, FAINT = (40, 40, 40), (225, 225, 225)  # letters and axes; grid lines


# ---- the door in -----------------------------------------------------------------------------------------------

def find_images(sources) -> list[tuple[Path, Path]]:
    """The images that files, folders (recursive) and glob patterns name, sorted, each once.

    Returns (path, place) pairs; place is where it lies below the folder or pattern that named it, for outputs that
    mirror the tree. Raises FileNotFoundError for a source that names nothing.
    """
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    found = {}
    for source in sources:
        for path, place in _expand(Path(source)):
            found.setdefault(os.path.abspath(path), (path, place))
    return list(found.values())


def _expand(source: Path) -> list[tuple[Path, Path]]:
    if source.is_dir():
        inside = sorted(Path(folder) / name for folder, _, names in os.walk(source) for name in names)
        images = [path for path in inside if path.suffix.lower() in SUFFIXES and path.is_file()]
        if not images:
            raise FileNotFoundError(f"No images in {source}; looked for {', '.join(sorted(SUFFIXES))} in it and below.")
        return [(path, path.relative_to(source)) for path in images]
    if source.is_file():
        return [(source, Path(source.name))]
    if source.exists():
        raise FileNotFoundError(f"{source} is neither a file nor a folder; give image files, folders or patterns.")
    if not glob.has_magic(str(source)):
        raise FileNotFoundError(f"No such file or folder: {source}.")
    matches = [Path(match) for match in sorted(glob.glob(str(source), recursive=True))]
    matches = [path for path in matches if path.is_file()]
    if not matches:
        raise FileNotFoundError(f"The pattern {source} matches no file.")
    root = next(parent for parent in source.parents if not glob.has_magic(str(parent)))
    return [(path, path.relative_to(root)) for path in matches]


def read_image(source) -> Image.Image:
    """An upright 8-bit RGB picture from a path, a binary file, a PIL image or an array (H, W, 3) uint8.

    EXIF rotation is applied, 16-bit and float greys are scaled to 8 bits, transparency is laid on white, of an
    animation the first frame is taken. Raises FileNotFoundError, or ValueError naming the file and what is wrong.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(f"Got an array {source.dtype} {source.shape}; an image must be uint8 (H, W, 3).")
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    name = source
    if hasattr(source, "read"):  # a pipe cannot be wound back: read it whole
        name, source = str(getattr(source, "name", "the image")), io.BytesIO(source.read())
    elif not Path(source).is_file():  # a FIFO would block, a folder would confuse
        raise FileNotFoundError(f"{source} is not an image file.")
    if Path(name).suffix.lower() == ".mat":
        return Image.fromarray(np.ascontiguousarray(read_mat(source, "img")[..., :3]))
    with opened(source, "an image", name=name) as image:
        return _to_rgb(image)


@contextmanager
def opened(path, what: str, *, name=None):
    """A Pillow image of a path or file; what goes wrong, also while its pixels are read, becomes one ValueError."""
    name = path if name is None else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a large photo; twice that is an error
            with Image.open(path) as image:
                yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be opened safely ({error}); if you trust it, raise the limit with "
                         "--max-megapixels.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"Cannot read {name} as {what} (no known format).") from error
    except Exception as error:  # decoders raise whatever a damaged file leads them to: TypeError, struct.error, ...
        reason = (str(error).strip() or "broken file").splitlines()[0]
        raise ValueError(f"Cannot read {name} as {what} ({reason}).") from error


def read_mat(path, key: str) -> np.ndarray:
    """The uint8 array under `key` in a MATLAB file, as Potsdam-3 comes; ValueError for anything else."""
    from scipy.io import loadmat  # here: an eighth of a second that only Potsdam needs
    try:
        found = loadmat(path).get(key)
    except Exception as error:  # scipy documents no errors of its own: struct, zlib, Type-, Index-, MatReadError, ...
        raise ValueError(f"Cannot read {path} as a MATLAB file ({error}).") from error
    dims = {"img": 3, "gt": 2}[key]
    sound = isinstance(found, np.ndarray) and found.dtype == np.uint8 and found.ndim == dims and found.size
    if not sound or (dims == 3 and found.shape[2] < 3):
        raise ValueError(f"{path} has no uint8 array of {dims} dimensions under the key {key!r}.")
    return found


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scale_to_8_bit(np.asarray(image))).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, BACKDROP)
        image = Image.alpha_composite(backdrop, image)
    return image.convert("RGB")


def _scale_to_8_bit(grey: np.ndarray) -> np.ndarray:
    """Integers above 255 are 16 bit, floats within 0..1 are shares of white, other ranges are stretched."""
    grey = np.nan_to_num(grey.astype(np.float64), posinf=0, neginf=0)
    low, high = float(grey.min()), float(grey.max())
    if 0 <= low and high <= 1:
        grey = grey * 255
    elif 0 <= low and 255 < high <= 65535:
        grey = grey / 257
    elif low < 0 or high > 255:
        grey = (grey - low) / max(high - low, 1e-12) * 255
    return grey.round().astype(np.uint8)


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
    corners = [(0, 0), (width - w, 0), (0, height - h), (width - w, height - h), ((width - w) // 2, (height - h) // 2)]
    return [(x, y, x + w, y + h) for x, y in corners]


def square(image: Image.Image, side: int) -> Image.Image:
    """Shorter side to `side` pixels, then the centre side x side."""
    return ImageOps.fit(image, (side, side), method=Image.Resampling.BILINEAR)


# ---- the door out ----------------------------------------------------------------------------------------------

def voc_palette(count: int = 256) -> np.ndarray:
    """The Pascal VOC colours shifted by one, so that cluster 0 is not black: (count, 3) uint8; entry 255 is black."""
    index = (np.arange(count)[:, None] + 1) % 256                            # (count, 1)
    bits = index >> np.arange(8) & 1                                         # (count, 8): bits of the index
    place = 7 - np.arange(8) // 3                                            # three bits a level, from the top
    return np.stack([(bits << place)[:, channel::3].sum(1) for channel in range(3)], 1).astype(np.uint8)


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; it takes the name when the block ends well and vanishes otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=path.suffix + ".part")
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's private mode is not what a user expects of an output
        os.replace(name, path)
        log.info("Wrote %s", path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def mask_image(mask: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Indexed picture of a mask (H, W) uint8; always 256 palette entries, fewer make Pillow pack 4 bits."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    full = voc_palette()
    full[:min(len(palette), IGNORE)] = palette[:IGNORE]
    image.putpalette(full.tobytes())
    return image


def write_image(image: Image.Image, path):
    """Save in the format of the suffix, whole or not at all."""
    form = Image.registered_extensions().get(Path(path).suffix.lower())
    if form is None:
        raise ValueError(f"Cannot tell the format of {path} from its suffix; use .png.")
    with replacing(path) as part:
        image.save(part, format=form, **({"quality": 90} if form == "JPEG" else {}))


def overlay(image: Image.Image, mask: np.ndarray, palette: np.ndarray, *, opacity: float = 0.5) -> Image.Image:
    """The picture with its segments' colours over it and a thin dark line between segments; none where mask is 255."""
    colours = mask_image(mask, palette).convert("RGB")
    blended = np.array(Image.blend(image, colours, opacity))                 # (H, W, 3)
    blended[mask == IGNORE] = np.asarray(image)[mask == IGNORE]
    edge = np.zeros(mask.shape, dtype=bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    blended[edge] = blended[edge] // 3
    return Image.fromarray(blended)


def spotlight(image: Image.Image, weight: np.ndarray, colour, *, opacity: float = 0.8) -> Image.Image:
    """The picture in grey, coloured where weight (H, W), 0 to 1, is large."""
    grey = np.asarray(image.convert("L"), dtype=float)[..., None]            # (H, W, 1)
    share = opacity * weight[..., None]
    return Image.fromarray((grey * (1 - share) + np.asarray(colour) * share).round().astype(np.uint8))


def mark(image: Image.Image, x: float, y: float, colour, *, radius: int = 4):
    """Draw a ringed dot into the picture at (x, y), in pixels."""
    draw = ImageDraw.Draw(image)
    for r, fill in ((radius + 2, INK), (radius + 1, "white"), (radius - 1, tuple(colour))):
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)


def with_legend(image: Image.Image, mask: np.ndarray, palette: np.ndarray, labels) -> Image.Image:
    """The picture over a strip that names the clusters of mask (H, W), the largest first; labels: (K,) str."""
    sizes = np.bincount(mask.ravel(), minlength=IGNORE + 1)[:len(palette)]
    present = [k for k in sizes.argsort(kind="stable")[::-1] if sizes[k]]
    em = max(FONT, image.width // 50)
    strip = legend_strip([(labels[k], palette[k].tolist()) for k in present], max(image.width, 16 * em), em=em)
    sheet = Image.new("RGB", (strip.width, image.height + strip.height), "white")
    sheet.paste(image)
    sheet.paste(strip, (0, image.height))
    return sheet


def contact_sheet(pairs, palette: np.ndarray, *, columns: int = 3) -> Image.Image:
    """Pictures beside their segments: pairs of (RGB picture, mask (H, W)) -> one RGB picture, `columns` pairs a row."""
    cells = []
    for image, mask in pairs:
        scale = SHEET_CELL / max(image.size)
        size = tuple(max(round(side * scale), 1) for side in image.size)
        coloured = mask_image(mask, palette).resize(size, Image.Resampling.NEAREST).convert("RGB")
        cells.append((image.resize(size, Image.Resampling.BILINEAR), coloured))
    columns = min(columns, len(cells))
    rows = [cells[i:i + columns] for i in range(0, len(cells), columns)]
    wide, high = 2 * SHEET_CELL + 2 * SHEET_GAP, [max(cell[0].height for cell in row) + SHEET_GAP for row in rows]
    sheet = Image.new("RGB", (columns * wide + SHEET_GAP, sum(high) + SHEET_GAP), "white")
    for r, row in enumerate(rows):
        for c, (image, coloured) in enumerate(row):
            x, y = SHEET_GAP + c * wide, SHEET_GAP + sum(high[:r])
            sheet.paste(image, (x, y))
            sheet.paste(coloured, (x + image.width + SHEET_GAP // 4, y))
    return sheet


def strips(rows, *, legend: dict) -> Image.Image:
    """Rows of (caption, RGB pictures), one below the other, and a legend {name: colour} below -> one RGB picture."""
    high = [FONT + SHEET_GAP + max(picture.height for picture in pictures) + SHEET_GAP for _, pictures in rows]
    wide = max(sum(picture.width + SHEET_GAP for picture in pictures) for _, pictures in rows) + SHEET_GAP
    names = legend_strip(legend.items(), wide)
    sheet = Image.new("RGB", (wide, sum(high) + SHEET_GAP + names.height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for r, (caption, pictures) in enumerate(rows):
        x, y = SHEET_GAP, SHEET_GAP + sum(high[:r])
        draw.text((x, y), caption, fill=INK, font=font)
        for picture in pictures:
            sheet.paste(picture, (x, y + FONT + SHEET_GAP))
            x += picture.width + SHEET_GAP
    sheet.paste(names, (0, sum(high) + SHEET_GAP))
    return sheet


def legend_strip(entries, wide: int, *, em: int = FONT) -> Image.Image:
    """Names beside squares of their colours, (name, (r, g, b)) pairs, in as many lines as the width asks for.

    em: pixels, the height of the letters.
    """
    font, gap, places = ImageFont.load_default(em), em // 2, []
    x, y = gap, gap
    for name, colour in entries:
        needed = round(font.getlength(name)) + 5 * em // 2
        if x > gap and x + needed > wide:
            x, y = gap, y + em + gap
        places.append((name, tuple(colour), x, y))
        x += needed
    strip = Image.new("RGB", (wide, y + em + gap), "white")
    draw = ImageDraw.Draw(strip)
    for name, colour, x, y in places:
        draw.rectangle([x, y, x + em, y + em], fill=colour)
        draw.text((x + 1.4 * em, y + em / 2), name, fill=INK, font=font, anchor="lm")
    return strip


def region_sheet(regions, palette: np.ndarray, captions) -> Image.Image:
    """For each cluster a row: its colour and caption, then regions, paler where they are other clusters.

    regions: for each cluster (picture, mask (h, w) uint8) pairs; captions: a text of lines each.
    """
    font, cell = ImageFont.load_default(FONT), SHEET_CELL // 2
    wide = 2 * SHEET_GAP + FONT + max(round(font.getlength(line)) for text in captions for line in text.split("\n"))
    size = (wide + max(max(map(len, regions)), 1) * (cell + SHEET_GAP), len(regions) * (cell + SHEET_GAP) + SHEET_GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for k, (row, text) in enumerate(zip(regions, captions)):
        y = SHEET_GAP + k * (cell + SHEET_GAP)
        draw.rectangle([SHEET_GAP, y, SHEET_GAP + FONT // 2, y + cell - 1], fill=tuple(palette[k].tolist()))
        draw.multiline_text((2 * SHEET_GAP + FONT // 2, y), text, fill=INK, font=font)
        for i, (picture, mask) in enumerate(row):
            pale = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.75)
            pale.paste(picture, mask=Image.fromarray(mask == k))
            sheet.paste(pale.resize((cell, cell), Image.Resampling.BICUBIC), (wide + i * (cell + SHEET_GAP), y))
    return sheet


# ---- charts ----------------------------------------------------------------------------------------------------

def line_chart(series: dict, *, title: str, x_label: str, y_label: str, size=(560, 400), y_range=None) -> Image.Image:
    """Curves {name: (xs, ys)} with axes, ticks and a legend -> RGB picture of size (width, height).

    Values that are not finite are left out; y_range (low, high) fixes the vertical axis.
    """
    curves = {name: np.array([xs, ys], dtype=float).T for name, (xs, ys) in series.items()}  # (n, 2) each
    curves = {name: points[np.isfinite(points).all(1)] for name, points in curves.items()}
    every = np.concatenate([np.zeros((0, 2)), *curves.values()]) if curves else np.zeros((0, 2))
    low, high = (every.min(0), every.max(0)) if len(every) else (np.zeros(2), np.ones(2))
    if y_range:
        low[1], high[1] = y_range
    high = np.where(high > low, high, low + 1)
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    left, top, right, bottom = 5 * FONT, 3 * FONT, size[0] - 2 * FONT, size[1] - (4 + len(curves)) * FONT - FONT // 2
    corner, extent = np.array([left, bottom]), np.array([right - left, top - bottom])

    def place(points):
        return corner + (points - low) / (high - low) * extent

    for axis in (0, 1):
        for tick in _ticks(low[axis], high[axis]):
            at = place(np.where(np.arange(2) == axis, tick, low))[axis]
            draw.line([(at, top), (at, bottom)] if axis == 0 else [(left, at), (right, at)], fill=FAINT)
            where, anchor = ((at, bottom + 4), "ma") if axis == 0 else ((left - 6, at), "rm")
            draw.text(where, f"{tick:g}", fill=INK, font=font, anchor=anchor)
    draw.rectangle([left, top, right, bottom], outline=INK)
    draw.text((size[0] / 2, 6), title, fill=INK, font=font, anchor="ma")
    draw.text(((left + right) / 2, bottom + 1.4 * FONT), x_label, fill=INK, font=font, anchor="ma")
    draw.text((6, top - 4), y_label, fill=INK, font=font, anchor="lb")
    for i, (name, points) in enumerate(curves.items()):
        colour, y = tuple(voc_palette()[i].tolist()), bottom + (3.5 + i) * FONT
        if len(points) > 1:
            draw.line([tuple(point) for point in place(points)], fill=colour, width=2, joint="curve")
        draw.line([(left, y), (left + 2 * FONT, y)], fill=colour, width=3)
        draw.text((left + 2.5 * FONT, y), name, fill=INK, font=font, anchor="lm")
    return picture


def _ticks(low: float, high: float, count: int = 5) -> np.ndarray:
    """Round numbers (steps of 1, 2 or 5 times a power of ten) between low and high, about `count` of them."""
    step = 10 ** np.floor(np.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count)
    return np.round(np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step, 12) + 0.0  # no -0


def density_chart(panels: dict, *, title: str, x_label: str, y_range) -> Image.Image:
    """How distributions moved: panels {name: (xs, shares (T, bins))}, one below the other -> RGB picture.

    Time goes to the right, the bins upwards over y_range (low, high); darker is more, on a square root scale.
    """
    wide, high = 460, 130
    left, step = 5 * FONT, high + 3 * FONT
    picture = Image.new("RGB", (left + wide + 2 * FONT, 3 * FONT + step * len(panels)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    draw.text((picture.width / 2, 6), title, fill=INK, font=font, anchor="ma")
    for i, (name, (xs, shares)) in enumerate(panels.items()):
        top = 3 * FONT + i * step
        grey = 255 - 255 * np.sqrt(np.asarray(shares, dtype=float).T[::-1])  # (bins, T), the highest bin above
        field = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).resize((wide, high), Image.Resampling.NEAREST)
        picture.paste(field, (left, top))
        draw.rectangle([left, top, left + wide, top + high], outline=INK)
        for tick in _ticks(*y_range, 4):
            y = top + high * (y_range[1] - tick) / (y_range[1] - y_range[0])
            draw.text((left - 6, y), f"{tick:g}", fill=INK, font=font, anchor="rm")
        draw.text((left, top - 2), name, fill=INK, font=font, anchor="lb")
        draw.text((left, top + high + 3), f"{x_label} {xs[0]:g}", fill=INK, font=font)
        draw.text((left + wide, top + high + 3), f"{x_label} {xs[-1]:g}", fill=INK, font=font, anchor="ra")
    return picture


def bar_chart(shares, palette: np.ndarray, labels, *, title: str) -> Image.Image:
    """A bar for each share (K,) in its colour (K, 3), with its label and percent -> RGB picture."""
    font, high = ImageFont.load_default(FONT), FONT + 6
    left = 12 + int(max(font.getlength(label) for label in labels))
    picture = Image.new("RGB", (left + 460, 3 * FONT + high * len(labels)), "white")
    draw, most = ImageDraw.Draw(picture), max(max(shares), 1e-9)
    draw.text((6, 6), title, fill=INK, font=font)
    for k, (share, colour, label) in enumerate(zip(shares, palette.tolist(), labels)):
        y, end = int(2.5 * FONT + k * high), left + 380 * share / most
        draw.text((left - 6, y + high / 2 - 1), label, fill=INK, font=font, anchor="rm")
        draw.rectangle([left, y, max(end, left + 1), y + high - 4], fill=tuple(colour))
        draw.text((end + 6, y + high / 2 - 1), f"{100 * share:.1f} %", fill=INK, font=font, anchor="lm")
    return picture


def matrix_picture(matrix: np.ndarray, rows, columns, *, title: str, cell: int = 22) -> Image.Image:
    """A matrix of shares 0..1 (n, k) as blue squares, with the names of its rows and columns -> RGB picture.

    A share of at least 0.05 is also written, in percent. NaN stays grey.
    """
    font, small = ImageFont.load_default(FONT), ImageFont.load_default(10)
    left = 12 + int(max([font.getlength(name) for name in rows], default=0))
    top = 30 + int(max([font.getlength(name) for name in columns], default=0))
    size = (max(left + cell * len(columns), int(font.getlength(title))) + 12, top + cell * len(rows) + 12)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((6, 6), title, fill=INK, font=font)
    for j, name in enumerate(columns):
        upright = Image.new("L", (max(int(font.getlength(name)), 1) + 2, FONT + 4))
        ImageDraw.Draw(upright).text((0, 0), name, fill=255, font=font)
        upright = upright.transpose(Image.Transpose.ROTATE_90)
        picture.paste(INK, (left + cell * j + (cell - upright.width) // 2, top - 4 - upright.height), upright)
    for i, name in enumerate(rows):
        draw.text((left - 6, top + cell * (i + 0.5)), name, fill=INK, font=font, anchor="rm")
        for j, share in enumerate(matrix[i]):
            x, y = left + cell * j, top + cell * i
            colour = (200, 200, 200) if np.isnan(share) else tuple(int(255 - share * d) for d in (225, 160, 80))
            draw.rectangle([x, y, x + cell - 2, y + cell - 2], fill=colour)
            if share >= 0.05:
                draw.text((x + cell / 2 - 1, y + cell / 2 - 1), f"{100 * share:.0f}", font=small, anchor="mm",
                          fill="white" if share > 0.5 else INK)
    return picture


# ---- segments as JSON: shares and COCO -------------------------------------------------------------------------

def cluster_shares(mask: np.ndarray, labels) -> list[dict]:
    """What part of a mask (H, W) each cluster covers, 0 to 1; labels: (K,) str."""
    sizes = np.bincount(mask.ravel(), minlength=IGNORE + 1)[:len(labels)]
    return [{"cluster": k, "name": name, "share": round(size / mask.size, 6)}
            for k, (name, size) in enumerate(zip(labels, sizes.tolist()))]


def coco_annotations(mask: np.ndarray) -> list[dict]:
    """One COCO annotation for each cluster of a mask (H, W): category_id is its number, segmentation compressed RLE."""
    found = []
    for k in np.unique(mask[mask != IGNORE]).tolist():
        segment = mask == k
        rows, columns = np.flatnonzero(segment.any(1)), np.flatnonzero(segment.any(0))
        x, y, right, bottom = (int(i) for i in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        found.append({"category_id": k, "segmentation": run_lengths(segment), "area": int(segment.sum()),
                      "bbox": [x, y, right - x, bottom - y], "iscrowd": 0})
    return found


def run_lengths(segment: np.ndarray) -> dict:
    """COCO's compressed run-length encoding of a segment (H, W) bool.

    Lengths of runs in column order, outside first; from the fourth on as the difference to the one two before; each in
    groups of five bits from the low end, the sixth bit says that more follow, a character is 48 + group.
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
            more = run != (-1 if group & 16 else 0)                          # the fifth bit bears the sign
            characters.append(48 + group + 32 * more)
    return {"size": list(segment.shape), "counts": bytes(characters).decode()}


# ---- drawn scenes: labelled images without a download ----------------------------------------------------------

SCENE_CLASSES = ("sky", "hills", "grass", "road", "building", "tree", "car")
SKY, HILLS, GRASS, ROAD, BUILDING, TREE, CAR = range(7)
EYE = 2.2                   # metres from the ground to the camera
HAZE = 120                  # metres after which two thirds of a colour are that of the horizon


def draw_scene(seed: int, height: int = 240, width: int = 320) -> tuple[Image.Image, np.ndarray]:
    """A synthetic road through a town or a landscape, and its labels (H, W) uint8 into SCENE_CLASSES."""
    scene = _Scene(np.random.default_rng(seed), height, width)
    rng, half, town = scene.rng, scene.rng.uniform(3.2, 5), scene.rng.random() < 0.65  # half: of the road, metres
    scene.land(half)
    things = [(z, scene.car, (lane * half * 0.48, z)) for lane in (-1, 1) for z in rng.uniform(7, 45, rng.integers(3))]
    for side in (-1, 1):
        z = rng.uniform(4, 12)
        while z < 90:
            near, choice = half + rng.uniform(2, 5), rng.random()
            if town and choice < 0.7:
                end = z + rng.uniform(7, 14)
                box = (side * near, side * (near + rng.uniform(7, 12)), z, end, 0, rng.uniform(5, 14))
                things.append((z, scene.house, box))
                z = end
            elif choice < 0.85:
                things.append((z, scene.tree, (side * (near + rng.exponential(1 if town else 6)), z)))
            z += rng.uniform(1, 9)
    for _, draw, place in sorted(things, key=lambda thing: -thing[0]):       # the far ones first
        draw(*place)
    noisy = scene.pixels * scene.warm + rng.normal(0, 3, scene.pixels.shape)
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(0.5)), scene.labels


class _Scene:
    """A picture under way: pixels (H, W, 3) float 0..255 and labels (H, W); x right, y up, z ahead, in metres."""

    def __init__(self, rng, height: int, width: int):
        self.rng, self.size, self.shape = rng, (width, height), (height, width)
        self.focus, self.middle = 0.9 * width, width * rng.uniform(0.35, 0.65)  # pixels
        self.horizon = height * rng.uniform(0.38, 0.52)
        self.sun = rng.choice([-1, 1]) * rng.uniform(0.3, 1.2) * (rng.random() < 0.8)  # shadow a metre; 0: overcast
        self.warm = 1 + rng.uniform(-0.01, 0.04) * np.array([1, 0.3, -1])
        self.pale = np.array([205, 218, 232]) + rng.normal(0, 6, 3)          # the sky at the horizon
        self.pixels, self.labels = np.zeros((*self.shape, 3)), np.zeros(self.shape, np.uint8)
        self.shaded, self.grain, self.patches = np.zeros(self.shape, bool), self.noise(1), self.noise(24)

    def noise(self, cell: float) -> np.ndarray:
        """Values around 0 (H, W): soft spots of `cell` pixels and finer ones of less weight."""
        total = np.zeros(self.shape)
        for octave in (1, 2, 4):
            spots = self.rng.normal(size=[max(int(side / max(cell / octave, 1)), 2) for side in self.shape])
            spots = Image.fromarray(spots.astype(np.float32)).resize(self.size, Image.Resampling.BICUBIC)
            total += np.asarray(spots) / octave / 1.8
        return total

    def at(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Where a point is seen, in pixels."""
        z = max(z, 0.8)
        return self.middle + self.focus * x / z, self.horizon - self.focus * (y - EYE) / z

    def flat(self, left: float, right: float, z: float, end: float, y: float = 0) -> list:
        """A level rectangle."""
        return [self.at(left, y, z), self.at(right, y, z), self.at(right, y, end), self.at(left, y, end)]

    def region(self, shapes, draw: str = "polygon") -> np.ndarray:
        mask = Image.new("1", self.size)
        fill = getattr(ImageDraw.Draw(mask), draw)
        for shape in shapes:
            fill(shape, fill=1)
        return np.asarray(mask)                                              # (H, W) bool

    def paint(self, region, label: int, colour, z, *, grain: float = 0.06, patches: float = 0.08):
        """Fill a region (H, W) bool with a textured colour, paler with its distance z: a number or (H, W)."""
        dy, dx = self.rng.choice((-1, 1), 2)
        texture = 1 + grain * self.grain + patches * self.patches[::dy, ::dx]
        clear = np.broadcast_to(np.exp(-np.asarray(z) / HAZE), self.shape)[region][:, None]
        self.pixels[region] = clear * np.asarray(colour) * texture[region][:, None] + (1 - clear) * self.pale
        self.labels[region] = label

    def shade(self, left: float, right: float, z: float, end: float, high: float):
        """Darken the ground where a thing of this outline and height keeps the sun off."""
        ends = sorted((left, right, left + self.sun * high, right + self.sun * high))
        dark = self.region([self.flat(ends[0], ends[-1], z, end)] if self.sun and high else [])
        dark = dark & np.isin(self.labels, (GRASS, ROAD)) & ~self.shaded
        self.pixels[dark] *= (0.57, 0.6, 0.66)
        self.shaded |= dark

    def land(self, half: float):
        """Sky with clouds, three ridges of hills, meadows and a road `half` metres to each side of its middle."""
        rng, (height, width) = self.rng, self.shape
        rows, columns = np.arange(height)[:, None] + np.zeros(width), np.arange(width) / width
        top = np.array([70, 120, 195]) + rng.normal(0, 9, 3) if self.sun else np.array([150, 166, 188])
        self.pixels[:] = top + (self.pale - top) * np.clip(rows / self.horizon, 0, 1)[..., None]
        clouds = np.clip(self.noise(60) - rng.uniform(0, 0.8), 0, 1)[..., None]
        self.pixels += (245 - self.pixels) * clouds * (0.9 if self.sun else 0.4)
        high = height * rng.uniform(0.1, 0.3)
        for z in (90, 50, 25):
            waves = sum(np.sin(columns * rng.uniform(2, 5) * k + rng.uniform(0, 7)) / k for k in (1, 2, 4, 7))
            ridge = rows > self.horizon - high * (0.45 + 0.35 * waves)
            self.paint(ridge, HILLS, (74, 104, 70) + rng.normal(0, 8, 3), z, patches=0.15)
            high *= 0.7
        z, ground = EYE * self.focus / np.maximum(rows - self.horizon, 1), rows > self.horizon
        self.paint(ground, GRASS, (96, 128, 58) + rng.normal(0, 12, 3), z, grain=0.12, patches=0.15)
        for wide, colour in ((half + 0.5, (150, 146, 140)), (half, np.full(3, rng.uniform(88, 118)))):
            self.paint(self.region([self.flat(-wide, wide, 0, 300)]) & ground, ROAD, colour, z)
        marks = [self.flat(-0.08, 0.08, start, start + 2.2) for start in np.arange(rng.uniform(0, 5), 80, 5)]
        marks += [self.flat(edge - 0.06, edge + 0.06, 0, 300) for edge in (-0.93 * half, 0.93 * half)]
        self.paint(self.region(marks) & ground, ROAD, (225, 225, 215), z)

    def block(self, x, other, z, end, low, high, label: int, colour, *, windows: bool = False):
        """A block from x (towards the road) to other, z to end, low to high; its top shows if below the camera."""
        self.shade(x, other, z, end, high if low == 0 else 0)
        self.paint(self.region([self.flat(x, other, z, end, high)] if high < EYE else []), label, colour, z)
        light = 0.95 if not self.sun else 0.85 + 0.3 * np.sign(self.sun * x)
        for x1, z1, light in ((other, z, 0.9), (x, end, light)):             # the front; the side along the road
            def quad(u, w, a, b):
                return [self.at(x + t * (x1 - x), y, z + t * (z1 - z)) for t, y in ((u, a), (w, a), (w, b), (u, b))]
            self.paint(self.region([quad(0, 1, low, high)]), label, np.asarray(colour) * light, z)
            count = max(int(max(abs(x1 - x), z1 - z) / 2.4), 1) if windows else 0
            panes = [quad((i + 0.28) / count, (i + 0.74) / count, y, y + 1.5)
                     for i in range(count) for y in np.arange(0.9, high - 1.8, 2.9)]
            self.paint(self.region(panes), label, (60, 72, 88), z, patches=0.2)

    def house(self, *box):
        walls = ((178, 150, 120), (160, 96, 78), (200, 190, 170), (140, 138, 140), (196, 168, 110))
        self.block(*box, BUILDING, walls[self.rng.integers(5)] + self.rng.normal(0, 8, 3), windows=True)

    def car(self, x: float, z: float):
        paints = ((170, 30, 30), (40, 60, 120), (215, 215, 218), (40, 42, 46), (120, 125, 130), (200, 160, 40))
        colour, inner = paints[self.rng.integers(6)], -np.sign(x)
        parts = ((0.85, 0.1, 3.9, 0, 0.3, (28, 28, 30)), (0.9, 0, 4, 0.3, 0.9, colour),  # wheels, body
                 (0.7, 0.7, 3, 0.9, 1.4, (58, 66, 78)), (0.65, 0.8, 2.9, 1.4, 1.5, colour))  # windows, roof
        for wide, start, end, low, high, shown in parts:
            self.block(x + wide * inner, x - wide * inner, z + start, z + end, low, high, CAR, shown)

    def tree(self, x: float, z: float):
        rng, high = self.rng, self.rng.uniform(3, 8)
        self.shade(x - high / 4, x + high / 4, z, z + high / 3, high)
        trunk = [self.at(x - 0.15, 0, z), self.at(x + 0.15, 0, z), self.at(x, 0.8 * high, z)]
        self.paint(self.region([trunk]), TREE, (84, 66, 50), z)
        green = (58, 92, 42) + rng.normal(0, 10, 3)
        for lit in np.linspace(-0.5, 0.5, 24):                               # clumps of leaves, the sunny ones last
            dx, dy = rng.normal(0, high / 8, 2).clip(-high / 6, high / 6)
            dx, dy = dx - lit * high / 5 * np.sign(self.sun), dy + lit * high / 5
            (u, v), r = self.at(x + dx, 0.66 * high + dy, z), self.focus * high * rng.uniform(0.06, 0.13) / z
            leaves = self.region([(u - r, v - r, u + r, v + r)], "ellipse")
            self.paint(leaves, TREE, green * (0.95 + 0.6 * lit), z, grain=0.22)
