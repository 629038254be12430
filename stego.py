"""STEGO: unsupervised semantic segmentation by distilling feature correspondences (Hamilton et al., ICLR 2022).

    model = Stego.fit("images", classes=27)      # no labels needed
    mask = model.predict("img.jpg")              # (H, W) uint8, the cluster of each pixel
    model.save("stego.pt"); model = Stego.load("stego.pt")

The file follows the paper: features, nearest neighbours, correspondences and their loss (Sec. 3), the head and its
training, clusters and prediction (Sec. 4). What any program needs comes last: options, files, going on after an
interruption, several processes. One thing differs from the reference implementation, and makes training a matter of
minutes: the backbone is frozen and nothing is augmented, so every crop passes through it exactly once.
"""

import logging
import math
import os
from contextlib import closing, nullcontext
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # not on Windows: there, two fits in one scratch are not kept apart
    fcntl = None

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from crf import dense_crf, upsample_along_edges, working_size
from kmeans import CosineKMeans
from stego_parts.backbones import BACKBONES, CUSTOM, first_line, load_backbone, read_checkpoint
from stego_parts.distributed import averaged, check_alike, everyones, mine, processes
from stego_parts.drawing import bar_chart, contact_sheet, density_chart, line_chart, strips
from stego_parts.images import (
    find_images,
    five_boxes,
    read_image,
    replacing,
    to_tensor,
    voc_palette,
    write_image,
)
from stego_parts.tokens import (
    BILINEAR,
    CACHE_SIZE,
    RESOLUTION,
    VIEWS,
    Scratch,
    TokenCache,
    backbone_size,
    dense_features,
    encode,
    features_key,
    moved,
    write_state,
)

log = logging.getLogger("stego")

# Hyper-parameters that differ between the published models (App. A.11 and the released configurations).
_SMALL = dict(
    lambda_self=0.67,
    lambda_knn=0.25,
    lambda_rand=0.63,
    b_self=0.18,
    b_knn=0.12,
    b_rand=0.46,
    code_size=70,
    steps=5000,
    batch_size=16,
    views="five",
    evenness=0.0,
    feature_weight=0.0,
    centering=True,
    zero_clamp=True,
)
PRESETS = {
    "small": _SMALL,
    "cityscapes": dict(
        lambda_self=1.00,
        lambda_knn=0.58,
        lambda_rand=0.91,
        b_self=0.46,
        b_knn=0.18,
        b_rand=0.31,
        code_size=100,
        steps=7000,
        batch_size=32,
        views="five",
        evenness=0.0,
        feature_weight=0.0,
        centering=False,
        zero_clamp=True,
    ),
    "cocostuff": dict(
        lambda_self=0.10,
        lambda_knn=1.00,
        lambda_rand=0.15,
        b_self=0.12,
        b_knn=0.20,
        b_rand=1.00,
        code_size=90,
        steps=7000,
        batch_size=32,
        views="five",
        evenness=0.0,
        feature_weight=0.0,
        centering=True,
        zero_clamp=True,
    ),
    "potsdam": _SMALL | dict(b_self=0.08, b_knn=0.02, b_rand=0.76, views="whole"),
}
UNNAMED = dict(
    steps=300, views="windows", evenness=1.0
)  # where no preset is named, in place of those of "small"
BALANCE = {
    "b_self": -0.5,
    "b_knn": -0.5,
    "b_rand": 2.0,
}  # balance "auto": b in standard deviations from the mean
POSITIONS = 121  # positions of an image that enter a step: 11 x 11 (Sec. 4)
NEIGHBORS = 7  # nearest neighbours x_knn is drawn from (Sec. 4)
DERANGEMENTS = 5  # ways a batch is shuffled for x_rand, averaged (reference implementation)
DROPOUT = 0.1  # share of channels dropped (reference implementation)
LEARNING_RATE = 5e-4  # Adam, no schedule (App. A.11)
LOGIT_SCALE = 2.0  # cosine to a centre -> class score for the CRF (reference implementation)
CRF_SIZE = 0.5  # megapixels at which the CRF runs on larger photos
BALANCE_TERMS = ("self", "knn", "rand")  # pairs within an image, with a neighbour, with another image
MEAN_CROPS = 256  # crops whose features' mean direction stands for all
BALANCE_CROPS = 64  # crops whose correspondences set the b's
LOOK_EVERY = 10  # steps between two looks at the codes' similarities
COLLAPSED = (
    0.5  # mean code similarity of unrelated images above which a run has collapsed; good runs: 0 to 0.1
)
SCATTERED = 0.15  # the same within an image, below which it has scattered; good runs: 0.4 to 0.6
KNN_EXACT = 1_000_000  # crops above which neighbours are looked for in inverted lists
KNN_PROBES = 16  # lists that a crop is compared with there
KNN_BATCHES, KNN_BATCH = 30, 64  # mini-batches of the k-means that makes the lists, and their rows per list
KNN_ENTRIES = 32_000_000  # similarities held at once: 128 MB
CLUSTER_ROWS = 100_000  # codes that k-means sees
CLUSTER_STARTS = (
    12  # of k-means: with three, mIoU swings by one to two points between seeds, with twelve by less
)
CROWD_ROWS = 500  # codes that stand for all where crowding is measured
CROWD_SHARPNESS = 10.0  # crowding: mean of exp(10 (cosine - 1)), which halves at an angle of 21 degrees
MATCH_OVERLAP = (
    1 / 3
)  # intersection over union from which clusters of two models are one: a Dice score of a half
REGION = 1 / 3  # side of the squares that show what a cluster is, of the image's shorter side
STRIP_VALUES = 1_000_000  # numbers of a large photo that are upsampled at once: temporaries stay in cache
# What -k auto chooses from; on two clusters, bright and dark, halves agree in any images.
CLASS_COUNTS = (3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 29, 35, 42)
SPLITS = 4  # halvings of the images behind -k auto
AGREEMENT_ROWS = 20_000  # codes of each half
MAX_CLASSES = 255  # masks are 8 bit and 255 means "ignore"
GIVEN = 16  # folders, patterns and files given to fit up to which a model notes their names
FORMAT, VERSION = "stego", 1
RELEASED_HEAD = {
    "linear": "cluster1.0",
    "mlp.0": "cluster2.0",
    "mlp.2": "cluster2.2",
}  # ours: the reference's
RELEASED_PATCH = "net.model.patch_embed.proj.weight"


# ---- nearest neighbours (Sec. 4: cosine similarity of averaged features) ---------------------------------------


def nearest_neighbors(means: Tensor, count: int = NEIGHBORS, *, device="cpu") -> Tensor:
    """The `count` most similar other rows of unit rows (n, C) -> (n, min(count, n - 1)) int64, in bounded memory.

    A single row is its own neighbour. Above KNN_EXACT rows nearly all of them are found, see `listed_neighbors`.
    """
    n, means = len(means), means.to(device)
    if n == 1:
        return torch.zeros(1, 1, dtype=torch.int64)
    if n > KNN_EXACT:
        return listed_neighbors(means, count).cpu()
    found, room = (
        [],
        means.new_empty(min(max(KNN_ENTRIES // n, 1), n), n),
    )  # reused: fresh memory costs a third more
    for rows in torch.arange(n, device=device).split(len(room)):
        similarity = torch.mm(means[rows], means.T, out=room[: len(rows)])  # (rows, n)
        similarity[
            torch.arange(len(rows), device=device), rows
        ] = -torch.inf  # an image is not its own neighbour
        found.append(similarity.topk(min(count, n - 1), dim=1).indices)
    return torch.cat(found).cpu()


def listed_neighbors(means: Tensor, count: int = NEIGHBORS, *, probes: int = KNN_PROBES) -> Tensor:
    """`nearest_neighbors` among some of the rows only: inverted lists (Jegou et al. 2011), of our own k-means.

    The sqrt(n) centres have a list each of the rows nearest to them; a row is compared with the rows of the `probes`
    lists whose centres are nearest to it: n ** 1.5 * (probes + 1) products in place of n ** 2.
    """
    n, kmeans = len(means), CosineKMeans(math.isqrt(len(means)))
    for _ in range(KNN_BATCHES):
        kmeans.partial_fit(means[torch.randint(n, (KNN_BATCH * kmeans.n_clusters,))])
    nearest = [
        (part @ kmeans.cluster_centers_.T).topk(min(probes, kmeans.n_clusters)).indices
        for part in means.split(KNN_ENTRIES // kmeans.n_clusters)
    ]
    nearest = torch.cat(nearest)  # (n, probes) lists, the own one first
    best = means.new_full((n, count + 1), -torch.inf)  # one more: a row finds itself
    found = torch.arange(n, device=means.device)[:, None].repeat(1, count + 1)
    for own, asking in zip(_naming(nearest[:, :1], kmeans.n_clusters), _naming(nearest, kmeans.n_clusters)):
        for rows in asking.split(max(KNN_ENTRIES // max(len(own), 1), 1)):
            here, at = (means[rows] @ means[own].T).topk(min(count + 1, len(own)))  # (rows, count + 1)
            best[rows], kept = torch.cat([best[rows], here], 1).topk(count + 1)
            found[rows] = torch.cat([found[rows], own[at]], 1).gather(1, kept)
    best[found == torch.arange(n, device=means.device)[:, None]] = -torch.inf
    return found.gather(1, best.topk(count).indices)


def _naming(lists: Tensor, count: int) -> tuple[Tensor, ...]:
    """The rows that name each of `count` lists: (n, p) list numbers -> row numbers, list by list."""
    order = lists.flatten().argsort(stable=True)
    return (order // lists.shape[1]).split(lists.flatten().bincount(minlength=count).tolist())


class Sources(NamedTuple):
    """Where crops come from: the paths of all images, (n,) the image of each crop, (n, <= 7) its nearest neighbours."""

    paths: list
    images: Tensor
    neighbors: Tensor

    def path(self, crop: int) -> Path:
        return Path(self.paths[int(self.images[crop])])

    def picture(self, crop: int, views: str, *, height: int = 112) -> Image.Image:
        """What a crop shows, `height` pixels high."""
        picture = read_image(self.path(crop))
        part = int((self.images[:crop] == self.images[crop]).sum())  # which of the five
        if views != "whole":
            picture = picture.crop(five_boxes(*picture.size)[part])
        return picture.resize((max(round(picture.width * height / picture.height), 1), height), BILINEAR)

    def own(self) -> list[float]:
        """The share of crops of whose k nearest neighbours 0, 1, ... k are of their own image (App. A.12, Fig. 15)."""
        own = (self.images[self.neighbors] == self.images[:, None]).sum(1)  # (n,)
        return (torch.bincount(own, minlength=self.neighbors.shape[1] + 1) / len(own)).tolist()

    def words(self) -> str:
        own = self.own()
        mean, shares = (
            sum(k * share for k, share in enumerate(own)),
            ", ".join(f"{share:.0%}" for share in own),
        )
        return (
            f"Of a crop's {len(own) - 1} nearest neighbours, {mean:.1f} are of its own image; crops with 0, 1, ... "
            f"{len(own) - 1} such: {shares}."
        )


# ---- correspondences and their loss (Sec. 3.1, 3.2) ------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    """Vectors (..., C) to length one."""
    return F.normalize(x, dim=-1)


def correspondence(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every position of a with every position of b (Eq. 1): unit (B, P, C), (B, Q, C) -> (B, P, Q)."""
    return a @ b.transpose(-1, -2)


def centred(weight: Tensor) -> Tensor:
    """Each position's mean over the partner's positions taken off, the mean over everything added back (Eq. 3)."""
    return weight - weight.mean(-1, keepdim=True) + averaged(weight.mean())


def correlation_loss(
    f: Tensor, g: Tensor, s: Tensor, t: Tensor, b: float, *, centering: bool = True, zero_clamp: bool = True
) -> Tensor:
    """Codes that correspond where features do more than b (Eq. 3 and 4, as a mean): a scalar.

    f, g: unit features (B, P, C), (B, Q, C); s, t: their unit codes (B, P, D), (B, Q, D); b: the negative pressure.
    The published values of b want centering with the mean added back. No gradient flows through the features.
    """
    with torch.no_grad():
        weight = correspondence(f, g)  # (B, P, Q)
        weight = (centred(weight) if centering else weight) - b
    code = correspondence(s, t)
    return -(weight * (code.relu() if zero_clamp else code)).mean()  # relu: the 0-clamp of Sec. 3.2


def balanced_shifts(cache: TokenCache, neighbors: Tensor, *, centering: bool = True) -> dict:
    """b_self, b_knn and b_rand from the data: a fixed number of standard deviations from the mean correspondence.

    The published b's suit DINO's features and the data they were tuned on (App. A.11); where correspondences lie
    higher or lower, all codes collapse or scatter. Measured on BALANCE_CROPS crops, a neighbour and a random partner of
    each. BALANCE was chosen by unsupervised mIoU in short runs of one seed on CamVid, aerial and MSRC val.
    """
    crops = torch.randperm(len(cache))[:BALANCE_CROPS]
    partners = {
        "b_self": crops,
        "b_knn": neighbors[crops, torch.randint(neighbors.shape[1], crops.shape)],
        "b_rand": crops.roll(1),
    }
    f, shifts = unit(cache.sample(crops, POSITIONS)), {}
    for name, partner in partners.items():
        other = f if name == "b_self" else unit(cache.sample(partner, POSITIONS))
        weight = centred(correspondence(f, other)) if centering else correspondence(f, other)
        shifts[name] = float(weight.mean() + BALANCE[name] * weight.std())
    return shifts


def derangement(count: int) -> Tensor:
    """A random permutation of 0..count-1 without a fixed point, uniform among them; count is at least 2."""
    identity = torch.arange(count)
    while True:
        shuffled = torch.randperm(count)
        if (shuffled != identity).all():  # one draw in e succeeds
            return shuffled


# ---- the segmentation head and its training (Sec. 3.3) ---------------------------------------------------------


class Head(nn.Module):
    """Features (..., P, C) -> codes (..., P, code_size): a linear layer plus a two-layer perceptron.

    The reference's 1 x 1 convolutions, written for positions in rows, so that it works on sampled positions alone.
    feature_weight: the weight of the features themselves, less their `mean` direction (C,), beside the codes in what is
    clustered: the cosine of two descriptions is the weighted mean of both cosines. 0: codes alone, as in the paper.
    """

    def __init__(self, channels: int, code_size: int, *, feature_weight: float = 0.0):
        super().__init__()
        self.feature_weight = feature_weight
        self.register_buffer("mean", torch.zeros(channels) if feature_weight else None)
        self.linear = nn.Linear(channels, code_size)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, code_size))

    def forward(self, f: Tensor) -> Tensor:
        return self.linear(self.drop(f)) + self.mlp(self.drop(f))

    @property
    def size(self) -> int:
        """D, the length of a description."""
        return self.linear.out_features + (self.linear.in_features if self.feature_weight else 0)

    def describe(self, f: Tensor) -> Tensor:
        """What is clustered: features (..., P, C) -> (..., P, D), the codes, with feature_weight also the features."""
        if not self.feature_weight:
            return self(f)
        return torch.cat([unit(self(f)), self.feature_weight * unit(unit(f) - self.mean)], -1)

    def on_map(self, features: Tensor) -> Tensor:
        """The same on a map: (B, C, h, w) -> (B, D, h, w)."""
        codes = self.describe(features.flatten(2).transpose(1, 2))  # (B, h * w, D)
        return codes.transpose(1, 2).unflatten(2, features.shape[2:])  # (B, D, h, w)

    def drop(self, f: Tensor) -> Tensor:
        """Drop whole channels of an image while training: one draw for all its positions."""
        if not self.training:
            return f
        every = torch.ones_like(f[..., :1, :]).repeat(
            processes(), *[1] * (f.ndim - 1)
        )  # of all processes' parts
        return f * mine(F.dropout(every, DROPOUT))


def training_loss(head: Head, f: Tensor, g: Tensor, f_knn: Tensor, config: dict) -> Tensor:
    """The full loss (Eq. 5) of one batch: (B, P, C) tokens at two draws of positions and of a neighbour each.

    Of several processes, each gets the whole batch and computes the loss of its part; the average is the loss. A term
    whose lambda is 0 is not computed.
    """

    def term(name, *pair):
        return config[f"lambda_{name}"] * correlation_loss(
            *pair, config[f"b_{name}"], centering=config["centering"], zero_clamp=config["zero_clamp"]
        )

    batch, same_image = len(f), mine(torch.cat([f, g], 1))  # (B, 2P, C): shares its dropout
    s, t = unit(head(same_image)).split(f.shape[1], 1)
    f, g = unit(head.drop(same_image)).split(f.shape[1], 1)
    loss = term("self", f, f, s, s) if config["lambda_self"] else 0 * s.sum()  # 0, but with a gradient
    if config["lambda_knn"]:
        f_knn = mine(f_knn)
        s_knn, f_knn = unit(head(f_knn)), unit(head.drop(f_knn))
        loss = loss + term("knn", f, f_knn, s, s_knn)
    if config["lambda_rand"] and batch > 1:  # a lone crop has no random partner
        g, t = everyones(g), everyones(t)
        others = [moved(mine(derangement(batch)), g.device) for _ in range(DERANGEMENTS)]
        loss = loss + sum(term("rand", f, g[other], s, t[other]) for other in others) / DERANGEMENTS
    return loss


def train_head(
    cache: TokenCache,
    neighbors: Tensor,
    config: dict,
    *,
    device="cpu",
    progress=None,
    history: list | None = None,
    scratch: "Scratch | None" = None,
    key: dict | None = None,
) -> Head:
    """Train a head on cached tokens and the table of neighbours (n, <= 7) of their crops.

    Returns it in eval mode, rounded to float16 as it is saved. history: gets a look (see `look`) now and then.
    scratch: where it is noted how far training has come, and from where it goes on if it has come some way.
    """
    head = (
        Head(cache.tokens.shape[2], config["code_size"], feature_weight=config["feature_weight"])
        .to(device)
        .train()
    )
    if head.feature_weight:
        crops = torch.randperm(len(cache))[:MEAN_CROPS]
        head.mean.copy_(unit(cache.sample(crops, POSITIONS)).mean((0, 1)))
    optimizer = torch.optim.Adam(
        head.parameters(), lr=LEARNING_RATE, fused=torch.device(device).type == "cuda" or None
    )
    batch, order, start = batch_of(config, len(cache)), torch.empty(0, dtype=torch.int64), 0
    if scratch and (state := scratch.load("training", key)):
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        order, start = state["order"], state["step"]
        if history is not None:
            history.extend(state["history"])
        torch.set_rng_state(state["random"])
    for step in range(start, config["steps"]):
        if len(order) < batch:  # each crop once an epoch
            order = torch.randperm(len(cache))
        anchor, order = order[:batch], order[batch:]
        partner = neighbors[anchor, torch.randint(neighbors.shape[1], anchor.shape)]
        f, g = cache.sample(anchor, 2 * POSITIONS).to(device).split(POSITIONS, 1)
        f_knn = cache.sample(partner, POSITIONS).to(device)
        loss = training_loss(head, f, g, f_knn, config)
        if history is not None and (step % LOOK_EVERY == 0 or step + 1 == config["steps"]):
            history.append({"step": step, "loss": float(averaged(loss.detach()))} | look(head, f, f_knn))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in head.parameters() if processes() > 1 else ():
            parameter.grad = averaged(parameter.grad)
        optimizer.step()
        if scratch and (scratch.due() or step + 1 == config["steps"]):
            scratch.save(
                "training",
                key,
                dict(
                    step=step + 1,
                    order=order.clone(),
                    history=history,
                    head=head.state_dict(),
                    optimizer=optimizer.state_dict(),
                ),
            )
        if progress:
            progress("training", step + 1, config["steps"])
    return head.half().float().requires_grad_(False).eval()


def batch_of(config: dict, crops: int) -> int:
    """Crops per step: at most all there are, and as many for each process; ValueError if that is none."""
    batch = min(config["batch_size"], crops) // processes() * processes()
    if not batch or config["batch_size"] % processes():
        raise ValueError(
            f"A batch of {config['batch_size']} of {crops} crops cannot be divided among {processes()} "
            "processes; set a --batch-size that is a multiple of their number, or give more images."
        )
    return batch


@torch.no_grad()
def look(head: Head, f: Tensor, f_knn: Tensor) -> dict:
    """Code similarities of pairs of positions in an image, with its neighbour, with another image (Fig. 14).

    f, f_knn: tokens (B, P, C). Returns {"self" | "knn" | "rand": (mean, histogram (20,) over -1..1 in shares)}; a lone
    image has no other, its "rand" is left out.
    """
    head.eval()  # codes as they will be: no dropout
    s, found = unit(head(f)), {}
    partners = {"self": s, "knn": unit(head(f_knn))} | ({"rand": s.roll(1, 0)} if len(f) > 1 else {})
    for name, partner in partners.items():
        code = correspondence(s, partner)  # (B, P, P)
        found[name] = float(code.mean()), torch.histc(code.cpu(), 20, -1, 1) / code.numel()
    head.train()
    return found


def history_charts(history: list) -> dict:
    """Pictures of a training, {"loss" | "similarity" | "histogram": RGB picture}, from the looks it took."""
    steps, terms = (
        [entry["step"] for entry in history],
        [name for name in BALANCE_TERMS if name in history[-1]],
    )
    labels = dict(x_label="step", y_label="")
    means = {name: (steps, [entry[name][0] for entry in history]) for name in terms}
    spread = {name: (steps, torch.stack([entry[name][1] for entry in history])) for name in terms}
    return {
        "loss": line_chart({"loss": (steps, [entry["loss"] for entry in history])}, title="Loss", **labels),
        "similarity": line_chart(means, title="Mean similarity of codes", **labels),
        "histogram": density_chart(spread, title="Similarities of codes", x_label="step", y_range=(-1, 1)),
    }


def diagnosis(history: list) -> str | None:
    """In words, if the codes have collapsed or scattered (App. A.11), with what to try; else None.

    A run of fewer than five looks is too short to tell.
    """
    if len(history) < 5:
        return None
    rand, same = (
        np.mean([entry[name][0] for entry in history[-5:] if name in entry] or [np.nan])
        for name in ("rand", "self")
    )
    if rand > COLLAPSED:
        return (
            f"The codes of unrelated images are alike (mean similarity {rand:.2f}, at best near 0): training has "
            "collapsed. Try --balance auto, a larger --b-rand, or more varied images."
        )
    if same < SCATTERED:
        return (
            f"The codes within an image have nothing in common (mean similarity {same:.2f}): training has "
            "scattered. Try --balance auto, or a smaller --b-self and --b-knn."
        )
    return None


# ---- clusters (Sec. 3.3: cosine k-means on the codes) ----------------------------------------------------------


def cluster_codes(
    describe, cache: TokenCache, classes: int, *, evenness: float = 0.0, seed: int = 0, device="cpu"
) -> tuple[Tensor, Tensor]:
    """Centres (K, D) of the codes of random tokens, most used first, and each one's share of them (K,).

    describe: tokens (..., C) to what is clustered, (..., D); `Head.describe` in a fit.
    evenness: 0 clusters the codes as they are; towards 1, crowded directions weigh less and rare things get centres.
    """
    codes = drawn_codes(describe, cache, torch.arange(len(cache)), CLUSTER_ROWS, device=device)  # (N, D)
    if len(codes) < classes:
        raise ValueError(
            f"{classes} classes are more than there are positions to cluster; "
            "ask for fewer classes or give more images."
        )
    kmeans = CosineKMeans(classes, n_init=CLUSTER_STARTS, seed=seed)
    kmeans.fit(evened(codes, evenness) if evenness else codes)
    share = torch.bincount(kmeans.predict(codes), minlength=classes) / len(codes)
    order = share.argsort(descending=True, stable=True)
    return kmeans.cluster_centers_[order], share[order]


def drawn_codes(describe, cache: TokenCache, crops: Tensor, count: int, *, device="cpu") -> Tensor:
    """Codes (N, D) of random positions, as many of each crop: about `count` in all, fewer where there are no more."""
    crops = crops if len(crops) <= count else crops[torch.randperm(len(crops))[:count]]
    each = min(max(count // len(crops), 1), cache.tokens.shape[1])
    return torch.cat(
        [describe(cache.sample(part, each).to(device)).flatten(0, 1) for part in crops.split(256)]
    )


@torch.no_grad()
def class_agreement(
    describe, cache: TokenCache, *, evenness: float = 0.0, seed: int = 0, device="cpu", progress=None
) -> dict[int, list[float]]:
    """How much two halves of the images agree on K clusters, for each K of CLASS_COUNTS and each of SPLITS splits.

    Clusters that are there are found again in other images (stability: Ben-Hur et al. 2002, Lange et al. 2004). Each
    half is clustered on its own, then both label the same codes; agreement is the adjusted Rand index, 0 by chance.
    """
    images, found = cache.images[: len(cache)].unique(), {}
    for split in range(SPLITS):
        first = images[torch.randperm(len(images))[: len(images) // 2]]
        sides = torch.isin(cache.images[: len(cache)], first)  # one image: its crops lie in one half
        sides = sides if len(images) > 1 else torch.arange(len(cache)) % 2 == 0
        halves = [
            drawn_codes(describe, cache, side.nonzero()[:, 0], AGREEMENT_ROWS, device=device)
            for side in (sides, ~sides)
            if side.any()
        ]
        drawn = [evened(codes, evenness) if evenness else codes for codes in (halves * 2)[:2]]
        common = torch.cat(drawn)
        for done, count in enumerate(count for count in CLASS_COUNTS if count * 10 <= min(map(len, drawn))):
            labels = [
                CosineKMeans(count, seed=seed + side, n_init=2, max_iter=60).fit(codes).predict(common)
                for side, codes in enumerate(drawn)
            ]
            found.setdefault(count, []).append(adjusted_rand_index(*labels))
            if progress:
                progress("classes", split * len(CLASS_COUNTS) + done + 1, SPLITS * len(CLASS_COUNTS))
    if not found:
        raise ValueError(
            "There are too few positions to tell how many classes they make; give more images, "
            "or the number of classes."
        )
    return found


def adjusted_rand_index(a: Tensor, b: Tensor) -> float:
    """Agreement of two labellings (N,) int64 beyond chance: 1 for the same parts, 0 for unrelated ones (Hubert & Arabie
    1985).
    """

    def pairs(counts: Tensor) -> float:
        return float((counts.double() * (counts.double() - 1) / 2).sum())

    width = int(b.max()) + 1
    both, left, right = (
        pairs(torch.bincount(a * width + b)),
        pairs(torch.bincount(a)),
        pairs(torch.bincount(b)),
    )
    chance = left * right / max(len(a) * (len(a) - 1) / 2, 1)
    most = (left + right) / 2
    return (both - chance) / (most - chance) if most > chance else 1.0


def plausible_classes(agreement: dict[int, list[float]]) -> list[int]:
    """Numbers of clusters whose mean agreement is within a standard error of the best: the first is the one to take.

    The smallest of what cannot be told apart (the one-standard-error rule, Breiman et al. 1984).
    """
    means = {count: np.mean(scores) for count, scores in agreement.items()}
    best = max(means, key=means.get)
    error = np.std(agreement[best], ddof=1) / math.sqrt(len(agreement[best]))
    return [count for count, mean in means.items() if mean >= means[best] - error]


def evened(codes: Tensor, evenness: float) -> Tensor:
    """As many rows drawn from codes (N, D), each with a chance of one over (how crowded its direction is) ** evenness.

    k-means splits what is frequent; a mean over classes asks for what is rare as well.
    """
    near = unit(codes[torch.randperm(len(codes))[:CROWD_ROWS].to(codes.device)]).T  # (D, n)
    crowd = torch.cat(
        [(CROWD_SHARPNESS * (unit(part) @ near - 1)).exp().mean(1) for part in codes.split(8192)]
    )
    return codes[torch.multinomial(crowd.cpu() ** -evenness, len(codes), replacement=True).to(codes.device)]


@torch.inference_mode()
def corresponding(cache: TokenCache, new: "Stego", old: "Stego") -> dict[int, int]:
    """Which cluster of a new model is which of an older one: {new: old}, by what both say about the same tokens.

    Hungarian matching on intersection over union; pairs that overlap less than MATCH_OVERLAP are left out.
    """
    each, K, L = max(CLUSTER_ROWS // len(cache), 1), len(new.centers), len(old.centers)
    joint = torch.zeros(K, L)
    for crops in torch.arange(len(cache)).split(256):
        tokens = cache.sample(crops, each).to(new.device).flatten(0, 1)  # (N, C)
        mine, theirs = ((model.head.describe(tokens) @ model.centers.T).argmax(1) for model in (new, old))
        joint += torch.bincount(mine * L + theirs, minlength=K * L).view(K, L).cpu()
    overlap = joint / (joint.sum(1, keepdim=True) + joint.sum(0) - joint).clamp(min=1)
    pairs = zip(*(side.tolist() for side in linear_sum_assignment(overlap, maximize=True)))
    return {k: m for k, m in pairs if overlap[k, m] >= MATCH_OVERLAP}


# ---- the model -------------------------------------------------------------------------------------------------


class Stego:
    """A fitted model: a head and cluster centres over a frozen backbone.

    Learned: `head`, `centers` (K, D) unit rows, `share` (K,) of each cluster in the training images; `config` holds
    every option of `fit` under its name, `palette` (K, 3) uint8 the colours, `names` what a person calls the clusters
    ("" where not named); `backbone` is loaded when first used.
    """

    def __init__(
        self,
        config: dict,
        head: Head,
        centers: Tensor,
        share: Tensor,
        *,
        backbone_sha256: str,
        palette=None,
        names=None,
        device="cpu",
        weights=None,
    ):
        self.config, self.backbone_sha256, self.device, self.weights = (
            config,
            backbone_sha256,
            device,
            weights,
        )
        self.head, self.centers, self.share = head.to(device), centers.to(device), share
        self.palette = voc_palette(len(centers)) if palette is None else palette
        self.linear = None  # weight, bias: a released linear probe
        self.names = [""] * len(centers) if names is None else list(names)
        self._backbone = None
        self.history, self.sources, self.agreement = [], None, {}  # of a fit in this process, not saved

    @classmethod
    def fit(
        cls,
        images,
        *,
        classes: int | str = 27,
        backbone="auto",
        weights=None,
        stride: int | None = None,
        preset: str | None = None,
        balance: str | None = None,
        seed: int = 0,
        device: str = "auto",
        cache_size: float = CACHE_SIZE,
        match=None,
        progress=None,
        scratch=None,
        resume: bool = False,
        **overrides,
    ) -> "Stego":
        """Find what recurs in images.

        Args:
            images: files, folders (recursive) or glob patterns, one or several.
            classes: number of segments K to look for, 1..255, or "auto": the K on which halves of the images agree
                most, see `class_agreement`; config["classes"] is then the K that was taken.
            backbone: a name from `stego_parts.backbones.NAMES`, or "auto"; weights: a local weight file for it; stride: 32,
                16 or 8, for a ResNet. Or any callable that maps normalised images (B, 3, H, W) to features
                (B, C, h, w): a saved model does not hold it, `load` asks for it again.
            preset: the hyper-parameters to start from, one of PRESETS ("small" with UNNAMED unless named); each can
                be overridden by keyword (lambda_self, lambda_knn, lambda_rand, b_self, b_knn, b_rand, code_size, steps,
                batch_size, views: one of VIEWS, evenness: 0 to 1, see `evened`, feature_weight: 0 or more, see `Head`,
                centering, zero_clamp). A lambda of 0 switches its term off.
            balance: "auto" sets the b's that are not given from the features' own correspondences, "fixed" keeps
                the preset's. Default: "fixed" for a named preset, else "auto".
            seed: same images, seed, machine and threads: same model.
            device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps".
            cache_size: bound of the token cache, in GB (10^9 bytes).
            match: an earlier model over the same backbone, or its path; clusters that correspond to clusters of it
                bear their numbers, names and colours.
            progress: called as progress(stage, done, total).
            scratch: a folder for the features and the state of the fit, every SAVE_EVERY seconds, so that nothing
                much is lost with the process; features that are in it already are not computed again.
            resume: go on with the training that is in the scratch, if it is of the same images and options; the
                model is the same, bit for bit, as without the interruption.

        Raises ValueError or FileNotFoundError with what was got, what is needed and what to do next.
        """
        config = fit_config(
            classes=classes, preset=preset, balance=balance, seed=seed, cache_size=cache_size, **overrides
        )
        device = pick_device(device)
        images = [images] if isinstance(images, (str, os.PathLike)) else list(images)
        paths = [path for path, _ in find_images(images)]
        network = load_backbone(
            backbone, weights=weights, stride=stride, device=device, progress=progress is not None
        )
        config |= dict(backbone=network.name, stride=network.patch)
        if scratch and processes() > 1:
            raise ValueError("Several processes cannot go on with an interrupted fit; leave the scratch out.")
        check_alike(list(map(str, paths)), config, network.sha256)
        earlier = None if match is None else _earlier(match, network, device)
        key = features_key(paths, network, config) if scratch else None  # asks the disk about every image
        trained = {"features": key, "config": dict(config)}
        with closing(Scratch(scratch)) if scratch else nullcontext() as kept, forked_random(device):
            if kept:
                kept.begin(trained, resume=resume)
            torch.manual_seed(seed)
            cache = encode(
                network,
                paths,
                views=config["views"],
                cache_size=cache_size,
                device=device,
                progress=progress,
                scratch=kept,
                key=key,
            )
            torch.manual_seed(seed)  # whether the features were new or not
            neighbors = nearest_neighbors(cache.means[: len(cache)], device=device)
            if config["balance"] == "auto":
                shifts = balanced_shifts(cache, neighbors, centering=config["centering"])
                config |= {name: b for name, b in shifts.items() if overrides.get(name) is None}
            history = []
            head = train_head(
                cache,
                neighbors,
                config,
                device=device,
                progress=progress,
                history=history,
                scratch=kept,
                key=trained,
            )
            agreement = {}
            if classes == "auto":
                agreement = class_agreement(
                    head.describe,
                    cache,
                    evenness=config["evenness"],
                    seed=seed,
                    device=device,
                    progress=progress,
                )
                config["classes"] = plausible_classes(agreement)[0]
            centers, share = cluster_codes(
                head.describe, cache, config["classes"], evenness=config["evenness"], seed=seed, device=device
            )
        config |= dict(crops=len(cache), images=_given(images))
        model = cls(
            config, head, centers, share, backbone_sha256=network.sha256, device=device, weights=weights
        )
        model._backbone, model.history, model.agreement = network, history, agreement
        model.sources = Sources(paths, cache.images[: len(cache)], neighbors)
        log.info(model.sources.words())
        if earlier is not None:
            model.take_over(earlier, corresponding(cache, model, earlier))
        if warning := diagnosis(history):
            log.warning(warning)
        return model

    @property
    def backbone(self):
        """The frozen backbone, loaded on first use; ValueError if its weights are not those the model was fitted on."""
        if self._backbone is None:
            name = self.config["backbone"]
            if name.startswith(CUSTOM):
                raise ValueError(
                    f"The model was fitted on {name.removeprefix(CUSTOM)}, a feature extractor given from "
                    "Python, which it does not hold; give it again: Stego.load(path, backbone=...)."
                )
            self._backbone = self._checked(
                load_backbone(
                    name, weights=self.weights, device=self.device, stride=self.config.get("stride")
                )
            )
        return self._backbone

    def _checked(self, network):
        """A backbone that fits this model; ValueError for another."""
        name = network.name.removeprefix(CUSTOM)
        if network.sha256 != self.backbone_sha256:
            raise ValueError(
                f"The model was fitted on {self.config['backbone'].removeprefix(CUSTOM)} weights "
                f"{self.backbone_sha256[:12] or 'unknown'}…, these are {name} {network.sha256[:12] or 'unknown'}…; "
                "give the right ones with --weights FILE, or fit again."
            )
        if network.channels != self.head.linear.in_features:
            raise ValueError(
                f"The model's head reads {self.head.linear.in_features} channels, {name} gives "
                f"{network.channels}; the model file is damaged: fit it again."
            )
        return network

    @torch.inference_mode()
    def codes(self, x: Tensor) -> Tensor:
        """Codes of normalised images, averaged with those of the mirror image (FACTS: evaluation protocol).

        x: (B, 3, H, W) float, H and W multiples of the patch -> (B, D, H / patch, W / patch).
        """
        return mirror_averaged(
            lambda both: self.head.on_map(dense_features(self.backbone, both, self.device)), x
        )

    @property
    def labels(self) -> list[str]:
        """What to call each cluster: its name, or else its number."""
        return [name or str(k) for k, name in enumerate(self.names)]

    def rename(self, names: dict[int, str]):
        """Call clusters by these names; "" takes a name away. Clusters that are one thing may share a name."""
        for k, name in names.items():
            if not 0 <= k < len(self.names):
                raise ValueError(f"There is no cluster {k}; the model has 0 to {len(self.names) - 1}.")
            if (
                name.isdecimal()
                or "," in name
                or "=" in name
                or not name.isprintable()
                or name != name.strip()
            ):
                raise ValueError(
                    f"Got the name {name!r}; use a word that is no number, without comma and equals sign."
                )
        for k, name in names.items():
            self.names[k] = name

    def select(self, wanted) -> list[int]:
        """The clusters that numbers or names mean: ["road", "5"] -> [3, 5, 7] if 3 and 7 are called road."""
        wanted, labels = {str(each).strip() for each in wanted}, self.labels
        known = {str(k) for k in range(len(labels))} | set(labels)
        if unknown := wanted - known:
            raise ValueError(
                f"The model has no cluster {sorted(unknown)[0]!r}; it has the numbers 0 to "
                f"{len(labels) - 1} and the names {', '.join(filter(None, self.names)) or '(none yet)'}."
            )
        return [k for k, label in enumerate(labels) if wanted & {label, str(k)}]

    def take_over(self, earlier: "Stego", same: dict[int, int]):
        """Renumber: clusters that are the earlier model's ({mine: its}) bear its numbers, names and colours.

        The others get the numbers that are left over, and colours that the earlier model does not use. A number that
        this smaller model does not have is lost, its name and colour are kept.
        """
        K = len(self.centers)
        number = {k: m for k, m in same.items() if m < K}
        free = iter(sorted(set(range(K)) - set(number.values())))
        order = sorted(range(K), key=lambda k: number[k] if k in number else next(free))
        self.centers, self.share = self.centers[order], self.share[order]
        used = set(map(tuple, earlier.palette.tolist()))
        kept = [earlier.palette[m] for m in range(len(earlier.palette)) if m not in same.values()]
        unused = iter(
            [colour for colour in voc_palette(MAX_CLASSES) if tuple(colour.tolist()) not in used] + kept
        )
        self.palette = np.array(
            [earlier.palette[same[k]] if k in same else next(unused) for k in order], np.uint8
        )
        self.names = [earlier.names[same[k]] if k in same else "" for k in order]

    @torch.inference_mode()
    def predict(
        self, image, *, resolution: int = RESOLUTION, crf: bool = True, crf_size: float = CRF_SIZE
    ) -> np.ndarray:
        """Segment one image of any size: a mask (H, W) uint8 of cluster ids at the displayed size of the image.

        Args:
            image: a path, a PIL image or an array (H, W, 3) uint8.
            resolution: pixels of the shorter side that the backbone sees; finer segments at quadratic cost.
            crf: sharpen with a dense CRF; crf_size: the megapixels it works on, larger images are brought down.
        """
        image = read_image(image)
        codes = self._image_codes(image, resolution)
        if not crf:
            return upsampled_argmax(along(codes, self.centers)[0], image.height, image.width)
        q = self._probabilities(image, codes, crf=True, crf_size=crf_size)
        return upsample_along_edges(pixels(image).to(self.device), q).cpu().numpy()

    @torch.inference_mode()
    def probabilities(
        self, image, *, resolution: int = RESOLUTION, crf: bool = True, crf_size: float = CRF_SIZE
    ) -> np.ndarray:
        """Probability of each cluster at each pixel, (K, h, w) float32; the arguments are those of `predict`.

        (h, w) is the displayed size of the image where that is at most crf_size megapixels, else it is brought down
        to that many: bounded memory, 54 MB for 27 clusters at the default.
        """
        image = read_image(image)
        codes = self._image_codes(image, resolution)
        return self._probabilities(image, codes, crf=crf, crf_size=crf_size).cpu().numpy()

    def _image_codes(self, image, resolution: int) -> Tensor:
        """Codes (1, D, h, w) of one picture of any size."""
        return self.codes(to_tensor(image.resize(self._working_size(image, resolution), BILINEAR))[None])

    def _probabilities(self, image, codes: Tensor, *, crf: bool, crf_size: float) -> Tensor:
        height, width = working_size((image.height, image.width), megapixels=crf_size)
        scores = class_scores(codes[0], self.centers, (height, width))  # (K, h, w)
        if not crf:
            return scores.softmax(0)
        small = pixels(image.resize((width, height), BILINEAR)).to(self.device)  # (3, h, w)
        return dense_crf(small, scores)

    def _working_size(self, image, resolution: int) -> tuple[int, int]:
        """(width, height) of an image for the backbone, see `backbone_size`."""
        if resolution < self.backbone.patch:
            raise ValueError(
                f"Got resolution {resolution}; it is the shorter side in pixels, at least "
                f"{self.backbone.patch}."
            )
        return backbone_size(image, self.backbone.patch, resolution=resolution)

    def contact_sheet(self, images, *, count: int = 12, **options):
        """A picture of up to `count` images, evenly spread over the list, beside their segments."""
        images = list(images)
        chosen = images[:: max(len(images) // count, 1)][:count]
        pairs = []
        for path in chosen:
            try:
                image = read_image(path)
                pairs.append((image, self.predict(image, **options)))
            except (ValueError, FileNotFoundError):
                continue  # fit has named it already
        return contact_sheet(pairs, self.palette)

    @torch.inference_mode()
    def best_regions(
        self, images, *, count: int = 6, resolution: int = RESOLUTION, progress=None
    ) -> list[list[tuple]]:
        """What each cluster is: the `count` squares of images that fit it best, at most one an image.

        The fit of a square is the mean over it of the cosine to the centre, 0 where another cluster is nearer.
        Returns for each cluster (picture, mask (side, side) uint8) pairs, the best first.
        """
        found = [[] for _ in self.centers]  # of (fit, picture, mask)
        for done, path in enumerate(images, 1):
            try:
                picture = read_image(path)
                picture = picture.resize(self._working_size(picture, resolution), BILINEAR)
            except (ValueError, FileNotFoundError) as error:
                log.warning("Skipped: %s", error)
                continue
            codes = self.codes(to_tensor(picture)[None])
            cosines = along(F.normalize(codes, dim=1), self.centers)  # (1, K, h, w)
            mask = upsampled_argmax(cosines[0], picture.height, picture.width)
            won = cosines.clamp(min=0) * (cosines == cosines.amax(1, keepdim=True))
            side = max(round(min(won.shape[2:]) * REGION), 1)
            fits = F.avg_pool2d(won, side, stride=1)[0]  # (K, y, x)
            for k, (fit, at) in enumerate(zip(*(each.tolist() for each in fits.flatten(1).max(1)))):
                if fit > 0 and (len(found[k]) < count or fit > found[k][-1][0]):
                    y, x = (i * self.backbone.patch for i in divmod(at, fits.shape[2]))
                    end = side * self.backbone.patch
                    region = (
                        fit,
                        picture.crop((x, y, x + end, y + end)),
                        mask[y : y + end, x : x + end].copy(),
                    )
                    found[k] = sorted([*found[k], region], key=lambda each: -each[0])[:count]
            if progress:
                progress("regions", done, len(images))
        return [[(picture, mask) for _, picture, mask in regions] for regions in found]

    def report(self, folder):
        """Write how the fit went into a folder, as pictures (Fig. 14, 15) and a few words.

        loss.png and similarity.png over the steps; histogram.png, how the similarities of codes were distributed;
        neighbors.png, some crops and their nearest neighbours; clusters.png, their shares; sheet.png, images beside
        their segments; report.txt. Raises ValueError for a model that was not fitted in this process: the history is
        not saved.
        """
        if not self.history:
            raise ValueError("This model has no history to report; a report is written right after fit.")
        pictures = {
            **history_charts(self.history),
            "neighbors": self._neighbor_strips(),
            "clusters": bar_chart(
                self.share.tolist(), self.palette, self.labels, title="Share of each cluster"
            ),
            "sheet": self.contact_sheet(self.sources.paths),
        }
        if self.agreement:
            counts, means = list(self.agreement), [np.mean(scores) for scores in self.agreement.values()]
            pictures["classes"] = line_chart(
                {"agreement": (counts, means)},
                title="Do halves of the images agree?",
                x_label="clusters",
                y_label="adjusted Rand index",
            )
        for name, picture in pictures.items():
            write_image(picture, Path(folder) / f"{name}.png")
        with replacing(Path(folder) / "report.txt") as part:
            part.write_text("\n".join(self._words()) + "\n", encoding="utf-8")

    def _words(self) -> list[str]:
        """The report in sentences."""
        last = self.history[-1]
        similar = ", ".join(f"{name} {last[name][0]:.2f}" for name in BALANCE_TERMS if name in last)
        images = self.sources.images
        return [
            f"{len(images.unique())} images, {len(images)} crops, {last['step'] + 1} steps.",
            f"Mean similarity of codes at the end: {similar}.",
            self.sources.words(),
            f"The largest cluster covers {self.share.max():.0%}, the smallest {self.share.min():.1%}.",
            *([self.sureness()] if self.agreement else []),
            diagnosis(self.history) or "Training looks sound.",
        ]

    def sureness(self) -> str:
        """In words: the number of clusters that -k auto took, and how sure it is."""
        first, *others = plausible_classes(self.agreement)
        near = f"{', '.join(map(str, others))} cannot be told from it" if others else "no other comes near"
        return (
            f"{first} clusters: halves of the images agree on them to {np.mean(self.agreement[first]):.2f} "
            f"(1 is best); {near}."
        )

    def _neighbor_strips(self, rows: int = 6):
        """Some crops, evenly spread over all, each before its nearest neighbours."""
        count, shown = len(self.sources.images), []
        for crop in range(0, count, max(count // rows, 1))[:rows]:
            try:
                beside = [crop, *self.sources.neighbors[crop]]
                pictures = [self.sources.picture(each, self.config["views"]) for each in beside]
            except (ValueError, FileNotFoundError):
                continue  # an image is gone since
            shown.append((f"{self.sources.path(crop).name}, and its nearest neighbours", pictures))
        return strips(shown, legend={})

    def save(self, path):
        """Write the model: one file, a plain dict of tensors and values; without the backbone's weights."""
        state = dict(
            format=FORMAT,
            version=VERSION,
            config=self.config,
            backbone_sha256=self.backbone_sha256,
            head={key: value.half().cpu() for key, value in self.head.state_dict().items()},
            centers=self.centers.cpu(),
            share=self.share,
            palette=torch.from_numpy(self.palette),
            names=self.names,
        )
        write_state(state, path)

    @classmethod
    def _released(cls, state: dict, path, device) -> "Stego":
        """The model in a checkpoint of the reference implementation, backbone included; sizes come from the tensors."""
        try:
            head = {
                f"{ours}.{part}": state[f"net.{theirs}.{part}"].flatten(1 if part == "weight" else 0)
                for ours, theirs in RELEASED_HEAD.items()
                for part in ("weight", "bias")
            }
            centers, patch = unit(state["cluster_probe.clusters"].float()), state[RELEASED_PATCH].shape[-1]
            (code_size, channels), classes = head["linear.weight"].shape, len(centers)
            name = {
                (spec.channels, spec.patch): name
                for name, spec in BACKBONES.items()
                if "dinov2" not in name and "300ep" not in name
            }[channels, patch]
            network = Head(channels, code_size)
            network.load_state_dict(head)
            config = dict(
                classes=classes, backbone=name, preset="released", code_size=code_size, steps=None, seed=None
            )
            share, palette = torch.zeros(classes), voc_palette(classes)  # shares: it does not tell
            _check_model(network, centers, share, torch.from_numpy(palette), [""] * classes, config)
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"{path} is not a usable STEGO checkpoint ({first_line(error)}); get it again, "
                "or fit a model of your own."
            ) from error
        backbone = load_backbone(name, weights=path, device=device)
        model = cls(
            config,
            network.requires_grad_(False).eval(),
            centers,
            share,
            palette=palette,
            backbone_sha256=backbone.sha256,
            device=device,
            weights=path,
        )
        model._backbone = backbone
        if "linear_probe.weight" in state:
            weight, bias = (state[f"linear_probe.{part}"].float().to(device) for part in ("weight", "bias"))
            model.linear = weight.flatten(1), bias
        return model

    @classmethod
    def load(cls, path, *, device="auto", weights=None, backbone=None) -> "Stego":
        """Read a saved model, or a checkpoint of the reference implementation (`cityscapes_vit_base_1.ckpt`).

        weights: a local file for its backbone, if not in the torch cache. backbone: the callable that the model was
        fitted on, if it was one.

        Raises FileNotFoundError, or ValueError if the file is no stego model or a damaged one.
        """
        state, device = _read_model(Path(path)), pick_device(device)
        if "state_dict" in state:
            return cls._released(state["state_dict"], path, device)
        try:
            code_size, channels = dict(state["head"])["linear.weight"].shape
            head = Head(channels, code_size, feature_weight=state["config"].get("feature_weight", 0.0))
            head.load_state_dict(state["head"])
            centers, share, palette = state["centers"], state["share"], state["palette"]
            names = state.get("names", [""] * len(share))  # models of version 0.1.0 have none
            _check_model(head, centers, share, palette, names, state["config"])
            model = cls(
                dict(state["config"]),
                head.requires_grad_(False).eval(),
                centers,
                share,
                palette=palette.numpy(),
                names=names,
                backbone_sha256=state["backbone_sha256"],
                device=device,
                weights=weights,
            )
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is a damaged stego model ({first_line(error)}); fit it again."
            ) from error
        if backbone is not None:
            model._backbone = model._checked(load_backbone(backbone, weights=weights, device=device))
        return model


# ---- options of a fit ------------------------------------------------------------------------------------------


def fit_config(
    *,
    classes: int | str,
    preset: str | None = None,
    balance: str | None = None,
    seed: int = 0,
    cache_size: float = CACHE_SIZE,
    **overrides,
) -> dict:
    """Every option of a fit under its name: the preset with what was overridden; ValueError for what cannot be."""
    balance = balance or ("fixed" if preset else "auto")
    ours = {} if preset else UNNAMED
    preset = preset or "small"
    if balance not in ("auto", "fixed"):
        raise ValueError(f"Unknown balance {balance!r}; choose auto or fixed.")
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}.")
    if unknown := overrides.keys() - PRESETS[preset].keys():
        raise ValueError(f"Unknown option {sorted(unknown)[0]!r}; a preset has {', '.join(PRESETS[preset])}.")
    if classes != "auto" and (not isinstance(classes, int) or not 1 <= classes <= MAX_CLASSES):
        raise ValueError(
            f"Got {classes} classes; a mask of 8 bits holds 1 to {MAX_CLASSES}, auto finds a number."
        )
    config = PRESETS[preset] | ours | {key: value for key, value in overrides.items() if value is not None}
    if config["views"] not in VIEWS:
        raise ValueError(f"Unknown views {config['views']!r}; choose one of: {', '.join(VIEWS)}.")
    if not 0 <= config["feature_weight"] < math.inf:
        raise ValueError(f"Got feature_weight {config['feature_weight']}; it is 0 or more.")
    if not 0 <= config["evenness"] <= 1:
        raise ValueError(f"Got evenness {config['evenness']}; it lies between 0 and 1.")
    weights = [config[f"lambda_{name}"] for name in BALANCE_TERMS]
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(
            f"Got the lambdas {', '.join(map(str, weights))}; each is 0 or more, at least one above 0."
        )
    for key in ("steps", "batch_size", "code_size"):
        if config[key] < 1:
            raise ValueError(f"Got {key} {config[key]}; it must be at least 1.")
    return dict(classes=classes, preset=preset, balance=balance, seed=seed, cache_size=cache_size, **config)


def _given(images) -> list[str]:
    """What a fit was given, for whoever looks for its images later; no absolute paths: they tell of a person's disk."""
    names = [str(each) for each in images]
    return [] if len(names) > GIVEN or any(map(os.path.isabs, names)) else names


def _earlier(match, network, device) -> Stego:
    """The model to match; ValueError if it sees other features."""
    earlier = match if isinstance(match, Stego) else Stego.load(match, device=device)
    if (earlier.backbone_sha256, earlier.head.linear.in_features) != (network.sha256, network.channels):
        raise ValueError(
            f"The model to match was fitted on {earlier.config['backbone']} weights "
            f"{earlier.backbone_sha256[:12]}…, this fit uses {network.name} {network.sha256[:12]}…; "
            "clusters are compared on the same features: choose that backbone, or do not match."
        )
    return earlier


def forked_random(device: torch.device):
    """Leave the caller's random generators as they are: the CPU's and the device's."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def pick_device(device="auto") -> torch.device:
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


# ---- maps of codes and scores ----------------------------------------------------------------------------------


def mirror_averaged(network, x: Tensor) -> Tensor:
    """Dense output of network for x (B, 3, H, W), averaged with that of the mirror image turned back."""
    return unmirror(network(torch.cat([x, x.flip(-1)])))


def unmirror(both: Tensor) -> Tensor:
    """Maps of images and then of their mirror images (2B, D, h, w) -> their average, upright (B, D, h, w)."""
    plain, mirrored = both.chunk(2)  # (B, D, h, w) each
    return (plain + mirrored.flip(-1)) / 2


def upsampled_strips(maps: Tensor, height: int, width: int):
    """Maps (C, h, w) upsampled bilinearly, in strips of rows: yields (rows, (C, rows, width)), in bounded memory."""
    channels, h, _ = maps.shape
    wide = F.interpolate(maps[None], size=(h, width), mode="bilinear", align_corners=False)[
        0
    ]  # (C, h, width)
    for rows in torch.arange(height).split(max(STRIP_VALUES // (width * channels), 1)):
        y = ((rows + 0.5) * h / height - 0.5).clamp(0, h - 1).to(maps.device)
        above = y.floor().long()
        below = (above + 1).clamp(max=h - 1)
        yield slice(rows[0], rows[-1] + 1), torch.lerp(wide[:, above], wide[:, below], (y - above)[:, None])


def upsampled_argmax(scores: Tensor, height: int, width: int) -> np.ndarray:
    """argmax over K of scores (K, h, w) upsampled bilinearly to (height, width) uint8.

    Scores linear in the codes may be upsampled in place of the codes: the length of a code scales all its scores.
    """
    mask = np.empty((height, width), np.uint8)
    for rows, strip in upsampled_strips(scores, height, width):  # (K, rows, width)
        mask[rows] = strip.max(0).indices.byte().cpu().numpy()  # ten times faster than argmax
    return mask


def class_scores(codes: Tensor, centers: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores for softmax: LOGIT_SCALE x cosine of codes (D, h, w), upsampled to size (H, W), to centres: (K, H, W)."""
    scores = codes.new_empty(len(centers), *size)
    for rows, strip in upsampled_strips(codes, *size):  # (D, rows, W)
        scores[:, rows] = LOGIT_SCALE * along(F.normalize(strip, dim=0)[None], centers)[0]
    return scores


def along(codes: Tensor, centers: Tensor) -> Tensor:
    """Dot products of codes (B, D, h, w) with centres (K, D): (B, K, h, w), cosines where both have length one."""
    return torch.einsum("bdhw,kd->bkhw", codes, centers)


def pixels(image) -> Tensor:
    """RGB picture -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W) uint8


# ---- model files -----------------------------------------------------------------------------------------------


def _check_model(head: Head, centers: Tensor, share: Tensor, palette: Tensor, names: list, config: dict):
    """ValueError for what no fit leaves behind, so that a damaged or forged file is found before it is used."""
    count, values = len(share), (centers, share, *head.state_dict().values())
    if (
        not 1 <= count <= MAX_CLASSES
        or centers.shape != (count, head.size)
        or share.shape != (count,)
        or palette.shape != (count, 3)
        or len(names) != count
    ):
        raise ValueError("shapes that do not fit each other")
    if palette.dtype != torch.uint8 or not all(x.is_floating_point() and x.isfinite().all() for x in values):
        raise ValueError("values that are not finite or not of the right type")
    known = isinstance(config, dict) and {"backbone", "classes", "preset", "steps", "seed"} <= config.keys()
    known = known and isinstance(config.get("stride"), (int, type(None)))  # models of version 0.1.0 have none
    if not known or not all(isinstance(name, str) for name in (*names, config["backbone"])):
        raise ValueError("an incomplete configuration")


def _read_model(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"No model at {path}; make one with `stego fit IMAGES`, or name one with -m.")
    try:
        state = read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a stego model; make one with `stego fit IMAGES`.") from error
    if (
        isinstance(state, dict)
        and isinstance(state.get("state_dict"), dict)
        and RELEASED_PATCH in state["state_dict"]
    ):
        return state
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a stego model; make one with `stego fit IMAGES`.")
    if state.get("version") != VERSION:
        raise ValueError(
            f"{path} is a stego model of version {state.get('version')}, this program reads "
            f"{VERSION}; install the matching stego or fit again."
        )
    return state
