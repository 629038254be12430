"""Data the tests draw themselves: the scenes of `stego demo`, small, with their label maps in three classes."""

import logging
import os
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from cli import main
from cli_parts import evaluation
from cli_parts.demo import draw_scene as draw_demo_scene
from cli_parts.labels import folder_set
from cli_parts.sheets import HEATMAP_HEIGHT
from stego import Stego
from stego_parts.backbones import BACKBONES
from stego_parts.images import IGNORE

FAST = ("--no-crf", "--resolution", 96)
QUICK = ("--backbone", "tiny", "--steps", 2)
LABELLED = ("--images", "photos", "--labels", "labels")
LINE, GAP = 18, 8  # pixels: a line of text, what is between pictures
TOP = GAP + LINE + GAP + LINE + GAP  # margin, headings, the first caption
ROW = LINE + GAP + HEATMAP_HEIGHT + GAP  # caption and pictures

ENVIRONMENT = dict(os.environ)  # as the user has it

torch.set_num_threads(1)  # small problems: more threads only wait for each other


def draw_scene(seed: int, height: int = 96, width: int = 128):
    """A picture (H, W, 3) uint8 and its labels (H, W) uint8: sky (0), land and road (1), what stands on it (2)."""
    image, labels = draw_demo_scene(seed, height, width)
    return np.array(image), np.array([0, 1, 1, 1, 2, 2, 2], np.uint8)[labels]


@pytest.fixture(autouse=True)
def library_logging():
    """The command line sends the library's warnings to stderr; each test starts without that."""
    logger = logging.getLogger("stego")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def no_package_index():
    """pip finds nothing here or in commands that tests start, whatever the user has set up."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            patch.delenv(name)
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def short_kmeans():
    """k-means of 3 starts on 2,000 codes: enough for drawn scenes, and quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stego.CLUSTER_ROWS", 2000)
        for module in ("stego", "cli_parts.evaluation"):
            patch.setattr(f"{module}.CLUSTER_STARTS", 3)
        yield


@pytest.fixture
def short_sheet(monkeypatch):
    """The picture of a fit shows one image, where it does not matter which."""
    for name in ("SHEET_IMAGES", "SHEET_SAMPLE"):
        monkeypatch.setattr(f"cli_parts.sheets.{name}", 1)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder of 12 drawn pictures, four of them in a subfolder."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "sub").mkdir()
    for i in range(12):
        place = folder / "sub" if i >= 8 else folder
        Image.fromarray(draw_scene(i)[0]).save(place / f"scene{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def model(scenes):
    """A model fitted on the drawn scenes with the bundled backbone; its clusters are the three large parts."""
    return Stego.fit(scenes, clusters=3, backbone="tiny", steps=60, batch_size=8, evenness=0.0)


@pytest.fixture(scope="session")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "stego.pt"
    model.save(path)
    return path


@pytest.fixture
def small_backbones(monkeypatch, tmp_path):
    """Published names with a small width, and an empty torch cache."""
    for name, spec in BACKBONES.items():
        if spec.heads:
            made = spec._replace(channels=24, heads=3, grid=5, sha256="", tensors="")
            monkeypatch.setitem(BACKBONES, name, made)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args, code=0, **settings):
    """One command of the tool, in this process."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], **settings)
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def named(here, saved):
    """stego.pt in the current folder, two of its clusters named."""
    model = Stego.load(saved)
    model.rename({0: "sky", 2: "block"})
    model.save("stego.pt")
    return model


def mask_of(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def copy(here, saved):
    (here / "stego.pt").write_bytes(saved.read_bytes())
    return here / "stego.pt"


@pytest.fixture
def pair(tmp_path_factory, scenes):
    """A folder of two pictures."""
    folder = tmp_path_factory.mktemp("pair")
    for name in ("scene00.png", "scene01.png"):
        shutil.copy(scenes / name, folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def small_probes():
    """Probes on 1,200 positions: enough for drawn scenes, and quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "PROBE_ROWS", 1200)
        yield


@pytest.fixture
def short_probes(monkeypatch):
    """Linear probes that stop early, on smaller pictures: where it does not matter how good they are."""
    monkeypatch.setattr(evaluation, "ROUNDS", 3)
    monkeypatch.setattr(evaluation, "SIDE", 160)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Folders val (4 pictures) and train (6) of drawn scenes with their labels; part of one label is ignored."""
    root = tmp_path_factory.mktemp("drawn")
    for split, seeds in (("val", range(100, 104)), ("train", range(200, 206))):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for seed in seeds:
            image, label = draw_scene(seed)
            if seed == 101:
                label[:, :30] = IGNORE
            Image.fromarray(image).save(root / f"images/{split}/{seed}.png")
            Image.fromarray(label).save(root / f"labels/{split}/{seed}.png")
    (root / "names.txt").write_text("sky\nground\nblock\n")
    return root


def sets(drawn):
    return [
        folder_set(drawn / f"images/{split}", drawn / f"labels/{split}", names=drawn / "names.txt")
        for split in ("val", "train")
    ]
