"""Teach the bundled backbone `tiny` what a transformer sees: from images and a teacher's weights to a weight file.

    python tools/distill.py IMAGES... --detail detail.pt --minutes 20 -o tiny.pt

The detail branch is what tools/pretrain.py wrote, and stays as it is. The meaning branch learns a teacher's features of
square crops: those of focus_vits14, DINOv2's tokens after block 10, less their mean, of unit length, on their first 128
principal directions. The loss is 1 - cosine to the teacher's vector, and twice the squared difference of the cosines
between positions, within an image and between images of a batch: the correspondences that STEGO is fitted to.

The teacher looks at a crop once; the crop is kept and seen about REUSE times, mirrored and recoloured, before a new one
takes its place. The learning rate falls with the clock, so the run ends when it is told to on any machine; an
interrupted run goes on from its checkpoint. Images and crops lie in memory, on the GPU where there is one. No label is
read.
"""

import math
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pretrain import find_images, say, standardised, write

from stego_parts.backbones import load_backbone
from stego_parts.meaning import Attention, Bottleneck, Conv, Meaning
from stego_parts.tiny import Tiny

TEACHER = "focus_vits14"
TEACHER_PATCH = 14  # pixels
STUDENT_PATCH = 8
DIMS = 128  # principal directions: they hold 83 % of the energy
KEPT_SIDE = 256  # pixels: images are kept as squares of this side
BATCHES = {20: 512, 28: 256, 36: 160}  # positions to a side of a crop: crops in a batch
BLOWN_UP = 1.25  # times: the most that a crop is enlarged for the student
POOL = 16_384  # crops kept of each size
FIRST = 1024  # of them before the training begins
REUSE = 8  # times that a crop is seen
PCA_CROPS = 1024  # from which the teacher's mean and principal directions are measured
HELD = 256  # images that are only looked at to report, and in the end to measure the principal directions of the whole
TEACHER_BATCH = 64
LEARNING_RATE = 2e-3  # falls to zero on a cosine
WARM_UP = 500  # steps
WEIGHT_DECAY = 0.02
LONGEST_GRADIENT = 3.0
POINTS = 48  # positions of each image between which cosines are compared
RELATIONS = 2.0  # weight of the squared difference of cosines
AVERAGED = 0.999  # weight of the past in the averaged network, the one that is written
BRANCH_SCALE = 0.2  # of what a block adds to its input, at the start: near identity trains steadily
LIGHT = 0.3  # largest change of brightness, contrast and saturation
TINT = 0.08
GREY = 0.08  # share of crops turned grey
SAVE_EVERY = 60  # seconds


# ---- images ----------------------------------------------------------------------------------------------------


def load_squares(paths: list[Path]) -> Tensor:
    """Both ends of each image as squares (N, 3, KEPT_SIDE, KEPT_SIDE) uint8; one of an image that is nearly square."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(squares, paths)
        return torch.from_numpy(np.concatenate(list(found))).permute(0, 3, 1, 2)


def squares(path: Path) -> np.ndarray:
    """(1 or 2, KEPT_SIDE, KEPT_SIDE, 3) uint8."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = KEPT_SIDE / min(image.size)
    width, height = (max(KEPT_SIDE, round(side * scale)) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    ends = [pixels[:KEPT_SIDE, :KEPT_SIDE], pixels[-KEPT_SIDE:, -KEPT_SIDE:]]
    return np.stack(ends if max(width, height) > 1.1 * KEPT_SIDE else ends[:1])


def draw_crops(images: Tensor, grid: int) -> Tensor:
    """A random square of each image (B, 3, KEPT_SIDE, KEPT_SIDE) uint8, some mirrored: (B, 3, side, side) in 0..1.

    side: that of `grid` patches of the teacher.
    """
    n = len(images)
    device = images.device
    least = min(1, grid * STUDENT_PATCH / BLOWN_UP / KEPT_SIDE)
    half = torch.empty(n, device=device).uniform_(least, 1)  # side of a crop to that of its image
    middle = (1 - half)[:, None] * (2 * torch.rand(n, 2, device=device) - 1)  # -1..1 across the image
    sign = torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)  # -1: mirrored
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = half * sign
    theta[:, 1, 1] = half
    theta[:, :, 2] = middle
    side = grid * TEACHER_PATCH
    places = F.affine_grid(theta, [n, 3, side, side], align_corners=False)
    return F.grid_sample(images.float() / 255, places, align_corners=False, padding_mode="border")


def for_student(crops: Tensor, grid: int) -> Tensor:
    """The same crops with STUDENT_PATCH pixels a position."""
    side = grid * STUDENT_PATCH
    return F.interpolate(crops, (side, side), mode="bilinear", antialias=True, align_corners=False)


def recoloured(x: Tensor) -> Tensor:
    """Random brightness, tint, contrast and saturation of RGB in 0..1 (B, 3, H, W); some crops grey."""
    one = (len(x), 1, 1, 1)
    x = x * _around_one(x, LIGHT, one) * _around_one(x, TINT, (len(x), 3, 1, 1))
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, _around_one(x, LIGHT, one))
    coloured = torch.rand(one, device=x.device) >= GREY
    return torch.lerp(x.mean(1, keepdim=True), x, _around_one(x, LIGHT, one) * coloured).clamp(0, 1)


def _around_one(like: Tensor, spread: float, shape: tuple[int, ...]) -> Tensor:
    return 1 + spread * (2 * torch.rand(shape, device=like.device) - 1)


# ---- the teacher -----------------------------------------------------------------------------------------------


class Teacher:
    """(B, 3, H, W) in 0..1 -> unit vectors (B, DIMS, H / 14, W / 14)."""

    def __init__(self, network: Any, images: Tensor) -> None:
        """network: TEACHER; images: squares, from some of which mean and principal directions are measured."""
        self.network = network
        grid = min(BATCHES)
        chosen = torch.randint(len(images), (PCA_CROPS,), device=images.device)
        rows = [
            self.tokens(draw_crops(images[part], grid)).flatten(2).mT for part in chosen.split(TEACHER_BATCH)
        ]
        tokens = torch.cat(rows)  # (PCA_CROPS, grid * grid, C)
        self.mean = tokens.mean((0, 1))
        unit = F.normalize(tokens - self.mean, dim=2).flatten(0, 1)
        _, directions = torch.linalg.eigh(unit.T @ unit)
        self.basis = directions.flip(1)[:, :DIMS].contiguous()  # (C, DIMS)

    @torch.no_grad()
    def tokens(self, x: Tensor) -> Tensor:
        """(B, C, H / 14, W / 14)."""
        with half_precision(x.device):
            return self.network(standardised(x)).float()

    def __call__(self, x: Tensor) -> Tensor:
        unit = F.normalize(self.tokens(x) - self.mean[:, None, None], dim=1)
        return F.normalize(torch.einsum("bchw,cd->bdhw", unit, self.basis), dim=1)


class Pool:
    """Crops of one size and what the teacher sees in them; the oldest give way to new ones."""

    def __init__(self, grid: int, device: torch.device) -> None:
        side = grid * STUDENT_PATCH
        self.grid = grid
        self.crops = torch.zeros(POOL, 3, side, side, dtype=torch.uint8, device=device)
        self.seen = torch.zeros(POOL, DIMS, grid, grid, dtype=torch.float16, device=device)
        self.added = 0

    def add(self, images: Tensor, teacher: Teacher) -> None:
        crops = draw_crops(images, self.grid)
        places = (torch.arange(len(crops), device=crops.device) + self.added) % POOL
        self.crops[places] = (for_student(crops, self.grid) * 255).round().byte()
        self.seen[places] = teacher(crops).half()
        self.added += len(crops)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Random crops (B, 3, side, side) in 0..1 and unit vectors (B, DIMS, grid, grid)."""
        chosen = torch.randint(min(self.added, POOL), (count,), device=self.crops.device)
        return self.crops[chosen].float() / 255, F.normalize(self.seen[chosen].float(), dim=1)


# ---- the student -----------------------------------------------------------------------------------------------


def half_precision(device: torch.device) -> Any:
    """bfloat16 where it is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def with_norms(network: Meaning) -> Meaning:
    """Batch normalisation after every Conv, for training."""
    for part in network.modules():
        if isinstance(part, Conv):
            part.norm = nn.BatchNorm2d(part.conv.out_channels)
    for part in network.modules():
        if isinstance(part, Bottleneck):
            nn.init.constant_(part.widen.norm.weight, BRANCH_SCALE)
        if isinstance(part, Attention):
            part.out.weight.data.mul_(BRANCH_SCALE)
            part.down.weight.data.mul_(BRANCH_SCALE)
    return network.to(memory_format=torch.channels_last)


def folded(network: Meaning) -> Meaning:
    """The same function without batch normalisation."""
    network.eval()
    for part in network.modules():
        if isinstance(part, Conv):
            part.conv = fuse_conv_bn_eval(part.conv, part.norm)
            part.norm = nn.Identity()
    return network


def loss_of(found: Tensor, seen: Tensor) -> Tensor:
    """The loss of features (B, DIMS, h, w) beside the teacher's unit vectors of the same shape."""
    found = F.normalize(found.float(), dim=1)
    vectors = 1 - (found * seen).sum(1).mean()
    count = len(found)
    points = torch.randperm(seen[0, 0].numel(), device=seen.device)[:POINTS]
    error = (_cosines(found, points) - _cosines(seen, points)).square()
    by_image = error.view(count, len(points), count, len(points)).mean((1, 3))  # (B, B)
    within = by_image.diagonal().mean()
    between = (by_image.sum() - by_image.diagonal().sum()) / (count * (count - 1))
    return vectors + RELATIONS * (within + between)


def _cosines(maps: Tensor, points: Tensor) -> Tensor:
    rows = maps.flatten(2)[:, :, points].mT.flatten(0, 1)  # (B * POINTS, DIMS)
    return rows @ rows.T


class Training:
    """Network, its average over the last steps, optimiser and clock: everything that a checkpoint holds."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.network = with_norms(Meaning(DIMS)).to(device)
        self.average = with_norms(Meaning(DIMS)).to(device).eval()
        self.average.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY
        )
        self.seconds = seconds
        self.spent = 0.0
        self.step = 0

    @property
    def ended(self) -> bool:
        return self.spent >= self.seconds

    def advance(self, crops: Tensor, seen: Tensor) -> None:
        """One step."""
        fall = (1 + math.cos(math.pi * min(1, self.spent / self.seconds))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (self.step + 1) / WARM_UP) * fall
        self.network.train()
        with half_precision(crops.device):
            found = self.network(standardised(recoloured(crops)))
        loss = loss_of(found, seen)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), LONGEST_GRADIENT)
        self.optimizer.step()
        self.follow()
        self.step += 1

    @torch.no_grad()
    def follow(self) -> None:
        """Move the averaged network towards this one; sooner at the start."""
        past = min(AVERAGED, (self.step + 1) / (self.step + 10))
        for average, now in zip(self.average.state_dict().values(), self.network.state_dict().values()):
            if average.is_floating_point():
                average.lerp_(now, 1 - past)

    def save(self, path: Path) -> None:
        state = {name: part.state_dict() for name, part in self._parts()}
        write(path, state | {"spent": self.spent, "step": self.step})

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in self._parts():
            part.load_state_dict(state[name])
        self.spent = state["spent"]
        self.step = state["step"]

    def _parts(self) -> Iterator[tuple[str, Any]]:
        for name in ("network", "average", "optimizer"):
            yield name, getattr(self, name)


def distill(images: Tensor, teacher: Teacher, checkpoint: Path, *, seconds: float) -> Meaning:
    """The trained branch. The learning rate is zero after so many seconds of training, earlier runs' included."""
    run = Training(seconds, images.device)
    if checkpoint.exists():
        run.load(checkpoint)
        say(f"going on from {checkpoint} at step {run.step}")
    held = images[:HELD]
    rest = images[HELD:] if len(images) > 2 * HELD else images
    pools = {grid: Pool(grid, images.device) for grid in BATCHES}
    for pool in pools.values():
        while pool.added < min(FIRST, POOL):
            pool.add(some(rest, TEACHER_BATCH), teacher)
    exam = draw_crops(held, min(BATCHES)).split(TEACHER_BATCH)
    clock = time.monotonic()
    saved = 0.0
    while not run.ended:
        grid = random.choice(list(BATCHES))
        pools[grid].add(some(rest, max(1, BATCHES[grid] // REUSE)), teacher)
        run.advance(*pools[grid].draw(BATCHES[grid]))
        run.spent += time.monotonic() - clock
        clock = time.monotonic()
        if clock - saved > SAVE_EVERY or run.ended:
            saved = clock
            run.save(checkpoint)
            cosine = agreement(run.average, teacher, exam)
            say(f"{run.spent:.0f} of {seconds:.0f} s, step {run.step}, cosine {cosine:.3f}")
    return folded(run.average)


def some(images: Tensor, count: int) -> Tensor:
    return images[torch.randint(len(images), (count,), device=images.device)]


@torch.no_grad()
def agreement(network: Meaning, teacher: Teacher, exam: tuple[Tensor, ...]) -> float:
    """Mean cosine of a student to the teacher on crops in 0..1."""
    cosines = []
    for crops in exam:
        seen = teacher(crops)
        found = network(standardised(for_student(crops, seen.shape[2])))
        cosines.append(F.cosine_similarity(found, seen).mean())
    return float(torch.stack(cosines).mean())


@torch.no_grad()
def joined(meaning: Meaning, detail: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """The weights of the whole backbone, in float16. detail: what tools/pretrain.py wrote; images: some squares."""
    network = Tiny().to(images.device)
    network.detail.load_state_dict(detail)
    network.meaning.load_state_dict(meaning.state_dict())
    moments = torch.zeros(network.join.in_channels, network.join.in_channels, device=images.device)
    for part in images.split(TEACHER_BATCH):
        both = network.branches(standardised(part.float() / 255))  # (B, C, h, w)
        rows = both.permute(0, 2, 3, 1).flatten(0, 2)  # (positions, C)
        moments += rows.T @ rows
    _, directions = torch.linalg.eigh(moments)  # the last vary most
    network.join.weight.copy_(directions.flip(1).T[: network.channels, :, None, None])
    return {name: value.cpu().half().contiguous() for name, value in network.state_dict().items()}


@click.command()
@click.argument("places", metavar="IMAGES...", nargs=-1, required=True)
@click.option("--detail", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--weights", help="File of the teacher's weights, in place of the torch cache.")
@click.option("--skip", multiple=True, help="Leave out images whose name holds this.")
@click.option("--minutes", default=20.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(
    places: tuple[str, ...],
    detail: Path,
    weights: str | None,
    skip: tuple[str, ...],
    minutes: float,
    seed: int,
    output: Path,
) -> None:
    """Teach tiny on all images under IMAGES."""
    torch.manual_seed(seed)
    random.seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = [path for path in find_images(places) if not any(part in path.name for part in skip)]
    random.shuffle(paths)
    images = load_squares(paths).to(device)
    say(f"{len(paths)} images, {len(images)} squares, {device}, {os.cpu_count()} cores")
    teacher = Teacher(load_backbone(TEACHER, weights=weights, device=device), images)
    network = distill(images, teacher, output.with_suffix(".train.pt"), seconds=60 * minutes)
    write(output, joined(network, torch.load(detail, weights_only=True), images[:HELD]))
    say(f"wrote {output}")


if __name__ == "__main__":
    main()
