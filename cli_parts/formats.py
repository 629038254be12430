"""What `predict --format` can write, a record each. Imports nothing heavy: `--help` lists them."""

from typing import NamedTuple

JSON = (".json",)
PICTURE = (".png", ".jpg", ".jpeg")
TIFF = (".tif", ".tiff")


class Format(NamedTuple):
    """A format of predict.

    suffixes: that a file of it may have; ending: what its files in a folder end with, by default the first suffix;
    plural: what a summary calls them; document: the name of the one file for all images, "" where each image has its
    own; from_probabilities: it needs more than a mask; is_mask: --overlay goes with it; has_regions: --min-area does.
    """

    suffixes: tuple[str, ...]
    plural: str
    ending: str = ""
    document: str = ""
    from_probabilities: bool = False
    is_mask: bool = False
    has_regions: bool = False

    @property
    def suffix(self) -> str:
        return self.ending or self.suffixes[0]


FORMATS = {
    "mask": Format((".png", *TIFF), "masks", is_mask=True),
    "tif": Format(TIFF, "masks", is_mask=True),
    "overlay": Format(PICTURE, "overlays", ending=".overlay.jpg"),
    "cutout": Format((".png",), "cut-outs", from_probabilities=True),
    "npz": Format((".npz",), "probabilities", from_probabilities=True),
    "json": Format(JSON, "shares", document="shares.json"),
    "csv": Format((".csv",), "shares", document="shares.csv"),
    "coco": Format(JSON, "segments", document="coco.json", has_regions=True),
}
