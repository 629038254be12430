"""TIFF files whose samples Pillow reads wrong or not at all: deep colours, bands stored apart, more bands than four.

TIFF 6.0, its Technical Note 3 (the predictor of floats) and BigTIFF. Unpacking is libtiff's, through Pillow; where
samples lie, their types and their predictors are looked after here.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
NO_DATA = 42113  # tag of GDAL: the value of pixels without data, as text
UNSIGNED = 1  # SampleFormat, and the others:
KINDS = {UNSIGNED: "u", 2: "i", 3: "f", 4: "u"}  # 4: undefined
BITS = {"u": (8, 16, 32, 64), "i": (8, 16, 32, 64), "f": (16, 32, 64)}
RAW = 1  # compression: none
BYTEWISE = {
    5,
    8,
    32773,
    32946,
    34925,
    50000,
}  # LZW, deflate, PackBits, deflate, LZMA, Zstandard: strings of bytes
WHITE_IS_ZERO = 0  # photometric interpretations
BLACK_IS_ZERO = 1
RGB = 2
ALPHA = (1, 2)  # ExtraSamples: associated and unassociated alpha
DIFFERENCES = 2  # predictors
FLOAT_BYTES = 3


class Chunk(NamedTuple):
    """A strip or tile: where its bytes lie in the file, where its samples in the picture, and their shape.

    band: the one whose samples it holds; None: all of each pixel.
    """

    offset: int
    size: int
    top: int
    left: int
    rows: int
    columns: int
    band: int | None


@dataclass
class Tiff:
    """The first picture of a TIFF file: its tags, and how its samples lie. dtype: in the file's order of bytes."""

    tags: ImageFileDirectory_v2
    height: int
    width: int
    bands: int
    dtype: np.dtype

    def value(self, tag: int, default: int) -> int:
        """The first value of a tag."""
        return int(np.ravel(self.tags.get(tag, default))[0])

    @property
    def apart(self) -> bool:
        """Whether the bands are stored one after the other."""
        return self.value(284, 1) == 2 and self.bands > 1

    @property
    def photometric(self) -> int:
        return self.value(262, WHITE_IS_ZERO)

    @property
    def compression(self) -> int:
        return self.value(259, RAW)

    @property
    def orientation(self) -> int:
        return self.value(274, 1)

    @property
    def extra(self) -> list[int]:
        """What the bands after the colours are, as the file says."""
        return np.ravel(self.tags.get(338, ())).astype(int).tolist()

    @property
    def alpha(self) -> int | None:
        """The band that the file calls alpha."""
        first = self.bands - len(self.extra)
        bands = [first + i for i, kind in enumerate(self.extra) if kind in ALPHA]
        return bands[0] if bands and bands[0] > 0 else None

    @property
    def no_data(self) -> float | None:
        """The value of pixels without data, if the file names one."""
        return no_data(self.tags)

    @property
    def is_pillows(self) -> bool:
        """Whether Pillow reads it right: 8 bits, bands side by side, the usual colours."""
        if self.dtype != np.uint8 or self.apart:
            return False
        known = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1 + (self.alpha == 1), RGB: 4}
        return self.bands <= known.get(self.photometric, self.bands)

    @property
    def is_readable(self) -> bool:
        """Whether `read` can read it."""
        colors = self.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
        return colors and self.value(266, 1) == 1 and self.compression in {RAW, *BYTEWISE}

    def read(self, file: BinaryIO, bands: list[int]) -> np.ndarray:
        """The samples (H, W, bands) of these bands, from 0, as this machine orders bytes. ValueError if cut short."""
        kind = self.dtype.newbyteorder("=")
        empty = self.no_data if holds(kind, self.no_data) else 0  # of strips that are not in the file
        samples = np.full((self.height, self.width, len(bands)), empty, kind)
        for chunk in self._chunks():
            if not chunk.size or chunk.band not in (None, *bands):
                continue
            values = self._chunk_values(file, chunk)[: self.height - chunk.top, : self.width - chunk.left]
            rows = slice(chunk.top, chunk.top + values.shape[0])
            columns = slice(chunk.left, chunk.left + values.shape[1])
            for i, band in enumerate(bands):
                if chunk.band in (None, band):
                    samples[rows, columns, i] = values[..., band if chunk.band is None else 0]
        return samples

    def _chunks(self) -> Iterator[Chunk]:
        """The strips or tiles, from left to right, top to bottom; of one band after the other where they are apart."""
        tiled = 322 in self.tags
        columns = self.value(322, self.width) if tiled else self.width
        rows = self.value(323, self.height) if tiled else min(self.value(278, self.height), self.height)
        offsets = np.ravel(self.tags[324 if tiled else 273]).tolist()
        sizes = np.ravel(self.tags[325 if tiled else 279]).tolist()
        tops = range(0, self.height, rows)
        lefts = range(0, self.width, columns)
        bands = range(self.bands) if self.apart else [None]
        if not len(offsets) == len(sizes) == len(bands) * len(tops) * len(lefts):
            raise ValueError("its strips do not add up to a picture")
        places = ((band, top, left) for band in bands for top in tops for left in lefts)
        for (band, top, left), offset, size in zip(places, offsets, sizes):
            tall = rows if tiled else min(rows, self.height - top)
            yield Chunk(offset, size, top, left, tall, columns, band)

    def _chunk_values(self, file: BinaryIO, chunk: Chunk) -> np.ndarray:
        """The samples (rows, columns, bands) of a strip or tile."""
        bands = 1 if chunk.band is not None else self.bands
        shape = (chunk.rows, chunk.columns, bands)
        row_bytes = chunk.columns * bands * self.dtype.itemsize
        file.seek(chunk.offset)
        packed = file.read(chunk.size)
        if len(packed) < chunk.size:
            raise ValueError("it is cut short")
        if self.compression == RAW:
            return np.frombuffer(packed, self.dtype, chunk.rows * chunk.columns * bands).reshape(shape)
        content = unpacked(packed, self.compression, row_bytes, chunk.rows)  # (rows, bytes) uint8
        predictor = self.value(317, 1)
        if predictor == FLOAT_BYTES:
            return from_float_bytes(content, self.dtype, bands).reshape(shape)
        values = content.view(self.dtype).reshape(shape)
        return from_differences(values) if predictor == DIFFERENCES else values


def read_tiff(file: BinaryIO) -> Tiff | None:
    """The first picture in a binary file; None if it is no TIFF file, or one of packed bits, for Pillow."""
    tags = read_tags(file)
    if tags is None or 256 not in tags or 257 not in tags:
        return None
    bits = set(np.ravel(tags.get(258, 1)).tolist())
    kinds = {KINDS.get(kind) for kind in np.ravel(tags.get(339, UNSIGNED)).tolist()}
    bands = int(np.ravel(tags.get(277, 1))[0])
    if len(bits) != 1 or len(kinds) != 1 or bands < 1:
        return None
    size = bits.pop()
    kind = kinds.pop()
    if size not in BITS.get(kind or "", ()):
        return None
    dtype = np.dtype(f"{'<' if tags.prefix == b'II' else '>'}{kind}{size // 8}")
    return Tiff(tags, int(tags[257]), int(tags[256]), bands, dtype)


def read_tags(file: BinaryIO) -> ImageFileDirectory_v2 | None:
    """The tags of the first picture in a binary file; None if it is no TIFF file."""
    file.seek(0)
    head = file.read(8)
    if head[:4] not in MAGIC:
        return None
    if b"+" in head[:4]:
        head += file.read(8)
    with warnings.catch_warnings():  # of tags that are damaged, and left out
        warnings.simplefilter("ignore")
        tags = ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
    return tags


def no_data(tags: Any) -> float | None:
    """The value of pixels without data in GDAL's tag; None if there is none, or no number."""
    try:
        return float(str(tags[NO_DATA]).strip(" \0"))
    except (KeyError, ValueError):
        return None


def holds(kind: np.dtype, value: float | None) -> bool:
    """Whether a type can hold a value; of whole numbers all but those, None never."""
    if value is None:
        return False
    if kind.kind == "f":
        return True
    limits = np.iinfo(kind)
    return value == value // 1 and limits.min <= value <= limits.max


def unpacked(packed: bytes, compression: int, row_bytes: int, rows: int) -> np.ndarray:
    """The bytes (rows, row_bytes) of a strip or tile, which libtiff unpacks as if it were a grey picture of bytes."""
    entries = {256: row_bytes, 257: rows, 258: 8, 259: compression, 262: BLACK_IS_ZERO}
    start = 8 + 2 + 12 * (len(entries) + 4) + 4  # of the strip: after the head and the directory
    entries |= {273: start, 277: 1, 278: rows, 279: len(packed)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    head = struct.pack("<4sIH", b"II*\0", 8, len(entries)) + directory + bytes(4)
    with TiffImageFile(io.BytesIO(head + packed)) as picture:
        return np.asarray(picture)


def from_differences(values: np.ndarray) -> np.ndarray:
    """Samples (rows, columns, bands) from their differences to the left neighbour (predictor 2)."""
    whole = values.astype(values.dtype.newbyteorder("=")).view(f"u{values.itemsize}")
    return whole.cumsum(1, dtype=whole.dtype).view(values.dtype.newbyteorder("="))


def from_float_bytes(content: np.ndarray, dtype: np.dtype, bands: int) -> np.ndarray:
    """Floats (rows, samples) from rows (rows, bytes) of all first bytes, all second bytes, ..., as differences.

    Predictor 3: the first byte is the highest whatever the order of the file.
    """
    rows = len(content)
    summed = content.reshape(rows, -1, bands).cumsum(1, dtype=np.uint8)  # (rows, bytes / bands, bands)
    planes = summed.reshape(rows, dtype.itemsize, -1)  # (rows, bytes of a float, samples)
    return np.ascontiguousarray(planes.transpose(0, 2, 1)).view(f">f{dtype.itemsize}")[..., 0]
