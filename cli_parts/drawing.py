"""Pictures for people: overlays, legends, sheets, matrices."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from cli_parts.fonts import font, readable
from stego_parts.images import IGNORE, mask_image

GAP = 8  # pixels between pictures
EM = 13  # pixels: height of the letters, if nothing else is said
INK = (40, 40, 40)  # colour of letters
UNKNOWN = (200, 200, 200)  # of NaN in a matrix
VIVID = ((255, 40, 40), (70, 110, 255), (40, 190, 40), (255, 170, 0), (230, 60, 230), (0, 190, 210))
OPACITY = 0.55  # of segments over a picture
SPOT_SIDE = 320  # positions of the longer side of a mask on which places for text are looked for
SHEET_CELL = (300, 220)  # pixels: what a picture on the contact sheet fits into (width, height)
SHEET_EM = 18  # pixels: height of the letters of its legend
SHEET_COLUMNS = 3  # pairs of pictures side by side on it
REGION_CELL = 120  # pixels: side of a region on the sheet of clusters
CELL = 24  # pixels: side of a cell of a matrix

Color = tuple[int, int, int]


# ---- text and layout -------------------------------------------------------------------------------------------


def text_picture(text: str, em: int = EM, *, width: int = 1) -> Image.Image:
    """Lines of text on white, at least `width` pixels wide; em: pixels, the height of the letters."""
    lines = [readable(line) for line in text.split("\n")]
    height = round(1.4 * em)
    needed = math.ceil(max(font(em, line).getlength(line) for line in lines))
    picture = Image.new("RGB", (max(width, needed), height * len(lines)), "white")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((0, (i + 0.5) * height), line, fill=INK, font=font(em, line), anchor="lm")
    return picture


def stack(pictures: Iterable[Image.Image], *, across: bool = False, gap: int = GAP) -> Image.Image:
    """Pictures below each other, or side by side, `gap` pixels apart, on white."""
    pictures = list(pictures)
    widths = [picture.width for picture in pictures]
    heights = [picture.height for picture in pictures]
    gaps = gap * (len(pictures) - 1)
    if across:
        width = max(sum(widths) + gaps, 1)
        height = max(heights, default=1)
    else:
        width = max(widths, default=1)
        height = max(sum(heights) + gaps, 1)
    sheet = Image.new("RGB", (width, height), "white")
    start = 0
    for picture in pictures:
        if across:
            sheet.paste(picture, (start, 0))
            start += picture.width + gap
        else:
            sheet.paste(picture, (0, start))
            start += picture.height + gap
    return sheet


def flow(pictures: Iterable[Image.Image], width: int, *, gap: int = GAP) -> Image.Image:
    """Pictures side by side, in as many lines as the width asks for."""
    lines: list[list[Image.Image]] = []
    room = 0
    for picture in pictures:
        if picture.width > room:
            lines.append([])
            room = width
        lines[-1].append(picture)
        room -= picture.width + gap
    return stack((stack(line, across=True, gap=gap) for line in lines), gap=gap)


def framed(picture: Image.Image) -> Image.Image:
    """A white margin."""
    return ImageOps.expand(picture, GAP, "white")


def legend(entries: Iterable[tuple[str, Color]], width: int, *, em: int = EM) -> Image.Image:
    """Names beside patches of their colours, in as many lines as the width asks for; em: pixels."""
    pairs = []
    for name, color in entries:
        text = text_picture(name, em)
        patch = Image.new("RGB", (em, text.height), tuple(color))
        pairs.append(stack([patch, text], across=True, gap=em // 2))
    return flow(pairs, width, gap=em)


# ---- segments --------------------------------------------------------------------------------------------------


class Clusters(NamedTuple):
    """How clusters are shown: their colours (K, 3) uint8 and labels, none to write none. A model has both, too."""

    colors: np.ndarray
    labels: Sequence[str] = ()


class Colored(Protocol):
    """What `Clusters` and models have."""

    @property
    def colors(self) -> np.ndarray: ...

    @property
    def labels(self) -> Sequence[str]: ...


def cluster_name(k: int, labels: Sequence[str]) -> str:
    """A cluster's number, and its name if it has one that can be written."""
    name = readable(labels[k], str(k))
    return name if name == str(k) else f"{k} {name}"


def segment_legend(masks: Iterable[np.ndarray], clusters: Colored, width: int, *, em: int) -> Image.Image:
    """The clusters in masks (H, W), the largest first, in lines of `width` pixels; em: pixels."""
    entries = []
    for k in largest_first(masks, len(clusters.labels)):
        entries.append((cluster_name(k, clusters.labels), tuple(clusters.colors[k].tolist())))
    return legend(entries, width, em=em)


def largest_first(masks: Iterable[np.ndarray], count: int) -> list[int]:
    """Which of `count` clusters are in masks (H, W), the one with most pixels first."""
    sizes = np.zeros(count, int)  # (K,) pixels
    for mask in masks:
        sizes += np.bincount(mask.ravel(), minlength=IGNORE + 1)[:count]
    return [k for k in np.argsort(-sizes, kind="stable").tolist() if sizes[k]]


def with_legend(image: Image.Image, mask: np.ndarray, clusters: Colored) -> Image.Image:
    """The picture with the segments of its mask (H, W) over a legend of their clusters, the largest first."""
    em = max(EM, image.width // 60)
    picture = overlay(image, mask, clusters)
    names = segment_legend([mask], clusters, max(image.width, 16 * em) - 2 * GAP, em=em)
    return stack([picture, framed(names)], gap=0)


def overlay(
    image: Image.Image, mask: np.ndarray, clusters: Colored, *, opacity: float = OPACITY
) -> Image.Image:
    """Segments over the picture in grey, thinly outlined; labels, or else numbers, are written on large ones.

    mask: (H, W) uint8. The picture stays as it is where the mask is 255.
    """
    grey = image.convert("L").convert("RGB")
    colors = mask_image(mask, clusters.colors).convert("RGB")
    shown = np.array(Image.blend(grey, colors, opacity))  # (H, W, 3)
    shown[mask == IGNORE] = np.asarray(image)[mask == IGNORE]
    line = _edges(mask)
    shown[line] = 255 - (255 - shown[line]) // 3
    picture = Image.fromarray(shown)
    if len(clusters.labels):
        for k, x, y, radius in _spots(mask):
            _write_inside(picture, (x, y), radius, (readable(clusters.labels[k], str(k)), str(k)))
    return picture


def cutout(image: Image.Image, share: np.ndarray) -> Image.Image:
    """The picture, as opaque as a share (h, w) of 0 to 1 says, which is brought to its size."""
    alpha = Image.fromarray(share.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    picture = image.copy()
    picture.putalpha(Image.fromarray((255 * np.asarray(alpha)).round().clip(0, 255).astype(np.uint8)))
    return picture


def _edges(mask: np.ndarray) -> np.ndarray:
    """Where a mask (H, W) differs from the pixel above or to the left: (H, W) bool."""
    edges = np.zeros(mask.shape, bool)
    edges[1:] |= mask[1:] != mask[:-1]
    edges[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    return edges


def _spots(mask: np.ndarray) -> Iterator[tuple[int, int, int, float]]:
    """For each connected region of a mask (H, W): cluster, point (x, y) furthest inside, distance to its edge."""
    from scipy import ndimage  # here: masks alone need it not

    step = max(max(mask.shape) // SPOT_SIDE, 1)
    small = mask[::step, ::step]
    inside = ndimage.distance_transform_edt(np.pad(~_edges(small), 1))[1:-1, 1:-1]
    for k in np.unique(small[small != IGNORE]).tolist():
        parts, count = ndimage.label(small == k)
        for y, x in ndimage.maximum_position(inside, parts, range(1, count + 1)):
            yield k, int(x) * step, int(y) * step, float(inside[y, x]) * step


def _write_inside(picture: Image.Image, at: tuple[int, int], radius: float, texts: Iterable[str]) -> None:
    """Write the first text that fits into a circle about a point (x, y), if there is one; radius: pixels."""
    em = max(EM, max(picture.size) // 50)
    width = max(em // 7, 1)
    for text in texts:
        letters = font(em, text)
        if math.hypot(letters.getlength(text), em) / 2 <= radius:
            draw = ImageDraw.Draw(picture)
            draw.text(at, text, "white", letters, anchor="mm", stroke_width=width, stroke_fill=INK)
            return


def contact_sheet(pairs: Iterable[tuple[Image.Image, np.ndarray]], clusters: Colored) -> Image.Image:
    """Pictures beside their segments over a legend: pairs of (RGB picture, mask (H, W)) -> one picture."""
    cells = []
    masks = []
    for image, mask in pairs:
        small = image.resize(_cell_size(image), Image.Resampling.LANCZOS)
        small_mask = _resized_mask(mask, small.size)
        masks.append(small_mask)
        cells.append(stack([small, overlay(small, small_mask, clusters)], across=True, gap=2))
    sheet = flow(cells, SHEET_COLUMNS * (2 * SHEET_CELL[0] + 2 + GAP))
    names = segment_legend(masks, clusters, max(sheet.width, SHEET_CELL[0]), em=SHEET_EM)
    return framed(stack([sheet, names], gap=2 * GAP))


def cell(image: Image.Image, mask: np.ndarray | None = None, clusters: Colored | None = None) -> Image.Image:
    """A picture, with its segments where there is a mask (H, W), on white of SHEET_CELL."""
    picture = image.resize(_cell_size(image), Image.Resampling.LANCZOS)
    if mask is not None and clusters is not None:
        picture = overlay(picture, _resized_mask(mask, picture.size), clusters)
    return ImageOps.pad(picture, SHEET_CELL, color="white", centering=(0, 0))


def _cell_size(image: Image.Image) -> tuple[int, int]:
    """How large a picture is on a sheet: (width, height) in pixels."""
    width, height = SHEET_CELL
    scale = min(width / image.width, height / image.height)
    return max(round(image.width * scale), 1), max(round(image.height * scale), 1)


def _resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) uint8 at another size (width, height)."""
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def region_sheet(rows: Sequence[tuple[str, Color, Sequence]], *, columns: int = 2) -> Image.Image:
    """Rows of a cluster each: caption, colour, and regions, (picture, where it is (h, w) bool), pale elsewhere."""
    width = max((text_picture(caption).width for caption, _, _ in rows), default=1)
    entries = []
    for caption, color, regions in rows:
        parts = [Image.new("RGB", (EM, REGION_CELL), color), text_picture(caption, width=width)]
        parts += [region_picture(picture, inside) for picture, inside in regions]
        entries.append(stack(parts, across=True))
    count = max(math.ceil(len(entries) / columns), 1)
    blocks = [stack(entries[i : i + count]) for i in range(0, len(entries), count)]
    return framed(stack(blocks, across=True, gap=4 * GAP))


def region_picture(picture: Image.Image, inside: np.ndarray) -> Image.Image:
    """A square picture, pale but where `inside` (h, w) bool says, with sides of REGION_CELL."""
    shown = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.75)
    shown.paste(picture, mask=Image.fromarray(inside))
    return shown.resize((REGION_CELL, REGION_CELL), Image.Resampling.BICUBIC)


def image_rows(
    rows: Iterable[tuple[str, Sequence[Image.Image]]],
    *,
    headings: Sequence[str] = (),
    names: dict[str, Color] | None = None,
) -> Image.Image:
    """Rows of (caption, RGB pictures) below headings of their columns, over a legend {name: colour}."""
    rows = list(rows)
    parts = []
    if headings and rows:
        titles = [text_picture(text, width=below.width) for text, below in zip(headings, rows[0][1])]
        parts.append(stack(titles, across=True))
    for caption, pictures in rows:
        parts.append(stack([text_picture(caption), stack(pictures, across=True)]))
    sheet = stack(parts)
    if names:
        sheet = stack([sheet, legend(names.items(), sheet.width)])
    return framed(sheet)


# ---- correspondences -------------------------------------------------------------------------------------------


def spotlight(image: Image.Image, weight: np.ndarray, color: Color) -> Image.Image:
    """The picture in grey, coloured where weight (H, W), 0 to 1, is large."""
    grey = np.asarray(image.convert("L"), dtype=float)[..., None]  # (H, W, 1)
    share = 0.8 * weight[..., None]  # (H, W, 1)
    return Image.fromarray((grey * (1 - share) + np.asarray(color) * share).round().astype(np.uint8))


def mark(image: Image.Image, x: float, y: float, color: Color) -> None:
    """Draw a ringed dot into the picture at (x, y), in pixels."""
    draw = ImageDraw.Draw(image)
    for r, fill in ((6, INK), (5, "white"), (3, color)):  # radii in pixels
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)


# ---- matrices --------------------------------------------------------------------------------------------------


def matrix_picture(
    matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, title: str
) -> Image.Image:
    """A matrix of shares 0..1 (n, k) as blue squares, with the names of its rows and columns.

    A share of at least 0.05 is also written, in percent. NaN stays grey.
    """
    field = _matrix_field(matrix)
    left = max(text_picture(name).width for name in rows)
    above = [text_picture(name) for name in columns]
    top = max(name.width for name in above)
    sheet = Image.new("RGB", (left + GAP + field.width, top + GAP // 2 + field.height), "white")
    sheet.paste(field, (left + GAP, top + GAP // 2))
    for j, name in enumerate(above):
        x = left + GAP + CELL * j + (CELL - name.height) // 2
        sheet.paste(name.transpose(Image.Transpose.ROTATE_90), (x, top - name.width))
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(rows):
        y = top + GAP // 2 + CELL * (i + 0.5)
        draw.text((left, y), readable(text), fill=INK, font=font(EM, readable(text)), anchor="rm")
    return framed(stack([text_picture(title), sheet]))


def _matrix_field(matrix: np.ndarray) -> Image.Image:
    """The squares of a matrix (n, k) of shares 0..1, with the larger shares in percent."""
    count, width = matrix.shape
    field = Image.new("RGB", (CELL * width, CELL * count), "white")
    draw = ImageDraw.Draw(field)
    for (i, j), share in np.ndenumerate(matrix):
        x = CELL * j
        y = CELL * i
        color = UNKNOWN if np.isnan(share) else tuple(int(255 - share * depth) for depth in (225, 160, 80))
        draw.rectangle([x, y, x + CELL - 2, y + CELL - 2], fill=color)
        if share >= 0.05:
            ink = "white" if share > 0.5 else INK
            at = (x + CELL / 2 - 1, y + CELL / 2 - 1)
            draw.text(at, f"{100 * share:.0f}", fill=ink, font=font(EM - 2), anchor="mm")
    return field
