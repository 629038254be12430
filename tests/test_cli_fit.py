"""`stego fit`: what it writes, says and returns; `--from`, several numbers, going on, `--match`."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAST, QUICK, run
from PIL import Image

import stego
from cli import main
from cli_parts.drawing import GAP, SHEET_CELL
from stego import Stego
from stego_parts import features

FIT = ("--backbone", "tiny", "--steps", 3)
pytestmark = pytest.mark.usefixtures("short_sheet")


def test_fit_options_are_those_of_the_library():
    """Flags, Python arguments and keys of the saved model have the same names, with the same defaults."""
    import inspect

    from stego import Stego
    from stego_parts.config import Config

    known = {name: each.default for name, each in inspect.signature(Stego.fit).parameters.items()}
    known |= vars(Config())
    defaults = main.commands["fit"].make_context("fit", ["images"]).params
    own = {
        "images",
        "output",
        "overwrite",
        "report",
        "dataset",
        "root",
        "keep_features",
        "settings",
        "from_model",
    }
    for name, default in defaults.items():
        assert name in own or name in known, name
        assert name in own or default in (None, known[name])  # None: the preset decides
    assert len(re.findall(r"^ +-", run("fit", "--help").stdout, re.MULTILINE)) <= 19


def test_fit_then_predict(here, scenes):
    args = ("fit", scenes / "sub", "-k", 3, "--backbone", "tiny", "--steps", 5)
    result = run(*args, "--report", "charts", "--set", "batch_size=4", "--set", "b_self=0.1")
    assert "model stego.pt" in result.stdout and "stego-fit.png" in result.stdout
    assert "cluster " not in result.stdout  # for -v
    assert sorted(p.name for p in here.iterdir()) == ["charts", "stego-fit.png", "stego.pt"]
    assert "Training" in Path("charts/index.html").read_text() and "charts/index.html" in result.stdout
    config = Stego.load("stego.pt").config
    assert (config.batch_size, config.b_self, config.steps, config.preset) == (4, 0.1, 5, "default")
    run("predict", scenes / "scene00.png", "-o", "mask.png", *FAST)
    with Image.open("mask.png") as mask:
        assert mask.mode == "P" and mask.size == (128, 96) and np.asarray(mask).max() < 3


def test_a_picture_that_only_has_the_name_of_the_sheet(here, scenes):
    Path("photos").mkdir()
    for name in ("a.png", "stego-fit.png"):
        shutil.copy(scenes / "scene00.png", f"photos/{name}")
    args = ("fit", "photos", "-o", "photos/stego.pt", "-k", 2, *QUICK)
    assert "stego-fit.png would overwrite an input" in run(*args, code=2).stderr


def test_a_named_model_is_not_replaced(here, pair, saved):
    shutil.copy(saved, "stego.pt")
    args = ("fit", pair, "-k", 2, *QUICK)
    run("name", "0=sky", "1=hill", "2=road")
    before = Path("stego.pt").read_bytes()
    refused = run(*args, code=2).stderr
    assert "0=sky, 1=hill, 2=road" in refused and "--match stego.pt" in refused and "--overwrite" in refused
    assert Path("stego.pt").read_bytes() == before
    run(*args, "-o", "other.pt")
    matched = run(*args, "--match", "stego.pt")
    assert re.search(r"\d of 3 clusters matched", matched.stderr)
    lost = {"sky", "hill", "road"} - set(Stego.load("stego.pt").names)
    assert lost and all(re.search(rf"lost: .*\d={name}", matched.stderr) for name in lost)  # 2 < 3 clusters
    run("name", "0=a")
    run(*args, "--overwrite")
    assert Stego.load("stego.pt").names == ["", ""]


def test_a_sweep_runs_the_backbone_once(here, pair, monkeypatch):
    args = ("fit", pair, *QUICK, "--keep-features")
    assert "Reusing" not in run(*args, "-k", 2, "-o", "two.pt").stderr
    monkeypatch.setattr("stego_parts.features.image_views", None)
    assert "Reusing the features of 2 images" in run(*args, "-k", 3, "-o", "three.pt").stderr
    assert [len(Stego.load(f"{name}.pt").centers) for name in ("two", "three")] == [2, 3]


@pytest.mark.usefixtures("short_sheet")
def test_images_that_cannot_be_used_are_said_once_and_not_counted(here, pair):
    (pair / "broken.png").write_text("no picture")
    fit = run("fit", pair, *QUICK, "-k", 2, "--report", "charts")
    assert fit.stderr.count("broken.png") == 1 and fit.stdout.startswith("2 images, tiny")
    assert "shown on 2 images" in Path("charts/index.html").read_text()


def test_the_same_command_goes_on(here, pair, monkeypatch):
    args = ("fit", pair, "--backbone", "tiny", "--steps", 20, "-k", 2)
    stopped = interrupt(monkeypatch, "training", 10, *args)
    assert "Interrupted at training 10/20; the same command goes on." in stopped.stderr
    resumed = run(*args).stderr
    assert "features of 2 images" in resumed and re.search(r"training from step \d", resumed)


def test_another_number_of_clusters_reuses_the_features(here, pair, monkeypatch):
    args = ("fit", pair, *QUICK, "-k", 2)
    interrupt(monkeypatch, "features", 1, *args)
    assert "Reusing the features of 1 images" in run(*args[:-1], 3).stderr


def interrupt(monkeypatch, stage, done, *args):
    """A command that Ctrl-C ends at some progress."""
    from cli_parts.console import Progress

    told = Progress.__call__

    def call(self, *now):
        told(self, *now)
        if now[:2] == (stage, done):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stego_parts.checkpoint.SAVE_EVERY", 0)
        patch.setattr("cli_parts.console.Progress.__call__", call)
        return run(*args, code=130)


def test_ctrl_c_says_how_to_go_on(here, scenes, saved, monkeypatch):
    args = ("predict", scenes / "sub", "-m", saved, "-o", "out", *FAST)
    stopped = interrupt(monkeypatch, "predict", 2, *args)
    assert "Interrupted at predict 2/4; the same command with --skip-existing goes on." in stopped.stderr
    stopped = interrupt(monkeypatch, "regions", 1, "show", saved, scenes / "sub", "--sheet", "s.png")
    assert "Interrupted at regions 1/4; the same command starts afresh." in stopped.stderr


def test_stages_after_the_training_are_shown(here, scenes, monkeypatch):
    stages = []
    monkeypatch.setattr("cli_parts.console.Progress.__call__", lambda self, stage, *now: stages.append(stage))
    run("fit", scenes / "scene00.png", *QUICK, "-k", 2)
    assert [*dict.fromkeys(stages)][-3:] == ["training", "clusters", "picture"]


def test_only_models_over_the_same_features_match(here, scenes, saved):
    state = torch.load(saved, weights_only=True)
    torch.save(state | {"backbone_sha256": "0" * 64}, "other.pt")
    args = ("fit", scenes / "scene00.png", "-k", 2, "--backbone", "tiny", "--steps", 1, "--match")
    assert "clusters are compared on the same features" in run(*args, "other.pt", code=2).stderr
    assert "No model at none.pt" in run(*args, "none.pt", code=2).stderr


@pytest.fixture
def images(here, scenes):
    """A folder of two images, as a person has it: a model notes relative names."""
    Path("images").mkdir()
    for name in ("scene00.png", "scene01.png"):
        shutil.copy(scenes / name, "images")
    return Path("images")


def count_calls(monkeypatch, module, name) -> list:
    """The calls of a function from here on."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(
        module, name, lambda *args, **options: calls.append(args) or function(*args, **options)
    )
    return calls


def same(a, b) -> bool:
    a, b = Stego.load(a), Stego.load(b)
    heads = zip(a.head.state_dict().values(), b.head.state_dict().values())
    return a.config == b.config and all(torch.equal(*pair) for pair in (*heads, (a.centers, b.centers)))


def test_another_k_is_what_a_fit_with_it_gives(images, monkeypatch):
    run("fit", images, *FIT, "-k", 3, "--keep-features")
    run("fit", images, *FIT, "-k", 5, "-o", "fitted.pt")
    monkeypatch.setattr(stego, "train_head", None)
    monkeypatch.setattr(features, "image_views", None)
    result = run("fit", "--from", "stego.pt", "-k", 5, "-o", "five.pt")
    assert "Reusing the features of 2 images" in result.stderr and "model five.pt" in result.stdout
    assert same("five.pt", "fitted.pt") and Path("five-fit.png").is_file()
    run("fit", "--from", "stego.pt", "--seed", 4, "--set", "evenness=0.5", "-o", "other.pt")
    config = Stego.load("other.pt").config
    assert (config.clusters, config.seed, config.evenness, config.steps) == (3, 4, 0.5, 3)
    assert Path("stego-features/tokens").is_file() and not list(Path().glob("*.scratch"))


def test_without_kept_features_they_are_computed_again(images):
    run("fit", images, *FIT, "-k", 3)
    run("fit", images, *FIT, "-k", 2, "-o", "fitted.pt")
    assert "Reusing" not in run("fit", "--from", "stego.pt", "-k", 2, "-o", "two.pt").stderr
    assert same("two.pt", "fitted.pt") and not list(Path().glob("*.scratch"))


def test_features_of_other_images_are_left_alone(images, scenes):
    run("fit", images, *FIT, "-k", 3, "--keep-features")
    before = Path("stego-features/tokens").read_bytes()
    run("fit", scenes / "scene02.png", "--from", "stego.pt", "-k", 2, "-o", "two.pt")
    assert Path("stego-features/tokens").read_bytes() == before
    assert Stego.load("two.pt").config.crops == 5


def test_several_numbers_train_once_and_leave_one_picture(images, monkeypatch):
    monkeypatch.setattr("cli_parts.sheets.SHEET_SAMPLE", 12)  # room for both images
    trained, seen = (
        count_calls(monkeypatch, *each) for each in ((stego, "train_head"), (features, "image_views"))
    )
    result = run("fit", images, *FIT, "-k", "4,2,3", "-o", "a.pt")
    assert len(trained) == 1 and len(seen) == 2
    assert sorted(os.listdir()) == ["a-2.pt", "a-3.pt", "a-4.pt", "a-fit.png", "images"]
    assert [len(Stego.load(f"a-{k}.pt").centers) for k in (2, 3, 4)] == [2, 3, 4]
    assert "model a-2.pt a-3.pt a-4.pt, picture a-fit.png" in result.stdout
    with Image.open("a-fit.png") as picture:
        assert picture.width == 4 * SHEET_CELL[0] + 5 * GAP  # the image and three numbers
        assert picture.height > 2 * SHEET_CELL[1]
    run("fit", "--from", "a-2.pt", "-k", "3,4", "-o", "b.pt")
    assert same("a-3.pt", "b-3.pt") and same("a-4.pt", "b-4.pt")


def test_an_interrupted_sweep_goes_on(images, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    args = ("fit", images, *FIT, "-k", "2,3")
    with monkeypatch.context() as patch:
        patch.setattr("stego.cluster_codes", stop)
        assert "the same command goes on" in run(*args, code=130).stderr
    trained = count_calls(monkeypatch, stego, "training_loss")
    run(*args)
    assert not trained and Path("stego-2.pt").is_file() and Path("stego-3.pt").is_file()


def test_named_models_are_not_replaced(images):
    run("fit", images, *FIT, "-k", 2)
    run("name", "0=sky")
    assert "would overwrite an input" in run("fit", "--from", "stego.pt", "-k", 3, code=2).stderr
    shutil.copy("stego.pt", "s-3.pt")
    assert (
        "s-3.pt has named clusters"
        in run("fit", "--from", "stego.pt", "-k", "2,3", "-o", "s.pt", code=2).stderr
    )
    run("fit", "--from", "stego.pt", "-k", 3, "-o", "new.pt", "--match", "stego.pt")
    assert "sky" in Stego.load("new.pt").names


@pytest.mark.parametrize(
    "options, message",
    [
        (("--steps", 5), "Got steps for a model that is clustered anew"),
        (("--backbone", "tiny"), "Got backbone for"),
        (("--preset", "default"), "Got preset for"),
        (("--set", "b_rand=0.3"), "only clusters, seed, evenness, adaptation can be given"),
        (("--set", "code_size=9"), "Got code_size for"),
        (("--set", "evenness=2"), "between 0 and 1"),
        (("--report", "charts"), "nothing is trained"),
        (("--dataset", "potsdam3"), "nothing is trained"),
    ],
)
def test_what_contradicts_the_model_is_refused(here, scenes, saved, options, message):
    result = run("fit", scenes, "--from", saved, "-o", "new.pt", *options, code=2)
    assert message in result.stderr and not os.listdir()


def test_a_model_without_images_needs_some(here, saved):
    assert "does not name the images" in run("fit", "--from", saved, "-o", "new.pt", code=2).stderr
