"""One fit by two processes, as torchrun starts them, with gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import draw_scene, run
from PIL import Image

import stego
from stego import Stego
from stego_parts import distributed

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["-k", "3", "--backbone", "tiny", "--steps", "30", "--batch-size", "4", "--cache-size", "0.003"]

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux", reason="needs gloo and torchrun"
)


def fit_by_two(images, output):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "cli",
        "fit",
        str(images),
        "-o",
        str(output),
        *OPTIONS,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_two_processes_fit_the_same_model(tmp_path):
    """Five images, one unreadable, and a cache that keeps some positions: the crops of both are numbered alike."""
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.fromarray(draw_scene(i)[0]).save(tmp_path / f"images/{i}.png")
    (tmp_path / "images/1.png").write_text("no picture")
    run("fit", tmp_path / "images", "-o", tmp_path / "one.pt", *OPTIONS)
    both = fit_by_two(tmp_path / "images", tmp_path / "two.pt")
    assert both.returncode == 0, both.stderr
    assert both.stderr.count("Skipped") == 1 and both.stderr.count("cache is bounded") == 1
    assert both.stdout.count("cluster ") == 3  # the second process is silent
    assert not list(tmp_path.glob("*.scratch"))
    one, two = (Stego.load(tmp_path / name, device="cpu") for name in ("one.pt", "two.pt"))
    assert two.config.crops == 20
    for name, value in one.head.state_dict().items():
        assert torch.allclose(value, two.head.state_dict()[name], atol=2e-3), name
    assert (one.centers * two.centers).sum(1).min() > 0.999
    assert (one.predict(tmp_path / "images/0.png") == two.predict(tmp_path / "images/0.png")).mean() > 0.99


def loss_and_gradients(number, processes, port, path):
    """The loss of one batch and the head's gradients, as a process of so many computes them, into a file."""
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE=str(processes)
    )
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    head, config = stego.Head(8, 5).train(), stego.fit_config(classes=2, batch_size=4)
    loss = stego.training_loss(head, *torch.randn(3, 4, 6, 8), config)
    loss.backward()
    gradients = [distributed.averaged(parameter.grad) for parameter in head.parameters()]
    torch.save([distributed.averaged(loss.detach()), *gradients], f"{path}/{processes}-{number}.pt")
    if processes > 1:
        dist.destroy_process_group()


def test_gradients_are_those_of_the_whole_batch(tmp_path):
    """Dropout, centering and random pairs across the parts of the batch included."""
    loss_and_gradients(0, 1, 0, tmp_path)
    torch.multiprocessing.spawn(loss_and_gradients, (2, free_port(), tmp_path), nprocs=2)
    want = torch.load(tmp_path / "1-0.pt")
    for number in range(2):
        for a, b in zip(want, torch.load(tmp_path / f"2-{number}.pt")):
            assert torch.allclose(a, b, atol=1e-6) and a.abs().max() > 1e-4


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_what_several_processes_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(stego, "processes", lambda: 3)
    with pytest.raises(ValueError, match="multiple of their number"):
        stego.crops_a_step({"batch_size": 16}, 100)
    with pytest.raises(ValueError, match="more images"):
        stego.crops_a_step({"batch_size": 6}, 2)
    assert stego.crops_a_step({"batch_size": 6}, 5) == 3
