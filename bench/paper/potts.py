"""The CRF as a Potts model without a network (App. A.8, A.9, Fig. 13): a picture of both kinds of codes.

    python bench/paper/potts.py [--seed 7] [-o bench/paper/potts.jpg]

On a scene drawn by `stego_parts.scenes.draw_scene`: the picture, superpixels (discrete codes, each in the mean colour of its
pixels, and their borders), continuous codes of three numbers as red, green and blue.
"""

import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from crf import potts_codes  # noqa: E402
from stego_parts.drawing import overlay, strips  # noqa: E402
from stego_parts.images import write_image  # noqa: E402
from stego_parts.scenes import draw_scene  # noqa: E402

CLASSES, LENGTH = 24, 3


def superpixels(picture: Image.Image, labels: np.ndarray) -> Image.Image:
    """Each class in the mean colour of its pixels, with borders."""
    pixels = np.asarray(picture).reshape(-1, 3).astype(float)
    count = np.bincount(labels.ravel(), minlength=CLASSES)
    sums = np.stack([np.bincount(labels.ravel(), channel, CLASSES) for channel in pixels.T], 1)  # (K, 3)
    means = sums / count[:, None].clip(1)
    return overlay(picture, labels, means.astype(np.uint8), opacity=1)


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
    write_image(strips([("a drawn scene, discrete codes, continuous codes", pictures)], legend={}), output)


if __name__ == "__main__":
    main()
