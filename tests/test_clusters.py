"""Clusters of an image: centres that follow its own codes."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cli_parts.outputs import Writer
from stego_parts.clusters import adapted_centers


def at_angles(degrees) -> torch.Tensor:
    """Unit vectors in the plane at these angles, (n, 2)."""
    angles = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin()], 1)


def as_map(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, D) as the codes (1, D, 1, n) of an image."""
    return rows.T[None, :, None]


def labels(rows: torch.Tensor, centers: torch.Tensor) -> list[int]:
    return (rows @ centers.T).argmax(1).tolist()


def test_without_a_weight_all_images_have_the_same_centers():
    centers, codes = F.normalize(torch.randn(5, 8), dim=1), torch.randn(1, 8, 6, 7)
    assert torch.equal(adapted_centers(codes, centers, 0.0), centers)


def test_an_image_whose_codes_lie_aside_is_still_cut_in_two():
    """Two things at 0 and 60 degrees, seen in an image where everything is turned by 25."""
    centers = at_angles([0, 60])
    rows = torch.cat([at_angles(torch.linspace(15, 35, 40)), at_angles(torch.linspace(75, 95, 40))])
    want = [0] * 40 + [1] * 40
    assert labels(rows, centers) != want
    assert labels(rows, adapted_centers(as_map(rows), centers, 8.0)) == want


def test_the_weight_is_that_of_the_whole_image():
    """A cluster with a quarter of the codes, at weight 8: two parts of their mean direction to one of its centre."""
    rows = at_angles([10.0] * 25 + [90.0] * 75)
    adapted = adapted_centers(as_map(7 * rows), at_angles([0, 90]), 8.0)  # the length of codes counts nothing
    turned = math.degrees(math.atan2(2 * math.sin(math.radians(10)), 1 + 2 * math.cos(math.radians(10))))
    torch.testing.assert_close(adapted, at_angles([turned, 90]))
    torch.testing.assert_close(adapted_centers(as_map(rows.repeat(4, 1)), at_angles([0, 90]), 8.0), adapted)


def test_a_cluster_that_is_not_in_an_image_stays():
    adapted = adapted_centers(as_map(at_angles([80, 85, 95])), at_angles([0, 90, 180]), 8.0)
    torch.testing.assert_close(adapted[[0, 2]], at_angles([0, 180]))


@pytest.fixture
def fixed(model):
    """The model, and the same one with one set of centres for all images."""
    other = type(model)(
        dataclasses.replace(model.config, adaptation=0.0),
        model.head,
        model.centers,
        model.share,
        backbone_sha256="",
    )
    other._backbone, other.backbone_sha256 = model.backbone, model.backbone_sha256
    return other


def test_a_model_segments_by_the_centers_of_the_image(model, fixed):
    assert model.config.adaptation > 0
    image = np.random.default_rng(0).integers(0, 90, (96, 96, 3), np.uint8)
    image[:, 48:] = Image.radial_gradient("L").resize((48, 96)).convert("RGB")
    assert (model.predict(image, crf=False) != fixed.predict(image, crf=False)).any()
    assert np.abs(model.probabilities(image, crf=False) - fixed.probabilities(image, crf=False)).max() > 0


def test_outputs_of_another_adaptation_are_not_those_of_this_one(model, fixed):
    one, other = (Writer(each, "mask", None, 0, {}).note for each in (model, fixed))
    assert one != other
