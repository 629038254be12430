"""What predict writes, format by format."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST, mask_of, run
from PIL import Image

from cli_parts.outputs import output_names
from stego_parts.images import read_image


@pytest.mark.parametrize(
    "names, suffix, outputs",
    [
        ("a.jpg b/a.jpg", ".png", "a.png b/a.png"),
        ("a.png a.gif", ".png", "a.png a.gif.png"),
        ("IMG.jpg IMG.tif", ".png", "IMG.jpg.png IMG.tif.png"),
        ("a.png a.gif", ".overlay.jpg", "a.png.overlay.jpg a.gif.overlay.jpg"),
        ("a.png a.gif a.gif.png", ".png", "a.png a.gif.png a.gif.png.png"),
        ("a.b.jpg a.c.jpg", ".png", "a.b.png a.c.png"),
    ],
)
def test_images_that_share_a_stem_keep_their_names(names, suffix, outputs):
    places = [Path(name) for name in names.split()]
    assert [name.as_posix() for name in output_names(places, suffix)] == outputs.split()


def test_overlay_formats(here, scenes, saved):
    run("predict", scenes / "sub", "-m", saved, "-o", "a", "--format", "overlay", *FAST)
    run("predict", scenes / "sub", "-m", saved, "-o", "b", "--overlay", *FAST)
    names = {each: sorted(path.name for path in (here / each).iterdir()) for each in "ab"}
    assert names["a"] == [f"scene{i:02d}.overlay.jpg" for i in range(8, 12)]
    assert len(names["b"]) == 8 and set(names["a"]) < set(names["b"])
    run("predict", scenes / "scene00.png", "-m", saved, "-o", "over.jpg", "--format", "overlay", *FAST)
    assert Image.open("over.jpg").format == "JPEG"


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
    assert only["name"] == "sky" and "1 of 1 image" in seen.stderr


def test_a_cutout_is_as_opaque_as_its_clusters_are_likely(here, scenes, named):
    photo = Image.open(scenes / "scene00.png").resize((300, 200))
    photo.getexif()[274] = 6  # shown turned by 90 degrees
    photo.save("photo.jpg", exif=photo.getexif())
    run(
        "predict",
        "photo.jpg",
        "-o",
        "sky.png",
        "--format",
        "cutout",
        "--only",
        "sky,block",
        "--crf-size",
        0.02,
    )
    with Image.open("sky.png") as picture:
        assert picture.mode == "RGBA" and picture.size == (200, 300)
        assert np.array_equal(np.asarray(picture)[..., :3], np.asarray(read_image("photo.jpg")))
        alpha = np.asarray(picture)[..., 3] / 255
    q = named.probabilities("photo.jpg", crf_size=0.02)[[0, 2]].sum(0)
    small = np.asarray(Image.fromarray(alpha.astype(np.float32)).resize(q.shape[::-1], Image.Resampling.BOX))
    assert q.size < 25_000 and np.abs(small - q).mean() < 0.02
    run("predict", "photo.jpg", "-o", "sky.png", "--only", "sky,block", "--crf-size", 0.02, "--skip-existing")
    assert Image.open("sky.png").mode == "P"  # a mask is another thing than a cutout of the same name


def test_one_name_in_several_folders(here, scenes, saved):
    """Two images that both are 0001.png below what names them: outputs and documents tell their folders."""
    for folder, i in (("a", 0), ("b", 1)):
        Path("photos", folder).mkdir(parents=True)
        Image.open(scenes / f"scene0{i}.png").save(f"photos/{folder}/0001.png")
    command = ("predict", "photos/a", "photos/b", "-m", saved, *FAST)
    run(*command, "-o", "out")
    assert [Path(f"out/{folder}/0001.png").is_file() for folder in "ab"] == [True, True]
    run(*command, "-o", "all.json", "--format", "json")
    names = [image["file_name"] for image in json.loads(Path("all.json").read_text())["images"]]
    assert names == ["a/0001.png", "b/0001.png"]
