"""How time and memory grow with the work: `fit` with the number of images, `predict` with the size of one.

    python bench/growth.py --images ../shared/data/unlabelled [--counts 100,1000,7000] [--megapixels 0.3,3,12,100]

Each row is a command of its own, `tiny`, one thread. fit: so many of the images, in random order, --steps steps, 0.5
GB of features. predict: a mosaic of the images of so many megapixels, in parts of 320 pixels, --no-crf; up to --crf-
of megapixels with the CRF too. "anonymous" (RssAnon of /proc) is what the process has taken for itself and nobody can
take back while it runs; "mapped" is libraries and those pages of the token cache, a file, that the system happens to
keep and drops as soon as others need them. "per unit" is the time for an image or a megapixel, as a ratio to the
first row of its kind.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from stego_parts.files import find_images
from stego_parts.images import read_image

TILE = 320  # pixels


def megabytes(pid: int) -> dict:
    """The lines of /proc/PID/status about resident memory, in MB."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) / 1e3 for words in lines if words[0].startswith("Rss")}


def cost(*args) -> tuple[float, float, float]:
    """Seconds, and the most anonymous and the most mapped memory in MB, of a stego command."""
    command = [sys.executable, "-m", "cli", *map(str, args), "-q"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    began, anonymous, mapped = time.perf_counter(), 0.0, 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    while process.poll() is None:
        try:
            now = megabytes(process.pid)
        except OSError:
            break
        if now:
            anonymous, mapped = max(anonymous, now["RssAnon"]), max(mapped, now["RssFile"] + now["RssShmem"])
        time.sleep(0.02)
    if process.wait():
        sys.exit(f"{' '.join(command)} failed.")
    return time.perf_counter() - began, anonymous, mapped


def mosaic(paths, megapixels: float, file: Path):
    """A picture of so many megapixels, 4 : 3, of pictures of TILE pixels side by side."""
    columns = max(round((megapixels * 1e6 * 4 / 3) ** 0.5 / TILE), 1)
    rows = max(round(megapixels * 1e6 / TILE**2 / columns), 1)
    whole = Image.new("RGB", (columns * TILE, rows * TILE))
    for i in range(columns * rows):
        picture = read_image(paths[i % len(paths)]).resize((TILE, TILE))
        whole.paste(picture, (i % columns * TILE, i // columns * TILE))
    whole.save(file, quality=90)


def fits(paths, counts, steps: int, folder: Path):
    for count in counts:
        images = folder / str(count)
        images.mkdir()
        for number, path in enumerate(paths[:count]):
            os.symlink(path, images / f"{number:06d}{path.suffix}")
        options = ["--backbone", "tiny", "--steps", steps, "-o", folder / f"{count}.pt"]
        yield "fit", min(count, len(paths)), cost("fit", images, *options, "--set", "cache_size=0.5")


def predictions(paths, sizes, crf_of: float, folder: Path):
    for size in sizes:
        file = folder / f"{size:g}.jpg"
        mosaic(paths, size, file)
        args = ["predict", file, "-m", next(folder.glob("*.pt")), "-o", folder / f"{size:g}.png"]
        args += ["--max-megapixels", 400, "--tile", TILE]
        yield "predict", size, cost(*args, "--no-crf")
        if size <= crf_of:
            yield "predict, CRF", size, cost(*args)


@click.command()
@click.option("--images", default="../shared/data/unlabelled")
@click.option("--counts", default="100,1000,7000")
@click.option("--megapixels", default="0.3,3,12,100")
@click.option("--crf-of", default=12.0, help="Largest picture, in megapixels, on which the CRF is timed too.")
@click.option("--steps", default=20)
def main(images, counts, megapixels, crf_of, steps):
    paths, rows = [path.resolve() for path, _ in find_images(images)], {}
    random.Random(0).shuffle(paths)
    print(f"{'command':13} {'size':>8} {'seconds':>8} {'per unit':>9} {'anonymous MB':>13} {'mapped MB':>10}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = [fits(paths, map(int, counts.split(",")), steps, folder)]
        measured += [predictions(paths, map(float, megapixels.split(",")), crf_of, folder)]
        for kind, size, (seconds, anonymous, mapped) in (row for part in measured for row in part):
            row = rows.setdefault(kind, [])
            row.append((size, seconds))
            unit = seconds / size / (row[0][1] / row[0][0])
            print(
                f"{kind:13} {size:8g} {seconds:8.1f} {unit:9.2f} {anonymous:13.0f} {mapped:10.0f}", flush=True
            )


if __name__ == "__main__":
    main()
