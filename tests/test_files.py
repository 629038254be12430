"""Finding images, and writing files whole or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_scene
from PIL import Image

from stego_parts.config import NOTICE
from stego_parts.files import decoded_lines, find_images, is_output, read_lines, replacing
from stego_parts.images import read_image


def test_find_images(tmp_path):
    for name in ("b.jpg", "a.PNG", "sub/c.tif", "sub/deep/d.webp", "notes.txt", "sub/e.jpg.bak"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    places = lambda sources: [str(place) for _, place in find_images(sources)]  # noqa: E731
    assert places(tmp_path) == ["a.PNG", "b.jpg", "sub/c.tif", "sub/deep/d.webp"]
    assert places([str(tmp_path / "sub"), tmp_path / "b.jpg"]) == ["c.tif", "deep/d.webp", "b.jpg"]
    assert places(str(tmp_path / "*.jpg")) == ["b.jpg"]
    assert places(str(tmp_path / "**/*.tif")) == ["sub/c.tif"]
    assert places([tmp_path, tmp_path / "b.jpg"]) == places(tmp_path)  # each once
    for source, message in ((tmp_path / "none", "No such file"), (tmp_path / "*.bmp", "matches no file")):
        with pytest.raises(FileNotFoundError, match=message):
            find_images(source)
    (tmp_path / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="No images in"):
        find_images(tmp_path / "void")


@pytest.mark.parametrize("sources", [[], "", ["a.jpg", ""]])
def test_nothing_is_not_the_folder_where_we_are(sources, tmp_path, monkeypatch):
    """As a shell passes a variable that is not set, or Python a pattern's list that is empty."""
    touch(tmp_path, "a.jpg")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="No images, or an empty name"):
        find_images(sources)


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    (tmp_path / "a[1].jpg").touch()
    assert [path.name for path, _ in find_images(tmp_path / "a[1].jpg")] == ["a[1].jpg"]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(*args, **options):
    return [place.as_posix() for _, place in find_images(*args, **options)]


def test_hidden_files_are_left_out(tmp_path):
    """What macOS and galleries put beside photos; a hidden folder that is named itself is meant."""
    touch(tmp_path, "a.jpg", "._a.jpg", ".thumbnails/a.jpg", "sub/.b.jpg", "sub/b.jpg")
    assert found(tmp_path) == ["a.jpg", "sub/b.jpg"]
    assert found(tmp_path / ".thumbnails") == ["a.jpg"]


def test_linked_folders_are_followed_each_once(tmp_path):
    touch(tmp_path, "disk/deep/b.jpg", "here/a.jpg", "here/z/c.jpg")
    (tmp_path / "here/disk").symlink_to(tmp_path / "disk")
    (tmp_path / "here/again").symlink_to(tmp_path / "here/z")
    (tmp_path / "here/loop").symlink_to(tmp_path / "here")
    (tmp_path / "disk/deep/back").symlink_to(tmp_path / "here")
    (tmp_path / "here/broken.jpg").symlink_to(tmp_path / "gone.jpg")
    assert found(tmp_path / "here") == ["a.jpg", "disk/deep/b.jpg", "z/c.jpg"]


def test_outputs_among_the_images_are_no_images(tmp_path, monkeypatch):
    """So that a command works twice in a folder of images; outputs that are named themselves are meant."""
    touch(tmp_path, "a.jpg", "sub/b.jpg", "masks/a.png", "masks/sub/b.png", "stego-fit.png", "masks2/c.jpg")
    monkeypatch.chdir(tmp_path)
    exclude = ["masks", tmp_path / "stego-fit.png", "none"]
    assert found(".", exclude=exclude) == ["a.jpg", "masks2/c.jpg", "sub/b.jpg"]
    assert found("**/*.*g", exclude=exclude) == ["a.jpg", "masks2/c.jpg", "sub/b.jpg"]
    assert found(["masks", "masks/a.png"], exclude=exclude) == ["a.png", "sub/b.png"]
    assert found(".", exclude=["."]) == found(".")
    with pytest.raises(FileNotFoundError, match="but outputs"):
        find_images(".", exclude=["a.jpg", "sub", "masks", "masks2", "stego-fit.png"])


def test_replacing_is_all_or_nothing(tmp_path):
    target = tmp_path / "new" / "out.txt"
    with replacing(target) as part:
        part.write_text("one")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), replacing(target) as part:
        part.write_text("tw")
        raise KeyboardInterrupt
    assert target.read_text() == "one" and [p.name for p in target.parent.iterdir()] == ["out.txt"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


@pytest.mark.parametrize("name", ["file/out.txt", "folder"])
def test_what_cannot_be_written_is_named(tmp_path, name):
    """By its own name, not the temporary one, and without the system's number of the error."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises((OSError, ValueError)) as caught, replacing(tmp_path / name):
        pass
    message = str(caught.value)
    assert message.startswith(f"Cannot write {tmp_path / name}") and "Errno" not in message
    assert ".part" not in message and sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_full_disk_and_a_device_are_named(tmp_path):
    with pytest.raises(OSError, match=r"^Cannot write .*out.txt \(no space left on device\)\.$"):
        with replacing(tmp_path / "out.txt"):
            raise OSError(28, "No space left on device", str(tmp_path / ".out-x.part"))
    with pytest.raises(ValueError, match="Cannot write /dev/null: it is a folder or a device"):
        with replacing("/dev/null"):
            pass
    assert Path("/dev/null").is_char_device() and not os.listdir(tmp_path)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_numbers_in_names_sort_by_value(here):
    """Folders, patterns and subfolders; what has as many digits everywhere stays in the order of before."""
    for name in (
        "10.png",
        "9.png",
        "1.png",
        "take2/f11.png",
        "take2/f2.png",
        "take10/x.png",
        "a.png",
        "a1.png",
    ):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).touch()
    assert found(".") == "1.png 9.png 10.png a.png a1.png take2/f2.png take2/f11.png take10/x.png".split()
    assert found("*.png") == "1.png 9.png 10.png a.png a1.png".split()


def test_a_foreign_comment_is_no_note(here):
    Image.new("RGB", (9, 9)).save("a.jpg", comment="mask of the red death")
    Image.new("RGB", (9, 9)).save("b.tif", description="overlay")
    assert not is_output(Path("a.jpg")) and not is_output(Path("b.tif")) and not is_output(Path("none.png"))


def test_what_pillow_reads_is_read_and_the_rest_named(here, caplog):
    """AVIF and JFIF of a folder; files of other kinds are counted, outputs and hidden ones not."""
    caplog.set_level(NOTICE, "stego")
    (here / "in").mkdir()
    picture = Image.fromarray(draw_scene(0)[0])
    for name, form in (("a.jpg", "JPEG"), ("b.avif", "AVIF"), ("c.jfif", "JPEG")):
        if form == "AVIF" and ".avif" not in Image.registered_extensions():
            pytest.skip("this Pillow has no AVIF")
        picture.save(f"in/{name}", form)
    for name in ("d.HEIC", "e.heic", "notes.txt", ".hidden.txt"):
        (here / "in" / name).write_bytes(b"x")
    assert found("in") == ["a.jpg", "b.avif", "c.jfif"]
    assert caplog.messages == ["3 files of other kinds passed over: 2 .heic, 1 .txt."]
    for name in found("in"):
        assert np.abs(np.asarray(read_image(f"in/{name}")).astype(int) - np.asarray(picture)).mean() < 8


def test_a_film_names_the_way_to_frames(here):
    Path("drive.mp4").write_bytes(bytes(100))
    Path("a.HEIC").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"drive\.mp4 .*no known format.*ffmpeg -i FILM -vf fps=10"):
        read_image("drive.mp4")
    with pytest.raises(ValueError, match=r"a\.HEIC .*no known format.*as JPEG"):
        read_image("a.HEIC")


def test_a_list_in_another_encoding_is_named(here):
    Path("list.txt").write_bytes("straße.jpg".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list\.txt is not text in UTF-8 \(byte 4\)"):
        read_lines("list.txt")
    assert decoded_lines("\ufeffstraße\r\nweg\n".encode(), "x") == ["straße", "weg"]
