"""The command line as a user meets it: what it writes, says and returns."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from PIL import Image

from cli import main
from stego_parts import tokens


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


def test_presets_on_the_command_line_are_the_librarys():
    import cli
    import stego

    assert set(cli.PRESET_NAMES) == set(stego.PRESETS) and cli.VIEWS == tokens.VIEWS


def test_fit_options_are_those_of_the_library():
    """Flags, Python arguments and keys of the saved model bear the same names, with the same defaults."""
    import inspect

    from stego import Stego
    from stego_parts.config import PRESETS

    signature = inspect.signature(Stego.fit).parameters
    options = main.commands["fit"].make_context("fit", ["images"]).params
    for name, default in options.items():
        if name not in ("images", "output", "report", "dataset", "root", "keep_features"):
            assert name in signature or name in PRESETS["small"], name
            assert default == (signature[name].default if name in signature else None)


def test_fit_then_predict(here, scenes):
    result = run("fit", scenes, "-k", 3, "--backbone", "tiny", "--steps", 5, "--report", "charts")
    assert "stego.pt" in result.stdout and "stego-fit.png" in result.stdout and "cluster   0" in result.stdout
    assert sorted(p.name for p in here.iterdir()) == ["charts", "stego-fit.png", "stego.pt"]
    assert Image.open("charts/similarity.png").size == Image.open("charts/loss.png").size
    assert Image.open("stego-fit.png").width > 1000
    run("predict", scenes / "scene00.png", "-o", "mask.png")
    with Image.open("mask.png") as mask:
        assert mask.mode == "P" and mask.size == (128, 96) and np.asarray(mask).max() < 3


def test_predict_mirrors_the_tree(here, scenes, saved):
    result = run("predict", scenes, "-m", saved, "-o", "out", "--overlay", "--no-crf")
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


def test_skip_existing(here, scenes, saved):
    source = scenes / "scene00.png"
    Path("out").mkdir()
    Path("out/scene00.png").write_bytes(b"mine")
    assert "0 of 0 images" in run("predict", source, "-m", saved, "-o", "out", "--skip-existing").stdout
    assert Path("out/scene00.png").read_bytes() == b"mine"
    run("predict", source, "-m", saved, "-o", "out", "--no-crf")
    assert Image.open("out/scene00.png").mode == "P"


def test_one_bad_image_among_good_ones(here, scenes, saved):
    Path("in").mkdir()
    for i in range(2):
        Image.open(scenes / f"scene0{i}.png").save(f"in/{i}.png")
    Path("in/broken.jpg").write_bytes(b"no picture")
    result = run("predict", "in", "-m", saved, "-o", "out", "--no-crf", code=1)
    assert "2 of 3 images" in result.stdout and "Cannot read in/broken.jpg" in result.stderr
    assert sorted(p.name for p in Path("out").iterdir()) == ["0.png", "1.png"]
    result = run("fit", "in", "-k", 2, "--backbone", "tiny", "--steps", 2)
    assert "Skipped: Cannot read in/broken.jpg" in result.stderr and Path("stego.pt").is_file()


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["fit"], 2, "Give images to fit on, or a --dataset"),
        (["fit", "void"], 1, "No images in void"),
        (["fit", "nowhere"], 1, "No such file or folder: nowhere"),
        (["fit", "text.jpg", "--backbone", "tiny"], 1, "None of the 1 images"),
        (["fit", "ok.png", "-k", "256", "--backbone", "tiny"], 1, "1 to 255"),
        (["fit", "ok.png", "-k", "two"], 2, "a number from 1 to 255, or auto"),
        (["fit", "ok.png", "--preset", "moon"], 2, "moon"),
        (["fit", "ok.png", "--backbone", "vgg"], 1, "Unknown backbone 'vgg'"),
        (
            ["fit", "ok.png", "--backbone", "dino_vits8", "--weights", "none.pth"],
            1,
            "No weight file at none.pth",
        ),
        (["fit", "ok.png", "--backbone", "dino_vits8", "--weights", "text.jpg"], 1, "loaded safely"),
        (["fit", "ok.png", "--backbone", "tiny", "--device", "cuda:77"], 1, "--device cpu"),
        (["fit", "ok.png", "-o", "void"], 2, "is a folder"),
        (["predict", "ok.png"], 1, "No model at stego.pt; make one with `stego fit IMAGES`"),
        (["predict", "ok.png", "-m", "text.jpg"], 1, "text.jpg is not a stego model"),
        (["predict", "nowhere", "-m", "MODEL"], 1, "No such file or folder: nowhere"),
        (["predict", "*.bmp", "-m", "MODEL"], 1, "matches no file"),
        (["predict", "small.png", "-m", "MODEL"], 1, "smaller than one patch"),
        (["predict", "ok.png", "-m", "MODEL", "-o", "mask.jpg"], 2, "not a .png"),
        (
            ["predict", "ok.png", "small.png", "-m", "MODEL", "-o", "mask.png"],
            2,
            "cannot go into the one file",
        ),
        (["predict", "ok.png", "-m", "MODEL", "-o", "ok.png"], 2, "would overwrite the image"),
        (["predict", "ok.png", "-m", "MODEL", "-o", "."], 2, "would overwrite the image"),
        (
            ["predict", "ok.png", "ok.bmp", "-m", "MODEL", "-o", "out"],
            2,
            "would both be written to out/ok.png",
        ),
        (["predict", "ok.png", "-m", "MODEL", "--resolution", "0"], 1, "resolution"),
        (["predict", "ok.png", "-m", "MODEL", "--crf-size", "-1"], 1, "positive number of megapixels"),
        (["predict", "ok.png", "-m", "MODEL", "--weights", "text.jpg"], 1, "loaded safely"),
    ],
)
def test_bad_input_is_one_sentence(here, scenes, saved, args, code, message):
    Path("void").mkdir()
    Path("text.jpg").write_text("hello")
    for name in ("ok.png", "ok.bmp"):
        Image.open(scenes / "scene00.png").save(name)
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


def test_progress_on_a_terminal(monkeypatch, capsys):
    from cli import Progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress()
    for done in range(1, 4):
        progress("training", done, 3)
    assert "training 3/3" in capsys.readouterr().err
