"""A fit that is interrupted, in whatever way, goes on and ends with the same model."""

import logging
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import draw_scene
from PIL import Image

from cli import main
from stego import Stego
from stego_parts import checkpoint, features
from stego_parts.checkpoint import FitCheckpoint
from stego_parts.config import Config

# one small view an image, of which the cache keeps random positions
OPTIONS = dict(clusters=3, backbone="tiny", steps=40, batch_size=4, views="whole", cache_size=0.001)


def draw_into(folder) -> Path:
    folder.mkdir()
    for i in range(4):
        Image.fromarray(draw_scene(i)[0]).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    return draw_into(tmp_path / "images")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The model of a fit that nothing disturbed."""
    return Stego.fit(draw_into(tmp_path_factory.mktemp("undisturbed") / "images"), **OPTIONS)


def same(a: Stego, b: Stego) -> bool:
    heads = zip(a.head.state_dict().values(), b.head.state_dict().values())
    return all(torch.equal(x, y) for x, y in [*heads, (a.centers, b.centers), (a.share, b.share)])


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_random_moments(images, expected):
    """SIGKILL at ten random moments, among them while features are computed; each time the fit goes on from there."""
    rng = random.Random(0)
    kills, moments = 0, set()
    while not Path("stego.pt").exists():
        run, lines = fit_in_a_child()
        for seen, line in enumerate(lines):
            if kills < 10 and seen >= rng.randrange(4):
                time.sleep(rng.random() * 0.03)  # also between two lines
                os.kill(run, signal.SIGKILL)
                kills, moments = kills + 1, moments | {line.split()[0]}
                break
        lines.close()
        os.waitpid(run, 0)
    assert kills == 10 and moments >= {"features", "training"}
    assert same(Stego.load("stego.pt"), expected)


def fit_in_a_child():
    """A child process that goes on with the fit and writes a line for each image and step: its id, its lines."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, os.fdopen(read)
    try:

        def progress(stage, done, total):
            os.write(write, f"{stage} {done}\n".encode())

        Stego.fit("images", checkpoint="kept", progress=progress, **OPTIONS).save("stego.pt")
    finally:
        os._exit(0)  # nothing of pytest runs in the child


class Interruption(Exception):
    pass


def interrupted(stage, at):
    def progress(now, done, total):
        if now == stage and done == at:
            raise Interruption

    return progress


@pytest.mark.parametrize("stage, at", [("features", 2), ("training", 1), ("training", 40)])
def test_resumed_is_the_same(images, expected, stage, at):
    with pytest.raises(Interruption):
        Stego.fit("images", checkpoint="kept", progress=interrupted(stage, at), **OPTIONS)
    calls = []
    model = Stego.fit("images", checkpoint="kept", progress=lambda *now: calls.append(now[:2]), **OPTIONS)
    assert same(model, expected)
    assert ("features", 1) not in calls and (stage != "training" or ("training", at) not in calls)
    assert len(model.record.history) == len(expected.record.history)


def test_features_are_reused_and_changes_noticed(images, expected):
    assert same(Stego.fit("images", checkpoint="kept", **OPTIONS), expected)
    calls = []

    def again(**options):
        calls.clear()
        return Stego.fit(
            "images", checkpoint="kept", progress=lambda *now: calls.append(now[0]), **OPTIONS | options
        )

    assert same(again(), expected) and "features" not in calls  # nothing new: no image is looked at
    again(steps=3)
    assert "features" not in calls and calls.count("training") == 3  # other training, same features
    Image.fromarray(draw_scene(9)[0]).save(images / "3.png")
    assert not same(again(), expected) and calls.count("features") == 4  # one changed
    Image.fromarray(draw_scene(7)[0]).save(images / "more.png")
    again(steps=1)
    assert calls.count("features") == 5  # one more
    (images / "more.png").unlink()
    again(steps=1)
    assert calls.count("features") == 4


@pytest.mark.parametrize("stage, at", [("features", 2), ("training", 5)])
def test_another_fit_starts_afresh(images, expected, stage, at, caplog):
    with pytest.raises(Interruption):
        Stego.fit("images", checkpoint="kept", progress=interrupted(stage, at), **OPTIONS)
    other = Stego.fit("images", checkpoint="kept", **OPTIONS | {"clusters": 4})
    assert len(other.record.history) == len(expected.record.history) and len(other.centers) == 4
    assert ("other images or options; starting afresh" in caplog.text) == (stage == "training")
    assert same(Stego.fit("images", checkpoint="kept", **OPTIONS), expected)


def test_what_could_not_be_read_is_looked_at_again(images, monkeypatch, caplog):
    """Named each time; where the limit of megapixels is raised, the fit is the one of all images."""
    Image.fromarray(draw_scene(4, 192, 256)[0]).save(images / "large.png")
    of_all = Stego.fit("images", **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        for at in (5, 10):
            caplog.clear()
            with pytest.raises(Interruption):
                Stego.fit("images", checkpoint="kept", progress=interrupted("training", at), **OPTIONS)
            assert "large.png has more than 0.02 megapixels" in caplog.text
    assert same(Stego.fit("images", checkpoint="kept", **OPTIONS), of_all)


def test_resume_says_what_it_goes_on_from(images, caplog):
    caplog.set_level(logging.INFO, logger="stego")
    with pytest.raises(Interruption):
        Stego.fit("images", checkpoint="kept", progress=interrupted("training", 7), **OPTIONS)
    caplog.clear()
    Stego.fit("images", checkpoint="kept", **OPTIONS)
    assert "Reusing the features of 4 images." in caplog.text
    assert "Going on with the training from step 7." in caplog.text


def test_a_damaged_state_means_starting_afresh(images, expected):
    with pytest.raises(Interruption):
        Stego.fit("images", checkpoint="kept", progress=interrupted("features", 3), **OPTIONS)
    state = images.parent / "kept/features.pt"
    state.write_bytes(state.read_bytes()[:100])
    assert same(Stego.fit("images", checkpoint="kept", **OPTIONS), expected)


@pytest.mark.skipif(checkpoint.fcntl is None, reason="no file locks here")
def test_one_fit_at_a_time_in_a_folder(tmp_path):
    of_a_fit = tmp_path / "kept", [], "", Config()
    first = FitCheckpoint(*of_a_fit)
    with pytest.raises(ValueError, match="Another fit is working in"):
        FitCheckpoint(*of_a_fit)
    first.close()
    FitCheckpoint(*of_a_fit).close()


COMMAND = ["fit", "images", "-k", "3", "--backbone", "tiny", "--steps", "40"]
COMMAND += ["--set", "batch_size=4", "--set", "views=whole", "--set", "cache_size=0.001"]


@pytest.mark.usefixtures("short_sheet")
def test_command(images, expected, monkeypatch):
    def stop(self, stage, done, total):
        if (stage, done) == ("training", 20):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cli_parts.console.Progress.__call__", stop)
        result = CliRunner().invoke(main, COMMAND)
    assert result.exit_code == 130 and "the same command goes on" in result.output
    assert sorted(os.listdir()) == ["images", "stego.pt.scratch"]
    result = CliRunner().invoke(main, [*COMMAND, "--keep-features"])
    assert result.exit_code == 0, result.output
    assert same(Stego.load("stego.pt"), expected)
    assert sorted(os.listdir("stego-features")) == ["features.pt", "lock", "tokens"]
    monkeypatch.setattr(features, "image_views", None)  # no image is looked at again
    assert CliRunner().invoke(main, [*COMMAND, "--steps", "2", "--keep-features"]).exit_code == 0
    assert sorted(os.listdir()) == ["images", "stego-features", "stego-fit.png", "stego.pt"]


def test_a_fit_that_cannot_be_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_text("no picture")
    result = CliRunner().invoke(main, COMMAND)
    assert result.exit_code == 1 and "None of the 1 images could be used" in result.output
    assert os.listdir() == ["images"]


def test_what_else_lies_in_the_folder_stays(images):
    """Also where the fit cannot be, or has ended."""
    Path("run").mkdir()
    Path("run/notes.txt").write_text("of a person")
    Path("run/.training-0123abcd.part").write_bytes(b"of a process that was killed")
    Path("broken.png").write_text("no picture")
    with pytest.raises(ValueError, match="None of the 1 images"):
        Stego.fit("broken.png", checkpoint="run", **OPTIONS)
    assert os.listdir("run") == ["notes.txt"]
    Stego.fit("images", checkpoint="run", **OPTIONS)
    checkpoint.end_fit("run", keep_features=False)
    assert os.listdir("run") == ["notes.txt"]
