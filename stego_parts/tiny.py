"""`tiny`: the bundled backbone, small enough to come with the package. How it was made: TINY.md.

Two branches lie side by side, each of length 1 at every position: `Detail`, how a place looks, learned without labels
or a teacher (tools/pretrain.py), and `Meaning`, what a transformer sees in it (meaning.py, tools/distill.py). Of both
together the first principal directions are kept.

The first layer of the detail is a learned dictionary of image patches with triangle activations (Coates, Lee & Ng
2011, "An analysis of single-layer networks in unsupervised feature learning"), pooled at four scales. A convolutional
trunk of depthwise 7 x 7 blocks (Liu et al. 2022, "A ConvNet for the 2020s") reads it, and a linear map, learned in
closed form, weighs the directions of both by how well they are shared between neighbouring positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stego_parts.meaning import Meaning

SIDE = 8  # pixels: of a dictionary patch
STRIDE = 4  # pixels: from one patch to the next
SCALES = (1, 3, 7, 15)  # sides, in positions of 8 pixels, of the windows over which activations are averaged
LANES = 32  # positions that torch sums side by side; only strips of whole lanes give the same bits as the whole map
LEAST_ROWS = 4  # of a strip of distances, which stays in the processor's cache
CHANNELS_LAST = torch.channels_last  # ten times as fast to pool
MEANING_CHANNELS = 128
CHANNELS = 192  # principal directions of both branches together that are kept: 97 % of what varies


class Dictionary(nn.Module):
    """How near a patch is to each of `atoms` learned ones, pooled at four scales and projected.

    (B, 3, H, W) normalised images, H and W multiples of 8 -> (B, channels, H / 8, W / 8).
    dims: leading whitened directions that take part in the distance, 192 for all.
    """

    patch = 8  # pixels
    whiten: Tensor
    whiten_bias: Tensor
    atom: Tensor
    mean: Tensor
    project: Tensor

    def __init__(self, atoms: int = 256, channels: int = 128, *, dims: int = 3 * SIDE * SIDE):
        super().__init__()
        self.channels = channels
        self.register_buffer("whiten", torch.zeros(dims, 3, SIDE, SIDE))
        self.register_buffer("whiten_bias", torch.zeros(dims))
        self.register_buffer("atom", torch.zeros(atoms, dims))  # in whitened coordinates
        self.register_buffer("mean", torch.zeros(atoms * len(SCALES)))
        self.register_buffer("project", torch.zeros(channels, atoms * len(SCALES)))

    def forward(self, x: Tensor) -> Tensor:
        near = self.activations(x)
        # Projecting first and pooling then is the same, and pools far fewer channels.
        maps = [F.conv2d(near, part[:, :, None, None]) for part in self.project.chunk(len(SCALES), 1)]
        pooled = sum(_box(part, side) for part, side in zip(maps, SCALES))  # (B, channels, h, w)
        return (pooled - (self.project @ self.mean)[:, None, None]).contiguous()

    def pooled(self, x: Tensor) -> Tensor:
        """Activations averaged over each window: (B, scales * atoms, h, w)."""
        near = self.activations(x)
        return torch.cat([_box(near, side) for side in SCALES], 1)

    def activations(self, x: Tensor) -> Tensor:
        """Triangle activations max(0, mean distance - distance to the atom): (B, atoms, h, w)."""
        margin = (SIDE - STRIDE) // 2
        x = F.pad(x, (margin,) * 4, mode="reflect")
        white = F.conv2d(x, self.whiten, self.whiten_bias, stride=STRIDE)  # (B, dims, 2h, 2w)
        dots = F.conv2d(white, self.atom[:, :, None, None])  # (B, atoms, 2h, 2w)
        of_patches = white.square().sum(1, keepdim=True)  # (B, 1, 2h, 2w)
        of_atoms = self.atom.square().sum(1)[:, None, None]  # (atoms, 1, 1)
        rows = max(LANES // math.gcd(dots.shape[3], LANES), LEAST_ROWS)
        near = []
        for norm, dot in zip(of_patches.split(rows, 2), dots.split(rows, 2)):
            distance = (norm + of_atoms).sub_(dot.mul_(2)).clamp_(min=0).sqrt_()  # (B, atoms, rows, 2w)
            mean = distance.mean(1, keepdim=True)
            near.append(_halved(torch.sub(mean, distance, out=distance).clamp_(min=0)))
        return torch.cat(near, 2)


def _halved(x: Tensor) -> Tensor:
    """Mean over 2 x 2 windows, half as high and wide: in half the time of avg_pool2d, and the same bits."""
    upper = x[:, :, 0::2]  # (B, C, h, 2w)
    lower = x[:, :, 1::2]
    total = upper[..., 0::2] + upper[..., 1::2]  # (B, C, h, w)
    total += lower[..., 0::2]
    total += lower[..., 1::2]
    return total.div_(4)


def _box(x: Tensor, side: int) -> Tensor:
    """Mean over side x side windows, edges repeated; the size stays."""
    if side == 1:
        return x
    x = F.pad(x, (side // 2,) * 4, mode="replicate").contiguous(memory_format=CHANNELS_LAST)
    return F.avg_pool2d(F.avg_pool2d(x, (side, 1), stride=1), (1, side), stride=1)


class Block(nn.Module):
    """Depthwise 7 x 7 convolution, LayerNorm, two linear layers, added to the input."""

    def __init__(self, width: int):
        super().__init__()
        self.look = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.3))  # near identity: trains steadily

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.look(x).permute(0, 2, 3, 1))  # (B, h, w, width)
        y = self.down(F.gelu(self.up(y))) * self.scale
        return x + y.permute(0, 3, 1, 2)  # (B, width, h, w)


class Trunk(nn.Module):
    """(B, inputs, h, w) -> (B, width, h, w): the part of tiny that is trained by gradient descent."""

    def __init__(self, inputs: int, width: int, depth: int):
        super().__init__()
        self.enter = nn.Conv2d(inputs, width, 1)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.enter(x.contiguous(memory_format=CHANNELS_LAST)))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, width, h, w)


class Detail(nn.Module):
    """(B, 3, H, W) normalised images, H and W multiples of 8 -> (B, channels, H / 8, W / 8)."""

    patch = 8  # pixels

    def __init__(self, *, atoms: int = 384, width: int = 192, depth: int = 4, channels: int = 256):
        super().__init__()
        self.channels = channels
        self.dictionary = Dictionary(atoms, width, dims=64)
        self.trunk = Trunk(width, width, depth)
        self.head = nn.Conv2d(2 * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.levels(x))  # (B, channels, h, w)

    def levels(self, x: Tensor) -> Tensor:
        """What the head reads: dictionary and trunk features (B, 2 * width, h, w)."""
        found = self.dictionary(x)
        return torch.cat([found, self.trunk(found)], 1)


class Tiny(nn.Module):
    """The bundled network; its weights lie beside this file.

    (B, 3, H, W) float32, normalised with ImageNet's mean and deviation, H and W multiples of 8
    -> (B, channels, H / 8, W / 8).
    """

    patch = 8  # pixels

    def __init__(self) -> None:
        super().__init__()
        self.channels = CHANNELS
        self.detail = Detail()
        self.meaning = Meaning(MEANING_CHANNELS)
        self.join = nn.Conv2d(self.detail.channels + MEANING_CHANNELS, CHANNELS, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.branches(x))  # (B, channels, h, w)

    def branches(self, x: Tensor) -> Tensor:
        """Both branches side by side, each of length 1 at every position: (B, 256 + MEANING_CHANNELS, h, w)."""
        detail = F.normalize(self.detail(x), dim=1)  # (B, 256, h, w)
        meaning = F.normalize(self.meaning(x), dim=1)  # (B, MEANING_CHANNELS, h, w)
        return torch.cat([detail, meaning], 1)
