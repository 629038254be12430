"""The branch of `tiny` that was taught by a transformer (tools/distill.py): what a place shows, beside how it looks.

Bottlenecks (He et al. 2016, "Deep residual learning"), each with squeeze and excitation (Hu et al. 2018), as far as
stride 16; there attention between all positions (Vaswani et al. 2017); its map is added to that of stride 8 (Lin et
al. 2017, "Feature pyramid networks").
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEM = 32  # channels at stride 2
WIDTHS = (48, 104, 168)  # channels at strides 4, 8 and 16
DEPTHS = (1, 3, 3)  # bottlenecks at those strides
SQUEEZE = 8  # channels of a bottleneck to one of its squeezed description
WIDTH = 192  # channels of the attention
ATTENTIONS = 3
HEADS = 4
WIDER = 3  # times the channels: between the two linear layers that follow the attention
NECK = 120  # channels where both strides meet


class Conv(nn.Module):
    """A convolution; the batch normalisation that it is trained with is folded into its weights afterwards."""

    def __init__(self, inputs: int, outputs: int, side: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, stride, padding=side // 2)
        self.norm: Any = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Excite(nn.Module):
    """Every channel times a number between 0 and 1, by what the whole image holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, width // SQUEEZE)
        self.excite = nn.Linear(width // SQUEEZE, width)

    def forward(self, x: Tensor) -> Tensor:
        whole = x.mean((2, 3))  # (B, width)
        share = torch.sigmoid(self.excite(F.relu(self.squeeze(whole))))
        return x * share[:, :, None, None]


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1 pixels, added to the input; stride 2 halves the sides."""

    def __init__(self, inputs: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.narrow = Conv(inputs, width // 2, 1)
        self.look = Conv(width // 2, width // 2, 3, stride=stride)
        self.widen = Conv(width // 2, width, 1)
        self.excite = Excite(width)
        # a last, odd row or column is a mean of its own: the convolution gives it a position as well
        self.halve = (
            nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        )
        self.skip = Conv(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.look(F.relu(self.narrow(x))))
        return F.relu(self.skip(self.halve(x)) + self.excite(self.widen(y)))


class Attention(nn.Module):
    """Self-attention and two linear layers, each added to the input; a depthwise convolution tells what is near."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDER * WIDTH)
        self.down = nn.Linear(WIDER * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.look(x)
        h, w = x.shape[2:]
        x = x.flatten(2).mT  # (B, h * w, WIDTH)
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, HEADS, h * w, WIDTH / HEADS) each
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(found)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x.mT.unflatten(2, (h, w))  # (B, WIDTH, h, w)


class Meaning(nn.Module):
    """(B, 3, H, W) normalised images, H and W multiples of 8 -> (B, channels, H / 8, W / 8)."""

    def __init__(self, channels: int = 128) -> None:
        super().__init__()
        self.stem = nn.ModuleList([Conv(3, STEM, 3, stride=2), Conv(STEM, WIDTHS[0], 3, stride=2)])
        self.at4 = _stage(WIDTHS[0], WIDTHS[0], DEPTHS[0], stride=1)
        self.at8 = _stage(WIDTHS[0], WIDTHS[1], DEPTHS[1], stride=2)
        self.at16 = _stage(WIDTHS[1], WIDTHS[2], DEPTHS[2], stride=2)
        self.enter = nn.Conv2d(WIDTHS[2], WIDTH, 1)
        self.attentions = nn.Sequential(*[Attention() for _ in range(ATTENTIONS)])
        self.fine = nn.Conv2d(WIDTHS[1], NECK, 1)
        self.coarse = nn.Conv2d(WIDTH, NECK, 1)
        self.mix = Conv(NECK, NECK, 3)
        self.leave = nn.Conv2d(NECK, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in self.stem:
            x = F.relu(conv(x))  # (B, WIDTHS[0], H / 4, W / 4) in the end
        fine = self.at8(self.at4(x))  # (B, WIDTHS[1], h, w)
        coarse = self.coarse(self.attentions(self.enter(self.at16(fine))))  # (B, NECK, h / 2, w / 2)
        coarse = coarse + coarse.mean((2, 3), keepdim=True)  # what the whole image holds
        coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
        return self.leave(F.relu(self.mix(F.relu(coarse + self.fine(fine)))))  # (B, channels, h, w)


def _stage(inputs: int, width: int, depth: int, *, stride: int) -> nn.Sequential:
    first = Bottleneck(inputs, width, stride=stride)
    return nn.Sequential(first, *[Bottleneck(width, width) for _ in range(depth - 1)])
