"""The scenes that `stego demo` draws; test_readme runs the demo itself."""

import numpy as np
import pytest

from cli_parts.demo import BUILDING, CAR, CLASS_OF, GRASS, ROAD, SCENE_CLASSES, SKY, TREE, draw_scene


@pytest.fixture(scope="module")
def drawn():
    return [draw_scene(seed, 96, 128) for seed in range(16)]


def test_scenes_are_labelled_pictures(drawn):
    assert set(CLASS_OF.tolist()) == set(range(len(SCENE_CLASSES)))
    shares = np.zeros(len(CLASS_OF))
    for image, labels in drawn:
        assert image.mode == "RGB" and image.size == (128, 96)
        assert labels.shape == (96, 128) and labels.dtype == np.uint8 and labels.max() < len(CLASS_OF)
        assert labels[:, 40:90].min() == SKY and labels[-1, 64] in (
            ROAD,
            CAR,
        )  # the sky above, a road underfoot
        shares += np.bincount(labels.ravel(), minlength=len(CLASS_OF)) / labels.size / len(drawn)
    assert (shares > 0.005).all() and shares.sum() == pytest.approx(1)


def test_scenes_differ_and_seeds_repeat(drawn):
    again = draw_scene(3, 96, 128)
    assert np.array_equal(again[0], drawn[3][0]) and np.array_equal(again[1], drawn[3][1])
    assert len({labels.tobytes() for _, labels in drawn}) == len(drawn)


def test_what_is_drawn_looks_its_part(drawn):
    """Sky is bluer than red, grass green; trees and buildings have texture or windows: not flat areas of paint."""
    pixels = np.concatenate([np.asarray(image, float).reshape(-1, 3) for image, _ in drawn])
    labels = np.concatenate([labels.ravel() for _, labels in drawn])
    mean = {c: pixels[labels == c].mean(0) for c in range(len(CLASS_OF))}
    assert mean[SKY][2] > mean[SKY][0] and mean[GRASS].argmax() == 1 and mean[TREE].argmax() == 1
    assert np.ptp(mean[ROAD]) < 12  # grey
    for image, labels in drawn:
        grey = np.asarray(image.convert("L"), float)
        for c in (TREE, BUILDING):
            if (labels == c).mean() > 0.05:
                assert grey[labels == c].std() > 8


def test_scenes_of_any_size():
    for height, width in ((24, 300), (200, 40)):
        image, labels = draw_scene(1, height, width)
        assert image.size == (width, height) and labels.shape == (height, width)
