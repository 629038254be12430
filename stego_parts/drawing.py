"""Pictures for people: overlays, legends, sheets, charts, matrices."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stego_parts.images import IGNORE, mask_image, voc_palette

SHEET_CELL = 240  # pixels: longer side of a picture on the contact sheet
SHEET_GAP = 8  # pixels between them
FONT = 13  # pixels: height of the letters in charts
INK, FAINT = (40, 40, 40), (225, 225, 225)  # letters and axes; grid lines


def overlay(
    image: Image.Image, mask: np.ndarray, palette: np.ndarray, *, opacity: float = 0.5
) -> Image.Image:
    """The picture with its segments' colours over it and a thin dark line between segments; none where mask is 255."""
    colours = mask_image(mask, palette).convert("RGB")
    blended = np.array(Image.blend(image, colours, opacity))  # (H, W, 3)
    blended[mask == IGNORE] = np.asarray(image)[mask == IGNORE]
    edge = np.zeros(mask.shape, dtype=bool)
    edge[1:] |= mask[1:] != mask[:-1]
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    blended[edge] = blended[edge] // 3
    return Image.fromarray(blended)


def spotlight(image: Image.Image, weight: np.ndarray, colour, *, opacity: float = 0.8) -> Image.Image:
    """The picture in grey, coloured where weight (H, W), 0 to 1, is large."""
    grey = np.asarray(image.convert("L"), dtype=float)[..., None]  # (H, W, 1)
    share = opacity * weight[..., None]
    return Image.fromarray((grey * (1 - share) + np.asarray(colour) * share).round().astype(np.uint8))


def mark(image: Image.Image, x: float, y: float, colour, *, radius: int = 4):
    """Draw a ringed dot into the picture at (x, y), in pixels."""
    draw = ImageDraw.Draw(image)
    for r, fill in ((radius + 2, INK), (radius + 1, "white"), (radius - 1, tuple(colour))):
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)


def with_legend(image: Image.Image, mask: np.ndarray, palette: np.ndarray, labels) -> Image.Image:
    """The picture over a strip that names the clusters of mask (H, W), the largest first; labels: (K,) str."""
    sizes = np.bincount(mask.ravel(), minlength=IGNORE + 1)[: len(palette)]
    present = [k for k in sizes.argsort(kind="stable")[::-1] if sizes[k]]
    em = max(FONT, image.width // 50)
    strip = legend_strip(
        [(labels[k], palette[k].tolist()) for k in present], max(image.width, 16 * em), em=em
    )
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
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    wide, high = (
        2 * SHEET_CELL + 2 * SHEET_GAP,
        [max(cell[0].height for cell in row) + SHEET_GAP for row in rows],
    )
    sheet = Image.new("RGB", (columns * wide + SHEET_GAP, sum(high) + SHEET_GAP), "white")
    for r, row in enumerate(rows):
        for c, (image, coloured) in enumerate(row):
            x, y = SHEET_GAP + c * wide, SHEET_GAP + sum(high[:r])
            sheet.paste(image, (x, y))
            sheet.paste(coloured, (x + image.width + SHEET_GAP // 4, y))
    return sheet


def strips(rows, *, legend: dict) -> Image.Image:
    """Rows of (caption, RGB pictures), one below the other, and a legend {name: colour} below -> one RGB picture."""
    high = [
        FONT + SHEET_GAP + max(picture.height for picture in pictures) + SHEET_GAP for _, pictures in rows
    ]
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
    wide = (
        2 * SHEET_GAP
        + FONT
        + max(round(font.getlength(line)) for text in captions for line in text.split("\n"))
    )
    size = (
        wide + max(max(map(len, regions)), 1) * (cell + SHEET_GAP),
        len(regions) * (cell + SHEET_GAP) + SHEET_GAP,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for k, (row, text) in enumerate(zip(regions, captions)):
        y = SHEET_GAP + k * (cell + SHEET_GAP)
        draw.rectangle([SHEET_GAP, y, SHEET_GAP + FONT // 2, y + cell - 1], fill=tuple(palette[k].tolist()))
        draw.multiline_text((2 * SHEET_GAP + FONT // 2, y), text, fill=INK, font=font)
        for i, (picture, mask) in enumerate(row):
            pale = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.75)
            pale.paste(picture, mask=Image.fromarray(mask == k))
            sheet.paste(
                pale.resize((cell, cell), Image.Resampling.BICUBIC), (wide + i * (cell + SHEET_GAP), y)
            )
    return sheet


def line_chart(
    series: dict, *, title: str, x_label: str, y_label: str, size=(560, 400), y_range=None
) -> Image.Image:
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
    left, top, right, bottom = (
        5 * FONT,
        3 * FONT,
        size[0] - 2 * FONT,
        size[1] - (4 + len(curves)) * FONT - FONT // 2,
    )
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
    return (
        np.round(np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step, 12) + 0.0
    )  # no -0


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
        grey = 255 - 255 * np.sqrt(
            np.asarray(shares, dtype=float).T[::-1]
        )  # (bins, T), the highest bin above
        field = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).resize(
            (wide, high), Image.Resampling.NEAREST
        )
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
            colour = (
                (200, 200, 200) if np.isnan(share) else tuple(int(255 - share * d) for d in (225, 160, 80))
            )
            draw.rectangle([x, y, x + cell - 2, y + cell - 2], fill=colour)
            if share >= 0.05:
                draw.text(
                    (x + cell / 2 - 1, y + cell / 2 - 1),
                    f"{100 * share:.0f}",
                    font=small,
                    anchor="mm",
                    fill="white" if share > 0.5 else INK,
                )
    return picture
