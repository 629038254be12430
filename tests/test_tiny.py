"""The bundled backbone and the recipe that makes it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_scene
from PIL import Image

from stego_parts.backbones import TINY_FILE, load_backbone
from stego_parts.tiny import MEANING_CHANNELS, Detail, Tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import pretrain


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("tiny")


@pytest.fixture(scope="module")
def pictures():
    """Twelve drawn scenes (12, 96, 96, 3) uint8."""
    return torch.from_numpy(np.stack([draw_scene(seed, 96, 96)[0] for seed in range(12)]))


@pytest.fixture
def small(monkeypatch):
    """The recipe at a size that runs in seconds."""
    for name, value in {
        "PATCHES": 1000,
        "CROP_SIDE": 48,
        "CROP_FROM": (32, 72),
        "SAMPLE": 8,
        "PROTOTYPES": 16,
    }.items():
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(pretrain, "Detail", lambda: Detail(atoms=32, width=16, depth=1, channels=16))


# ---- the network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(32, 32), (40, 72), (224, 224), (320, 176)])
def test_one_feature_for_every_8_by_8_pixels(tiny, height, width):
    found = tiny(torch.randn(2, 3, height, width))
    assert found.shape == (2, tiny.channels, height // 8, width // 8)
    assert found.dtype == torch.float32 and torch.isfinite(found).all()


def test_same_image_same_features_whatever_shares_the_batch(tiny):
    x = torch.randn(3, 3, 64, 80)
    assert torch.equal(tiny(x), tiny(x))
    assert torch.allclose(tiny(x)[1:2], tiny(x[1:2]), atol=1e-4)


def test_features_move_with_the_image(tiny):
    """Of the detail: shifting the image by one position shifts the features, away from the borders."""
    x = torch.from_numpy(draw_scene(0, 448, 448)[0]).permute(2, 0, 1)[None].float() / 64 - 2
    plain, shifted = tiny.detail(x[..., :-8]), tiny.detail(x[..., 8:])
    middle = slice(22, 33)  # beyond the reach of the 15-wide window and four 7-wide blocks
    a, b = plain[:, :, middle, 23:33], shifted[:, :, middle, 22:32]
    assert (a - b).abs().max() < 1e-3 * a.abs().max()


def test_features_tell_sky_from_ground(tiny):
    """Mean cosine within a region of a drawn scene exceeds that between regions by far."""
    image, labels = draw_scene(3, 160, 160)
    x = pretrain.normalise(torch.from_numpy(image)[None])
    rows = torch.nn.functional.normalize(tiny(x).flatten(2)[0].T, dim=1)  # (400, C)
    here = torch.from_numpy(labels[4::8, 4::8].astype(int)).flatten()
    sky, ground = rows[here == 0], rows[here == 1]
    assert (sky @ sky.T).mean() > (sky @ ground.T).mean() + 0.25
    assert (ground @ ground.T).mean() > (sky @ ground.T).mean() + 0.25


def test_pooling_after_projecting_is_the_same(tiny):
    x, dictionary = torch.randn(1, 3, 64, 96), tiny.detail.dictionary
    slow = (dictionary.pooled(x) - dictionary.mean[:, None, None]).flatten(2)
    assert torch.allclose((dictionary.project @ slow).view_as(dictionary(x)), dictionary(x), atol=1e-4)


@pytest.mark.parametrize("height, width", [(8, 8), (72, 40), (136, 24)])
def test_activations_are_mean_distance_less_distance(tiny, height, width):
    """Patch by patch, whatever the strips of rows in which they are computed."""
    x, dictionary = torch.randn(2, 3, height, width), tiny.detail.dictionary
    patches = torch.nn.functional.unfold(torch.nn.functional.pad(x, (2,) * 4, mode="reflect"), 8, stride=4)
    white = patches.transpose(1, 2) @ dictionary.whiten.flatten(1).T + dictionary.whiten_bias  # (B, N, dims)
    distance = torch.cdist(white, dictionary.atom[None], compute_mode="donot_use_mm_for_euclid_dist")
    near = (distance.mean(2, keepdim=True) - distance).clamp(min=0)  # (B, N, atoms)
    near = near.unflatten(1, (height // 8, 2, width // 8, 2)).mean((2, 4)).permute(0, 3, 1, 2)
    assert torch.allclose(dictionary.activations(x), near, atol=1e-4)


def test_both_branches_have_a_fixed_length(tiny):
    """Neither drowns the other: they lie side by side, and what is kept of them is nearly all."""
    image = pretrain.normalise(torch.from_numpy(draw_scene(3, 160, 160)[0])[None])
    both = tiny.branches(image)
    for branch in both.split([tiny.detail.channels, MEANING_CHANNELS], 1):
        assert torch.allclose(branch.norm(dim=1), torch.ones(1, 20, 20), atol=1e-5)
    kept = tiny(image).square().sum() / both.square().sum()
    assert 0.9 < kept < 1
    directions = tiny.join.weight[:, :, 0, 0]
    assert torch.allclose(directions @ directions.T, torch.eye(tiny.channels), atol=2e-3)


def test_detail_can_be_had_alone(tiny):
    x = torch.randn(1, 3, 64, 64)
    alone = load_backbone("tiny_detail")
    assert torch.equal(alone(x), tiny.detail(x)) and alone.name == "tiny_detail"


def test_weight_file_is_small_half_precision_and_safe():
    assert TINY_FILE.stat().st_size <= 6e6
    state = torch.load(TINY_FILE, weights_only=True)
    assert state.keys() == Tiny().state_dict().keys()
    assert all(value.dtype == torch.float16 and torch.isfinite(value).all() for value in state.values())


# ---- the recipe ------------------------------------------------------------------------------------------------


def test_pretraining_lowers_the_loss_and_writes_usable_weights(small, pictures, tmp_path, capsys):
    output = tmp_path / "tiny.pt"
    pretrain.pretrain(pictures, output, steps=30, batch=8, log_every=10)
    losses = [
        float(line.rsplit(" ", 1)[1]) for line in capsys.readouterr().err.splitlines() if "loss" in line
    ]
    assert losses[-1] < losses[0]
    network = pretrain.Detail()
    network.load_state_dict(torch.load(output, weights_only=True))
    found = network(pretrain.normalise(pictures[:2]))
    assert found.shape == (2, 16, 12, 12) and torch.isfinite(found).all()


def test_an_interrupted_run_ends_with_the_same_weights(small, pictures, tmp_path):
    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    pretrain.pretrain(pictures, whole, steps=6, batch=4)
    pretrain.pretrain(pictures, broken, steps=6, batch=4, stop_at=3)
    assert not broken.exists()
    pretrain.pretrain(pictures, broken, steps=6, batch=4)
    first, second = (torch.load(path, weights_only=True) for path in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_another_run_is_refused(small, pictures, tmp_path):
    pretrain.pretrain(pictures, tmp_path / "tiny.pt", steps=4, batch=4, stop_at=1)
    with pytest.raises(ValueError, match="--batch 4"):
        pretrain.pretrain(pictures, tmp_path / "tiny.pt", steps=4, batch=6)


def test_corresponding_places_show_the_same_pixels(monkeypatch):
    """Two crops of a smooth picture, read at corresponding places, agree."""
    monkeypatch.setattr(pretrain, "recolour", lambda x, generator: x)
    ramp = torch.arange(224.0)
    image = torch.stack([ramp.expand(224, 224), ramp[:, None].expand(224, 224), torch.zeros(224, 224)], 2)
    generator = torch.Generator().manual_seed(0)
    (one, frame1), (two, frame2) = pretrain.two_crops(image.byte().expand(8, -1, -1, -1), generator)
    here, there, seen = pretrain.correspondences(frame1, frame2, generator)
    first, second = pretrain.sample_at(one, here)[seen], pretrain.sample_at(two, there)[seen]
    assert seen.float().mean() > 0.3
    assert (first - second).abs().median() < 0.5 / 255 and (first - second).abs().max() < 3 / 255


def test_balanced_assignments_use_every_prototype():
    share = pretrain.balanced(
        torch.randn(400, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * 0.2
    )
    assert torch.allclose(share.sum(1), torch.ones(400), atol=1e-5)
    assert torch.allclose(share.sum(0), torch.full((16,), 400 / 16), rtol=0.1)


def test_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        pretrain.find_images([tmp_path])


def test_probe_finds_classes_that_colour_tells(small, tmp_path):
    for split, seeds in (("train", range(6)), ("val", range(6, 9))):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for seed in seeds:
            image, label = draw_scene(seed)
            Image.fromarray(image).save(tmp_path / f"images/{split}/{seed}.png")
            Image.fromarray(label).save(tmp_path / f"labels/{split}/{seed}.png")
    assert pretrain.probe(load_backbone("tiny_detail"), tmp_path, side=96) > 0.6
