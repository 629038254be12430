"""`stego demo`: fit, predict and score on drawn scenes; everything that comes out lies in one folder."""

from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from PIL import Image

from cli_parts import evaluation as protocol
from cli_parts import sheets as report
from cli_parts.datasets import folder_set
from cli_parts.drawing import with_legend
from cli_parts.outputs import check_folder
from cli_parts.scenes import SCENE_CLASSES, draw_scene
from stego import Stego
from stego_parts.features import Progress, no_progress
from stego_parts.images import mask_image, read_image, write_bytes, write_image

SCENES, STEPS = {"train": 30, "val": 30}, 300  # three minutes on two cores; steps as in `fit`
# What a demo leaves in its folder, as patterns
FILES = """images/*/scene??.png labels/*/scene??.png masks/scene??.png overlays/scene??.jpg figures/*.png
classes.txt stego.pt stego-fit.png clusters.png scores.json""".split()


def check_demo_folder(folder: Path):
    """ValueError unless the folder is new, empty, or has nothing in it that a demo does not make."""
    check_folder(folder)
    for path in folder.rglob("*"):
        place = path.relative_to(folder).as_posix()
        if not path.is_dir() and not any(fnmatch(place, each) for each in FILES):
            raise ValueError(f"{path} is in {folder}, and no demo made it; name a new folder with -o.")


def draw_scenes(folder: Path, *, seed: int, progress: Progress = no_progress):
    """images/ and labels/ with the scenes of each split, and classes.txt, as `stego eval` reads them."""
    splits = [split for split, count in SCENES.items() for _ in range(count)]
    for number, split in enumerate(splits):
        name, (image, labels) = f"scene{number:02d}.png", draw_scene(1000 * seed + number)
        write_image(image, folder / "images" / split / name)
        write_image(Image.fromarray(labels), folder / "labels" / split / name)
        progress("drawing", number + 1, len(splits))
    write_bytes("".join(f"{name}\n" for name in SCENE_CLASSES).encode(), folder / "classes.txt")


def run_demo(folder: Path, *, seed: int = 0, progress: Progress = no_progress) -> str:
    """Leave images, labels, a model, masks, overlays, sheets and scores in a folder; returns the scores, as a table."""
    draw_scenes(folder, seed=seed, progress=progress)
    folders, names = (folder / "images", folder / "labels"), folder / "classes.txt"
    train, val = (folder_set(*(each / split for each in folders), names=names) for split in SCENES)
    paths = [path for path, _ in train.pairs]
    options = dict(classes=len(SCENE_CLASSES), backbone="tiny", steps=STEPS, seed=seed)
    model = Stego.fit(paths, **options, progress=progress)
    scores = protocol.evaluate(model, val, train=train, seed=seed, progress=progress)
    most = np.argmax(protocol.headline(scores)["confusion"], 0)  # the class that most of a cluster is
    model.rename({k: SCENE_CLASSES[c] for k, c in enumerate(most)})
    model.save(folder / "stego.pt")
    protocol.write_json(scores, folder / "scores.json")
    report.write_figures(scores, model, val, folder / "figures")
    write_image(report.fit_sheet([model], progress=progress), folder / "stego-fit.png")
    write_image(report.cluster_sheet(model, paths, progress=progress), folder / "clusters.png")
    for done, (path, _) in enumerate(val.pairs, 1):
        image = read_image(path)
        mask = model.predict(image)
        write_image(mask_image(mask, model.colors), folder / "masks" / path.name)
        write_image(with_legend(image, mask, model), folder / "overlays" / f"{path.stem}.jpg")
        progress("predict", done, len(val.pairs))
    return protocol.table(scores)
