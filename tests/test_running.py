"""Devices, batches, and one fit by several processes, as torchrun starts them, with gloo on the CPU."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import draw_scene
from PIL import Image

from stego import Stego
from stego_parts import running
from stego_parts.checkpoint import crops_a_step
from stego_parts.config import Config
from stego_parts.running import pick_device, prefetch, side_by_side

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = [
    "-k",
    "3",
    "--backbone",
    "tiny",
    "--device",
    "cpu",
    "--set",
    "batch_size=4",
    "--set",
    "cache_size=0.003",
]

needs_gloo = pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="needs gloo")


def start_two(images, output, *options, steps=30):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "cli",
    ]
    command += ["fit", str(images), "-o", str(output), "--steps", str(steps), *OPTIONS, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.fixture
def images(tmp_path):
    """Five images, one of them unreadable."""
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.fromarray(draw_scene(i)[0]).save(tmp_path / f"images/{i}.png")
    (tmp_path / "images/1.png").write_text("no picture")
    return tmp_path / "images"


@needs_gloo
@pytest.mark.long
def test_two_processes_fit_one_model(images, tmp_path):
    run = start_two(images, tmp_path / "two.pt", "-v")
    stdout, stderr = run.communicate(timeout=240)
    assert run.returncode == 0, stderr
    assert stderr.count("Skipped") == 1 and stderr.count("Features are bounded") == 1
    assert stdout.count("cluster ") == 3  # the second process is silent
    assert not list(tmp_path.glob("*.scratch"))
    model = Stego.load(tmp_path / "two.pt", device="cpu")
    assert model.config.crops == 20
    labels = torch.from_numpy(draw_scene(0)[1]).flatten()
    mask = torch.from_numpy(model.predict(images / "0.png")).long().flatten()
    counts = torch.bincount(labels * 3 + mask, minlength=9).view(3, 3)
    assert counts.max(0).values.sum() > 0.6 * counts.sum()  # clusters are regions of the scene


@needs_gloo
@pytest.mark.long
def test_a_killed_peer_ends_the_others_in_a_sentence(images, tmp_path):
    run = start_two(images, tmp_path / "two.pt", steps=100_000)
    kept = tmp_path / "two.pt.scratch"
    until = time.monotonic() + 120
    while not (kept / "fit.pt").exists() and time.monotonic() < until:
        time.sleep(0.2)
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    time.sleep(3)
    os.kill(int(workers[1]), signal.SIGKILL)
    run.communicate(timeout=120)  # ends, does not hang
    assert run.returncode != 0 and not (tmp_path / "two.pt").exists()


@needs_gloo
@pytest.mark.long
def test_nothing_readable_ends_both(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / f"images/{i}.png").write_text("no picture")
    run = start_two(tmp_path / "images", tmp_path / "two.pt")
    _, stderr = run.communicate(timeout=120)
    assert run.returncode != 0 and "None of the 2 images could be used" in stderr


def test_a_batch_is_shared_out(monkeypatch):
    monkeypatch.setattr("stego_parts.checkpoint.process_count", lambda: 3)
    with pytest.raises(ValueError, match="larger --set batch_size"):
        crops_a_step(Config(batch_size=2), 100)
    assert crops_a_step(Config(batch_size=16), 100) == 5 and crops_a_step(Config(batch_size=16), 7) == 2


@pytest.fixture
def launch(monkeypatch):
    """Makes this process look like number `rank` of `count` that torchrun started on a free port."""

    def as_torchrun(rank: int, count: int) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        launched = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        launched |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
        for name, value in launched.items():
            monkeypatch.setenv(name, value)

    return as_torchrun


@needs_gloo
def test_processes_on_the_cpu_leave_a_gpu_alone(launch, monkeypatch):
    """Torch itself would have them meet on the one GPU, which NCCL refuses."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    launch(0, 1)
    with running.process_group("cpu"):
        monkeypatch.setattr(running, "process_count", lambda: 2)
        running.barrier()
        assert running.from_first(lambda: "said") == "said"


@needs_gloo
@pytest.mark.long
def test_a_process_whose_torchrun_is_gone_ends(launch, monkeypatch):
    launch(1, 2)
    monkeypatch.setattr(running, "MEETING", timedelta(seconds=1))
    with pytest.raises(ValueError, match="has ended; start all of them again"), running.process_group("cpu"):
        raise AssertionError("joined nobody")


def test_each_process_takes_a_gpu_of_its_own(launch, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(running, "MEETING", timedelta(0))
    launch(1, 4)
    for number, device, reason in ((1, "auto", "ended"), (2, "cuda", "machine has 2"), (2, "cpu", "ended")):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        with pytest.raises(ValueError, match=reason), running.process_group(device):
            raise AssertionError("joined nobody")
    assert taken == [1]


def batches(sizes, most):
    items = ((i, None if size is None else torch.empty(size)) for i, size in enumerate(sizes))
    return [[i for i, _ in batch] for batch in running.same_shape_batches(items, most)]


def test_batches_are_of_one_shape():
    assert batches([2, 2, 2, 3, None, None, 3, 2], 2) == [[0, 1], [4, 5], [3, 6], [2, 7]]
    assert batches([2, 3, 2, 3, 4], 3) == [[0, 2], [1, 3], [4]]  # what lacks fellows comes at the end
    assert batches([2, 2, 3, 2], 1) == [[0], [1], [2], [3]]


def test_few_wait_for_others_of_their_shape(monkeypatch):
    monkeypatch.setattr(running, "LOOSE", 2)
    assert batches([1, 2, 2, 3, 4, 5, 1], 2) == [[1, 2], [0], [3], [4], [5], [6]]


def test_device_auto_is_there():
    assert pick_device("auto").type in ("cpu", "cuda") and pick_device("cpu").type == "cpu"


@pytest.fixture
def two_threads():
    """torch works with two threads, whatever the environment says."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_items_share_the_threads_and_stay_in_order(two_threads):
    meeting = threading.Barrier(2, timeout=20)  # passed only by two at once

    def work(item: int) -> tuple[int, int]:
        meeting.wait()
        return item, torch.get_num_threads()

    assert list(side_by_side(work, range(6))) == [(item, 1) for item in range(6)]
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2


def test_what_an_item_raises_is_raised_and_threads_are_as_before(two_threads):
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("no")
        return item

    with pytest.raises(ValueError, match="no"):
        list(side_by_side(work, range(6)))
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2


def test_on_a_gpu_items_come_one_by_one_in_the_thread_that_asks(two_threads):
    threads = list(side_by_side(lambda _: threading.get_ident(), range(3), "cuda"))
    assert threads == [threading.get_ident()] * 3


def test_what_nobody_waits_for_any_more_is_not_begun():
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.05)
        return item

    results = prefetch(work, range(100), window=50)
    assert next(results) == 0
    results.close()
    assert len(begun) < 20
