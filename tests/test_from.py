"""`fit --from MODEL` and `fit -k 8,12,20`: what was learned once, clustered into other numbers."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run
from PIL import Image

import stego
from cli_parts.drawing import GAP, SHEET_CELL
from stego import Stego
from stego_parts import features as tokens

FIT = ("--backbone", "tiny", "--steps", 3)
pytestmark = pytest.mark.usefixtures("short_sheet")


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
    monkeypatch.setattr(tokens, "image_views", None)
    result = run("fit", "--from", "stego.pt", "-k", 5, "-o", "five.pt")
    assert "Reusing the features of 2 images" in result.stderr and "model five.pt" in result.stdout
    assert same("five.pt", "fitted.pt") and Path("five-fit.png").is_file()
    run("fit", "--from", "stego.pt", "--seed", 4, "--set", "evenness=0.5", "-o", "other.pt")
    config = Stego.load("other.pt").config
    assert (config.classes, config.seed, config.evenness, config.steps) == (3, 4, 0.5, 3)
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
        count_calls(monkeypatch, *each) for each in ((stego, "train_head"), (tokens, "image_views"))
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
        assert "with --resume goes on" in run(*args, code=130).stderr
    trained = count_calls(monkeypatch, stego, "training_loss")
    run(*args, "--resume")
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
        (("--set", "b_rand=0.3"), "only classes, seed, evenness, adaptation can be given"),
        (("--set", "code_size=9"), "Got code_size for"),
        (("--set", "evenness=2"), "between 0 and 1"),
        (("--resume",), "nothing is trained"),
        (("--report", "charts"), "nothing is trained"),
        (("--dataset", "potsdam3"), "nothing is trained"),
    ],
)
def test_what_contradicts_the_model_is_refused(here, scenes, saved, options, message):
    result = run("fit", scenes, "--from", saved, "-o", "new.pt", *options, code=2)
    assert message in result.stderr and not os.listdir()


def test_a_model_without_images_needs_some(here, saved):
    assert "does not name the images" in run("fit", "--from", saved, "-o", "new.pt", code=2).stderr


def test_from_python(scenes, model):
    other = Stego.fit(scenes / "sub", from_model=model, classes=2, adaptation=0.0)
    assert len(other.centers) == 2 and other.head is model.head and other.backbone is model.backbone
    assert (other.config.adaptation, other.config.steps, other.config.crops) == (0.0, 60, 20)
    with pytest.raises(ValueError, match="Got batch_size, steps for"):
        Stego.fit(scenes, from_model=model, steps=5, batch_size=3)
