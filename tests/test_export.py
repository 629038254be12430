"""`show --export`: the ONNX file says what the model says."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from PIL import Image

from stego import Stego

WITHOUT = [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]


@pytest.mark.skipif(bool(WITHOUT), reason=f"without {', '.join(WITHOUT)}")
def test_the_runtime_gives_the_cosines_of_the_model(here, scenes, saved):
    import onnxruntime

    model = Stego.load(saved, device="cpu")
    model.rename({1: "hill"})
    model.save("stego.pt")
    said = run("show", "stego.pt", scenes / "scene00.png", "--export", "model.onnx").stdout
    assert "images of 424 x 320 pixels" in said and "model model.onnx" in said
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["names"]) == ["0", "hill", "2"]
    picture = Image.open(scenes / "scene00.png").convert("RGB").resize((424, 320), Image.Resampling.BILINEAR)
    rgb = (np.asarray(picture, np.float32) / 255).transpose(2, 0, 1)[None]  # (1, 3, 320, 424)
    scores = session.run(["scores"], {"image": rgb})[0]

    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    codes = model.codes((torch.from_numpy(rgb) - mean) / std)
    centers = model.probe.adapted(codes).weight
    assert not torch.allclose(centers, model.centers)  # tiny's follow the image
    cosines = torch.einsum("bdhw,kd->bkhw", F.normalize(codes, dim=1), centers)
    assert scores.shape == (1, 3, 40, 53) and np.abs(scores - cosines.numpy()).max() < 1e-4
    large = F.interpolate(torch.from_numpy(scores), (96, 128), mode="bilinear")[0].argmax(0).numpy()
    assert (large == model.predict(scenes / "scene00.png", crf=False)).mean() > 0.98


def test_without_the_exporter_one_sentence(here, saved, monkeypatch):
    monkeypatch.setattr("cli_parts.export.NEEDED", ("onnx_that_is_not_there",))
    refused = run("show", saved, "--export", "model.onnx", code=2).stderr
    assert 'pip install "stego[onnx]"' in refused and "onnx_that_is_not_there" in refused


@pytest.mark.parametrize(
    "args, message",
    [
        (["--export", "model.pt"], "is not a .onnx file"),
        (["--export", "m.onnx", "--sheet", "s.png"], "at most one image"),
        (["--export", "m.onnx", "--backbone", "tiny"], "at most one image"),
        (["--export", "m.onnx", "-o", "n.onnx"], "at most one image"),
        (["a.png", "b.png", "--export", "m.onnx"], "at most one image"),
        (["--export", "m.onnx", "--weights", "m.onnx"], "m.onnx would overwrite an input"),
    ],
)
def test_bad_exports_are_refused(here, saved, args, message):
    assert message in run("show", saved, *args, code=2).stderr
