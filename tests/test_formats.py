"""What predict writes, format by format."""

import csv
import io
import json
import os

import numpy as np
import pytest
from conftest import run
from PIL import Image, ImageDraw
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from scipy import ndimage

from cli_parts.drawing import Clusters, overlay, with_legend
from cli_parts.georaster import geo_tags, pixel_area
from cli_parts.segments import (
    Region,
    cluster_shares,
    coco_annotations,
    outline,
    regions,
    run_lengths,
    simplified,
)
from stego import Stego
from stego_parts.images import IGNORE, distinct_colors, read_image

FAST = ["--no-crf", "--resolution", 96]


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
    seen = run("predict", "-", "-m", saved, "-o", "-", *FAST, input=source.read_bytes())
    assert "1 of 1 images" in seen.stderr
    run("predict", source, "-m", saved, "-o", "mask.png", *FAST)
    assert seen.stdout_bytes == (here / "mask.png").read_bytes()


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
    assert np.array_equal(np.asarray(overlay(image, mask, Clusters(distinct_colors()))), np.asarray(image))


@pytest.mark.parametrize("width", [20, 300, 4000])
def test_legend_shows_the_clusters_present(width):
    mask = np.zeros((50, width), np.uint8)
    mask[:, :3] = 2
    palette = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
    shown = np.asarray(
        with_legend(Image.new("RGB", (width, 50), "white"), mask, Clusters(palette, ["road", "1", "sky"]))
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
    """Of regions anywhere in an image: those that reach from its top to its bottom go on from column to column."""
    segment = np.random.default_rng(0).random((67, 301)) < share
    for height, x, y in ((67, 0, 0), (67, 40, 0), (90, 5, 0), (90, 5, 23), (100, 300, 11)):
        image = np.zeros((height, 700), bool)
        image[y : y + 67, x : x + 301] = segment
        assert np.array_equal(decode(run_lengths(Region(0, x, y, segment), image.shape)), image)


def noise(seed: int, sigma: float) -> np.ndarray:
    """A mask of three clusters with regions in all shapes, with holes, islands and pixels that touch at corners."""
    scores = np.random.default_rng(seed).normal(size=(3, 60, 80))
    return ndimage.gaussian_filter(scores, (0, sigma, sigma)).argmax(0).astype(np.uint8)


def full(region: Region, inside: np.ndarray, size=(60, 80)) -> np.ndarray:
    whole, (h, w) = np.zeros(size, bool), inside.shape
    whole[region.y : region.y + h, region.x : region.x + w] = inside
    return whole


@pytest.mark.parametrize("sigma", [0, 1, 3])
def test_run_lengths_are_those_of_pycocotools(sigma):
    masks = pytest.importorskip("pycocotools.mask")
    mask = noise(sigma, sigma)
    for region in [Region(0, 0, 0, mask == 0), *regions(mask)]:
        whole = full(region, region.inside)
        wanted = masks.encode(np.asfortranarray(whole.astype(np.uint8)))
        assert run_lengths(region, mask.shape)["counts"] == wanted["counts"].decode()


@pytest.mark.parametrize("sigma", [0, 1, 3])
def test_outlines_go_round_their_regions(sigma):
    """pycocotools fills an outline with its region and all holes in it; of those that touch at a corner, no more."""
    masks = pytest.importorskip("pycocotools.mask")
    mask = noise(sigma, sigma)
    for region in regions(mask):
        ring = outline(region)
        steps = np.roll(ring, -1, 0) - ring
        assert ((steps == 0).sum(1) == 1).all() and (ring >= 0).all() and (ring <= (80, 60)).all()
        assert ((steps[:, 0] == 0) != (np.roll(steps, 1, 0)[:, 0] == 0)).all()  # a corner at each point
        holes = ndimage.binary_fill_holes(np.pad(region.inside, 1), np.ones((3, 3)))[1:-1, 1:-1]
        encoded = masks.frPyObjects([ring.ravel().tolist()], 60, 80)
        assert np.array_equal(masks.decode(encoded)[..., 0], full(region, holes))
        assert (simplified(ring)[:, None] == ring).all(2).any(1).all() and len(simplified(ring)) > 2


def test_a_simplified_outline_stays_within_a_pixel():
    y, x = np.mgrid[:100, :100]
    disk = Region(0, 7, 3, np.hypot(y - 49.5, x - 49.5) < 49)
    ring, few = outline(disk), simplified(outline(disk)).astype(float)
    assert len(few) < len(ring) / 4
    for point in ring:
        ends = np.roll(few, -1, 0)
        along = (((point - few) * (ends - few)).sum(1) / ((ends - few) ** 2).sum(1)).clip(0, 1)
        assert np.hypot(*(few + along[:, None] * (ends - few) - point).T).min() <= 1
    dot = outline(Region(0, 5, 6, np.ones((1, 1), bool)))
    assert simplified(dot).tolist() == [[5, 6], [6, 6], [6, 7], [5, 7]]


@pytest.mark.parametrize("least", [0, 20])
def test_coco_file_is_read_by_pycocotools(here, scenes, named, least):
    coco = pytest.importorskip("pycocotools.coco")
    run("predict", scenes / "sub", "-o", "found.json", "--format", "coco", "--min-area", least, *FAST)
    run("predict", scenes / "sub", "-o", "masks", *FAST)
    read = coco.COCO("found.json")
    categories = {k: each["name"] for k, each in read.cats.items()}
    assert len(read.imgs) == 4 and categories == {1: "sky", 2: "1", 3: "block"}
    for number, entry in read.imgs.items():
        mask = mask_of(here / "masks" / entry["file_name"])
        found = np.full(mask.shape, IGNORE, np.uint8)
        for each in read.loadAnns(read.getAnnIds(imgIds=[number])):
            segment = read.annToMask(each).astype(bool)
            assert ndimage.label(segment)[1] == 1 and (found[segment] == IGNORE).all()
            found[segment] = each["category_id"] - 1
            assert each["area"] == segment.sum() == coco.maskUtils.area(read.annToRLE(each)) >= least
            assert each["bbox"] == coco.maskUtils.toBbox(read.annToRLE(each)).tolist()
            (polygon,) = each["polygons"]
            assert coco.maskUtils.decode(coco.maskUtils.frPyObjects([polygon], *mask.shape))[segment].all()
        small = np.zeros(mask.shape, bool)
        for k in range(3):
            numbered = ndimage.label(mask == k)[0]
            small |= (np.bincount(numbered.ravel()) < least)[numbered] & (mask == k)
        assert np.array_equal(found, np.where(small, IGNORE, mask))


def test_shares_and_annotations_leave_255_out():
    mask = np.array([[IGNORE, 0], [0, 1]], np.uint8)
    shares = cluster_shares(mask, dict(enumerate("abc")), 0.25)
    assert [(each["pixels"], each["share"], each["m2"]) for each in shares] == [
        (2, 0.5, 0.5), (1, 0.25, 0.25), (0, 0, 0)
    ]  # fmt: skip
    found = coco_annotations(mask)
    assert [(each["category_id"], each["area"], each["bbox"]) for each in found] == [
        (1, 1, [1, 0, 1, 1]), (1, 1, [0, 1, 1, 1]), (2, 1, [1, 1, 1, 1])
    ]  # fmt: skip
    assert found[0]["polygons"] == [[1, 0, 2, 0, 2, 1, 1, 1]]


def test_labelme_files_draw_the_masks_again(here, scenes, named):
    def predicted(*options):
        args = ("--format", "labelme", *FAST, "--skip-existing", *options)
        return run("predict", scenes / "sub", "-o", "out", *args).stdout

    run("predict", scenes / "sub", "-o", "masks", *FAST)
    assert "4 of 4 images, 0 skipped" in predicted() and "0 of 0 images, 4 skipped" in predicted()
    for path in (here / "out").iterdir():
        file, mask = json.loads(path.read_text()), mask_of(here / "masks" / path.with_suffix(".png").name)
        assert (file["version"], file["flags"], file["imageData"]) == ("5.0.1", {}, None)
        assert os.path.samefile(path.parent / file["imagePath"], scenes / "sub" / f"{path.stem}.png")
        drawn = Image.new("L", (file["imageWidth"], file["imageHeight"]), IGNORE)
        for shape in file["shapes"]:  # as labelme draws them, one over the other
            assert shape["shape_type"] == "polygon" and len(shape["points"]) > 2
            points = [(x - 0.5, y - 0.5) for x, y in shape["points"]]  # Pillow's are centres of pixels
            ImageDraw.Draw(drawn).polygon(points, fill=["sky", "1", "block"].index(shape["label"]))
        assert (np.asarray(drawn) == mask).mean() > 0.95
    areas = "4 of 4 images, 0 skipped" in predicted("--min-area", 200)
    shapes = json.loads((here / "out/scene08.json").read_text())["shapes"]
    assert areas and 0 < len(shapes) == sum(
        region.inside.sum() >= 200 for region in regions(mask_of("masks/scene08.png"))
    )


# ---- cut-outs --------------------------------------------------------------------------------------------------


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


# ---- place on Earth --------------------------------------------------------------------------------------------

PLACE = {
    33550: (12, (0.5, 0.25, 0.0)),
    33922: (12, (0.0, 0.0, 0.0, 366000.5, 5621000.25, 0.0)),
    34735: (3, (1, 1, 0, 4, 1024, 0, 1, 1, 1026, 34737, 13, 0, 3072, 0, 1, 25832, 3076, 0, 1, 9001)),
    34736: (12, (6378137.0, 298.257222101)),
    34737: (2, "ETRS89 / UTM|"),
    42112: (2, "<GDALMetadata><Item name='place'>K\u00f6ln</Item></GDALMetadata>"),
    42113: (2, "0"),
}


def save_geotiff(source, target, place):
    """A picture as TIFF with tags, {tag: (type, value)}."""
    tags = ImageFileDirectory_v2()
    for tag, (kind, value) in place.items():
        tags.tagtype[tag] = kind
        tags[tag] = value.encode("latin-1") if kind == 2 else value
    Image.open(source).save(target, tiffinfo=tags)


@pytest.fixture
def survey(here, scenes):
    """A folder with two GeoTIFFs, of which one has no place, and a picture."""
    (here / "survey").mkdir()
    save_geotiff(scenes / "scene00.png", "survey/a.tif", PLACE)
    save_geotiff(scenes / "scene01.png", "survey/b.tif", {})
    Image.open(scenes / "scene02.png").save("survey/c.png")
    return here / "survey"


def test_a_tiff_mask_lies_where_its_image_does(here, survey, named):
    run("predict", survey / "a.tif", "-o", "mask.tif", *FAST)
    run("predict", survey, "-o", "tif", "--format", "tif", "--overlay", *FAST)
    run("predict", survey, "-o", "png", *FAST)
    piped = run("predict", survey / "a.tif", "-o", "-", "--format", "tif", *FAST).stdout_bytes
    assert sorted(os.listdir("tif")) == sorted(f"{x}.{y}" for x in "abc" for y in ("tif", "overlay.jpg"))
    for name in ("mask.tif", "tif/a.tif", io.BytesIO(piped)):
        with Image.open(name) as mask:
            assert (mask.format, mask.mode, mask.tag_v2[259]) == (
                "TIFF",
                "P",
                8,
            )  # 259: compression, 8: deflate
            for tag, (kind, value) in (PLACE | {42113: (2, "255")}).items():
                assert (mask.tag_v2.tagtype[tag], mask.tag_v2[tag]) == (kind, value)
    for name in "abc":
        with Image.open(f"tif/{name}.tif") as tif, Image.open(f"png/{name}.png") as png:
            assert np.array_equal(np.asarray(tif), np.asarray(png)) and tif.getpalette() == png.getpalette()
            assert name == "a" or not tif.tag_v2.keys() & (PLACE.keys() - {42113})
    said = [run("predict", survey, "-o", "tif", "--format", "tif", *more, *FAST, "--skip-existing").stdout
            for more in ([], ["--overlay"], ["--only", "sky"])]  # fmt: skip
    assert [line.count(", 3 skipped") for line in said] == [1, 1, 0]


def test_tables(here, survey, named):
    run("predict", survey, "-o", "shares.csv", "--format", "csv", *FAST)
    run("predict", survey, "-o", "masks", *FAST)
    run("predict", survey, "-o", "shares.json", "--format", "json", *FAST)
    rows = list(csv.DictReader((here / "shares.csv").open(newline="")))
    assert [*rows[0]] == "image cluster name pixels share m2".split()
    assert [(row["image"], row["name"]) for row in rows] == [
        (image, name) for image in ("a.tif", "b.tif", "c.png") for name in ("sky", "1", "block")
    ]
    for row in rows:
        mask = mask_of(here / "masks" / f"{row['image'][0]}.png")
        pixels = int((mask == int(row["cluster"])).sum())
        assert int(row["pixels"]) == pixels and float(row["share"]) == pytest.approx(
            pixels / mask.size, abs=1e-6
        )
        assert row["m2"] == (str(pixels / 8) if row["image"] == "a.tif" else "")
    places = [image["clusters"] for image in json.loads((here / "shares.json").read_text())["images"]]
    assert places[0][1]["m2"] == places[0][1]["pixels"] / 8 and "m2" not in places[1][1]
    run("predict", survey, "--format", "csv", "--only", "sky", *FAST)
    assert (here / "stego-out/shares.csv").read_text().count("\n") == 4


@pytest.mark.parametrize(
    "keys, more, area",
    [
        ((1024, 0, 1, 1), {}, 0.125),  # the unit is not said: that of the projection
        ((1024, 0, 1, 1, 3076, 0, 1, 9003), {}, None),  # US survey feet
        ((1024, 0, 1, 2), {}, None),  # degrees
        ((1025, 0, 1, 1), {}, None),
        ((1024, 0, 1, 1), {33550: (12, 0.5)}, None),  # cut short
        ((1024, 0, 1, 1), {33550: (12, (float("nan"), 1.0, 0.0))}, None),
        ((1024, 0, 1, 1), {33550: (3, (1, 1, 0))}, None),  # whole numbers
        (
            (1024, 0, 1, 1),
            {34264: (12, (0.0, 2.0, 0.0, 9.0, 3.0, 0.0, *[0.0] * 10)), 33550: (2, "x")},
            6,
        ),  # turned
    ],
)
def test_square_metres_of_a_pixel(here, scenes, keys, more, area):
    directory = {34735: (3, (1, 1, 0, len(keys) // 4, *keys))}
    save_geotiff(scenes / "scene00.png", "a.tif", PLACE | directory | more)
    assert pixel_area(geo_tags(here / "a.tif")) == area


def test_what_is_no_tiff_has_no_place(here, scenes):
    Image.open(scenes / "scene00.png").save("wrong.tif", format="PNG")
    for source in (scenes / "scene00.png", here / "wrong.tif", io.BytesIO(b"read")):
        assert geo_tags(source) == {} and pixel_area({}) is None


# ---- what is asked for -----------------------------------------------------------------------------------------


def test_the_first_images_only(here, scenes, saved):
    said = run("predict", scenes, "-m", saved, "-o", "out", "--limit", 3, *FAST).stdout
    assert "3 of 3 images" in said and len(os.listdir("out")) == 3
    run("predict", scenes, "-m", saved, "-o", "one.png", "--limit", 1, *FAST)
    run("predict", scenes, "-m", saved, "-o", "s.json", "--format", "json", "--limit", 2, *FAST)
    assert len(json.loads((here / "s.json").read_text())["images"]) == 2
    (here / "in").mkdir()
    for name in ("a.gif", "a.png"):
        Image.open(scenes / "scene00.png").save(here / "in" / name)
    run("predict", "in", "-m", saved, "-o", "named", "--limit", 1, *FAST)
    assert os.listdir("named") == ["a.gif.png"]  # the name that it has without a limit


def test_a_dry_run_writes_nothing(here, scenes, saved, monkeypatch):
    run("predict", scenes / "sub", "-m", saved, "-o", "out", "--limit", 1, *FAST)
    monkeypatch.setattr("stego.load_backbone", None)  # nobody needs it
    args = ("predict", scenes / "sub", "-m", saved, "--dry-run", *FAST)
    listed = run(*args, "-o", "out", "--overlay")
    names = [f"out/scene{i:02d}{end}" for i in range(8, 12) for end in (".png", ".overlay.jpg")]
    assert listed.stdout.splitlines() == names and "4 images" in listed.stderr
    assert run(*args, "-o", "out", "--skip-existing").stdout.splitlines() == names[2::2]
    assert run(*args, "--format", "csv").stdout == "stego-out/shares.csv\n"
    assert "no cluster 'moon'" in run(*args, "--only", "moon", code=2).stderr
    assert [path.as_posix() for path in sorted(here.rglob("*"))] == [
        str(here / "out"),
        str(here / "out/scene08.png"),
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
        (["-o", "x.jpg", "--format", "tif"], "not a .tif or .tiff"),
        (["-o", "x.txt", "--format", "csv"], "not a .csv"),
        (["-o", "x.jpg", "--format", "cutout", "--only", "1"], "not a .png"),
        (["--format", "labelme", "-o", "x.png"], "not a .json"),
        (["--format", "cutout"], "needs --only"),
        (["--format", "cutout", "--only", "1", "--no-crf"], "and the CRF"),
        (["--format", "cutout", "--only", "1", "--overlay"], "--overlay goes with masks"),
        (["--format", "csv", "--skip-existing"], "--skip-existing is for"),
        (["--format", "json", "--min-area", "9"], "--min-area is for"),
        (["--min-area", "-1"], "--min-area"),
        (["--limit", "0"], "--limit"),
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
