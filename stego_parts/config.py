"""Every option of a fit: its defaults, its range, and the published values (App. A.11, the released configurations)."""

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

NOTICE = logging.INFO + 5  # level of messages that are said unless --quiet

# What the backbone sees of an image: five crops, each alone (Sec. 4); all of it; all of it, then cut into five.
VIEWS = ("five", "whole", "windows")
TERMS = ("self", "knn", "rand")  # pairs within an image, with a neighbour, with another image
MAX_CLUSTERS = 255  # masks are 8 bit and 255 means "ignore"
RELEASED = "released"  # the preset of models that the reference implementation made
KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
KINDS[tuple] = "one or three numbers from 1, such as 4,3,2"
KINDS |= {int | None: KINDS[int], float | None: KINDS[float]}
LEAST = dict(steps=1, learning_rate=0, batch_size=1, code_size=1, tile=0, feature_weight=0, adaptation=0)
LEAST |= {f"lambda_{term}": 0 for term in TERMS}
# App. A.11, what the default differs in
PUBLISHED = dict(learning_rate=5e-4, decay=False, centering=True, views="five", evenness=0.0, adaptation=0.0)
NOTED_SOURCES = 16  # folders, patterns and files given to fit up to which a model notes their names


@dataclass(frozen=True)
class Config:
    """Every option of a fit. A lambda of 0 switches its term off.

    A b of None is taken from the data; steps and a learning rate of None are what suits the backbone, see SUITED, and
    filled in by `on_backbone`. Raises ValueError for a value out of its range.
    """

    preset: str = "default"
    backbone: str = "auto"
    stride: int | None = None  # pixels from one feature to the next; None: the backbone's own
    clusters: int = 27  # 1 to 255
    seed: int = 0
    steps: int | None = None
    learning_rate: float | None = None  # of Adam
    decay: bool = True  # the learning rate falls linearly to 0 over the steps
    batch_size: int = 16  # crops a step
    code_size: int = 70
    lambda_self: float = 0.67
    lambda_knn: float = 0.25
    lambda_rand: float = 0.63
    b_self: float | None = (
        None  # cosines: features that correspond by more than b pull codes together (Eq. 4)
    )
    b_knn: float | None = None
    b_rand: float | None = None
    centering: bool = False  # spatial centering (Eq. 3)
    zero_clamp: bool = True  # Sec. 3.2
    views: str = "windows"  # one of VIEWS
    evenness: float = 0.5  # 0 to 1; 0: clusters follow what is frequent, 1: also what is rare
    feature_weight: float = 0.0  # of the features themselves beside the codes (1) in what is clustered
    adaptation: float = 8.0  # weight of an image's codes in its own centres, see clusters.adapted_centers
    tile: int = 0  # side in pixels of the parts in which larger images are seen; 0: whole
    bands: tuple = ()  # numbers, from 1, of those shown as red, green and blue, or as grey; (): the first three
    cache_size: float = 8.0  # GB (10^9 bytes) of features
    crops: int = 0  # that the fit saw
    images: tuple = ()  # what the fit was given, by name

    @classmethod
    def from_saved(cls, saved: dict) -> "Config":
        """The config in a model file, without options that this version does not have."""
        saved = saved | {"clusters": saved.get("clusters", saved.get("classes"))}  # its name in older files
        saved = PUBLISHED | saved  # those of all fits before there was a choice
        known = {field.name: saved[field.name] for field in fields(cls) if field.name in saved}
        tuples = {name: tuple(saved.get(name, ())) for name in ("images", "bands")}
        return cls(**known | tuples)

    def on_backbone(self, name: str, **known: Any) -> "Config":
        """The same for a backbone, with the training that suits it where none is asked for, and what is known of it."""
        suited = SUITED.get(name, SUITED["others"])
        missing = {option: value for option, value in suited.items() if getattr(self, option) is None}
        return replace(self, backbone=name, **missing, **known)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a training step, counted from 0."""
        assert self.steps is not None and self.learning_rate is not None  # filled in by on_backbone
        return self.learning_rate * (1 - step / self.steps if self.decay else 1)

    def __post_init__(self) -> None:
        if self.preset == RELEASED:
            return  # the reference's checkpoints do not tell
        for field in fields(self):
            check_kind(field.name, field.type, getattr(self, field.name))
        if not 1 <= self.clusters <= MAX_CLUSTERS:
            raise ValueError(f"Got {self.clusters} clusters; 1 to {MAX_CLUSTERS} fit into 8 bits.")
        if self.views not in VIEWS:
            raise ValueError(f"Unknown views {self.views!r}; choose one of: {', '.join(VIEWS)}.")
        if len(self.bands) not in (0, 1, 3) or not all(
            isinstance(each, int) and each > 0 for each in self.bands
        ):
            raise ValueError(f"Got bands {self.bands}; give one or three numbers from 1, such as 4,3,2.")
        if not 0 <= self.evenness <= 1:
            raise ValueError(f"Got evenness {self.evenness}; it lies between 0 and 1.")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Got {name} {value}; it must be at least {least}.")
        if not (self.lambda_self or self.lambda_knn or self.lambda_rand) or self.cache_size <= 0:
            raise ValueError(
                f"Got lambdas of {self.lambda_self}, {self.lambda_knn}, {self.lambda_rand} and cache_size "
                f"{self.cache_size}; one lambda and cache_size are above 0."
            )


def in_words(name: str, kind: Any) -> str:
    """What an option's value may be."""
    return KINDS.get(kind, "another value") + (
        ", or data: taken from the data" if name.startswith("b_") else ""
    )


def check_kind(name: str, kind: Any, value: object) -> None:
    """ValueError for an option's value that is not of its type, or not finite."""
    number = kind in (float, float | None)
    if not isinstance(value, kind | int if number else kind):
        raise ValueError(f"Got {name} {value!r}; {in_words(name, kind)} is needed.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"Got {name} {value}; a finite number is needed.")


# The training that suits a backbone, by what was measured with it.
SUITED: dict[str, dict] = {
    "tiny": dict(steps=300, learning_rate=4e-3),
    "tiny_detail": dict(steps=300, learning_rate=2e-3),
    "others": dict(steps=1000, learning_rate=2e-3),
}
# Each with the backbone that it was tuned for; `--preset` and `--dataset` take that one unless another is named.
_SMALL = PUBLISHED | dict(backbone="dino_vits8_300ep", b_self=0.18, b_knn=0.12, b_rand=0.46, steps=5000)
_BASE = PUBLISHED | dict(backbone="dino_vitb8", steps=7000, batch_size=32)
_CITY_LAMBDAS = dict(lambda_self=1.00, lambda_knn=0.58, lambda_rand=0.91)
_COCO_LAMBDAS = dict(lambda_self=0.10, lambda_knn=1.00, lambda_rand=0.15)
PRESETS: dict[str, dict] = {
    "default": {},
    "small": _SMALL,
    "cocostuff-small": _SMALL | dict(b_self=0.08, b_knn=0.02, b_rand=0.66),
    "potsdam": _SMALL | dict(b_self=0.08, b_knn=0.02, b_rand=0.46, views="whole"),
    "cityscapes": _BASE
    | _CITY_LAMBDAS
    | dict(b_self=0.46, b_knn=0.18, b_rand=0.31, code_size=100, centering=False),
    "cocostuff": _BASE | _COCO_LAMBDAS | dict(b_self=0.12, b_knn=0.20, b_rand=1.00, code_size=90),
}
# What --set can set.
_OPTIONS = ("preset", "backbone", "clusters", "seed", "steps", "crops", "images")
CLUSTERING = ("clusters", "seed", "evenness", "adaptation")  # what a trained head does not depend on
SETTINGS = {field.name: field.type for field in fields(Config) if field.name not in _OPTIONS}


def fit_config(preset: str | None = None, *, backbone: str | None = None, **settings: Any) -> Config:
    """The preset's options with what is given in their place; ValueError for what cannot be.

    A setting of None is not given, but of a b: taken from the data.
    """
    preset = preset or "default"
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}.")
    unknown = settings.keys() - {field.name for field in fields(Config)}
    if unknown:
        raise ValueError(f"Unknown setting {min(unknown)!r}; there are {', '.join(SETTINGS)}.")
    given = {name: plain(x) for name, x in settings.items() if x is not None or name.startswith("b_")}
    config = Config(**PRESETS[preset] | given | {"preset": preset})
    return replace(config, backbone=backbone) if backbone else config


def plain(value: Any) -> Any:
    """A number of numpy's as one of Python's: a model file with the former could not be read again."""
    return value.item() if hasattr(value, "item") else value


def recluster_config(config: Config, settings: dict) -> Config:
    """The config of a model that is clustered anew, with what is given in its place.

    ValueError for what its head depends on, which is there already.
    """
    if config.preset == RELEASED:
        raise ValueError(
            "A checkpoint of the reference implementation cannot be clustered anew; fit a model."
        )
    given = {name: plain(value) for name, value in settings.items() if value is not None}
    fixed = given.keys() - set(CLUSTERING)
    if fixed:
        raise ValueError(
            f"Got {', '.join(sorted(fixed))} for a model that is clustered anew; it keeps its head and settings, only "
            f"{', '.join(CLUSTERING)} can be given."
        )
    return replace(config, **given)


def source_names(sources: Any) -> tuple[str, ...]:
    """What a fit was given, for whoever looks for its images later; no absolute paths: they tell of a person's disk."""
    names = (str(sources),) if isinstance(sources, (str, os.PathLike)) else tuple(map(str, sources))
    stdin = "-" in names  # a list that is gone by then
    return () if len(names) > NOTED_SOURCES or stdin or any(map(os.path.isabs, names)) else names


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Texts NAME=VALUE as keywords of `Stego.fit`; ValueError saying what is wrong with one."""
    settings: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in SETTINGS:
            raise ValueError(f"Got the setting {text!r}; give NAME=VALUE with one of: {', '.join(SETTINGS)}.")
        try:
            settings[name] = parse_value(name, value.strip().lower())
        except (KeyError, ValueError) as error:
            needed = in_words(name, SETTINGS[name])
            raise ValueError(f"Got the setting {text!r}; {name}= needs {needed}.") from error
    return settings


def parse_value(name: str, text: str) -> Any:
    """The value of a setting from its text; KeyError or ValueError for what is none."""
    kind = SETTINGS[name]
    if kind is bool:
        return {"true": True, "false": False}[text]
    if kind is str:
        return text
    if kind is tuple:
        return tuple(int(each) for each in text.split(","))
    if name.startswith("b_") and text == "data":
        return None
    return int(text) if kind in (int, int | None) else float(text)
