"""Files: which images a user means, and outputs that are written whole or not at all."""

import glob
import logging
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

Sources = str | os.PathLike | Iterable  # files, folders and patterns
IMAGE_SUFFIXES = set(".jpg .jpeg .png .bmp .tif .tiff .webp .gif .ppm .pgm .pnm .jp2".split())
PIPE = "-"  # stdin as an image, stdout as an output

log = logging.getLogger("stego")


def find_images(sources: Sources, *, exclude: Iterable = ()) -> list[tuple[Path, Path]]:
    """The images that files, folders (recursive) and glob patterns name, sorted, each once.

    Follows links to folders; leaves out hidden files, and what lies in `exclude` (outputs: files and folders),
    unless the source lies there too. Returns (path, place) pairs; place is where an image lies below what
    named it, for outputs that mirror the tree. Raises FileNotFoundError for a source without images.
    """
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    real_path = cache(lambda path: Path(os.path.realpath(path)))
    outputs, images = [real_path(path) for path in exclude], {}
    for source in sources:
        for path, place in _expand(Path(source)):
            real, root = real_path(path.parent) / path.name, real_path(path.parents[len(place.parts) - 1])
            if not any(real.is_relative_to(each) and not root.is_relative_to(each) for each in outputs):
                images.setdefault(os.path.abspath(path), (path, place))
    if not images:
        raise FileNotFoundError(
            f"No images but outputs in {', '.join(map(str, sources))}; give other images."
        )
    return list(images.values())


def _expand(source: Path) -> list[tuple[Path, Path]]:
    if source.is_dir():
        images = sorted(path for path in _visible_files(source) if path.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise FileNotFoundError(f"No images in {source}; looked for {suffixes} in it and below.")
        return [(path, path.relative_to(source)) for path in images]
    if source.is_file():
        return [(source, Path(source.name))]
    if source.exists():
        raise FileNotFoundError(f"{source} is neither a file nor a folder; give images, folders or patterns.")
    if not glob.has_magic(str(source)):
        raise FileNotFoundError(f"No such file or folder: {source}.")
    matches = [path for path in map(Path, sorted(glob.glob(str(source), recursive=True))) if path.is_file()]
    if not matches:
        raise FileNotFoundError(f"The pattern {source} matches no file.")
    root = next(parent for parent in source.parents if not glob.has_magic(str(parent)))
    return [(path, path.relative_to(root)) for path in matches]


def _visible_files(source: Path) -> Iterator[Path]:
    """The files in a folder and below that are not hidden; each folder once, links to folders last."""
    seen, pending = set(), [source]
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


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name if the block ends well and vanishes if not."""
    path = Path(path)
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


def write_bytes(content: bytes, path: Path | str):
    """Write a file whole or not at all, or to stdout."""
    if str(path) == PIPE:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        with replacing(path) as part:
            part.write_bytes(content)
