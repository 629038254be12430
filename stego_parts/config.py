"""Every option of a fit: its defaults, its range, and the published values (App. A.11, the released configurations)."""

import logging
import math
import os
from dataclasses import dataclass, fields
from typing import Any

NOTICE = logging.INFO + 5  # level of messages that are said unless --quiet

# What the backbone sees of an image: five crops, each alone (Sec. 4); all of it; all of it, then cut into five.
VIEWS = ("five", "whole", "windows")
TERMS = ("self", "knn", "rand")  # pairs within an image, with a neighbour, with another image
MAX_CLASSES = 255  # masks are 8 bit and 255 means "ignore"
RELEASED = "released"  # the preset of models that the reference implementation made
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
KINDS |= {int | None: KINDS[int], float | None: "a number, or data: taken from the data"}
LEAST = dict(steps=1, batch_size=1, code_size=1, tile=0, feature_weight=0, adaptation=0)
LEAST |= {f"lambda_{term}": 0 for term in TERMS}
NOTED_SOURCES = 16  # folders, patterns and files given to fit up to which a model notes their names


@dataclass(frozen=True)
class Config:
    """Every option of a fit. A b of None is taken from the data, a lambda of 0 switches its term off.

    Raises ValueError for a value out of its range.
    """

    preset: str = "default"
    backbone: str = "auto"
    stride: int | None = None  # pixels from one feature to the next; None: the backbone's own
    classes: int | str = 27  # clusters, 1 to 255; "auto": as many as halves of the images agree on
    seed: int = 0
    steps: int = 2000
    batch_size: int = 16  # crops a step
    code_size: int = 70
    lambda_self: float = 0.67
    lambda_knn: float = 0.25
    lambda_rand: float = 0.63
    b_self: float | None = None
    b_knn: float | None = None
    b_rand: float | None = None
    centering: bool = True  # spatial centering (Eq. 3)
    zero_clamp: bool = True  # Sec. 3.2
    views: str = "five"  # one of VIEWS
    evenness: float = 0.0  # 0: clusters follow what is frequent, 1: also what is rare
    feature_weight: float = 0.0  # of the features themselves beside the codes in what is clustered
    adaptation: float = 0.0  # of an image's codes in its own centres, see maps.adapted_centers
    tile: int = 0  # side in pixels of the parts in which larger images are seen; 0: whole
    cache_size: float = 8.0  # GB (10^9 bytes) of features
    crops: int = 0  # that the fit saw
    images: tuple = ()  # what the fit was given, by name

    @classmethod
    def from_saved(cls, saved: dict) -> "Config":
        """The config in a model file, without options that this version does not have."""
        known = {field.name: saved[field.name] for field in fields(cls) if field.name in saved}
        return cls(**known | dict(images=tuple(saved.get("images", ()))))

    def __post_init__(self):
        if self.preset == RELEASED:
            return  # the reference's checkpoints do not tell
        for field in fields(self):
            value = getattr(self, field.name)
            kind = field.type | int if field.type in (float, float | None) else field.type
            if not isinstance(value, kind):
                needed = KINDS.get(field.type, "another value")
                raise ValueError(f"Got {field.name} {value!r}; {needed} is needed.")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"Got {field.name} {value}; a finite number is needed.")
        if self.classes != "auto" and (isinstance(self.classes, str) or not 1 <= self.classes <= MAX_CLASSES):
            raise ValueError(
                f"Got {self.classes} classes; 1 to {MAX_CLASSES} fit into 8 bits, auto finds a number."
            )
        if self.views not in VIEWS:
            raise ValueError(f"Unknown views {self.views!r}; choose one of: {', '.join(VIEWS)}.")
        if not 0 <= self.evenness <= 1:
            raise ValueError(f"Got evenness {self.evenness}; it lies between 0 and 1.")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"Got {name} {getattr(self, name)}; it must be at least {least}.")
        if not (self.lambda_self or self.lambda_knn or self.lambda_rand) or self.cache_size <= 0:
            raise ValueError(
                f"Got lambdas of {self.lambda_self}, {self.lambda_knn}, {self.lambda_rand} and cache_size "
                f"{self.cache_size}; one lambda and cache_size are above 0."
            )


# Each with the backbone that it was tuned for; `--preset` and `--dataset` take that one unless another is named.
_SMALL = dict(backbone="dino_vits8_300ep", b_self=0.18, b_knn=0.12, b_rand=0.46, steps=5000)
_BASE = dict(backbone="dino_vitb8", steps=7000, batch_size=32)
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
# "default" with the bundled backbone: what was measured with it.
ON_TINY = dict(steps=300, views="windows", evenness=1.0, adaptation=8.0)
# What --set can set.
_OPTIONS = ("preset", "backbone", "classes", "seed", "steps", "crops", "images")
CLUSTERING = ("classes", "seed", "evenness", "adaptation")  # what a trained head does not depend on
SETTINGS = {field.name: field.type for field in fields(Config) if field.name not in _OPTIONS}


def clustering_settings(config: Config, given: dict) -> dict:
    """The settings of a model that is clustered anew, with what is given in their place.

    ValueError for what its head depends on, which is there already.
    """
    if config.preset == RELEASED:
        raise ValueError(
            "A checkpoint of the reference implementation cannot be clustered anew; fit a model."
        )
    given = {name: value for name, value in given.items() if value is not None}
    if fixed := given.keys() - set(CLUSTERING):
        raise ValueError(
            f"Got {', '.join(sorted(fixed))} for a model that is clustered anew; it keeps its head and settings, only "
            f"{', '.join(CLUSTERING)} can be given."
        )
    return vars(config) | given


def fit_config(preset: str | None = None, *, backbone: str | None = None, **settings) -> Config:
    """The preset's options with what is given in their place; ValueError for what cannot be."""
    preset = preset or "default"
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}.")
    if unknown := settings.keys() - {field.name for field in fields(Config)}:
        raise ValueError(f"Unknown setting {sorted(unknown)[0]!r}; there are {', '.join(SETTINGS)}.")
    values = PRESETS[preset] | (ON_TINY if (preset, backbone) == ("default", "tiny") else {})
    given = {name: value for name, value in settings.items() if value is not None or name.startswith("b_")}
    return Config(**values | given | dict(preset=preset) | (dict(backbone=backbone) if backbone else {}))


def source_names(sources) -> tuple[str, ...]:
    """What a fit was given, for whoever looks for its images later; no absolute paths: they tell of a person's disk."""
    names = tuple(map(str, sources))
    return () if len(names) > NOTED_SOURCES or any(map(os.path.isabs, names)) else names


def parse_settings(texts) -> dict[str, Any]:
    """Texts NAME=VALUE as keywords of `Stego.fit`; ValueError listing what there is."""
    settings: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        value = value.strip().lower()
        try:
            if (kind := SETTINGS[name]) is bool:
                settings[name] = {"true": True, "false": False}[value]
            elif kind is str or value == "data" and name.startswith("b_"):
                settings[name] = value if kind is str else None
            else:
                settings[name] = int(value) if kind in (int, int | None) else float(value)
        except (KeyError, TypeError, ValueError) as error:
            known = ", ".join(f"{name} ({KINDS[kind]})" for name, kind in SETTINGS.items())
            raise ValueError(f"Got the setting {text!r}; give NAME=VALUE with one of: {known}.") from error
    return settings
