"""A model as one ONNX file, backbone included, for programs without Python or torch (`stego show --export`)."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from stego import Stego
from stego_parts.clusters import Probe, mirror_averaged
from stego_parts.features import MEAN, RESOLUTION, STD, input_image
from stego_parts.files import replacing
from stego_parts.images import read_image
from stego_parts.running import Progress, no_progress

NEEDED = ("onnx", "onnxscript")  # what torch's exporter needs beside torch


class Scores(nn.Module):
    """An image (1, 3, H, W), RGB from 0 to 1 -> the cosine of each position to each cluster, (1, K, h, w).

    As `Stego.predict` has them before anything is upsampled: of the image and its mirror image together, to the
    centres of this image.
    """

    def __init__(self, model: Stego) -> None:
        super().__init__()
        self.centers: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.backbone = model.backbone
        self.head = model.head
        self.adaptation = model.config.adaptation or 0.0
        for name, value in (("centers", model.centers), ("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.as_tensor(value))

    def forward(self, image: Tensor) -> Tensor:
        """(1, 3, H, W), 0 to 1 -> (1, K, h, w)."""
        x = (image - self.mean[:, None, None]) / self.std[:, None, None]
        codes = mirror_averaged(x, self.backbone, self.head.on_map)[0]  # (1, D, h, w)
        probe = Probe(self.centers, adaptation=self.adaptation).adapted(codes)
        return probe.dot_products(F.normalize(codes))


def write_onnx(
    model: Stego, path: Path, image: Path | None = None, *, progress: Progress = no_progress
) -> tuple[int, int]:
    """Write `Scores` for images of one size, that at which the model sees an image, or a square: (width, height).

    The file's metadata has the clusters' names, under `names`, as a JSON list. ValueError without the exporter.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f'ONNX needs {" and ".join(missing)}; get it with `pip install "stego[onnx]"`.')
    picture = Image.new("RGB", (RESOLUTION, RESOLUTION)) if image is None else read_image(image)
    width, height = input_image(picture, model.backbone.patch).size
    progress("export", 0, 1)
    scores = Scores(model).eval()
    x = torch.zeros(1, 3, height, width, device=model.device)
    options: dict = dict(input_names=["image"], output_names=["scores"], dynamo=True, verbose=False)
    program: Any = torch.onnx.export(scores, (x,), **options)
    program.model.metadata_props["names"] = json.dumps(model.labels)
    with replacing(path) as part:
        program.save(part, external_data=False)
    progress("export", 1, 1)
    return width, height
