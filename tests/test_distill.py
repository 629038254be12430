"""The recipe that teaches the bundled backbone what a transformer sees, at a size that runs in seconds."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from conftest import draw_scene
from PIL import Image

from stego_parts.backbones import TINY_FILE, Spec
from stego_parts.meaning import Meaning
from stego_parts.tiny import Tiny
from stego_parts.vit import ViT

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import distill


@pytest.fixture
def small(monkeypatch):
    sizes = dict(KEPT_SIDE=48, BATCHES={4: 6, 6: 4}, POOL=32, FIRST=8, PCA_CROPS=16, HELD=4, TEACHER_BATCH=8)
    sizes |= dict(SAVE_EVERY=1, WARM_UP=5)
    for name, value in sizes.items():
        monkeypatch.setattr(distill, name, value)


@pytest.fixture
def images(small, tmp_path):
    """Both ends of six drawn scenes (12, 3, 48, 48) uint8."""
    for seed in range(6):
        Image.fromarray(draw_scene(seed, 96, 128)[0]).save(tmp_path / f"{seed}.png")
    return distill.load_squares(sorted(tmp_path.glob("*.png")))


@pytest.fixture
def teacher(images):
    torch.manual_seed(0)
    network = ViT(Spec("", 128, 2, 14, 4, depth=2))
    for value in network.parameters():
        torch.nn.init.normal_(value, std=0.05)
    return distill.Teacher(network.eval(), images)


def test_images_are_kept_as_both_their_ends(images, tmp_path):
    assert images.shape == (12, 3, 48, 48) and images.dtype == torch.uint8
    assert not torch.equal(images[0], images[1])
    Image.new("RGB", (50, 48)).save(tmp_path / "square.png")
    assert len(distill.squares(tmp_path / "square.png")) == 1


def test_crops_of_an_image_that_grows_to_the_right(small):
    """Mirrored or not, a crop of a ramp is a ramp, within the image's range, of at least the least side."""
    torch.manual_seed(0)
    ramp = torch.arange(48, dtype=torch.uint8).expand(20, 3, 48, 48)
    crops = distill.draw_crops(ramp, 4) * 255  # (20, 3, 56, 56)
    steps = crops[:, 0, 20, 2:-2].diff(dim=1)
    rising = steps.mean(1) > 0
    assert 0 < rising.sum() < 20
    assert torch.allclose(steps[:, :-1].abs().mean(1), steps[:, :-1].mean(1).abs(), atol=1e-3)
    least = 4 * distill.STUDENT_PATCH / distill.BLOWN_UP / 56  # pixels of the image to one of the crop
    assert (steps.mean(1).abs() > 0.9 * least).all() and (steps.mean(1).abs() < 48 / 56 * 1.1).all()


def test_the_teachers_vectors_have_unit_length(teacher, images):
    seen = teacher(distill.draw_crops(images[:2], 4))
    assert seen.shape == (2, distill.DIMS, 4, 4)
    assert torch.allclose(seen.norm(dim=1), torch.ones(2, 4, 4), atol=1e-4)


def test_the_pool_replaces_its_oldest_crops(teacher, images):
    pool = distill.Pool(4, torch.device("cpu"))
    for _ in range(5):
        pool.add(images[:8], teacher)
    first = pool.crops[:8].clone()
    crops, seen = pool.draw(6)
    assert pool.added == 40 and crops.shape == (6, 3, 32, 32) and seen.shape == (6, distill.DIMS, 4, 4)
    pool.add(images[:8], teacher)
    assert torch.equal(pool.crops[:8], first)  # places 8 to 15 were next


def test_loss_is_nothing_for_the_teachers_own_vectors():
    torch.manual_seed(0)
    seen = torch.nn.functional.normalize(torch.randn(3, 16, 8, 8), dim=1)
    assert distill.loss_of(7 * seen, seen) < 1e-5
    assert distill.loss_of(torch.randn(3, 16, 8, 8), seen) > 0.5


def test_folding_changes_no_feature():
    torch.manual_seed(0)
    network = distill.with_norms(Meaning(16))
    for _ in range(3):
        network(torch.randn(4, 3, 64, 64))  # moves the running means
    x = torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        trained = network.eval()(x)
        plain = distill.folded(network)(x)
    assert trained.shape == (1, 16, 5, 9) and torch.allclose(plain, trained, atol=1e-4)
    assert plain.std() > 0.01
    assert network.state_dict().keys() == Meaning(16).state_dict().keys()


def test_a_run_learns_and_one_that_was_interrupted_goes_on(teacher, images, tmp_path, monkeypatch, capsys):
    """Every look at the clock finds it 0.05 s later, two looks a step."""
    ticks = itertools.count()
    monkeypatch.setattr(distill.time, "monotonic", lambda: 0.05 * next(ticks))
    checkpoint = tmp_path / "train.pt"
    torch.manual_seed(0)
    distill.distill(images, teacher, checkpoint, seconds=3)
    steps = torch.load(checkpoint, weights_only=True)["step"]
    first = capsys.readouterr().err
    network = distill.distill(images, teacher, checkpoint, seconds=6)
    second = capsys.readouterr().err
    assert f"going on from {checkpoint} at step {steps}" in second
    cosines = [float(line.rsplit(" ", 1)[1]) for line in (first + second).splitlines() if "cosine" in line]
    assert cosines[-1] > cosines[0] + 0.1
    assert network.state_dict().keys() == Meaning().state_dict().keys()


def test_of_both_branches_what_varies_most_is_kept(images):
    detail = {
        name.removeprefix("detail."): value
        for name, value in torch.load(TINY_FILE, weights_only=True).items()
        if name.startswith("detail.")
    }
    torch.manual_seed(0)
    state = distill.joined(Meaning(), detail, images)
    assert all(value.dtype == torch.float16 and torch.isfinite(value).all() for value in state.values())
    network = Tiny()
    network.load_state_dict(state)
    x = distill.standardised(images[:4].float() / 255)
    with torch.no_grad():
        kept = network(x).square().sum() / network.branches(x).square().sum()
        some = network(x).permute(1, 0, 2, 3).flatten(1)  # (channels, positions)
    assert 0.9 < kept < 1.001
    assert some[:20].square().sum() > 0.5 * some.square().sum()
