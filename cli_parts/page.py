"""A page about a model: one static HTML file that opens from disk, its pictures in a folder beside it."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from cli_parts.drawing import VIVID, largest_first, overlay, region_picture
from cli_parts.sheets import best_regions, cluster_shares, description, hex_color, segmented
from stego import Stego
from stego_parts.checkpoint import FitRecord, training_warning
from stego_parts.config import TERMS
from stego_parts.files import write_bytes
from stego_parts.images import write_image
from stego_parts.running import Progress, no_progress

SUFFIX = ".html"
PICTURES = 6  # photos with a slider
REGION_IMAGES = 120  # images of a fit in which the regions that fit a cluster best are looked for
CROPS = 4  # whose nearest neighbours are named
PLACES = (
    "upper left of",
    "upper right of",
    "lower left of",
    "lower right of",
    "centre of",
)  # as `five_boxes` cuts
SIMILAR = {  # what `code_similarities` measures, in words
    "self": "similarity of codes in an image",
    "knn": "with its neighbour",
    "rand": "with another image",
}
CHART = (480, 240)  # width, height of a chart's field, in units of its picture
MARGIN = 48  # left of and below it
LINE = 20  # from one line of text to the next

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --soft: #6a6a6a; --card: #f4f4f2; --line: #d8d8d4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --paper: #161616; --soft: #a0a09c; --card: #232322; --line: #3c3c3a } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere }
p, li { max-width: 46rem; overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; color: var(--soft) }
figure { margin: 0 } figcaption, .soft { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere }
img { display: block; width: 100%; height: auto }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)) }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(25rem, 100%), 1fr)) }
.card { background: var(--card); border-radius: 6px; padding: .75rem; border-left: 10px solid }
.share { float: right; font-variant-numeric: tabular-nums }
.regions { display: grid; grid-template-columns: repeat(3, 1fr); gap: 3px; margin-top: .5rem }
.pair { position: relative; --at: 50% }
.pair img + img { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at)) }
.pair + input { display: block; width: 100%; margin: .4rem 0 }
.patch { display: inline-block; width: .8em; height: .8em; margin-right: .3em; border: 1px solid var(--line) }
.names span { margin-right: .9em; white-space: nowrap }
svg { width: 100%; height: auto; font: 13px system-ui, sans-serif; fill: currentColor }
"""


def pictures_folder(file: Path) -> Path:
    """Where the pictures of a page lie."""
    return file.with_name(f"{file.stem}-pictures")


def write_page(model: Stego, file: Path, paths: Sequence[Path], *, progress: Progress = no_progress) -> None:
    """Write a page about a model: some of the images, its clusters as regions of them, and how its fit went.

    The last only right after the fit, whose record is not saved.
    """
    folder = pictures_folder(file)
    parts = [_heading(model, len(paths))]
    parts += _photo_section(model, folder, spread(paths, PICTURES), progress)
    parts += _cluster_section(model, folder, paths, progress)
    if model.record and model.record.history:
        parts += _training_section(model, model.record)
    body = "\n".join(parts)
    text = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>stego: {len(model.centers)} clusters</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
    write_bytes(text.encode(errors="replace"), file)  # a file's name may be no text


def spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the images, evenly spread."""
    step = max(len(paths) / count, 1)
    return [paths[int(i * step)] for i in range(min(count, len(paths)))]


def _heading(model: Stego, count: int) -> str:
    lines = escape("\n".join(description(model)))
    return (
        f"<h1>{len(np.unique(model.merged))} clusters, shown on {count} images</h1>\n"
        f"<details><summary>How the model was made</summary><pre>{lines}</pre></details>"
    )


# ---- photos and clusters ---------------------------------------------------------------------------------------


def _photo_section(model: Stego, folder: Path, paths: Sequence[Path], progress: Progress) -> Iterator[str]:
    """Photos under their segments, with a slider between them."""
    yield '<h2>Photos and segments</h2>\n<div class="grid wide">'
    for number, (path, image, mask) in enumerate(segmented(model, paths, progress=progress)):
        photo = _written(image, folder / f"photo{number}.jpg")
        segments = _written(overlay(image, mask, model), folder / f"segments{number}.jpg")
        name = escape(Path(path).name)
        move = "this.previousElementSibling.style.setProperty('--at', this.value + '%')"
        yield (
            f'<figure><div class="pair"><img src="{photo}" alt="{name}"><img src="{segments}" alt="its segments">'
            f'</div><input type="range" value="50" aria-label="from segments to photo" oninput="{move}">'
            f'<figcaption>{name}<br><span class="names">{_names_in(mask, model)}</span></figcaption></figure>'
        )
    yield "</div>"


def _names_in(mask: np.ndarray, model: Stego) -> str:
    """The clusters in a mask (H, W), the largest first, with their colours."""
    present = largest_first([mask], len(model.labels))
    return " ".join(f"<span>{_patch(hex_color(model.colors[k]))}{_name(model, k)}</span>" for k in present)


def _patch(color: str) -> str:
    return f'<i class="patch" style="background:{color}"></i>'


def _name(model: Stego, k: int) -> str:
    """A cluster's number and name, as HTML."""
    return escape(str(k) if not model.names[k] else f"{k} {model.names[k]}")


def _cluster_section(model: Stego, folder: Path, paths: Sequence[Path], progress: Progress) -> Iterator[str]:
    """A card for each cluster: name, share of the training images, the regions that fit it best."""
    yield (
        "<h2>Clusters</h2>\n<p>Each with its share of the images of the fit and the regions that fit it best, "
        'pale where other clusters are.</p>\n<div class="grid">'
    )
    shares = cluster_shares(model)
    for k, regions in enumerate(best_regions(model, paths, progress=progress)):
        if model.merged[k] != k:  # part of another cluster
            continue
        shown = []
        for number, (picture, mask) in enumerate(regions):
            source = _written(region_picture(picture, mask == k), folder / f"cluster{k}-{number}.jpg")
            shown.append(f'<img src="{source}" alt="">')
        yield (
            f'<section class="card" style="border-color:{hex_color(model.colors[k])}">'
            f'<h3><span class="share">{shares[k]:.1%}</span>{_name(model, k)}</h3>'
            f'<div class="regions">{"".join(shown) or "nowhere in these images"}</div></section>'
        )
    yield "</div>"


def _written(picture: Image.Image, file: Path) -> str:
    """Write a picture of the page; returns what the page calls it."""
    write_image(picture, file)
    return quote(os.fsencode(f"{file.parent.name}/{file.name}"))


# ---- the fit ---------------------------------------------------------------------------------------------------


def _training_section(model: Stego, record: FitRecord) -> Iterator[str]:
    """The curves of the loss and of the codes' similarities, and neighbours in words (Fig. 14, 15)."""
    history = record.history
    loss = {"loss": [(entry["step"], entry["loss"]) for entry in history]}
    similar = {}
    for term in TERMS:
        if term in history[-1]:
            similar[SIMILAR[term]] = [(entry["step"], entry[term]) for entry in history]
    sound = training_warning(history) or "Training looks sound."
    yield f"<h2>Training</h2>\n<p>{escape(sound)} {history[-1]['step'] + 1} steps on {len(record.images)} crops.</p>"
    yield f'<div class="grid wide">{curve_svg(loss, x_label="step")}'
    yield f"{curve_svg(similar, x_label='step')}</div>"
    yield f"<h2>Nearest neighbours</h2>\n<p>{escape(neighbor_line(record))}</p>\n<ul>"
    for sentence in neighbor_sentences(record, model.config.views):
        yield f"<li>{escape(sentence)}</li>"
    yield "</ul>"


def neighbor_line(record: FitRecord) -> str:
    """How many of a crop's neighbours are of its own image, in words (App. A.12, Fig. 15)."""
    own = (record.images[record.neighbors] == record.images[:, None]).float().sum(1)  # (n,)
    count = record.neighbors.shape[1]
    none = (own == 0).float().mean()
    return (
        f"Of a crop's {count} nearest neighbours, {own.mean():.1f} are of its own image; "
        f"{none:.0%} of the crops have none such."
    )


def neighbor_sentences(record: FitRecord, views: str | None) -> list[str]:
    """For some crops, evenly spread over all, where their nearest neighbours are."""
    sentences = []
    crops = range(len(record.images))
    for crop in crops[:: max(len(crops) // CROPS, 1)][:CROPS]:
        near = [_crop_name(record, other, views) for other in record.neighbors[crop].tolist()]
        sentences.append(f"{_crop_name(record, crop, views)}: nearest to {', '.join(near)}.")
    return sentences


def _crop_name(record: FitRecord, crop: int, views: str | None) -> str:
    """Where a crop is, in words."""
    name = Path(record.paths[record.images[crop]]).name
    return name if views == "whole" else f"{PLACES[int(record.parts[crop])]} {name}"


# ---- charts ----------------------------------------------------------------------------------------------------


def curve_svg(curves: Mapping[str, Iterable[tuple[float, float]]], *, x_label: str) -> str:
    """Curves {name: (x, y) points} as SVG in the colour of the text around it; what is not finite is left out."""
    points = {}
    for name, curve in curves.items():
        values = np.array(list(curve), float).reshape(-1, 2)  # (n, 2)
        points[name] = values[np.isfinite(values).all(1)]
    every = np.concatenate([np.zeros((0, 2)), *points.values()])
    low = every.min(0) if len(every) else np.zeros(2)
    span = every.max(0) - low if len(every) else np.ones(2)
    span[span <= 0] = 1
    width, height = CHART
    parts = [*_grid(low, span), _text(width / 2, height + 38, x_label)]
    for i, (name, values) in enumerate(points.items()):
        red, green, blue = VIVID[i % len(VIVID)]
        color = f"rgb({red},{green},{blue})"
        places = (values - low) / span * [width, -height] + [0, height]  # (n, 2)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        below = height + 64 + LINE * i
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<rect x="0" y="{below - 10}" width="12" height="12" fill="{color}"/>')
        parts.append(_text(20, below, name, anchor="start"))
    box = f"{-MARGIN} -12 {width + MARGIN + 12} {height + 64 + LINE * len(points)}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="{box}">{"".join(parts)}</svg>'


def _grid(low: np.ndarray, span: np.ndarray) -> Iterator[str]:
    """Lines at round numbers of both axes, and the numbers; low, span (2,): x and y."""
    width, height = CHART
    line = 'fill="none" stroke="currentColor" stroke-opacity="0.2"'
    for value in _ticks(low[0], span[0]):
        x = (value - low[0]) / span[0] * width
        yield f'<path d="M{x:.1f} 0V{height}" {line}/>' + _text(x, height + 18, f"{value:g}")
    for value in _ticks(low[1], span[1]):
        y = height - (value - low[1]) / span[1] * height
        yield f'<path d="M0 {y:.1f}H{width}" {line}/>' + _text(-6, y + 4, f"{value:g}", anchor="end")


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(low: float, span: float) -> list[float]:
    """Round numbers, at most six, from low to low + span: multiples of 1, 2 or 5 times a power of ten."""
    power = 10 ** np.floor(np.log10(span / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5)
    first = int(np.ceil(low / step - 1e-9))
    last = int(np.floor((low + span) / step + 1e-9))
    return [round(i * step, 12) for i in range(first, last + 1)]
