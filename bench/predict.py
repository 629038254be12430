"""What does `stego predict --no-crf` cost beyond the backbone? (Target: at most 1.25 times the backbone's own time.)

    python bench/predict.py --images ../shared/data/camvid/images/val [--backbone tiny] [--limit 20] [--threads 1]

Takes images in turn: the backbone alone on each and its mirror image, in memory as tensors already, then all that
`stego predict` does with the files: reading, resizing, codes, upsampling, writing masks, in its threads. Prints medians
over rounds on the clock and of CPU time, all threads counted, and the ratios. Head, centres and the weights of other
backbones than tiny are random: the time does not depend on them. Start-up is what a command does before its first
image.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from common import network_of, random_model, seconds

import cli
from cli_parts.outputs import Job, Writer
from stego_parts.features import RESOLUTION, input_image, to_tensor
from stego_parts.files import find_images
from stego_parts.images import read_image


@click.command()
@click.option("--images", default="../shared/data/camvid/images/val")
@click.option("--backbone", default="tiny")
@click.option("--limit", default=20)
@click.option("--threads", default=1)
@click.option("--rounds", default=3)
@torch.inference_mode()
def main(images, backbone, limit, threads, rounds):
    cli.keep_memory()
    torch.set_num_threads(threads)
    model = random_model(network_of(backbone), 27)
    paths = [path for path, _ in find_images([images])][:limit]
    inputs = []
    for path in paths:
        x = to_tensor(input_image(read_image(path), model.backbone.patch))[None]
        inputs.append(torch.cat([x, x.flip(-1)]))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(path, Path(path.name), {"mask": Path(folder) / f"{path.stem}.png"}) for path in paths]
        options = {"crf": False, "resolution": RESOLUTION, "smooth": False}
        writer = Writer(model, "mask", None, 0, options)
        model.backbone(inputs[0])
        for _ in range(rounds):
            alone = seconds(lambda: [model.backbone(x) for x in inputs])
            whole = seconds(lambda: list(writer.results(jobs)))
            found.append((*alone, *whole))
    clock, cpu, whole_clock, whole_cpu = np.median(found, 0) / len(paths)
    start, _ = seconds(lambda: subprocess.run([sys.executable, "-c", "import stego"], check=True))
    print(f"{len(paths)} images, {backbone}, {threads} thread(s), medians of {rounds}, seconds an image")
    print(f"clock: backbone {clock:.3f}, predict {whole_clock:.3f}, ratio {whole_clock / clock:.2f}")
    print(f"CPU:   backbone {cpu:.3f}, predict {whole_cpu:.3f}, ratio {whole_cpu / cpu:.2f}")
    print(f"start-up (import) {start:.1f} s")


if __name__ == "__main__":
    main()
