"""What `stego predict` writes: where each image's outputs go, the formats, and the checks before any work.

A mask, an overlay or an array has a note in it of what it was made of and with, so that a later run knows whether
it is up to date. Raises ValueError for an output that cannot be written or would replace an input.
"""

import functools
import hashlib
import io
import json
import os
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from cli_parts import georaster
from cli_parts.console import made_in
from cli_parts.drawing import cutout, with_legend
from cli_parts.formats import FORMATS
from cli_parts.segments import cluster_shares, coco_annotations, coco_document, table
from stego_parts import images
from stego_parts.clusters import FrameAverage
from stego_parts.features import check_memory
from stego_parts.files import (
    IMAGE_SUFFIXES,
    PIPE,
    decoded_lines,
    find_images,
    list_images,
    natural_key,
    opened,
    read_note,
    write_bytes,
)
from stego_parts.models import read_model
from stego_parts.running import Progress, no_progress, prefetch
from stego_parts.weights import fingerprint

READ_AHEAD = 3  # images decoded before the one that is segmented
WRITE_BEHIND = 2  # and written after it
IMAGE_HEAD = 65536  # bytes of an image file by which, with its size, an output knows it
NAME_BYTES = 255  # of a file's name, at most, on nearly every file system


# ---- checks ------------------------------------------------------------------------------------------------


def check_formats(
    kind: str,
    sources: tuple[str, ...],
    output: Path | str,
    *,
    overlay: bool,
    only: list[str],
    min_area: int,
    skip_existing: bool,
    smooth: bool,
    crf: bool,
    **_: Any,
) -> list[str]:
    """The formats that options of predict ask for; ValueError for what does not go together."""
    two = overlay and kind != "overlay"
    piped = str(output) == PIPE
    form = FORMATS[kind]
    if PIPE in sources and len(sources) > 1:
        raise ValueError("- stands for one image on stdin; give it alone, or give files.")
    if two and not form.is_mask:
        raise ValueError(f"--overlay goes with masks; leave it or --format {kind} out.")
    if two and piped:
        raise ValueError("Two pictures do not go into one stdout; choose --format mask or overlay.")
    if only and kind == "npz":
        raise ValueError("--format npz holds the probabilities of all clusters; leave --only out.")
    if kind == "cutout" and not (only and crf):
        raise ValueError(
            "--format cutout needs --only, the clusters to cut out, and the CRF for their edges."
        )
    if min_area and not form.has_regions:
        raise ValueError(f"--min-area is for --format coco; leave it or --format {kind} out.")
    if skip_existing and (form.document or piped or PIPE in sources):
        raise ValueError("--skip-existing is for image files with outputs of their own; leave it out.")
    if smooth and (skip_existing or PIPE in sources):
        raise ValueError("--smooth is for all frames in their order; leave --skip-existing and - out.")
    return [kind, "overlay"] if two else [kind]


def check_outputs(
    files: Iterable[tuple[Path | None, tuple[str, ...]]],
    *,
    inputs: Iterable[Path | str | None] = (),
    folders: Iterable[Path | None] = (),
) -> None:
    """ValueError for an output that cannot be written, or that would replace an input or another output.

    files: (path, suffixes) pairs, no suffixes for a model, which may have any but an image's. A path of None,
    there or in folders, is an output that nobody wants, in inputs one that nobody gave.
    """
    read = {Path(path).resolve() for path in inputs if path}
    written = set()
    for path, suffixes in files:
        if path is None or str(path) == PIPE:
            continue
        if path.resolve() in read:
            raise ValueError(f"The output {path} would overwrite an input; choose another name.")
        if path.resolve() in written:
            raise ValueError(f"Two outputs would both be written to {path}; give them different folders.")
        if path.is_dir():
            raise ValueError(f"The output {path} is a folder; name a file in it.")
        if len(os.fsencode(path.name)) > NAME_BYTES:
            raise ValueError(f"The name {path.name} is longer than {NAME_BYTES} bytes; shorten the image's.")
        if path.exists() and not path.is_file():
            raise ValueError(f"The output {path} is a device or a pipe; name a file.")
        if suffixes and path.suffix.lower() not in suffixes:
            raise ValueError(f"The output {path} is not a {' or '.join(suffixes)} file, which is needed.")
        if not suffixes and path.suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(f"The model {path} has the name of an image; choose one like stego.pt.")
        written.add(path.resolve())
    wanted = {folder for folder in folders if folder}
    for folder in wanted:
        if any(path.parent == folder.resolve() for path in read):
            raise ValueError(f"The folder {folder} has inputs in it; choose another for outputs.")
    for folder in {path.parent for path in written} | wanted:
        check_folder(folder)


def check_replacing(outputs: Iterable[Path], match: Path | None, overwrite: bool) -> None:
    """ValueError where a fit would replace a model with named clusters, or what is no model, unasked."""
    same = match and match.resolve()
    for output in (each for each in outputs if not overwrite and each.exists() and each.resolve() != same):
        try:
            named = [f"{k}={name}" for k, name in enumerate(read_model(output)["names"]) if name]
        except ValueError as error:
            advice = "To replace the file, give --overwrite; or choose another -o."
            raise ValueError(f"{error} {advice}") from error
        if named:
            raise ValueError(
                f"{output} has named clusters ({', '.join(named)}); keep the names with --match {output}, or "
                "give --overwrite, or another -o."
            )


def check_folder(folder: Path) -> None:
    """ValueError for a folder that can neither be written to nor made."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is not a folder, and outputs are to go there; choose another place.")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"Cannot write into {there}: {error.strerror}.") from error


# ---- places ------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """An image to segment: a path or binary file, its place below what named it, an output of each format."""

    source: Path
    place: Path
    targets: dict[str, Path]


def plan_outputs(
    sources: tuple[str, ...],
    output: Path | str,
    formats: list[str],
    model: Path,
    limit: int | None,
    *,
    frames: bool = False,
) -> tuple[list[Job], Path | None]:
    """A job for each of the first images, and the one file of a format that has one, or None; all checked.

    sources: files, folders, patterns and lists, or - for an image, or names of images, on stdin. frames: they name
    those of videos, in any order.
    """
    if frames:  # a shell writes 10.png before 2.png
        sources = tuple(sorted(sources, key=lambda source: natural_key(Path(source))))
    form = FORMATS[formats[0]]
    found = image_on_stdin() if PIPE in sources else None
    if found is None:
        found = with_distinct_places(find_images(sources, exclude=[Path(output), *made_in(model.parent)]))
    jobs = _jobs(found, output, formats, limit)
    document = None
    if form.document:
        document = Path(output) if is_file(output) else Path(output) / form.document
    files = [(path, FORMATS[kind].suffixes) for job in jobs for kind, path in job.targets.items()]
    inputs = [model, *(path for path, _ in found if isinstance(path, Path))]
    check_outputs([*files, (document, form.suffixes)], inputs=inputs)
    return jobs, document


def with_distinct_places(found: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Images and their places; where two in several folders have one place, all lie below the folder of all."""
    if len({place for _, place in found}) == len(found):
        return found
    paths = [Path(os.path.abspath(path)) for path, _ in found]
    folder = os.path.commonpath([path.parent for path in paths])
    return [(path, whole.relative_to(folder)) for (path, _), whole in zip(found, paths)]


def image_on_stdin() -> list[tuple[Any, Path]] | None:
    """What is on stdin as if it were a file; the images whose names are there instead, one a line."""
    content = sys.stdin.buffer.read()
    first = content.partition(b"\n")[0].strip()
    try:
        is_list = bool(first) and Path(os.fsdecode(first)).is_file()
    except (OSError, ValueError):  # a name that no file can have
        is_list = False
    if is_list:
        return with_distinct_places(list_images(decoded_lines(content, "stdin")))
    return [(io.BytesIO(content), Path("stdin"))]


def _jobs(found: list, output: Path | str, formats: list[str], limit: int | None) -> list[Job]:
    """The outputs of each image: the one file named, or in a folder, places like the images have in theirs."""
    if FORMATS[formats[0]].document:
        return [Job(source, place, {}) for source, place in found[:limit]]
    if is_file(output):
        count = len(found[:limit])
        if count > 1:
            raise ValueError(
                f"{count} images do not go into one output {output}; name a folder with -o, or give --format csv, "
                "json or coco."
            )
        targets = {kind: Path(output).with_suffix(FORMATS[kind].suffix) for kind in formats[1:]}
        source, place = found[0]
        return [Job(source, place, {formats[0]: Path(output), **targets})]
    places = [place for _, place in found]  # of all, whatever the limit: names depend on each other
    names = {kind: output_names(places, FORMATS[kind].suffix) for kind in formats}
    jobs = []
    for i, (source, place) in enumerate(found[:limit]):
        targets = {kind: Path(output) / names[kind][i] for kind in formats}
        jobs.append(Job(source, place, targets))
    return jobs


def is_file(output: Path | str) -> bool:
    """Whether an output, which need not be there, is one file or stdout, not a folder; a slash at its end says so."""
    if str(output) == PIPE:
        return True
    return bool(Path(output).suffix) and not str(output).endswith(("/", os.sep)) and not Path(output).is_dir()


# ---- formats -----------------------------------------------------------------------------------------------


@dataclass
class Writer:
    """Segments images and writes the outputs of a model.

    kind: the format; keep: clusters to keep, None for all; min_area: pixels of the smallest region that counts;
    options: of `Stego.predict`, resolution and smooth (whether images are frames of a video) among them.
    """

    model: Any
    kind: str
    keep: list | None
    min_area: int
    options: dict

    @property
    def clusters(self) -> dict[int, str]:
        """What is kept, {number: name}; clusters of one name are one, under the lowest of their numbers."""
        kept = self.model.merged[slice(None) if self.keep is None else self.keep]
        return {k: self.model.labels[k] for k in np.unique(kept).tolist()}

    @functools.cached_property
    def made_with(self) -> str:
        """What outputs depend on beside their images, as a hash: the model, its names and colours, the options."""
        model = self.model
        palette = torch.from_numpy(model.palette)
        tensors = {**model.head.state_dict(), "centers": model.centers, "palette": palette}
        parts = [fingerprint(tensors), model.backbone_sha256, model.config.adaptation, model.names, self.keep]
        parts.append(sorted((self.options | {"min_area": self.min_area}).items()))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def note(self, kind: str, source: Any) -> str:
        """What is noted in an output: its kind, and a hash of what it was made with and of its image."""
        with opened(source) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            known = hashlib.sha256(f"{self.made_with} {size} ".encode() + file.read(IMAGE_HEAD))
        return f"{kind} {known.hexdigest()[:32]}"

    def is_done(self, job: Job) -> bool:
        """All outputs are there, made of this image with what their notes say, and not older than the image.

        An image of the future, from a camera with a wrong clock, is no newer than anything: the note alone counts.
        """
        for kind, path in job.targets.items():
            if not path.exists() or read_note(path) != self.note(kind, job.source):
                return False
        changed = job.source.stat().st_mtime
        return changed > time.time() or min(path.stat().st_mtime for path in job.targets.values()) >= changed

    def results(self, jobs: list[Job], progress: Progress = no_progress) -> Iterator[tuple[Job, Any]]:
        """(job, what `write` returned, or the error) for each; threads read and write meanwhile."""
        check_memory(self.model.backbone, self.options["resolution"], device=self.model.device)
        segment = self.model.probabilities if FORMATS[self.kind].from_probabilities else self.model.predict
        average = functools.lru_cache(1)(lambda folder: FrameAverage())  # each folder is another video
        pictures = prefetch(lambda job: _attempt(self.model.read, job.source), jobs, window=READ_AHEAD)

        def segment_next(job: Job, picture: images.Picture) -> np.ndarray:
            smooth = average(job.source.parent) if self.options["smooth"] else None
            return segment(picture, **self.options | dict(smooth=smooth, progress=progress))

        masks = ((job, each, _attempt(segment_next, job, each)) for job, each in zip(jobs, pictures))
        yield from zip(jobs, prefetch(lambda each: _attempt(self.write, *each), masks, window=WRITE_BEHIND))

    def write(self, job: Job, picture: images.Picture, result: np.ndarray) -> dict:
        """Write an image's mask (H, W), or for some formats probabilities (K, h, w); its part of a document."""
        if not FORMATS[self.kind].from_probabilities and self.keep is not None:
            result = np.where(np.isin(result, self.keep), result, images.IGNORE)
        image = picture.image
        for kind, target in job.targets.items():
            self.write_one(kind, target, job, image, result)
        entry = {"file_name": job.place.as_posix(), "height": image.height, "width": image.width}
        if self.kind == "coco":
            entry["annotations"] = coco_annotations(result, self.min_area)
        elif FORMATS[self.kind].document:
            area = georaster.pixel_area(georaster.geo_tags(job.source))
            entry["clusters"] = cluster_shares(result, self.clusters, area, valid=picture.valid)
        return entry

    def write_one(self, kind: str, target: Path, job: Job, image: Image.Image, result: np.ndarray) -> None:
        """One output of an image."""
        note = self.note(kind, job.source)
        if kind == "npz":
            write_bytes(packed_arrays(result, self.model.labels, image, note), target)
        elif kind == "cutout":
            images.write_image(cutout(image, result[self.keep].sum(0)), target, note=note, form="PNG")
        elif kind == "overlay":
            images.write_image(with_legend(image, result, self.model), target, note=note, form="PNG")
        else:
            picture = images.mask_image(result, self.model.colors)
            tags = georaster.geo_tags(job.source)
            form = "TIFF" if kind == "tif" else "PNG"
            images.write_image(picture, target, note=note, form=form, tags=georaster.mask_tags(tags, note))

    def write_document(self, entries: list[dict], target: Path) -> None:
        """The one file of a format that has one for all images."""
        if self.kind == "csv":
            text = table(entries)
        elif self.kind == "json":
            text = json.dumps({"images": entries}) + "\n"
        else:
            text = coco_document(entries, self.clusters) + "\n"
        write_bytes(text.encode(errors="surrogateescape"), target)


def _attempt(function: Callable, *args: Any) -> Any:
    """What a function returns, or the error that it or one before it ended with."""
    try:
        for each in args:
            if isinstance(each, Exception):
                return each
        return function(*args)
    except (ValueError, OSError) as error:
        return error


def packed_arrays(probabilities: np.ndarray, labels: list[str], image: Image.Image, note: str) -> bytes:
    """An .npz file of probabilities (K, h, w), with a note in it."""
    packed = io.BytesIO()
    size = [image.height, image.width]
    np.savez_compressed(packed, probabilities=probabilities.astype(np.float16), names=labels, size=size)
    with zipfile.ZipFile(packed, "a") as archive:
        archive.comment = note.encode()
    return packed.getvalue()


def output_names(places: Iterable[Path], suffix: str) -> list[Path]:
    """Where the output of each image goes below the output folder: its place, with another suffix.

    Images that share a stem keep their full names, except one that has the suffix already: a.png and a.gif
    become a.png and a.gif.png. Only equal places get equal names.
    """
    places = list(places)
    short = [place.with_suffix(suffix) for place in places]
    full = [place.with_name(place.name + suffix) for place in places]
    count = Counter(short)
    names = [s if count[s] == 1 or s == place else f for s, f, place in zip(short, full, places)]
    count = Counter(names)  # a.gif.png may be an image itself
    return [name if count[name] == 1 else f for name, f in zip(names, full)]
