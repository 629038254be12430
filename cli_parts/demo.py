"""`stego demo`: fit, predict and score on drawn scenes; everything that comes out lies in one folder."""

from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from cli_parts import evaluation as protocol
from cli_parts import sheets as report
from cli_parts.drawing import with_legend
from cli_parts.labels import folder_set
from cli_parts.outputs import check_folder
from stego import Stego
from stego_parts.files import write_bytes
from stego_parts.images import mask_image, read_image, write_image
from stego_parts.running import Progress, no_progress

SCENE_CLASSES = ("sky", "hills", "grass", "road", "building", "tree", "car")
SKY, HILLS, GRASS, ROAD, BUILDING, TREE, CAR = range(7)
EYE = 2.2  # metres from the ground to the camera
HAZE = 120  # metres after which two thirds of a colour are that of the horizon
WALLS = ((178, 150, 120), (160, 96, 78), (200, 190, 170), (140, 138, 140), (196, 168, 110))
PAINTS = ((170, 30, 30), (40, 60, 120), (215, 215, 218), (40, 42, 46), (120, 125, 130), (200, 160, 40))

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
        write_image(image, folder / "images" / split / name, note="")
        write_image(Image.fromarray(labels), folder / "labels" / split / name, note="")
        progress("drawing", number + 1, len(splits))
    write_bytes("".join(f"{name}\n" for name in SCENE_CLASSES).encode(), folder / "classes.txt")


def run_demo(folder: Path, *, seed: int = 0, progress: Progress = no_progress) -> str:
    """Leave images, labels, a model, masks, overlays, sheets and scores in a folder; returns the scores, as a table."""
    draw_scenes(folder, seed=seed, progress=progress)
    folders, names = (folder / "images", folder / "labels"), folder / "classes.txt"
    train, val = (folder_set(*(each / split for each in folders), names=names) for split in SCENES)
    paths = [path for path, _ in train.pairs]
    options = dict(clusters=len(SCENE_CLASSES), backbone="tiny", steps=STEPS, seed=seed)
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


def draw_scene(seed: int, height: int = 240, width: int = 320) -> tuple[Image.Image, np.ndarray]:
    """A synthetic road through a town or a landscape, and its labels (H, W) uint8 into SCENE_CLASSES."""
    scene = _Scene(np.random.default_rng(seed), height, width)
    rng, half = scene.rng, scene.rng.uniform(3.2, 5)  # half the road's width, metres
    town = rng.random() < 0.65
    scene.land(half)
    things = []
    for lane in (-1, 1):
        things += [(z, scene.car, (lane * half * 0.48, z)) for z in rng.uniform(7, 45, rng.integers(3))]
    for side in (-1, 1):
        z = rng.uniform(4, 12)
        while z < 90:
            near, choice = half + rng.uniform(2, 5), rng.random()
            if town and choice < 0.7:
                end = z + rng.uniform(7, 14)
                box = (side * near, side * (near + rng.uniform(7, 12)), z, end, 0, rng.uniform(5, 14))
                things.append((z, scene.house, box))
                z = end
            elif choice < 0.85:
                things.append((z, scene.tree, (side * (near + rng.exponential(1 if town else 6)), z)))
            z += rng.uniform(1, 9)
    for _, draw, place in sorted(things, key=lambda thing: -thing[0]):  # the far ones first
        draw(*place)
    noisy = scene.pixels * scene.warm + rng.normal(0, 3, scene.pixels.shape)
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(0.5)), scene.labels


class _Scene:
    """A picture under way: pixels (H, W, 3) float 0..255 and labels (H, W); x right, y up, z ahead, in metres."""

    def __init__(self, rng, height: int, width: int):
        self.rng, self.size, self.shape = rng, (width, height), (height, width)
        self.focus, self.middle = 0.9 * width, width * rng.uniform(0.35, 0.65)  # pixels
        self.horizon = height * rng.uniform(0.38, 0.52)
        # metres of shadow that a metre casts to the right; 0 if overcast
        self.sun = rng.choice([-1, 1]) * rng.uniform(0.3, 1.2) * (rng.random() < 0.8)
        self.warm = 1 + rng.uniform(-0.01, 0.04) * np.array([1, 0.3, -1])
        self.pale = np.array([205, 218, 232]) + rng.normal(0, 6, 3)  # the sky at the horizon
        self.pixels, self.labels = np.zeros((*self.shape, 3)), np.zeros(self.shape, np.uint8)
        self.shaded, self.grain, self.patches = np.zeros(self.shape, bool), self.noise(1), self.noise(24)

    def noise(self, cell: float) -> np.ndarray:
        """Values around 0 (H, W): soft spots of `cell` pixels and finer ones of less weight."""
        total = np.zeros(self.shape)
        for octave in (1, 2, 4):
            spots = self.rng.normal(size=[max(int(side / max(cell / octave, 1)), 2) for side in self.shape])
            spots = Image.fromarray(spots.astype(np.float32)).resize(self.size, Image.Resampling.BICUBIC)
            total += np.asarray(spots) / octave / 1.8
        return total

    def at(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Where a point is seen, in pixels."""
        z = max(z, 0.8)
        return self.middle + self.focus * x / z, self.horizon - self.focus * (y - EYE) / z

    def flat(self, left: float, right: float, z: float, end: float, y: float = 0) -> list:
        """A level rectangle."""
        return [self.at(left, y, z), self.at(right, y, z), self.at(right, y, end), self.at(left, y, end)]

    def region(self, shapes, draw: str = "polygon") -> np.ndarray:
        mask = Image.new("1", self.size)
        fill = getattr(ImageDraw.Draw(mask), draw)
        for shape in shapes:
            fill(shape, fill=1)
        return np.asarray(mask)  # (H, W) bool

    def paint(self, region, label: int, colour, z, *, grain: float = 0.06, patches: float = 0.08):
        """Fill a region (H, W) bool with a textured colour, paler with its distance z: a number or (H, W)."""
        dy, dx = self.rng.choice((-1, 1), 2)
        texture = 1 + grain * self.grain + patches * self.patches[::dy, ::dx]
        clear = np.broadcast_to(np.exp(-np.asarray(z) / HAZE), self.shape)[region][:, None]
        self.pixels[region] = clear * np.asarray(colour) * texture[region][:, None] + (1 - clear) * self.pale
        self.labels[region] = label

    def shade(self, left: float, right: float, z: float, end: float, height: float):
        """Darken the ground where a thing of this outline and height keeps the sun off."""
        ends = sorted((left, right, left + self.sun * height, right + self.sun * height))
        dark = self.region([self.flat(ends[0], ends[-1], z, end)] if self.sun and height else [])
        dark = dark & np.isin(self.labels, (GRASS, ROAD)) & ~self.shaded
        self.pixels[dark] *= (0.57, 0.6, 0.66)
        self.shaded |= dark

    def land(self, half: float):
        """Sky with clouds, three ridges of hills, meadows and a road `half` metres to each side of its middle."""
        rng, (height, width) = self.rng, self.shape
        rows, columns = np.arange(height)[:, None] + np.zeros(width), np.arange(width) / width
        top = np.array([70, 120, 195]) + rng.normal(0, 9, 3) if self.sun else np.array([150, 166, 188])
        self.pixels[:] = top + (self.pale - top) * np.clip(rows / self.horizon, 0, 1)[..., None]
        clouds = np.clip(self.noise(60) - rng.uniform(0, 0.8), 0, 1)[..., None]
        self.pixels += (245 - self.pixels) * clouds * (0.9 if self.sun else 0.4)
        rise = height * rng.uniform(0.1, 0.3)
        for z in (90, 50, 25):
            waves = sum(np.sin(columns * rng.uniform(2, 5) * k + rng.uniform(0, 7)) / k for k in (1, 2, 4, 7))
            ridge = rows > self.horizon - rise * (0.45 + 0.35 * waves)
            self.paint(ridge, HILLS, (74, 104, 70) + rng.normal(0, 8, 3), z, patches=0.15)
            rise *= 0.7
        z, ground = EYE * self.focus / np.maximum(rows - self.horizon, 1), rows > self.horizon
        self.paint(ground, GRASS, (96, 128, 58) + rng.normal(0, 12, 3), z, grain=0.12, patches=0.15)
        for half_width, colour in ((half + 0.5, (150, 146, 140)), (half, np.full(3, rng.uniform(88, 118)))):
            self.paint(self.region([self.flat(-half_width, half_width, 0, 300)]) & ground, ROAD, colour, z)
        marks = [self.flat(-0.08, 0.08, start, start + 2.2) for start in np.arange(rng.uniform(0, 5), 80, 5)]
        marks += [self.flat(edge - 0.06, edge + 0.06, 0, 300) for edge in (-0.93 * half, 0.93 * half)]
        self.paint(self.region(marks) & ground, ROAD, (225, 225, 215), z)

    def block(self, x, other, z, end, low, high, label: int, colour, *, windows: bool = False):
        """A block from x (towards the road) to other, z to end, low to high; its top shows if below the camera."""
        self.shade(x, other, z, end, high if low == 0 else 0)
        self.paint(self.region([self.flat(x, other, z, end, high)] if high < EYE else []), label, colour, z)
        side_light = 0.95 if not self.sun else 0.85 + 0.3 * np.sign(self.sun * x)
        for x1, z1, light in ((other, z, 0.9), (x, end, side_light)):  # the front; the side along the road

            def quad(u, w, a, b, x1=x1, z1=z1):
                corners = ((u, a), (w, a), (w, b), (u, b))
                return [self.at(x + t * (x1 - x), y, z + t * (z1 - z)) for t, y in corners]

            self.paint(self.region([quad(0, 1, low, high)]), label, np.asarray(colour) * light, z)
            count = max(int(max(abs(x1 - x), z1 - z) / 2.4), 1) if windows else 0
            storeys = np.arange(0.9, high - 1.8, 2.9)
            panes = [((i + 0.28) / count, (i + 0.74) / count, y) for i in range(count) for y in storeys]
            panes = [quad(left, right, y, y + 1.5) for left, right, y in panes]
            self.paint(self.region(panes), label, (60, 72, 88), z, patches=0.2)

    def house(self, *box):
        self.block(*box, BUILDING, WALLS[self.rng.integers(5)] + self.rng.normal(0, 8, 3), windows=True)

    def car(self, x: float, z: float):
        colour, inner = PAINTS[self.rng.integers(6)], -np.sign(x)
        parts = (  # half the width, from z, to z, from y, to y, colour
            (0.85, 0.1, 3.9, 0, 0.3, (28, 28, 30)),  # wheels
            (0.9, 0, 4, 0.3, 0.9, colour),  # body
            (0.7, 0.7, 3, 0.9, 1.4, (58, 66, 78)),  # windows
            (0.65, 0.8, 2.9, 1.4, 1.5, colour),  # roof
        )
        for half, start, end, low, high, shown in parts:
            self.block(x + half * inner, x - half * inner, z + start, z + end, low, high, CAR, shown)

    def tree(self, x: float, z: float):
        rng, height = self.rng, self.rng.uniform(3, 8)
        self.shade(x - height / 4, x + height / 4, z, z + height / 3, height)
        trunk = [self.at(x - 0.15, 0, z), self.at(x + 0.15, 0, z), self.at(x, 0.8 * height, z)]
        self.paint(self.region([trunk]), TREE, (84, 66, 50), z)
        green = (58, 92, 42) + rng.normal(0, 10, 3)
        for sunny in np.linspace(-0.5, 0.5, 24):  # clumps of leaves, the sunny ones last
            dx, dy = rng.normal(0, height / 8, 2).clip(-height / 6, height / 6)
            dx, dy = dx - sunny * height / 5 * np.sign(self.sun), dy + sunny * height / 5
            u, v = self.at(x + dx, 0.66 * height + dy, z)
            r = self.focus * height * rng.uniform(0.06, 0.13) / z
            leaves = self.region([(u - r, v - r, u + r, v + r)], "ellipse")
            self.paint(leaves, TREE, green * (0.95 + 0.6 * sunny), z, grain=0.22)
