"""Features, once: what the backbone sees of an image, and the file of its tokens that training reads (Sec. 3.1, 4)."""

import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stego_parts.backbones import BACKBONES, NAMES
from stego_parts.config import NOTICE, Config
from stego_parts.images import Window, read_picture, square
from stego_parts.running import (
    Progress,
    barrier,
    no_progress,
    or_skip,
    prefetch,
    process_count,
    rank,
    same_shape_batches,
    side_by_side,
    to_device,
)

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB 0..1: all backbones were trained so
STD = (0.229, 0.224, 0.225)
CROP_SIDE = 224  # pixels: crops the head is trained on (Sec. 4)
RESOLUTION = 320  # pixels: shorter side at which images are segmented (Sec. 4)
MAX_ASPECT = 4  # longer side : shorter side up to which the shorter side gets its full resolution
GPU_IMAGES = 8  # images of one size that a GPU sees at once
GPU_SHARE = 0.5  # of its free memory that the token cache may take; else it stays in its file
READERS = 16  # threads, at most, that decode for a GPU
TO_DO, USED, EMPTY = range(3)  # states of an image's rows in the token file; empty: without data
BILINEAR = Image.Resampling.BILINEAR

Device = str | torch.device

log = logging.getLogger("stego")


# ---- what the backbone sees ------------------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32, normalised as the backbones expect.

    In numpy, by rows: several threads read at once, in each of which torch would start threads of its own.
    """
    rgb = np.array(image, dtype=np.float32)  # (H, W, 3)
    rows = rgb.reshape(image.height, -1)  # (H, 3 * W)
    rows /= 255
    rows -= np.tile(np.array(MEAN, np.float32), image.width)
    rows /= np.tile(np.array(STD, np.float32), image.width)
    return torch.from_numpy(rgb).permute(2, 0, 1)


def dense_features(backbone: Any, x: Tensor, device: Device = "cpu", *, exact: bool = False) -> Tensor:
    """Images (B, 3, H, W) -> their features (B, C, h, w) float32, on a device.

    A published backbone runs in float16 on a GPU (cosines differ by 4e-5 on average) unless `exact`, everything else in
    full float32. Images that a GPU has no memory for at once pass through it in halves; ValueError where it has none
    for one.
    """
    half = torch.device(device).type == "cuda" and backbone.name in BACKBONES and not exact
    try:
        with full_float32(), torch.autocast("cuda", torch.float16, enabled=half):
            return backbone(to_device(x, device)).float()
    except torch.OutOfMemoryError:  # what it holds is freed when this clause ends
        if len(x) == 1:
            height, width = x.shape[2:]
            raise ValueError(
                f"The memory of {device} is too small for one image of {width} x {height} pixels with {backbone.name}; "
                "use --device cpu, or in predict a smaller --resolution."
            ) from None
    parts = [dense_features(backbone, part, device, exact=exact) for part in x.chunk(2)]
    return torch.cat(parts)


@contextmanager
def full_float32() -> Iterator[None]:
    """A GPU's convolutions in float32: by default torch lets cuDNN round what goes in to TF32, ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def input_size(
    size: tuple[int, int], patch: int, *, resolution: int = RESOLUTION, name: Any = "The image"
) -> tuple[int, int]:
    """Size (H, W) of an image -> that at which the backbone sees it: shorter side to `resolution` pixels.

    Less for extreme shapes, both multiples of the patch. Raises ValueError for an image smaller than a patch, or a
    resolution below it.
    """
    check_resolution(resolution, patch)
    H, W = size
    if min(size) < patch:
        raise ValueError(
            f"{name} is {W} x {H} pixels, smaller than one patch of the backbone ({patch} x {patch}); use a larger one."
        )
    scale = min(resolution / min(size), MAX_ASPECT * resolution / max(size))
    return patch * max(round(H * scale / patch), 1), patch * max(round(W * scale / patch), 1)


def input_image(
    image: Image.Image, patch: int, *, resolution: int = RESOLUTION, name: Any = "The image"
) -> Image.Image:
    """A picture at its `input_size`."""
    h, w = input_size((image.height, image.width), patch, resolution=resolution, name=name)
    return image.resize((w, h), BILINEAR)


class Views(NamedTuple):
    """What the backbone sees of an image.

    x: normalised, (1 or 5, 3, H, W); valid: which positions hold data, (1 or 5, h, w) bool; None: all do.
    """

    x: Tensor
    valid: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return self.x.shape


def image_views(path: Any, views: str, patch: int, bands: tuple[int, ...] = ()) -> Views:
    """What the backbone sees of an image. ValueError for one without data, or smaller than a patch."""
    picture = read_picture(path, bands=bands)
    pictures = _cut_up(picture.image, views, patch, path)
    x = torch.stack([to_tensor(each) for each in pictures])
    if picture.valid is None:
        return Views(x, None)
    if not isinstance(path, Window) and not picture.valid.any():
        raise ValueError(f"{path} holds no data: all of it is transparent or has the value of no data.")
    shares = _cut_up(Image.fromarray(picture.valid.astype(np.uint8) * 255), views, patch, path)
    return Views(x, torch.stack([_positions_with_data(each, patch) for each in shares]))


def _cut_up(image: Image.Image, views: str, patch: int, name: Any) -> list[Image.Image]:
    """The pictures that the backbone sees of one."""
    if views == "windows":
        return [input_image(image, patch, name=name)]
    input_size((image.height, image.width), patch, name=name)  # raises for one that is too small
    side = CROP_SIDE // patch * patch
    crops = five_crops(image) if views == "five" else [image]
    return [square(crop, side) for crop in crops]


def _positions_with_data(shares: Image.Image, patch: int) -> Tensor:
    """Positions (h, w) bool that hold data in half of their pixels; shares: a grey picture, 255 where there is data."""
    size = (shares.width // patch, shares.height // patch)
    return torch.from_numpy(np.asarray(shares.resize(size, Image.Resampling.BOX)) >= 128)


def five_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of the four corners and the centre, each half as wide and half as high."""
    w = max(width // 2, 1)
    h = max(height // 2, 1)
    right = width - w
    bottom = height - h
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)]
    return [(x, y, x + w, y + h) for x, y in corners]


def five_crops(image: Image.Image) -> list[Image.Image]:
    """Four corners and the centre, each half as high and half as wide (Sec. 4, five-crop)."""
    return [image.crop(box) for box in five_boxes(*image.size)]


def five_windows(maps: Tensor) -> Tensor:
    """Four corners and the centre of a map, each half as high and wide: (1, C, h, w) -> (5, C, h', w')."""
    h, w = maps.shape[2:]
    return torch.cat([maps[:, :, top:bottom, left:right] for left, top, right, bottom in five_boxes(w, h)])


# ---- memory ----------------------------------------------------------------------------------------------------


def check_resolution(resolution: int, patch: int) -> None:
    """ValueError for a resolution below a patch."""
    if resolution < patch:
        raise ValueError(f"Got resolution {resolution}; it is the shorter side in pixels, at least {patch}.")


def check_memory(network: Any, resolution: int, *, device: Device = "cpu") -> None:
    """ValueError for a resolution at which a square image and its mirror image need more memory than there is."""
    check_resolution(resolution, network.patch)
    needed = 2 * pass_bytes(network)  # bytes at resolution 1
    room = available_memory(device)
    if network.name in NAMES and needed * resolution**2 > room:
        most = int(math.sqrt(room / needed)) // network.patch * network.patch
        raise ValueError(
            f"Resolution {resolution} needs about {needed * resolution**2 / 1e9:.1f} GB with {network.name}, "
            f"{room / 1e9:.1f} GB are available; at most {most} fits, or --tile for parts of the image."
        )


def pass_bytes(network: Any) -> float:
    """Bytes of memory for each pixel of an image while it passes through a published backbone.

    Measured at 320 to 2560 pixels, float32: for each feature value 84 in a transformer, whose widest layer has four
    times its channels, and 66 in tiny; in a ResNet 24 to 31, and 250 a pixel in its early layers.
    """
    values = network.channels / network.patch**2  # feature values a pixel
    spec = BACKBONES.get(network.name)
    if spec and not spec.heads:
        return max(280, 24 * values)
    return 85 * values


def available_memory(device: Device = "cpu") -> float:
    """Bytes that nobody uses, on a GPU or here; infinite where the system does not tell."""
    if torch.device(device).type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, free
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        known = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        known = None
    return int(known[1]) * 1024 if known else math.inf


# ---- the token cache -------------------------------------------------------------------------------------------


class TokenCache:
    """The backbone's tokens of every crop, in a mapped file: one without a name, or `path`, which may be half full.

    Each image has its own rows, by its number, so that several processes fill one file side by side, and an interrupted
    pass goes on where it was. tokens: (rows, P, C) float16, P positions of each crop; means: unit rows (n, C), their
    averaged features; images: (n,) int64, the image each crop is of. After `finalize` the crops that are there are
    numbered.
    """

    def __init__(
        self, images: int, crops: int, positions: int, channels: int, *, path: Path | None = None
    ) -> None:
        rows = images * crops
        size = rows * ((4 + positions * 2) * channels + 1)  # bytes: of float32, of float16, one of its state
        known = path is not None and path.exists() and path.stat().st_size == size
        # one without a name leaves nothing to clean up
        file = open(path, "r+b" if known else "w+b") if path else tempfile.TemporaryFile(prefix="stego-")
        if not known:
            self._reserve(file, size, path)
        means = np.memmap(file, np.float32, "r+", shape=(rows, channels))
        tokens = np.memmap(file, np.float16, "r+", offset=means.nbytes, shape=(rows, positions, channels))
        state = np.memmap(file, np.uint8, "r+", offset=means.nbytes + tokens.nbytes, shape=(images, crops))
        self.means = torch.from_numpy(means)
        self.tokens = torch.from_numpy(tokens)
        self.state = torch.from_numpy(state)
        self.crops_each = crops
        self.device = torch.device("cpu")
        self.rows = torch.empty(0, dtype=torch.int64)  # of each crop

    @staticmethod
    def _reserve(file: Any, size: int, path: Path | None) -> None:
        """Take the room on the disk now: a full one shows here, not as a crash later."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        except OSError as error:
            place = path.parent if path else tempfile.gettempdir()
            raise ValueError(
                f"No room for {size / 1e6:.0f} MB of features in {place} ({error.strerror}); "
                "use --set cache_size=GB, or work on a larger disk."
            ) from error

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> Tensor:
        """(n,) int64: the number of the image that each crop is of."""
        return self.rows // self.crops_each

    @property
    def parts(self) -> Tensor:
        """(n,) int64: which of its image's crops each is."""
        return self.rows % self.crops_each

    def add(self, image: int, features: Tensor, valid: Tensor | None = None) -> None:
        """Keep the features (crops, C, h, w) of an image.

        All positions of each crop, or random ones where P is not h * w; which ones depends on the image's number alone.
        valid: (crops, h, w) bool, positions that hold data; others come in place of those that do not, and a crop
        without any is left out. Raises ValueError for features that float16 cannot hold.
        """
        tokens = features.flatten(2).transpose(1, 2)  # (crops, h * w, C)
        means = tokens.mean(1)  # (crops, C)
        half = tokens.half()  # before positions are chosen: half the bytes to move
        state = torch.full((self.crops_each,), USED, dtype=torch.uint8)
        if valid is not None:
            weight = valid.flatten(1).to(tokens)[..., None]  # (crops, h * w, 1)
            means = (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
            state[~valid.flatten(1).any(1)] = EMPTY
            half = _with_data(half, valid.flatten(1), seed=image)
        rows = slice(image * self.crops_each, (image + 1) * self.crops_each)
        self.means[rows] = F.normalize(means, dim=1).cpu()
        if half.shape[1] != self.tokens.shape[1]:
            half = self._some_positions(half, seed=image)
        half = half.cpu()  # (crops, P, C)
        self.tokens[rows] = half
        extremes = torch.stack(torch.aminmax(half))  # NaN where there is one
        if not torch.isfinite(extremes).all():
            raise ValueError(
                f"The backbone's features reach {float(tokens.abs().max()):.3g}; they are kept in float16, which holds "
                "65504 at most: have the backbone return smaller values, such as features of unit length."
            )
        self.state[image] = state  # last: whoever goes on from here finds whole rows

    def _some_positions(self, tokens: Tensor, *, seed: int) -> Tensor:
        """Tokens (crops, h * w, C) -> those at P random positions of each crop (crops, P, C), repeated if too few."""
        room = self.tokens.shape[1]
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(tokens.shape[:2], generator=generator).argsort(1)  # (crops, h * w)
        times = math.ceil(room / tokens.shape[1])
        kept = order.repeat(1, times)[:, :room].to(tokens.device)  # (crops, P)
        first = torch.arange(len(tokens), device=kept.device) * tokens.shape[1]  # of each crop's tokens
        numbers = (first[:, None] + kept).flatten()  # (crops * P,)
        chosen = tokens.flatten(0, 1).index_select(0, numbers)  # (crops * P, C)
        return chosen.unflatten(0, kept.shape)

    def finalize(self, device: Device = "cpu") -> None:
        """Nothing more comes: number the crops, and put them onto a device if they fit."""
        self.rows = (self.state == USED).flatten().nonzero()[:, 0]
        if len(self.rows) < len(self.means):
            self.means = self.means[self.rows]
        self.device = torch.device(device)
        room = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        if self.tokens.nbytes < GPU_SHARE * room:
            self.tokens = self.tokens.to(self.device)

    def sample(self, crops: Tensor, count: int) -> Tensor:
        """Tokens at `count` random positions of each crop: (B,) int64 -> (B, count, C) float32."""
        positions = self.tokens.shape[1]
        drawn = torch.randint(positions, (len(crops), count))
        rows = (self.rows[crops, None] * positions + drawn).flatten()  # (B * count,)
        tokens = self.tokens.flatten(0, 1).index_select(0, to_device(rows, self.tokens.device))
        return to_device(tokens, self.device).unflatten(0, drawn.shape).float()


def _with_data(tokens: Tensor, valid: Tensor, *, seed: int) -> Tensor:
    """Tokens (crops, n, C) with random ones that hold data in place of those that do not; valid: (crops, n) bool.

    A crop without any stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(valid.shape[1]).repeat(len(valid), 1)  # (crops, n)
    for crop, holds in enumerate(valid):
        known = holds.nonzero()[:, 0]
        if len(known):
            drawn = torch.randint(len(known), (int((~holds).sum()),), generator=generator)
            index[crop, ~holds] = known[drawn]
    return tokens.gather(1, index.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[2]))


def encode(
    backbone: Any,
    paths: Sequence,
    config: Config,
    *,
    device: Device = "cpu",
    progress: Progress = no_progress,
    checkpoint: Any = None,
) -> TokenCache:
    """Push every image through the backbone once, cut up as config.views says.

    Unreadable images are named in a warning and left out. Raises ValueError if none is left. checkpoint: a
    FitCheckpoint that keeps the cache; what it has is not computed again.
    """
    shape = _cache_shape(backbone, len(paths), config)
    cache = checkpoint.token_cache(shape) if checkpoint else TokenCache(*shape)
    _encode_missing(cache, backbone, paths, config, torch.device(device), progress)
    barrier()
    cache.finalize(device)
    if not len(cache):
        raise ValueError(f"None of the {len(paths)} images could be used; give at least one readable image.")
    return cache


def _cache_shape(backbone: Any, images: int, config: Config) -> tuple[int, int, int, int]:
    """(images, crops of each, positions of each crop, channels), within config.cache_size."""
    pixels = RESOLUTION // 2 if config.views == "windows" else CROP_SIDE  # side of a crop
    positions = (pixels // backbone.patch) ** 2
    crops = 1 if config.views == "whole" else 5
    room = config.cache_size * 1e9 / (images * crops * backbone.channels * 2)  # positions of two-byte values
    kept = min(positions, int(room))
    if kept < 1:
        raise ValueError(
            f"{config.cache_size} GB have no room for one position of {images * crops} crops; use a larger "
            "--set cache_size=GB."
        )
    if kept < positions and rank() == 0:
        bound = f"{config.cache_size:g} GB: {kept} random positions of {positions}"
        log.warning(f"Features are bounded to {bound} a crop.")
    return images, crops, kept, backbone.channels


def _encode_missing(
    cache: TokenCache,
    backbone: Any,
    paths: Sequence,
    config: Config,
    device: torch.device,
    progress: Progress,
) -> None:
    """Add this process's share of the images that the cache does not have yet."""
    numbers = range(rank(), len(paths), process_count())
    missing = [i for i in numbers if cache.state[i, 0] == TO_DO]
    done = len(numbers) - len(missing)
    if done:
        log.log(NOTICE, "Reusing the features of %d images.", done)

    cut = str(config.views)

    def read(i: int) -> tuple[int, Views | None]:
        return i, or_skip(image_views, paths[i], cut, backbone.patch, config.bands)

    def add(batch: list[tuple[int, Views | None]]) -> int:
        views = [each for _, each in batch]
        maps = _crop_features(backbone, views, cut, device)
        for (i, _), part, valid in zip(batch, maps, _crop_positions(views, cut)):
            cache.add(i, part, valid)
        return len(batch)

    gpu = device.type == "cuda"
    readers = min(os.cpu_count() or 1, READERS) if gpu else 1
    batches = same_shape_batches(prefetch(read, missing, workers=readers), GPU_IMAGES if gpu else 1)
    if backbone.name in NAMES:
        counts = side_by_side(add, batches, device)
    else:  # one call at a time: a user's function may keep something on the way, as with hooks
        counts = map(add, batches)
    for count in counts:
        done += count
        progress("features", done, len(numbers))


@torch.inference_mode()
def _crop_features(
    backbone: Any, images: list[Views | None], views: str, device: torch.device
) -> Iterable[Tensor]:
    """Features (crops, C, h, w) of each image (1 or 5, 3, H, W); none of unreadable ones, which come by themselves."""
    readable = [each.x for each in images if each is not None]
    if not readable:
        return []
    seen = dense_features(backbone, torch.cat(readable), device)  # (B, C, h, w)
    parts = seen.split(len(readable[0]))
    return map(five_windows, parts) if views == "windows" else parts


def _crop_positions(images: list[Views | None], views: str) -> Iterator[Tensor | None]:
    """Which positions of its crops (crops, h, w) hold data, of each image; None: all do."""
    for each in images:
        valid = None if each is None else each.valid
        if valid is not None and views == "windows":
            valid = five_windows(valid[None])[:, 0]  # (1, 1, h, w) -> (5, h', w')
        yield valid
