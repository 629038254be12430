"""`predict --smooth`: clusters that stay from frame to frame of a video."""

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from conftest import draw_scene, run
from PIL import Image

from stego_parts.clusters import FRAME_WEIGHT, FrameAverage

FAST = ("--no-crf", "--resolution", 160)


def write_video(folder, scenes) -> Path:
    """A frame of each drawn scene, with noise of its own."""
    Path(folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    for t, seed in enumerate(scenes):
        frame = draw_scene(seed)[0] + random.normal(0, 8, (96, 128, 3))
        Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(Path(folder) / f"{t:04}.png")
    return Path(folder)


def predicted(model, *args) -> list[np.ndarray]:
    """The masks of a run of predict."""
    run("predict", *args, "-m", model, "-o", "out", *FAST)
    masks = [np.array(Image.open(path)) for path in sorted(Path("out").rglob("*.png"))]
    shutil.rmtree("out")
    return masks


def flicker(masks) -> float:
    """The share of pixels that change their cluster from a frame to the next."""
    return np.mean([(a != b).mean() for a, b in zip(masks, masks[1:])])


def test_a_still_scene_flickers_less(here, saved):
    video = write_video("video", [3] * 6)
    alone, smooth = predicted(saved, video), predicted(saved, video, "--smooth")
    assert np.array_equal(alone[0], smooth[0])
    assert 0 < flicker(smooth) < flicker(alone) / 2
    assert np.mean([(a == b).mean() for a, b in zip(alone, smooth)]) > 0.95  # and nothing else changes


def test_a_cut_and_another_folder_begin_anew(here, saved):
    write_video("videos/a", [3, 3, 3, 7])
    write_video("videos/b", [7])
    alone, smooth = predicted(saved, "videos"), predicted(saved, "videos", "--smooth")
    assert (alone[3] == smooth[3]).mean() > 0.9 and (alone[3] == alone[2]).mean() < 0.9
    assert np.array_equal(alone[4], smooth[4])


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


def test_only_all_frames_in_order(here, saved):
    video = write_video("video", [3])
    for args in ((video, "--skip-existing"), ("-",)):
        assert "all frames in their order" in run("predict", *args, "--smooth", "-m", saved, code=2).stderr
    run("predict", video, "-m", saved, "-o", "out", *FAST, "--smooth")
    again = run("predict", video, "-m", saved, "-o", "out", *FAST, "--skip-existing")
    assert "1 of 1 images, 0 skipped" in again.stdout  # made with other options
