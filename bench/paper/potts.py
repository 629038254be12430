"""The CRF as a Potts model without a network (App. A.8, A.9, Fig. 13): a picture of both kinds of codes.

    python bench/paper/potts.py [--seed 7] [-o bench/paper/potts.jpg]

On a drawn scene: the picture, superpixels (discrete codes, each in the mean colour of its pixels, and their borders),
continuous codes of three numbers as red, green and blue.
"""

import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from cli_parts.demo import draw_scene
from cli_parts.drawing import Clusters, image_rows, overlay
from crf import COMPAT, SMOOTH_COMPAT, SMOOTH_SXY
from stego_parts.images import write_image

CLASSES, LENGTH = 24, 3
POTTS_STEPS, POTTS_RATE = 400, 0.2  # steps of Adam, and its learning rate
POTTS_SXY, POTTS_SRGB = 30.0, 20.0  # pixels, levels: by eye; 67 and 3 leave textured pixels without partners
POTTS_SQUARES, POTTS_BATCH = 512, 128  # squares of 2 x 2 pixels that get codes first; of them in a step
POTTS_NOISE = 0.1  # standard deviation of the first codes
POTTS_STRIP = 4096  # pixels compared with those at once


@torch.no_grad()
def potts_codes(
    image: Tensor,
    size: int,
    *,
    discrete: bool = True,
    steps: int = POTTS_STEPS,
    shift: float | None = None,
    sxy: float = POTTS_SXY,
    srgb: float = POTTS_SRGB,
    compat: float = COMPAT,
    smooth_sxy: float = SMOOTH_SXY,
    smooth_compat: float = SMOOTH_COMPAT,
    seed: int = 0,
) -> Tensor:
    """The CRF's kernel as a Potts model of its own: codes of pixels, learned from the image alone (STEGO, A.8, A.9).

    Minimises the energy - sum over pairs of (kernel - shift) * alike; alike is q_i . q_j for the probabilities of
    discrete codes, max(cosine, 0) for continuous ones, the kernel that of `dense_crf` before normalisation. First by
    Adam for a few thousand pixels, on mini-batches of their pairs; then each pixel of the image takes the code of
    least energy towards them (continuous ones: but for the clamp). Without the shift all pixels would end up in one
    code.

    image     (3, H, W) or (B, 3, H, W) uint8, RGB 0..255; the images of a batch have nothing to do with each other.
    size      number of classes, or the length of a continuous code. With classes to spare, regions that differ
              rarely end up in one.
    discrete  superpixels: probabilities of classes, which add up to 1; else unit vectors, alike where pixels belong
              together.
    shift     pixels whose kernel value, 0 to 7, is less push apart; larger: more and smaller segments. The default is
              the kernel's mean over the pixels drawn: as much push as pull.

    Returns (size, H, W) or (B, size, H, W) float32; same seed and device, same codes.
    """
    settings = dict(sxy=sxy, srgb=srgb, compat=compat, smooth_sxy=smooth_sxy, smooth_compat=smooth_compat)
    if image.dim() == 4:
        return torch.stack(
            [
                potts_codes(one, size, discrete=discrete, steps=steps, shift=shift, seed=seed, **settings)
                for one in image
            ]
        )
    _, H, W = image.shape
    colour = image.permute(1, 2, 0).reshape(-1, 3).float()  # (N, 3)
    place = torch.cartesian_prod(torch.arange(H), torch.arange(W)).to(colour)  # (N, 2)
    generator, scaled = torch.Generator().manual_seed(seed), F.softmax if discrete else F.normalize
    drawn = _squares(H, W, generator).to(image.device)  # (n, 4)

    def kernel(some, others):
        return _pair_kernel(place[some], colour[some], place[others], colour[others], **settings)

    if shift is None:
        shift = kernel(drawn.flatten(), drawn.flatten()).mean()

    def coupling(some, others):
        return kernel(some, others) - shift

    codes = scaled(_potts_minimum(drawn, coupling, size, scaled, steps, generator), dim=1)  # (4 n, size)
    fields = [coupling(some, drawn.flatten()) @ codes for some in torch.arange(H * W).split(POTTS_STRIP)]
    return scaled(torch.cat(fields), dim=1).T.reshape(size, H, W)


def _squares(H: int, W: int, generator) -> Tensor:
    """Indices of random squares of 2 x 2 pixels, in which neighbours meet, about which the small kernel is: (n, 4)."""
    count = min(POTTS_SQUARES, H * W)
    y, x = (torch.randint(max(n - 1, 1), (count, 1), generator=generator) for n in (H, W))
    step = torch.arange(2)
    y, x = (y + step).clamp(max=H - 1), (x + step).clamp(max=W - 1)  # (n, 2) each
    return (y[:, :, None] * W + x[:, None]).flatten(1)


@torch.enable_grad()
def _potts_minimum(drawn: Tensor, coupling, size: int, scaled, steps: int, generator) -> Tensor:
    """Codes before scaling of the pixels drawn (n, 4), as rows (4 n, size)."""
    codes = POTTS_NOISE * torch.randn(*drawn.shape, size, generator=generator)
    codes = codes.to(drawn.device).requires_grad_()  # (n, 4, size)
    optimizer = torch.optim.Adam([codes], lr=POTTS_RATE)
    for _ in range(steps):
        batch = torch.randperm(len(drawn), generator=generator)[:POTTS_BATCH].to(drawn.device)
        pixel, s = drawn[batch].flatten(), scaled(codes[batch].flatten(0, 1), dim=1)
        energy = -(coupling(pixel, pixel) * (s @ s.T).relu()).mean()
        optimizer.zero_grad()
        energy.backward()
        optimizer.step()
    return codes.detach().flatten(0, 1)


def _pair_kernel(
    place: Tensor,
    colour: Tensor,
    places: Tensor,
    colours: Tensor,
    *,
    sxy: float,
    srgb: float,
    compat: float,
    smooth_sxy: float,
    smooth_compat: float,
) -> Tensor:
    """Both kernels of pixels with others, not normalised: places (n, 2), (m, 2), colours (n, 3), (m, 3) -> (n, m)."""
    both = torch.cdist(
        torch.cat([place / sxy, colour / srgb], 1), torch.cat([places / sxy, colours / srgb], 1)
    )
    near = torch.cdist(place / smooth_sxy, places / smooth_sxy)
    return sum(
        distance.square_().mul_(-0.5).exp_().mul_(weight)
        for distance, weight in ((both, compat), (near, smooth_compat))
    )


def superpixels(picture: Image.Image, labels: np.ndarray) -> Image.Image:
    """Each class in the mean colour of its pixels, with borders."""
    pixels = np.asarray(picture).reshape(-1, 3).astype(float)
    count = np.bincount(labels.ravel(), minlength=CLASSES)
    sums = np.stack([np.bincount(labels.ravel(), channel, CLASSES) for channel in pixels.T], 1)  # (K, 3)
    means = sums / count[:, None].clip(1)
    return overlay(picture, labels, Clusters(means.astype(np.uint8)), opacity=1)


@click.command()
@click.option("--seed", default=7)
@click.option("-o", "--output", default=Path(__file__).with_name("potts.jpg"), type=Path)
def main(seed, output):
    picture, _ = draw_scene(seed)
    image, began = torch.from_numpy(np.array(picture)).permute(2, 0, 1), time.monotonic()
    discrete = potts_codes(image, CLASSES).argmax(0).byte().numpy()
    between = time.monotonic()
    codes = potts_codes(image, LENGTH, discrete=False)  # (3, H, W), unit vectors
    print(
        f"discrete {between - began:.0f} s, {len(np.unique(discrete))} classes used; "
        f"continuous {time.monotonic() - between:.0f} s"
    )
    colours = Image.fromarray(((codes + 1) * 127.5).byte().permute(1, 2, 0).numpy())
    pictures = [picture, superpixels(picture, discrete), colours]
    write_image(image_rows([("a drawn scene, discrete codes, continuous codes", pictures)]), output)


if __name__ == "__main__":
    main()
