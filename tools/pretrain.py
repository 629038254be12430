"""The recipe of `tiny_detail`, one branch of the bundled backbone, from unlabelled images to a weight file.

    python tools/pretrain.py IMAGES... -o detail.pt

The other branch, and both as `tiny`: tools/distill.py, which reads this file.

1. A dictionary of image patches by k-means (Coates, Lee & Ng 2011): a minute, no gradients.
2. A trunk over the dictionary's features, trained so that the same place seen in two augmented crops gets the same
   soft cluster (dense SwAV: Caron et al. 2020) among prototypes that all have to be used.
3. A linear head in closed form: the directions in which neighbouring positions of an image agree, most shared first
   (canonical correlation between neighbours, a spatial cousin of slow feature analysis, Wiskott & Sejnowski 2002),
   and, at less weight, the dictionary's own leading directions, for the detail that neighbours do not share.

No label is read, except by --probe, which only reports. An interrupted run goes on from its checkpoint and ends with
the same weights; another --steps then changes the rest of the schedule. On Linux the CPU may spend half its time in
page faults of short-lived tensors; this avoids them:
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=30000000000 OMP_NUM_THREADS=1 python tools/pretrain.py ...
"""

import math
import os
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stego_parts.features import MEAN, STD
from stego_parts.tiny import SIDE, Detail, Dictionary

IMAGE_SIDE = 224  # pixels: images are kept as squares of this side
CROP_SIDE = 112  # pixels: what the network sees in training, 14 x 14 positions
CROP_FROM = (64, 176)  # pixels of the kept image, smallest and largest crop side
CROP_ASPECT = 0.15  # relative spread of a crop's aspect
CONTRAST, TINT, GREY = (
    0.4,
    0.1,
    0.1,
)  # strength of the brightness, contrast and colour changes; share turned grey
PATCHES = 80_000  # patches the dictionary is learned from
WHITEN_FLOOR = 0.1  # added to the variance of a whitened direction: noise is not blown up
KMEANS_ROUNDS = 15
SAMPLE = 400  # images from which covariances are measured
POINTS = 32  # corresponding positions drawn per pair of crops
PROTOTYPES, EMBEDDING = 256, 64
TEMPERATURE, SINKHORN = 0.1, 0.05
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 50, 0.02  # the rate falls to zero on a cosine
NEIGHBOURS = ((3, 0), (0, 3), (6, 0), (0, 6), (3, 3), (3, -3))  # positions of 8 pixels: (rows, columns) apart
DETAIL = 0.3  # length of the head's second half, the dictionary's detail, to that of the first
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


# ---- images ----------------------------------------------------------------------------------------------------


def find_images(places) -> list[Path]:
    """All image files under the given files and folders, sorted."""
    paths = [
        path for place in map(Path, places) for path in ([place] if place.is_file() else place.rglob("*"))
    ]
    paths = sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(
            f"No images in {', '.join(map(str, places))}; give folders that hold {', '.join(SUFFIXES)}."
        )
    return paths


def square(path: Path, side: int, *, label: bool = False) -> Tensor:
    """Shorter side resized to `side`, centre crop: (side, side, 3) uint8, or (side, side) for a label map."""
    image = Image.open(path)
    image = image if label else image.convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.NEAREST if label else Image.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + side, top + side))))


def normalise(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 as the backbones expect it."""
    return standardised(images.permute(0, 3, 1, 2).float() / 255)


def standardised(x: Tensor) -> Tensor:
    """RGB in 0..1 (B, 3, H, W) with ImageNet's mean and deviation taken out, as the backbones expect it."""
    return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


# ---- 1. the dictionary -----------------------------------------------------------------------------------------


@torch.no_grad()
def learn_dictionary(
    images: Tensor, dictionary: Dictionary, *, whitened: bool = True, seed: int = 0
) -> Dictionary:
    """Fill a Dictionary from images (N, side, side, 3) uint8.

    whitened: its output directions have variance 1 each; otherwise those of the plain principal components.
    """
    generator = torch.Generator().manual_seed(seed)
    patches = draw_patches(images, PATCHES, generator).flatten(1)  # (n, 192)
    mean, (values, vectors) = patches.mean(0), spectrum(patches)
    dims, atoms = dictionary.atom.shape[1], len(dictionary.atom)
    whiten = (vectors / (values + WHITEN_FLOOR).sqrt())[:, :dims].T  # (dims, 192)
    white = (patches - mean) @ whiten.T
    dictionary.whiten.copy_(whiten.view_as(dictionary.whiten))
    dictionary.whiten_bias.copy_(-whiten @ mean)
    dictionary.atom.copy_(kmeans(white, atoms, generator))
    pooled = sample_features(images, dictionary.pooled)  # (n, scales * atoms)
    values, vectors = spectrum(pooled)
    project = vectors[:, : dictionary.channels]
    if whitened:
        project = project / (values[: dictionary.channels] + 1e-3 * values[0]).sqrt()
    dictionary.mean.copy_(pooled.mean(0))
    dictionary.project.copy_(project.T)
    return dictionary


def draw_patches(images: Tensor, count: int, generator: torch.Generator, each: int = 20) -> Tensor:
    """Random patches (count, 3, 8, 8), `each` to an image."""
    chosen = torch.randint(len(images), (count // each,), generator=generator).tolist()
    corners = torch.randint(images.shape[1] - SIDE, (count // each, each, 2), generator=generator).tolist()
    return normalise(
        torch.stack(
            [images[i, y : y + SIDE, x : x + SIDE] for i, places in zip(chosen, corners) for y, x in places]
        )
    )


def spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Variances, largest first, and principal directions (columns) of rows (n, d)."""
    values, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))
    return values.flip(0).clamp(min=0), vectors.flip(1)


def kmeans(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Euclidean k-means centres (k, d); an empty cluster keeps its centre."""
    centres = rows[torch.randperm(len(rows), generator=generator)[:k]].clone()
    for _ in range(KMEANS_ROUNDS):
        nearest = torch.cat(
            [(part @ centres.T - centres.square().sum(1) / 2).argmax(1) for part in rows.split(8192)]
        )
        count = torch.bincount(nearest, minlength=k)[:, None]  # (k, 1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        centres = torch.where(count > 0, sums / count.clamp(min=1), centres)
    return centres


def spread(images: Tensor, count: int) -> Tensor:
    """`count` images at even steps through all of them."""
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).long()]


@torch.no_grad()
def sample_features(images: Tensor, features, *, every: int = 3) -> Tensor:
    """Rows (n, C) of features at every third position of SAMPLE // 2 images."""
    maps = [features(normalise(part)) for part in spread(images, SAMPLE // 2).split(4)]
    return torch.cat([part.flatten(2).transpose(1, 2).flatten(0, 1)[::every] for part in maps])


# ---- 2. the trunk ----------------------------------------------------------------------------------------------


def two_crops(images: Tensor, generator: torch.Generator):
    """Two augmented crops of each image (B, side, side, 3) uint8 that mostly overlap.

    Returns a list of two (crop (B, 3, CROP_SIDE, CROP_SIDE), frame (B, 2, 2)); a frame holds the crop's half extent
    (negative: mirrored) and its centre as (x, y), in [-1, 1] of the image.
    """
    x = images.permute(0, 3, 1, 2).float() / 255
    middle = uniform(-0.6, 0.6, (len(x), 2), generator)
    views = []
    for _ in range(2):
        side = torch.exp(uniform(*map(math.log, CROP_FROM), (len(x), 1), generator)) / images.shape[1]
        aspect = torch.exp(uniform(-CROP_ASPECT / 2, CROP_ASPECT / 2, (len(x), 1), generator))
        half = torch.cat([side * aspect, side / aspect], 1).clamp(max=1)  # (B, 2)
        centre = (middle + uniform(-0.5, 0.5, (len(x), 2), generator) * half).clamp(half - 1, 1 - half)
        half[:, 0] *= torch.randint(2, (len(x),), generator=generator) * 2 - 1
        frame = torch.stack([half, centre], 1).to(x.device)  # (B, 2, 2)
        views.append((recolour(cut(x, frame), generator), frame))
    return views


def uniform(low: float, high: float, shape, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def cut(x: Tensor, frame: Tensor) -> Tensor:
    """The crops that frames (B, 2, 2) describe, resized to CROP_SIDE."""
    affine = torch.cat([torch.diag_embed(frame[:, 0]), frame[:, 1, :, None]], 2)  # (B, 2, 3)
    grid = F.affine_grid(affine, [len(x), 3, CROP_SIDE, CROP_SIDE], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def recolour(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random brightness, contrast, saturation, tint; some grey. RGB in 0..1 -> normalised."""
    one = (len(x), 1, 1, 1)
    light, contrast, colour = (
        uniform(1 - CONTRAST, 1 + CONTRAST, one, generator).to(x.device) for _ in range(3)
    )
    tint = uniform(1 - TINT, 1 + TINT, (len(x), 3, 1, 1), generator).to(x.device)
    colour = torch.where(torch.rand(one, generator=generator).to(x.device) < GREY, 0 * colour, colour)
    x = x * light * tint
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast)
    x = torch.lerp(x.mean(1, keepdim=True), x, colour)
    return standardised(x.clamp(0, 1))


def correspondences(first: Tensor, second: Tensor, generator: torch.Generator):
    """POINTS random places (B, POINTS, 2) in the first crop, the same places in the second, and whether it has them."""
    here = uniform(-1, 1, (len(first), POINTS, 2), generator).to(first.device)
    world = here * first[:, None, 0] + first[:, None, 1]
    there = (world - second[:, None, 1]) / second[:, None, 0]
    return here, there, (there.abs() < 1).all(2)


def sample_at(features: Tensor, places: Tensor) -> Tensor:
    """Features (B, C, h, w) read bilinearly at (x, y) places (B, n, 2) -> (B, n, C)."""
    return F.grid_sample(features, places[:, :, None], padding_mode="border", align_corners=False)[..., 0].mT


class Projector(nn.Module):
    """Thrown away after training: features (n, width) -> cosines with the prototypes (n, PROTOTYPES)."""

    def __init__(self, width: int):
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, EMBEDDING)
        )
        self.prototype = nn.Parameter(F.normalize(torch.randn(PROTOTYPES, EMBEDDING), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.embed(x), dim=1) @ F.normalize(self.prototype, dim=1).T


@torch.no_grad()
def balanced(cosine: Tensor, rounds: int = 3) -> Tensor:
    """Soft assignments (n, PROTOTYPES) that use all prototypes equally (Sinkhorn-Knopp)."""
    share = torch.exp((cosine.float() - cosine.max()) / SINKHORN)
    for _ in range(rounds):
        share = share / share.sum(0, keepdim=True)
        share = share / share.sum(1, keepdim=True)
    return share


def swapped_loss(cosine: Tensor) -> Tensor:
    """Each view predicts the other's balanced assignment; rows are (first views, second views) stacked."""
    a, b = cosine.float().chunk(2)
    pairs = ((balanced(a), b), (balanced(b), a))
    return sum(-(target * F.log_softmax(other / TEMPERATURE, 1)).sum(1).mean() for target, other in pairs) / 2


class Training:
    """Trunk, projector, optimiser and randomness: everything a checkpoint holds."""

    def __init__(self, tiny: Detail, *, steps: int, batch: int, seed: int):
        torch.manual_seed(seed)
        self.tiny, self.steps, self.batch, self.step = tiny, steps, batch, 0
        self.projector = Projector(tiny.trunk.norm.normalized_shape[0]).to(tiny.head.weight.device)
        self.parameters = [*tiny.trunk.parameters(), *self.projector.parameters()]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.parts = {"tiny": tiny, "projector": self.projector, "optimiser": self.optimiser}

    def advance(self, images: Tensor) -> float:
        """One step on a random batch; returns the loss."""
        rate = (
            LEARNING_RATE
            * min(1, (self.step + 1) / WARM_UP)
            * (1 + math.cos(math.pi * self.step / self.steps))
            / 2
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(images), (self.batch,), generator=self.generator)
        loss = self.loss(images[chosen.to(images.device)])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.step += 1
        return loss.item()

    def loss(self, images: Tensor) -> Tensor:
        (first, frame1), (second, frame2) = two_crops(images, self.generator)
        with torch.no_grad():
            found = self.tiny.dictionary(torch.cat([first, second]))
        with torch.autocast(found.device.type, torch.bfloat16, enabled=found.is_cuda):
            maps = self.tiny.trunk(found)
        one, two = maps.float().chunk(2)  # (B, width, h, w) each
        here, there, seen = correspondences(frame1, frame2, self.generator)
        rows = torch.cat([sample_at(one, here)[seen], sample_at(two, there)[seen]])
        return swapped_loss(self.projector(rows))

    def save(self, path: Path):
        state = {name: part.state_dict() for name, part in self.parts.items()}
        write(path, {**state, "step": self.step, "batch": self.batch, "random": self.generator.get_state()})

    def load(self, path: Path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["batch"] != self.batch:
            raise ValueError(
                f"{path} is of a run with --batch {state['batch']}, not {self.batch}; "
                "give the same, or delete it to start afresh."
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step = state["step"]
        self.generator.set_state(state["random"])


def write(path: Path, content: dict):
    """torch.save under a temporary name, then renamed: never half a file."""
    partial = path.with_name(path.name + ".part")
    torch.save(content, partial)
    os.replace(partial, path)


# ---- 3. the head -----------------------------------------------------------------------------------------------


@torch.no_grad()
def learn_head(images: Tensor, tiny: Detail):
    """Fill tiny.head: half of the channels for what neighbours share, half for the detail of the dictionary."""
    maps = torch.cat([tiny.levels(normalise(part)).float().cpu() for part in spread(images, SAMPLE).split(4)])
    mean, half = maps.mean((0, 2, 3)), tiny.channels // 2
    maps = maps - mean[:, None, None]  # (N, C, h, w)
    total = covariance(maps, maps)
    detail = torch.eye(len(total))[:, :half]  # the dictionary's leading directions
    weight = torch.cat(
        [unit_power(shared_directions(maps, total, half), total), DETAIL * unit_power(detail, total)], 1
    )  # (C, channels)
    tiny.head.weight.copy_(weight.T[:, :, None, None])
    tiny.head.bias.copy_(-mean @ weight)


def shared_directions(maps: Tensor, total: Tensor, count: int) -> Tensor:
    """Canonical directions (C, count) between neighbouring positions, each of variance r ** 2 for correlation r."""
    values, vectors = torch.linalg.eigh(total)
    whiten = vectors / (values + 0.01 * values.mean()).sqrt()  # (C, C)
    shared = sum(neighbour_covariance(maps, *step) for step in NEIGHBOURS) / len(NEIGHBOURS)
    correlation, turn = torch.linalg.eigh(whiten.T @ shared @ whiten)
    kept = correlation.argsort(descending=True)[:count]
    return whiten @ turn[:, kept] * correlation[kept].clamp(min=0)


def unit_power(directions: Tensor, total: Tensor) -> Tensor:
    """Scaled so that the projections have length 1 in the mean square."""
    return directions / torch.trace(directions.T @ total @ directions).sqrt()


def covariance(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x.transpose(0, 1).flatten(1) for x in (a, b))  # (C, N * h * w)
    return a @ b.T / a.shape[1]


def neighbour_covariance(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Symmetric covariance (C, C) of positions that lie (rows, columns) apart."""
    h, w = maps.shape[2:]
    left, right = max(0, -columns), max(0, columns)
    shared = covariance(maps[:, :, : h - rows, left : w - right], maps[:, :, rows:, right : w - left])
    return (shared + shared.T) / 2


# ---- how good is it --------------------------------------------------------------------------------------------


@torch.no_grad()
def probe(tiny: Detail, folder: Path, *, count: int = 60, side: int = 320) -> float:
    """mIoU on images/val of a ridge regression from each position's features to its class, fitted on images/train."""
    (x, y), (x_val, y_val) = (labelled_rows(tiny, folder, split, count, side) for split in ("train", "val"))
    classes = int(max(y.max(), y_val.max())) + 1
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, x_val = (torch.cat([(rows - mean) / deviation, torch.ones(len(rows), 1)], 1) for rows in (x, x_val))
    ridge = torch.linalg.solve(
        x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1]), x.T @ F.one_hot(y, classes).float()
    )
    hits = torch.bincount(y_val * classes + (x_val @ ridge).argmax(1), minlength=classes**2).view(
        classes, classes
    )
    union = hits.sum(0) + hits.sum(1) - hits.diagonal()
    return float((hits.diagonal() / union)[union > 0].mean())


def labelled_rows(tiny: Detail, folder: Path, split: str, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Features (n, C) and the label under each position's centre (n,), ignored ones left out."""
    paths = find_images([folder / "images" / split])
    paths = [paths[i] for i in np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)]
    stems = {path.stem: path for path in find_images([folder / "labels" / split])}
    device = tiny.head.weight.device
    x = torch.cat([tiny(normalise(square(path, side)[None].to(device))).float().cpu() for path in paths])
    y = (
        torch.stack([square(stems[path.stem], side, label=True)[4::8, 4::8] for path in paths])
        .long()
        .flatten()
    )
    x = x.permute(0, 2, 3, 1).flatten(0, 2)  # (n, C)
    return x[y != 255], y[y != 255]


# ---- the run ---------------------------------------------------------------------------------------------------


def say(*words):
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def pretrain(
    images: Tensor,
    output: Path,
    *,
    steps: int = 700,
    batch: int = 32,
    device: str = "cpu",
    seed: int = 0,
    log_every: int = 50,
    save_every: int = 50,
    probe_every: int = 250,
    probes=(),
    stop_at: int | None = None,
):
    """Train on images (N, side, side, 3) uint8 and write the float16 state dict of a Detail.

    The checkpoint lies beside the output as OUTPUT.ckpt; stop_at ends the run early, to be taken up again later.
    """
    torch.manual_seed(seed)
    checkpoint = output.with_name(output.name + ".ckpt")
    tiny = Detail().to(device)
    run = Training(tiny, steps=steps, batch=batch, seed=seed)
    if checkpoint.exists():
        run.load(checkpoint)
        say(f"going on from {checkpoint} at step {run.step}")
    else:
        learn_dictionary(images, tiny.dictionary.cpu(), seed=seed).to(device)
        say(f"dictionary of {len(tiny.dictionary.atom)} atoms learned")
    images = images.to(device)
    losses = []
    while run.step < (steps if stop_at is None else min(stop_at, steps)):
        losses.append(run.advance(images))
        if run.step % log_every == 0:
            say(f"step {run.step} / {steps}, loss {np.mean(losses[-log_every:]):.3f}")
        if run.step % save_every == 0 or run.step == stop_at:
            run.save(checkpoint)
        if probes and run.step % probe_every == 0 and run.step < steps:
            learn_head(images, tiny)  # what the head is now has no influence on the training
            report(tiny, probes)
    if run.step < steps:
        return
    learn_head(images, tiny)
    write(output, {name: value.cpu().half().contiguous() for name, value in tiny.state_dict().items()})
    report(tiny, probes)


def report(tiny: Detail, probes):
    for folder in probes:
        say(f"{folder}: linear probe mIoU {100 * probe(tiny, Path(folder)):.1f} %")


@click.command()
@click.argument(
    "places", metavar="IMAGES...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Weight file to write.")
@click.option("--steps", default=700, show_default=True)
@click.option("--batch", default=32, show_default=True, help="Images a step, two crops each.")
@click.option("--device", default="auto", show_default=True, help="auto: a GPU if there is one.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--probe",
    "probes",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="A labelled set (images/{train,val}, labels/{train,val}) to report a linear probe on. Repeatable.",
)
def main(places, output, steps, batch, device, seed, probes):
    """Pretrain the detail branch of tiny on all images under IMAGES."""
    start = time.time()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        paths = find_images(places)
        images = torch.stack([square(path, IMAGE_SIDE) for path in paths])
        say(f"{len(paths)} images read")
        pretrain(images, output, steps=steps, batch=batch, device=device, seed=seed, probes=probes)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    say(
        f"{output} written after {(time.time() - start) / 60:.0f} min on {device}, {torch.get_num_threads()} thread(s)"
    )


if __name__ == "__main__":
    main()
