"""How work is run: progress, devices, threads that read ahead, and several processes.

Several processes (`torchrun --nproc-per-node N -m cli fit ...`) train data-parallel: every process fills its images'
rows of one token file that all of them map, trains on its own share of each batch, and gradients are averaged. What
only one can do, the first does, and the others get its result.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MEETING = timedelta(minutes=5)  # to find each other at the start; torchrun itself may have been killed
REASON = 200  # characters of torch's own errors that are shown
SIDE_BY_SIDE = 4  # images that are worked on at once: a transformer may take a gigabyte for each
LOOSE = 8  # batches, in images, that may wait for others of their shape: 64 photos of 2 MB
WAITING = timedelta(days=1)  # for each other later on: shares of the images may differ in work

Progress = Callable[[str, int, int], None]  # progress(stage, done, total)

log = logging.getLogger("stego")


# ---- progress and images that cannot be used -----------------------------------------------------------------


def no_progress(stage: str, done: int, total: int) -> None:
    """The default of every `progress`: says nothing."""


def or_skip(function: Callable, *args: Any, level: int = logging.WARNING, **options: Any) -> Any:
    """function(*args, **options); None, and a word at a level, where that is of an image that cannot be used."""
    try:
        return function(*args, **options)
    except (ValueError, FileNotFoundError) as error:
        log.log(level, "Skipped: %s", error)
        return None


# ---- devices ---------------------------------------------------------------------------------------------------


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" takes CUDA where there is one; ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"The device {device!r} is not available here; use --device cpu or leave it out."
        ) from error


def to_device(x: Tensor, device: str | torch.device) -> Tensor:
    """x on a device; to a GPU from page-locked memory, so that nobody waits while it is copied."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


# ---- threads ---------------------------------------------------------------------------------------------------


def prefetch(function: Callable, items: Iterable, *, window: int = 8, workers: int = 1) -> Iterator:
    """Results of function over items in order, computed ahead in threads: decoding while the backbone works."""
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future] = deque()
        try:
            for item in islice(items, window * workers):
                pending.append(pool.submit(function, item))
            while pending:
                yield pending.popleft().result()
                for item in islice(items, 1):
                    pending.append(pool.submit(function, item))
        finally:
            for future in pending:
                future.cancel()  # after an interruption or an error nobody wants them


def side_by_side(function: Callable, items: Iterable, device: str | torch.device = "cpu") -> Iterator:
    """Results of function over items in order: on the CPU of several at once, that share torch's threads.

    Threads that work on an image each wait for each other less than those that work on one together. On a GPU they
    come one by one.
    """
    threads = torch.get_num_threads()
    workers = min(threads, SIDE_BY_SIDE) if torch.device(device).type == "cpu" else 1
    if workers == 1:
        yield from map(function, items)
        return

    def call(item: Any) -> Any:
        torch.set_num_threads(threads // workers)  # of this thread
        return function(item)

    try:
        yield from prefetch(call, items, window=2, workers=workers)
    finally:
        torch.set_num_threads(threads)  # of those that begin later


def same_shape_batches(items: Iterable, most: int) -> Iterator[list]:
    """Pairs (name, tensor or None) in lists of at most `most` whose tensors have one shape.

    Those that lack fellows wait for them, so lists come out of order; when too many wait, the longest list goes first.
    """
    waiting: dict[Any, list] = {}
    for item in items:
        shape = getattr(item[1], "shape", None)
        batch = waiting.setdefault(shape, [])
        batch.append(item)
        if len(batch) == most:
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) >= LOOSE * most:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


# ---- processes -------------------------------------------------------------------------------------------------


@contextmanager
def process_group(device: str | torch.device = "auto") -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started; yields this one's rank and their count: 0 and 1 without torchrun.

    device: where they will work; on "cuda" each takes the GPU of its number. Raises ValueError where there is none, and
    in place of torch's error when another process has ended: nothing waits for it.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()) or dist.is_initialized():
        yield rank(), process_count()
        return
    backend = "gloo"  # torch's own choice is NCCL wherever a GPU is, also for what --device cpu keeps off it
    if str(device) in ("auto", "cuda") and torch.cuda.is_available():
        _take_gpu(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count())
        backend = "nccl"
    from torch.distributed.rendezvous import rendezvous  # missing where torch has no distributed part

    try:
        store, number, count = next(rendezvous("env://", timeout=MEETING))
        store.set_timeout(WAITING)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=WAITING)
        yield rank(), process_count()
    except RuntimeError as error:  # also dist.DistBackendError: a peer's socket was closed
        if not any(word in str(error).lower() for word in ("peer", "gloo", "nccl", "timed out")):
            raise
        reason = str(error).split("\n")[0][:REASON]
        raise ValueError(
            f"Another process of this fit has ended; start all of them again. What torch says: {reason}"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _take_gpu(number: int, count: int) -> None:
    """Work on the GPU of this number of `count`."""
    if number >= count:
        raise ValueError(
            f"Process {number} has no GPU of its own, this machine has {count}; start at most {count} processes a "
            "machine, or use --device cpu."
        )
    torch.cuda.set_device(number)


def process_count() -> int:
    """How many processes work on this fit."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def barrier() -> None:
    """Wait until every process is here."""
    if process_count() > 1:
        dist.barrier()


def from_first(function: Callable[[], Any]) -> Any:
    """function() as the first process computes it, in all of them; what it raises is raised in all."""
    if process_count() == 1:
        return function()
    outcome: list[Any] = [None]
    if rank() == 0:
        try:
            outcome = [function()]
        except Exception as error:  # the others wait for it
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def data_parallel(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over all processes, and the first one's weights."""
    return nn.parallel.DistributedDataParallel(module) if process_count() > 1 else module
