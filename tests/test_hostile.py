"""Odd and hostile inputs through the command: a mask or the expected sentence for each, never a traceback."""

import os
import struct
import sys
import zlib

import pytest
import torch
from click.testing import CliRunner
from conftest import draw_scene
from PIL import Image

from cli import main

FAST = ("--no-crf", "--resolution", "96")
SCENE = Image.fromarray(draw_scene(0)[0])


def png_header(width, height):
    """A PNG that claims a size and has hardly any data."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def cut(path):
    SCENE.save(path, quality=95)
    path.write_bytes(path.read_bytes()[:900])


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    SCENE.save(path, exif=exif)


def unreadable(path):
    SCENE.save(path)
    path.chmod(0)


def named(name):
    return lambda path: SCENE.save(path.with_name(name), "PNG")


# file name: (how it is made, size of the mask or None, what is said on failure)
TABLE = {
    "bomb.png": (
        lambda path: path.write_bytes(png_header(40_000, 40_000)),
        None,
        "the limit with --max-megapixels",
    ),
    "strip.png": (lambda path: Image.new("RGB", (60_000, 10), "red").save(path), (60_000, 10), ""),
    "speck.png": (lambda path: Image.new("RGB", (5, 900)).save(path), None, "smaller than one patch"),
    "cut.jpg": (cut, None, "Cannot read"),
    "rotated.jpg": (rotated, (96, 128), ""),
    "pipe.jpg": (os.mkfifo, None, "neither a file nor a folder"),
    "folder.jpg": (lambda path: path.mkdir(), None, "No images in"),
    "locked.png": (unreadable, None, "Cannot read"),
    "broken.png": (lambda path: path.symlink_to("nowhere"), None, "No such file"),
    "loop.png": (lambda path: path.symlink_to(path), None, "No such file"),
    "two words 'and' \"quotes\".png": (named("two words 'and' \"quotes\".png"), (128, 96), ""),
    "two\nlines.png": (named("two\nlines.png"), (128, 96), ""),
    "-k.png": (named("-k.png"), (128, 96), ""),
    os.fsdecode(b"caf\xe9.png"): (named(os.fsdecode(b"caf\xe9.png")), (128, 96), ""),
}


@pytest.mark.parametrize("name", TABLE, ids=lambda name: ascii(name).strip("'"))
def test_predict(model, tmp_path, monkeypatch, name):
    make, size, sentence = TABLE[name]
    if name == "locked.png" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    if sys.platform == "win32" and make is os.mkfifo:
        pytest.skip("no FIFOs here")
    monkeypatch.chdir(tmp_path)
    model.save("stego.pt")
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / name)
    arguments = ["predict", f"in/{name}", "-o", "out.png", *FAST]
    result = CliRunner().invoke(main, arguments)
    assert "Traceback" not in result.output and (
        result.exception is None or isinstance(result.exception, SystemExit)
    )
    if size:
        assert result.exit_code == 0, result.output
        with Image.open("out.png") as mask:
            assert mask.size == size and mask.mode == "P"
    else:
        assert (
            result.exit_code == (1 if (tmp_path / "in" / name).is_file() else 2) and sentence in result.output
        )
        assert "Errno" not in result.output and "DOS attack" not in result.output
        assert not (tmp_path / "out.png").exists() and sorted(os.listdir()) == ["in", "stego.pt"]


def test_a_folder_of_everything(model, tmp_path, monkeypatch):
    """All of it at once: what can be read is segmented, the rest is named, exit code 1."""
    monkeypatch.chdir(tmp_path)
    model.save("stego.pt")
    (tmp_path / "in").mkdir()
    for name, (make, _, _) in TABLE.items():
        make(tmp_path / "in" / name)
    result = CliRunner().invoke(main, ["predict", "in", "-o", "out", *FAST])
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    good = {os.path.splitext(name)[0] + ".png" for name, (_, size, _) in TABLE.items() if size}
    assert set(os.listdir("out")) - {"locked.png"} == good
    for name in ("bomb.png", "cut.jpg", "speck.png"):
        assert f"in/{name}" in result.output


def test_the_limit_can_be_raised(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # so that a scene of 12,288 is too large
    model.save("stego.pt")
    SCENE.save("scene.png")
    result = CliRunner().invoke(main, ["predict", "scene.png", "-o", "out.png", *FAST])
    assert result.exit_code == 1 and "--max-megapixels" in result.output
    for limit in ("0.1", "inf"):
        arguments = ["predict", "scene.png", "-o", f"{limit}.png", *FAST, "--max-megapixels", limit]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        assert Image.open(f"{limit}.png").size == (128, 96)


class Stop(OSError):
    pass


@pytest.mark.parametrize("after", [0, 1, 100, 700])
def test_a_full_disk_leaves_the_old_outputs_alone(model, tmp_path, monkeypatch, after):
    """Writing fails after so many bytes: the model and the mask of before are whole, and nothing else is left."""
    monkeypatch.chdir(tmp_path)
    model.save("stego.pt")
    SCENE.save("scene.png")
    Image.new("L", (3, 3)).save("mask.png")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir()}
    fill_up(monkeypatch, after)
    result = CliRunner().invoke(main, ["predict", "scene.png", "-o", "mask.png", *FAST])
    assert result.exit_code == 1 and "no space left on device" in result.output
    for word in ("Traceback", "Errno", ".part"):
        assert word not in result.output
    with pytest.raises(OSError):
        model.save("stego.pt")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir()} == before


def fill_up(monkeypatch, after: int):
    """From now on every output's file takes `after` bytes and then no more."""

    class Full:
        def __init__(self, file):
            self.file, self.left = file, after

        def write(self, data):
            if len(data) > self.left:
                self.file.write(bytes(data)[: self.left])
                raise Stop(28, "No space left on device")
            self.left -= len(data)
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    def limited(real):
        def replacement(path, mode="r", *rest, **named):
            file = real(path, mode, *rest, **named)
            return Full(file) if ".part" in str(path) and mode[0] in "wxa" else file

        return replacement

    for place in ("builtins.open", "io.open"):  # Pillow's, and pathlib's
        monkeypatch.setattr(place, limited(open))


FORGED = {
    "narrow centres": lambda state: state | {"centers": state["centers"][:, :3]},
    "whole centres": lambda state: state | {"centers": state["centers"].long()},
    "endless centres": lambda state: state | {"centers": state["centers"] * torch.inf},
    "long palette": lambda state: state | {"palette": torch.zeros(300, 3, dtype=torch.uint8)},
    "float palette": lambda state: state | {"palette": state["palette"].float()},
    "no clusters": lambda state: (
        state
        | {
            "centers": state["centers"][:0],
            "share": state["share"][:0],
            "palette": state["palette"][:0],
            "names": [],
        }
    ),
    "numbers for names": lambda state: state | {"names": [1, 2, 3]},
    "a list for a backbone": lambda state: state | {"config": state["config"] | {"backbone": ["tiny"]}},
    "another backbone": lambda state: state | {"config": state["config"] | {"backbone": "resnet9000"}},
    "a narrow head": lambda state: (
        state
        | {
            "head": {
                key: value[..., :9] if key.endswith(("linear.weight", "mlp.0.weight")) else value
                for key, value in state["head"].items()
            }
            | {
                "mlp.0.weight": torch.zeros(9, 9),
                "mlp.0.bias": torch.zeros(9),
                "mlp.2.weight": torch.zeros(70, 9),
            }
        }
    ),
    "no head": lambda state: {key: value for key, value in state.items() if key != "head"},
    "an empty head": lambda state: state | {"head": {}},
    "a tensor for everything": lambda state: (
        {key: torch.zeros(3) for key in state} | {"format": "stego", "version": 1}
    ),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_model_is_found_before_it_is_used(model, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    SCENE.save("scene.png")
    model.save("stego.pt")
    torch.save(FORGED[what](torch.load("stego.pt", weights_only=True)), "stego.pt")
    result = CliRunner().invoke(main, ["predict", "scene.png", "-o", "mask.png"])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception
    assert ("damaged" in result.output or "Unknown backbone" in result.output) and not os.path.exists(
        "mask.png"
    )
