"""Mutated images, label maps, models and command lines: one clear error or a sound result, never a traceback.

2,000 cases with fixed seeds; STEGO_FUZZ=50000 pytest -s tests/test_fuzz.py tries as many as wanted. MATLAB files are
left out: scipy's reader can crash the process on damaged ones, which no Python code can catch.
"""

import io
import os
import random
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiffs import DEFLATE, tiff_of

from cli import main
from cli_parts.labels import read_label
from stego import Stego
from stego_parts.images import read_image
from stego_parts.weights import read_checkpoint

CASES = int(os.environ.get("STEGO_FUZZ", "2000"))
SHARE = {"images": 0.55, "labels": 0.15, "models": 0.2, "commands": 0.1}
FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # Pillow and scipy warn of odd files


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A few random edits: flipped bytes, a cut, a repeated, zeroed or swapped stretch, extreme numbers."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, length = rng.randrange(len(data)), rng.randrange(1, 40)
        kind = rng.randrange(6)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            data[at : at + 4] = rng.choice(
                (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80")
            )
        else:
            del data[max(at, 1) :]
        data = data or bytearray(b"\0")
    return bytes(data)


def encoded(form: str, mode: str) -> bytes:
    picture = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(stream, form)
    return stream.getvalue()


def announce(capsys, what: str, tried: int, refused: int):
    with capsys.disabled():
        print(f"\n{tried} mutated {what}: {refused} refused, {tried - refused} read, none uncaught", end="")


def read_mutated(read, seeds, tried: int, seed: int, folder):
    """What read makes of mutated files of (suffix, content) seeds; None where it refuses in a sentence of one line."""
    rng = random.Random(seed)
    for _ in range(tried):
        suffix, content = rng.choice(seeds)
        path = folder / f"x.{suffix.lower()}"
        path.write_bytes(mutate(content, rng))
        try:
            yield read(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            yield None


def test_images(tmp_path, capsys):
    tried, refused = round(CASES * SHARE["images"]), 0
    seeds = [
        (form, encoded(form, mode))
        for form in FORMATS
        for mode in ("RGB", "L", "P")
        if (form, mode) not in {("JPEG", "P"), ("PPM", "P"), ("WEBP", "P")}
    ]
    for kind, layout in (
        (np.uint16, dict(apart=True)),
        (np.float32, dict(tile=16)),
        (np.int16, dict(strip=5)),
    ):
        values = np.random.default_rng(0).integers(0, 255, (24, 32, 5)).astype(kind)
        seeds.append(("TIFF", tiff_of(values, compression=DEFLATE, predictor=2, no_data="7", **layout)))
    for found in read_mutated(read_image, seeds, tried, 0, tmp_path):
        assert found is None or (found.mode == "RGB" and min(found.size) > 0)
        refused += found is None
    announce(capsys, "images", tried, refused)
    assert 0 < refused < tried


def test_label_maps(tmp_path, capsys):
    tried, refused = round(CASES * SHARE["labels"]), 0
    seeds = [("png", encoded("PNG", "L")), ("png", encoded("PNG", "P")), ("bmp", encoded("BMP", "L"))]
    for found in read_mutated(read_label, seeds, tried, 1, tmp_path):
        assert found is None or (found.dtype == np.uint8 and found.ndim == 2)
        refused += found is None
    announce(capsys, "label maps", tried, refused)
    assert 0 < refused < tried


def test_models(model, tmp_path, capsys):
    rng, tried, refused = random.Random(2), round(CASES * SHARE["models"]), 0
    model.save(tmp_path / "whole.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    state["head"] = {
        key: value[:9, :9].clone() if value.ndim == 2 else value[:9].clone()
        for key, value in state["head"].items()
    }  # small: most mutations hit what matters
    state["centers"] = state["centers"][:, :9].clone()
    state["config"]["code_size"] = 9
    for legacy in (False, True):
        torch.save(state, tmp_path / f"{legacy}.pt", _use_new_zipfile_serialization=not legacy)
    seeds = [(tmp_path / f"{legacy}.pt").read_bytes() for legacy in (False, True)]
    path = tmp_path / "x.pt"
    for _ in range(tried):
        path.write_bytes(mutate(rng.choice(seeds), rng))
        for read in (read_checkpoint, Stego.load):
            try:
                found = read(path)
            except ValueError as error:
                assert str(path) in str(error)
                found = None
        if found is None:  # what Stego.load made of it
            refused += 1
        else:
            assert torch.isfinite(found.centers).all() and found.centers.shape[1] == 9
    announce(capsys, "models", tried, refused)
    assert 0 < refused < tried


WORDS = [
    "fit",
    "predict",
    "eval",
    "--format",
    "coco",
    "npz",
    "--only",
    "sky",
    "--match",
    "--sheet",
    "3=road",
    "--help",
    "-h",
    "--version",
    "-k",
    "0",
    "-1",
    "256",
    "3",
    "nan",
    "1e99",
    "-o",
    "",
    ".",
    "/dev/null",
    "\udcff",
    "a b",
    "*.jpg",
    "[",
    "**",
    "x.png",
    "-m",
    "--crf",
    "--no-crf",
    "--crf-size",
    "--resolution",
    "--seed",
    "--steps",
    "--dataset",
    "cityscapes",
    "potsdam3",
    "--root",
    "--images",
    "--labels",
    "--clusters",
    "--overlay",
    "--skip-existing",
    "--device",
    "tpu",
    "--backbone",
    "--weights",
    "--preset",
    "small",
    "--set",
    "auto",
    "--from",
    "--",
    "-",
    "--names",
    "--ignore",
    "--version",
    "-q",
    "-v",
]


def test_command_lines(tmp_path, monkeypatch, capsys):
    """Where no image and no model is, every command line ends with a message and exit code 0, 1 or 2."""
    monkeypatch.chdir(tmp_path)
    rng, tried, refused = random.Random(3), round(CASES * SHARE["commands"]), 0
    for _ in range(tried):
        line = [rng.choice(["fit", "predict", "eval", "name", "show"])] + rng.choices(
            WORDS, k=rng.randrange(8)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = CliRunner().invoke(main, line, input=b"")
        assert result.exception is None or isinstance(result.exception, SystemExit), (line, result.exception)
        assert result.exit_code in (0, 1, 2) and "Traceback" not in result.output, line
        refused += result.exit_code != 0
    announce(capsys, "command lines", tried, refused)
    assert 0 < refused < tried and list(tmp_path.iterdir()) == []  # and nothing was written
