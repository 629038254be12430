"""The commands of README and docs/USAGE.md run as printed, in order, on drawn images; nothing is undocumented."""

import json
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import run
from PIL import Image

import cli
from cli_parts.demo import SCENE_CLASSES

pytestmark = pytest.mark.long  # needs a Unix shell

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text() + "\n" + (ROOT / "docs" / "USAGE.md").read_text()
COMMANDS = cli.main.commands
OPTIONS = [
    (command, option)
    for command in COMMANDS.values()
    for option in command.params
    if isinstance(option, click.Option)
]
SET_UP = ("python3 ", "pip ", "bash ")  # commands that install or test
OURS = ("stego", "cluster")  # results of the model itself
INPUTS = {"dataset", "root", "images", "labels"}  # what a command works on has no default


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def lines() -> list[str]:
    """The commands of README's shell blocks, in order."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        for part in line.split(" #")[0].split(" && "):
            command = part.strip().removeprefix(".venv/bin/")
            if command and not command.startswith(SET_UP):
                found.append(command)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory, scenes):
    """A folder as README supposes it, after all its commands: images/, more/, img.jpg and what the commands left."""
    folder = tmp_path_factory.mktemp("readme")
    for name, start in (("images", 0), ("more", 3)):
        (folder / name).mkdir()
        for i in range(start, start + 2):
            Image.open(scenes / f"scene{i:02d}.png").save(folder / name / f"{i}.jpg")
    Image.open(scenes / "scene00.png").save(folder / "img.jpg")
    Image.open(scenes / "scene00.png").resize((700, 350)).save(folder / "mosaic.tif")
    (folder / "some.txt").write_text("img.jpg\n")
    tool = folder / "bin" / "stego"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m cli "$@"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("cli_parts.demo.SCENES", {"train": 2, "val": 1})
        patch.setattr("cli_parts.demo.STEPS", 10)
        patch.setattr("cli_parts.demo.BACKBONE", "tiny")
        patch.setattr("cli_parts.evaluation.ROUNDS", 1)  # of the linear probe
        patch.setattr("cli_parts.evaluation.PROBE_ROWS", 4000)
        patch.setattr("cli_parts.sheets.SHEET_IMAGES", 1)  # that the picture of a fit shows
        patch.setattr("cli_parts.sheets.SHEET_SAMPLE", 1)
        patch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
        said = {line: execute(line) for line in lines()}
    assert len(said) >= 12
    return folder, said


def execute(line: str) -> str:
    """Run one command; a pipe through the shell, all others here, where torch is loaded already."""
    if "|" in line:
        done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (line, done.stderr)
        return done.stdout
    tool, *args = shlex.split(line)
    assert tool == "stego", line
    trains = args[0] == "fit" and "--from" not in args
    return run(*args, *(["--backbone", "tiny", "--steps", 10] if trains else [])).stdout


# ---- every command, as printed ---------------------------------------------------------------------------------


def test_commands_leave_what_they_say(place):
    folder, _ = place
    made = "stego.pt stego-fit.png out/0.png out/0.overlay.jpg sheet.png newer.pt corr.png road.png mask.png"
    for name in made.split():
        assert (folder / name).is_file(), name
    mask = (folder / "mask.png").read_bytes()  # through the pipe
    assert mask.startswith(b"\x89PNG\r\n\x1a\n") and mask.endswith(b"IEND\xaeB`\x82")
    assert set(np.unique(Image.open(folder / "road.png"))) <= {0, 255}  # 0 and 2 are called road
    assert len(json.loads((folder / "shares.json").read_text())["images"]) == 2
    coco = json.loads((folder / "coco.json").read_text())["categories"]
    assert [each["name"] for each in coco].count("road") == 1
    assert (folder / "shares.csv").read_text().count("\n") > 2
    assert Image.open(folder / "cutout.png").mode == "RGBA" and Image.open(folder / "site.tif").mode == "P"
    assert set(np.load(folder / "img.npz")) == {"probabilities", "names", "size"}
    assert json.loads((folder / "scores/scores.json").read_text())["images"] == 1
    assert (folder / "scores/confusion.png").is_file()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8000


def test_demo_leaves_everything(place):
    folder, said = place
    demo = folder / "stego-demo"
    names = {path.relative_to(demo).as_posix() for path in demo.rglob("*") if path.is_file()}
    assert "index-pictures/photo0.jpg" in names
    names = {name for name in names if not name.startswith("index-pictures/")}
    scenes = ["train/scene00.png", "train/scene01.png", "val/scene02.png"]
    assert names == {f"{kind}/{name}" for kind in ("images", "labels") for name in scenes} | {
        "classes.txt",
        "stego.pt",
        "sheet.png",
        "index.html",
        "scores.json",
        "figures/confusion.png",
        "figures/strips.png",
        "masks/scene02.png",
        "overlays/scene02.jpg",
    }
    scores = json.loads((demo / "scores.json").read_text())
    assert scores["classes"] == list(SCENE_CLASSES) and scores["images"] == 1
    best = max(each["accuracy"] for each in scores["results"] if (each["features"], each["probe"]) == OURS)
    assert f"{100 * best:.1f}" in said["stego demo"] and "3 drawn scenes" in said["stego demo"]
    with Image.open(demo / "masks/scene02.png") as mask:
        assert mask.mode == "P" and np.asarray(mask).max() < len(SCENE_CLASSES)
    assert set(run("show", demo / "stego.pt").stdout.split()) & set(SCENE_CLASSES)


def test_python_snippets_run_as_printed(place, monkeypatch):
    monkeypatch.chdir(place[0])
    given = {"image": torch.zeros(3, 8, 9, dtype=torch.uint8), "scores": torch.randn(4, 8, 9)}
    assert len(blocks("python")) >= 2
    code = "\n".join(blocks("python"))
    exec(
        code.replace('Stego.fit("images", clusters=27)', 'Stego.fit("images", backbone="tiny", steps=5)'),
        given,
    )


# ---- nothing undocumented, nothing dead ------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_has_help_with_an_example_and_stands_in_readme(command):
    text = run(command.name, "--help").stdout
    assert re.search(r"Examples?:\n +stego " + command.name, text)
    assert any(re.search(rf"\bstego {command.name}\b", line) for line in lines())
    assert len(command.get_short_help_str(100)) < 70


@pytest.mark.parametrize("command, option", OPTIONS, ids=lambda each: each.name)
def test_every_option_is_explained_with_its_default(command, option):
    text = option.help or ""
    assert text and "\n" not in text and len(text) < 240
    if not option.is_flag and option.name not in INPUTS:
        assert option.show_default or "[default: " in text, f"{command.name} {option.opts}"


@pytest.mark.parametrize("command, option", OPTIONS, ids=lambda each: each.name)
def test_every_option_stands_in_readme_or_the_examples(command, option):
    names = [*option.opts, *option.secondary_opts]
    assert any(
        re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", README + command.help) for name in names
    ), names


@pytest.mark.parametrize(
    "variables, wanted",
    [
        ({"_STEGO_COMPLETE": "bash_source"}, "_stego_completion"),
        ({"_STEGO_COMPLETE": "bash_complete", "COMP_WORDS": "stego pre", "COMP_CWORD": "1"}, "predict"),
        (
            {"_STEGO_COMPLETE": "bash_complete", "COMP_WORDS": "stego predict --form", "COMP_CWORD": "2"},
            "--format",
        ),
    ],
)
def test_completion(variables, wanted):
    """Shells ask the tool what may follow."""
    assert wanted in CliRunner(env=variables).invoke(cli.main, prog_name="stego").output
