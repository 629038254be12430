"""`tiny`: the bundled backbone, small enough to come with the package. How it was made: TINY.md, tools/pretrain.py.

The first layer is a learned dictionary of image patches with triangle activations (Coates, Lee & Ng 2011, "An
analysis of single-layer networks in unsupervised feature learning").
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, STRIDE = 8, 4  # pixels: side of a dictionary patch, and the step from one patch to the next


class Dictionary(nn.Module):
    """How near a patch is to each of `atoms` learned ones, pooled at several scales and projected.

    (B, 3, H, W) normalised images, H and W multiples of 8 -> (B, channels, H / 8, W / 8).
    scales: sides, in positions of 8 pixels, of the windows over which the activations are averaged.
    """

    patch = 8  # pixels

    def __init__(self, atoms: int = 256, channels: int = 128, *, scales: tuple = (1, 3, 7, 15)):
        super().__init__()
        self.atoms, self.channels, self.scales = atoms, channels, scales
        self.register_buffer("whiten", torch.zeros(3 * SIDE * SIDE, 3, SIDE, SIDE))
        self.register_buffer("whiten_bias", torch.zeros(3 * SIDE * SIDE))
        self.register_buffer("atom", torch.zeros(atoms, 3 * SIDE * SIDE))    # in whitened coordinates
        self.register_buffer("mean", torch.zeros(atoms * len(scales)))
        self.register_buffer("project", torch.zeros(channels, atoms * len(scales)))

    def forward(self, x: Tensor) -> Tensor:
        centred = self.pooled(x) - self.mean[:, None, None]                  # (B, scales * atoms, h, w)
        return F.conv2d(centred, self.project[:, :, None, None])             # (B, channels, h, w)

    def pooled(self, x: Tensor) -> Tensor:
        """Activations averaged over each window: (B, scales * atoms, h, w)."""
        codes = self.activations(x)
        return torch.cat([_box(codes, side) for side in self.scales], 1)

    def activations(self, x: Tensor) -> Tensor:
        """Triangle activations max(0, mean distance - distance to the atom): (B, atoms, h, w)."""
        margin = (SIDE - STRIDE) // 2
        x = F.pad(x, (margin,) * 4, mode="reflect")
        white = F.conv2d(x, self.whiten, self.whiten_bias, stride=STRIDE)    # (B, 192, 2h, 2w)
        dots = F.conv2d(white, self.atom[:, :, None, None])                  # (B, atoms, 2h, 2w)
        norms = white.square().sum(1, keepdim=True) + self.atom.square().sum(1)[:, None, None]
        distance = (norms - 2 * dots).clamp(min=0).sqrt()
        near = (distance.mean(1, keepdim=True) - distance).clamp(min=0)
        return F.avg_pool2d(near, self.patch // STRIDE)                      # (B, atoms, h, w)


def _box(x: Tensor, side: int) -> Tensor:
    """Mean over side x side windows, edges repeated; the size stays."""
    return F.avg_pool2d(F.pad(x, (side // 2,) * 4, mode="replicate"), side, stride=1) if side > 1 else x


class Tiny(Dictionary):
    """The bundled network; its weights lie beside this file."""

    def __init__(self):
        super().__init__(atoms=384, channels=192)
