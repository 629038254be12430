"""`stego predict`: what it writes where, pipes, dry runs, options that exclude each other, `--smooth`."""

import io
import itertools
import json
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST, LABELLED, QUICK, draw_scene, mask_of, run
from PIL import Image

from stego_parts.files import find_images, replacing
from stego_parts.images import IGNORE

SMALL = ("--no-crf", "--resolution", 160)


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


def test_skip_existing_asks_for_every_output_and_what_it_was_made_with(here, scenes, saved):
    shutil.copy(saved, "stego.pt")

    def predicted(*options):
        args = ("-o", "out", *FAST, "--skip-existing", *options)
        said = run("predict", scenes / "sub", *args).stdout
        return re.search(r"(\d+) of \d+ images?, (\d+) skipped", said).groups()

    assert predicted() == ("4", "0") and predicted() == ("0", "4")
    assert predicted("--overlay") == ("4", "0") and predicted("--overlay") == ("0", "4")
    Path("out/scene08.overlay.jpg").unlink()
    assert predicted("--overlay") == ("1", "3")
    assert predicted("--only", "1") == ("4", "0") and set(np.unique(mask_of("out/scene09.png"))) <= {1, 255}
    assert predicted() == ("4", "0") and predicted("--resolution", 64) == ("4", "0")
    run("name", "0=sky")
    assert predicted("--resolution", 64) == ("4", "0")
    Path("out/scene10.png").write_bytes(b"cut short")
    assert predicted("--resolution", 64) == ("1", "3")
    os.utime("out/scene11.png", (1, 1))  # the image has changed since
    assert predicted("--resolution", 64) == ("1", "3")
    assert predicted("--format", "npz") == ("4", "0") and predicted("--format", "npz") == ("0", "4")


def test_the_folder_of_the_images_can_hold_the_outputs(here, scenes, saved):
    """cd images; stego fit .; stego predict .: again and again."""
    for i in range(2):
        shutil.copy(scenes / f"scene0{i}.png", here)
    for name in ("stego.pt", "stego.pt", "other.pt"):
        fitted = run("fit", ".", "-k", 2, *QUICK, "-o", name)
        predicted = run("predict", ".", "--overlay", *FAST)
        assert "2 images" in fitted.stdout and "2 of 2 images" in predicted.stdout
    assert "2 images" in run("show", ".", "--sheet", "s.png").stdout


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
        (["eval", *LABELLED, "-m", "MODEL", "-o", "photos"], "has inputs in it"),
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
    monkeypatch.setattr("cli_parts.console.Progress.__call__", None)  # the work has begun
    result = run(*[saved if arg == "MODEL" else arg for arg in args], code=2)
    assert message in result.stderr
    assert before == {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}


def test_what_does_not_fit_into_memory_is_refused(here, scenes, saved, monkeypatch):
    monkeypatch.setattr("stego_parts.features.available_memory", lambda device: 1e9)
    args = ("predict", scenes / "scene00.png", "-m", saved, "-o", "mask.png", "--no-crf", "--resolution")
    refused = run(*args, 5000, code=2).stderr  # 2 x 625 x 625 positions of 192 values, 85 bytes each
    assert "12.8 GB" in refused and "1.0 GB are available" in refused
    largest = int(re.search(r"at most (\d+)", refused)[1])
    assert 1300 < largest < 1410 and not Path("mask.png").exists()
    assert "available" in run(*args, largest + 8, code=2).stderr


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


def test_a_picture_through_the_pipe_is_exactly_a_png(here, scenes, saved):
    source = scenes / "scene00.png"
    seen = run("predict", "-", "-m", saved, "-o", "-", *FAST, input=source.read_bytes())
    assert "1 of 1 image" in seen.stderr
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


def write_video(folder, scenes) -> Path:
    """A frame of each drawn scene, with noise of its own."""
    Path(folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    for t, seed in enumerate(scenes):
        frame = draw_scene(seed)[0] + random.normal(0, 8, (96, 128, 3))
        Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(Path(folder) / f"{t:04}.png")
    return Path(folder)


def predicted(model, *args) -> list[np.ndarray]:
    """The masks of a run of predict."""
    run("predict", *args, "-m", model, "-o", "out", *SMALL)
    masks = [np.array(Image.open(path)) for path in sorted(Path("out").rglob("*.png"))]
    shutil.rmtree("out")
    return masks


def flicker(masks) -> float:
    """The share of pixels that change their cluster from a frame to the next."""
    return np.mean([(a != b).mean() for a, b in itertools.pairwise(masks)])


def test_a_still_scene_flickers_less(here, saved):
    video = write_video("video", [3] * 6)
    alone, smooth = predicted(saved, video), predicted(saved, video, "--smooth")
    assert np.array_equal(alone[0], smooth[0])
    assert 0 < flicker(smooth) < flicker(alone) / 2
    assert np.mean([(a == b).mean() for a, b in zip(alone, smooth)]) > 0.95  # and nothing else changes


def test_a_cut_and_another_folder_begin_anew(here, saved):
    write_video("videos/a", [3, 3, 3, 7])
    write_video("videos/b", [7])
    alone, smooth = predicted(saved, "videos"), predicted(saved, "videos", "--smooth")
    assert (alone[3] == smooth[3]).mean() > 0.9 and (alone[3] == alone[2]).mean() < 0.9
    assert np.array_equal(alone[4], smooth[4])


def test_only_all_frames_in_order(here, saved):
    video = write_video("video", [3])
    for args in ((video, "--skip-existing"), ("-",)):
        assert "all frames in their order" in run("predict", *args, "--smooth", "-m", saved, code=2).stderr
    run("predict", video, "-m", saved, "-o", "out", *SMALL, "--smooth")
    again = run("predict", video, "-m", saved, "-o", "out", *SMALL, "--skip-existing")
    assert "1 of 1 image, 0 skipped" in again.stdout  # made with other options


# ---- files as people have them ---------------------------------------------------------------------------------


@pytest.fixture
def photos(here):
    """Three photos in the folder own."""
    (here / "own").mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(draw_scene(ord(name))[0]).save(f"own/{name}.jpg")
    return here / "own"


def image_names(*args, **options) -> list[str]:
    return [place.as_posix() for _, place in find_images(*args, **options)]


def test_frames_without_zeros_follow_each_other(here, saved):
    """--smooth: the twelve frames of a scene give the masks that they give with zeros before their numbers."""
    rng = np.random.default_rng(0)
    for folder in ("raw", "pad"):
        (here / folder).mkdir()
    for t in range(1, 13):
        frame = draw_scene(3)[0] + rng.normal(0, 8, (96, 128, 3))
        for name in (f"raw/{t}.png", f"pad/{t:03}.png"):
            Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(name)
    as_a_shell = sorted((here / "raw").iterdir())  # writes raw/*.png: 1, 10, 11, 12, 2, ...
    for out, images in {"o-raw": ["raw"], "o-shell": as_a_shell, "o-pad": ["pad"]}.items():
        run("predict", *images, "-m", saved, "-o", out, "--smooth", *FAST)
    for t in range(1, 13):
        for out in ("o-raw", "o-shell"):
            assert np.array_equal(mask_of(f"{out}/{t}.png"), mask_of(f"o-pad/{t:03}.png"))


def test_own_outputs_are_no_images(photos, saved):
    """Masks and overlays beside the images: the same command again, a fit, a sheet, all see three photos."""
    predict = ("predict", "own", "-m", saved, "-o", "own", "--overlay", *FAST)
    assert "3 of 3 images" in run(*predict).stdout and len(os.listdir("own")) == 9
    again = run(*predict)
    assert "3 of 3 images" in again.stdout and "6 pictures left out: stego wrote them" in again.stderr
    assert "0 of 0 images, 3 skipped" in run(*predict, "--skip-existing").stdout
    fit = run("fit", "own", "--backbone", "tiny", "--steps", 2, "-k", 3, "-o", "own/m.pt")
    assert "3 images" in fit.stdout and "6 pictures left out" in fit.stderr
    assert "3 images" in run("show", "own/m.pt", "own", "--sheet", "own/sheet.png").stdout
    run("predict", "own", "-m", "own/m.pt", "-o", "own", "--format", "tif", *FAST)
    assert image_names("own") == image_names("own/*.*g") == ["a.jpg", "b.jpg", "c.jpg"]
    assert image_names("own/a.png") == ["a.png"] and len(image_names("own", outputs=True)) == 3 + 6 + 2 + 3


def test_a_list_of_images(photos, saved):
    Path("list.txt").write_text("own/c.jpg\n\n  own/a.jpg\nown/c.jpg\n", encoding="utf-8-sig")
    assert image_names("@list.txt") == ["own/c.jpg", "own/a.jpg"]
    lines = run("predict", "@list.txt", "-m", saved, "-o", "out/", "--dry-run", *FAST).stdout
    assert lines.splitlines() == ["out/own/c.png", "out/own/a.png"]
    Path("list.txt").write_text("own/none.jpg")
    with pytest.raises(FileNotFoundError, match=r"own/none\.jpg, a line of a list"):
        find_images("@list.txt")
    Path("@odd.jpg").write_bytes(Path("own/a.jpg").read_bytes())
    assert image_names("@odd.jpg") == ["@odd.jpg"]


def test_names_on_stdin(photos, saved):
    given = dict(input="own/b.jpg\nown/a.jpg\n")
    lines = run("predict", "-", "-m", saved, "--dry-run", *FAST, **given).stdout
    assert lines.splitlines() == ["stego-out/own/b.png", "stego-out/own/a.png"]
    assert "2 images" in run("fit", "-", "--backbone", "tiny", "--steps", 2, "-k", 3, **given).stdout


def test_whole_names_on_stdin_and_in_a_list(photos, saved):
    """Of two images of one name each has a place of its own, however they are given."""
    names = [str(photos / "a.jpg"), str(photos.parent / "more/a.jpg")]
    Path("more").mkdir()
    shutil.copy(*names)
    Path("list.txt").write_text("\n".join(names))
    for source in ("-", "@list.txt"):
        dry = run("predict", source, "-m", saved, "--dry-run", input="\n".join(names))
        assert dry.stdout.splitlines() == ["stego-out/own/a.png", "stego-out/more/a.png"]


def test_a_link_stays_and_what_it_leads_to_is_written(here, saved):
    """A model and a mask behind links."""
    (here / "disk").mkdir()
    Path("disk/m.pt").write_bytes(saved.read_bytes())
    Path("stego.pt").symlink_to("disk/m.pt")
    before = Path("disk/m.pt").read_bytes()
    run("name", "0=road")
    assert Path("stego.pt").is_symlink() and Path("disk/m.pt").read_bytes() != before
    Path("new.txt").symlink_to("disk/not/yet.txt")
    with replacing("new.txt") as part:
        part.write_text("one")
    assert Path("new.txt").is_symlink() and Path("disk/not/yet.txt").read_text() == "one"
    assert not [name for name in os.listdir("disk") if name.endswith(".part")]


def test_a_slash_at_the_end_means_a_folder(photos, saved):
    run("predict", "own/a.jpg", "-m", saved, "-o", "dot-v1.2/", *FAST)
    run("predict", "own/a.jpg", "-m", saved, "-o", "dot-v1.3/", "--format", "csv", *FAST)
    assert os.listdir("dot-v1.2") == ["a.png"] and os.listdir("dot-v1.3") == ["shares.csv"]


def test_a_name_too_long_for_its_suffix_is_found_before_the_work(here, saved):
    (here / "in").mkdir()
    for name in ("a", "x" * 250):
        Image.fromarray(draw_scene(0)[0]).save(f"in/{name}.png", "PNG")
    result = run("predict", "in", "-m", saved, "-o", "out", "--format", "overlay", *FAST, code=2)
    assert "longer than 255 bytes" in result.stderr and not Path("out").exists()


@pytest.mark.long
def test_names_that_are_no_text_are_said_as_they_are(here, saved):
    (here / "in").mkdir()
    Image.fromarray(draw_scene(0)[0]).save(os.fsdecode(b"in/caf\xe9.png"))
    said = run("predict", "in", "-m", saved, "--dry-run", *FAST).stdout_bytes
    assert said == b"stego-out/caf\xe9.png\n"


def test_images_of_the_future_are_skipped_too(photos, saved):
    """A camera whose clock is ahead: the note in the output counts."""
    predict = ("predict", "own", "-m", saved, "-o", "out", *FAST, "--skip-existing")
    run(*predict)
    os.utime("own/a.jpg", (2**32, 2**32))
    assert "0 of 0 images, 3 skipped" in run(*predict).stdout
    assert "3 of 3 images, 0 skipped" in run(*predict, "--only", "1").stdout


def test_another_image_of_the_same_name_is_not_skipped(photos, saved):
    """The next card of a camera, all of whose photos are older than the masks of the first."""
    predict = ("-m", saved, "-o", "out", *FAST, "--skip-existing")
    run("predict", "own", *predict)
    shutil.copytree("own", "next")
    shutil.copy2("own/b.jpg", "next/a.jpg")
    assert "1 of 1 image, 2 skipped" in run("predict", "next", *predict).stdout
    assert mask_of("out/a.png").tolist() == mask_of("out/b.png").tolist()


def test_an_explicit_quiet_says_nothing(photos, saved):
    run("predict", "own", "-m", saved, "-o", "own", *FAST, "-q")
    assert run("predict", "own", "-m", saved, "-o", "own", *FAST, "-q").stderr == ""
    assert logging.getLogger("stego").level == logging.ERROR
