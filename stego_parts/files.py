"""Files: which images a user means, notes in outputs, and outputs that are written whole or not at all."""

import glob
import logging
import os
import re
import secrets
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from stego_parts.config import NOTICE
from stego_parts.tiff import read_tags

Sources = str | os.PathLike | Iterable  # files, folders and patterns
IMAGE_SUFFIXES = set(
    ".jpg .jpeg .jpe .jfif .png .bmp .tif .tiff .webp .avif .gif .ppm .pgm .pnm .jp2 .j2k".split()
)
PIPE = "-"  # stdin as an image, stdout as an output
LIST = "@"  # before the name of a file: the images that it names, one a line
NUMBER_WIDTH = 20  # digits to which numbers in names are filled up, so that they sort by value

NOTE = "stego"  # key of the note in PNG
PICTURE_NOTE = "stego picture"  # in pictures that no later run compares
DESCRIPTION = 270  # TIFF tag that is the note
NOTE_HEAD = 4096  # bytes of a PNG or JPEG in which its note lies
# What only our notes say: in PNG the key alone, elsewhere the kind of output and what it was made with.
OWN_NOTE = re.compile(rb"tEXtstego\0|(mask|tif|overlay|cutout|npz) [0-9a-f]{32}|stego picture")

log = logging.getLogger("stego")


# ---- images ----------------------------------------------------------------------------------------------------


class _Match(NamedTuple):
    """A file that a source means, where it lies below the source, and whether it was named itself."""

    path: Path
    place: Path
    named: bool


def source_list(sources: Sources) -> list:
    """Sources, one or several, to be read more than once: a generator can be read once."""
    return [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)


def find_images(
    sources: Sources, *, exclude: Iterable = (), outputs: bool = False
) -> list[tuple[Path, Path]]:
    """The images that files, folders (recursive), glob patterns and lists (@FILE, - for stdin) name, each once.

    Sorted, with numbers in names by their value. Follows links to folders; leaves out hidden files, and what lies in
    `exclude` (outputs: files and folders), unless the source lies there too; of folders and patterns also what this
    program wrote itself, unless `outputs`. Says how many files it passed over. Returns (path, place) pairs; place is
    where an image lies below what named it, for outputs that mirror the tree. Raises FileNotFoundError for a source
    without images.
    """
    sources = source_list(sources)
    if not sources or not all(map(str, sources)):  # "": what a shell has for a variable unset
        raise FileNotFoundError("No images, or an empty name for them; give files, folders or patterns.")
    is_excluded = _exclusion(exclude)
    images: dict[str, tuple[Path, Path]] = {}
    own: set[str] = set()
    other: dict[str, str] = {}
    for source in sources:
        whole_folder = Path(source).is_dir()
        for path, place, named in _matches(source):
            name = os.path.abspath(path)
            if name in images or name in own or is_excluded(path, place):
                continue
            if whole_folder and path.suffix.lower() not in IMAGE_SUFFIXES:
                other[name] = path.suffix.lower() or path.name
            elif not named and not outputs and is_output(path):
                own.add(name)
            else:
                images[name] = (path, place)
    _say_passed_over(own, other)
    if not images:
        raise FileNotFoundError(
            f"No images but outputs in {', '.join(map(str, sources))}; give other images."
        )
    return list(images.values())


def _exclusion(exclude: Iterable) -> Callable[[Path, Path], bool]:
    """A function of a path and its place: whether it lies in outputs in which its source does not lie."""
    real_path = cache(lambda path: Path(os.path.realpath(path)))
    outputs = [real_path(path) for path in exclude]

    def is_excluded(path: Path, place: Path) -> bool:
        real = real_path(path.parent) / path.name
        root = real_path(path.parents[len(place.parts) - 1])
        return any(real.is_relative_to(each) and not root.is_relative_to(each) for each in outputs)

    return is_excluded


def _say_passed_over(own: set[str], other: dict[str, str]) -> None:
    if own:
        log.log(NOTICE, "%s left out: stego wrote them itself.", counted(len(own), "picture"))
    if other:
        suffixes = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(other.values()).items()))
        log.log(NOTICE, "%s of other kinds passed over: %s.", counted(len(other), "file"), suffixes)


def opened(source: Path | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """A file by its path, closed afterwards, or one that is open already and stays so."""
    return open(source, "rb") if isinstance(source, Path) else nullcontext(source)


def counted(number: int, noun: str) -> str:
    """ "1 image", "3 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _matches(source: str | os.PathLike) -> list[_Match]:
    """The files that a source means; of a folder all that are not hidden, whatever they are."""
    path = Path(source)
    text = str(source)
    if text == PIPE:
        return _listed(decoded_lines(sys.stdin.buffer.read(), "stdin"))
    if text.startswith(LIST) and not path.exists():
        return _listed(read_lines(text[1:]))
    if path.is_dir():
        files = sorted(_visible_files(path), key=natural_key)
        if not any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise FileNotFoundError(f"No images in {source}; looked for {suffixes} in it and below.")
        return [_Match(file, file.relative_to(path), False) for file in files]
    if path.is_file():
        return [_Match(path, Path(path.name), True)]
    if path.exists():
        raise FileNotFoundError(f"{source} is neither a file nor a folder; give images, folders or patterns.")
    if not glob.has_magic(text):
        raise FileNotFoundError(f"No such file or folder: {source}.")
    found = sorted(map(Path, glob.glob(text, recursive=True)), key=natural_key)
    files = [each for each in found if each.is_file()]
    if not files:
        raise FileNotFoundError(f"The pattern {source} matches no file.")
    root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    return [_Match(file, file.relative_to(root), False) for file in files]


def list_images(names: Iterable[str]) -> list[tuple[Path, Path]]:
    """The images that the lines of a list name, as `find_images` returns them, each once."""
    found = {os.path.abspath(match.path): (match.path, match.place) for match in _listed(names)}
    return list(found.values())


def _listed(names: Iterable[str]) -> list[_Match]:
    """The files of the lines of a list; their places are what the lines say, so that outputs mirror the tree."""
    matches = []
    for name in names:
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(
                f"No such file: {name}, a line of a list of images; its lines name files."
            )
        inside = not path.is_absolute() and ".." not in path.parts
        matches.append(_Match(path, path if inside else Path(path.name), True))
    return matches


def natural_key(path: Path) -> tuple[list[str], tuple[str, ...]]:
    """Sorts paths as people count: 2.png before 10.png."""
    parts = [re.sub("[0-9]+", _filled_up, part) for part in path.parts]
    return parts, path.parts


def _filled_up(number: re.Match) -> str:
    return number[0].zfill(NUMBER_WIDTH)


def read_lines(path: Path | str) -> list[str]:
    """The lines of a text file in UTF-8, without blank ones; ValueError for another encoding."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a text file.")
    return decoded_lines(Path(path).read_bytes(), path)


def decoded_lines(content: bytes, name: Path | str) -> list[str]:
    """The lines of a text in UTF-8, with a byte order mark or not, without blank ones."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not text in UTF-8 (byte {error.start}); store it in that encoding."
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _visible_files(source: Path) -> Iterator[Path]:
    """The files in a folder and below that are not hidden; each folder once, links to folders last."""
    seen = set()
    pending = [source]
    for top in pending:  # grows on the way
        for folder, folders, names in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if (real := os.path.realpath(folder)) in seen:  # a loop of links
                folders.clear()
                continue
            seen.add(real)
            pending += [path for name in folders if (path := Path(folder, name)).is_symlink()]
            files = (Path(folder, name) for name in names if not name.startswith("."))
            yield from (path for path in files if path.is_file())


# ---- notes -----------------------------------------------------------------------------------------------------


def is_output(path: Path) -> bool:
    """Whether this program wrote a picture, by the note in it."""
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(NOTE_HEAD)
        if head[:2] in (b"II", b"MM"):
            head = (read_note(path) or "").encode(errors="replace")
        return OWN_NOTE.search(head) is not None
    return False


def read_note(path: Path) -> str | None:
    """The note in an output; None if there is none, or no such file."""
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return archive.comment.decode()
        with open(path, "rb") as file:
            tags = read_tags(file)
        if tags is not None:
            return str(tags[DESCRIPTION])
        with Image.open(path) as picture:
            return picture.info[NOTE] if picture.format == "PNG" else picture.info["comment"].decode()
    except Exception:  # decoders raise whatever a damaged or foreign file leads them to
        return None


# ---- writing ---------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name if the block ends well and vanishes if not.

    A link stays one: what it leads to is replaced.
    """
    path = Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"Cannot write {path}: it is a folder or a device; name a file.")
    part = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
        log.info("Wrote %s", path)
    except OSError as error:  # its own words name the temporary file
        raise type(error)(f"Cannot write {path} ({(error.strerror or str(error)).lower()}).") from error
    finally:
        with suppress(OSError):  # it has another name now, or never was
            part.unlink()


def write_bytes(content: bytes, path: Path | str) -> None:
    """Write a file whole or not at all, or to stdout."""
    if str(path) == PIPE:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        with replacing(path) as part:
            part.write_bytes(content)
