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
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

log = logging.getLogger("stego")

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pnm", ".jp2"}
MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet, RGB in 0..1: what every backbone was trained with
BACKDROP = (255, 255, 255)  # transparent pixels are shown on white
IGNORE = 255  # mask value of "no segment"


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
            raise FileNotFoundError(
                f"No images in {source}; looked for {', '.join(sorted(SUFFIXES))} in it and below."
            )
        return [(path, path.relative_to(source)) for path in images]
    if source.is_file():
        return [(source, Path(source.name))]
    if source.exists():
        raise FileNotFoundError(
            f"{source} is neither a file nor a folder; give image files, folders or patterns."
        )
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
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # a large photo; twice that is an error
            with Image.open(path) as image:
                yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is too large to be opened safely ({error}); if you trust it, raise the limit with "
            "--max-megapixels."
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"Cannot read {name} as {what} (no known format).") from error
    except (
        Exception
    ) as error:  # decoders raise whatever a damaged file leads them to: TypeError, struct.error, ...
        reason = (str(error).strip() or "broken file").splitlines()[0]
        raise ValueError(f"Cannot read {name} as {what} ({reason}).") from error


def read_mat(path, key: str) -> np.ndarray:
    """The uint8 array under `key` in a MATLAB file, as Potsdam-3 comes; ValueError for anything else."""
    from scipy.io import loadmat  # here: an eighth of a second that only Potsdam needs

    try:
        found = loadmat(path).get(key)
    except (
        Exception
    ) as error:  # scipy documents no errors of its own: struct, zlib, Type-, Index-, MatReadError, ...
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
    corners = [
        (0, 0),
        (width - w, 0),
        (0, height - h),
        (width - w, height - h),
        ((width - w) // 2, (height - h) // 2),
    ]
    return [(x, y, x + w, y + h) for x, y in corners]


def square(image: Image.Image, side: int) -> Image.Image:
    """Shorter side to `side` pixels, then the centre side x side."""
    return ImageOps.fit(image, (side, side), method=Image.Resampling.BILINEAR)


# ---- the door out ----------------------------------------------------------------------------------------------


def voc_palette(count: int = 256) -> np.ndarray:
    """The Pascal VOC colours shifted by one, so that cluster 0 is not black: (count, 3) uint8; entry 255 is black."""
    index = (np.arange(count)[:, None] + 1) % 256  # (count, 1)
    bits = index >> np.arange(8) & 1  # (count, 8): bits of the index
    place = 7 - np.arange(8) // 3  # three bits a level, from the top
    return np.stack([(bits << place)[:, channel::3].sum(1) for channel in range(3)], 1).astype(np.uint8)


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; it takes the name when the block ends well and vanishes otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=path.suffix + ".part"
    )
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
    full[: min(len(palette), IGNORE)] = palette[:IGNORE]
    image.putpalette(full.tobytes())
    return image


def write_image(image: Image.Image, path):
    """Save in the format of the suffix, whole or not at all."""
    form = Image.registered_extensions().get(Path(path).suffix.lower())
    if form is None:
        raise ValueError(f"Cannot tell the format of {path} from its suffix; use .png.")
    with replacing(path) as part:
        image.save(part, format=form, **({"quality": 90} if form == "JPEG" else {}))


# ---- segments as JSON: shares and COCO -------------------------------------------------------------------------


def cluster_shares(mask: np.ndarray, labels) -> list[dict]:
    """What part of a mask (H, W) each cluster covers, 0 to 1; labels: (K,) str."""
    sizes = np.bincount(mask.ravel(), minlength=IGNORE + 1)[: len(labels)]
    return [
        {"cluster": k, "name": name, "share": round(size / mask.size, 6)}
        for k, (name, size) in enumerate(zip(labels, sizes.tolist()))
    ]


def coco_annotations(mask: np.ndarray) -> list[dict]:
    """One COCO annotation for each cluster of a mask (H, W): category_id is its number, segmentation compressed RLE."""
    found = []
    for k in np.unique(mask[mask != IGNORE]).tolist():
        segment = mask == k
        rows, columns = np.flatnonzero(segment.any(1)), np.flatnonzero(segment.any(0))
        x, y, right, bottom = (int(i) for i in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        found.append(
            {
                "category_id": k,
                "segmentation": run_lengths(segment),
                "area": int(segment.sum()),
                "bbox": [x, y, right - x, bottom - y],
                "iscrowd": 0,
            }
        )
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
            more = run != (-1 if group & 16 else 0)  # the fifth bit bears the sign
            characters.append(48 + group + 32 * more)
    return {"size": list(segment.shape), "counts": bytes(characters).decode()}
