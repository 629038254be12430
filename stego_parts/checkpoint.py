"""How far a fit has come, on disk: what an interrupted one goes on from."""

import hashlib
import io
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows: there, two fits in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

import numpy as np
import torch
from torch import Tensor, nn

from stego_parts.config import NOTICE, Config
from stego_parts.features import USED, TokenCache
from stego_parts.files import replacing
from stego_parts.optimizers import Adam
from stego_parts.running import from_first, process_count, rank
from stego_parts.tiles import tiles_of

# Mean code similarity of unrelated images above which training collapsed; good runs: 0 to 0.1
COLLAPSED = 0.5
SCATTERED = 0.15  # the same within an image, below which it scattered; good runs: 0.4 to 0.6
SAVE_EVERY = 30  # seconds between two states of a training: what an interruption costs at most

log = logging.getLogger("stego")


class FitCheckpoint:
    """The folder of a running fit: its token cache, and how far training has come. One fit has it at a time.

    Survives the process, however that ends. Each state is written under a temporary name and renamed.
    """

    def __init__(self, folder: str | Path, paths: Sequence, backbone_sha256: str, config: Config) -> None:
        features = features_key(paths, backbone_sha256, config)
        if features != from_first(lambda: features):
            raise ValueError("The processes see other images or options than each other; give each the same.")
        # version: raised with each change of the training, as none may go on that began otherwise
        fit = {"features": features, "config": asdict(config), "version": 5}
        self.keys = {"features": features, "fit": fit, "training": fit}  # what each state depends on
        self.folder = Path(folder)
        self.cache: TokenCache | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")
        try:
            if fcntl and rank() == 0:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process
        except OSError as error:
            raise ValueError(
                f"Another fit is working in {folder}; wait for it, or choose another output."
            ) from error

    def token_cache(self, shape: tuple[int, int, int, int]) -> TokenCache:
        """The cache in this folder: with what it has of these images, or an empty one."""
        path = self.folder / "tokens"

        def prepare() -> None:
            if self.load("features") is None:
                path.unlink(missing_ok=True)
            TokenCache(*shape, path=path)
            self.save("features", {})

        from_first(prepare)
        self.cache = TokenCache(*shape, path=path)
        return self.cache

    def begin(self) -> None:
        """Go on with the fit that is here if it is this one; forget how far another has come."""
        training = self.folder / "training.pt"
        if self.load("fit") is None and training.exists():
            log.warning(
                "The interrupted fit in %s was of other images or options; starting afresh.", self.folder
            )
            training.unlink()
        self.save("fit", {})

    def load(self, name: str) -> dict | None:
        """The state saved under a name, if it is of this fit; None if there is none or a damaged one."""
        return read_state(self.folder / f"{name}.pt", self.keys[name])

    def save(self, name: str, state: dict) -> None:
        """Keep a state and the random generator's under a name."""
        state |= {"key": self.keys[name], "random": torch.get_rng_state()}
        write_state(state, self.folder / f"{name}.pt")

    def close(self) -> None:
        """Give the folder back, without files in it if there is nothing to go on from."""
        tokens = self.folder / "tokens"  # of an earlier fit, if this one never came to them
        begun = tokens.exists() if self.cache is None else bool((self.cache.state == USED).any())
        if rank() == 0 and not begun and not (self.folder / "training.pt").exists():
            remove_files(self.folder)
        self.lock.close()


def end_fit(folder: str | Path, *, keep_features: bool) -> None:
    """The model is written: forget how far its fit had come, and unless they are kept, its features too."""
    for name in ("fit.pt", "training.pt"):
        (Path(folder) / name).unlink(missing_ok=True)
    if not keep_features:
        remove_files(Path(folder))


def remove_files(folder: Path) -> None:
    """Remove what fits write into a folder, and the folder unless it has something else in it."""
    names = ("tokens", "features.pt", "fit.pt", "training.pt", "lock")
    files = [folder / name for name in names]
    files += folder.glob(".*.part")  # of `replacing`, if a process was killed
    for file in files:
        with suppress(OSError):  # not there, or still open on Windows
            file.unlink()
    with suppress(OSError):
        folder.rmdir()


def read_state(path: Path, key: dict) -> dict | None:
    """The state in a file, if it belongs to this key; None if there is none or a damaged one."""
    try:
        state = torch.load(path, weights_only=True)
        return state if state["key"] == key else None
    except Exception:  # never written, cut short, of another version: then that stage starts afresh
        return None


def write_state(state: dict, path: str | Path) -> None:
    """torch.save, whole or not at all."""
    packed = io.BytesIO()  # bytes free of the file's name,
    torch.save(state, packed)  # and a full disk is an OSError
    with replacing(path) as part:
        part.write_bytes(packed.getvalue())


def kept_features(folder: Path, paths: Sequence, model: Any) -> Path | None:
    """A folder, if a fit has left in it what the model's backbone sees of these images."""
    key = features_key(tiles_of(paths, model.config.tile), model.backbone_sha256, model.config)
    return folder if read_state(folder / "features.pt", key) else None


def features_key(paths: Sequence, backbone_sha256: str, config: Config) -> dict:
    """What cached features depend on: each image's path, size and time, the backbone, how images are cut up."""
    listed = []
    for path in paths:
        status = os.stat(path)
        listed.append((os.path.abspath(path), str(path), status.st_size, status.st_mtime_ns))
    images = hashlib.sha256("\n".join(map(repr, listed)).encode()).hexdigest()
    known = backbone_sha256 or os.urandom(16).hex()  # a callable may have changed since
    key = dict(version=6, images=images, backbone=known, stride=config.stride)
    return key | dict(views=config.views, cache_size=config.cache_size, tile=config.tile, bands=config.bands)


@dataclass
class FitRecord:
    """What a fit leaves for a report, in its own process: it is not saved.

    paths: of all images; images, parts (n,): the image of each crop, and which of its crops it is; neighbors
    (n, <= 7): its nearest neighbours; history: see `train_head`.
    """

    paths: list
    images: Tensor
    parts: Tensor
    neighbors: Tensor
    history: list[dict]


class Training:
    """Where a training stands, everything that going on with it needs: at its start, or where a checkpoint left it.

    head, optimizer: what is trained; crops: how many there are; step: the next one; order: crops that are left of this
    epoch; history: see `train_head`. Of several processes none goes on: each has its own order.
    """

    def __init__(
        self, head: nn.Module, optimizer: Adam, config: Config, crops: int, checkpoint: FitCheckpoint | None
    ) -> None:
        self.head = head
        self.optimizer = optimizer
        self.steps = config.steps or 0  # None only where no backbone was chosen
        self.checkpoint = checkpoint if process_count() == 1 else None
        self.crops = crops
        self.batch = crops_a_step(config, crops)
        self.order = torch.empty(0, dtype=torch.int64)
        self.step = 0
        self.history: list[dict] = []
        self.saved = time.monotonic()
        state = self.checkpoint.load("training") if self.checkpoint else None
        if state and state["crops"] == crops:  # more, if an image can be read that could not before
            self.restore(state)

    def restore(self, state: dict) -> None:
        """Stand where a saved state says."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order = state["order"]
        self.step = state["step"]
        self.history = state["history"]
        torch.set_rng_state(state["random"])
        log.log(NOTICE, "Going on with the training from step %d.", self.step)

    def next_crops(self) -> Tensor:
        """The crops of the next step (batch,): each once an epoch."""
        if len(self.order) < self.batch:
            self.order = torch.randperm(self.crops)
        crops = self.order[: self.batch]
        self.order = self.order[self.batch :]
        return crops

    def save(self) -> None:
        """Note in the checkpoint, now and then and at the end, how far it has come."""
        due = time.monotonic() - self.saved >= SAVE_EVERY or self.step == self.steps
        if self.checkpoint and due:
            state = dict(step=self.step, crops=self.crops, order=self.order.clone(), history=self.history)
            state |= dict(head=self.head.state_dict(), optimizer=self.optimizer.state_dict())
            self.checkpoint.save("training", state)
            self.saved = time.monotonic()


def crops_a_step(config: Config, crops: int) -> int:
    """This process's share of a batch, of at most all crops there are; ValueError if that is none."""
    share = min(config.batch_size, crops) // process_count()
    if not share:
        raise ValueError(
            f"A batch of {config.batch_size} of {crops} crops cannot be divided among {process_count()} processes; "
            "use a larger --set batch_size=N, more images or fewer processes."
        )
    return share


def training_warning(history: Sequence[dict]) -> str | None:
    """In words, if the codes have collapsed or scattered (App. A.11), with what to try; else None.

    history: what `train_head` returns; fewer than five measurements are too few to tell.
    """
    if len(history) < 5:
        return None
    rand = np.mean([entry.get("rand", np.nan) for entry in history[-5:]])
    same = np.mean([entry["self"] for entry in history[-5:]])
    if rand > COLLAPSED:
        return (
            f"The codes of unrelated images are alike (mean similarity {rand:.2f}, at best near 0): training has "
            "collapsed. Try --preset default, a larger --set b_rand=B, or more varied images."
        )
    if same < SCATTERED:
        return (
            f"The codes within an image have nothing in common (mean similarity {same:.2f}): training has "
            "scattered. Try --preset default, or a smaller --set b_self=B and b_knn=B."
        )
    return None
