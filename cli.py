"""The command line: parses, calls the library, prints. Results go to stdout, all else to stderr.

Exit codes: 0 all done; 1 something failed while working, the rest is written; 2 an argument or an input
cannot be used, found before any work; 130 interrupted with Ctrl-C. torch is imported inside the commands, so
that --help and --version answer at once.
"""

import ctypes
import functools
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import click

from stego_parts.config import PRESETS, fit_config, parse_settings

# Known here without importing torch: datasets.LAYOUTS, outputs.SUFFIXES, config.NOTICE
DATASET_NAMES = ("cityscapes", "cocostuff27", "potsdam3")
WRITTEN = dict(mask="masks", tif="masks", overlay="overlays", cutout="cut-outs", npz="probabilities")
WRITTEN |= dict(json="shares", csv="shares", coco="segments", labelme="outlines")
NOTICE = logging.INFO + 5  # level of messages that are said unless --quiet
MODEL_SUFFIXES = (".pt", ".pth", ".ckpt")
OUTPUTS = "stego-out"  # folder of what predict writes, which fit leaves out
FEATURES = "stego-features"  # folder, beside the model, of features that are kept for other fits
REFRESH = 0.2  # seconds between two updates of the progress line

PATH, POSITIVE, WHOLE = click.Path(path_type=Path), click.FloatRange(0, min_open=True), click.IntRange(0)
option = functools.partial(click.option, show_default=True)
log = logging.getLogger("stego")


# ---- what is said, and the exit codes ----------------------------------------------------------------------


class Progress:
    """progress(stage, done, total) as one line on stderr with the time left; silent where it is no terminal.

    stage: None before the work begins; go_on: what to do after an interruption.
    """

    def __init__(self):
        self.stage, self.done, self.total, self.began, self.shown = None, 0, 0, 0.0, 0.0
        self.started, self.go_on = time.monotonic(), "the same command starts afresh"

    def __call__(self, stage: str, done: int, total: int):
        now = time.monotonic()
        if stage != self.stage:
            self.began, self.shown = now, 0.0
        self.stage, self.done, self.total = stage, done, total
        if not sys.stderr.isatty() or is_quiet() or (now - self.shown < REFRESH and done < total):
            return
        self.shown = now
        left = (now - self.began) * (total - done) / max(done, 1)
        clock = f"{int(left // 60)}:{int(left % 60):02d} left " if done else ""
        click.echo(f"\r{stage:>9} {done}/{total}  {clock:10}" + "\n" * (done == total), err=True, nl=False)

    def summary(self, what: str, outputs: str = "", *, err: bool = False):
        """The last line of a command: what was done, how long it took, where the outputs are."""
        if not is_quiet():
            seconds = f"{time.monotonic() - self.started:.0f} s"
            click.echo(f"{what}, {seconds}" + (f": {outputs}" if outputs else ""), err=err)


class Commands(click.Group):
    """The commands; whatever one ends with becomes one sentence and an exit code, by one rule."""

    def invoke(self, context):
        progress = context.obj = Progress()
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            place = f" at {progress.stage} {progress.done}/{progress.total}" if progress.stage else ""
            click.echo(f"\nInterrupted{place}; {progress.go_on}.", err=True)
            context.exit(130)
        except BrokenPipeError:  # the reader has seen enough: click ends in silence
            raise
        except (ValueError, OSError) as error:
            failure = click.ClickException(sentence(error))
            failure.exit_code = 1 if progress.stage else 2
            raise failure from error


def sentence(error: Exception) -> str:
    """An error for people: the system's without its number."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    return f"Cannot use {error.filename or 'an output'} ({error.strerror.lower()})."


class StderrHandler(logging.Handler):
    """The library's messages as plain lines on stderr."""

    def emit(self, record):
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: "
        click.echo(f"{prefix}{record.getMessage()}", err=True)


def is_quiet() -> bool:
    return not log.isEnabledFor(logging.WARNING)


def print_model(model, lines):
    """Lines about a model, and with -v its configuration."""
    for line in lines:
        click.echo(line)
    for key, value in vars(model.config).items():
        log.info("%s: %s", key, value)


# ---- options that commands share ---------------------------------------------------------------------------


def verbosity_options(command):
    """-q and -v: how much is said."""

    def set_level(context, parameter, given):
        if given and log.level in (logging.ERROR, logging.INFO):
            raise click.UsageError("-q and -v are opposites; give one of them.")
        if given:
            log.setLevel(logging.ERROR if parameter.name == "quiet" else logging.INFO)

    flag = functools.partial(option, is_flag=True, expose_value=False, callback=set_level)
    command = flag("-v", "--verbose", help="Also say what was chosen, and each file written.")(command)
    return flag("-q", "--quiet", help="Errors only.")(command)


def limit_pixels(context, parameter, megapixels):
    """Pillow refuses to decode pictures above twice its limit, which may be bombs: move that limit."""
    if megapixels:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = round(megapixels * 1e6 / 2)


def network_options(command):
    """Options of everything that runs the backbone; the hidden one is named by the error that it avoids."""
    limit = dict(type=POSITIVE, callback=limit_pixels, expose_value=False, hidden=True)
    device = "cpu, cuda, cuda:1, mps; auto takes CUDA where there is one."
    command = option("--max-megapixels", help="Refuse larger images.  [default: 179]", **limit)(command)
    command = option("--weights", type=PATH, help="The backbone's, as a file.  [default: cached]")(command)
    return option("--device", default="auto", help=device)(command)


model_option = option("-m", "--model", default="stego.pt", type=PATH, help="The fitted model.")
model_or_first = option("-m", "--model", type=PATH, help="If not named first.  [default: stego.pt]")


def model_and_rest(model, arguments: tuple, *, first: bool) -> tuple:
    """The model, named with -m or as the first argument, and the other arguments."""
    if not first:
        return model, arguments
    if model:
        raise click.UsageError(f"Two models, {model} and {arguments[0]}; name one.")
    return Path(arguments[0]), arguments[1:]


def dataset_options(command):
    root = "Its folder.  [default: $STEGO_DATA/DATASET, or ./data/DATASET]"
    command = option("--root", type=PATH, help=root)(command)
    return option("--dataset", type=click.Choice(DATASET_NAMES), help="A published dataset.")(command)


def made_in(*folders: Path) -> list[Path]:
    """Outputs in folders of images, which are none to work on; a sheet without a note is somebody's own."""
    from cli_parts.outputs import read_note

    sheets = [path for folder in folders for path in folder.glob("*-fit.png") if read_note(path)]
    return [*sheets, *(folder / OUTPUTS for folder in folders)]


def class_counts(text: str) -> list:
    """Numbers of clusters, or auto: "12,8" -> [8, 12]."""
    counts = text.split(",")
    if text != "auto" and not all(each.isdecimal() and 1 <= int(each) <= 255 for each in counts):
        raise click.BadParameter(f"got {text}; give a number from 1 to 255, or auto, or several: 8,12,20.")
    return [text] if text == "auto" else sorted(set(map(int, counts)))


def split_names(context, parameter, texts) -> list[str]:
    """("road,sky", "7") -> ["road", "sky", "7"]."""
    names = [name.strip() for text in texts for name in text.split(",")]
    if "" in names:
        raise click.BadParameter("got an empty name; give names or numbers of clusters, like road,7.")
    return names


def point(text: str) -> tuple[int, ...]:
    """ "120,80" -> (120, 80)."""
    pair = text.split(",")
    if len(pair) != 2 or not all(map(str.isdecimal, pair)):
        raise click.BadParameter(f"got {text}; a point is two whole numbers, x and y, like 120,80.")
    return tuple(map(int, pair))


def keep_memory():
    """Let glibc reuse the memory of short-lived tensors, where it gives each back and asks anew.

    dino_vits8 at 320 x 424 on a CPU core: 4.1 s in place of 5.2 s, for 0.1 to 0.3 GB more resident memory.
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    with suppress(OSError, AttributeError):  # another system, another allocator
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 512 << 20), (M_TOP_PAD, 64 << 20)):
            ctypes.CDLL("libc.so.6").mallopt(parameter, value)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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
    log.setLevel(NOTICE)
    if os.environ.get("NO_COLOR"):
        click.get_current_context().color = False


# ---- fit ---------------------------------------------------------------------------------------------------


@main.command(short_help="Find what recurs in images.")
@click.argument("images", nargs=-1)
@option("-k", "--classes", type=class_counts, metavar="K", help="Clusters: 12, auto, 8,12,20.  [default: 27]")
@option("-o", "--output", default="stego.pt", type=PATH, help="The model.")
@dataset_options
@option("--preset", type=click.Choice(list(PRESETS)), help="Hyper-parameters.  [default: default]")
@option("--backbone", help="dino_vits8, dinov2_vits14, ..., tiny; or auto.  [default: the preset's]")
@option("--steps", type=click.IntRange(min=1), help="Training steps.  [default: the preset's]")
@option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any setting: --set b_rand=0.4.")
@option("--seed", type=int, help="Same seed, images and machine: same model.  [default: 0]")
@option("--match", type=PATH, metavar="MODEL", help="Keep its numbers, names, colours.  [default: none]")
@option("--from", "from_model", type=PATH, metavar="MODEL", help="Cluster it anew.  [default: none, train]")
@option("--overwrite", is_flag=True, hidden=True, help="Replace a model whose clusters have names.")
@option("--report", type=PATH, help="A folder for charts of the fit.  [default: none]")
@option("--resume", is_flag=True, help="Go on with an interrupted fit of the same images and options.")
@option("--keep-features", is_flag=True, help=f"Keep the features in {FEATURES}/ for other fits.")
@network_options
@verbosity_options
@click.pass_obj
def fit(progress, images, dataset, root, classes, output, settings, from_model, overwrite, report, **options):
    """Find the things that recur in IMAGES: files, folders (searched recursively) or "patterns/*.jpg".
    With --dataset in their place: a published train split, with its number of classes, preset and backbone. With
    --from MODEL: what it has learned, clustered anew without training, on its images unless you name some.

    \b
    Examples:
      stego fit ./images
      stego fit a/ b/ "c/*.jpg" -k 12 -o model.pt --backbone dino_vits8 --steps 5000 --set b_rand=0.4
      stego fit --dataset cityscapes --root ~/data/cityscapes
      stego fit --from stego.pt -k 8,12,20 -o other.pt
      stego fit mosaic.tif -k 8 --set tile=640
    """
    if from_model and (dataset or report or options["resume"]):
        raise click.UsageError("With --from nothing is trained; leave --dataset, --report and --resume out.")
    if bool(images) == bool(dataset) and not from_model:
        raise click.UsageError("Give images to fit on, or a --dataset, one of the two.")
    from cli_parts import datasets, outputs
    from stego import Stego
    from stego_parts import checkpoint
    from stego_parts.files import find_images

    options |= parse_settings(settings)
    if dataset:
        train = datasets.labelled_set(dataset, datasets.dataset_root(dataset, root), "train")
        images, classes = [image for image, _ in train.pairs], classes or [len(train.classes)]
        options["preset"] = options["preset"] or datasets.PRESET_OF[dataset]
        config = fit_config(options["preset"], backbone=options["backbone"])
        log.log(NOTICE, datasets.published_line(dataset, preset=config.preset, backbone=config.backbone))
    base = from_model and Stego.load(from_model, device=options["device"], weights=options["weights"])
    if base and not (images := images or base.config.images):
        raise ValueError(f"{from_model} does not name the images of its fit; give some beside --from.")
    options["exclude"] = [*made_in(output.parent, (from_model or output).parent), *filter(None, [report])]
    paths = [path for path, _ in find_images(images, exclude=options["exclude"])]
    inputs = [*paths, *filter(None, [options["weights"], from_model])]
    files, sheet = files_of_fit(output, classes), output.with_name(f"{output.stem}-fit.png")
    written = [*((file, ()) for file in files), (sheet, outputs.PICTURE)]
    outputs.check_outputs(written, inputs=inputs, folders=[report])
    outputs.check_replacing(files, options["match"], overwrite)
    kept = base and checkpoint.kept_features(from_model.with_name(FEATURES), paths, base)
    if models := fit_and_save(progress, images, files, output, kept, from_model=base, **options):
        write_pictures(progress, models, paths, sheet, report)


def files_of_fit(output: Path, counts: list | None) -> dict:
    """{file: number of clusters}: m.pt, or for several numbers m-8.pt, m-12.pt, ..."""
    if not counts or len(counts) == 1:
        return {output: counts and counts[0]}
    return {output.with_stem(f"{output.stem}-{count}"): count for count in counts}


def fit_and_save(progress, images, files, output: Path, kept, *, keep_features, **options) -> dict:
    """{file: model}, fitted alone or among torchrun's processes, of which only the first returns something.

    files: {file: number of clusters}, of which one model is trained, the others cluster its codes; kept: a folder of
    features to use.
    """
    from stego import Stego
    from stego_parts.checkpoint import end_fit
    from stego_parts.running import no_progress, process_group

    models, scratch = {}, output.with_name(f"{output.name}.scratch")
    if keep_features and not (options["resume"] and scratch.exists()):
        scratch = output.with_name(FEATURES)
    with process_group() as (rank, count):
        if options["resume"] and count > 1:
            raise click.UsageError("--resume is for one process; leave it out.")
        if count == 1:
            progress.go_on = f"the same command{'' if options['from_model'] else ' with --resume'} goes on"
        if rank:  # the first process says the rest
            log.addFilter(lambda record: record.msg.startswith("Skipped"))
        shared = {name: options[name] for name in ("device", "match", "exclude")}
        shared |= dict(progress=no_progress if rank else progress, checkpoint=kept or scratch)
        for file, classes in files.items():
            models[file] = Stego.fit(images, classes=classes, **options | shared)
            options = dict(from_model=models[file])
            if not rank:
                models[file].save(file)
    progress.go_on = f"the model is in {' '.join(map(str, files))} already"
    if not (rank or kept):
        end_fit(scratch, keep_features=keep_features)
    return {} if rank else models


def write_pictures(progress: Progress, models: dict, paths, sheet: Path, charts: Path | None):
    """The picture of a fit, its report, and what is said at its end; models: {file: model}."""
    from cli_parts import sheets as report
    from stego_parts.images import write_image

    fitted = [*models.values()]
    write_image(report.fit_sheet(fitted, progress=progress), sheet, note="contact sheet")
    if charts:
        report.write_report(fitted[0], charts)
    if (agreement := fitted[0].record.agreement) and not is_quiet():
        click.echo(report.agreement_line(agreement))
    if log.isEnabledFor(logging.INFO):
        for model in fitted:
            print_model(model, report.cluster_lines(model))
    written = f"model {' '.join(map(str, models))}, picture {sheet}" + (f", report {charts}" * bool(charts))
    progress.summary(f"{len(paths)} images, {fitted[0].config.backbone}", written)


# ---- predict -----------------------------------------------------------------------------------------------


@main.command(short_help="Segment images with a fitted model.")
@click.argument("images", nargs=-1, required=True)
@model_option
@option("-o", "--output", default=OUTPUTS, type=PATH, help="A file, a folder, or - for stdout.")
@option("--format", "kind", default="mask", type=click.Choice(list(WRITTEN)), help="What is written.")
@option("--overlay", is_flag=True, help="Beside each mask, the picture with its segments and a legend.")
@option("--only", multiple=True, callback=split_names, metavar="NAMES", help="Clusters to keep: road,7.")
@option("--min-area", default=0, type=WHOLE, help="Pixels of the smallest region in coco, labelme.")
@option("--crf/--no-crf", default=True, help="Sharpen the segments with a dense CRF.")
@option("--crf-size", default=0.5, type=POSITIVE, help="Megapixels that the CRF works on, of larger photos.")
@option("--resolution", default=320, help="Pixels of the shorter side that the backbone sees.")
@option("--tile", type=WHOLE, metavar="PIXELS", help="See larger images in parts of this side.")
@option("--smooth", is_flag=True, help="Images are frames of a video: keep clusters steady between them.")
@option("--skip-existing", is_flag=True, help="Leave images alone whose outputs are there and up to date.")
@option("--limit", type=click.IntRange(1), metavar="N", help="The first N images only.  [default: all]")
@option("--dry-run", is_flag=True, help="Only print what would be written.")
@network_options
@verbosity_options
@click.pass_obj
def predict(progress, images, model, output, kind, limit, dry_run, device, weights, **options):
    """Segment IMAGES: files, folders (their tree is mirrored), "patterns/*.jpg", or - for stdin.

    Masks are indexed PNG or TIFF: cluster numbers from 0, 255 for none.

    \b
    Examples:
      stego predict img.jpg -o mask.png
      stego predict folder/ "more/*.png" -o out/ --overlay
      stego predict img.jpg -o road.png --only road,3 --resolution 480
      stego predict mosaic.tif -o mask.tif --tile 1000
      stego predict folder/ -o coco.json --format coco --min-area 50
      stego predict folder/ -o shares.csv --format csv --limit 9
      stego predict folder/ --format labelme --dry-run
      stego predict frames/ -o out/ --format overlay --smooth
      stego predict img.jpg -o dog.png --format cutout --only dog
      cat img.jpg | stego predict - -o - > mask.png
    """
    from cli_parts import outputs
    from stego import Stego

    formats, piped = outputs.check_formats(kind, images, output, **options), str(output) == outputs.PIPE
    _, only, min_area, skip_existing = map(options.pop, ("overlay", "only", "min_area", "skip_existing"))
    jobs, document = outputs.plan_outputs(images, output, formats, model, limit, made_in(model.parent))
    fitted = Stego.load(model, device=device, weights=weights)
    keep = fitted.select(only) if only else None
    writer = outputs.Writer(fitted, kind, keep, min_area, options)
    todo = [job for job in jobs if not (skip_existing and writer.is_done(job))]
    skipped = f", {len(jobs) - len(todo)} skipped" if skip_existing else ""
    if dry_run:
        for path in [document] if document else [path for job in todo for path in job.targets.values()]:
            click.echo(path)
        return progress.summary(f"{len(todo)} images{skipped}", "nothing was written", err=True)
    done = segment_all(progress, writer, todo, document)
    what = f"{' and '.join(map(WRITTEN.get, formats))} in {'stdout' if piped else document or output}"
    progress.summary(f"{done} of {len(todo)} images{skipped}", what, err=piped)
    sys.exit(0 if done == len(todo) else 1)


def segment_all(progress: Progress, writer, jobs, document) -> int:
    """Segment images and write their outputs; says what went wrong, and returns how many went well."""
    entries = []
    if not (document or writer.options["smooth"]):
        progress.go_on = "the same command with --skip-existing goes on"
    for done, (job, entry) in enumerate(writer.results(jobs, progress), 1):
        if isinstance(entry, Exception):
            who, what = str(job.source) if isinstance(job.source, Path) else "<stdin>", sentence(entry)
            log.error("%s", what if who in what else f"{who}: {what}")
        else:
            entries.append(entry)
        progress("predict", done, len(jobs))
    if document:
        writer.write_document(entries, document)
    return len(entries)


# ---- name --------------------------------------------------------------------------------------------------


@main.command(short_help="Give clusters of a model names.")
@click.argument("names", nargs=-1, required=True, metavar="[MODEL] NUMBER=NAME...")
@model_or_first
@verbosity_options
def name(names, model):
    """Give clusters of a model names, kept in the model; `NUMBER=` takes one away.

    Clusters with one name are one: one colour, one entry in legends, JSON and COCO categories, and in masks
    the lowest of their numbers. --only understands names.

    \b
    Example:
      stego name 3=road 5=sky 8=road
    """
    model, names = model_and_rest(model, names, first="=" not in names[0])
    model, pairs = model or Path("stego.pt"), [pair.partition("=") for pair in names]
    wrong = [number for number, equals, _ in pairs if not (number.isdecimal() and equals)]
    if wrong or not pairs:
        raise click.UsageError(f"Got {(*wrong, 'no names')[0]!r}; name clusters by number, like 3=road.")
    from cli_parts.sheets import cluster_lines
    from stego import Stego

    fitted = Stego.load(model, device="cpu")
    before = fitted.names.copy()
    fitted.rename({int(number): text.strip() for number, _, text in pairs})
    fitted.save(model)
    changed = {k for k, text in enumerate(fitted.names) if text != before[k]}
    for line in cluster_lines(fitted, changed) if not is_quiet() else ():
        click.echo(line)


# ---- eval --------------------------------------------------------------------------------------------------


@main.command("eval", short_help="Score a model against ground truth.")
@dataset_options
@option("--images", type=PATH, help="In place of --dataset: a folder of your own images,")
@option("--labels", type=PATH, help="and one of their label maps, paired by stem; 255 is ignored.")
@option("--names", type=PATH, help="Text file, the name of a class a line.  [default: class 0, ...]")
@option("--train-images", type=PATH, help="Train images, for the baseline,  [default: those of the fit]")
@option("--train-labels", type=PATH, help="and their label maps, for the linear probe.  [default: none]")
@model_option
@option("--crf/--no-crf", default=True, help="Score with the dense CRF as well (slow).")
@option("--json", "json_file", type=PATH, help="Write all that was measured here.  [default: none]")
@option("--figures", type=PATH, help="Folder for confusion matrix and examples.  [default: none]")
@option("--seed", default=0, help="For the probes and the baseline's k-means.")
@network_options
@verbosity_options
@click.pass_obj
def evaluate(progress, model, crf, json_file, figures, seed, device, weights, **data):
    """Score a model against ground truth by the published protocol, beside its backbone alone.

    \b
    Examples:
      stego eval --dataset cityscapes --root ~/data/cityscapes
      stego eval --images val/ --labels val_labels/ --names classes.txt --json scores.json --figures figures/
    """
    from cli_parts import datasets, outputs
    from cli_parts import evaluation as protocol
    from cli_parts.sheets import write_figures
    from stego import Stego

    labelled, train = datasets.sets_to_score(**data)
    pairs = [pair for each in (labelled, train) if each for pair in each.pairs]
    inputs = [model, *(path for pair in pairs for path in pair if path)]
    outputs.check_outputs([(json_file, outputs.JSON)], inputs=inputs, folders=[figures])
    fitted = Stego.load(model, device=device, weights=weights)
    report = protocol.evaluate(fitted, labelled, train=train, crf=crf, seed=seed, progress=progress)
    click.echo(protocol.table(report))
    if json_file:
        protocol.write_json(report, json_file)
    if figures:
        write_figures(report, fitted, labelled, figures)
    progress.summary(f"{report['images']} images", " and ".join(map(str, filter(None, (json_file, figures)))))


# ---- show --------------------------------------------------------------------------------------------------


@main.command(short_help="Say and show what is in a model, or what corresponds.")
@click.argument("things", nargs=-1, metavar="[MODEL] [IMAGES]...")
@model_or_first
@option("--sheet", type=PATH, help="Picture of the regions that fit each cluster best.  [default: none]")
@option("--at", multiple=True, metavar="X,Y", type=point, help="Show what corresponds with a point.")
@option("-o", "--output", default="correspondences.png", type=PATH, help="With --at: the picture.")
@option("--backbone", help="With --at and no model: whose features to show.  [default: auto]")
@option("--export", type=PATH, metavar="FILE", help="The model with its backbone as ONNX.  [default: none]")
@network_options
@verbosity_options
@click.pass_obj
def show(progress, things, model, sheet, at, output, backbone, export, device, weights):
    """Say what is in a model, and show on IMAGES what each cluster is, so that you can name it.

    With --at X,Y, in pixels from the upper left corner and repeatable: what corresponds with a point of the
    first image, as a coloured picture, there and in the others (the nearest four, if more or a folder); of
    backbone features, with a model of codes too. Others default to the images that the model was fitted on.

    \b
    Examples:
      stego show stego.pt
      stego show stego.pt images/ --sheet sheet.png
      stego show img.jpg images/ --at 120,80 --at 300,40 -m stego.pt -o corr.png
      stego show stego.pt --export model.onnx
    """
    alone = len(things) == 1 and not (sheet or at or export)
    first = alone or bool(things) and Path(things[0]).suffix in MODEL_SUFFIXES
    model, images = model_and_rest(model, things, first=first)
    if export:
        if at or sheet or backbone or len(images) > 1:
            raise click.UsageError("With --export give a model, and at most one image: its shape is meant.")
        return export_model(progress, model or Path("stego.pt"), images, export, device, weights)
    if at:
        if not images or sheet or (model and backbone):
            raise click.UsageError("With --at give an image, -m or --backbone: `stego show a.jpg --at 9,9`.")
        return show_points(progress, images, at, model, output, backbone or "auto", device, weights)
    if bool(images) != bool(sheet) or backbone:
        raise click.UsageError("Give images and a sheet, or neither: `stego show images/ --sheet sheet.png`.")
    from cli_parts import outputs
    from cli_parts import sheets as report
    from stego import Stego
    from stego_parts.files import find_images
    from stego_parts.images import write_image

    model = model or Path("stego.pt")
    paths = [path for path, _ in find_images(images, exclude=made_in(model.parent))] if images else []
    outputs.check_outputs([(sheet, outputs.PICTURE)], inputs=[*paths, model])
    fitted = Stego.load(model, device=device, weights=weights)
    print_model(fitted, [*report.description(fitted), *report.cluster_lines(fitted)])
    if sheet:
        write_image(report.cluster_sheet(fitted, paths, progress=progress), sheet)
        progress.summary(f"{len(paths)} images", f"sheet {sheet}")


def export_model(progress: Progress, model: Path, images, output: Path, device: str, weights):
    """Write a model as ONNX, for images of the shape of the one given, or else square ones."""
    from cli_parts.export import write_onnx
    from cli_parts.outputs import check_outputs
    from stego import Stego

    check_outputs([(output, (".onnx",))], inputs=[model, *images])
    fitted = Stego.load(model, device=device, weights=weights)
    width, height = write_onnx(fitted, output, *images, progress=progress)
    progress.summary(f"{fitted.config.backbone}, images of {width} x {height} pixels", f"model {output}")


def show_points(progress: Progress, images, at, model, output: Path, backbone: str, device: str, weights):
    """Write the picture of what corresponds with points of an image."""
    from cli_parts import evaluation as protocol
    from cli_parts import outputs
    from cli_parts import sheets as report
    from stego import Stego, pick_device
    from stego_parts.backbones import load_backbone
    from stego_parts.files import find_images
    from stego_parts.images import write_image

    image, others = Path(images[0]), images[1:] and [path for path, _ in find_images(images[1:])]
    if not image.is_file():
        raise ValueError(f"{image} is not an image file; --at is about points of one, name it first.")
    outputs.check_outputs([(output, outputs.PICTURE)], inputs=[image, *others])
    fitted = Stego.load(model, device=device, weights=weights) if model else None
    place = pick_device(device)
    network = fitted.backbone if fitted else load_backbone(backbone, weights=weights, device=place)
    others = [path for path in others or protocol.images_of(fitted) if not path.samefile(image)]
    draw = functools.partial(report.correspondence_sheet, others=others, device=place, progress=progress)
    write_image(draw(network, image, at, model=fitted), output)
    progress.summary(f"{len(at)} points, {len(others)} other images to choose from", f"picture {output}")


# ---- demo --------------------------------------------------------------------------------------------------


@main.command(short_help="Try everything on drawn scenes, without data and network.")
@option("-o", "--output", default="stego-demo", type=PATH, help="The folder it makes.")
@option("--seed", default=0, help="Other seeds draw other scenes.")
@verbosity_options
@click.pass_obj
def demo(progress, output, seed):
    """Try everything on drawn scenes, without data and network: fit, predict and score. About three minutes.

    Leaves images, labels, the model, masks, overlays, sheets and scores in a folder.

    \b
    Example:
      stego demo -o /tmp/demo --seed 7
    """
    from cli_parts.demo import SCENES, check_demo_folder, run_demo

    check_demo_folder(output)
    click.echo(run_demo(output, seed=seed, progress=progress))
    progress.summary(f"{sum(SCENES.values())} drawn scenes", f"everything in {output}")


if __name__ == "__main__":
    main(prog_name="stego")
