"""TIFF files as the tests need them, written by the specification (TIFF 6.0, Technical Note 3 for predictor 3)."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

RAW, LZW, DEFLATE = 1, 5, 8  # compressions
SHORT, LONG, ASCII, DOUBLE = 3, 4, 2, 12  # types of tags
NO_DATA = 42113  # GDAL's tag


def packed(content: bytes, compression: int, rows: int) -> bytes:
    """Bytes of a strip or tile; LZW is Pillow's, of a grey picture with one byte a pixel."""
    if compression == DEFLATE:
        return zlib.compress(content)
    if compression == RAW:
        return content
    file = io.BytesIO()
    Image.frombytes("L", (len(content) // rows, rows), content).save(file, "TIFF", compression="tiff_lzw")
    picture = Image.open(file)
    (start,), (size,) = picture.tag_v2[273], picture.tag_v2[279]
    return file.getvalue()[start : start + size]


def predicted(values: np.ndarray, predictor: int) -> bytes:
    """Samples (rows, columns, bands) in the file's order of bytes, as differences if the predictor says so."""
    rows, columns, bands = values.shape
    if predictor == 2:
        numbers = values.astype(values.dtype.newbyteorder("=")).view(f"u{values.itemsize}")
        before = np.concatenate([np.zeros_like(numbers[:, :1]), numbers[:, :-1]], 1)
        return (numbers - before).astype(f"{values.dtype.byteorder}u{values.itemsize}").tobytes()
    if predictor == 3:
        single = values.astype(f">f{values.itemsize}").reshape(rows, columns * bands, 1).view(np.uint8)
        planes = single.transpose(0, 2, 1).reshape(rows, -1, bands)
        before = np.concatenate([np.zeros_like(planes[:, :1]), planes[:, :-1]], 1)
        return (planes - before).tobytes()
    return values.tobytes()


def tiff_of(
    samples,
    *,
    order="<",
    apart=False,
    tile=0,
    strip=0,
    compression=RAW,
    predictor=1,
    photometric=None,
    extra=(),
    no_data=None,
    more=(),
) -> bytes:
    """A TIFF of samples (H, W, bands) of any type.

    order: of bytes, < or >; apart: one band after the other; tile: its side; strip: its rows; extra: what bands beyond
    the colours are; no_data: a text; more: other tags (tag, type, values).
    """
    samples = np.atleast_3d(samples)
    height, width, bands = samples.shape
    filed = samples.astype(samples.dtype.newbyteorder(order))
    columns = tile or width
    rows = tile or strip or height
    chunks = []
    for band in np.split(filed, bands, 2) if apart else [filed]:
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                part = band[top : top + rows, left : left + columns]
                if tile:
                    margin = ((0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0))
                    part = np.pad(part, margin, "edge")
                chunks.append(packed(predicted(part, predictor), compression, len(part)))
    if photometric is None:
        photometric = 2 if bands >= 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    tags = [(256, LONG, [width]), (257, LONG, [height]), (258, SHORT, [8 * samples.itemsize] * bands)]
    tags += [(259, SHORT, [compression]), (262, SHORT, [photometric]), (277, SHORT, [bands])]
    tags += [(284, SHORT, [2 if apart else 1]), (317, SHORT, [predictor]), (339, SHORT, [kind] * bands)]
    tags += [(322, LONG, [tile]), (323, LONG, [tile])] if tile else [(278, LONG, [rows])]
    tags += [(338, SHORT, list(extra))] if extra else []
    tags += [(NO_DATA, ASCII, no_data)] if no_data is not None else []
    places = [
        (324 if tile else 273, LONG, [0] * len(chunks)),
        (325 if tile else 279, LONG, [0] * len(chunks)),
    ]
    start = len(directory([*tags, *more, *places], order))
    offsets = np.cumsum([start, *map(len, chunks)])[:-1].tolist()
    places = [(place[0], LONG, values) for place, values in zip(places, (offsets, list(map(len, chunks))))]
    return directory([*tags, *more, *places], order) + b"".join(chunks)


def directory(tags, order: str) -> bytes:
    """The head of a file: where the directory is, its tags, and their values that are longer than four bytes."""
    entries, values = [], b""
    after = 8 + 2 + 12 * len(tags) + 4
    for tag, kind, content in sorted(tags, key=lambda each: each[0]):
        if kind == ASCII:
            data = content.encode() + b"\0"
            count = len(data)
        else:
            count = len(content)
            data = struct.pack(f"{order}{count}{ {SHORT: 'H', LONG: 'I', DOUBLE: 'd'}[kind] }", *content)
        if len(data) > 4:
            place = struct.pack(f"{order}I", after + len(values))
            values += data + bytes(len(data) % 2)
        else:
            place = data.ljust(4, b"\0")
        entries.append(struct.pack(f"{order}HHI", tag, kind, count) + place)
    magic = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return magic + struct.pack(f"{order}H", len(tags)) + b"".join(entries) + bytes(4) + values
