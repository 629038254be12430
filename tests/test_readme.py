"""README's commands run as printed, on drawn images."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory, scenes):
    """A folder as README supposes it: images/ and img.jpg."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(scenes, folder / "images")
    from PIL import Image
    Image.open(scenes / "scene00.png").convert("RGB").save(folder / "img.jpg")
    return folder


def test_commands_run_as_printed(place):
    commands = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    commands = [command for command in commands if re.match(r"stego (fit|predict)", command)]
    assert len(commands) >= 3
    for command in commands:
        command = command.replace("stego ", f"{sys.executable} -m cli ", 1)
        command = re.sub(r"-m cli fit", "-m cli fit --backbone tiny --steps 20", command)
        result = subprocess.run(command, shell=True, cwd=place, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, (command, result.stderr)
    assert (place / "stego.pt").is_file() and (place / "stego-fit.png").is_file() and (place / "mask.png").is_file()


def test_python_snippets_run_as_printed(place):
    given = "import torch; image = torch.zeros(3, 8, 9, dtype=torch.uint8); scores = torch.randn(4, 8, 9)\n"
    assert len(blocks("python")) >= 2
    for snippet in blocks("python"):
        snippet = given + snippet.replace('Stego.fit("images"', 'Stego.fit("images", backbone="tiny", steps=5')
        result = subprocess.run([sys.executable, "-c", snippet], cwd=place, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, (snippet, result.stderr)


def test_every_option_of_the_commands_has_help():
    from cli import main
    for command in main.commands.values():
        assert command.help
        for option in command.params:
            assert option.param_type_name == "argument" or option.help, f"{command.name} {option.name}"
