"""One training step and a whole fit, ours against the reference's schedule, on the same machine in one run.

    python bench/speed.py --images ../shared/data/camvid/images/train [--backbone dino_vits8] [--limit 40]
    python bench/speed.py --images ../shared/data/camvid/images/train --whole --batch-size 16

The reference pushes a batch and its neighbours through the backbone at every step (32 + 32 passes) before it updates
the head; ours reads cached tokens. Weights are random unless they are cached: they do not change the time. The
reference's step is built from the same backbone and the same loss, so the ratio shows the schedule alone. The whole
fit is measured on --limit images and their encoding scaled to all images of the folder; training is not scaled.
--whole scales nothing: one fit of all images, every step, by its stages (features: the backbone pass).
"""

import time
from dataclasses import replace
from unittest.mock import patch

import click
import torch
from common import median_seconds, network_of, seconds

import stego
from stego import POSITIONS, Head, Stego, nearest_neighbors, shifts_from_data, train_head, training_loss
from stego_parts.config import fit_config
from stego_parts.features import CROP_SIDE, encode
from stego_parts.files import find_images


def reference_step(network, head, optimizer, config):
    """The reference's step: two backbone passes of a batch, the head on whole maps, sampled positions, one update."""
    batch = config.batch_size
    maps = []
    for _ in range(2):
        with torch.no_grad():
            maps.append(network(torch.randn(batch, 3, CROP_SIDE, CROP_SIDE)).flatten(2).transpose(1, 2))
    whole = [head(tokens) for tokens in maps]  # it codes every position, then samples
    positions = torch.randint(maps[0].shape[1], (2, POSITIONS))
    f, k = maps[0][:, positions[0]], maps[1][:, positions[1]]
    loss = training_loss(head, f, k, config) + 0 * sum(codes.sum() for codes in whole)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def whole_fit(network, images, **options):
    """{stage: seconds} of one fit as users run it, nothing scaled; neighbours count to the training."""
    ends = {"start": time.perf_counter()}
    # by name: a callable is called by itself
    with patch.object(stego, "load_backbone", return_value=network):
        Stego.fit(
            images,
            backbone=network.name,
            progress=lambda stage, *_: ends.update({stage: time.perf_counter()}),
            **options,
        )
    ends["clusters"] = time.perf_counter()
    return {stage: end - before for (stage, end), before in zip(list(ends.items())[1:], ends.values())}


@click.command()
@click.option("--images", default="../shared/data/camvid/images/train")
@click.option("--backbone", default="dino_vits8")
@click.option("--limit", default=40, help="Images that are really encoded.")
@click.option("--batch-size", default=32)
@click.option("--steps", default=2000)
@click.option("--views", default="five")
@click.option("--reference/--no-reference", default=True, help="Its step takes minutes without a GPU.")
@click.option("--whole", is_flag=True, help="One whole fit, nothing scaled, and nothing else.")
@click.option("--threads", default=2)
def main(images, backbone, limit, batch_size, steps, views, reference, whole, threads):
    torch.set_num_threads(threads)
    network = network_of(backbone)
    paths = [path for path, _ in find_images(images)]
    options = dict(clusters=27, batch_size=batch_size, steps=steps, views=views)
    config = fit_config(**options).on_backbone(backbone)
    print(
        f"{backbone}, batch {batch_size}, {threads} threads, {len(paths)} images, views {views}, {steps} steps",
        flush=True,
    )
    if whole:
        stages = whole_fit(network, paths, **options)
        for stage, took in stages.items():
            print(f"{stage:9} {took:8.2f} s  {took / sum(stages.values()):4.0%}")
        return

    began = time.perf_counter()
    cache = encode(network, paths[:limit], config)
    encoding = (time.perf_counter() - began) * len(paths) / min(limit, len(paths))
    neighbors = nearest_neighbors(cache.means, cache.images)
    knn, _ = seconds(lambda: nearest_neighbors(cache.means, cache.images))

    config = replace(config, **shifts_from_data(cache, neighbors, config))
    short = replace(config, steps=20)
    train_head(cache, neighbors, replace(config, steps=3))  # warm up
    ours = median_seconds(lambda: train_head(cache, neighbors, short), 3) / short.steps
    total = encoding + knn + ours * steps
    print(
        f"ours: step {ours:7.4f} s, fit {total / 60:7.2f} min, {encoding / total:.0%} of it the backbone pass"
    )
    if reference:
        head = Head(network.channels, config.code_size).train()
        optimizer = torch.optim.Adam(head.parameters())
        theirs = median_seconds(lambda: reference_step(network, head, optimizer, config), 3)
        scheduled = encoding + theirs * steps  # its own neighbour table needs one pass too
        print(
            f"reference: step {theirs:8.3f} s, ratio {theirs / ours:7.0f}; fit {scheduled / 60:8.1f} min, "
            f"ratio {scheduled / total:7.0f}"
        )


if __name__ == "__main__":
    main()
