"""Several processes: torchrun --nproc-per-node N -m cli fit ...

Each has the tokens of its part of the images. All draw the same batch from the same seed, see all its tokens, train on
their part of it, and average the gradients; so all end with the same model, that of one process within rounding.
"""

import hashlib
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def several_processes():
    """Join the processes that torchrun started; yields this one's number and their count: 0 and 1 without torchrun."""
    if not (dist.is_available() and dist.is_torchelastic_launched()) or dist.is_initialized():
        yield rank(), processes()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=timedelta(days=1))  # their parts may differ in work
    yield rank(), processes()
    dist.destroy_process_group()


def processes() -> int:
    """How many processes work on this fit."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def mine(whole):
    """This process's part of things in a row: as many for each, give or take one."""
    first, end = (len(whole) * r // processes() for r in (rank(), rank() + 1))
    return whole[first:end]


class _Sum(torch.autograd.Function):
    """all_reduce, through which gradients flow to the x of every process."""

    @staticmethod
    def forward(context, x):
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(context, gradient):
        return _Sum.apply(gradient)


def summed(x: Tensor) -> Tensor:
    """The sum of x, of one shape everywhere, over all processes."""
    return x if processes() == 1 else _Sum.apply(x)


def averaged(x: Tensor) -> Tensor:
    return summed(x) / processes()


def everyones(part: Tensor) -> Tensor:
    """The parts of all processes, which are equally long, in a row."""
    return summed(torch.cat([part if r == rank() else torch.zeros_like(part) for r in range(processes())]))


def check_alike(*what):
    """ValueError if the processes are not about the same images, options and weights."""
    told, digest = [None] * processes(), hashlib.sha256(repr(what).encode()).hexdigest()
    if processes() > 1:
        dist.all_gather_object(told, digest)
    if len(set(told)) > 1:
        raise ValueError(
            "The processes see other images, options or weights than each other; give each the same "
            "command, and every machine the same files."
        )
