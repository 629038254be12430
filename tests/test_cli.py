"""The command line as a user meets it: what it writes, says and returns."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from PIL import Image

from cli import main
from stego import Stego

LABELLED = ("--images", "photos", "--labels", "labels")
FAST = ("--no-crf", "--resolution", 96)
QUICK = ("--backbone", "tiny", "--steps", 2)
pytestmark = pytest.mark.usefixtures("short_sheet")


@pytest.fixture
def pair(tmp_path_factory, scenes):
    """A folder of two pictures."""
    folder = tmp_path_factory.mktemp("pair")
    for name in ("scene00.png", "scene01.png"):
        shutil.copy(scenes / name, folder)
    return folder


def test_help_loads_no_torch():
    code = (
        "import sys, cli\n"
        "for args in (['--help'], ['--version'], ['fit', '--help'], ['predict', '--help']):\n"
        "    try: cli.main(args)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'PIL', 'scipy'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "stego, version" in result.stdout and "Examples:" in result.stdout


def test_what_the_command_line_knows_is_the_librarys():
    import cli
    from cli_parts import datasets, outputs
    from stego_parts import config

    assert cli.DATASET_NAMES == tuple(datasets.LAYOUTS) and cli.NOTICE == config.NOTICE
    assert cli.WRITTEN.keys() == outputs.SUFFIXES.keys()


def test_fit_options_are_those_of_the_library():
    """Flags, Python arguments and keys of the saved model have the same names, with the same defaults."""
    import inspect

    from stego import Stego
    from stego_parts.config import Config

    known = {name: each.default for name, each in inspect.signature(Stego.fit).parameters.items()}
    known |= vars(Config())
    defaults = main.commands["fit"].make_context("fit", ["images"]).params
    own = {"images", "output", "overwrite", "report", "dataset", "root", "keep_features", "settings"}
    for name, default in defaults.items():
        assert name in own or name in known, name
        assert name in own or default in (None, known[name])  # None: the preset decides
    assert len(re.findall(r"^ +-", run("fit", "--help").stdout, re.M)) <= 19


def test_fit_then_predict(here, scenes):
    args = ("fit", scenes / "sub", "-k", 3, "--backbone", "tiny", "--steps", 5)
    result = run(*args, "--report", "charts", "--set", "batch_size=4", "--set", "b_self=0.1")
    assert "model stego.pt" in result.stdout and "stego-fit.png" in result.stdout
    assert "cluster " not in result.stdout  # for -v
    assert sorted(p.name for p in here.iterdir()) == ["charts", "stego-fit.png", "stego.pt"]
    assert Image.open("charts/similarity.png").size == Image.open("charts/loss.png").size
    config = Stego.load("stego.pt").config
    assert (config.batch_size, config.b_self, config.steps, config.preset) == (4, 0.1, 5, "default")
    run("predict", scenes / "scene00.png", "-o", "mask.png", *FAST)
    with Image.open("mask.png") as mask:
        assert mask.mode == "P" and mask.size == (128, 96) and np.asarray(mask).max() < 3


def test_predict_mirrors_the_tree(here, scenes, saved):
    result = run("predict", scenes, "-m", saved, "-o", "out", "--overlay", *FAST)
    assert "12 of 12 images" in result.stdout
    for source in scenes.rglob("*.png"):
        place = Path("out") / source.relative_to(scenes)
        assert place.is_file() and place.with_suffix(".overlay.jpg").is_file()
    assert len(list(Path("out").rglob("*.*"))) == 24


def test_predict_uses_the_options(here, scenes, saved):
    masks = []
    for name, options in {"a": [], "b": ["--no-crf"], "c": ["--resolution", 96, "--no-crf"]}.items():
        run("predict", scenes / "scene00.png", "-m", saved, "-o", f"{name}.png", *options)
        masks.append(np.asarray(Image.open(f"{name}.png")))
    assert (masks[0] != masks[1]).any() and (masks[1] != masks[2]).any()


# ---- nothing stale -------------------------------------------------------------------------------------------


def test_skip_existing_asks_for_every_output_and_what_it_was_made_with(here, scenes, saved):
    shutil.copy(saved, "stego.pt")

    def predicted(*options):
        args = ("-o", "out", *FAST, "--skip-existing", *options)
        said = run("predict", scenes / "sub", *args).stdout
        return re.search(r"(\d+) of \d+ images, (\d+) skipped", said).groups()

    assert predicted() == ("4", "0") and predicted() == ("0", "4")
    assert predicted("--overlay") == ("4", "0") and predicted("--overlay") == ("0", "4")
    Path("out/scene08.overlay.jpg").unlink()
    assert predicted("--overlay") == ("1", "3")
    assert predicted("--only", "1") == ("4", "0") and set(np.unique(mask("out/scene09.png"))) <= {1, 255}
    assert predicted() == ("4", "0") and predicted("--resolution", 64) == ("4", "0")
    run("name", "0=sky")
    assert predicted("--resolution", 64) == ("4", "0")
    Path("out/scene10.png").write_bytes(b"cut short")
    assert predicted("--resolution", 64) == ("1", "3")
    os.utime("out/scene11.png", (1, 1))  # the image has changed since
    assert predicted("--resolution", 64) == ("1", "3")
    assert predicted("--format", "npz") == ("4", "0") and predicted("--format", "npz") == ("0", "4")


def mask(path):
    return np.asarray(Image.open(path))


def test_the_folder_of_the_images_can_hold_the_outputs(here, scenes, saved):
    """cd images; stego fit .; stego predict .: again and again."""
    for i in range(2):
        shutil.copy(scenes / f"scene0{i}.png", here)
    for name in ("stego.pt", "stego.pt", "other.pt"):
        fitted = run("fit", ".", "-k", 2, *QUICK, "-o", name)
        predicted = run("predict", ".", "--overlay", *FAST)
        assert "2 images" in fitted.stdout and "2 of 2 images" in predicted.stdout
    assert "2 images" in run("show", ".", "--sheet", "s.png").stdout


# ---- nothing lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        (["fit", "photos", "-o", "photos/i.jpg"], "overwrite an input"),
        (["fit", "photos", "-o", "new.jpg"], "has the name of an image"),
        (["fit", "photos", "-o", "photos/x.pt"], "x-fit.png would overwrite an input"),
        (["fit", "photos", "-o", "photos"], "is a folder"),
        (["fit", "photos", "-o", "/dev/null"], "is a device or a pipe"),
        (["fit", "photos", "-o", "photos/i.jpg/m.pt"], "is not a folder"),
        (["fit", "photos", "-o", "/proc/m.pt"], "Cannot write into /proc"),
        (["fit", "photos", "--report", "photos"], "has inputs in it"),
        (["fit", "photos", "--report", "text"], "is not a folder"),
        (["fit", "photos", "--weights", "w.pth", "-o", "w.pth"], "overwrite an input"),
        (["fit", "photos", "-o", "text"], "is not a stego model"),
        (["predict", "photos", "-m", "MODEL", "-o", "text"], "is not a folder"),
        (["predict", "photos/i.jpg", "-m", "MODEL", "-o", "/dev/null"], "is not a folder"),
        (["predict", "photos", "-m", "MODEL", "-o", "/proc/x"], "Cannot write into /proc"),
        (["show", "MODEL", "photos", "--sheet", "s.txt"], "is not a .png"),
        (["show", "MODEL", "photos", "--sheet", "photos/x-fit.png"], "overwrite an input"),
        (["show", "photos/i.jpg", "--at", "3,3", "-m", "MODEL", "-o", "photos/i.jpg"], "overwrite an input"),
        (["eval", *LABELLED, "-m", "MODEL", "--json", "s.txt"], "is not a .json"),
        (["eval", *LABELLED, "-m", "MODEL", "--figures", "photos"], "has inputs in it"),
        (["demo", "-o", "photos"], "no demo made it"),
    ],
)
def test_outputs_are_checked_before_any_work(here, scenes, saved, monkeypatch, args, message):
    for place in ("photos/i.jpg", "photos/x-fit.png", "labels/i.png", "labels/x-fit.png"):
        Path(place).parent.mkdir(exist_ok=True)
        picture = Image.open(scenes / "scene00.png")
        picture.convert("L" if "labels" in place else "RGB").save(place)
    Path("text").write_text("words")
    Path("w.pth").write_text("weights")
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    monkeypatch.setattr("cli.Progress.__call__", None)  # the work has begun
    result = run(*[saved if arg == "MODEL" else arg for arg in args], code=2)
    assert message in result.stderr
    assert before == {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}


def test_a_picture_that_only_has_the_name_of_the_sheet(here, scenes):
    Path("photos").mkdir()
    for name in ("a.png", "stego-fit.png"):
        shutil.copy(scenes / "scene00.png", f"photos/{name}")
    args = ("fit", "photos", "-o", "photos/stego.pt", "-k", 2, *QUICK)
    assert "stego-fit.png would overwrite an input" in run(*args, code=2).stderr


def test_a_demo_stays_out_of_the_way(here, monkeypatch):
    from cli_parts.demo import check_demo_folder, draw_scenes

    monkeypatch.setattr("cli_parts.demo.SCENES", {"train": 1, "val": 1})
    draw_scenes(here / "demo", seed=0)
    check_demo_folder(here / "demo")  # a second one may go there
    check_demo_folder(here / "new")
    (here / "demo/images/train/holiday.png").touch()
    with pytest.raises(ValueError, match="holiday.png"):
        check_demo_folder(here / "demo")


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


def test_resume_is_for_the_same_fit(here, pair, monkeypatch):
    args = ("fit", pair, "--backbone", "tiny", "--steps", 20, "-k", 2)
    stopped = interrupt(monkeypatch, "training", 10, *args)
    assert "Interrupted at training 10/20; the same command with --resume goes on." in stopped.stderr
    refused = run(*args[:-1], 3, "--resume", code=2)
    assert "other images or options" in refused.stderr
    resumed = run(*args, "--resume").stderr
    assert "features of 2 images" in resumed and re.search(r"training from step \d", resumed)


def test_a_refused_resume_leaves_the_features(here, pair, monkeypatch):
    args = ("fit", pair, *QUICK, "-k", 2)
    interrupt(monkeypatch, "features", 1, *args)
    run(*args[:-1], 3, "--resume", code=2)
    assert "Reusing the features of 1 images" in run(*args, "--resume").stderr


def interrupt(monkeypatch, stage, done, *args):
    """A command that Ctrl-C ends at some progress."""
    import cli

    told = cli.Progress.__call__

    def call(self, *now):
        told(self, *now)
        if now[:2] == (stage, done):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stego_parts.checkpoint.SAVE_EVERY", 0)
        patch.setattr("cli.Progress.__call__", call)
        return run(*args, code=130)


def test_ctrl_c_says_how_to_go_on(here, scenes, saved, monkeypatch):
    args = ("predict", scenes / "sub", "-m", saved, "-o", "out", *FAST)
    stopped = interrupt(monkeypatch, "predict", 2, *args)
    assert "Interrupted at predict 2/4; the same command with --skip-existing goes on." in stopped.stderr
    stopped = interrupt(monkeypatch, "regions", 1, "show", saved, scenes / "sub", "--sheet", "s.png")
    assert "Interrupted at regions 1/4; the same command starts afresh." in stopped.stderr


def test_stages_after_the_training_are_shown(here, scenes, monkeypatch):
    stages = []
    monkeypatch.setattr("cli.Progress.__call__", lambda self, stage, *now: stages.append(stage))
    run("fit", scenes / "scene00.png", *QUICK, "-k", 2)
    assert [*dict.fromkeys(stages)][-3:] == ["training", "clusters", "picture"]


def test_what_does_not_fit_into_memory_is_refused(here, scenes, saved, monkeypatch):
    monkeypatch.setattr("stego_parts.features.available_memory", lambda device: 1e9)
    args = ("predict", scenes / "scene00.png", "-m", saved, "-o", "mask.png", "--no-crf", "--resolution")
    refused = run(*args, 5000, code=2).stderr  # 2 x 625 x 625 positions of 256 values
    assert "27.2 GB" in refused and "1.0 GB are available" in refused
    largest = int(re.search(r"at most (\d+)", refused)[1])
    assert 900 < largest < 1000 and not Path("mask.png").exists()
    Stego.load(saved).working_size(Image.new("RGB", (500, 500)), largest)
    with pytest.raises(ValueError, match="available"):
        Stego.load(saved).working_size(Image.new("RGB", (500, 500)), largest + 8)
    with pytest.raises(ValueError, match="available"):  # twice as long, twice as much
        Stego.load(saved).working_size(Image.new("RGB", (1000, 500)), largest)


def test_one_bad_image_among_good_ones(here, scenes, saved):
    Path("in").mkdir()
    for i in range(2):
        Image.open(scenes / f"scene0{i}.png").save(f"in/{i}.png")
    Path("in/broken.jpg").write_bytes(b"no picture")
    result = run("predict", "in", "-m", saved, "-o", "out", *FAST, code=1)
    assert "2 of 3 images" in result.stdout and "Cannot read in/broken.jpg" in result.stderr
    assert sorted(p.name for p in Path("out").iterdir()) == ["0.png", "1.png"]
    result = run("fit", "in", "-k", 2, *QUICK)
    assert "Skipped: Cannot read in/broken.jpg" in result.stderr and Path("stego.pt").is_file()


# ---- words and codes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["fit"], 2, "Give images to fit on, or a --dataset"),
        (["fit", "void"], 2, "No images in void"),
        (["fit", "nowhere"], 2, "No such file or folder: nowhere"),
        (["fit", "text.jpg", "--backbone", "tiny"], 1, "None of the 1 images"),
        (["fit", "ok.png", "-k", "256"], 2, "1 to 255"),
        (["fit", "ok.png", "-k", "0"], 2, "1 to 255"),
        (["fit", "ok.png", "-k", "two"], 2, "a number from 1 to 255, or auto"),
        (["fit", "ok.png", "--steps", "0"], 2, "x>=1"),
        (["fit", "ok.png", "--preset", "moon"], 2, "moon"),
        (["fit", "ok.png", "--set", "moon=3"], 2, "b_rand"),
        (["fit", "ok.png", "--set", "b_rand=high"], 2, "b_rand"),
        (["fit", "ok.png", "--set", "views=some"], 2, "windows"),
        (["fit", "ok.png", "--set", "stride=16", "--backbone", "tiny"], 2, "patches of 8 pixels"),
        (["fit", "ok.png", "--backbone", "vgg"], 2, "Unknown backbone 'vgg'"),
        (
            ["fit", "ok.png", "--backbone", "dino_vits8", "--weights", "none.pth"],
            2,
            "No weight file at none.pth",
        ),
        (["fit", "ok.png", "--backbone", "dino_vits8", "--weights", "text.jpg"], 2, "loaded safely"),
        (["fit", "ok.png", "--backbone", "tiny", "--weights", "text.jpg"], 2, "tiny comes with its weights"),
        (["fit", "ok.png", "--backbone", "tiny", "--device", "cuda:77"], 2, "--device cpu"),
        (["fit", "ok.png", "-o", "void"], 2, "is a folder"),
        (["fit", "ok.png", "-q", "-v"], 2, "opposites"),
        (["fit", "ok.png", "--max-megapixels", "0"], 2, "x>0"),
        (["predict", "ok.png"], 2, "No model at stego.pt; make one with `stego fit IMAGES`"),
        (["predict", "ok.png", "-m", "text.jpg"], 2, "text.jpg is not a stego model"),
        (["predict", "nowhere", "-m", "MODEL"], 2, "No such file or folder: nowhere"),
        (["predict", "*.bmp", "-m", "MODEL"], 2, "matches no file"),
        (["predict", "-", "ok.png", "-m", "MODEL"], 2, "one image on stdin"),
        (["predict", "small.png", "-m", "MODEL"], 1, "smaller than one patch"),
        (["predict", "ok.png", "-m", "MODEL", "-o", "mask.jpg"], 2, "not a .png"),
        (["predict", "ok.png", "small.png", "-m", "MODEL", "-o", "mask.png"], 2, "into one output"),
        (["predict", "void2", "void3", "-m", "MODEL", "-o", "out"], 2, "would both be written to out/ok.png"),
        (["predict", "ok.png", "-m", "MODEL", "--resolution", "7"], 2, "at least 8"),
        (["predict", "ok.png", "-m", "MODEL", "--crf-size", "0"], 2, "x>0"),
        (["predict", "ok.png", "-m", "MODEL", "--only", "2,"], 2, "empty name"),
        (["predict", "ok.png", "-m", "MODEL", "--only", "moon"], 2, "no cluster 'moon'"),
        (["predict", "ok.png", "-m", "MODEL", "--weights", "text.jpg"], 2, "tiny comes with its weights"),
        (["fit", "ok.png", "-k", "3,x"], 2, "or several: 8,12,20"),
        (["fit", "--from", "moon.pt"], 2, "No model at moon.pt"),
        (["show", "ok.png", "--at", "3"], 2, "like 120,80"),
        (["show", "MODEL", "--at", "3,3"], 2, "give an image"),
        (["show", "MODEL", "void2", "--at", "3,3"], 2, "one, name it first"),
        (["show", "MODEL", "-m", "MODEL"], 2, "Two models"),
        (["name", "moon.pt", "0=a"], 2, "No model at moon.pt"),
    ],
)
def test_bad_input_is_one_sentence(here, scenes, saved, args, code, message):
    Path("void").mkdir()
    Path("text.jpg").write_text("hello")
    for name in ("ok.png", "ok.bmp"):
        Image.open(scenes / "scene00.png").save(name)
    for name in ("void2", "void3"):
        Path(name).mkdir()
        Image.open(scenes / "scene00.png").save(f"{name}/ok.png")
    Image.new("RGB", (4, 4)).save("small.png")
    if "*.bmp" in args:
        Path("ok.bmp").unlink()
    before = Path("ok.png").read_bytes()
    result = run(*[saved if arg == "MODEL" else arg for arg in args], code=code)
    assert message in result.stderr
    assert Path("ok.png").read_bytes() == before and not Path("stego.pt").exists()


def test_stdout_is_for_results(here, scenes, saved):
    """No progress and no warning on stdout; nothing on stderr when it is no terminal and all is well."""
    result = run("predict", scenes / "scene00.png", "-m", saved, "-o", "mask.png")
    assert result.stderr == "" and result.stdout.count("\n") == 1


def test_an_error_of_the_system_is_a_sentence(here, scenes, saved, monkeypatch):
    def full(descriptor, path):
        raise OSError(28, "No space left on device", ".mask-x1.png.part")

    monkeypatch.setattr("os.replace", full)
    result = run("predict", scenes / "scene00.png", "-m", saved, "-o", "mask.png", *FAST, code=1)
    assert "no space left on device" in result.stderr
    assert "Errno" not in result.stderr and ".part" not in result.stderr


def test_progress_on_a_terminal(monkeypatch, capsys):
    from cli import Progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress()
    for done in range(1, 4):
        progress("training", done, 3)
    assert "training 3/3" in capsys.readouterr().err
