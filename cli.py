"""The command line: parses, calls the library, prints. Results go to stdout, progress and warnings to stderr.

Exit codes: 0 all done, 1 something failed (the rest is still written), 2 usage. torch is imported inside the
commands, so that --help and --version answer at once.
"""

import ctypes
import io
import json
import logging
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import click
from click.core import ParameterSource

from stego_parts.report import agreement_line, best_regions, contact_sheet, write_report

PRESET_NAMES = (
    "small",
    "cityscapes",
    "cocostuff",
    "potsdam",
)  # stego.PRESETS, known here without importing torch
VIEWS = ("five", "whole", "windows")  # stego.VIEWS, likewise
DATASET_NAMES = ("cityscapes", "cocostuff27", "potsdam3")  # datasets.LAYOUTS, likewise
PIPE = "-"  # stdin as an image, stdout as an output
SUFFIXES = {
    "mask": (".png",),
    "overlay": (".jpg", ".jpeg", ".png"),
    "both": (".png",),
    "npz": (".npz",),
    "json": (".json",),
    "coco": (".json",),
}  # formats of predict and the file names they take
WRITTEN = {
    "mask": "masks",
    "overlay": "overlays",
    "both": "masks and overlays",
    "npz": "probabilities",
    "json": "shares",
    "coco": "segments",
}  # what the summary calls them
ONE_FILE = ("json", "coco")  # formats with one file for all images
RELEASED = "released"  # the preset of models that the reference implementation made
OVERLAY_SUFFIX = ".overlay.jpg"
DEMO_SCENES, DEMO_STEPS = {"train": 30, "val": 10}, 300  # two minutes on two cores; steps as `fit` takes them
READ_AHEAD, WRITE_BEHIND = 3, 2  # images that predict decodes before, and writes after, the one it works on
REFRESH = 0.2  # seconds between two updates of the progress line

log = logging.getLogger("stego")


# ---- what the commands share -----------------------------------------------------------------------------------


@contextmanager
def clear_errors():
    """The library's ValueError and FileNotFoundError as one sentence and exit code 1."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from error
    except BrokenPipeError:  # the reader has seen enough: click ends in silence
        raise
    except OSError as error:  # full disk, no permission
        raise click.ClickException(f"{error.strerror or error}: {error.filename or 'output'}") from error


class Progress:
    """progress(stage, done, total) as one line on stderr with the time left; silent where stderr is no terminal."""

    def __init__(self):
        self.stage, self.began, self.shown = None, 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int):
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.began = stage, now
        if not sys.stderr.isatty() or is_quiet() or (now - self.shown < REFRESH and done < total):
            return
        self.shown = now
        left = (now - self.began) * (total - done) / max(done, 1)
        end = "\n" if done == total else ""
        click.echo(
            f"\r{stage:>9} {done}/{total}  {int(left // 60)}:{int(left % 60):02d} left ", err=True, nl=False
        )
        click.echo(end, err=True, nl=False)


class StderrHandler(logging.Handler):
    """The library's messages as plain lines on stderr."""

    def emit(self, record):
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: "
        click.echo(f"{prefix}{record.getMessage()}", err=True)


def is_quiet() -> bool:
    return not log.isEnabledFor(logging.WARNING)


def summary(text: str, *, err: bool = False):
    """The last line of a command: what was done, how long it took, where the outputs are."""
    if not is_quiet():
        click.echo(text, err=err)


def verbosity_options(command):
    """-q and -v: how much is said."""

    def set_level(context, option, given):
        if given:
            log.setLevel(logging.ERROR if option.name == "quiet" else logging.INFO)

    quiet = click.option(
        "-q",
        "--quiet",
        is_flag=True,
        expose_value=False,
        callback=set_level,
        help="No progress, warnings and summary; errors only.",
    )
    verbose = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=set_level,
        help="Also say what was chosen, and each file that was written.",
    )
    return quiet(verbose(command))


def model_option(command):
    return click.option(
        "-m", "--model", default="stego.pt", show_default=True, type=click.Path(), help="The fitted model."
    )(command)


def limit_pixels(context, option, megapixels):
    """Pillow refuses to decode pictures above twice its limit, which may be bombs: move that limit."""
    if megapixels:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = round(megapixels * 1e6 / 2)


def network_options(command):
    """Options of everything that runs the backbone."""
    command = click.option(
        "--max-megapixels",
        type=float,
        callback=limit_pixels,
        expose_value=False,
        help="Refuse larger images.  [default: 179]",
    )(command)
    command = click.option(
        "--weights",
        type=click.Path(),
        help="Local file with the backbone's weights.  [default: the torch cache's, or a download]",
    )(command)
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, mps; auto takes CUDA where there is one.",
    )(command)


def dataset_options(command):
    command = click.option(
        "--root", type=click.Path(), help="Its folder.  [default: $STEGO_DATA/DATASET, or ./data/DATASET]"
    )(command)
    return click.option("--dataset", type=click.Choice(DATASET_NAMES), help="A published dataset.")(command)


def dataset_root(dataset: str, root) -> Path:
    return Path(root) if root else Path(os.environ.get("STEGO_DATA", "data")) / dataset


def keep_memory():
    """Let glibc reuse the memory of short-lived tensors, where it gives each back to the system and asks anew.

    dino_vits8 at 320 x 424 on a CPU core: 4.1 s in place of 5.2 s, for 0.1 to 0.3 GB more resident memory.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another system, another allocator
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 512 << 20), (M_TOP_PAD, 64 << 20)):
        mallopt(option, value)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="stego", prog_name="stego")
def main():
    """Segment images without labels: find what recurs in a folder, then find it in any image.

    \b
    Examples:
      stego demo                         try everything on drawn scenes
      stego fit ./images                 find what recurs in them: ./stego.pt
      stego predict img.jpg -o mask.png  segment with ./stego.pt
    """
    keep_memory()
    log.handlers, log.propagate = [StderrHandler()], False
    log.setLevel(logging.WARNING)
    if os.environ.get("NO_COLOR"):
        click.get_current_context().color = False


def class_count(text: str):
    """A number, or auto."""
    if text != "auto" and not text.isdecimal():
        raise click.BadParameter(f"got {text}; give a number from 1 to 255, or auto.")
    return text if text == "auto" else int(text)


# ---- fit -------------------------------------------------------------------------------------------------------


@main.command(short_help="Find what recurs in images.")
@click.argument("images", nargs=-1, type=click.Path())
@dataset_options
@click.option(
    "-k",
    "--classes",
    default="27",
    type=class_count,
    metavar="K",
    show_default="27, or the dataset's",
    help="Number of segments, 1 to 255; auto: as many as halves of the images agree on.",
)
@click.option("-o", "--output", default="stego.pt", show_default=True, help="Where the model goes.")
@click.option(
    "--report",
    type=click.Path(file_okay=False),
    help="Also write charts of the fit, neighbours and clusters into this folder.  [default: none]",
)
@click.option(
    "--backbone",
    default="auto",
    show_default=True,
    help="dino_vits8, dinov2_vits14, dino_resnet50, ..., tiny; auto: dino_vits8, or tiny without network.",
)
@click.option(
    "--stride", type=int, help="Of a ResNet, pixels from one feature to the next: 32, 16 or 8.  [default: 32]"
)
@click.option(
    "--preset",
    type=click.Choice(PRESET_NAMES),
    help="Published hyper-parameters to start from.  [default: small, with --balance auto]",
)
@click.option(
    "--balance",
    type=click.Choice(["auto", "fixed"]),
    help="b's from the data, or the preset's.  [default: fixed with a preset, else auto]",
)
@click.option("--steps", type=int, help="Training steps.  [default: 300, or the named preset's]")
@click.option("--batch-size", type=int, help="Crops per step.  [default: the preset's]")
@click.option("--code-size", type=int, help="Length of a code.  [default: the preset's]")
@click.option("--lambda-self", type=float, help="Weight of the image with itself.  [default: the preset's]")
@click.option("--lambda-knn", type=float, help="Weight of nearest neighbours.  [default: the preset's]")
@click.option("--lambda-rand", type=float, help="Weight of random pairs.  [default: the preset's]")
@click.option("--b-self", type=float, help="Negative pressure within an image.  [default: from the data]")
@click.option("--b-knn", type=float, help="Negative pressure with neighbours.  [default: from the data]")
@click.option("--b-rand", type=float, help="Negative pressure with random images.  [default: from the data]")
@click.option(
    "--views",
    type=click.Choice(VIEWS),
    help="five: crops that the backbone sees alone; whole: no crops; windows: five parts of what it sees of "
    "the whole image.  [default: windows, or the named preset's]",
)
@click.option(
    "--evenness",
    type=float,
    help="0: clusters follow what is frequent, 1: also what is rare.  [default: 1, or 0 with a preset]",
)
@click.option(
    "--feature-weight",
    type=float,
    help="Weight of the features themselves beside the codes in what is clustered.  [default: 0]",
)
@click.option("--centering/--no-centering", default=None, help="Spatial centering.  [default: the preset's]")
@click.option(
    "--seed", default=0, show_default=True, help="Same seed, same images, same machine: same model."
)
@click.option(
    "--match",
    type=click.Path(),
    metavar="MODEL",
    help="An earlier model: clusters that are the same keep its numbers, names and colours.  [default: none]",
)
@click.option("--cache-size", default=8.0, show_default=True, help="FitCheckpoint space for features, in GB.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted fit of the same images and options.")
@click.option("--keep-features", is_flag=True, help="Leave the features in OUTPUT.scratch for the next fit.")
@network_options
@verbosity_options
def fit(images, output, dataset, root, classes, preset, report, resume, keep_features, **options):
    """Find the things that recur in IMAGES: files, folders (searched recursively) or "patterns/*.jpg".

    With --dataset in their place: the train split of a published dataset and its published hyper-parameters.

    \b
    Examples:
      stego fit ./images
      stego fit a/ b/ "c/*.jpg" -k 27 -o model.pt --backbone dino_vits8 --steps 5000
      stego fit --dataset cityscapes --root ~/data/cityscapes
      stego fit ./images --resume
    """
    if bool(images) == bool(dataset):
        raise click.UsageError("Give images to fit on, or a --dataset, one of the two.")
    with clear_errors():
        output = Path(output)
        if output.is_dir():
            raise click.UsageError(
                f"The output {output} is a folder; name a file, like {output / 'stego.pt'}."
            )
        from stego import Stego
        from stego_parts.distributed import process_group
        from stego_parts.images import find_images

        began = time.monotonic()
        if dataset:
            from stego_parts.datasets import PRESET_OF, labelled_set

            labelled = labelled_set(dataset, dataset_root(dataset, root), "train")
            paths, preset = [image for image, _ in labelled.pairs], preset or PRESET_OF[dataset]
            if click.get_current_context().get_parameter_source("classes") == ParameterSource.DEFAULT:
                classes = len(labelled.classes)
        else:
            paths = [path for path, _ in find_images(images)]
        scratch = output.with_name(f"{output.name}.scratch")
        with process_group() as (number, count):
            first, alone = number == 0, count == 1
            if (resume or keep_features) and not alone:
                raise click.UsageError("--resume and --keep-features are for one process; leave them out.")
            if not first:
                log.addFilter(
                    lambda record: record.msg.startswith("Skipped")
                )  # the first process says the rest
            try:
                model = Stego.fit(
                    paths if dataset else images,
                    classes=classes,
                    preset=preset,
                    progress=Progress() if first else None,
                    scratch=scratch if alone else None,
                    resume=resume,
                    **options,
                )
            except KeyboardInterrupt as interruption:
                after = " with --resume goes on." if alone else ", of several processes, starts afresh."
                raise click.ClickException(f"Interrupted; the same command{after}") from interruption
        if not first:
            return
        model.save(output)
        (scratch / "training.pt").unlink(missing_ok=True)
        if not keep_features:
            shutil.rmtree(scratch, ignore_errors=True)
        from stego_parts.images import write_image

        sheet = output.with_name(f"{output.stem}-fit.png")
        write_image(contact_sheet(model, paths), sheet)
        if report:
            write_report(model, report)
    if model.record.agreement:
        summary(agreement_line(model.record.agreement))
    if not is_quiet():
        print_usage(model)
    for key, value in vars(model.config).items():
        log.info("%s: %s", key, value)
    summary(
        f"{len(paths)} images, {model.config['backbone']}, {time.monotonic() - began:.0f} s: "
        f"model {output}, picture {sheet}" + (f", report {report}" if report else "")
    )


def print_usage(model):
    """One line a cluster: its number, name, share of the training images, colour."""
    wide = max(map(len, model.names))
    for k, (share, name, colour) in enumerate(zip(model.share.tolist(), model.names, model.palette.tolist())):
        bar = click.style("#" * max(round(60 * share), 1), fg=tuple(colour))
        code = "#%02x%02x%02x" % tuple(colour)
        click.echo(f"cluster {k:3d} {f'{name:{wide}} ' if wide else ''}{share:6.1%} {code} {bar}")


# ---- predict ---------------------------------------------------------------------------------------------------


@main.command(short_help="Segment images with a fitted model.")
@click.argument("images", nargs=-1, required=True, type=click.Path())
@model_option
@click.option(
    "-o",
    "--output",
    default="stego-out",
    show_default=True,
    type=click.Path(),
    help="A file for one image, a folder for several; - for stdout.",
)
@click.option(
    "--format",
    "kind",
    default="mask",
    show_default=True,
    type=click.Choice(list(SUFFIXES)),
    help="mask: indexed PNG; overlay: the picture with its segments and a legend; both; npz: probabilities; "
    "json: the share of each cluster, one file; coco: RLE segments, one file.",
)
@click.option("--overlay", is_flag=True, help="The same as --format both.")
@click.option(
    "--only", metavar="NAMES", help="Clusters to keep, by name or number: road,sky,7.  [default: all]"
)
@click.option(
    "--crf/--no-crf", default=True, show_default=True, help="Sharpen the segments with a dense CRF."
)
@click.option(
    "--crf-size",
    default=0.5,
    show_default=True,
    help="Megapixels at which the CRF works on larger photos, and most megapixels of probabilities.",
)
@click.option(
    "--resolution",
    default=320,
    show_default=True,
    help="Pixels of the shorter side that the backbone sees; twice as many: finer, four times the work.",
)
@click.option("--skip-existing", is_flag=True, help="Leave images alone whose output is there already.")
@network_options
@verbosity_options
def predict(images, model, output, kind, overlay, only, skip_existing, device, weights, **options):
    """Segment IMAGES with a fitted model: files, folders (their tree is mirrored), "patterns/*.jpg", or - for stdin.

    Masks are indexed PNG: cluster numbers from 0, 255 for none.

    \b
    Examples:
      stego predict img.jpg -o mask.png
      stego predict folder/ "more/*.png" -o out/ --format both
      stego predict img.jpg -o road.png --only road,3 --resolution 480
      stego predict folder/ -o segments.json --format coco
      cat img.jpg | stego predict - -o - > mask.png
    """
    kind = check_kind("both" if overlay else kind, output, only, skip_existing)
    with clear_errors():
        from stego import Stego
        from stego_parts.images import find_images

        found = [(sys.stdin.buffer, Path("stdin"))] if images == (PIPE,) else find_images(images)
        jobs = plan_outputs(found, Path(output), kind)
        if skip_existing:
            jobs = [job for job in jobs if not job[2].exists()]
        fitted = Stego.load(model, device=device, weights=weights)
        keep = fitted.select(only.split(",")) if only else None
        fitted.backbone  # noqa: B018 - a wrong backbone is one error, not one for every image
    began, progress, entries, failed = time.monotonic(), Progress(), [], 0
    for done, (job, entry) in enumerate(zip(jobs, predicted(fitted, jobs, kind, keep, options)), 1):
        if isinstance(entry, Exception):
            failed += 1
            who = job[0] if isinstance(job[0], Path) else "<stdin>"
            log.error("%s", entry if str(who) in str(entry) else f"{who}: {entry}")
        else:
            entries.append(entry)
        progress("predict", done, len(jobs))
    if kind in ONE_FILE:
        with clear_errors():
            output = document_path(Path(output), kind)
            write_document(fitted, entries, output, kind, keep)
    summary(
        f"{len(jobs) - failed} of {len(jobs)} images, {time.monotonic() - began:.0f} s: "
        f"{WRITTEN[kind]} in {'stdout' if str(output) == PIPE else output}",
        err=str(output) == PIPE,
    )
    sys.exit(1 if failed else 0)


def check_kind(kind: str, output: str, only: str | None, skip_existing: bool) -> str:
    """The format asked for; refuses what does not go together."""
    if output == PIPE and kind == "both":
        raise click.UsageError("Two pictures do not go into one stdout; choose --format mask or overlay.")
    if skip_existing and (output == PIPE or kind in ONE_FILE):
        raise click.UsageError(
            "--skip-existing looks for an output for each image; choose another format or -o."
        )
    if only and kind == "npz":
        raise click.UsageError("--format npz holds the probabilities of all clusters; leave --only out.")
    return kind


def plan_outputs(found, output: Path, kind: str) -> list[tuple]:
    """(source, place, target) of each image; refuses to overwrite an input or to write two outputs to one place."""
    suffixes = SUFFIXES[kind]
    if kind in ONE_FILE or str(output) == PIPE:
        if len(found) > 1 and kind not in ONE_FILE:
            raise click.UsageError(f"{len(found)} images do not go into one stdout; name a folder with -o.")
        jobs = [(source, place, document_path(output, kind)) for source, place in found]
        check_overwriting(jobs[:1], [source for source, _ in found])
        return jobs
    if output.suffix and not output.is_dir():
        if output.suffix.lower() not in suffixes:
            raise click.UsageError(
                f"The output {output} is not a {' or '.join(suffixes)} file, which {kind} needs."
            )
        if len(found) > 1:
            raise click.UsageError(
                f"{len(found)} images cannot go into the one file {output}; name a folder with -o."
            )
        jobs = [(*found[0], output)]
    else:
        suffix = OVERLAY_SUFFIX if kind == "overlay" else suffixes[0]
        jobs = [(source, place, output / place.with_suffix(suffix)) for source, place in found]
    check_overwriting(jobs, [source for source, _ in found])
    return jobs


def check_overwriting(jobs, sources):
    """UsageError if an output would replace an image, or another output."""
    sources, targets = {source.resolve() for source in sources if isinstance(source, Path)}, {}
    for source, _, target in jobs:
        if target.resolve() in sources:
            raise click.UsageError(
                f"The output for {source} would overwrite the image {target}; choose another -o."
            )
        if target in targets:
            raise click.UsageError(
                f"{targets[target]} and {source} would both be written to {target}; "
                "predict them into different folders."
            )
        targets[target] = source


def document_path(output: Path, kind: str) -> Path:
    """Where JSON for all images goes: the file named, or a file in the folder named."""
    if str(output) == PIPE or kind not in ONE_FILE:
        return output
    if output.suffix and not output.is_dir():
        if output.suffix.lower() not in SUFFIXES[kind]:
            raise click.UsageError(f"The output {output} is not a .json file, which {kind} needs.")
        return output
    return output / ("coco.json" if kind == "coco" else "shares.json")


def predicted(model, jobs, kind: str, keep, options: dict):
    """The entry of each job, or its error: the next image is decoded and the last result written in threads."""
    from stego_parts.images import read_image
    from stego_parts.tokens import prefetch

    images = prefetch(lambda job: attempt(read_image, job[0]), jobs, window=READ_AHEAD)
    found = ((job, image, attempt(segment, model, image, kind, options)) for job, image in zip(jobs, images))
    return prefetch(lambda each: attempt(write_result, model, *each, kind, keep), found, window=WRITE_BEHIND)


def attempt(function, *args):
    """What a function returns, or the error that it or one before it ended with."""
    try:
        for each in args:
            if isinstance(each, Exception):
                return each
        return function(*args)
    except (ValueError, OSError) as error:
        return error


def segment(model, image, kind: str, options: dict):
    """The mask (H, W) of an image, for npz its probabilities (K, h, w)."""
    return (model.probabilities if kind == "npz" else model.predict)(image, **options)


def write_result(model, job: tuple, image, result, kind: str, keep) -> dict:
    """Write what kind asks for of one image; returns its entry for the kinds with one file for all."""
    import numpy as np

    from stego_parts.images import IGNORE, cluster_shares, coco_annotations, mask_image

    _, place, target = job
    if kind == "npz":
        with opened(target) as file:
            np.savez_compressed(
                file,
                probabilities=result.astype(np.float16),
                names=np.array(model.labels),
                size=np.array([image.height, image.width]),
            )
        return {}
    mask = result
    if keep is not None:
        mask[~np.isin(mask, keep)] = IGNORE
    if kind in ("overlay", "both"):  # first, so that a mask on disk says that the image is done
        picture = legend_overlay(model, image, mask)
        write_picture(picture, target.with_suffix(OVERLAY_SUFFIX) if kind == "both" else target)
    if kind in ("mask", "both"):
        write_picture(mask_image(mask, model.palette), target)
    if kind not in ONE_FILE:
        return {}
    inside = (
        {"clusters": cluster_shares(mask, model.labels)}
        if kind == "json"
        else {"found": coco_annotations(mask)}
    )
    return {"file_name": place.as_posix(), "height": image.height, "width": image.width, **inside}


def legend_overlay(model, image, mask):
    from stego_parts.drawing import overlay, with_legend

    return with_legend(overlay(image, mask, model.palette), mask, model.palette, model.labels)


def write_document(model, entries: list[dict], target: Path, kind: str, keep):
    """The one JSON file of the formats json and coco."""
    clusters = range(len(model.labels)) if keep is None else keep
    if kind == "json":
        for entry in entries:
            entry["clusters"] = [entry["clusters"][k] for k in clusters]
        document = {"images": entries}
    else:
        found = [(number, each) for number, entry in enumerate(entries, 1) for each in entry.pop("found")]
        document = {
            "info": {"description": "segments found by stego"},
            "images": [{"id": number, **entry} for number, entry in enumerate(entries, 1)],
            "categories": [{"id": k, "name": model.labels[k]} for k in clusters],
            "annotations": [
                {"id": i, "image_id": number, **each} for i, (number, each) in enumerate(found, 1)
            ],
        }
    with opened(target) as file:
        file.write(json.dumps(document).encode() + b"\n")


@contextmanager
def opened(target: Path):
    """A binary file that becomes the target, or goes to stdout, when the block ends well."""
    if str(target) == PIPE:
        whole = io.BytesIO()
        yield whole
        sys.stdout.buffer.write(whole.getvalue())
        sys.stdout.buffer.flush()
    else:
        from stego_parts.images import replacing

        with replacing(target) as part, open(part, "wb") as file:
            yield file


def write_picture(picture, target: Path):
    """A picture in the format of the target's suffix, PNG on stdout."""
    form = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(target.suffix.lower(), "PNG")
    with opened(target) as file:
        picture.save(file, format=form, quality=90)


# ---- name ------------------------------------------------------------------------------------------------------


@main.command(short_help="Give clusters of a model names.")
@click.argument("model", type=click.Path())
@click.argument("names", nargs=-1, required=True, metavar="NUMBER=NAME...")
@verbosity_options
def name(model, names):
    """Give clusters of MODEL names, kept in the model; `NUMBER=` takes one away.

    Names appear in legends, JSON, COCO categories and `stego show`, and --only understands them.

    \b
    Example:
      stego name stego.pt 3=road 5=sky
    """
    pairs = [pair.partition("=") for pair in names]
    if wrong := [first for first, equals, _ in pairs if not (first.isdecimal() and equals)]:
        raise click.UsageError(f"Got {wrong[0]!r}; name clusters by number, like 3=road.")
    with clear_errors():
        from stego import Stego

        fitted = Stego.load(model, device="cpu")
        if fitted.config.preset == RELEASED:
            raise ValueError(
                f"{model} is a checkpoint of the reference implementation, which holds no names."
            )
        fitted.rename({int(first): last.strip() for first, _, last in pairs})
        fitted.save(model)
    if not is_quiet():
        print_usage(fitted)


# ---- eval ------------------------------------------------------------------------------------------------------


@main.command("eval", short_help="Score a model against ground truth.")
@dataset_options
@click.option("--images", type=click.Path(), help="In place of --dataset: a folder of your own images,")
@click.option(
    "--labels", type=click.Path(), help="and one of their label maps, paired by stem; 255 is ignored."
)
@click.option(
    "--names", type=click.Path(), help="Text file, the name of a class a line.  [default: class 0, ...]"
)
@click.option(
    "--train-images",
    type=click.Path(),
    help="Train images, for the linear probe and the baseline,  [default: none]",
)
@click.option("--train-labels", type=click.Path(), help="and their label maps.  [default: none]")
@model_option
@click.option(
    "--crf/--no-crf", default=True, show_default=True, help="Score with the dense CRF as well (slow)."
)
@click.option(
    "--diagnostics", is_flag=True, help="Also what correspondences know about labels (Sec. 3.1, A.6)."
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(),
    help="Write everything that was measured to this file.  [default: none]",
)
@click.option(
    "--figures",
    type=click.Path(),
    help="Write the confusion matrix and example strips into this folder.  [default: none]",
)
@click.option("--seed", default=0, show_default=True, help="For the probes and the baseline's k-means.")
@network_options
@verbosity_options
def evaluate(model, crf, diagnostics, json_file, figures, seed, device, weights, **data):
    """Score a model against ground truth by the published protocol, beside its backbone alone.

    \b
    Examples:
      stego eval --dataset cityscapes --root ~/data/cityscapes
      stego eval --images val/ --labels val_labels/ --names classes.txt --json scores.json --figures figures/
    """
    began = time.monotonic()
    with clear_errors():
        labelled, train = labelled_sets(**data)
        from stego import Stego
        from stego_parts import protocol
        from stego_parts import report as pictures

        fitted, progress = Stego.load(model, device=device, weights=weights), Progress()
        report = protocol.evaluate(fitted, labelled, train=train, crf=crf, seed=seed, progress=progress)
        if diagnostics:
            report["diagnostics"] = protocol.diagnose(fitted, labelled, seed=seed, progress=progress)
        click.echo(protocol.table(report))
        if json_file:
            protocol.write_json(report, json_file)
        if figures:
            pictures.write_figures(report, fitted, labelled, figures)
    outputs = " and ".join(str(each) for each in (json_file, figures) if each)
    summary(
        f"{report['images']} images, {time.monotonic() - began:.0f} s" + (f": {outputs}" if outputs else "")
    )


def labelled_sets(dataset, root, images, labels, names, train_images, train_labels):
    """The set to score on, and the train split or None."""
    if bool(dataset) == bool(images):
        raise click.UsageError("Give a --dataset, or your own --images and --labels.")
    if bool(images) != bool(labels) or bool(train_images) != bool(train_labels):
        raise click.UsageError("Images and labels belong together: give both folders.")
    from stego_parts.datasets import folder_set, labelled_set

    if dataset:
        root = dataset_root(dataset, root)
        return labelled_set(dataset, root, "val"), train_split(dataset, root)
    labelled = folder_set(images, labels, names=names)
    if not train_images:
        return labelled, None
    train = folder_set(train_images, train_labels, names=names)
    larger = max(
        labelled, train, key=lambda each: len(each.classes)
    )  # without names, a class may occur in one only
    for each in (labelled, train):
        each.classes, each.lookup = larger.classes, larger.lookup
    return labelled, train


def train_split(dataset, root):
    """The train split, for the linear probe and the baseline; None, with a warning, where only val was fetched."""
    from stego_parts.datasets import labelled_set

    try:
        return labelled_set(dataset, root, "train")
    except FileNotFoundError as error:
        log.warning("No linear probe, and the baseline's clusters from val itself: %s", error)


# ---- show ------------------------------------------------------------------------------------------------------


@main.command(short_help="Say and show what is in a model, or what corresponds.")
@click.argument("things", nargs=-1, type=click.Path(), metavar="[MODEL] [IMAGES]...")
@click.option(
    "-m",
    "--model",
    type=click.Path(),
    help="The model, if not named first.  [default: stego.pt; none with --at]",
)
@click.option(
    "--sheet",
    type=click.Path(),
    help="Write a picture of the regions of IMAGES that fit each cluster best.  [default: none]",
)
@click.option(
    "--at",
    multiple=True,
    metavar="X,Y",
    callback=lambda context, option, texts: [point(t) for t in texts],
    help="A point of the first image, in pixels from its upper left corner: show what corresponds with it in "
    "all images; repeatable.  [default: none]",
)
@click.option(
    "-o",
    "--output",
    default="correspondences.png",
    show_default=True,
    type=click.Path(),
    help="With --at: where the picture goes.",
)
@click.option(
    "--backbone", help="With --at and no model: whose features to show.  [default: auto, as in fit]"
)
@network_options
@verbosity_options
def show(things, model, sheet, at, output, backbone, device, weights):
    """Say what is in MODEL, and show on IMAGES what each cluster is, so that you can name it.

    With --at no MODEL stands before the images: for each point its correspondences are shown as a coloured picture, in
    the first image and the others (the nearest four, if more or a folder); of backbone features, with -m of codes too.
    Others default to the images that the model was fitted on, if they are where they were.

    \b
    Examples:
      stego show stego.pt
      stego show stego.pt images/ --sheet sheet.png
      stego show img.jpg images/ --at 120,80 --at 300,40 -m stego.pt -o corr.png
    """
    if at:
        if not things or sheet or (model and backbone):
            raise click.UsageError(
                "With --at give an image, and -m or --backbone: `stego show img.jpg --at 120,80`."
            )
        return show_points(things[0], things[1:], at, model, output, backbone or "auto", device, weights)
    model, images = (model, things) if model else ((*things, "stego.pt")[0], things[1:])
    if bool(images) != bool(sheet) or backbone:
        raise click.UsageError(
            "Give images and a sheet, or neither: `stego show stego.pt images/ --sheet sheet.png`."
        )
    with clear_errors():
        from stego import Stego
        from stego_parts.images import find_images

        fitted = Stego.load(model, device=device, weights=weights)
        for line in description(fitted):
            click.echo(line)
        for key, value in vars(fitted.config).items():
            log.info("%s: %s", key, value)
        print_usage(fitted)
        if sheet:
            from stego_parts.drawing import region_sheet
            from stego_parts.images import write_image

            began, paths = time.monotonic(), [path for path, _ in find_images(images)]
            captions = [f"{label}\n{share:.1%}" for label, share in zip(fitted.labels, fitted.share.tolist())]
            regions = best_regions(fitted, paths, progress=Progress())
            write_image(region_sheet(regions, fitted.palette, captions), sheet)
            summary(f"{len(paths)} images, {time.monotonic() - began:.0f} s: sheet {sheet}")


def point(text: str) -> tuple[int, int]:
    """120,80 -> (120, 80)."""
    x, _, y = text.partition(",")
    if not (x.isdecimal() and y.isdecimal()):
        raise click.UsageError(f"Got --at {text}; a point is two whole numbers, x and y, like 120,80.")
    return int(x), int(y)


def show_points(image, others, at, model, output, backbone, device, weights):
    """Write the picture of what corresponds with points of an image."""
    began = time.monotonic()
    with clear_errors():
        from stego import Stego, pick_device
        from stego_parts.backbones import load_backbone
        from stego_parts.images import find_images, write_image
        from stego_parts.report import correspondence_sheet

        fitted = Stego.load(model, device=device, weights=weights) if model else None
        device = pick_device(device)
        network = fitted.backbone if model else load_backbone(backbone, weights=weights, device=device)
        paths = [path for path, _ in find_images(others)] if others else images_of(fitted)
        paths = (
            [path for path in paths if not (path.exists() and path.samefile(image))]
            if Path(image).exists()
            else []
        )
        picture = correspondence_sheet(
            network, image, at, others=paths, model=fitted, device=device, progress=Progress()
        )
        write_image(picture, output)
    summary(
        f"{len(at)} points, {len(paths)} other images to choose from, {time.monotonic() - began:.0f} s: "
        f"picture {output}"
    )


def images_of(model) -> list[Path]:
    """The images a model was fitted on, as far as it tells and they are there; without a model none."""
    from stego_parts.images import find_images

    given = model.config.images if model else None
    if not isinstance(given, list) or not given:
        return []
    try:
        return [path for path, _ in find_images([str(name) for name in given])]
    except FileNotFoundError:
        log.warning("The images that the model was fitted on are not here; name others to see them too.")
        return []


def description(model) -> list[str]:
    """How a model was made, for people."""
    c, backbone = model.config, f"backbone  {model.config['backbone']}, weights {model.backbone_sha256[:12]}"
    if c["preset"] == RELEASED:
        return [
            backbone,
            "training  a checkpoint of the reference implementation; it does not tell its options",
        ]
    weights = " ".join(f"{key} {c[key]:.2f}" for key in ("lambda_self", "lambda_knn", "lambda_rand"))
    shifts = " ".join(f"{key} {c[key]:.2f}" for key in ("b_self", "b_knn", "b_rand"))
    return [
        backbone,
        f"data      {c['crops'] // (1 if c.get('views') == 'whole' else 5)} images, {c['crops']} crops",
        f"training  {c['steps']} steps of {c['batch_size']} crops, codes of {c['code_size']}, seed {c['seed']}",
        f"balance   {c['balance']}, preset {c['preset']}: {weights} {shifts}",
    ]


# ---- demo ------------------------------------------------------------------------------------------------------


@main.command(short_help="Try everything on drawn scenes, without data and network.")
@click.option(
    "-o", "--output", default="stego-demo", show_default=True, type=click.Path(), help="The folder it makes."
)
@click.option("--seed", default=0, show_default=True, help="Other seeds draw other scenes.")
@verbosity_options
def demo(output, seed):
    """Try everything on drawn scenes, without data and network: fit, predict and score. About two minutes.

    Leaves images, labels, the model, masks, overlays, sheets and scores in a folder.

    \b
    Example:
      stego demo
      stego demo -o /tmp/demo --seed 7
    """
    began, output, progress = time.monotonic(), Path(output), Progress()
    with clear_errors():
        import numpy as np

        from stego import Stego
        from stego_parts.datasets import folder_set
        from stego_parts.drawing import region_sheet
        from stego_parts.images import find_images, mask_image, read_image, write_image
        from stego_parts.protocol import evaluate, headline, table, write_json
        from stego_parts.report import write_figures
        from stego_parts.scenes import SCENE_CLASSES

        draw_scenes(output, seed, progress)
        paths = [path for path, _ in find_images(output / "images" / "train")]
        model = Stego.fit(
            paths, classes=len(SCENE_CLASSES), backbone="tiny", steps=DEMO_STEPS, seed=seed, progress=progress
        )
        train, val = (
            folder_set(output / "images" / split, output / "labels" / split, names=output / "classes.txt")
            for split in ("train", "val")
        )
        report = evaluate(model, val, train=train, seed=seed, progress=progress)
        most = np.argmax(headline(report)["confusion"], 0)  # the class that most of a cluster is
        model.rename({k: SCENE_CLASSES[c] for k, c in enumerate(most)})
        model.save(output / "stego.pt")
        write_json(report, output / "scores.json")
        write_figures(report, model, val, output / "figures")
        write_image(contact_sheet(model, paths), output / "stego-fit.png")
        regions = best_regions(model, paths, progress=progress)
        write_image(region_sheet(regions, model.palette, model.labels), output / "clusters.png")
        for done, (path, _) in enumerate(val.pairs, 1):
            image = read_image(path)
            mask = model.predict(image)
            write_image(mask_image(mask, model.palette), output / "masks" / path.name)
            write_image(
                legend_overlay(model, image, mask), output / "overlays" / path.with_suffix(".jpg").name
            )
            progress("predict", done, len(val.pairs))
    click.echo(table(report))
    summary(
        f"{sum(DEMO_SCENES.values())} drawn scenes, {time.monotonic() - began:.0f} s: everything in {output}"
    )


def draw_scenes(folder: Path, seed: int, progress):
    """images/ and labels/ with train/ and val/, and classes.txt, as `stego eval` reads them."""
    from PIL import Image

    from stego_parts.images import replacing, write_image
    from stego_parts.scenes import SCENE_CLASSES, draw_scene

    number = 0
    for split, count in DEMO_SCENES.items():
        for i in range(count):
            image, labels = draw_scene(1000 * seed + number)
            write_image(image, folder / "images" / split / f"scene{number:02d}.png")
            write_image(Image.fromarray(labels), folder / "labels" / split / f"scene{number:02d}.png")
            number += 1
            progress("drawing", number, sum(DEMO_SCENES.values()))
    with replacing(folder / "classes.txt") as part:
        part.write_text("\n".join(SCENE_CLASSES) + "\n")


if __name__ == "__main__":
    main(prog_name="stego")
