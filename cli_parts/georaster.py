"""Where on Earth the pixels of a GeoTIFF lie: its tags, read for areas and written into masks."""

import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from stego_parts.files import DESCRIPTION, opened
from stego_parts.images import IGNORE
from stego_parts.tiff import NO_DATA, read_tags

DOUBLE = 12  # types of TIFF tags
SHORT = 3
ASCII = 2
PIXEL_SCALE = 33550  # TIFF tags
TRANSFORMATION = 34264
GEO_KEYS = 34735
MODEL_TYPE = 1024  # two of GEO_KEYS, and a value of each
PROJECTED = 1
LINEAR_UNIT = 3076
METRE = 9001
GEO_TAGS = dict.fromkeys((PIXEL_SCALE, 33922, TRANSFORMATION, 34736), DOUBLE)  # GeoTIFF 1.1
GEO_TAGS |= {GEO_KEYS: SHORT, 34737: ASCII, NO_DATA: ASCII}  # the last one is GDAL's


def geo_tags(source: Path | BinaryIO) -> dict:
    """The GeoTIFF tags of an image file, by its path or open, that have the right type; {} of what is no TIFF file."""
    with opened(source) as file:
        tags: Any = read_tags(file)
    if tags is None:
        return {}
    return {tag: tags[tag] for tag, kind in GEO_TAGS.items() if tag in tags and tags.tagtype[tag] == kind}


def pixel_area(tags: dict) -> float | None:
    """Square metres that a pixel covers on the map of a GeoTIFF; None where its unit is another or unknown."""
    # after a head of four: key, where its value is (0: here), how many, value; ...
    entries = iter(np.ravel(tags.get(GEO_KEYS, ())).tolist()[4:])
    keys = {key: value for key, place, _, value in zip(*[entries] * 4) if place == 0}
    if keys.get(MODEL_TYPE) != PROJECTED or keys.get(LINEAR_UNIT, METRE) != METRE:
        return None
    scale = np.ravel(tags.get(PIXEL_SCALE, ()))
    matrix = np.ravel(tags.get(TRANSFORMATION, ()))
    area = 0.0
    if len(scale) >= 2:
        area = abs(float(scale[0] * scale[1]))
    elif len(matrix) == 16:
        area = abs(float(matrix[0] * matrix[5] - matrix[1] * matrix[4]))
    return area if 0 < area < math.inf else None


def mask_tags(tags: dict, note: str) -> ImageFileDirectory_v2:
    """The tags of a TIFF mask: those of its image but for the value of no data, and a note."""
    directory = ImageFileDirectory_v2()
    for tag, value in {**dict(tags), NO_DATA: str(IGNORE), DESCRIPTION: note}.items():
        directory.tagtype[tag] = GEO_TAGS.get(tag, ASCII)
        directory[tag] = value.encode("latin-1") if isinstance(value, str) else value
    return directory
