"""The command line: parses, calls the library, prints. What all commands share is in cli_parts/console.py."""

import io
import os
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

if Path(sys.argv[0]).stem in ("stego", "cli"):  # as a program, not imported by one
    # Ctrl-C while modules load ends it in silence, not with a traceback; `Commands.invoke` sets Python's handler again
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import click

from cli_parts.console import (
    FEATURES,
    MODEL,
    OUTPUTS,
    PATH,
    POSITIVE,
    WHOLE,
    Commands,
    Progress,
    StderrHandler,
    cluster_counts,
    dataset_options,
    error_message,
    is_quiet,
    keep_memory,
    log,
    made_in,
    model_and_rest,
    model_option,
    model_or_first,
    network_options,
    option,
    point,
    print_model,
    split_names,
    verbosity_options,
    versions,
)
from cli_parts.formats import FORMATS, PICTURE
from stego_parts.config import NOTICE, PRESETS, parse_settings

MODEL_SUFFIXES = (".pt", ".pth", ".ckpt")
STDOUT = "-"  # as an output


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=Commands, context_settings=SETTINGS, invoke_without_command=True, no_args_is_help=True)
@click.option("--version", is_flag=True, help="Say the version; with -v also of all that it uses.")
@click.option("-v", "verbose", is_flag=True, hidden=True)
def main(version: bool, verbose: bool) -> None:
    """Segment images without labels: find what recurs in a folder, then find it in any image.

    \b
    Examples:
      stego demo                         try everything on drawn scenes
      stego fit ./images                 find what recurs in them: ./stego.pt
      stego predict img.jpg -o mask.png  segment with ./stego.pt
    """
    if version:
        click.echo(f"stego, version {metadata.version('stego')}")
        if verbose:
            click.echo(versions())
        click.get_current_context().exit()
    keep_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are no text, as they are
    log.handlers = [StderrHandler()]
    log.propagate = False
    log.setLevel(NOTICE)
    if os.environ.get("NO_COLOR"):
        click.get_current_context().color = False


# ---- fit ---------------------------------------------------------------------------------------------------


@main.command(short_help="Find what recurs in images.")
@click.argument("images", nargs=-1)
@option("-k", "--clusters", type=cluster_counts, metavar="K", help="How many: 12, or 8,12,20.  [default: 27]")
@option("--classes", "clusters", type=cluster_counts, hidden=True, help="Its older name.  [default: 27]")
@option("-o", "--output", default=MODEL, type=PATH, help="The model.")
@dataset_options
@option("--preset", type=click.Choice(list(PRESETS)), help="Hyper-parameters.  [default: default]")
@option("--backbone", help="dino_vits8, dinov2_vits14, ..., tiny; or auto.  [default: the preset's]")
@option("--steps", type=click.IntRange(min=1), help="Training steps.  [default: the preset's]")
@option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any setting: --set b_rand=0.4.")
@option("--seed", type=int, help="Same seed, images and machine: same model.  [default: 0]")
@option("--match", type=PATH, metavar="MODEL", help="Keep its numbers, names, colours.  [default: none]")
@option("--from", "from_model", type=PATH, metavar="MODEL", help="Cluster it anew.  [default: none, train]")
@option("--overwrite", is_flag=True, hidden=True, help="Replace a model whose clusters have names.")
@option("--report", type=PATH, help="A folder for a page about the fit.  [default: none]")
@option("--keep-features", is_flag=True, help=f"Keep the features in {FEATURES}/ for other fits.")
@network_options
@verbosity_options
@click.pass_obj
def fit(
    progress: Progress,
    images: tuple,
    clusters: list[int] | None,
    output: Path,
    dataset: str | None,
    root: Path | None,
    settings: tuple,
    from_model: Path | None,
    overwrite: bool,
    report: Path | None,
    keep_features: bool,
    **options: Any,
) -> None:
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
    if from_model and (dataset or report):
        raise click.UsageError("With --from nothing is trained; leave --dataset and --report out.")
    if bool(images) == bool(dataset) and not from_model:
        raise click.UsageError("Give images to fit on, or a --dataset, one of the two.")
    from cli_parts import fitting

    options |= parse_settings(settings)
    if dataset:
        images, count = fitting.published_train(dataset, root, options)
        clusters = clusters or [count]
    plan = fitting.FitPlan(output, clusters, report, keep_features=keep_features, overwrite=overwrite)
    if from_model:
        models = fitting.recluster(progress, images, plan, from_model, options)
    else:
        models = fitting.train(progress, images, plan, options)
    if models:
        fitting.write_pictures(progress, models, plan)


# ---- predict -----------------------------------------------------------------------------------------------


@main.command(short_help="Segment images with a fitted model.")
@click.argument("images", nargs=-1, required=True)
@model_option
@option("-o", "--output", default=OUTPUTS, type=click.Path(), help="A file, a folder/, or - for stdout.")
@option("--format", "kind", default="mask", type=click.Choice(list(FORMATS)), help="What is written.")
@option("--overlay", is_flag=True, help="Beside each mask, the picture with its segments and a legend.")
@option("--only", multiple=True, callback=split_names, metavar="NAMES", help="Clusters to keep: road,7.")
@option("--min-area", default=0, type=WHOLE, help="Pixels of the smallest region in coco.")
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
def predict(
    progress: Progress,
    images: tuple,
    model: Path,
    output: str,
    kind: str,
    limit: int | None,
    dry_run: bool,
    device: str,
    weights: Path | None,
    **options: Any,
) -> None:
    """Segment IMAGES: files, folders (their tree is mirrored), "patterns/*.jpg", @LIST, or - for stdin.

    Masks are indexed PNG or TIFF: cluster numbers from 0, 255 for none.

    \b
    Examples:
      stego predict img.jpg -o mask.png
      stego predict folder/ "more/*.png" -o out/ --overlay
      stego predict mosaic.tif -o mask.tif --tile 1000
      stego predict folder/ -o coco.json --format coco --min-area 50
      stego predict @list.txt --dry-run
      stego predict frames/ -o out/ --format overlay --smooth
      stego predict img.jpg -o dog.png --format cutout --only dog
      cat img.jpg | stego predict - -o - > mask.png
    """
    from cli_parts import outputs
    from stego import Stego
    from stego_parts.files import counted

    formats = outputs.check_formats(kind, images, output, **options)
    del options["overlay"]
    skip_existing = options.pop("skip_existing")
    jobs, document = outputs.plan_outputs(images, output, formats, model, limit, frames=options["smooth"])
    fitted = Stego.load(model, device=device, weights=weights)
    keep = fitted.select(options.pop("only")) or None
    writer = outputs.Writer(fitted, kind, keep, options.pop("min_area"), options)
    todo = [job for job in jobs if not (skip_existing and writer.is_done(job))]
    skipped = f", {len(jobs) - len(todo)} skipped" if skip_existing else ""
    if dry_run:
        for path in [document] if document else [path for job in todo for path in job.targets.values()]:
            click.echo(path)
        progress.summary(counted(len(todo), "image") + skipped, "nothing was written", err=True)
        return
    done = segment_all(progress, writer, todo, document)
    piped = output == STDOUT
    what = f"{' and '.join(FORMATS[each].plural for each in formats)} in {'stdout' if piped else document or output}"
    progress.summary(f"{done} of {counted(len(todo), 'image')}{skipped}", what, err=piped)
    sys.exit(0 if done == len(todo) else 1)


def segment_all(progress: Progress, writer: Any, jobs: list, document: Path | None) -> int:
    """Segment images and write their outputs; says what went wrong, and returns how many went well."""
    entries = []
    if not (document or writer.options["smooth"]):
        progress.go_on = "the same command with --skip-existing goes on"
    for done, (job, entry) in enumerate(writer.results(jobs, progress), 1):
        if isinstance(entry, Exception):
            name = str(job.source) if isinstance(job.source, Path) else "<stdin>"
            problem = error_message(entry)
            log.error("%s", problem if name in problem else f"{name}: {problem}")
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
def name(names: tuple, model: Path | None) -> None:
    """Give clusters of a model names, kept in the model; `NUMBER=` takes one away.

    Clusters with one name are one: one colour, one entry in legends, JSON and COCO categories, and in masks
    the lowest of their numbers. --only understands names.

    \b
    Example:
      stego name 3=road 5=sky 8=road
    """
    named, texts = model_and_rest(model, names, first=len(names) > 1 and "=" not in names[0])
    given = {}
    for text in texts:
        number, equals, label = text.partition("=")
        if not (number.isdecimal() and equals):
            raise click.UsageError(f"Got {text!r}; name clusters by number, like 3=road.")
        given[int(number)] = label.strip()
    from cli_parts.sheets import cluster_lines
    from stego import Stego

    path = named or MODEL
    fitted = Stego.load(path, device="cpu")
    before = fitted.names.copy()
    fitted.rename(given)
    fitted.save(path)
    changed = {k for k, label in enumerate(fitted.names) if label != before[k]}
    if not is_quiet():
        for line in cluster_lines(fitted, changed):
            click.echo(line)


# ---- eval --------------------------------------------------------------------------------------------------


@main.command("eval", short_help="Score a model against ground truth.")
@dataset_options
@option("--images", type=PATH, help="In place of --dataset: a folder of your own images,")
@option("--labels", type=PATH, help="and one of their label maps, paired by path or stem.")
@option("--names", type=PATH, help="Text file, the name of a class a line.  [default: class 0, ...]")
@option("--ignore", type=click.IntRange(0, 255), help="The label of pixels of no class.  [default: 255]")
@option("--train-images", type=PATH, help="Train images, for the baseline,  [default: those of the fit]")
@option("--train-labels", type=PATH, help="and their label maps, for the linear probe.  [default: none]")
@model_option
@option("--crf/--no-crf", default=True, help="Score with the dense CRF as well (slow).")
@option("-o", "--output", type=PATH, help="Folder for scores.json and figures.  [default: none]")
@network_options
@verbosity_options
@click.pass_obj
def evaluate(
    progress: Progress,
    model: Path,
    crf: bool,
    output: Path | None,
    device: str,
    weights: Path | None,
    **data: Any,
) -> None:
    """Score a model against ground truth by the published protocol, beside its backbone alone.

    \b
    Examples:
      stego eval --dataset cityscapes --root ~/data/cityscapes
      stego eval --images val/ --labels val_labels/ --names classes.txt -o scores/
    """
    from cli_parts import evaluation, labels, outputs
    from cli_parts.scores import format_scores, write_json
    from cli_parts.sheets import write_figures
    from stego import Stego
    from stego_parts.files import counted

    labelled, train = labels.sets_to_score(**data)
    inputs = [model, *labelled.paths, *(train.paths if train else [])]
    outputs.check_outputs([], inputs=inputs, folders=[output])
    fitted = Stego.load(model, device=device, weights=weights)
    scores = evaluation.evaluate(fitted, labelled, train=train, crf=crf, progress=progress)
    click.echo(format_scores(scores))
    if output:
        write_json(scores, output / "scores.json")
        write_figures(scores, fitted, labelled, output)
    progress.summary(
        counted(scores["images"], "image"), f"scores.json and figures in {output}" if output else ""
    )


# ---- show --------------------------------------------------------------------------------------------------


@main.command(short_help="Say and show what is in a model, or what corresponds.")
@click.argument("things", nargs=-1, metavar="[MODEL] [IMAGES]...")
@model_or_first
@option(
    "--sheet",
    type=PATH,
    help="Picture, or .html page, of the regions that fit each cluster best.  [default: none]",
)
@option("--at", multiple=True, metavar="X,Y", type=point, help="Show what corresponds with a point.")
@option("-o", "--output", type=PATH, help="With --at: the picture.  [default: correspondences.png]")
@option("--backbone", help="With --at and no model: whose features to show.  [default: auto]")
@option("--export", type=PATH, metavar="FILE", help="The model with its backbone as ONNX.  [default: none]")
@network_options
@verbosity_options
@click.pass_obj
def show(
    progress: Progress,
    things: tuple,
    model: Path | None,
    sheet: Path | None,
    at: tuple,
    output: Path | None,
    backbone: str | None,
    export: Path | None,
    device: str,
    weights: Path | None,
) -> None:
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
    first = alone or (bool(things) and Path(things[0]).suffix in MODEL_SUFFIXES)
    model, images = model_and_rest(model, things, first=first)
    if export:
        if at or sheet or backbone or output or len(images) > 1:
            raise click.UsageError("With --export give a model, and at most one image: its shape is meant.")
        export_model(progress, model or MODEL, images, export, device, weights)
    elif at:
        if not images or sheet or (model and backbone):
            raise click.UsageError("With --at give an image, -m or --backbone: `stego show a.jpg --at 9,9`.")
        picture = output or Path("correspondences.png")
        show_points(progress, images, at, model, picture, backbone or "auto", device, weights)
    elif bool(images) != bool(sheet) or backbone or output:
        raise click.UsageError("Give images and a sheet, or neither: `stego show images/ --sheet sheet.png`.")
    else:
        show_model(progress, model or MODEL, images, sheet, device, weights)


def show_model(
    progress: Progress, model: Path, images: tuple, sheet: Path | None, device: str, weights: Path | None
) -> None:
    """Say what is in a model, and write the sheet of its clusters."""
    from cli_parts import outputs, page, sheets
    from stego import Stego
    from stego_parts.files import counted, find_images
    from stego_parts.images import write_image
    from stego_parts.tiles import tiles_of

    paths = [path for path, _ in find_images(images, exclude=made_in(model.parent))] if images else []
    is_page = sheet is not None and sheet.suffix.lower() == page.SUFFIX
    folders = [page.pictures_folder(sheet)] if sheet and is_page else []
    suffixes = (*PICTURE, page.SUFFIX)
    outputs.check_outputs([(sheet, suffixes)], inputs=[*paths, model], folders=folders)
    fitted = Stego.load(model, device=device, weights=weights)
    print_model(fitted, [*sheets.description(fitted), *sheets.cluster_lines(fitted)])
    seen: list = tiles_of(paths, fitted.config.tile)  # as in the fit
    if sheet and is_page:
        page.write_page(fitted, sheet, seen, progress=progress)
    elif sheet:
        write_image(sheets.cluster_sheet(fitted, seen, progress=progress), sheet)
    if sheet:
        progress.summary(counted(len(seen), "image"), f"sheet {sheet}")


def export_model(
    progress: Progress, model: Path, images: tuple, output: Path, device: str, weights: Path | None
) -> None:
    """Write a model as ONNX, for images of the shape of the one given, or else square ones."""
    from cli_parts.export import write_onnx
    from cli_parts.outputs import check_outputs
    from stego import Stego

    check_outputs([(output, (".onnx",))], inputs=[model, *images, weights])
    fitted = Stego.load(model, device=device, weights=weights)
    width, height = write_onnx(fitted, output, *images, progress=progress)
    progress.summary(f"{fitted.config.backbone}, images of {width} x {height} pixels", f"model {output}")


def show_points(
    progress: Progress,
    images: tuple,
    at: tuple,
    model: Path | None,
    output: Path,
    backbone: str,
    device: str,
    weights: Path | None,
) -> None:
    """Write the picture of what corresponds with points of an image."""
    from cli_parts import evaluation, outputs, sheets
    from stego import Stego
    from stego_parts.backbones import load_backbone
    from stego_parts.files import counted, find_images
    from stego_parts.images import write_image
    from stego_parts.running import pick_device

    image = Path(images[0])
    if not image.is_file():
        raise ValueError(f"{image} is not an image file; --at is about points of one, name it first.")
    others = [path for path, _ in find_images(images[1:])] if images[1:] else []
    outputs.check_outputs([(output, PICTURE)], inputs=[image, *others])
    fitted = Stego.load(model, device=device, weights=weights) if model else None
    place = pick_device(device)
    network = fitted.backbone if fitted else load_backbone(backbone, weights=weights, device=place)
    others = [path for path in others or evaluation.images_of(fitted) if not path.samefile(image)]
    picture = sheets.correspondence_sheet(
        network, image, at, others=others, model=fitted, device=place, progress=progress
    )
    write_image(picture, output)
    progress.summary(
        f"{counted(len(at), 'point')}, {counted(len(others), 'other image')} to choose from",
        f"picture {output}",
    )


# ---- demo --------------------------------------------------------------------------------------------------


@main.command(short_help="Try everything on drawn scenes.")
@option("-o", "--output", default="stego-demo", type=PATH, help="The folder it makes.")
@verbosity_options
@click.pass_obj
def demo(progress: Progress, output: Path) -> None:
    """Try everything on drawn scenes: fit, predict and score. About a minute with the bundled backbone.

    Leaves a page to look at, index.html, images, labels, the model, masks, overlays and scores in a folder.

    \b
    Example:
      stego demo -o /tmp/demo
    """
    from cli_parts.demo import SCENES, check_demo_folder, run_demo

    check_demo_folder(output)
    click.echo(run_demo(output, progress=progress))
    progress.summary(f"{sum(SCENES.values())} drawn scenes", f"look at {output / 'index.html'}")


if __name__ == "__main__":
    main(prog_name="stego")
