"""ResNet-50 in the layouts of the published files, against torchvision's own forward; extractors given as callables."""

import hashlib
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run
from networks import plain_resnet, resnet_state
from torchvision.models import resnet50

import stego
from stego import Stego
from stego_parts import checkpoint, features
from stego_parts.backbones import BACKBONES, checkpoint_path, load_backbone
from stego_parts.config import Config
from stego_parts.features import encode

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def reference():
    """torchvision's ResNet-50 with random weights and statistics, on which batch normalisation has something to do."""
    torch.manual_seed(0)
    network = resnet50(num_classes=7)
    for name, value in network.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    return network.eval()


def layout(kind: str, network) -> dict:
    """Its weights as each publisher packs them."""
    state = network.state_dict()
    body = {key: value for key, value in state.items() if not key.startswith("fc.")}
    if kind == "dino_resnet50":
        return body
    if kind == "dino training":
        return {
            "teacher": {f"module.backbone.{key}": value for key, value in body.items()}
            | {"module.head.mlp.0.weight": torch.zeros(2)},
            "student": {},
            "epoch": 3,
        }
    if kind == "mocov2":
        query = {f"module.encoder_q.{key}": value for key, value in body.items()}
        query |= {f"module.encoder_q.fc.{i}.bias": torch.zeros(3) for i in (0, 2)}
        other = {f"module.encoder_k.{key}": torch.zeros_like(value) for key, value in body.items()}
        return {
            "epoch": 800,
            "arch": "resnet50",
            "state_dict": query | other | {"module.queue": torch.zeros(2, 3)},
        }
    return {key: value for key, value in state.items() if "num_batches" not in key}  # older torchvision's


@pytest.mark.parametrize(
    "name, kind",
    [
        ("dino_resnet50", "dino_resnet50"),
        ("dino_resnet50", "dino training"),
        ("mocov2", "mocov2"),
        ("resnet50", "resnet50"),
    ],
)
def test_last_map_is_torchvisions(reference, tmp_path, name, kind):
    """Pooled and through its last layer the map gives torchvision's own output."""
    torch.save(layout(kind, reference), tmp_path / "w.pth")
    network, x = load_backbone(name, weights=tmp_path / "w.pth"), torch.randn(2, 3, 64, 96)
    assert (network.name, network.patch, network.channels, network.training) == (name, 32, 2048, False)
    with torch.inference_mode():
        maps = network(x)
        assert maps.shape == (2, 2048, 2, 3)
        torch.testing.assert_close(reference.fc(maps.mean((2, 3))), reference(x), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(resnet_state(), path)
    return path


@pytest.mark.parametrize("stride, dilated", [(16, (4,)), (8, (3, 4))])
@torch.inference_mode()
def test_dilated_layers_are_those_of_a_plain_resnet(resnet_file, stride, dilated):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 96, 160)
    got = load_backbone("dino_resnet50", weights=resnet_file, stride=stride)(x)
    want = plain_resnet(x, torch.load(resnet_file), dilated)
    assert got.shape == (1, 2048, 96 // stride, 160 // stride) and 0.1 < want.mean() < 1
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("stride", [16, 8])
def test_dilated_maps_hold_the_coarse_one(reference, tmp_path, stride):
    """By dilation the same filters look at more places: every fourth (second) of them is one of stride 32."""
    torch.save(layout("resnet50", reference), tmp_path / "w.pth")
    coarse, fine = (load_backbone("resnet50", weights=tmp_path / "w.pth", stride=s) for s in (32, stride))
    x, step = torch.randn(1, 3, 96, 64), 32 // stride
    with torch.inference_mode():
        maps = fine(x)
        assert (fine.patch, fine.sha256) == (stride, coarse.sha256) and maps.shape == (
            1,
            2048,
            3 * step,
            2 * step,
        )
        torch.testing.assert_close(maps[:, :, ::step, ::step], coarse(x), atol=1e-4, rtol=1e-4)


def test_same_cache_and_same_errors(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    source = tmp_path / "moco_v2_800ep_pretrain.pth.tar"
    torch.save(layout("mocov2", reference), source)
    monkeypatch.setitem(BACKBONES, "mocov2", BACKBONES["mocov2"]._replace(url=source.as_uri()))
    first = load_backbone("mocov2")
    assert checkpoint_path("mocov2") == tmp_path / "torch/hub/checkpoints" / source.name
    source.unlink()
    assert load_backbone("mocov2").sha256 == first.sha256  # from the cache now
    state = layout("dino_resnet50", reference)
    torch.save({key: value for key, value in state.items() if "conv1" in key}, tmp_path / "short.pth")
    (tmp_path / "text.pth").write_text("hello")
    for file, message in (("short.pth", "lacks bn1.bias"), ("text.pth", "loaded safely")):
        with pytest.raises(ValueError, match=message):
            load_backbone("dino_resnet50", weights=tmp_path / file)
    for stride, name in ((7, "resnet50"), (16, "tiny")):
        with pytest.raises(ValueError, match=f"stride {stride}; {name}"):
            load_backbone(name, weights=None, stride=stride)


def test_torchvisions_file_is_known_by_how_its_hash_begins(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = checkpoint_path("resnet50")
    path.parent.mkdir(parents=True)
    torch.save(layout("resnet50", reference), path)
    assert path.name.endswith(f"{BACKBONES['resnet50'].sha256}.pth")
    with pytest.raises(ValueError, match="damaged: its SHA-256 is"):
        load_backbone("resnet50")
    begins = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(BACKBONES, "resnet50", BACKBONES["resnet50"]._replace(sha256=begins))
    assert load_backbone("resnet50").name == "resnet50"


def test_stride_survives_saving(reference, scenes, here, monkeypatch):
    monkeypatch.setattr(stego, "CLUSTER_ROWS", 200)
    monkeypatch.setattr(features, "RESOLUTION", 64)
    torch.save(layout("dino_resnet50", reference), "w.pth")
    image, known = scenes / "scene00.png", dict(backbone="dino_resnet50", weights="w.pth")
    Stego.fit(image, clusters=2, stride=16, steps=1, batch_size=2, code_size=4, **known).save("m.pt")
    model = Stego.load("m.pt", weights="w.pth")
    assert (model.config.backbone, model.config.stride, model.backbone.patch) == ("dino_resnet50", 16, 16)
    assert model.predict(image, crf=False, resolution=64).shape == (96, 128)
    assert (
        "sees patches of 8 pixels"
        in run("fit", image, "--backbone", "tiny", "--set", "stride=16", code=2).stderr
    )


# ---- callables -------------------------------------------------------------------------------------------------


def half(x):
    """Colours at a sixteenth of the size."""
    return F.avg_pool2d(x, 16).half()


class Strided(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = torch.nn.Conv2d(3, 5, 8, stride=8)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("function, patch, channels", [(half, 16, 3), (Strided(), 8, 5)])
def test_any_callable_is_a_backbone(function, patch, channels, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(stego, "CLUSTER_ROWS", 2000)
    path = scenes / "scene00.png"
    model = Stego.fit(path, clusters=2, backbone=function, steps=2)
    assert (model.backbone.patch, model.backbone.channels, model.config.stride) == (patch, channels, patch)
    mask = model.predict(path, crf=False)
    model.save(tmp_path / "m.pt")
    assert np.array_equal(Stego.load(tmp_path / "m.pt", backbone=function).predict(path, crf=False), mask)
    with pytest.raises(ValueError, match=r"fitted on (half|Strided), .*Stego.load\(path, backbone="):
        Stego.load(tmp_path / "m.pt").predict(path)
    with pytest.raises(ValueError, match="these are (Strided|tiny)"):
        Stego.load(tmp_path / "m.pt", backbone=Strided(seed=1) if function is not half else "tiny")


def test_a_callable_may_keep_something_on_the_way(scenes):
    """As one does that takes an inner layer's features by a hook: calls must not overlap."""
    kept = {}

    def hooked(x):
        kept["features"] = half(x)
        time.sleep(0.01)  # later layers
        return kept["features"]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    paths = sorted(scenes.glob("*.png"))
    try:
        with_hook = encode(load_backbone(hooked), paths, Config()).tokens
    finally:
        torch.set_num_threads(before)
    assert torch.equal(with_hook, encode(load_backbone(half), paths, Config()).tokens)


def test_a_changed_callable_gets_new_features(scenes):
    """Nothing tells whether a function is the one of last time: its features are not reused, a module's are."""
    config = Config(views="five", cache_size=1, seed=0)
    for function, same in ((half, False), (Strided(), True)):
        network = load_backbone(function)
        one, other = (
            checkpoint.features_key([scenes / "scene00.png"], network.sha256, config) for _ in range(2)
        )
        assert (one == other) is same


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda x: x.mean((2, 3)), r"made \(1, 3\) of an image"),
        (lambda x: x.mean((2, 3), keepdim=True), r"made \(1, 3, 1, 1\) .* more than one position"),
        (lambda x: None, "made NoneType"),
        (lambda x: F.interpolate(x, (10, 10)), "attribute `patch`"),
        (lambda x: x[:, :, :, :100], "224 x 100"),
    ],
)
def test_unusable_callables(scenes, function, message):
    with pytest.raises(ValueError, match=message):
        Stego.fit(scenes, backbone=function)
    with pytest.raises(ValueError, match="go with the name"):
        load_backbone(half, stride=8)
