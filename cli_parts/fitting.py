"""What `stego fit` does: find the images, see that nothing is lost, train or cluster anew, draw what was found."""

from contextlib import suppress
from logging import INFO
from pathlib import Path
from typing import Any

from cli_parts import datasets, labels, outputs, page, sheets
from cli_parts.console import FEATURES, Progress, log, made_in, print_model
from cli_parts.formats import PICTURE
from stego import Stego
from stego_parts.checkpoint import end_fit, kept_features
from stego_parts.config import NOTICE, fit_config
from stego_parts.files import counted, find_images
from stego_parts.images import write_image
from stego_parts.running import no_progress, process_group


def published_train(dataset: str, root: Path | None, options: dict) -> tuple[tuple, int]:
    """The train images of a published dataset and its number of classes; its preset joins the options."""
    train = labels.labelled_set(dataset, datasets.dataset_root(dataset, root), "train")
    published = datasets.by_name(dataset)
    options["preset"] = options["preset"] or published.preset
    config = fit_config(options["preset"], backbone=options["backbone"])
    log.log(NOTICE, datasets.published_line(published, preset=config.preset, backbone=config.backbone))
    return tuple(image for image, _ in train.pairs), len(train.classes)


class FitPlan:
    """Where a fit writes: models, by their files the number of clusters (None: the default); picture; report."""

    def __init__(
        self,
        output: Path,
        counts: list[int] | None,
        report: Path | None,
        *,
        keep_features: bool,
        overwrite: bool,
    ) -> None:
        self.output = output
        self.report = report
        self.keep_features = keep_features
        self.overwrite = overwrite
        self.features = output.with_name(FEATURES)
        self.scratch = output.with_name(f"{output.name}.scratch")
        self.sheet = output.with_name(f"{output.stem}-fit.png")
        self.models: dict[Path, int | None]
        if counts and len(counts) > 1:
            self.models = {output.with_stem(f"{output.stem}-{count}"): count for count in counts}
        else:
            self.models = {output: counts[0] if counts else None}

    def find_images(self, sources: tuple, near: list) -> list[Path]:
        """The images that sources name, but for outputs of this and earlier runs; near: files beside which some lie."""

        folders = {path.parent for path in (self.output, *near) if path}
        exclude = [*made_in(*folders), *([self.report] if self.report else [])]
        return [path for path, _ in find_images(sources, exclude=exclude)]

    def check(self, paths: list, others: list, match: Path | None) -> None:
        """ValueError for an output that cannot be written, or would replace an input or a model with names."""
        written = [*((file, ()) for file in self.models), (self.sheet, PICTURE)]
        outputs.check_outputs(written, inputs=[*paths, *others], folders=[self.report])
        outputs.check_replacing(self.models, match, self.overwrite)

    def written(self) -> str:
        """The models, in words."""
        return f"model {' '.join(map(str, self.models))}"


def train(progress: Progress, images: tuple, plan: FitPlan, options: dict) -> dict:
    """{file: model}: the first trained, alone or among torchrun's processes, the others its codes clustered anew.

    Empty in all of torchrun's processes but the first. options: of `Stego.fit`.
    """
    paths = plan.find_images(images, [options["weights"]])
    plan.check(paths, [options["weights"]], options["match"])
    keep = plan.keep_features and (plan.features.exists() or not plan.scratch.exists())
    scratch = plan.features if keep else plan.scratch  # where an interrupted fit was without --keep-features
    with process_group(options["device"]) as (rank, count):
        match = earlier_model(options.pop("match"), options["device"])  # on this process's GPU
        if count == 1:
            progress.go_on = "the same command goes on"
        if rank:  # the first process says the rest
            log.addFilter(lambda record: record.msg.startswith("Skipped"))
        shared: dict = dict(match=match, checkpoint=scratch, sources=images)
        shared["progress"] = no_progress if rank else progress
        models: dict[Path, Stego] = {}
        trained: Stego | None = None
        for file, clusters in plan.models.items():
            if trained is None:
                model = trained = Stego.fit(paths, clusters=clusters, **options, **shared)
            else:
                model = trained.recluster(paths, clusters=clusters, **shared)
            models[file] = model
            if not rank:
                model.save(file)
    progress.go_on = f"the {plan.written()} is written already"
    if rank:
        return {}
    end_fit(scratch, keep_features=plan.keep_features)
    if plan.keep_features and not keep:
        with suppress(OSError):  # still open on Windows
            scratch.rename(plan.features)
    return models


def recluster(progress: Progress, images: tuple, plan: FitPlan, from_model: Path, options: dict) -> dict:
    """{file: model}: what a model has learned, clustered anew without training; options: of `Stego.recluster`."""
    base = Stego.load(from_model, device=options.pop("device"), weights=options.pop("weights"))
    sources = images or base.config.images
    if not sources:
        raise ValueError(f"{from_model} does not name the images of its fit; give some beside --from.")
    paths = plan.find_images(sources, [from_model])
    plan.check(paths, [base.weights, from_model], options["match"])
    match = earlier_model(options.pop("match"), base.device)
    kept = kept_features(from_model.with_name(FEATURES), paths, base)
    scratch = plan.features if plan.keep_features else plan.scratch
    progress.go_on = "the same command goes on"
    models = {}
    for file, clusters in plan.models.items():
        shared: dict = dict(match=match, sources=sources, progress=progress, checkpoint=kept or scratch)
        models[file] = base.recluster(paths, clusters=clusters, **shared, **options)
        models[file].save(file)
    progress.go_on = f"the {plan.written()} is written already"
    if not kept:
        end_fit(scratch, keep_features=plan.keep_features)
    return models


def earlier_model(path: Path | None, device: Any) -> Stego | None:
    """The model to match, if there is one."""
    return Stego.load(path, device=device) if path else None


def write_pictures(progress: Progress, models: dict, plan: FitPlan) -> None:
    """The picture of a fit, its report, and what is said at its end; models: {file: model}."""

    fitted = list(models.values())
    write_image(sheets.fit_sheet(fitted, progress=progress), plan.sheet)
    written = f"{plan.written()}, picture {plan.sheet}"
    if plan.report:
        index = plan.report / "index.html"
        images = page.spread(sheets.fit_images(fitted[0]), page.REGION_IMAGES)
        page.write_page(fitted[0], index, images, progress=progress)
        written += f", report {index}"
    if log.isEnabledFor(INFO):
        for model in fitted:
            print_model(model, sheets.cluster_lines(model))
    used = len(sheets.fit_images(fitted[0]))
    progress.summary(f"{counted(used, 'image')}, {fitted[0].config.backbone}", written)
