"""What `stego predict` writes: where each image's outputs go, the formats, and the checks before any work.

A mask, an overlay or an array has a note in it of what it was made with, so that a later run knows whether it
is up to date. Raises ValueError for an output that cannot be written or would replace an input.
"""

import functools
import hashlib
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stego_parts.backbones import fingerprint
from stego_parts.drawing import overlay, with_legend
from stego_parts.images import (
    IGNORE,
    IMAGE_SUFFIXES,
    cluster_shares,
    coco_annotations,
    mask_image,
    output_names,
    read_image,
    replacing,
)
from stego_parts.maps import FrameAverage
from stego_parts.model_files import read_model
from stego_parts.tokens import no_progress, prefetch

PIPE = "-"  # stdin as an image, stdout as an output
ONE_FILE = ("json", "coco")  # formats with one file for all images
PICTURE, JSON = (".png", ".jpg", ".jpeg"), (".json",)  # suffixes of sheets and overlays, of documents
SUFFIXES = {"mask": (".png",), "overlay": PICTURE, "npz": (".npz",), "json": JSON, "coco": JSON}
OVERLAY_SUFFIX = ".overlay.jpg"
READ_AHEAD, WRITE_BEHIND = 3, 2  # images decoded before, and written after, the one that is segmented


# ---- checks ------------------------------------------------------------------------------------------------


def check_outputs(files, *, inputs=(), folders=()):
    """ValueError for an output that cannot be written, or that would replace an input or another output.

    files: (path, suffixes) pairs, no suffixes for a model, which may have any but an image's. A path of None,
    there or in folders, is an output that nobody wants.
    """
    read, written = {Path(path).resolve() for path in inputs}, set()
    for path, suffixes in files:
        if path is None or str(path) == PIPE:
            continue
        if path.resolve() in read:
            raise ValueError(f"The output {path} would overwrite an input; choose another name.")
        if path in written:
            raise ValueError(f"Two outputs would both be written to {path}; give them different folders.")
        if path.is_dir():
            raise ValueError(f"The output {path} is a folder; name a file in it.")
        if path.exists() and not path.is_file():
            raise ValueError(f"The output {path} is a device or a pipe; name a file.")
        if suffixes and path.suffix.lower() not in suffixes:
            raise ValueError(f"The output {path} is not a {' or '.join(suffixes)} file, which is needed.")
        if not suffixes and path.suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(f"The model {path} has the name of an image; choose one like stego.pt.")
        written.add(path)
    folders = {folder for folder in folders if folder}
    for folder in folders:
        if any(path.parent == folder.resolve() for path in read):
            raise ValueError(f"The folder {folder} has inputs in it; choose another for outputs.")
    for folder in {path.parent for path in written} | folders:
        check_folder(folder)


def check_replacing(output: Path, match, overwrite: bool):
    """ValueError where a fit would replace a model with named clusters, or what is no model, unasked."""
    if overwrite or not output.exists() or (match and match.resolve() == output.resolve()):
        return
    try:
        named = [f"{k}={name}" for k, name in enumerate(read_model(output)["names"]) if name]
    except ValueError as error:
        raise ValueError(f"{error} To replace the file, give --overwrite; or choose another -o.") from error
    if named:
        raise ValueError(
            f"{output} has named clusters ({', '.join(named)}); keep the names with --match {output}, or "
            "give --overwrite, or another -o."
        )


def check_folder(folder: Path):
    """ValueError for a folder that can neither be written to nor made."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is not a folder, and outputs are to go there; choose another place.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"Cannot write into {there}: {error.strerror}.") from error


# ---- places ------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """An image to segment: a path or binary file, its place below what named it, an output of each format."""

    source: Path
    place: Path
    targets: dict[str, Path]

    def is_done(self, note: str) -> bool:
        """All outputs are there, made with what the note says, and not older than the image."""
        made = [path.stat().st_mtime for path in self.targets.values() if read_note(path) == note]
        return len(made) == len(self.targets) and min(made) >= self.source.stat().st_mtime


def plan_outputs(sources, output: Path, formats) -> list[Job]:
    """The outputs of each image: the one file named, or in a folder, places like the images have in theirs."""
    if formats[0] in ONE_FILE:
        return [Job(source, place, {}) for source, place in sources]
    if str(output) == PIPE or (output.suffix and not output.is_dir()):
        if len(sources) > 1:
            raise ValueError(
                f"{len(sources)} images do not go into one output {output}; name a folder with -o."
            )
        targets = {formats[0]: output} | {each: output.with_suffix(OVERLAY_SUFFIX) for each in formats[1:]}
        return [Job(*sources[0], targets)]
    places = [place for _, place in sources]
    suffixes = [OVERLAY_SUFFIX if each == "overlay" else SUFFIXES[each][0] for each in formats]
    names = [output_names(places, suffix) for suffix in suffixes]
    return [
        Job(source, place, {each: output / name for each, name in zip(formats, row)})
        for (source, place), *row in zip(sources, *names)
    ]


def document_path(output: Path, kind: str) -> Path | None:
    """Where the one file of a format goes: stdout, the file named, or a file in the folder named."""
    if kind not in ONE_FILE:
        return None
    if str(output) == PIPE or (output.suffix and not output.is_dir()):
        return output
    return output / ("coco.json" if kind == "coco" else "shares.json")


# ---- notes -------------------------------------------------------------------------------------------------


def note_of(model, keep, options: dict) -> str:
    """What outputs depend on beside their images, as a hash: the model, its names and colours, the options."""
    palette = torch.from_numpy(model.palette)
    tensors = {**model.head.state_dict(), "centers": model.centers, "palette": palette}
    parts = [fingerprint(tensors), model.backbone_sha256, model.config.adaptation, model.names, keep]
    parts.append(sorted(options.items()))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def read_note(path: Path) -> str | None:
    """The note in an output; None if there is none, or no such file."""
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return archive.comment.decode()
        with Image.open(path) as picture:
            return picture.info["stego"] if picture.format == "PNG" else picture.info["comment"].decode()
    except Exception:  # decoders raise whatever a damaged or foreign file leads them to
        return None


def contact_sheets(folder: Path) -> list[Path]:
    """What fits left in a folder beside their models; a picture without a note is somebody's own."""
    return [path for path in folder.glob("*-fit.png") if read_note(path)]


# ---- formats -----------------------------------------------------------------------------------------------


class Writer(NamedTuple):
    """Writes the outputs of a model. keep: clusters to keep, None for all; note: goes into each output."""

    model: object
    keep: list | None
    note: str

    def results(self, jobs: list[Job], kind: str, options: dict, progress=no_progress) -> Iterator[tuple]:
        """(job, what `write` returned, or the error) for each; threads read and write meanwhile."""
        segment = self.model.probabilities if kind == "npz" else self.model.predict
        average = functools.lru_cache(1)(lambda folder: FrameAverage())  # each folder is another video
        images = prefetch(lambda job: _attempt(read_image, job.source), jobs, window=READ_AHEAD)

        def segment_next(job, image):
            smooth = average(job.source.parent) if options["smooth"] else None
            return segment(image, **options | dict(smooth=smooth, progress=progress))

        masks = ((job, image, _attempt(segment_next, job, image)) for job, image in zip(jobs, images))
        yield from zip(jobs, prefetch(lambda each: _attempt(self.write, *each), masks, window=WRITE_BEHIND))

    def write(self, job: Job, image: Image.Image, result: np.ndarray) -> dict:
        """Write an image's mask (H, W), or probabilities (K, h, w) as npz; its entry for a document."""
        if "npz" in job.targets:
            self._write_arrays(image, result, job.targets["npz"])
            return {}
        mask = result if self.keep is None else np.where(np.isin(result, self.keep), result, IGNORE)
        for kind, target in job.targets.items():
            colors = self.model.colors
            picture = mask_image(mask, colors) if kind == "mask" else legend_overlay(self.model, image, mask)
            write_picture(picture, target, self.note)
        if job.targets:
            return {}
        entry = {"file_name": job.place.as_posix(), "height": image.height, "width": image.width}
        return entry | {
            "clusters": cluster_shares(mask, self.model.labels),
            "segments": coco_annotations(mask),
        }

    def write_document(self, entries: list[dict], kind: str, target: Path):
        """The one file of json or coco; clusters of one name are one, under the lowest of their numbers."""
        labels, merged = self.model.labels, self.model.merged.tolist()
        clusters = sorted({merged[k] for k in (range(len(labels)) if self.keep is None else self.keep)})
        shares = [entry.pop("clusters") for entry in entries]
        segments = [(i, each) for i, entry in enumerate(entries, 1) for each in entry.pop("segments")]
        if kind == "json":
            images = [entry | {"clusters": [of[k] for k in clusters]} for entry, of in zip(entries, shares)]
            document = {"images": images}
        else:
            document = {
                "info": {"description": "segments found by stego"},
                "images": [{"id": i, **entry} for i, entry in enumerate(entries, 1)],
                "categories": [{"id": k, "name": labels[k]} for k in clusters],
                "annotations": [{"id": n, "image_id": i, **each} for n, (i, each) in enumerate(segments, 1)],
            }
        with opened(target) as file:
            file.write(json.dumps(document).encode() + b"\n")

    def _write_arrays(self, image: Image.Image, probabilities: np.ndarray, target: Path):
        arrays = dict(probabilities=probabilities.astype(np.float16), names=np.array(self.model.labels))
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays, size=np.array([image.height, image.width]))
        with zipfile.ZipFile(packed, "a") as archive:
            archive.comment = self.note.encode()
        with opened(target) as file:
            file.write(packed.getvalue())


def _attempt(function, *args):
    """What a function returns, or the error that it or one before it ended with."""
    try:
        for each in args:
            if isinstance(each, Exception):
                return each
        return function(*args)
    except (ValueError, OSError) as error:
        return error


def write_picture(picture: Image.Image, target: Path, note: str):
    """A picture with a note in it, in the format of the target's suffix, PNG on stdout."""
    text = PngInfo()
    text.add_text("stego", note)
    jpeg = target.suffix.lower() in (".jpg", ".jpeg")
    options = dict(format="JPEG", quality=90, comment=note) if jpeg else dict(format="PNG", pnginfo=text)
    with opened(target) as file:
        picture.save(file, **options)


def legend_overlay(model, image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture with its segments over it and a legend below."""
    picture = overlay(image, mask, model.colors, model.labels)
    return with_legend(picture, mask, model.colors, model.labels)


@contextmanager
def opened(target: Path):
    """A binary file that becomes the target, or goes to stdout, when the block ends well."""
    if str(target) == PIPE:
        whole = io.BytesIO()
        yield whole
        sys.stdout.buffer.write(whole.getvalue())
        sys.stdout.buffer.flush()
    else:
        with replacing(target) as part, open(part, "wb") as file:
            yield file
