"""How the memory of `stego fit` grows with the number of images: it must not.

    python bench/memory.py --images ../shared/data/unlabelled [--counts 200,2000,7000] [--cache-size 0.5] [--steps 20]

Runs `stego fit` on the first so many of the images in random order, as links in a temporary folder, and reads
/proc/PID/status every 20 ms. "anonymous" (RssAnon) is what the process has taken for itself and nobody can take back
while it runs; "mapped" (RssFile + RssShmem) is libraries and those pages of the token cache, a file, that the system
happens to keep in memory and drops as soon as others need it: at most the size of the cache.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stego_parts.images import find_images


def megabytes(pid: int) -> dict:
    """The lines of /proc/PID/status about resident memory, in MB."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) / 1e3 for words in lines if words[0].startswith("Rss")}


def peaks(command) -> tuple[float, float]:
    """The most anonymous and the most mapped memory that a command has had, in MB."""
    process, anonymous, mapped = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0.0, 0.0
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
    return anonymous, mapped


@click.command()
@click.option("--images", default="../shared/data/unlabelled")
@click.option("--counts", default="200,2000,7000")
@click.option("--cache-size", default=0.5)
@click.option("--steps", default=20)
@click.option("--views", default="windows")
def main(images, counts, cache_size, steps, views):
    paths = [path.resolve() for path, _ in find_images(images)]
    random.Random(0).shuffle(paths)
    print(f"{'images':>7} {'seconds':>8} {'anonymous MB':>13} {'ratio':>6} {'mapped MB':>10}")
    first = None
    for count in map(int, counts.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(f"{folder}/images")
            for number, path in enumerate(paths[:count]):
                os.symlink(path, f"{folder}/images/{number:06d}{path.suffix}")
            began = time.perf_counter()
            command = [sys.executable, "-m", "cli", "fit", f"{folder}/images", "--backbone", "tiny"]
            command += ["--steps", str(steps), "-o", f"{folder}/stego.pt"]
            command += ["--set", f"cache_size={cache_size}", "--set", f"views={views}"]
            anonymous, mapped = peaks(command)
            first = first or anonymous
            seconds = time.perf_counter() - began
            print(
                f"{min(count, len(paths)):7d} {seconds:8.0f} {anonymous:13.0f} {anonymous / first:6.2f} "
                f"{mapped:10.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
