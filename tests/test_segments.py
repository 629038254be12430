"""Regions of a mask as COCO's run lengths, outlines, tables and LabelMe files."""

import numpy as np
import pytest
from conftest import FAST, mask_of, run
from scipy import ndimage

from cli_parts.segments import Region, cluster_shares, coco_annotations, outline, regions, run_lengths
from stego_parts.images import IGNORE


def decode(segmentation):
    """COCO's run lengths read back, from the format's description: the test's own reading."""
    runs, values, value, shift = [], segmentation["counts"].encode(), 0, 0
    for byte in values:
        group = byte - 48
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (1 << shift) if group & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    flat = np.concatenate([np.full(run, i % 2, bool) for i, run in enumerate(runs)])
    return flat.reshape(segmentation["size"], order="F")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.5, 0.97, 1.0])
def test_run_lengths_are_read_back(share):
    """Of regions anywhere in an image: those that reach from its top to its bottom go on from column to column."""
    segment = np.random.default_rng(0).random((67, 301)) < share
    for height, x, y in ((67, 0, 0), (67, 40, 0), (90, 5, 0), (90, 5, 23), (100, 300, 11)):
        image = np.zeros((height, 700), bool)
        image[y : y + 67, x : x + 301] = segment
        assert np.array_equal(decode(run_lengths(Region(0, x, y, segment), image.shape)), image)


def noise(seed: int, sigma: float) -> np.ndarray:
    """A mask of three clusters with regions in all shapes, with holes, islands and pixels that touch at corners."""
    scores = np.random.default_rng(seed).normal(size=(3, 60, 80))
    return ndimage.gaussian_filter(scores, (0, sigma, sigma)).argmax(0).astype(np.uint8)


def full(region: Region, inside: np.ndarray, size=(60, 80)) -> np.ndarray:
    whole, (h, w) = np.zeros(size, bool), inside.shape
    whole[region.y : region.y + h, region.x : region.x + w] = inside
    return whole


@pytest.mark.parametrize("sigma", [0, 1, 3])
def test_run_lengths_are_those_of_pycocotools(sigma):
    masks = pytest.importorskip("pycocotools.mask")
    mask = noise(sigma, sigma)
    for region in [Region(0, 0, 0, mask == 0), *regions(mask)]:
        whole = full(region, region.inside)
        wanted = masks.encode(np.asfortranarray(whole.astype(np.uint8)))
        assert run_lengths(region, mask.shape)["counts"] == wanted["counts"].decode()


@pytest.mark.parametrize("sigma", [0, 1, 3])
def test_outlines_go_round_their_regions(sigma):
    """pycocotools fills an outline with its region and all holes in it; of those that touch at a corner, no more."""
    masks = pytest.importorskip("pycocotools.mask")
    mask = noise(sigma, sigma)
    for region in regions(mask):
        ring = outline(region)
        steps = np.roll(ring, -1, 0) - ring
        assert ((steps == 0).sum(1) == 1).all() and (ring >= 0).all() and (ring <= (80, 60)).all()
        assert ((steps[:, 0] == 0) != (np.roll(steps, 1, 0)[:, 0] == 0)).all()  # a corner at each point
        holes = ndimage.binary_fill_holes(np.pad(region.inside, 1), np.ones((3, 3)))[1:-1, 1:-1]
        encoded = masks.frPyObjects([ring.ravel().tolist()], 60, 80)
        assert np.array_equal(masks.decode(encoded)[..., 0], full(region, holes))


@pytest.mark.parametrize("least", [0, 20])
def test_coco_file_is_read_by_pycocotools(here, scenes, named, least):
    coco = pytest.importorskip("pycocotools.coco")
    run("predict", scenes / "sub", "-o", "found.json", "--format", "coco", "--min-area", least, *FAST)
    run("predict", scenes / "sub", "-o", "masks", *FAST)
    read = coco.COCO("found.json")
    categories = {k: each["name"] for k, each in read.cats.items()}
    assert len(read.imgs) == 4 and categories == {1: "sky", 2: "1", 3: "block"}
    for number, entry in read.imgs.items():
        mask = mask_of(here / "masks" / entry["file_name"])
        found = np.full(mask.shape, IGNORE, np.uint8)
        for each in read.loadAnns(read.getAnnIds(imgIds=[number])):
            segment = read.annToMask(each).astype(bool)
            assert ndimage.label(segment)[1] == 1 and (found[segment] == IGNORE).all()
            found[segment] = each["category_id"] - 1
            assert each["area"] == segment.sum() == coco.maskUtils.area(read.annToRLE(each)) >= least
            assert each["bbox"] == coco.maskUtils.toBbox(read.annToRLE(each)).tolist()
            (polygon,) = each["polygons"]
            assert coco.maskUtils.decode(coco.maskUtils.frPyObjects([polygon], *mask.shape))[segment].all()
        small = np.zeros(mask.shape, bool)
        for k in range(3):
            numbered = ndimage.label(mask == k)[0]
            small |= (np.bincount(numbered.ravel()) < least)[numbered] & (mask == k)
        assert np.array_equal(found, np.where(small, IGNORE, mask))


def test_shares_and_annotations_leave_255_out():
    mask = np.array([[IGNORE, 0], [0, 1]], np.uint8)
    shares = cluster_shares(mask, dict(enumerate("abc")), 0.25)
    assert [(each["pixels"], each["share"], each["m2"]) for each in shares] == [
        (2, 0.5, 0.5), (1, 0.25, 0.25), (0, 0, 0)
    ]  # fmt: skip
    found = coco_annotations(mask)
    assert [(each["category_id"], each["area"], each["bbox"]) for each in found] == [
        (1, 1, [1, 0, 1, 1]), (1, 1, [0, 1, 1, 1]), (2, 1, [1, 1, 1, 1])
    ]  # fmt: skip
    assert found[0]["polygons"] == [[1, 0, 2, 0, 2, 1, 1, 1]]
