"""From codes to a mask: scores, the centres that follow an image, frames, numbers kept between models."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cli_parts.outputs import Writer
from stego import Stego, unit
from stego_parts import clusters, features
from stego_parts.clusters import (
    FRAME_WEIGHT,
    FrameAverage,
    adapted_centers,
    inherit_ids,
    match_clusters_to,
    upsampled_argmax,
)
from stego_parts.config import Config
from stego_parts.features import TokenCache, encode


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
    one, other = (Writer(each, "mask", None, 0, {}).made_with for each in (model, fixed))
    assert one != other


def test_the_average_is_exponential():
    average, codes = (
        FrameAverage(),
        F.normalize(torch.randn(3, 1, 5, 2, 2), dim=2) * 0.1 + torch.eye(5)[0].view(5, 1, 1),
    )
    expected = codes[0]
    for each in codes:
        expected = (1 - FRAME_WEIGHT) * expected + FRAME_WEIGHT * each
        assert torch.allclose(average(each), expected)
    moved = codes[0].clone()
    moved[..., 0, 1] *= -1
    after = average(moved)
    assert torch.equal(after[..., 0, 1], moved[..., 0, 1])  # something else is there
    assert torch.allclose(after[..., 1, :], ((1 - FRAME_WEIGHT) * expected + FRAME_WEIGHT * moved)[..., 1, :])
    wider = torch.randn(1, 5, 2, 3)
    assert torch.equal(average(wider), wider)


def test_clusters_correspond_by_what_they_cover(scenes, model):
    cache = encode(model.backbone, sorted(scenes.rglob("*.png"))[:3], Config(views="whole"))
    other = Stego(model.config, model.head, model.centers[[2, 0, 1]], model.share, backbone_sha256="")
    assert match_clusters_to(model, other, cache) == {0: 2, 1: 0, 2: 1}


def test_a_small_part_of_a_cluster_is_not_the_cluster(model):
    """Directions in the plane: half a circle is no twelfth of it, but nearly the half turned."""
    head = torch.nn.Identity()
    head.describe = head.forward  # what is clustered: points themselves

    def around(count, turned=0.0):
        angle = torch.arange(count) * (2 * torch.pi / count) + turned
        directions = torch.stack([angle.cos(), angle.sin()], 1)
        return Stego(model.config, head, directions, torch.ones(count), backbone_sha256="")

    cache = TokenCache(1, 1, 720, 2)
    cache.add(0, around(720, 0.001).centers.T[None, :, None])  # (1, 2, 1, 720)
    cache.finalize()
    assert match_clusters_to(around(2), around(12), cache) == {}
    assert match_clusters_to(around(2), around(2, 0.5), cache) == {0: 0, 1: 1}
    assert match_clusters_to(around(2), around(2, 0.5 + torch.pi), cache) == {0: 1, 1: 0}


def test_the_earlier_model_may_be_on_another_device(model):
    """As one that `load` put onto a GPU beside a fit on the CPU; here on "meta", whose tensors have no values."""

    class Elsewhere(torch.nn.Identity):
        def describe(self, tokens):
            assert tokens.device.type == "meta"
            return torch.tensor([[0.0, 1.0]]).expand(len(tokens), 2)

    head = torch.nn.Identity()
    head.describe = head.forward
    new = Stego(model.config, head, torch.eye(2), torch.ones(2), backbone_sha256="")
    earlier = Stego(model.config, Elsewhere(), torch.eye(2), torch.ones(2), backbone_sha256="")
    earlier.device = torch.device("meta")
    cache = TokenCache(1, 1, 4, 2)
    cache.add(0, torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2))
    cache.finalize()
    assert match_clusters_to(earlier, new, cache) == {0: 1}


@pytest.mark.parametrize(
    "classes, same, shares, names",
    [
        (3, {0: 1}, [1, 0, 2], ["", "b", ""]),
        (3, {}, [0, 1, 2], ["", "", ""]),
        (2, {1: 2}, [0, 1], ["", "c"]),  # number 2 is gone, the name stays
        (4, {3: 0, 0: 2}, [3, 1, 0, 2], ["a", "", "c", ""]),
    ],
)
def test_take_over(model, classes, same, shares, names):
    earlier = Stego(model.config, model.head, model.centers, model.share, backbone_sha256="")
    earlier.names = ["a", "b", "c"]
    new = Stego(model.config, model.head, torch.eye(classes, 70), torch.arange(classes), backbone_sha256="")
    inherit_ids(new, earlier, same)
    assert new.names == names
    assert new.share.tolist() == shares and new.centers.argmax(1).tolist() == shares
    colours = {tuple(colour) for colour in new.palette.tolist()}
    assert len(colours) == classes
    for m in same.values():
        assert tuple(earlier.palette[m]) in colours
    assert len(colours & {tuple(colour) for colour in earlier.palette.tolist()}) == len(same)


def test_many_clusters_still_have_colours(model):
    full = Stego(model.config, model.head, torch.eye(255), torch.ones(255), backbone_sha256="")
    new = Stego(model.config, model.head, torch.eye(255), torch.ones(255), backbone_sha256="")
    inherit_ids(new, full, {k: 254 - k for k in range(100)})
    assert len({tuple(colour) for colour in new.palette.tolist()}) == 255


def test_class_scores_are_cosines_of_upsampled_codes(monkeypatch):
    monkeypatch.setattr(clusters, "BLOCK_VALUES", 500)  # strips of a few rows
    codes, centers = torch.randn(5, 6, 7), unit(torch.randn(4, 5))
    wide = F.normalize(
        F.interpolate(codes[None], size=(33, 47), mode="bilinear", align_corners=False)[0], dim=0
    )
    want = clusters.LOGIT_SCALE * torch.einsum("dhw,kd->khw", wide, centers)
    assert torch.allclose(clusters.Probe(centers).logits(codes[None], (33, 47)), want, atol=1e-5)


def test_upsampled_argmax_equals_upsampling_everything(monkeypatch):
    monkeypatch.setattr(clusters, "BLOCK_VALUES", 300)  # strips of a few rows
    scores = torch.randn(5, 6, 7)
    want = F.interpolate(scores[None], size=(33, 47), mode="bilinear", align_corners=False)[0].argmax(0)
    assert (upsampled_argmax(scores, 33, 47) == want.numpy()).mean() > 0.999


def test_labels_are_those_of_upsampled_codes(model):
    """Upsampling cosine numerators and taking the argmax is upsampling codes and then comparing with centres."""
    image = np.random.default_rng(1).integers(0, 256, (96, 128, 3), np.uint8)
    x = features.to_tensor(Image.fromarray(image).resize((256, 192), Image.Resampling.BILINEAR))[None]
    centers = model.probe.adapted(model.codes(x)).weight
    codes = F.interpolate(model.codes(x), size=(96, 128), mode="bilinear", align_corners=False)
    want = torch.einsum("bdhw,kd->bkhw", F.normalize(codes, dim=1), centers).argmax(1)[0]
    assert (model.predict(image, crf=False, resolution=192) == want.numpy()).mean() > 0.999
