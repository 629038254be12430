"""What all commands have in common: help, one sentence for every error, what goes to stdout, how much is said."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAST, run
from PIL import Image

import cli
from stego import Stego

pytestmark = pytest.mark.usefixtures("short_sheet")


def test_help_loads_no_torch():
    code = (
        "import sys, cli\n"
        "for args in (['--help'], ['--version'], ['fit', '--help'], ['predict', '--help'], ['eval', '--help']):\n"
        "    try: cli.main(args)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'PIL', 'scipy'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "stego, version" in result.stdout and "Examples:" in result.stdout


def test_an_interruption_while_modules_load_is_no_traceback(tmp_path):
    """A click that is interrupted while it is imported, once by the program and once by a module that imports it."""
    (tmp_path / "click.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    (tmp_path / "stego").write_text("import cli\ncli.main()\n")  # as pip writes it
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent)}
    options = dict(capture_output=True, text=True, timeout=60, env=environment)
    # it may be ignored around the tests
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    program = subprocess.run([sys.executable, tmp_path / "stego", "--help"], **options)
    assert program.returncode == -signal.SIGINT and program.stderr == ""
    module = subprocess.run([sys.executable, "-c", "import cli"], cwd=tmp_path, **options)
    assert "KeyboardInterrupt" in module.stderr


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
        (["fit", "ok.png", "-k", "two"], 2, "a number from 1 to 255, or several"),
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
        (["fit", "ok.png", "--max-megapixels", "0"], 2, "x>0"),
        (["predict", "ok.png"], 2, "No model at stego.pt; make one with `stego fit IMAGES`"),
        (["predict", "ok.png", "-m", "text.jpg"], 2, "text.jpg is not a stego model"),
        (["predict", "nowhere", "-m", "MODEL"], 2, "No such file or folder: nowhere"),
        (["predict", "*.bmp", "-m", "MODEL"], 2, "matches no file"),
        (["predict", "-", "ok.png", "-m", "MODEL"], 2, "one image on stdin"),
        (["predict", "small.png", "-m", "MODEL"], 1, "smaller than one patch"),
        (["predict", "ok.png", "-m", "MODEL", "-o", "mask.jpg"], 2, "not a .png"),
        (["predict", "ok.png", "small.png", "-m", "MODEL", "-o", "mask.png"], 2, "into one output"),
        (["predict", "ok.png", "small.png", "-m", "MODEL", "-o", "all.csv"], 2, "--format csv"),
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
    """Progress on stderr, a line a stage where that is no terminal; on stdout only what came of it."""
    result = run("predict", scenes / "scene00.png", "-m", saved, "-o", "mask.png")
    assert result.stderr == "predict 1/1\n" and result.stdout.count("\n") == 1


def test_progress_on_a_terminal(monkeypatch, capsys):
    from cli import Progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress()
    for done in range(1, 4):
        progress("training", done, 3)
    assert "training 3/3" in capsys.readouterr().err


def test_progress_without_a_terminal(monkeypatch, capsys):
    """A line at the start of each stage, and at most one a minute, with how long the rest will take."""
    from cli_parts import console

    clock = iter([0.0, 0.0, 10.0, 70.0, 80.0, 90.0])  # of the start and of each call
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    console.log.setLevel(logging.INFO)
    progress = console.Progress()
    for stage, done in (("features", 0), ("features", 1), ("features", 7), ("features", 8), ("training", 0)):
        progress(stage, done, 14)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["features 0/14", "features 7/14  1:10 left", "training 0/14"]


def test_version_tells_what_it_stands_on():
    from cli_parts.console import versions

    said = versions()
    assert f"torch {torch.__version__.split('+')[0]}" in said and "pillow " in said and " threads" in said


def test_quiet_and_verbose(here, scenes, saved):
    source = scenes / "scene00.png"
    result = run("predict", source, "-m", saved, "-o", "a.png", *FAST, "-q")
    assert result.output == "" and (here / "a.png").is_file()
    assert "No model" in run("predict", source, "-q", code=2).stderr
    assert "Wrote a.png" in run("predict", source, "-m", saved, "-o", "a.png", *FAST, "-v").stderr
    assert "seed: 0" in run("show", saved, "-v").stderr
    result = run("fit", scenes / "scene00.png", "-k", 2, "--backbone", "tiny", "--steps", 2, "-v")
    assert "b_rand: " in result.stderr and "1 image," in result.stdout
    assert result.stdout.count("cluster ") == 2


def test_colours_only_where_wanted(here, saved, monkeypatch):
    (here / "stego.pt").write_bytes(saved.read_bytes())
    monkeypatch.delenv("NO_COLOR", raising=False)
    red, green, blue = Stego.load(saved).palette[0].tolist()
    assert f"\x1b[38;2;{red};{green};{blue}m" in run("show", "stego.pt", color=True).stdout
    assert "\x1b" not in run("show", "stego.pt").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("show", "stego.pt", color=True).stdout
