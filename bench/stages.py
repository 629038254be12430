"""What do `stego fit` and `stego eval` take, stage by stage, and what did they take before?

    python bench/stages.py OLD [--data DATA] [--set natural] [--threads 2] [--rounds 3]

OLD: another checkout of this repository (`git worktree add OLD COMMIT`). Commands of both, in turn: `fit` on the first
--photos train images of a labelled set with `tiny`; `eval` of that model on the first --photos-eval val images, with
linear probes fitted on --photos-probe train images. Prints medians over rounds: seconds on the clock and of CPU of the
whole command, and seconds on the clock of each stage, from the first that is said of it to the first of the next, the
first from the command itself ("imports"). Says whether both wrote the same model, picture and scores.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parents[1]
FIRST = "imports"
STAGES = (
    "features",
    "neighbors",
    "training",
    "clusters",
    "picture",
    "baseline",
    "k-means",
    "probe",
    "evaluate",
)
Times = dict[str, float]  # seconds of each stage; "clock", "CPU" of the whole


def children_seconds() -> float:
    """CPU time of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(checkout: Path, threads: int, *args: object) -> Times:
    """What a stego command of a checkout takes; stages by what it says on stderr."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=str(checkout))
    command = [sys.executable, "-m", "cli", *map(str, args)]
    cpu = children_seconds()
    began = since = time.perf_counter()
    times: Times = {}
    stage = FIRST
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    for line in process.stderr:
        word = line.split(" ", 1)[0]
        if word in STAGES and word != stage:
            now = time.perf_counter()
            times[stage] = times.get(stage, 0) + now - since
            since = now
            stage = word
    if process.wait():
        sys.exit(f"{' '.join(command)} failed in {checkout}.")
    now = time.perf_counter()
    times[stage] = times.get(stage, 0) + now - since
    return times | {"clock": now - began, "CPU": children_seconds() - cpu}


def compare(name: str, sides: dict[str, Path], threads: int, rounds: int, arguments: dict[str, list]) -> None:
    """Run a command of both sides in turn, and print medians and ratios."""
    runs: dict[str, list[Times]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, checkout in sides.items():
            runs[side].append(timed(checkout, threads, name, *arguments[side]))
    print(f"{name}, {threads} threads, medians of {rounds}", *(f"{side:>8}" for side in sides), "   ratio")
    for row in ("clock", "CPU", FIRST, *STAGES):
        medians = [statistics.median(run.get(row, 0) for run in runs[side]) for side in sides]
        if any(medians):
            ratio = medians[1] / medians[0] if medians[0] else float("nan")
            print(f"  {row:30}{medians[0]:8.2f} {medians[1]:8.2f} {ratio:8.2f}", flush=True)


def same(kind: str, before: Path, after: Path) -> None:
    """Say whether two files hold the same."""
    if before.suffix == ".pt":
        first, second = (torch.load(path, weights_only=True) for path in (before, after))
        equal = all(torch.equal(first["head"][key], second["head"][key]) for key in first["head"])
        equal = equal and torch.equal(first["centers"], second["centers"])
    else:
        equal = before.read_bytes() == after.read_bytes()
    print(f"  {kind}: {'the same' if equal else 'NOT the same'}")


def first_images(folder: Path, labelled: Path, split: str, count: int) -> tuple[Path, Path]:
    """Folders of links to the first images of a split of a labelled set, and to their labels."""
    labels = {path.stem: path for path in (labelled / "labels" / split).iterdir()}
    for path in sorted((labelled / "images" / split).iterdir())[:count]:
        for kind, file in (("images", path), ("labels", labels[path.stem])):
            place = folder / f"{kind}-{split}-{count}"
            place.mkdir(exist_ok=True)
            (place / file.name).symlink_to(file.resolve())
    return folder / f"images-{split}-{count}", folder / f"labels-{split}-{count}"


@click.command()
@click.argument("old", type=Path)
@click.option("--data", default="../shared/data", type=Path)
@click.option("--set", "name", default="natural")
@click.option("--photos", default=40)
@click.option("--photos-eval", default=24)
@click.option("--photos-probe", default=30)
@click.option("--threads", default=2)
@click.option("--rounds", default=3)
def main(
    old: Path,
    data: Path,
    name: str,
    photos: int,
    photos_eval: int,
    photos_probe: int,
    threads: int,
    rounds: int,
) -> None:
    sides = {"old": old.resolve(), "new": ROOT}
    labelled = data.resolve() / name
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images, _ = first_images(folder, labelled, "train", photos)
        models = {side: folder / side / "model.pt" for side in sides}
        fits = {side: [images, "--backbone", "tiny", "-o", models[side], "--overwrite"] for side in sides}
        compare("fit", sides, threads, rounds, fits)
        same("model", models["old"], models["new"])
        same("picture", *(models[side].with_name("model-fit.png") for side in sides))
        scored, labels = first_images(folder, labelled, "val", photos_eval)
        train, train_labels = first_images(folder, labelled, "train", photos_probe)
        options: list = ["--images", scored, "--labels", labels, "--names", labelled / "classes.txt"]
        options += ["--train-images", train, "--train-labels", train_labels]
        scores = {side: folder / side / "scores" for side in sides}
        evaluations = {side: [*options, "-m", models[side], "-o", scores[side]] for side in sides}
        compare("eval", sides, threads, rounds, evaluations)
        same("scores", *(scores[side] / "scores.json" for side in sides))


if __name__ == "__main__":
    main()
