"""The vision transformer of DINO (Caron et al. 2021) and DINOv2 (Oquab et al. 2023) for dense features.

Parameters have the names of the published state dicts, LayerScale is part of the layers before it (layouts.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of LayerNorm, as DINO and DINOv2 were trained
OFFSET = 0.1  # patches: what DINO adds to a grid's sides before it takes their ratio to the trained grid


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        c = channels
        self.norm1 = nn.LayerNorm(c, EPS)
        self.norm2 = nn.LayerNorm(c, EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(c, 3 * c), "proj": nn.Linear(c, c)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c, 4 * c), "fc2": nn.Linear(4 * c, c)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()  # (B, heads, N, C / heads) each
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](y)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    """(B, 3, H, W) normalised images, H and W multiples of the patch -> (B, C, H / patch, W / patch).

    spec: what BACKBONES says of it: channels, heads, patch, grid, registers, depth.
    """

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.patch = spec.patch
        self.channels = spec.channels
        self.grid = spec.grid
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, spec.channels, spec.patch, spec.patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + spec.grid**2, spec.channels))
        if spec.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, spec.registers, spec.channels))
        self.blocks = nn.ModuleList(Block(spec.channels, spec.heads) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.channels, EPS)
        self.prefix = 1 + spec.registers  # tokens before the patches'

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x)  # (B, C, h, w)
        batch, _, h, w = x.shape
        first = self.cls_token + self.pos_embed[:, :1]
        positions = self.positions(h, w)
        if self.prefix > 1:
            first = torch.cat([first, self.register_tokens], 1)  # (1, 1 + registers, C)
        x = torch.cat([first.expand(batch, -1, -1), x.flatten(2).transpose(1, 2) + positions], 1)
        for block in self.blocks:
            x = block(x)  # (B, 1 + registers + h * w, C)
        return self.norm(x[:, self.prefix :]).transpose(1, 2).unflatten(2, (h, w))

    def positions(self, h: int, w: int) -> Tensor:
        """Position embeddings of the patches, (1, h * w, C), bicubic from the trained grid.

        The originals differ: DINO and DINOv2 scale by the ratios of h + 0.1 and w + 0.1 to the grid's side,
        DINOv2 with registers to the size itself, with antialiasing.
        """
        trained = self.pos_embed[:, 1:]
        if h == w == self.grid:
            return trained
        square = trained.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (1, C, grid, grid)
        if self.prefix > 1:
            square = F.interpolate(square, (h, w), mode="bicubic", antialias=True)  # (1, C, h, w)
        else:
            ratios = ((h + OFFSET) / self.grid, (w + OFFSET) / self.grid)
            square = F.interpolate(square, scale_factor=ratios, mode="bicubic")  # (1, C, h, w)
        return square.flatten(2).transpose(1, 2)
