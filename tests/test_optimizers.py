"""The optimiser."""

import subprocess
import sys

import torch
from torch import nn

from stego_parts.optimizers import Adam, lbfgs


def two_networks() -> tuple[nn.Module, nn.Module]:
    first = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    second = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    second.load_state_dict(first.state_dict())
    return first, second


def loss(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return network(x).square().mean()


def test_same_bits_as_torch():
    ours, theirs = two_networks()
    optimizer = Adam(ours.parameters())
    reference = torch.optim.Adam(theirs.parameters(), lr=1.0, foreach=False)
    for step in range(20):
        x = torch.randn(11, 7)
        rate = 0.01 / (1 + step)
        loss(ours, x).backward()
        optimizer.step(rate)
        reference.param_groups[0]["lr"] = rate
        reference.zero_grad()
        loss(theirs, x).backward()
        reference.step()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_goes_on_from_a_state():
    whole, broken = two_networks()
    x = torch.randn(11, 7)
    first = Adam(whole.parameters())
    second = Adam(broken.parameters())
    for step in range(6):
        loss(whole, x).backward()
        first.step(0.01)
        if step == 3:
            state = second.state_dict()
            second = Adam(broken.parameters())
            second.load_state_dict(state)
        loss(broken, x).backward()
        second.step(0.01)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters()))


def test_a_fit_loads_no_compiler():
    program = (
        "import sys, torch, stego\n"
        "from stego_parts.optimizers import Adam\n"
        "head = stego.Head(4, 3)\n"
        "optimizer = Adam(head.parameters())\n"
        "head(torch.ones(2, 4)).sum().backward()\n"
        "optimizer.step(0.1)\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_lbfgs_solves_a_badly_scaled_system():
    """Half x'Ax - b'x, whose slopes differ a thousandfold."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30)).Q
    matrix = basis @ torch.diag(torch.logspace(-1, 2, 30)) @ basis.T
    wanted = torch.randn(30)
    looks = []

    def evaluate(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        looks.append(x)
        return float(x @ matrix @ x / 2 - matrix @ wanted @ x), matrix @ (x - wanted)

    found = lbfgs(evaluate, torch.zeros(30), steps=200, fall=1e-7)
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    assert len(looks) < 150  # steps along the gradient alone need thousands


def test_lbfgs_takes_no_more_steps_than_it_may_and_stays_at_a_minimum():
    looks = []

    def evaluate(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        looks.append(x)
        return float(x.square().sum()), 2 * x

    assert torch.equal(lbfgs(evaluate, torch.zeros(3), steps=5, fall=0.1), torch.zeros(3))
    looks.clear()
    far = lbfgs(evaluate, torch.full((3,), 100.0), steps=1, fall=0.0)
    assert len(looks) == 2 and (far < 100).all()
