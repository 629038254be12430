"""Model files: save and load, and checkpoints of the reference implementation, read without executing anything."""

import os
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from networks import dino_state, plain_vit
from PIL import Image
from torch import nn

from cli import main
from cli_parts.sheets import description
from stego import Head, Stego, unit
from stego_parts.backbones import BACKBONES, load_backbone
from stego_parts.weights import read_checkpoint

CLASSES, EXTRA, DIM, CHANNELS = 5, 2, 12, 24


class Reference(nn.Module):
    """The reference's segmentation head and probes, with its names and 1 x 1 convolutions (STEGO Sec. 3.3)."""

    def __init__(self):
        super().__init__()
        self.cluster1 = nn.Sequential(nn.Conv2d(CHANNELS, DIM, 1))
        self.cluster2 = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU(), nn.Conv2d(CHANNELS, DIM, 1)
        )
        self.clusters = nn.Parameter(torch.randn(CLASSES + EXTRA, DIM))
        self.linear = nn.Conv2d(DIM, CLASSES, 1)

    def forward(self, features):
        return self.cluster1(features) + self.cluster2(features)


@pytest.fixture
def spec(monkeypatch):
    small = BACKBONES["dino_vitb8"]._replace(channels=CHANNELS, heads=3, grid=5)
    monkeypatch.setitem(BACKBONES, "dino_vitb8", small)
    return small


def lightning(reference, vit, hyper_parameters):
    heads = {
        f"net.{key}": value for key, value in reference.state_dict().items() if key.startswith("cluster1.")
    }
    heads |= {
        f"net.{key}": value for key, value in reference.state_dict().items() if key.startswith("cluster2.")
    }
    return {
        "epoch": 3,
        "global_step": 7000,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": {
            **{f"net.model.{key}": value for key, value in vit.items()},
            **heads,
            "cluster_probe.clusters": reference.clusters.data,
            "train_cluster_probe.clusters": torch.randn(CLASSES, DIM),
            "linear_probe.weight": reference.linear.weight.data,
            "linear_probe.bias": reference.linear.bias.data,
            "decoder.weight": torch.randn(CHANNELS, DIM, 1, 1),
        },
        "callbacks": {},
        "optimizer_states": [],
        "hyper_parameters": hyper_parameters,
    }


@pytest.fixture
def omegaconf(monkeypatch):
    """Objects of modules named as omegaconf's, which are gone again when the file is read."""
    for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.base", "omegaconf.nodes"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def make(module, name):
        made = type(
            name, (), {"__module__": module, "__setstate__": lambda self, state: self.__dict__.update(state)}
        )
        setattr(sys.modules[module], name, made)
        return made()

    config, metadata = make("omegaconf.dictconfig", "DictConfig"), make("omegaconf.base", "ContainerMetadata")
    node = make("omegaconf.nodes", "AnyNode")
    node._val = "cityscapes"
    config._metadata, config._content = metadata, {"dataset_name": node, "dim": node}
    yield {"cfg": config, "n_classes": CLASSES}


@pytest.fixture
def checkpoint(spec, omegaconf, tmp_path):
    torch.manual_seed(0)
    reference, vit = Reference(), dino_state(spec)
    path = tmp_path / "cityscapes_vit_base_1.ckpt"
    torch.save(lightning(reference, vit, omegaconf), path)
    for name in [name for name in sys.modules if name.startswith("omegaconf")]:
        del sys.modules[name]
    return path, reference, vit


@torch.inference_mode()
def test_codes_and_clusters_of_the_reference(checkpoint, spec):
    path, reference, vit = checkpoint
    x = torch.randn(1, 3, 40, 56)
    expected = (
        reference(plain_vit(x, vit, spec)) / 2 + reference(plain_vit(x.flip(-1), vit, spec)).flip(-1) / 2
    )
    model = Stego.load(path)
    codes = model.codes(x)
    assert codes.shape == (1, DIM, 5, 7) and torch.allclose(codes, expected, atol=1e-4)
    clusters = torch.einsum(
        "bdhw,kd->bkhw", F.normalize(expected, dim=1), F.normalize(reference.clusters, dim=1)
    )
    assert torch.equal(torch.einsum("bdhw,kd->bkhw", codes, model.centers).argmax(1), clusters.argmax(1))
    weight, bias = model.linear
    assert torch.allclose(
        F.conv2d(codes, weight[:, :, None, None], bias), reference.linear(expected), atol=1e-4
    )
    assert model.config.backbone == "dino_vitb8" and len(model.centers) == CLASSES + EXTRA


def test_predict_and_eval_read_it_directly(checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"images": rng.integers(0, 255, (48, 64, 3)), "labels": rng.integers(0, CLASSES, (48, 64))}
    for folder, array in arrays.items():
        (tmp_path / folder).mkdir()
        Image.fromarray(array.astype(np.uint8)).save(tmp_path / folder / "a.png")
    (tmp_path / "names.txt").write_text("\n".join("abcde"))
    arguments = ["predict", tmp_path / "images/a.png", "-m", checkpoint[0], "-o", tmp_path / "mask.png"]
    assert CliRunner().invoke(main, list(map(str, arguments))).exit_code == 0
    assert Image.open(tmp_path / "mask.png").size == (64, 48)
    arguments = [
        "eval",
        "--images",
        tmp_path / "images",
        "--labels",
        tmp_path / "labels",
        "--names",
        tmp_path / "names.txt",
        "-m",
        checkpoint[0],
        "--no-crf",
    ]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("stego"))
    assert "-" not in line  # the checkpoint's own linear probe counts


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"net.cluster1.0.weight": None}, "net.cluster1.0.weight"),
        ({"net.cluster1.0.weight": torch.zeros(DIM, 31, 1, 1)}, "not a usable STEGO checkpoint"),
        ({"cluster_probe.clusters": torch.zeros(4, DIM + 1)}, "shapes that do not fit"),
        ({"net.cluster2.0.bias": torch.full((CHANNELS,), torch.nan)}, "not finite"),
        ({"cluster_probe.clusters": "text"}, "not a usable STEGO checkpoint"),
        ({"net.model.norm.bias": torch.zeros(3)}, "does not fit the backbone dino_vitb8"),
    ],
)
def test_damaged(checkpoint, damage, message):
    path = checkpoint[0]
    content = read_checkpoint(path)
    content = {"state_dict": content["state_dict"] | damage}
    content["state_dict"] = {key: value for key, value in content["state_dict"].items() if value is not None}
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        Stego.load(path)


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "function", [os.mkdir, eval, __import__("builtins").exec, __import__("subprocess").getoutput]
)
def test_hostile_pickles_do_nothing(checkpoint, tmp_path, function, legacy):
    target = tmp_path / "touched"
    text = {os.mkdir: str(target), __import__("subprocess").getoutput: f"mkdir {target}"}.get(
        function, f"__import__('os').mkdir({str(target)!r})"
    )
    content = read_checkpoint(checkpoint[0]) | {"hyper_parameters": {"cfg": Hostile(function, text)}}
    torch.save(
        {key: content[key] for key in ("state_dict", "hyper_parameters")},
        checkpoint[0],
        _use_new_zipfile_serialization=not legacy,
    )
    assert len(Stego.load(checkpoint[0]).centers) == CLASSES + EXTRA  # the tensors are all right
    assert not target.exists()
    torch.save(Hostile(function, text), tmp_path / "evil.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="is not a stego model"):
        Stego.load(tmp_path / "evil.pt")
    ours = {"format": "stego", "version": 1, "config": Hostile(function, text)}
    torch.save(ours, tmp_path / "ours.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="damaged stego model"):
        Stego.load(tmp_path / "ours.pt")
    assert not target.exists()


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "program.pt"))
    with pytest.raises(ValueError, match="is not a stego model"):
        Stego.load(tmp_path / "program.pt")
    with pytest.raises(ValueError, match="safely"):
        read_checkpoint(tmp_path / "program.pt")


def test_models_of_the_reference_implementation(here, saved):
    model = Stego.load(saved)
    model.config = replace(model.config, preset="released")
    assert any("a checkpoint of the reference implementation" in line for line in description(model))
    with pytest.raises(ValueError, match="cannot be written again"):
        model.save("released.pt")


def test_a_loaded_model_is_the_saved_one(model, tmp_path):
    model.save(tmp_path / "a.pt")
    loaded = Stego.load(tmp_path / "a.pt")
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    assert np.array_equal(*(each.predict(image, resolution=64) for each in (model, loaded)))
    assert loaded.config == model.config and np.array_equal(loaded.palette, model.palette)
    assert torch.equal(loaded.centers, model.centers) and torch.equal(loaded.share, model.share)
    loaded.save(tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_the_file_is_small_and_plain(model, tmp_path):
    model.save(tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    saved = state["config"]
    assert saved["clusters"] == 3 and saved["preset"] == "default" and saved["backbone"] == "tiny"
    large = Stego(
        model.config, Head(768, 100), unit(torch.randn(255, 100)), torch.ones(255) / 255, backbone_sha256=""
    )
    large.save(tmp_path / "large.pt")
    assert (tmp_path / "large.pt").stat().st_size < 2e6


def test_a_model_of_numpys_numbers_and_words_can_be_read_again(scenes, tmp_path):
    """As from a loop over np.linspace, and of names in an array."""
    options = dict(clusters=np.int64(3), evenness=np.float64(0.25), learning_rate=np.float32(0.5))
    fitted = Stego.fit(scenes / "scene00.png", backbone="tiny", steps=np.int32(1), views="whole", **options)
    fitted = fitted.recluster(scenes / "scene00.png", adaptation=np.float64(0.75))
    fitted.rename({np.int64(1): np.array(["road"])[0]})
    fitted.save(tmp_path / "a.pt")
    loaded = Stego.load(tmp_path / "a.pt")
    assert loaded.labels == ["0", "road", "2"]
    values = [loaded.config.evenness, loaded.config.learning_rate, loaded.config.adaptation]
    assert values == [0.25, 0.5, 0.75]


def test_other_backbone_weights_are_refused(model, tmp_path):
    model.save(tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(state | {"backbone_sha256": "f" * 64}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="fitted on tiny weights ffff"):
        Stego.load(tmp_path / "other.pt").predict(np.zeros((64, 64, 3), np.uint8))


def test_a_model_of_the_first_tiny_goes_on(model, tmp_path):
    """`tiny` had one branch; models that were fitted on it name it so, and keep it."""
    config = replace(model.config, backbone="tiny_detail")
    alone = load_backbone("tiny_detail")
    parts = (
        Head(alone.channels, config.code_size),
        unit(torch.randn(3, config.code_size)),
        torch.ones(3) / 3,
    )
    detail = Stego(config, *parts, backbone_sha256=alone.sha256)
    detail.save(tmp_path / "now.pt")
    state = torch.load(tmp_path / "now.pt", weights_only=True)
    torch.save(state | {"config": state["config"] | {"backbone": "tiny"}}, tmp_path / "then.pt")
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    masks = [Stego.load(path).predict(image, resolution=64) for path in tmp_path.glob("*.pt")]
    assert len(masks) == 2 and np.array_equal(*masks)


def test_missing_and_foreign_models(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="stego fit"):
        Stego.load(tmp_path / "none.pt")
    model.save(tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "half.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:2000])
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    torch.save(state | {"version": 99}, tmp_path / "future.pt")
    for name, message in {
        "text": "not a stego model",
        "half": "not a stego model",
        "foreign": "not a stego model",
        "future": "version 99",
    }.items():
        with pytest.raises(ValueError, match=message):
            Stego.load(tmp_path / f"{name}.pt")
