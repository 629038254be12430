"""`stego demo`: fit, predict and score on drawn scenes; everything that comes out lies in one folder."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFilter

from cli_parts import evaluation, page, sheets
from cli_parts.drawing import contact_sheet, with_legend
from cli_parts.labels import folder_set
from cli_parts.outputs import check_folder
from cli_parts.scores import format_scores, headline, write_json
from stego import Stego
from stego_parts.config import NOTICE
from stego_parts.files import write_bytes
from stego_parts.images import mask_image, read_image, write_image
from stego_parts.running import Progress, no_progress

# What is drawn, and which of the classes it is: hills are woods far away, trees are woods nearby
SKY, HILLS, GRASS, ROAD, BUILDING, TREE, CAR = range(7)
SCENE_CLASSES = ("sky", "woods", "meadow", "road", "building", "car")
CLASS_OF = np.array([0, 1, 2, 3, 4, 1, 5], np.uint8)  # (7,)
EYE = 2.2  # metres from the ground to the camera
HAZE = 120  # metres after which two thirds of a colour are that of the horizon
WALLS = ((178, 150, 120), (160, 96, 78), (200, 190, 170), (140, 138, 140), (196, 168, 110))
PAINTS = ((170, 30, 30), (40, 60, 120), (215, 215, 218), (40, 42, 46), (120, 125, 130), (200, 160, 40))

SCENES = {"train": 20, "val": 8}
STEPS = 100  # a third of those of `fit`: the images are few, and more of them change nothing
BACKBONE = "auto"  # the best that is in the torch cache or can be fetched, else tiny
DRAWING = "Drawing scenes of roads, with labels"
FITTING = "Fitting: what recurs in the train scenes, without their labels"
SCORING = "Scoring on the val scenes, beside k-means on the backbone's features"
SHOWING = "Writing masks, overlays and the page"
STAGES = (DRAWING, FITTING, SCORING, SHOWING)
# How long a stage takes with tiny, in times that drawing a scene does
COSTS = {DRAWING: 28, FITTING: 110, SCORING: 80, SHOWING: 90}

log = logging.getLogger("stego")

# What a demo leaves in its folder, as patterns
FILES = """images/*/scene??.png labels/*/scene??.png masks/scene??.png overlays/scene??.jpg figures/*.png
index-pictures/*.jpg index.html classes.txt stego.pt sheet.png scores.json""".split()
Shape = Sequence  # corners (x, y) in pixels, or the box of an ellipse


def check_demo_folder(folder: Path) -> None:
    """ValueError unless the folder is new, empty, or has nothing in it that a demo does not make, but hidden files."""
    check_folder(folder)
    for path in folder.rglob("[!.]*"):
        place = path.relative_to(folder).as_posix()
        if not path.is_dir() and not any(fnmatch(place, pattern) for pattern in FILES):
            raise ValueError(f"{path} is in {folder}, and no demo made it; name a new folder with -o.")


def draw_scenes(folder: Path, *, progress: Progress = no_progress) -> None:
    """images/ and labels/ with the scenes of each split, and classes.txt, as `stego eval` reads them."""
    total = sum(SCENES.values())
    number = 0
    for split, count in SCENES.items():
        for _ in range(count):
            image, labels = draw_scene(number)
            name = f"scene{number:02d}.png"
            write_image(image, folder / "images" / split / name, note="")
            write_image(Image.fromarray(CLASS_OF[labels]), folder / "labels" / split / name, note="")
            number += 1
            progress("drawing", number, total)
    write_bytes("".join(f"{name}\n" for name in SCENE_CLASSES).encode(), folder / "classes.txt")


def run_demo(folder: Path, *, progress: Progress = no_progress) -> str:
    """Leave images, labels, a model, masks, overlays, a page and scores in a folder; returns the scores, as a table.

    Says at each stage what is done and about how long it will take.
    """
    say_stage(DRAWING)
    began = time.monotonic()
    draw_scenes(folder, progress=progress)
    unit = (time.monotonic() - began) / COSTS[DRAWING]
    options: dict = dict(backbone=BACKBONE, steps=STEPS, progress=progress)
    val = folder_set(folder / "images/val", folder / "labels/val", names=folder / "classes.txt")
    say_stage(FITTING, unit)
    model = Stego.fit(folder / "images/train", clusters=len(SCENE_CLASSES), **options)
    say_stage(SCORING, unit)
    scores = evaluation.evaluate(model, val, progress=progress)
    most = np.argmax(headline(scores)["confusion"], 0)  # (K,) the class that most of a cluster is
    model.rename({k: SCENE_CLASSES[c] for k, c in enumerate(most)})
    model.save(folder / "stego.pt")
    write_json(scores, folder / "scores.json")
    say_stage(SHOWING, unit)
    sheets.write_figures(scores, model, val, folder / "figures")
    page.write_page(model, folder / "index.html", sheets.fit_images(model), progress=progress)
    _write_masks(model, [path for path, _ in val.pairs], folder, progress)
    return format_scores(scores)


def say_stage(stage: str, unit: float = 0.0) -> None:
    """Say what begins and about how long it takes; unit: seconds that drawing a scene took here, if that is known."""
    number = STAGES.index(stage) + 1
    about = f", about {max(round(unit * COSTS[stage]), 1)} s with tiny" if unit else ""
    log.log(NOTICE, "%d/%d %s%s.", number, len(STAGES), stage, about)


def _write_masks(model: Stego, paths: Sequence[Path], folder: Path, progress: Progress) -> None:
    """masks/ and overlays/ of images, and a sheet of all."""
    pairs = []
    for done, path in enumerate(paths, 1):
        image = read_image(path)
        mask = model.predict(image)
        pairs.append((image, mask))
        write_image(mask_image(mask, model.colors), folder / "masks" / path.name)
        write_image(with_legend(image, mask, model), folder / "overlays" / f"{path.stem}.jpg")
        progress("predict", done, len(paths))
    write_image(contact_sheet(pairs, model), folder / "sheet.png")


def draw_scene(seed: int, height: int = 240, width: int = 320) -> tuple[Image.Image, np.ndarray]:
    """A synthetic road through a town or a landscape, and what is where, (H, W) uint8: SKY to CAR."""
    rng = np.random.default_rng(seed)
    scene = _Scene(rng, height, width)
    half = rng.uniform(3.2, 5)  # half the road's width, metres
    town = rng.random() < 0.65
    scene.land(half)
    for thing in sorted(_things(scene, half, town), key=_distance, reverse=True):  # the far ones first
        thing.draw(*thing.place)
    noisy = scene.pixels * scene.warm + rng.normal(0, 3, scene.pixels.shape)
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(0.5)), scene.labels


class _Thing(NamedTuple):
    """Something that stands in a scene."""

    z: float  # metres ahead
    draw: Callable
    place: tuple  # the arguments of draw


def _distance(thing: _Thing) -> float:
    return thing.z


def _things(scene: "_Scene", half: float, town: bool) -> list[_Thing]:
    """Cars on a road of `half` metres to each side, houses and trees beside it."""
    rng = scene.rng
    things = []
    for lane in (-1, 1):
        for z in rng.uniform(7, 45, rng.integers(3)):
            things.append(_Thing(z, scene.car, (lane * half * 0.48, z)))
    for side in (-1, 1):
        z = rng.uniform(4, 12)
        while z < 90:
            near = half + rng.uniform(2, 5)
            choice = rng.random()
            if town and choice < 0.7:
                end = z + rng.uniform(7, 14)
                box = (side * near, side * (near + rng.uniform(7, 12)), z, end, rng.uniform(5, 14))
                things.append(_Thing(z, scene.house, box))
                z = end
            elif choice < 0.85:
                x = side * (near + rng.exponential(1 if town else 6))
                things.append(_Thing(z, scene.tree, (x, z)))
            z += rng.uniform(1, 9)
    return things


class _Wall(NamedTuple):
    """An upright wall over the line from (x, z) to (other, end), in metres."""

    x: float
    z: float
    other: float
    end: float

    def point(self, share: float) -> tuple[float, float]:
        """(x, z) at a share of its length."""
        return self.x + share * (self.other - self.x), self.z + share * (self.end - self.z)

    @property
    def length(self) -> float:
        return max(abs(self.other - self.x), self.end - self.z)


class _Scene:
    """A picture under way: pixels (H, W, 3) float 0..255 and labels (H, W) uint8; x right, y up, z ahead, in metres."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng = rng
        self.shape = (height, width)
        self.focus = 0.9 * width  # pixels
        self.middle = width * rng.uniform(0.35, 0.65)  # pixels
        self.horizon = height * rng.uniform(0.38, 0.52)
        # metres of shadow that a metre casts to the right; 0 if overcast
        self.sun = rng.choice([-1, 1]) * rng.uniform(0.3, 1.2) * (rng.random() < 0.8)
        self.warm = 1 + rng.uniform(-0.01, 0.04) * np.array([1, 0.3, -1])
        self.pale = np.array([205, 218, 232]) + rng.normal(0, 6, 3)  # the sky at the horizon
        self.pixels = np.zeros((height, width, 3))
        self.labels = np.zeros((height, width), np.uint8)
        self.shaded = np.zeros((height, width), bool)
        self.grain = self.noise(1)
        self.patches = self.noise(24)

    def noise(self, cell: float) -> np.ndarray:
        """Values around 0 (H, W): soft spots of `cell` pixels and finer ones of less weight."""
        total = np.zeros(self.shape)
        for octave in (1, 2, 4):
            size = max(cell / octave, 1)  # of a spot, in pixels
            spots = self.rng.normal(size=[max(int(side / size), 2) for side in self.shape])
            picture = Image.fromarray(spots.astype(np.float32))
            total += np.asarray(picture.resize(self.shape[::-1], Image.Resampling.BICUBIC)) / octave / 1.8
        return total

    def at(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Where a point is seen, in pixels."""
        z = max(z, 0.8)
        return self.middle + self.focus * x / z, self.horizon - self.focus * (y - EYE) / z

    def flat(self, left: float, right: float, z: float, end: float, y: float = 0) -> Shape:
        """The corners of a level rectangle, in pixels."""
        return [self.at(left, y, z), self.at(right, y, z), self.at(right, y, end), self.at(left, y, end)]

    def region(self, shapes: Iterable[Shape], draw: str = "polygon") -> np.ndarray:
        """What shapes cover, drawn by a method of ImageDraw: (H, W) bool."""
        mask = Image.new("1", self.shape[::-1])
        fill = getattr(ImageDraw.Draw(mask), draw)
        for shape in shapes:
            fill(shape, fill=1)
        return np.asarray(mask)

    def paint(
        self,
        region: np.ndarray,
        label: int,
        colour: ArrayLike,
        z: ArrayLike,
        *,
        grain: float = 0.06,
        patches: float = 0.08,
    ) -> None:
        """Fill a region (H, W) bool with a textured colour, paler with its distance z: a number or (H, W)."""
        dy, dx = self.rng.choice((-1, 1), 2)
        texture = 1 + grain * self.grain[region] + patches * self.patches[::dy, ::dx][region]  # (n,)
        clear = np.exp(-np.asarray(z) / HAZE)
        if clear.ndim:
            clear = clear[region][:, None]  # (n, 1)
        self.pixels[region] = clear * np.asarray(colour) * texture[:, None] + (1 - clear) * self.pale
        self.labels[region] = label

    def shade(self, left: float, right: float, z: float, end: float, height: float) -> None:
        """Darken the ground where a thing of this outline and height keeps the sun off."""
        ends = sorted((left, right, left + self.sun * height, right + self.sun * height))
        dark = self.region([self.flat(ends[0], ends[-1], z, end)] if self.sun and height else [])
        dark = dark & np.isin(self.labels, (GRASS, ROAD)) & ~self.shaded
        self.pixels[dark] *= (0.57, 0.6, 0.66)
        self.shaded |= dark

    def land(self, half: float) -> None:
        """Sky with clouds, three ridges of hills, meadows and a road `half` metres to each side of its middle."""
        rng = self.rng
        height, width = self.shape
        rows = np.broadcast_to(np.arange(height)[:, None], self.shape).astype(float)  # (H, W)
        self.sky(rows)
        columns = np.arange(width) / width  # (W,)
        rise = height * rng.uniform(0.1, 0.3)
        for z in (90, 50, 25):
            waves = np.zeros(width)
            for k in (1, 2, 4, 7):
                waves += np.sin(columns * rng.uniform(2, 5) * k + rng.uniform(0, 7)) / k
            ridge = rows > self.horizon - rise * (0.45 + 0.35 * waves)
            self.paint(ridge, HILLS, (74, 104, 70) + rng.normal(0, 8, 3), z, patches=0.15)
            rise *= 0.7
        ground = rows > self.horizon
        far = EYE * self.focus / np.maximum(rows - self.horizon, 1)  # (H, W) metres
        self.paint(ground, GRASS, (96, 128, 58) + rng.normal(0, 12, 3), far, grain=0.12, patches=0.15)
        self.road(half, ground, far)

    def sky(self, rows: np.ndarray) -> None:
        """A sky with clouds all over the picture; rows: the row of each pixel (H, W)."""
        rng = self.rng
        top = np.array([70, 120, 195]) + rng.normal(0, 9, 3) if self.sun else np.array([150, 166, 188])
        self.pixels[:] = top + (self.pale - top) * np.clip(rows / self.horizon, 0, 1)[..., None]
        clouds = np.clip(self.noise(60) - rng.uniform(0, 0.8), 0, 1)[..., None]  # (H, W, 1)
        self.pixels += (245 - self.pixels) * clouds * (0.9 if self.sun else 0.4)

    def road(self, half: float, ground: np.ndarray, far: np.ndarray) -> None:
        """A road between kerbs, with lines on it, where there is ground (H, W) bool; far: its distance (H, W)."""
        kerb = self.region([self.flat(-half - 0.5, half + 0.5, 0, 300)])
        asphalt = self.region([self.flat(-half, half, 0, 300)])
        grey = self.rng.uniform(88, 118)
        self.paint(kerb & ground, ROAD, (150, 146, 140), far)
        self.paint(asphalt & ground, ROAD, (grey, grey, grey), far)
        lines = []
        for start in np.arange(self.rng.uniform(0, 5), 80, 5):
            lines.append(self.flat(-0.08, 0.08, start, start + 2.2))
        for edge in (-0.93 * half, 0.93 * half):
            lines.append(self.flat(edge - 0.06, edge + 0.06, 0, 300))
        self.paint(self.region(lines) & ground, ROAD, (225, 225, 215), far)

    def block(
        self,
        x: float,
        other: float,
        z: float,
        end: float,
        low: float,
        high: float,
        label: int,
        colour: ArrayLike,
        *,
        windows: bool = False,
    ) -> None:
        """A block from x (towards the road) to other, z to end, low to high; its top shows if below the camera."""
        self.shade(x, other, z, end, high if low == 0 else 0)
        top = [self.flat(x, other, z, end, high)] if high < EYE else []
        self.paint(self.region(top), label, colour, z)
        side_light = 0.95 if not self.sun else 0.85 + 0.3 * np.sign(self.sun * x)
        front = _Wall(x, z, other, z)
        along = _Wall(x, z, x, end)
        for wall, light in ((front, 0.9), (along, side_light)):
            self.paint(
                self.region([self.upright(wall, 0, 1, low, high)]), label, np.asarray(colour) * light, z
            )
            panes = self.panes(wall, high) if windows else []
            self.paint(self.region(panes), label, (60, 72, 88), z, patches=0.2)

    def upright(self, wall: _Wall, start: float, stop: float, low: float, high: float) -> Shape:
        """The corners of a rectangle on a wall, from a share of its length to another, low to high, in pixels."""
        left, near = wall.point(start)
        right, far = wall.point(stop)
        bottom = [self.at(left, low, near), self.at(right, low, far)]
        return [*bottom, self.at(right, high, far), self.at(left, high, near)]

    def panes(self, wall: _Wall, high: float) -> list[Shape]:
        """Windows in every storey of a wall `high` metres high."""
        count = max(int(wall.length / 2.4), 1)
        panes = []
        for i in range(count):
            for y in np.arange(0.9, high - 1.8, 2.9):
                panes.append(self.upright(wall, (i + 0.28) / count, (i + 0.74) / count, y, y + 1.5))
        return panes

    def house(self, x: float, other: float, z: float, end: float, high: float) -> None:
        """A house with windows; see `block`."""
        colour = WALLS[self.rng.integers(5)] + self.rng.normal(0, 8, 3)
        self.block(x, other, z, end, 0, high, BUILDING, colour, windows=True)

    def car(self, x: float, z: float) -> None:
        """A car whose middle is x metres to the right and whose end is z metres ahead."""
        colour = PAINTS[self.rng.integers(6)]
        inner = -np.sign(x)
        parts = (  # half the width, from z, to z, from y, to y, colour
            (0.85, 0.1, 3.9, 0, 0.3, (28, 28, 30)),  # wheels
            (0.9, 0, 4, 0.3, 0.9, colour),  # body
            (0.7, 0.7, 3, 0.9, 1.4, (58, 66, 78)),  # windows
            (0.65, 0.8, 2.9, 1.4, 1.5, colour),  # roof
        )
        for half, start, end, low, high, shown in parts:
            self.block(x + half * inner, x - half * inner, z + start, z + end, low, high, CAR, shown)

    def tree(self, x: float, z: float) -> None:
        """A tree x metres to the right and z metres ahead."""
        rng = self.rng
        height = rng.uniform(3, 8)
        self.shade(x - height / 4, x + height / 4, z, z + height / 3, height)
        trunk = [self.at(x - 0.15, 0, z), self.at(x + 0.15, 0, z), self.at(x, 0.8 * height, z)]
        self.paint(self.region([trunk]), TREE, (84, 66, 50), z)
        green = (58, 92, 42) + rng.normal(0, 10, 3)
        for sunny in np.linspace(-0.5, 0.5, 24):  # clumps of leaves, the sunny ones last
            dx, dy = rng.normal(0, height / 8, 2).clip(-height / 6, height / 6)
            to_the_sun = dx - sunny * height / 5 * np.sign(self.sun)
            u, v = self.at(x + to_the_sun, 0.66 * height + dy + sunny * height / 5, z)
            r = self.focus * height * rng.uniform(0.06, 0.13) / z
            leaves = self.region([(u - r, v - r, u + r, v + r)], "ellipse")
            self.paint(leaves, TREE, green * (0.95 + 0.6 * sunny), z, grain=0.22)
