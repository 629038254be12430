"""How time and memory grow with the work: `fit` with the number of images, `predict` with the size of one.

    python bench/growth.py --images ../shared/data/unlabelled [--counts 100,1000,7000] [--megapixels 0.3,3,12,100]
    python bench/growth.py --images ../shared/data/unlabelled --counts 400 --megapixels "" --backbones tiny,dino_vits8
        --steps 0 --threads 2

Each row is a command of its own, --threads threads. fit: so many of the images, in random order, --steps steps, 0.5
GB of features; with --steps 0 the steps of the backbone and 8 GB. "backbone" is the share of its time from the first
image's features to the last's; backbones other than tiny have random weights, which do not change the time. predict: a
mosaic of the images of so many megapixels, in parts of 320 pixels, --no-crf; up to --crf-of megapixels with the CRF
too. "anonymous" (RssAnon of /proc) is what the process has taken for itself and nobody can take back while it runs;
"mapped" is libraries and those pages of the token cache, a file, that the system happens to keep and drops as soon as
others need them. "per unit" is the time for an image or a megapixel, as a ratio to the first row of its kind.
"""

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import click
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch
from common import network_of

from stego_parts.files import find_images
from stego_parts.images import read_image

TILE = 320  # pixels


def megabytes(pid: int) -> dict:
    """The lines of /proc/PID/status about resident memory, in MB."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) / 1e3 for words in lines if words[0].startswith("Rss")}


class Cost(NamedTuple):
    """Seconds of a command, of them those from its first image's features to its last's, and memory in MB."""

    seconds: float
    features: float
    anonymous: float
    mapped: float


def note_stages(lines: Iterable[str], began: dict[str, float]) -> None:
    """When each stage was first spoken of."""
    for line in lines:
        began.setdefault(line.split(" ", 1)[0], time.perf_counter())


def cost(threads: int, *args) -> Cost:
    """What a stego command takes, and the most memory it has had."""
    command = [sys.executable, "-m", "cli", *map(str, args)]
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONPATH=str(ROOT))
    began = time.perf_counter()
    anonymous = mapped = 0.0
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    stages: dict[str, float] = {}
    reader = threading.Thread(target=note_stages, args=(process.stderr, stages))
    reader.start()
    while process.poll() is None:
        try:
            now = megabytes(process.pid)
        except OSError:
            break
        if now:
            anonymous = max(anonymous, now["RssAnon"])
            mapped = max(mapped, now["RssFile"] + now["RssShmem"])
        time.sleep(0.02)
    if process.wait():
        sys.exit(f"{' '.join(command)} failed.")
    ended = time.perf_counter()
    reader.join()
    first = stages.get("features", ended)
    return Cost(ended - began, stages.get("neighbors", first) - first, anonymous, mapped)


def mosaic(paths, megapixels: float, file: Path):
    """A picture of so many megapixels, 4 : 3, of pictures of TILE pixels side by side."""
    columns = max(round((megapixels * 1e6 * 4 / 3) ** 0.5 / TILE), 1)
    rows = max(round(megapixels * 1e6 / TILE**2 / columns), 1)
    whole = Image.new("RGB", (columns * TILE, rows * TILE))
    for i in range(columns * rows):
        picture = read_image(paths[i % len(paths)]).resize((TILE, TILE))
        whole.paste(picture, (i % columns * TILE, i // columns * TILE))
    whole.save(file, quality=90)


def weights_of(name: str, folder: Path) -> list:
    """The option that names a file of random weights of a backbone, tiny excepted."""
    if name == "tiny":
        return []
    file = folder / f"{name}.pth"
    torch.save(network_of(name).state_dict(), file)
    return ["--weights", file]


def fits(paths, counts, backbones, steps: int, threads: int, folder: Path):
    for backbone in backbones:
        options = ["--backbone", backbone, *weights_of(backbone, folder)]
        options += ["--steps", steps, "--set", "cache_size=0.5"] if steps else []
        for count in counts:
            images = folder / f"{backbone}-{count}"
            images.mkdir()
            for number, path in enumerate(paths[:count]):
                os.symlink(path, images / f"{number:06d}{path.suffix}")
            found = cost(threads, "fit", images, *options, "-o", folder / f"{backbone}-{count}.pt")
            yield f"fit {backbone}", min(count, len(paths)), found


def predictions(paths, sizes, crf_of: float, threads: int, folder: Path):
    for size in sizes:
        file = folder / f"{size:g}.jpg"
        mosaic(paths, size, file)
        args = ["predict", file, "-m", next(folder.glob("*.pt")), "-o", folder / f"{size:g}.png"]
        args += ["--max-megapixels", 400, "--tile", TILE]
        yield "predict", size, cost(threads, *args, "--no-crf", "-q")
        if size <= crf_of:
            yield "predict, CRF", size, cost(threads, *args, "-q")


@click.command()
@click.option("--images", default="../shared/data/unlabelled")
@click.option("--counts", default="100,1000,7000")
@click.option("--megapixels", default="0.3,3,12,100")
@click.option("--crf-of", default=12.0, help="Largest picture, in megapixels, on which the CRF is timed too.")
@click.option("--backbones", default="tiny", help="Of the fits.")
@click.option("--steps", default=20)
@click.option("--threads", default=1)
def main(images, counts, megapixels, crf_of, backbones, steps, threads):
    paths, rows = [path.resolve() for path, _ in find_images(images)], {}
    random.Random(0).shuffle(paths)
    counts = [int(count) for count in counts.split(",")]
    sizes = [float(size) for size in megapixels.split(",") if size]
    headings = ("seconds", "per unit", "backbone", "anonymous MB", "mapped MB")
    print(f"{'command':18} {'size':>8}", *(f"{heading:>{len(heading) + 1}}" for heading in headings))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = [fits(paths, counts, backbones.split(","), steps, threads, folder)]
        measured += [predictions(paths, sizes, crf_of, threads, folder)]
        for kind, size, found in (row for part in measured for row in part):
            row = rows.setdefault(kind, [])
            row.append((size, found.seconds))
            unit = found.seconds / size / (row[0][1] / row[0][0])
            share = found.features / found.seconds
            print(
                f"{kind:18} {size:8g} {found.seconds:8.1f} {unit:9.2f} {share:9.0%} {found.anonymous:13.0f} "
                f"{found.mapped:10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
