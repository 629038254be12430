"""STEGO: unsupervised semantic segmentation by distilling feature correspondences (Hamilton et al., ICLR 2022).

    model = Stego.fit("images", clusters=27)     # no labels needed
    mask = model.predict("img.jpg")              # (H, W) uint8, the cluster of each pixel
    model.save("stego.pt"); model = Stego.load("stego.pt")

The file follows the paper: hyper-parameters, nearest neighbours, correspondences and their loss (Sec. 3), the head and
its training, clusters, the model (Sec. 4). Training is a matter of minutes, unlike in the reference implementation:
nothing is augmented, so every crop passes through the frozen backbone exactly once, and the head starts from the
principal directions of what comes out.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kmeans import CosineKMeans
from stego_parts import clusters, running
from stego_parts.backbones import CUSTOM, load_backbone
from stego_parts.checkpoint import FitCheckpoint, FitRecord, Training, training_warning
from stego_parts.config import RELEASED, Config, fit_config, recluster_config, source_names
from stego_parts.features import RESOLUTION, TokenCache, dense_features, encode
from stego_parts.files import Sources, find_images, source_list
from stego_parts.images import Picture, distinct_colors, read_picture
from stego_parts.models import check_backbone, check_model, damaged, read_model, write_model
from stego_parts.optimizers import Adam
from stego_parts.running import Progress, from_first, no_progress, pick_device, to_device
from stego_parts.tiles import image_codes, label_image, tiles_of

log = logging.getLogger("stego")
Describe = Callable[[Tensor], Tensor]  # tokens (..., C) -> what is clustered (..., D)

POSITIONS = 121  # positions of an image that enter a step: 11 x 11 (Sec. 4)
NEIGHBORS = 7  # nearest neighbours x_knn is drawn from (Sec. 4)
DROPOUT = 0.1  # share of channels dropped (reference implementation)
# b's from the data: standard deviations from the mean correspondence.
SHIFTS = {"b_self": -0.5, "b_knn": -0.5, "b_rand": 2.0}
SHIFT_CROPS = 64  # crops whose correspondences set the b's
START_CROPS = 256  # crops from whose features a head starts; at random, as in the paper, takes more steps
START_LENGTH = 0.25  # of a row of its linear layer; at random 0.6
START_RANDOM = 0.1  # share of the random numbers that are left beside it
LOOK_EVERY = 10  # steps between two measurements of the codes' similarities
SIMILARITIES = 32_000_000  # similarities in memory at once: 128 MB
CLUSTER_ROWS = 100_000  # codes that k-means sees
CLUSTER_STARTS = 12  # of k-means: with three, mIoU swings by one to two points between seeds


# ---- nearest neighbours (Sec. 4: cosine similarity of averaged features) ---------------------------------------


def nearest_neighbors(
    means: Tensor, images: Tensor, count: int = NEIGHBORS, *, device: str | torch.device = "cpu"
) -> Tensor:
    """The `count` most similar other rows of unit rows (n, C) -> (n, min(count, n - 1)) int64, in bounded memory.

    images (n,): the image that each row is a crop of. Its other crops come last, as the loss compares an image with
    itself anyway. A single row is its own neighbour.
    """
    n = len(means)
    means = means.to(device)
    images = images.to(device)
    count = max(min(count, n - 1), 1)
    room = means.new_empty(min(max(SIMILARITIES // n, 1), n), n)  # reused: fresh memory costs a third more
    neighbors = []
    for rows in torch.arange(n, device=device).split(len(room)):
        similarity = torch.mm(means[rows], means.T, out=room[: len(rows)])  # (rows, n)
        similarity.masked_fill_(images[rows, None] == images, -2)  # below any cosine
        similarity[torch.arange(len(rows)), rows] = -torch.inf  # a crop is not its own neighbour
        neighbors.append(similarity.topk(count, dim=1).indices)
    return torch.cat(neighbors).cpu()


# ---- correspondences and their loss (Sec. 3.1, 3.2) ------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    """Vectors (..., C) to length one."""
    return F.normalize(x, dim=-1)


def correspondence(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every position of a with every position of b (Eq. 1): unit (B, P, C), (B, Q, C) -> (B, P, Q)."""
    return a @ b.transpose(-1, -2)


def centered(weight: Tensor) -> Tensor:
    """Each position's mean over the partner's positions taken off, the mean over everything added back (Eq. 3)."""
    return weight - weight.mean(-1, keepdim=True) + weight.mean()


def correlation_loss(
    f: Tensor, g: Tensor, s: Tensor, t: Tensor, b: float, *, centering: bool = True, zero_clamp: bool = True
) -> Tensor:
    """Codes that correspond where features do more than b (Eq. 3 and 4, as a mean): a scalar.

    f, g: unit features (B, P, C), (B, Q, C); s, t: their unit codes (B, P, D), (B, Q, D); b: the negative pressure.
    The published values of b want centering with the mean added back. No gradient flows through the features.
    """
    with torch.no_grad():
        weight = correspondence(f, g)  # (B, P, Q)
        weight = (centered(weight) if centering else weight) - b
    code = correspondence(s, t)
    return -(weight * (code.relu() if zero_clamp else code)).mean()  # relu: the 0-clamp of Sec. 3.2


def shifts_from_data(cache: TokenCache, neighbors: Tensor, config: Config) -> dict[str, float]:
    """The b's that are None, from the data: a fixed number of standard deviations from the mean correspondence.

    The published b's suit DINO's features and the data they were tuned on (App. A.11); where correspondences lie
    higher or lower, all codes collapse or scatter. Measured on SHIFT_CROPS crops, a neighbour and a random partner of
    each. SHIFTS was chosen by unsupervised mIoU in short runs on road scenes, aerial and natural images.
    """
    if None not in (config.b_self, config.b_knn, config.b_rand):
        return {}
    crops = torch.randperm(len(cache))[:SHIFT_CROPS]
    partners = {
        "b_self": crops,
        "b_knn": neighbors[crops, torch.randint(neighbors.shape[1], crops.shape)],
        "b_rand": crops.roll(1),
    }
    f = unit(cache.sample(crops, POSITIONS))  # (crops, P, C)
    shifts = {}
    for name, partner in partners.items():
        other = f if name == "b_self" else unit(cache.sample(partner, POSITIONS))
        weight = correspondence(f, other)  # (crops, P, P)
        weight = centered(weight) if config.centering else weight
        shifts[name] = float(weight.mean() + SHIFTS[name] * weight.std())
    return {name: b for name, b in shifts.items() if getattr(config, name) is None}


def derangement(count: int) -> Tensor:
    """A random permutation of 0..count-1 without a fixed point, uniform among them; count is at least 2."""
    shuffled = identity = torch.arange(count)
    while (shuffled == identity).any():  # one draw in e succeeds
        shuffled = torch.randperm(count)
    return shuffled


# ---- the segmentation head and its training (Sec. 3.3) ---------------------------------------------------------


class Head(nn.Module):
    """Features (..., P, C) -> codes (..., P, code_size): a linear layer plus a two-layer perceptron.

    The reference's 1 x 1 convolutions, written for positions in rows, so that it works on sampled positions alone.
    feature_weight: the weight of the features themselves, less their `mean` direction (C,), beside the codes in what is
    clustered: the cosine of two descriptions is the weighted mean of both cosines. 0: codes alone, as in the paper.
    """

    def __init__(self, channels: int, code_size: int, *, feature_weight: float = 0.0) -> None:
        super().__init__()
        self.feature_weight = feature_weight
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(channels) if feature_weight else None)
        self.linear = nn.Linear(channels, code_size)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, code_size))

    def forward(self, f: Tensor) -> Tensor:
        """Features (..., P, C) -> codes (..., P, code_size)."""
        return self.linear(drop_channels(f, self.training)) + self.mlp(drop_channels(f, self.training))

    @torch.no_grad()
    def start_from(self, f: Tensor) -> None:
        """Codes that correspond as features f (N, C) do, as far as so few numbers can: their principal directions."""
        f = unit(f)
        if self.feature_weight:
            self.mean.copy_(f.mean(0))
        directions = torch.linalg.eigh((f.T @ f).cpu().double()).eigenvectors.flip(1).T  # (C, C), in rows
        rows = directions[: self.linear.out_features]  # (<= code_size, C)
        self.linear.weight.zero_()[: len(rows)] = START_LENGTH * rows.to(f)
        for parameter in (self.linear.bias, *self.mlp[2].parameters()):
            parameter.mul_(START_RANDOM)

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


def drop_channels(f: Tensor, training: bool = True) -> Tensor:
    """Drop whole channels of an image (..., P, C): one draw for all its positions, the same on every device."""
    if not training:
        return f
    return f * to_device(F.dropout(torch.ones(*f.shape[:-2], 1, f.shape[-1]), DROPOUT), f.device)


def training_loss(head: nn.Module, f: Tensor, f_knn: Tensor, config: Config) -> Tensor:
    """The full loss (Eq. 5) of one batch: tokens of crops and of a neighbour each, (B, P, C), at random positions.

    A term whose lambda is 0 is not computed.
    """

    def term(name: str, f: Tensor, g: Tensor, s: Tensor, t: Tensor) -> Tensor:
        b = getattr(config, f"b_{name}")
        loss = correlation_loss(f, g, s, t, b, centering=config.centering, zero_clamp=config.zero_clamp)
        return getattr(config, f"lambda_{name}") * loss

    s = unit(head(f))  # (B, P, D)
    f = unit(drop_channels(f, head.training))
    loss = term("self", f, f, s, s) if config.lambda_self else 0 * s.sum()  # 0, but with a gradient
    if config.lambda_knn:
        s_knn = unit(head(f_knn))
        f_knn = unit(drop_channels(f_knn, head.training))
        loss = loss + term("knn", f, f_knn, s, s_knn)
    if config.lambda_rand and len(f) > 1:  # a lone crop has no random partner
        other = derangement(len(f)).to(f.device)
        loss = loss + term("rand", f, f[other], s, s[other])
    return loss


def train_head(
    cache: TokenCache,
    neighbors: Tensor,
    config: Config,
    *,
    progress: Progress = no_progress,
    checkpoint: FitCheckpoint | None = None,
) -> tuple[Head, list[dict]]:
    """Train a head on cached tokens and the table of neighbours (n, <= 7) of their crops.

    Returns it in eval mode, rounded to float16 as it is saved, and what `code_similarities` said now and then.
    checkpoint: where it is noted how far training has come, and from where it goes on if it has come some way.
    """
    channels = cache.tokens.shape[2]
    head = Head(channels, config.code_size, feature_weight=config.feature_weight).to(cache.device)
    head.start_from(cache.sample(torch.randperm(len(cache))[:START_CROPS], POSITIONS).flatten(0, 1))
    optimizer = Adam(head.parameters())
    run = Training(head, optimizer, config, len(cache), checkpoint)
    network = running.data_parallel(head)
    for step in range(run.step, run.steps):
        anchor = run.next_crops()
        partner = neighbors[anchor, torch.randint(neighbors.shape[1], anchor.shape)]
        f = cache.sample(anchor, POSITIONS)
        f_knn = cache.sample(partner, POSITIONS)
        loss = training_loss(network, f, f_knn, config)
        if step % LOOK_EVERY == 0 or step + 1 == run.steps:
            run.history.append({"step": step, "loss": loss.item()} | code_similarities(head, f, f_knn))
        loss.backward()
        optimizer.step(config.learning_rate_at(step))
        run.step = step + 1
        run.save()
        progress("training", run.step, run.steps)
    return head.half().float().requires_grad_(False).eval(), run.history


@torch.no_grad()
def code_similarities(head: Head, f: Tensor, f_knn: Tensor) -> dict[str, float]:
    """Mean code similarity of positions in an image, with its neighbour, with another image (cf. Fig. 14).

    f, f_knn: tokens (B, P, C). Returns {"self" | "knn" | "rand": mean}; a lone image has no other, no "rand".
    """
    head.eval()  # codes as they will be: no dropout
    s = unit(head(f))
    partners = {"self": s, "knn": unit(head(f_knn))}
    if len(f) > 1:
        partners["rand"] = s.roll(1, 0)
    head.train()
    return {name: float(correspondence(s, partner).mean()) for name, partner in partners.items()}


# ---- clusters (Sec. 3.3: cosine k-means on the codes) ----------------------------------------------------------


def cluster_codes(
    describe: Describe, cache: TokenCache, config: Config, *, progress: Progress = no_progress
) -> tuple[Tensor, Tensor]:
    """Clusters of the codes of random tokens, most used first: their centres (K, D) and share of the codes (K,).

    describe: tokens (..., C) to what is clustered, (..., D); `Head.describe` in a fit.
    config.evenness: 0 clusters the codes as they are; towards 1, crowded directions weigh less and rare things get
    centres.
    """
    progress("clusters", 0, 1)
    count = config.clusters
    codes = sample_codes(describe, cache, CLUSTER_ROWS)  # (N, D)
    if len(codes) < count:
        raise ValueError(
            f"{count} clusters are more than there are positions to cluster; ask for fewer or give more images."
        )
    kmeans = CosineKMeans(count, n_init=CLUSTER_STARTS, seed=config.seed)
    kmeans.fit(clusters.resample_by_density(codes, config.evenness))
    share = torch.bincount(kmeans.predict(codes), minlength=count) / len(codes)
    order = share.argsort(descending=True, stable=True)
    progress("clusters", 1, 1)
    return kmeans.cluster_centers_[order], share[order]


def sample_codes(describe: Describe, cache: TokenCache, count: int) -> Tensor:
    """Codes (N, D) of random positions, as many of each crop: about `count` in all, fewer where there are no more."""
    crops = torch.randperm(len(cache))[:count] if len(cache) > count else torch.arange(len(cache))
    each = min(max(count // len(crops), 1), cache.tokens.shape[1])
    return torch.cat([describe(cache.sample(part, each)).flatten(0, 1) for part in crops.split(256)])


# ---- the model -------------------------------------------------------------------------------------------------


class Stego:
    """A fitted model: a head and cluster centres over a frozen backbone.

    Learned: `head`, `centers` (K, D) unit rows, `share` (K,) of each cluster in the training images; `config` is the
    `Config` of the fit, `palette` (K, 3) uint8 the colours, `names` what a person calls the clusters ("" where not
    named); `backbone` is loaded when first used.
    """

    def __init__(
        self,
        config: Config,
        head: Head,
        centers: Tensor,
        share: Tensor,
        *,
        backbone_sha256: str,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config
        self.backbone_sha256 = backbone_sha256
        self.device = torch.device(device)
        self.head = head.to(device)
        self.centers = centers.to(device)
        self.share = share.cpu()
        self.palette = distinct_colors(len(centers))
        self.names = [""] * len(centers)
        self.weights: str | Path | None = None  # a local file of the backbone's
        self.linear: tuple[Tensor, Tensor] | None = None  # weight, bias: a released linear probe
        self.record: FitRecord | None = None
        self._backbone: Any = None

    @classmethod
    def fit(
        cls,
        images: Sources,
        *,
        preset: str | None = None,
        backbone: Any = None,
        weights: str | Path | None = None,
        device: str | torch.device = "auto",
        match: "Stego | None" = None,
        progress: Progress = no_progress,
        checkpoint: str | Path | None = None,
        sources: Sequence = (),
        **settings: Any,
    ) -> "Stego":
        """Find what recurs in images: files, folders (recursive) or glob patterns, one or several.

        preset: one of PRESETS; beside it any option of `Config`: clusters=27 (1 to 255), steps, seed, ...
        backbone: a name from `backbones.NAMES`, or "auto"; default: the preset's; weights: a local file for it. Or any
            callable that maps normalised images (B, 3, H, W) to features (B, C, h, w), see `load`.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "mps".
        match: an earlier model over the same backbone; clusters that recur keep their numbers, names, colours.
        progress: called as progress(stage, done, total).
        checkpoint: a folder for features and the state of the fit, from which the same fit goes on.
        sources: what the model notes as its images, if not `images`.

        Raises ValueError or FileNotFoundError with what was got, what is needed and what to do next.
        """
        named = None if callable(backbone) else backbone
        config = fit_config(preset, backbone=named, **settings)  # what is wrong shows before the work begins
        images = source_list(images)
        paths = fit_paths(images, config)
        device = pick_device(device)
        options: dict = dict(weights=weights, stride=config.stride, device=device)
        network = load_backbone(backbone or config.backbone, **options, progress=progress is not no_progress)
        known = dict(stride=network.patch, images=source_names(sources or images))
        config = config.on_backbone(network.name, **known)
        return fit_stages(config, paths, network, device, match, progress, checkpoint)

    def recluster(
        self,
        images: Sources = (),
        *,
        match: "Stego | None" = None,
        progress: Progress = no_progress,
        checkpoint: str | Path | None = None,
        sources: Sequence = (),
        **settings: Any,
    ) -> "Stego":
        """What the model has learned, clustered anew without training; a new model.

        images: as in `fit`; default: those of the fit, as far as the model notes them. settings: clusters, seed,
        evenness, adaptation, the rest stays. The other arguments are those of `fit`.
        """
        config = recluster_config(self.config, settings)
        given = source_list(images) or self.config.images
        if not given:
            raise ValueError("The model does not name the images of its fit; give images to cluster it on.")
        paths = fit_paths(given, config)
        config = replace(config, images=source_names(sources or given))
        return fit_stages(config, paths, self.backbone, self.device, match, progress, checkpoint, self.head)

    @property
    def backbone(self) -> Any:
        """The frozen backbone, loaded on first use; ValueError if its weights are not those the model was fitted on."""
        if self._backbone is None:
            name = self.config.backbone
            if name.startswith(CUSTOM):
                raise ValueError(
                    f"The model was fitted on {name.removeprefix(CUSTOM)}, a feature extractor given from Python, "
                    "which the file does not contain; give it again: Stego.load(path, backbone=...)."
                )
            network = load_backbone(name, weights=self.weights, device=self.device, stride=self.config.stride)
            self._backbone = check_backbone(network, self)
        return self._backbone

    # ---- names of clusters

    @property
    def labels(self) -> list[str]:
        """What to call each cluster: its name, or else its number."""
        return [name or str(k) for k, name in enumerate(self.names)]

    @property
    def merged(self) -> np.ndarray:
        """(K,) uint8: for each cluster the lowest of those with its name, itself if it has none."""
        labels = self.labels
        return np.array([labels.index(label) for label in labels], np.uint8)

    @property
    def colors(self) -> np.ndarray:
        """(K, 3) uint8: the colour of each cluster; clusters of one name have one."""
        return self.palette[self.merged]

    def rename(self, names: dict[int, str]) -> None:
        """Call clusters by these names; "" takes a name away. Clusters with one name are one: see `merged`."""
        for k, name in names.items():
            clusters.check_name(k, name, len(self.names))
        self.names = [str(names.get(k, name)) for k, name in enumerate(self.names)]  # also numpy's

    def select(self, wanted: Iterable[str]) -> list[int]:
        """The clusters that numbers or names mean, in any case: ["Road", "5"] -> [3, 5, 7] if 3 and 7 are called road.

        A number of a cluster that has a name means all of that name.
        """
        return clusters.select_clusters(self.labels, wanted)

    # ---- prediction

    @property
    def probe(self) -> clusters.Probe:
        """What tells the clusters by codes."""
        return clusters.Probe(self.centers, None, self.merged, self.config.adaptation)

    def features(self, x: Tensor) -> Tensor:
        """The backbone's features of normalised images: (B, 3, H, W) float -> (B, C, H / patch, W / patch)."""
        return dense_features(self.backbone, x, self.device, exact=self.config.preset == RELEASED)

    @torch.inference_mode()
    def codes(self, x: Tensor) -> Tensor:
        """Codes of normalised images, averaged with those of the mirror image (reference implementation).

        x: (B, 3, H, W) float, H and W multiples of the patch -> (B, D, H / patch, W / patch).
        """
        return clusters.mirror_averaged(x, self.features, self.head.on_map)[0]

    def read(self, image: Any) -> Picture:
        """A path, a PIL image or an array (H, W, 3) uint8 as the model sees it, in the bands that it was fitted on."""
        return read_picture(image, bands=self.config.bands)

    @torch.inference_mode()
    def predict(
        self,
        image: Any,
        *,
        crf: bool = True,
        crf_size: float = clusters.CRF_SIZE,
        progress: Progress = no_progress,
        **options: Any,
    ) -> np.ndarray:
        """Segment one image of any size: a mask (H, W) uint8 of cluster ids at the displayed size of the image.

        Of clusters that share a name, the mask has the lowest number; 255 where the image holds no data.

        Args:
            image: a path, a PIL image or an array (H, W, 3) uint8.
            resolution: pixels of the shorter side that the backbone sees, 320; finer segments at quadratic cost.
            tile: side in pixels of the parts in which a larger image is seen, each at `resolution`, in bounded memory;
                0: whole, None: as in the fit. progress: called as progress(stage, done, total) for those.
            smooth: a `FrameAverage`, if the image is the next frame of a video.
            crf: sharpen with a dense CRF; crf_size: the megapixels it works on, of larger images and tiles.
        """
        picture = self.read(image)
        codes, side = self._image_codes(picture.image, progress=progress, **options)
        probe = self.probe.adapted(codes, picture)

        def label(part: Any, part_codes: Tensor, megapixels: float) -> np.ndarray:
            return clusters.segment(part, [(part_codes, probe)], crf=crf, crf_size=megapixels)[0]

        return picture.masked(label_image(label, picture.image, codes, side, crf_size, progress=progress))

    @torch.inference_mode()
    def probabilities(
        self, image: Any, *, crf: bool = True, crf_size: float = clusters.CRF_SIZE, **options: Any
    ) -> np.ndarray:
        """Probability of each cluster at each pixel, (K, h, w) float32; the arguments are those of `predict`.

        (h, w) is the displayed size of the image where that is at most crf_size megapixels, else it is brought down
        to that many: bounded memory, 54 MB for 27 clusters at the default. 0 where the image holds no data.
        """
        picture = self.read(image)
        codes = self._image_codes(picture.image, **options)[0].float()  # (1, D, h, w)
        described = [(codes, self.probe.adapted(codes, picture))]
        shares = clusters.probabilities(picture.image, described, crf=crf, crf_size=crf_size)[0].cpu().numpy()
        return shares * picture.positions(*shares.shape[1:])

    def _image_codes(
        self,
        image: Any,
        *,
        resolution: int = RESOLUTION,
        tile: int | None = None,
        smooth: clusters.FrameAverage | None = None,
        progress: Progress = no_progress,
    ) -> tuple[Tensor, int]:
        """Codes (1, D, h, w) of one picture of any size, and the side of its tiles, 0 if it was seen whole."""
        tile = self.config.tile if tile is None else tile
        codes, side = image_codes(
            self.codes, image, tile, resolution=resolution, patch=self.backbone.patch, progress=progress
        )
        return smooth(codes) if smooth else codes, side

    # ---- the model file

    def save(self, path: str | Path) -> None:
        """Write the model: one file, a plain dict of tensors and values; without the backbone's weights."""
        if self.config.preset == RELEASED:
            raise ValueError(
                "This is a checkpoint of the reference implementation, which cannot be written again."
            )
        head = {key: value.half().cpu() for key, value in self.head.state_dict().items()}
        state = dict(config=asdict(self.config), head=head, centers=self.centers.cpu(), share=self.share)
        state |= dict(palette=torch.from_numpy(self.palette), names=self.names)
        write_model(state | dict(backbone_sha256=self.backbone_sha256), path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        weights: str | Path | None = None,
        backbone: Any = None,
    ) -> "Stego":
        """Read a saved model, or a checkpoint of the reference implementation (`cityscapes_vit_base_1.ckpt`).

        weights: a local file for its backbone, if not in the torch cache. backbone: the callable that the model was
        fitted on, if it was one.

        Raises FileNotFoundError, or ValueError if the file is no stego model or a damaged one.
        """
        state = read_model(Path(path))
        device = pick_device(device)
        config = state["config"]
        with damaged(path):
            head = Head(state["channels"], config.code_size, feature_weight=config.feature_weight)
            head.load_state_dict(state["head"])
            check_model(state, head)
        head = head.requires_grad_(False).eval()
        parts = {name: state[name] for name in ("centers", "share", "backbone_sha256")}
        model = cls(config, head, **parts, device=device)
        model.palette = state["palette"].numpy()
        model.names = list(state["names"])
        model.weights = weights
        if config.preset == RELEASED:  # which contains its backbone
            model._backbone = load_backbone(config.backbone, weights=path, device=device)
            model.backbone_sha256 = model._backbone.sha256
            model.weights = path
            model.linear = state["linear"] and tuple(part.float().to(device) for part in state["linear"])
        elif backbone is not None:
            model._backbone = check_backbone(load_backbone(backbone, weights=weights, device=device), model)
        return model


# ---- the stages of a fit ---------------------------------------------------------------------------------------


def fit_paths(images: Sources, config: Config) -> list:
    """The images that a fit sees, large ones in tiles."""
    return tiles_of([path for path, _ in find_images(images)], config.tile)


def fit_stages(
    config: Config,
    paths: Sequence,
    network: Any,
    device: torch.device,
    earlier: Stego | None,
    progress: Progress,
    checkpoint: str | Path | None,
    head: Head | None = None,
) -> Stego:
    """A fit in the paper's order: features, neighbours, balance, head, clusters; with a head, only its clusters."""
    if earlier:
        clusters.check_same_features(earlier, network)
    if running.process_count() > 1 and not checkpoint:
        raise ValueError("Several processes share one file of features: give a folder as `checkpoint`.")
    kept = FitCheckpoint(checkpoint, paths, network.sha256, config) if checkpoint else None
    devices = [device] if device.type == "cuda" else []  # whose random generators are left as they are
    with closing(kept) if kept else nullcontext(), torch.random.fork_rng(devices):
        if kept and not head:
            from_first(kept.begin)
        torch.manual_seed(config.seed)
        cache = encode(network, paths, config, device=device, progress=progress, checkpoint=kept)
        neighbors = torch.empty(len(cache), 0, dtype=torch.int64)
        history: list[dict] = []
        if head is None:
            torch.manual_seed(config.seed + running.rank())  # whether the features were new or not
            head, config, neighbors, history = learn(cache, config, device, progress, kept)
        torch.manual_seed(config.seed)  # whether the head was new or not
        centers, share = from_first(lambda: cluster_codes(head.describe, cache, config, progress=progress))
    config = replace(config, crops=len(cache))
    model = Stego(config, head, centers, share, backbone_sha256=network.sha256, device=device)
    model.record = FitRecord(list(paths), cache.images, cache.parts, neighbors, history)
    model._backbone = network
    if earlier:
        clusters.inherit_ids(model, earlier, clusters.match_clusters_to(earlier, model, cache))
    if warning := training_warning(history):
        log.warning(warning)
    return model


def learn(
    cache: TokenCache, config: Config, device: torch.device, progress: Progress, kept: FitCheckpoint | None
) -> tuple[Head, Config, Tensor, list[dict]]:
    """The head trained on cached features, the config with its b's, the table of neighbours (n, <= 7), the history."""
    progress("neighbors", 0, 1)
    neighbors = from_first(lambda: nearest_neighbors(cache.means, cache.images, device=device))
    progress("neighbors", 1, 1)
    config = replace(config, **from_first(lambda: shifts_from_data(cache, neighbors, config)))
    head, history = train_head(cache, neighbors, config, progress=progress, checkpoint=kept)
    return head, config, neighbors, history
