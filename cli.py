"""The command line: parses, calls the library, prints. Results go to stdout, progress and warnings to stderr.

Exit codes: 0 all done, 1 something failed (the rest is still written), 2 usage. torch is imported inside the
commands, so that --help and --version answer at once.
"""

import logging
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import click
from click.core import ParameterSource

PRESET_NAMES = ("small", "cityscapes", "cocostuff", "potsdam")  # stego.PRESETS, known here without importing torch
DATASET_NAMES = ("cityscapes", "cocostuff27", "potsdam3")       # stego_protocol.LAYOUTS, likewise
OVERLAY_SUFFIX = ".overlay.jpg"
REFRESH = 0.2  # seconds between two updates of the progress line


# ---- what the commands share -----------------------------------------------------------------------------------

@contextmanager
def clear_errors():
    """The library's ValueError and FileNotFoundError as one sentence and exit code 1."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from error
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
        if not sys.stderr.isatty() or (now - self.shown < REFRESH and done < total):
            return
        self.shown = now
        left = (now - self.began) * (total - done) / max(done, 1)
        end = "\n" if done == total else ""
        click.echo(f"\r{stage:>9} {done}/{total}  {int(left // 60)}:{int(left % 60):02d} left ", err=True, nl=False)
        click.echo(end, err=True, nl=False)


class StderrHandler(logging.Handler):
    """The library's warnings as plain lines on stderr."""

    def emit(self, record):
        click.echo(f"stego: {record.getMessage()}", err=True)


def model_option(command):
    return click.option("-m", "--model", default="stego.pt", show_default=True, help="The fitted model.")(command)


def limit_pixels(context, option, megapixels):
    """Pillow refuses to decode pictures above twice its limit, which may be bombs: move that limit."""
    if megapixels:
        from PIL import Image
        Image.MAX_IMAGE_PIXELS = round(megapixels * 1e6 / 2)


def network_options(command):
    """Options of everything that runs the backbone."""
    command = click.option("--max-megapixels", type=float, callback=limit_pixels, expose_value=False,
                           help="Refuse larger images.  [default: 179]")(command)
    command = click.option("--weights", type=click.Path(), help="Local file with the backbone's weights.")(command)
    return click.option("--device", default="auto", show_default=True,
                        help="cpu, cuda, cuda:1, mps; auto takes CUDA where there is one.")(command)


def dataset_options(command):
    command = click.option("--root", type=click.Path(),
                           help="Its folder.  [default: $STEGO_DATA/DATASET, or ./data/DATASET]")(command)
    return click.option("--dataset", type=click.Choice(DATASET_NAMES), help="A published dataset.")(command)


def dataset_root(dataset: str, root) -> Path:
    return Path(root) if root else Path(os.environ.get("STEGO_DATA", "data")) / dataset


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stego", prog_name="stego")
def main():
    """Segment images without labels: find what recurs in a folder, then find it in any image."""
    logger = logging.getLogger("stego")
    logger.handlers, logger.propagate = [StderrHandler()], False


# ---- fit -------------------------------------------------------------------------------------------------------

@main.command()
@click.argument("images", nargs=-1)
@dataset_options
@click.option("-k", "--classes", default=27, show_default="27, or the dataset's", help="Number of segments, 1 to 255.")
@click.option("-o", "--output", default="stego.pt", show_default=True, help="Where the model goes.")
@click.option("--backbone", default="auto", show_default=True,
              help="dino_vits8, dino_vitb8, dinov2_vits14, ..., tiny; auto: dino_vits8, or tiny without network.")
@click.option("--preset", type=click.Choice(PRESET_NAMES),
              help="Published hyper-parameters to start from.  [default: small, with --balance auto]")
@click.option("--balance", type=click.Choice(["auto", "fixed"]),
              help="b's from the data, or the preset's.  [default: fixed with a preset, else auto]")
@click.option("--steps", type=int, help="Training steps.  [default: 2000, or the named preset's]")
@click.option("--batch-size", type=int, help="Crops per step.  [default: the preset's]")
@click.option("--code-size", type=int, help="Length of a code.  [default: the preset's]")
@click.option("--lambda-self", type=float, help="Weight of the image with itself.  [default: the preset's]")
@click.option("--lambda-knn", type=float, help="Weight of nearest neighbours.  [default: the preset's]")
@click.option("--lambda-rand", type=float, help="Weight of random pairs.  [default: the preset's]")
@click.option("--b-self", type=float, help="Negative pressure within an image.  [default: from the data]")
@click.option("--b-knn", type=float, help="Negative pressure with neighbours.  [default: from the data]")
@click.option("--b-rand", type=float, help="Negative pressure with random images.  [default: from the data]")
@click.option("--five-crop/--no-five-crop", default=None, help="Cut images into five crops.  [default: the preset's]")
@click.option("--centering/--no-centering", default=None, help="Spatial centering.  [default: the preset's]")
@click.option("--seed", default=0, show_default=True, help="Same seed, same images, same machine: same model.")
@click.option("--cache-size", default=8.0, show_default=True, help="Scratch space for features, in GB.")
@network_options
def fit(images, output, dataset, root, classes, preset, **options):
    """Find the things that recur in IMAGES: files, folders (searched recursively) or "patterns/*.jpg".

    With --dataset in their place: the train split of a published dataset and its published hyper-parameters.

    \b
    Examples:
      stego fit ./images
      stego fit a/ b/ "c/*.jpg" -k 27 -o model.pt --backbone dino_vits8 --steps 5000
      stego fit --dataset cityscapes --root ~/data/cityscapes
    """
    if bool(images) == bool(dataset):
        raise click.UsageError("Give images to fit on, or a --dataset, one of the two.")
    with clear_errors():
        output = Path(output)
        if output.is_dir():
            raise click.UsageError(f"The output {output} is a folder; name a file, like {output / 'stego.pt'}.")
        from stego import Stego, find_images
        began = time.monotonic()
        if dataset:
            from stego_protocol import PRESET_OF, labelled_set
            labelled = labelled_set(dataset, dataset_root(dataset, root), "train")
            paths, preset = [image for image, _ in labelled.pairs], preset or PRESET_OF[dataset]
            if click.get_current_context().get_parameter_source("classes") == ParameterSource.DEFAULT:
                classes = len(labelled.classes)
        else:
            paths = [path for path, _ in find_images(images)]
        model = Stego.fit(paths, classes=classes, preset=preset, progress=Progress(), **options)
        model.save(output)
        from stego_images import write_image
        sheet = output.with_name(f"{output.stem}-fit.png")
        write_image(model.contact_sheet(paths), sheet)
    print_usage(model)
    click.echo(f"{len(paths)} images, {model.config['backbone']}, {time.monotonic() - began:.0f} s: "
               f"model {output}, picture {sheet}")


def print_usage(model):
    """One line a cluster: its number, its share of the training images, a bar."""
    for k, share in enumerate(model.share.tolist()):
        click.echo(f"cluster {k:3d} {share:6.1%} {'#' * round(60 * share)}")


# ---- predict ---------------------------------------------------------------------------------------------------

@main.command()
@click.argument("images", nargs=-1, required=True)
@model_option
@click.option("-o", "--output", default="stego-out", show_default=True,
              help="A .png file for one image, a folder for several.")
@click.option("--overlay", is_flag=True, help=f"Also write the picture with its segments over it (*{OVERLAY_SUFFIX}).")
@click.option("--crf/--no-crf", default=True, show_default=True, help="Sharpen the segments with a dense CRF.")
@click.option("--crf-size", default=0.5, show_default=True, help="Megapixels at which the CRF works on larger photos.")
@click.option("--resolution", default=320, show_default=True, help="Pixels of the shorter side that the backbone sees.")
@click.option("--skip-existing", is_flag=True, help="Leave images alone whose mask is there already.")
@network_options
def predict(images, model, output, overlay, skip_existing, device, weights, **options):
    """Segment IMAGES with a fitted model: files, folders (their tree is mirrored) or "patterns/*.jpg".

    Masks are indexed PNG: cluster numbers from 0, 255 for none.

    \b
    Examples:
      stego predict img.jpg -o mask.png
      stego predict folder/ more/*.png -o out/ --overlay
    """
    with clear_errors():
        from stego import Stego, find_images
        jobs = plan_outputs(find_images(images), Path(output))
        if skip_existing:
            jobs = [(source, target) for source, target in jobs if not target.exists()]
        fitted = Stego.load(model, device=device, weights=weights)
        fitted.backbone  # noqa: B018 - a wrong backbone is one error, not one for every image
    began, failed, progress = time.monotonic(), 0, Progress()
    for done, (source, target) in enumerate(jobs, 1):
        try:
            predict_one(fitted, source, target, overlay, options)
        except (ValueError, OSError) as error:
            failed += 1
            named = str(source) in str(error)
            click.echo(f"stego: {error}" if named else f"stego: {source}: {error}", err=True)
        progress("predict", done, len(jobs))
    click.echo(f"{len(jobs) - failed} of {len(jobs)} images, {time.monotonic() - began:.0f} s: masks in {output}")
    sys.exit(1 if failed else 0)


def plan_outputs(found, output: Path) -> list[tuple[Path, Path]]:
    """Where each image's mask goes; refuses to overwrite an input or to write two masks to one place."""
    if output.suffix and not output.is_dir():
        if output.suffix.lower() != ".png":
            raise click.UsageError(f"The output {output} is not a .png file; masks are indexed PNG.")
        if len(found) > 1:
            raise click.UsageError(f"{len(found)} images cannot go into the one file {output}; name a folder with -o.")
        jobs = [(found[0][0], output)]
    else:
        jobs = [(source, output / place.with_suffix(".png")) for source, place in found]
    sources, targets = {source.resolve() for source, _ in jobs}, {}
    for source, target in jobs:
        if target.resolve() in sources:
            raise click.UsageError(f"The mask of {source} would overwrite the image {target}; choose another -o.")
        if target in targets:
            raise click.UsageError(f"{targets[target]} and {source} would both be written to {target}; "
                                   "predict them into different folders.")
        targets[target] = source
    return jobs


def predict_one(model, source: Path, target: Path, overlay: bool, options: dict):
    from stego_images import mask_image, overlay as blend, read_image, write_image
    image = read_image(source)
    mask = model.predict(image, **options)
    if overlay:  # first, so that a mask on disk says that the image is done
        write_image(blend(image, mask, model.palette), target.with_suffix(OVERLAY_SUFFIX))
    write_image(mask_image(mask, model.palette), target)


# ---- eval ------------------------------------------------------------------------------------------------------

@main.command("eval")
@dataset_options
@click.option("--images", type=click.Path(), help="In place of --dataset: a folder of your own images,")
@click.option("--labels", type=click.Path(), help="and one of their label maps, paired by stem; 255 is ignored.")
@click.option("--names", type=click.Path(), help="Text file with the names of your classes, one a line.")
@click.option("--train-images", type=click.Path(), help="Your train images, for the linear probe and the baseline,")
@click.option("--train-labels", type=click.Path(), help="and their label maps.")
@model_option
@click.option("--crf/--no-crf", default=True, show_default=True, help="Score with the dense CRF as well (slow).")
@click.option("--diagnostics", is_flag=True, help="Also what correspondences know about labels (Sec. 3.1, A.6).")
@click.option("--json", "json_file", type=click.Path(), help="Write everything that was measured to this file.")
@click.option("--figures", type=click.Path(), help="Write the confusion matrix and example strips into this folder.")
@click.option("--seed", default=0, show_default=True, help="For the probes and the baseline's k-means.")
@network_options
def evaluate(model, crf, diagnostics, json_file, figures, seed, device, weights, **data):
    """Score a model against ground truth by the published protocol, beside its backbone alone.

    \b
    Examples:
      stego eval --dataset cityscapes --root ~/data/cityscapes
      stego eval --images val/ --labels val_labels/ --names classes.txt --json scores.json --figures figures/
    """
    with clear_errors():
        labelled, train = labelled_sets(**data)
        import stego_protocol
        from stego import Stego
        fitted, progress = Stego.load(model, device=device, weights=weights), Progress()
        report = stego_protocol.evaluate(fitted, labelled, train=train, crf=crf, seed=seed, progress=progress)
        if diagnostics:
            report["diagnostics"] = stego_protocol.diagnose(fitted, labelled, seed=seed, progress=progress)
        click.echo(stego_protocol.table(report))
        if json_file:
            stego_protocol.write_json(report, json_file)
        if figures:
            stego_protocol.write_figures(report, fitted, labelled, figures)


def labelled_sets(dataset, root, images, labels, names, train_images, train_labels):
    """The set to score on, and the train split or None."""
    if bool(dataset) == bool(images):
        raise click.UsageError("Give a --dataset, or your own --images and --labels.")
    if bool(images) != bool(labels) or bool(train_images) != bool(train_labels):
        raise click.UsageError("Images and labels belong together: give both folders.")
    from stego_protocol import folder_set, labelled_set
    if dataset:
        root = dataset_root(dataset, root)
        return labelled_set(dataset, root, "val"), labelled_set(dataset, root, "train")
    labelled = folder_set(images, labels, names=names)
    if not train_images:
        return labelled, None
    train = folder_set(train_images, train_labels, names=names)
    classes = max(labelled.classes, train.classes, key=len)  # without names, a class may occur in one of them only
    for each in (labelled, train):
        each.classes, each.lookup = classes, max(labelled, train, key=lambda found: len(found.classes)).lookup
    return labelled, train


if __name__ == "__main__":
    main()
