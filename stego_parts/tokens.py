"""Features, once: what the backbone sees of an image, and the cache of its tokens that training reads (Sec. 3.1, 4)."""

import hashlib
import io
import logging
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there, two fits in one scratch are not kept apart
    fcntl = None

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stego_parts.distributed import everyones, mine, processes, rank, summed
from stego_parts.images import five_boxes, five_crops, read_image, replacing, square, to_tensor

log = logging.getLogger("stego")

# What the backbone sees of an image: five crops, each alone (Sec. 4); all of it; all of it, then cut into five.
VIEWS = ("five", "whole", "windows")
CROP_SIDE = 224  # pixels: crops the head is trained on (Sec. 4)
RESOLUTION = 320  # pixels: shorter side at which images are segmented (Sec. 4)
CACHE_SIZE = 8.0  # GB of scratch file for the tokens of all crops
GPU_IMAGES = 8  # images of one size that a GPU sees at once
GPU_SHARE = 0.5  # of its free memory that the token cache may take; else it stays in its file
READERS = 16  # threads, at most, that decode for a GPU
SAVE_EVERY = 30  # seconds between two states of a fit: what an interruption costs at most
MAX_ASPECT = 4  # longer side : shorter side up to which the shorter side gets its full resolution
BILINEAR = Image.Resampling.BILINEAR


class TokenCache:
    """The backbone's tokens of every crop, in a file: one without a name, gone with the process, or `file`.

    tokens: (n, P, C) float16, P positions of each crop; means: (n, C) unit rows, their averaged features, in the same
    file; images: (n,) int64, the image each crop is of. The file is mapped: the system keeps in memory what it has room
    for. After `settle`, means and images are those of all processes, tokens stay where they are.
    """

    def __init__(self, crops: int, positions: int, channels: int, *, file=None):
        scratch = file or tempfile.TemporaryFile(prefix="stego-")  # without a name: nothing to clean up
        size = self.size(crops, positions, channels)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(scratch.fileno(), 0, size)  # a full disk shows now, not as a crash
        except OSError as error:
            place = os.path.dirname(file.name) if file else tempfile.gettempdir()
            raise ValueError(
                f"No room for {size / 1e9:.1f} GB of scratch in {place} ({error}); "
                "set a smaller --cache-size, or work on a larger disk."
            ) from error
        scratch.truncate(size)
        means = np.memmap(scratch, np.float32, "r+", shape=(crops, channels))
        tokens = np.memmap(scratch, np.float16, "r+", offset=means.nbytes, shape=(crops, positions, channels))
        self.means, self.tokens = torch.from_numpy(means), torch.from_numpy(tokens)
        self.images = torch.empty(crops, dtype=torch.int64)
        self.seed, self.device = torch.initial_seed(), torch.device("cpu")
        self.filled = self.crops = self.first = 0  # crops here, everywhere, before those here

    @staticmethod
    def size(crops: int, positions: int, channels: int) -> int:
        """Bytes of the file: means in float32, tokens in float16."""
        return crops * (4 + positions * 2) * channels

    def __len__(self) -> int:
        return self.crops

    def append(self, features: Tensor, *, image: int = 0):
        """Add crops' features (B, C, h, w): all positions, or random ones of each crop where P differs from h * w.

        image: the number of the image they are of; which positions are kept depends on it and on torch's seed alone.
        """
        tokens = features.flatten(2).transpose(1, 2)  # (B, h * w, C)
        rows = slice(self.filled, self.filled + len(tokens))
        self.means[rows], self.images[rows] = F.normalize(tokens.mean(1), dim=1).cpu(), image
        here, room = tokens.shape[1], self.tokens.shape[1]
        if here != room:
            generator = torch.Generator().manual_seed(self.seed + image)
            kept = torch.rand(tokens.shape[:2], generator=generator).argsort(1)
            kept = kept.repeat(1, -(-room // here))[:, :room].to(tokens.device)  # (B, P)
            tokens = tokens[torch.arange(len(tokens), device=kept.device)[:, None], kept]
        self.tokens[rows] = tokens.half().cpu()
        self.filled = self.crops = rows.stop

    def settle(self, device="cpu"):
        """Nothing more comes: number the crops of all processes in a row; sample onto a device."""
        if processes() > 1:
            filled = everyones(torch.tensor([self.filled]))
            self.first, self.crops = int(filled[: rank()].sum()), int(filled.sum())
            for name in ("means", "images"):
                own = getattr(self, name)[: self.filled]
                whole = own.new_zeros(self.crops, *own.shape[1:])
                whole[self.first : self.first + self.filled] = own
                setattr(self, name, summed(whole))
        self.device = torch.device(device)
        if (
            self.device.type == "cuda"
            and self.tokens.nbytes < GPU_SHARE * torch.cuda.mem_get_info(self.device)[0]
        ):
            self.tokens = self.tokens.to(self.device)

    def sample(self, crops: Tensor, count: int) -> Tensor:
        """Tokens at `count` random positions of each crop: (B,) int64 -> (B, count, C) float32."""
        places = self.tokens.shape[1]
        rows = (crops[:, None] - self.first) * places + torch.randint(
            places, (len(crops), count)
        )  # (B, count)
        here = (rows >= 0) & (rows < self.filled * places)  # the others are in other processes
        found = self.tokens.flatten(0, 1).index_select(
            0, moved(rows.where(here, 0).flatten(), self.tokens.device)
        )
        found = moved(found, self.device).unflatten(0, rows.shape)  # (B, count, C) float16
        if processes() > 1:
            found = summed(found * moved(here, self.device)[..., None])
        return found.float()


def moved(x: Tensor, device) -> Tensor:
    """x on a device; to a GPU from page-locked memory, so that nobody waits while it is copied."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def dense_features(backbone, x: Tensor, device="cpu") -> Tensor:
    """backbone(x) on a device, (B, C, h, w) float32; on a GPU computed in bfloat16: cosines differ by up to 0.03."""
    with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(device).type == "cuda"):
        return backbone(moved(x, device)).float()


def encode(
    backbone,
    paths,
    *,
    views="five",
    cache_size=CACHE_SIZE,
    device="cpu",
    progress=None,
    scratch: "Scratch | None" = None,
    key: dict | None = None,
) -> TokenCache:
    """Push every image through the backbone once, cut up as VIEWS says; its parts lie one after another in the cache.

    Unreadable images are named in a warning and left out. Raises ValueError if none is left. scratch: where the cache
    is kept; what is there under the same key is not computed again.
    """
    side = (RESOLUTION // 2 if views == "windows" else CROP_SIDE) // backbone.patch  # positions
    count, positions = len(paths) * (1 if views == "whole" else 5), side**2
    kept = min(positions, int(cache_size * 1e9 / (count * backbone.channels * 2)))
    if kept < 1:
        raise ValueError(
            f"A cache of {cache_size} GB holds not one position of {count} crops; set a larger --cache-size."
        )
    if kept < positions:
        log.warning(
            "The token cache is bounded to %g GB: keeping %d random positions of %d per crop.",
            cache_size,
            kept,
            positions,
        )
    numbers, gpu = mine(range(len(paths))), torch.device(device).type == "cuda"
    start, cache = _cache_in(
        scratch, key, (max(len(numbers), 1) * (count // len(paths)), kept, backbone.channels)
    )
    inputs = ahead(
        lambda number: (number, _views(paths[number], views, backbone.patch)),
        numbers[start:],
        workers=min(os.cpu_count() or 1, READERS) if gpu else 1,
    )
    done = start
    for batch in alike(inputs, GPU_IMAGES if gpu else 1):
        if batch[0][1] is not None:
            with torch.inference_mode():
                maps = dense_features(
                    backbone, torch.cat([x for _, x in batch]), device
                )  # (images x 1 or 5, C, h, w)
                for (number, _), part in zip(batch, maps.split(len(batch[0][1]))):
                    cache.append(five_windows(part) if views == "windows" else part, image=number)
        done += len(batch)
        if scratch and len(cache) and (scratch.due() or done == len(numbers)):
            scratch.save("features", key, dict(done=done, images=cache.images[: len(cache)].clone()))
        if progress:
            progress("features", done, len(numbers))
    cache.settle(device)
    if not len(cache):
        raise ValueError(f"None of the {len(paths)} images could be used; give at least one readable image.")
    return cache


def _cache_in(scratch: "Scratch | None", key: dict | None, shape) -> tuple[int, TokenCache]:
    """How many images are in the cache already, and the cache; an empty one unless the scratch has one of this key."""
    if scratch is None:
        return 0, TokenCache(*shape)
    state, path = scratch.load("features", key), scratch.folder / "tokens"
    whole = state is not None and path.exists() and path.stat().st_size == TokenCache.size(*shape)
    cache = TokenCache(*shape, file=open(path, "r+b" if whole else "w+b"))
    if not whole:
        return 0, cache
    cache.filled = cache.crops = len(state["images"])
    cache.images[: cache.filled] = state["images"]
    log.info("%d of %d images are in the scratch already.", state["done"], key["count"])
    return state["done"], cache


def _views(path, views: str, patch: int) -> Tensor | None:
    """What the backbone sees of an image, (1 or 5, 3, H, W); None if it cannot be used."""
    try:
        image = read_image(path)
        size = backbone_size(image, patch, name=path)
    except (ValueError, FileNotFoundError) as error:
        log.warning("Skipped: %s", error)
        return None
    if views == "windows":
        return to_tensor(image.resize(size, BILINEAR))[None]
    side = CROP_SIDE // patch * patch
    return torch.stack(
        [to_tensor(square(crop, side)) for crop in (five_crops(image) if views == "five" else [image])]
    )


def five_windows(maps: Tensor) -> Tensor:
    """Four corners and the centre of a map, each half as high and half as wide: (1, C, h, w) -> (5, C, h', w')."""
    h, w = maps.shape[2:]
    return torch.cat([maps[:, :, top:bottom, left:right] for left, top, right, bottom in five_boxes(w, h)])


def backbone_size(image, patch: int, *, resolution: int = RESOLUTION, name="The image") -> tuple[int, int]:
    """(width, height) at which the backbone sees an image: shorter side to `resolution`, less for extreme shapes.

    Raises ValueError for an image smaller than a patch.
    """
    if min(image.size) < patch:
        raise ValueError(
            f"{name} is {image.width} x {image.height} pixels, smaller than one patch of the backbone "
            f"({patch} x {patch}); use a larger image."
        )
    scale = min(resolution / min(image.size), MAX_ASPECT * resolution / max(image.size))
    return tuple(max(round(side * scale / patch), 1) * patch for side in image.size)


def ahead(function, items, *, window: int = 8, workers: int = 1):
    """Results of function over items in order, computed a few ahead in threads: decoding while the backbone works."""
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(function, item) for item in islice(items, window * workers)]
        while pending:
            yield pending.pop(0).result()
            pending += [pool.submit(function, item) for item in islice(items, 1)]


def alike(items, most: int):
    """Pairs (name, tensor or None) in lists of at most `most` in a row whose tensors have one shape."""
    batch = []
    for item in items:
        if batch and (
            len(batch) == most or getattr(item[1], "shape", None) != getattr(batch[0][1], "shape", None)
        ):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


class Scratch:
    """The folder of a running fit: its tokens, and how far it has come. One process has it at a time.

    Survives the process, however that ends. Each state is written under a temporary name and renamed.
    """

    def __init__(self, folder):
        self.folder, self.saved = Path(folder), time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process
        except OSError as error:
            raise ValueError(
                f"Another fit is working in {folder}; wait for it, or choose another output."
            ) from error

    def load(self, name: str, key: dict) -> dict | None:
        """The state saved under a name, if it belongs to this key; None if there is none or a damaged one."""
        try:
            state = torch.load(self.folder / f"{name}.pt", weights_only=True)
            return state if state["key"] == key else None
        except Exception:  # never written, cut short, of another version: then that stage starts afresh
            return None

    def save(self, name: str, key: dict, state: dict):
        """Keep a state and the random generator's under a name, for `load` with this key."""
        write_state(state | {"key": key, "random": torch.get_rng_state()}, self.folder / f"{name}.pt")
        self.saved = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.saved >= SAVE_EVERY

    def begin(self, key: dict, *, resume: bool):
        """Forget the training of an earlier fit, or make sure that it is the one to go on with."""
        path = self.folder / "training.pt"
        if not resume:
            if path.exists():
                log.warning(
                    "Starting afresh, though a fit was interrupted in %s; --resume would go on.", self.folder
                )
            path.unlink(missing_ok=True)
        elif path.exists() and self.load("training", key) is None:
            raise ValueError(
                f"The fit in {self.folder} was of other images or options, or one has changed since; give "
                "the same ones, or start afresh without --resume."
            )

    def close(self):
        if not any(self.folder.glob("*.pt")):
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing in it to go on from
        self.lock.close()


def write_state(state: dict, path):
    """torch.save, whole or not at all."""
    packed = io.BytesIO()  # bytes free of the file's name,
    torch.save(state, packed)  # and a full disk is an OSError
    with replacing(path) as part:
        part.write_bytes(packed.getvalue())


def features_key(paths, network, config: dict) -> dict:
    """What cached features depend on: each image's path, size and time, the backbone, how images are cut up."""
    found = ((os.path.abspath(path), os.stat(path)) for path in paths)
    found = [(name, status.st_size, status.st_mtime_ns) for name, status in found]
    images = hashlib.sha256("\n".join(map(repr, found)).encode()).hexdigest()
    known = network.sha256 or os.urandom(16).hex()  # a callable may have changed since
    return dict(
        version=2,
        images=images,
        count=len(found),
        backbone=known,
        stride=network.patch,
        views=config["views"],
        cache_size=config["cache_size"],
        seed=config["seed"],
    )
