"""What predict writes, format by format."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import run
from PIL import Image

from stego import Stego
from stego_parts.drawing import overlay, with_legend
from stego_parts.images import IGNORE, distinct_colors, read_image
from stego_parts.segments import cluster_shares, coco_annotations, run_lengths

FAST = ["--no-crf", "--resolution", 96]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def named(here, saved):
    """stego.pt in the current folder, two of its clusters named."""
    model = Stego.load(saved)
    model.rename({0: "sky", 2: "block"})
    model.save("stego.pt")
    return model


def mask_of(path):
    return np.asarray(Image.open(path))


# ---- stdin and stdout ------------------------------------------------------------------------------------------


def test_a_picture_through_the_pipe_is_exactly_a_png(here, scenes, saved):
    source = scenes / "scene00.png"
    done = subprocess.run(
        [sys.executable, "-m", "cli", "predict", "-", "-m", str(saved), "-o", "-"],
        input=source.read_bytes(),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0 and b"1 of 1 images" in done.stderr
    assert done.stdout.startswith(PNG) and done.stdout.endswith(b"IEND\xaeB`\x82")
    run("predict", source, "-m", saved, "-o", "mask.png")
    assert done.stdout == (here / "mask.png").read_bytes()


def test_stdin_into_a_file_and_a_file_onto_stdout(here, scenes, saved):
    data = (scenes / "scene00.png").read_bytes()
    run("predict", "-", "-m", saved, "-o", "out", *FAST, input=data)
    seen = run("predict", scenes / "scene00.png", "-m", saved, "-o", "-", "--format", "overlay", *FAST)
    assert mask_of("out/stdin.png").shape == (96, 128)
    with Image.open(io.BytesIO(seen.stdout_bytes)) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"


def test_what_is_no_picture_on_stdin(here, saved):
    result = run("predict", "-", "-m", saved, "-o", "-", input=b"hello", code=1)
    assert (
        result.stdout_bytes == b"" and "no known format" in result.stderr and "BytesIO" not in result.stderr
    )


# ---- masks and overlays ----------------------------------------------------------------------------------------


def test_only_some_clusters(here, scenes, named):
    source = scenes / "scene00.png"
    only = {"all": [], "two": ["--only", "SKY, 2"], "each": ["--only", "sky", "--only", "Block"]}
    for name, options in only.items():
        run("predict", source, "-o", f"{name}.png", *FAST, *options)
    whole, two = mask_of("all.png"), mask_of("two.png")
    assert np.array_equal(two, mask_of("each.png"))
    assert (two == np.where(whole == 1, IGNORE, whole)).all() and (two == IGNORE).any()
    result = run("predict", source, "--only", "moon", code=2)
    assert "no cluster 'moon'" in result.stderr and "block, sky" in result.stderr


def test_pictures_stay_as_they_are_where_nothing_is_kept():
    image, mask = Image.new("RGB", (40, 30), "white"), np.full((30, 40), IGNORE, np.uint8)
    assert np.array_equal(np.asarray(overlay(image, mask, distinct_colors())), np.asarray(image))


@pytest.mark.parametrize("width", [20, 300, 4000])
def test_legend_shows_the_clusters_present(width):
    mask = np.zeros((50, width), np.uint8)
    mask[:, :3] = 2
    palette = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
    shown = np.asarray(
        with_legend(Image.new("RGB", (width, 50), "white"), mask, palette, ["road", "1", "sky"])
    )
    strip = shown[50:].reshape(-1, 3)
    have = [(strip == colour).all(1).sum() for colour in palette]
    assert have[0] > 80 and have[1] == 0 and have[2] > 80
    assert (strip.max(1) < 60).any() and shown.shape[1] >= width  # there is writing


def test_overlay_formats(here, scenes, saved):
    run("predict", scenes / "sub", "-m", saved, "-o", "a", "--format", "overlay", *FAST)
    run("predict", scenes / "sub", "-m", saved, "-o", "b", "--overlay", *FAST)
    names = {each: sorted(path.name for path in (here / each).iterdir()) for each in "ab"}
    assert names["a"] == [f"scene{i:02d}.overlay.jpg" for i in range(8, 12)]
    assert len(names["b"]) == 8 and set(names["a"]) < set(names["b"])
    run("predict", scenes / "scene00.png", "-m", saved, "-o", "over.jpg", "--format", "overlay", *FAST)
    assert Image.open("over.jpg").format == "JPEG"


# ---- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crf", [["--crf"], FAST])
def test_probabilities(here, scenes, named, crf):
    run("predict", scenes / "scene00.png", "-o", "q.npz", "--format", "npz", *crf)
    run("predict", scenes / "scene00.png", "-o", "mask.png", *crf)
    with np.load("q.npz") as file:
        q, names, size = file["probabilities"], file["names"], file["size"]
    assert (
        q.shape == (3, 96, 128) and q.dtype == np.float16 and np.abs(q.astype(float).sum(0) - 1).max() < 2e-3
    )
    assert (q.argmax(0) == mask_of("mask.png")).mean() > 0.995  # float16 leaves a few ties
    assert names.tolist() == ["sky", "1", "block"] and size.tolist() == [96, 128]


def test_probabilities_of_a_large_photo_are_bounded(model):
    q = model.probabilities(np.zeros((600, 900, 3), np.uint8), crf_size=0.05, resolution=64, crf=False)
    assert (
        q.dtype == np.float32
        and q[0].size <= 50_500
        and q.shape[2] / q.shape[1] == pytest.approx(1.5, abs=0.02)
    )


def test_shares(here, scenes, named):
    run("predict", scenes / "sub", scenes / "scene00.png", "-o", "s.json", "--format", "json", *FAST)
    run("predict", scenes / "sub", scenes / "scene00.png", "-o", "masks", *FAST)
    images = json.loads((here / "s.json").read_text())["images"]
    assert len(images) == 5 and "scene08.png" in [each["file_name"] for each in images]
    for each in images:
        mask = mask_of(here / "masks" / each["file_name"])
        assert (each["height"], each["width"]) == mask.shape
        assert [cluster["name"] for cluster in each["clusters"]] == ["sky", "1", "block"]
        for cluster in each["clusters"]:
            assert cluster["share"] == pytest.approx((mask == cluster["cluster"]).mean(), abs=1e-6)
    seen = run("predict", scenes / "scene00.png", "-o", "-", "--format", "json", "--only", "sky", *FAST)
    (only,) = json.loads(seen.stdout)["images"][0]["clusters"]
    assert only["name"] == "sky" and "1 of 1 images" in seen.stderr


def decode(segmentation):
    """COCO's run lengths read back, from the format's description: the test's own reading."""
    runs, values, value, shift = [], segmentation["counts"].encode(), 0, 0
    for byte in values:
        group = byte - 48
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (1 << shift) if group & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    flat = np.concatenate([np.full(run, i % 2, bool) for i, run in enumerate(runs)])
    return flat.reshape(segmentation["size"], order="F")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.5, 0.97, 1.0])
def test_run_lengths_are_read_back(share):
    segment = np.random.default_rng(0).random((67, 301)) < share
    assert np.array_equal(decode(run_lengths(segment)), segment)
    block = np.zeros((67, 301), bool)
    block[5:60, 100:] = True
    assert np.array_equal(decode(run_lengths(block)), block)


def test_coco_file_is_read_by_pycocotools(here, scenes, named):
    coco = pytest.importorskip("pycocotools.coco")
    run("predict", scenes / "sub", "-o", "found.json", "--format", "coco", *FAST)
    run("predict", scenes / "sub", "-o", "masks", *FAST)
    read = coco.COCO("found.json")
    assert len(read.imgs) == 4 and {k: each["name"] for k, each in read.cats.items()} == {
        0: "sky",
        1: "1",
        2: "block",
    }
    for number, entry in read.imgs.items():
        mask = mask_of(here / "masks" / entry["file_name"])
        annotations = read.loadAnns(read.getAnnIds(imgIds=[number]))
        assert {each["category_id"] for each in annotations} == set(np.unique(mask))
        for each in annotations:
            segment = mask == each["category_id"]
            assert np.array_equal(read.annToMask(each), segment)
            assert each["area"] == segment.sum() == coco.maskUtils.area(read.annToRLE(each))
            assert each["bbox"] == coco.maskUtils.toBbox(read.annToRLE(each)).tolist()


def test_shares_and_annotations_leave_255_out():
    mask = np.array([[IGNORE, 0], [0, 1]], np.uint8)
    assert [each["share"] for each in cluster_shares(mask, ["a", "b", "c"])] == [0.5, 0.25, 0]
    assert [(each["category_id"], each["area"], each["bbox"]) for each in coco_annotations(mask)] == [
        (0, 2, [0, 0, 2, 2]),
        (1, 1, [1, 1, 1, 1]),
    ]


@pytest.mark.parametrize(
    "args, message",
    [
        (["-o", "x.png", "--format", "npz"], "not a .npz"),
        (["-o", "x.png", "--format", "coco"], "not a .json"),
        (["-o", "x.png", "--format", "json"], "not a .json"),
        (["-o", "x.tif", "--format", "overlay"], "not a .png or .jpg or .jpeg"),
        (["--format", "json", "--overlay"], "--overlay goes with masks"),
        (["-o", "-", "--overlay"], "one stdout"),
        (["-o", "-", "--skip-existing"], "--skip-existing is for"),
        (["--format", "coco", "--skip-existing"], "--skip-existing is for"),
        (["--format", "npz", "--only", "1"], "leave --only out"),
        (["--format", "xml"], "xml"),
        (["-o", "-", "scene01.png"], "2 images do not go"),
    ],
)
def test_what_does_not_go_together(here, scenes, saved, args, message):
    for name in ("scene00.png", "scene01.png"):
        (here / name).write_bytes((scenes / name).read_bytes())
    assert message in run("predict", "scene00.png", "-m", saved, *args, code=2).stderr
    assert sorted(path.name for path in here.iterdir()) == ["scene00.png", "scene01.png"]


def test_one_bad_image_is_not_in_the_document(here, scenes, saved):
    (here / "in").mkdir()
    (here / "in/a.png").write_bytes((scenes / "scene00.png").read_bytes())
    (here / "in/bad.jpg").write_bytes(b"no picture")
    result = run("predict", "in", "-m", saved, "--format", "coco", *FAST, code=1)
    assert [
        each["file_name"] for each in json.loads((here / "stego-out/coco.json").read_text())["images"]
    ] == ["a.png"]
    assert "Error: Cannot read in/bad.jpg" in result.stderr and "1 of 2 images" in result.stdout


# ---- how much is said ------------------------------------------------------------------------------------------


def test_quiet_and_verbose(here, scenes, saved):
    source = scenes / "scene00.png"
    result = run("predict", source, "-m", saved, "-o", "a.png", *FAST, "-q")
    assert result.output == "" and (here / "a.png").is_file()
    assert "No model" in run("predict", source, "-q", code=2).stderr
    assert "Wrote a.png" in run("predict", source, "-m", saved, "-o", "a.png", *FAST, "-v").stderr
    assert "seed: 0" in run("show", saved, "-v").stderr
    result = run("fit", scenes / "scene00.png", "-k", 2, "--backbone", "tiny", "--steps", 2, "-v")
    assert "b_rand: " in result.stderr and "1 images" in result.stdout
    assert result.stdout.count("cluster ") == 2


def test_colours_only_where_wanted(here, saved, monkeypatch):
    (here / "stego.pt").write_bytes(saved.read_bytes())
    monkeypatch.delenv("NO_COLOR", raising=False)
    red, green, blue = Stego.load(saved).palette[0].tolist()
    assert f"\x1b[38;2;{red};{green};{blue}m" in run("show", "stego.pt", color=True).stdout
    assert "\x1b" not in run("show", "stego.pt").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("show", "stego.pt", color=True).stdout


def test_a_binary_file_is_read(scenes):
    with open(scenes / "scene00.png", "rb") as file:
        assert read_image(file).size == (128, 96)
