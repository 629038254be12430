"""Samples of any type to 8-bit colours: which bands, which pixels hold data, and what is black and white."""

import logging
import math
from functools import cache
from typing import Any

import numpy as np

log = logging.getLogger("stego")

WHITE_PERCENTILE = 99.9  # of the values of a deep image: what its brightest pixels but a few hot ones reach
SCALE_SAMPLE = 4_000_000  # values of a deep image, about, whose percentiles are taken
SOFT_ALPHA = (
    0.25  # share of the pixels not transparent above which half-transparent ones are another kind of band
)


def color_bands(
    count: int, wanted: tuple[int, ...], *, alpha: int | None = None, kind: str = ""
) -> list[int]:
    """The bands, from 0, that are shown as grey or as red, green and blue, of an image with `count`.

    wanted: numbers from 1, one or three; (): the first three, with a line that says so where there are more. alpha:
    the band that is none of the colours. ValueError for bands that are not there.
    """
    if wanted:
        if max(wanted) > count:
            names = ",".join(map(str, wanted))
            raise ValueError(f"it has {count} bands, and bands={names} needs {max(wanted)}; name others")
        return [band - 1 for band in wanted]
    colors = [band for band in range(count) if band != alpha]
    shown = colors[:3] if len(colors) >= 3 else colors[:1]
    if len(colors) > len(shown):
        _say_bands(count, kind, len(shown))
    return shown


@cache
def _say_bands(count: int, kind: str, shown: int) -> None:
    """Once for all images of a kind."""
    which = "the first three are taken as red, green and blue" if shown == 3 else "the first is taken as grey"
    log.warning("Images have %d bands of %s: %s; --set bands=4,3,2 in fit takes others.", count, kind, which)


def holds_data(samples: np.ndarray, no_data: float | None) -> np.ndarray | None:
    """Where samples (H, W, n) hold data, a bool for each; None if all do. Not so: NaN, infinity, the value no_data."""
    checks: list[Any] = []
    if samples.dtype.kind == "f":
        checks.append(np.isfinite(samples))
    if no_data is not None and math.isfinite(no_data):
        with np.errstate(over="ignore"):
            checks.append(samples != (samples.dtype.type(no_data) if checks else no_data))
    if not checks:
        return None
    data: np.ndarray = np.logical_and.reduce(checks)
    return None if np.all(data) else data


def valid_pixels(data: np.ndarray | None) -> np.ndarray | None:
    """Which pixels (H, W) hold data: those with data in a band (as in GDAL); None if all do."""
    if data is None:
        return None
    valid: np.ndarray = np.any(data, axis=2)
    return None if valid.all() else valid


def scale_to_8_bit(samples: np.ndarray, data: np.ndarray | None = None) -> np.ndarray:
    """Deep samples (H, W, n) by the bits that their values use, 12 of 16, say: (H, W, n) uint8.

    Floats up to 1 are shares of white. Where there are negative values, the least is black and the largest white.
    data: where samples hold data, see `holds_data`; the others do not count.
    """
    black, white = value_range(samples, data)
    scaled = np.empty(samples.shape, np.uint8)
    for row, values in enumerate(samples):  # a row at a time, in little memory
        values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0) - black
        scaled[row] = (values * (255 / max(white, 1e-12))).clip(0, 255).round()
    return scaled


def value_range(samples: np.ndarray, data: np.ndarray | None) -> tuple[float, float]:
    """The value of black, and how much more white is."""
    every = math.ceil(math.sqrt(samples.size / SCALE_SAMPLE))
    sample = samples[::every, ::every].astype(np.float64)
    if data is not None:
        sample = sample[data[::every, ::every]]
        sample = sample if len(sample) else np.zeros(1)
    low, high = np.percentile(sample, [100 - WHITE_PERCENTILE, WHITE_PERCENTILE]).tolist()
    if low < 0:
        return low, high - low
    floor = 1e-12 if samples.dtype.kind == "f" else 255
    white = max(2.0 ** math.frexp(high)[1] - (high >= 1), floor)  # 1, 3, 7, ... or 1/2, 1/4, ...
    if white not in (1, 255, 65535):
        _warn_scaled(white)
    return 0.0, white


@cache
def _warn_scaled(white: float) -> None:
    """Once for all images."""
    log.warning("Images with values up to %g are scaled to that, not to the range of their type.", white)


def is_alpha(alpha: np.ndarray) -> bool:
    """Whether a band (H, W) uint8 that is called alpha can be: nearly all that is not transparent is opaque."""
    shown = np.count_nonzero(alpha)
    if shown - np.count_nonzero(alpha == 255) <= SOFT_ALPHA * shown:
        return True
    _say_no_alpha()
    return False


@cache
def _say_no_alpha() -> None:
    """Once for all images."""
    log.warning(
        "The band called alpha is neither 0 nor 255 in most pixels: it is taken as another band, near infrared say, "
        "and left out; --set bands=4,3,2 in fit takes other bands."
    )
