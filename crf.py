"""A fully connected Gaussian CRF in pure torch, for the CPU and CUDA; mps tensors are computed on the CPU.

After Krähenbühl & Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials"
(NIPS 2011); the colour kernel runs on the lattice of Adams, Baek & Davis, "Fast High-Dimensional Filtering
Using the Permutohedral Lattice" (Eurographics 2010).

    dense_crf             image + class scores -> class probabilities that follow the image
    working_size          the size at which to run it on a large photo
    upsample_along_edges  its result at that size -> labels at the size of the photo
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# The kernel is the one of STEGO (ICLR 2022), appendix A.9 and A.10:
# compat exp(-|dp|^2 / 2 sxy^2 - |dI|^2 / 2 srgb^2) + smooth_compat exp(-|dp|^2 / 2 smooth_sxy^2)
ITERATIONS = 10
SXY = 67.0  # pixels
SRGB = 3.0  # levels of 0..255
COMPAT = 4.0  # weight
SMOOTH_SXY = 1.0  # pixels
SMOOTH_COMPAT = 3.0  # weight
NORM_EPS = 1e-20  # added to the kernel's row sums, as the authors' library does
TRUNCATE = 4.0  # sigmas at which the small Gaussian ends; what is left out is 6e-5 of its mass
MIN_SIGMA = 0.2  # pixels or levels; points 5 sigmas apart no longer meet in the lattice: less changes nothing
COLUMNS = 48  # classes of problems that share an image, computed side by side; more of them are slower again
STRIP = 25_000  # pixels processed at once on the CPU: their temporaries stay in cache
MAX_KEY = 2**62 - 1  # lattice vertices have int64 keys, and one bit is left for a mark
MAX_PIXELS = (2**31 - 1) // 6  # int32 indices, six vertices a pixel

MEGAPIXELS = 0.5  # working size for photos, 10^6 pixels
UPSAMPLE_SRGB = 10.0  # levels of 0..255; how far a pixel may be from a coarse neighbour it resembles
UPSAMPLE_FLOOR = 1e-3  # weight of coarse neighbours that bilinear interpolation leaves out
UPSAMPLE_PIXELS = 1 << 18  # full-size pixels processed at once

Message = Callable[[int, int], Tensor]  # what a kernel tells the pixels a..b, (b - a, C)
Kernel = Callable[[Tensor], Message]  # Q (N, C) -> the messages that follow from it


# ------------------------------------------------------------------------------------------ mean field


@torch.no_grad()
def dense_crf(
    image: Tensor,
    scores: Tensor,
    *,
    iterations: int = ITERATIONS,
    sxy: float = SXY,
    srgb: float = SRGB,
    compat: float = COMPAT,
    smooth_sxy: float = SMOOTH_SXY,
    smooth_compat: float = SMOOTH_COMPAT,
) -> Tensor:
    """Mean-field inference in a fully connected CRF with Potts compatibility.

    image   (3, H, W) or (B, 3, H, W) uint8, RGB 0..255.
    scores  (C, H, W) or (B, C, H, W), any float type: logits, that is minus the unary energies, up to a
            constant a pixel. For probabilities pass `probs.log()`; -inf marks a class as impossible there.
            One image (3, H, W) with scores (S, C, H, W) is S problems that share the image's kernels.
    sxy, srgb, compat            standard deviations (pixels, colour levels) and weight of the colour kernel.
    smooth_sxy, smooth_compat    the same for the small Gaussian. A weight of 0 leaves its kernel out.

    Returns probabilities in the shape of `scores`, float32; with both weights 0 that is `scores.softmax(0)`.
    Both kernels are normalised symmetrically and include the pixel itself, as in the authors' library.
    The images of a batch do not influence each other. Raises ValueError for anything else than the above.
    """
    _check_inputs(image, scores)
    _check_settings(iterations, compat, smooth_compat, sxy=sxy, srgb=srgb, smooth_sxy=smooth_sxy)
    H, W = image.shape[-2:]
    device = _supported_device(image.device)
    images = image.to(device).reshape(-1, 3, H, W)
    B = len(images)
    rows = B * H if device.type == "cuda" else min(B * H, max(1, STRIP // W))  # of pixels, at once
    delay = math.ceil(min(TRUNCATE * smooth_sxy, H) / rows)
    kernels: list[Kernel] = []
    if compat:
        kernels.append(_colour_kernel(images, sxy, srgb, compat))
    if smooth_compat:
        kernels.append(_smooth_kernel(B, H, W, rows, smooth_sxy, smooth_compat, device))
    problems = scores.to(device).reshape(-1, B, scores.shape[-3], H, W)  # (S, B, C, H, W); S or B is 1
    parts = problems.split(max(1, COLUMNS // scores.shape[-3]))
    q = [_mean_field(part, kernels, iterations, rows * W, delay) for part in parts]
    return torch.cat(q).reshape(scores.shape).to(scores.device)  # (S, B, C, H, W) at first


def _supported_device(device: torch.device) -> torch.device:
    """Where to compute: mps has neither embedding_bag nor adaptive pooling to any size."""
    return torch.device("cpu") if device.type == "mps" else device


def _mean_field(scores: Tensor, kernels: list[Kernel], iterations: int, strip: int, delay: int) -> Tensor:
    """Q <- softmax(scores + sum of K Q) (paper, Algorithm 1), strip by strip; a kernel turns Q into a
    function that returns the messages to pixels a..b. The small Gaussian reads Q of the `delay` strips before
    its own: a strip is overwritten that much later.

    scores and what is returned: (S, B, C, H, W). S problems of one image stand side by side in the columns of Q, so
    that the kernels look up each neighbour once for all of them."""
    S, B, C, H, W = scores.shape
    logits = scores.float().permute(1, 3, 4, 0, 2).contiguous().view(-1, S, C)  # (N, S, C), N = B H W
    q = logits.softmax(2)  # (N, S, C)
    if not torch.isfinite(q.sum()):  # one NaN spoils the sum; a test of each would need more memory
        raise ValueError("scores contain NaN, +inf or a pixel of -inf only; need a finite one at each pixel")
    for _ in range(iterations if kernels else 0):
        messages = [kernel(q.view(-1, S * C)) for kernel in kernels]
        waiting: list[tuple[Tensor, Tensor]] = []  # energies of strips, and where their Q goes
        for a in range(0, len(q), strip):
            b = min(a + strip, len(q))
            energy, *others = (message(a, b) for message in messages)  # (b - a, S C) each
            energy += logits[a:b].view(-1, S * C)
            for other in others:
                energy += other
            waiting.append((energy.view(-1, S, C), q[a:b]))
            while len(waiting) > (delay if b < len(q) else 0):
                energy, old = waiting.pop(0)
                torch.softmax(energy, 2, out=old)
    return q.view(B, H, W, S, C).permute(3, 0, 4, 1, 2)


def _colour_kernel(image: Tensor, sxy: float, srgb: float, weight: float) -> Kernel:
    """Bilateral kernel of Eq. 3 on the lattice, normalised by 1 / sqrt(row sum) on both sides."""
    B, _, H, W = image.shape
    sizes = (torch.arange(n, device=image.device) for n in (B, H, W))
    index, y, x = (t.reshape(-1) for t in torch.meshgrid(*sizes, indexing="ij"))  # (N,) each
    position = torch.stack([x, y], 1) / max(sxy, MIN_SIGMA)
    colour = image.permute(0, 2, 3, 1).reshape(-1, 3) / max(srgb, MIN_SIGMA)
    lattice = Lattice(torch.cat([position, colour], 1), index, B)

    ones = torch.ones(len(index), 1, device=image.device)
    scale = (lattice.slice(lattice.blur(ones), 0, len(ones)) + NORM_EPS).rsqrt_()  # (N, 1)
    lattice.splat_weight *= scale.view(-1).index_select(0, lattice.splat_pixel)
    lattice.slice_weight *= scale * weight

    return lambda q: partial(lattice.slice, lattice.blur(q))


def _smooth_kernel(
    B: int, H: int, W: int, rows: int, sigma: float, weight: float, device: torch.device
) -> Kernel:
    """Small Gaussian in two passes, both weighted sums of gathered rows: image rows, then pixels in a row."""
    above, vertical = _taps(H, B, sigma, device)  # (B H, T)
    beside, horizontal = _taps(W, rows, sigma, device)  # (rows W, T')
    horizontal *= weight

    def message(q: Tensor, a: int, b: int) -> Tensor:
        n = b - a
        top = a // W
        bottom = b // W
        x = _gather(q.view(B * H, -1), above[top:bottom], vertical[top:bottom])  # (rows, W C)
        return _gather(x.view(n, -1), beside[:n], horizontal[:n])  # (n, C)

    return lambda q: partial(message, q)


def _taps(n: int, copies: int, sigma: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The symmetrically normalised n x n Gaussian, `copies` times down the diagonal: columns and values of
    the entries in its rows, both (copies n, 2 radius + 1)."""
    radius = min(math.ceil(TRUNCATE * sigma), n - 1)
    step = torch.arange(-radius, radius + 1)
    other = torch.arange(n)[:, None] + step  # (n, 2 radius + 1)
    tap = torch.exp(-0.5 * (step / sigma) ** 2) * ((other >= 0) & (other < n))
    other = other.clamp_(0, n - 1)
    scale = tap.sum(1).rsqrt()
    tap = tap * scale[:, None] * scale[other]
    first = torch.arange(copies, device=device) * n
    other = first[:, None, None] + other.to(device)  # (copies, n, 2 radius + 1)
    return other.view(copies * n, -1).int(), tap.to(device).repeat(copies, 1)


def _gather(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sum over k of weight[i, k] table[index[i, k]]: (M, C), (n, T), (n, T) -> (n, C), in one fused pass."""
    n, taps = index.shape
    # explicit starts: for bags given as rows torch makes int64 ones, then copies them
    start = torch.arange(0, n * taps + 1, taps, dtype=index.dtype, device=index.device)  # (n + 1,)
    return _bags(table, index.view(-1), start, weight.view(-1))


def _bags(table: Tensor, index: Tensor, start: Tensor, w: Tensor) -> Tensor:
    """Weighted sums of rows of the table; the i-th is of index[start[i]:start[i + 1]]."""
    return F.embedding_bag(index, table, start, mode="sum", per_sample_weights=w, include_last_offset=True)


# ------------------------------------------------------------------------------- permutohedral lattice


class Lattice:
    """Gaussian filter with unit standard deviation over points in d dimensions (Adams et al. 2010, Sec. 3).

    In coordinates u = sqrt(2/3) T f, T T' = I + 1 1', the permutohedral lattice is the integer grid. Its
    simplices are the Freudenthal ones: from floor(u), step along the axes in the order of falling fractions.
    Its d + 1 blur directions are the axes and (1, ..., 1). sqrt(2/3) makes the variances of splat, blur and
    slice add up to 1. Constant factors are left out: normalisation takes them away.
    """

    def __init__(self, features: Tensor, index: Tensor, images: int) -> None:
        """features (N, d) in standard deviations; index (N,): which of the `images` a point belongs to."""
        N, d = features.shape
        T = math.sqrt(2 / 3) * torch.linalg.cholesky(torch.eye(d) + 1)
        u = features @ T.T.to(features)
        floor = u.floor()
        fraction, axis = (u - floor).sort(1, descending=True)  # (N, d)
        weights = [1 - fraction[:, :1], -fraction.diff(dim=1), fraction[:, -1:]]
        self.slice_weight = torch.cat(weights, 1)  # (N, d + 1)

        key, stride, size = _pack(floor, index, images)
        key = torch.cat([key[:, None], stride.take(axis)], 1).cumsum_(1)  # (N, d + 1), each point's simplex
        key, order = _sort(key.view(-1), size)
        first = F.pad(key[1:] != key[:-1], (1, 0), value=True)
        vertex = torch.empty_like(key, dtype=torch.int32)
        vertex.scatter_(0, order, first.cumsum(0, dtype=torch.int32) - 1)
        self.slice_vertex = vertex.view(N, d + 1)
        self.splat_pixel = order.div(d + 1, rounding_mode="floor").int()  # by vertex
        self.splat_weight = self.slice_weight.view(-1).index_select(0, order)
        start = first.nonzero().view(-1)  # (M,)
        self.splat_start = F.pad(start, (0, 2), value=len(key)).int()  # (M + 2,)
        key = key[start]
        self.neighbours = [_neighbours(key, step) for step in (*stride, stride.sum())]  # (M + 1, 3) each
        self.blur_weight = torch.tensor([1.0, 0.5, 0.5], device=key.device).repeat(len(key) + 1, 1)

    def blur(self, q: Tensor) -> Tensor:
        """Values of points (N, C) -> blurred values of vertices (M + 1, C); the last is a dummy, always 0."""
        table = _bags(q, self.splat_pixel, self.splat_start, self.splat_weight)
        for neighbours in self.neighbours:
            table = _gather(table, neighbours, self.blur_weight)
        return table

    def slice(self, table: Tensor, a: int, b: int) -> Tensor:
        """Values of the vertices -> values of the points a..b, (b - a, C)."""
        return _gather(table, self.slice_vertex[a:b], self.slice_weight[a:b])


def _pack(floor: Tensor, index: Tensor, images: int) -> tuple[Tensor, Tensor, int]:
    """Grid points (N, d) -> one int64 key each, linear in the coordinates; its strides (d,); how many.

    A coordinate's span leaves room for the simplex (+ 1) and for neighbours (- 1, + 2): keys never collide.
    """
    low = floor.amin(0) - 1  # (d,)
    high = floor.amax(0) + 2
    strides = []
    size = 1
    for span in (high - low + 1).tolist():
        strides.append(size)
        size *= int(span)
    if size * images > MAX_KEY:
        needs = f"{len(floor)} pixels and these sigmas need {size * images:.1e} lattice keys of {MAX_KEY:.1e}"
        raise ValueError(f"{needs}; use larger sxy or srgb, a smaller image or a smaller batch")
    key = index * size  # (N,)
    for column, step in zip((floor - low).T, strides):
        key += column.long() * step
    return key, torch.tensor(strides, device=floor.device), size * images


def _sort(key: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sorted keys and their order. On the CPU numpy sorts key and position as one int64 where both fit: half
    the time of torch's sort."""
    bits = len(key).bit_length()
    if key.device.type != "cpu" or size << bits > MAX_KEY:
        return key.sort(stable=True)
    packed = torch.from_numpy(np.sort(((key << bits) | torch.arange(len(key))).numpy()))
    return packed >> bits, packed & ((1 << bits) - 1)


def _neighbours(key: Tensor, step: Tensor) -> Tensor:
    """Rows (itself, next, previous) along one direction; M, the dummy, where there is none: (M + 1, 3)."""
    M = len(key)
    both = torch.cat([key * 2, (key + step) * 2 + 1])  # (2 M,): even, and what would be their next ones odd
    # numpy's stable sort merges the two sorted halves
    both = torch.from_numpy(np.sort(both.numpy(), kind="stable")) if both.is_cpu else both.sort()[0]
    meet = ((both[1:] ^ both[:-1]) == 1).nonzero().view(-1)  # positions of vertices that are a next one
    vertex = (both & 1).cumsum(0)[meet]  # the one before: its odd key has as many odd ones before it
    after = meet - vertex
    rows = torch.full((M + 1, 3), M, dtype=torch.int32, device=key.device)
    rows[:, 0] = torch.arange(M + 1, device=key.device)
    rows[vertex, 1] = after.int()
    rows[after, 2] = vertex.int()
    return rows


# ------------------------------------------------------------------------------------------ large photos


def working_size(size: tuple[int, int], *, megapixels: float = MEGAPIXELS) -> tuple[int, int]:
    """Size (H, W) of a photo -> the size (h, w) at which to run the CRF: same proportions, at most about
    `megapixels` million pixels, never larger than the photo. Raises ValueError unless all are positive."""
    H, W = size
    if H < 1 or W < 1 or not 0 < megapixels < math.inf:
        raise ValueError(f"got size {H} x {W} and {megapixels} megapixels; need positive numbers")
    scale = min(1.0, math.sqrt(megapixels * 1e6 / (H * W)))
    return max(1, round(H * scale)), max(1, round(W * scale))


@torch.no_grad()
def upsample_along_edges(image: Tensor, probs: Tensor, *, srgb: float = UPSAMPLE_SRGB) -> Tensor:
    """Labels at the image's size from class probabilities at a smaller one, edges where the image has them.

    Joint bilateral upsampling (Kopf et al. 2007): a pixel mixes the 3 x 3 nearest coarse pixels, weighted by
    how similar the colours are and as in bilinear interpolation; there five of them have weight 0, here
    UPSAMPLE_FLOOR, and so decide where none of the four nearest resembles the pixel.

    image  (3, H, W) uint8, RGB.
    probs  (C, h, w) float, not below 0, with h <= H, w <= W and C <= 256, on the same device.
    srgb   standard deviation of the colour weight, levels of 0..255.
    Returns (H, W) uint8, the most probable class. Extra memory is at most about 35 bytes a pixel, whatever C.
    """
    _check_upsampling(image, probs)
    _check_settings(srgb=srgb)
    C, h, w = probs.shape
    H, W = image.shape[1:]
    origin = probs.device
    device = _supported_device(origin)
    image = image.to(device)
    probs = probs.to(device)
    coarse = probs.max(0).indices  # (h, w); faster than argmax(0)
    if (h, w) == (H, W):
        return coarse.to(torch.uint8).to(origin)
    near_y, tent_y = _tent(H, h, device)
    near_x, tent_x = _tent(W, w, device)
    labels = coarse.to(torch.uint8)[near_y][:, near_x].reshape(-1)  # (H W,)
    # where all nine agree their mixture does too: only the borders of segments are left to compute
    border = _disagree(coarse)[near_y][:, near_x].reshape(-1).nonzero().view(-1)
    guide = F.adaptive_avg_pool2d(image.float(), (h, w)).view(3, -1).T  # (h w, 3)
    table = probs.permute(1, 2, 0).reshape(-1, C).float()  # (h w, C)
    step = torch.arange(-1, 2, device=device)
    for pixel in border.split(UPSAMPLE_PIXELS):
        y = pixel.div(W, rounding_mode="floor")  # (n,)
        x = pixel % W
        yy = (near_y[y, None] + step).clamp_(0, h - 1)  # (n, 3)
        xx = (near_x[x, None] + step).clamp_(0, w - 1)
        index = (yy[:, :, None] * w + xx[:, None]).view(-1, 9)  # (n, 9)
        space = (tent_y[y][:, :, None] * tent_x[x][:, None]).view(-1, 9) + UPSAMPLE_FLOOR
        colour = image[:, y, x].T.float()[:, None]  # (n, 1, 3)
        distance = (guide[index] - colour).square_().sum(2)  # (n, 9)
        similarity = torch.exp((distance.amin(1, keepdim=True) - distance) / (2 * srgb**2))
        labels[pixel] = _gather(table, index, space * similarity).argmax(1).to(torch.uint8)
    return labels.view(H, W).to(origin)


def _tent(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """n pixels over m coarse ones: the nearest coarse one (n,), and the bilinear weights of the one before,
    itself and the one after (n, 3)."""
    centre = ((torch.arange(n, device=device) + 0.5) * (m / n) - 0.5).clamp_(0, m - 1)
    near = centre.round().long()
    step = torch.arange(-1, 2, device=device)
    return near, (1 - (centre[:, None] - near[:, None] - step).abs()).clamp_(min=0)


def _disagree(labels: Tensor) -> Tensor:
    """(h, w) labels -> True where the 3 x 3 pixels around do not all have the same."""
    x = labels[None].float()
    return (F.max_pool2d(x, 3, 1, 1) != -F.max_pool2d(-x, 3, 1, 1))[0]


# ------------------------------------------------------------------------------------------ checks


def _check_tensors(image: Tensor, name: str, x: Tensor) -> None:
    for each, label in ((image, "image"), (x, name)):
        if not isinstance(each, Tensor):
            raise ValueError(f"{label} is a {type(each).__name__}; need a torch tensor: use torch.from_numpy")
    if image.device != x.device:
        raise ValueError(f"image is on {image.device}, {name} on {x.device}; need both on one device")
    if image.dtype != torch.uint8 or not x.is_floating_point():
        raise ValueError(f"image is {image.dtype}, {name} {x.dtype}; need uint8 0..255 and floating point")


def _check_inputs(image: Tensor, scores: Tensor) -> None:
    _check_tensors(image, "scores", scores)
    shape = tuple(image.shape)
    same = (*scores.shape[:-3], 3, *scores.shape[-2:])
    if scores.dim() not in (3, 4) or shape not in (same, same[-3:]) or 0 in scores.shape:
        raise ValueError(
            f"got image {shape} and scores {tuple(scores.shape)}; need (3, H, W) and (C, H, W) or (S, C, H, W), "
            "or (B, 3, H, W) and (B, C, H, W), of the same size and not empty"
        )
    if image[..., :1, :, :].numel() > MAX_PIXELS:
        raise ValueError(f"got image {shape}, over {MAX_PIXELS} pixels in one call; use smaller batches")


def _check_settings(iterations: int = 0, compat: float = 0, smooth: float = 0, **sigmas: float) -> None:
    if not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"got iterations={iterations!r}; need a whole number, 0 or more")
    for name, value in sigmas.items():
        if not 0 < value < math.inf:
            raise ValueError(f"got {name}={value}; need a standard deviation above 0")
    for name, value in (("compat", compat), ("smooth_compat", smooth)):
        if not 0 <= value < math.inf:
            raise ValueError(f"got {name}={value}; need a weight of 0 or more")


def _check_upsampling(image: Tensor, probs: Tensor) -> None:
    _check_tensors(image, "probs", probs)
    if image.dim() != 3 or len(image) != 3 or probs.dim() != 3 or not 1 <= len(probs) <= 256:
        got = f"got image {tuple(image.shape)} and probs {tuple(probs.shape)}"
        raise ValueError(f"{got}; need (3, H, W) and (C, h, w) with 1 to 256 classes")
    h, w = probs.shape[1:]
    H, W = image.shape[1:]
    if not (1 <= h <= H and 1 <= w <= W):
        raise ValueError(
            f"got probs of {h} x {w} for {H} x {W}; need them no larger than the image, not empty"
        )
    if torch.isnan(probs).any():
        raise ValueError("probs contain NaN; need a number for every class and pixel")
