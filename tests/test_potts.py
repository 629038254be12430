"""bench/paper/potts.py: the Potts model without scores."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

SCRIPT = Path(__file__).parents[1] / "bench/paper/potts.py"
if not SCRIPT.exists():
    pytest.skip("bench/ is not installed with the package", allow_module_level=True)
spec = importlib.util.spec_from_file_location("potts", SCRIPT)
potts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(potts)
potts_codes = potts.potts_codes


def noise_image(seed=0, *, H=12, W=16):
    return torch.randint(256, (3, H, W), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def flat_regions():
    """Four regions of one colour each (3, 24, 32) uint8, a band above and one below, a disk, a box; which is which."""
    y, x = torch.meshgrid(torch.arange(24), torch.arange(32), indexing="ij")
    region = (y > 12).long()
    region[(x - 21) ** 2 + (y - 10) ** 2 < 40], region[(x < 8) & (y > 15)] = 2, 3
    colour = torch.tensor([[120, 160, 220], [90, 140, 60], [200, 60, 50], [240, 240, 235]], dtype=torch.uint8)
    return colour[region].permute(2, 0, 1), region


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_superpixels_are_the_regions_of_a_flat_image(seed):
    image, region = flat_regions()
    q = potts_codes(image, 12, steps=60, seed=seed)
    assert q.shape == (12, 24, 32) and torch.allclose(q.sum(0), torch.ones(24, 32), atol=1e-5)
    shares = torch.stack(
        [F.one_hot(q.argmax(0)[region == r], 12).float().mean(0) for r in range(4)]
    )  # (region, class)
    assert (shares.amax(1) > 0.99).all() and len(set(shares.argmax(1).tolist())) == 4


def test_continuous_codes_are_alike_within_a_region_and_not_between():
    image, region = flat_regions()
    codes = potts_codes(torch.stack([image, image.flip(2)]), 5, discrete=False, steps=60)
    assert codes.shape == (2, 5, 24, 32) and torch.allclose(
        codes.norm(dim=1), torch.ones(2, 24, 32), atol=1e-5
    )
    for code, here in zip(codes, (region, region.flip(1))):
        means = torch.stack([code[:, here == r].mean(1) for r in range(4)])  # (region, code)
        assert (means.norm(dim=1) > 0.95).all() and (
            means @ means.T - torch.diag(means.norm(dim=1) ** 2)
        ).max() < 0.5


def test_potts_codes_minimise_the_energy_over_all_pairs():
    """The documented energy in float64: as low as that of the true regions, or of one class where all pairs attract."""
    image, region = flat_regions()
    colour, place = (
        image.double().flatten(1).T,
        torch.cartesian_prod(torch.arange(24.0), torch.arange(32.0)).double(),
    )
    far, unlike = torch.cdist(place, place) ** 2, torch.cdist(colour, colour) ** 2
    kernel = 4 * torch.exp(-far / (2 * 30**2) - unlike / (2 * 20**2)) + 3 * torch.exp(-far / 2)

    def energy(q, shift):
        q = q.double().flatten(1).T
        return -((kernel - shift) * (q @ q.T)).mean().item()

    for shift, labels in ((2, region), (-2, torch.zeros_like(region))):
        best = energy(F.one_hot(labels, 8).permute(2, 0, 1), shift)
        assert best < energy(F.one_hot(region.roll(4, 1), 8).permute(2, 0, 1), shift) - 0.05
        assert energy(potts_codes(image, 8, steps=60, shift=shift), shift) <= best + 1e-3


def test_potts_codes_of_strips_and_of_one_seed():
    image = noise_image(H=1, W=9)
    one, same, other = (potts_codes(image, 3, steps=3, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.shape == (3, 1, 9)
    assert potts_codes(noise_image(H=7, W=1), 1, steps=2, discrete=False).shape == (1, 7, 1)
