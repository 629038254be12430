"""Weight files: the layouts in which people have them, and files that are something else."""

import json
import os
import struct

import pytest
import torch
from networks import dino_state, hugging_face

from stego_parts.backbones import BACKBONES, load_backbone

# ---- layouts ---------------------------------------------------------------------------------------------------


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def timm(state: dict) -> dict:
    """As timm saves it; with registers, the class token's position is part of the class token."""
    made = {key: value for key, value in state.items() if key != "mask_token"}
    made |= {"head.weight": torch.zeros(2, 3), "head.bias": torch.zeros(2)}
    if "register_tokens" in made:
        made["reg_token"] = made.pop("register_tokens")
        made["cls_token"] = made["cls_token"] + made["pos_embed"][:, :1]
        made["pos_embed"] = made["pos_embed"][:, 1:]
    return made


def timm_average(state: dict) -> dict:
    """timm, for a network whose classifier reads the mean of the patches: the last norm has another name."""
    made = timm(state)
    made["fc_norm.weight"] = made.pop("norm.weight")
    made["fc_norm.bias"] = made.pop("norm.bias")
    return made


def other(state: dict) -> dict:
    """Another network beside the one that is meant."""
    return {key: torch.zeros_like(value) for key, value in state.items()}


def chunked(state: dict) -> dict:
    """As DINOv2 trains large networks: blocks in chunks of four."""
    made = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            _, number, rest = key.split(".", 2)
            key = f"blocks.{int(number) // 4}.{number}.{rest}"
        made[key] = value
    return made


LAYOUTS = {
    "teacher of DINO": lambda state: {
        "student": prefixed("module.backbone.", other(state)),
        "teacher": prefixed("backbone.", state) | {"head.mlp.0.weight": torch.zeros(3)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        "epoch": 3,
    },
    "DINOv2's whole training": lambda state: {
        "model": prefixed("student.backbone.", other(state)) | prefixed("teacher.backbone.", state),
        "iteration": 1,
    },
    "DINOv2's chunks": lambda state: {"teacher": prefixed("backbone.", chunked(state))},
    "Hugging Face": lambda state: hugging_face(state, 12),
    "Hugging Face, in a classifier": lambda state: (
        prefixed("dinov2.", hugging_face(state, 12)) | {"classifier.weight": torch.zeros(3)}
    ),
    "Lightning": lambda state: {
        "state_dict": prefixed("model.backbone.", state) | {"model.decoder.weight": torch.zeros(3)},
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"lr": 0.1},
    },
    "Lightning around Hugging Face": lambda state: {
        "state_dict": prefixed("encoder.model.", hugging_face(state, 12))
    },
    "timm": timm,
    "timm, mean of patches": timm_average,
    "timm's training": lambda state: {
        "state_dict": prefixed("module.", other(timm(state))),
        "state_dict_ema": prefixed("module.", timm(state)),
        "arch": "vit",
    },
}


@pytest.fixture(params=["dino_vits8", "dinov2_vits14", "dinov2_vits14_reg"])
def published(request, small_backbones):
    """(name, its state dict in the published layout, what it makes of some images)."""
    name = request.param
    state = dino_state(BACKBONES[name], v2="v2" in name)
    torch.save(state, small_backbones / "published.pth")
    network = load_backbone(name, weights=small_backbones / "published.pth")
    return name, state, network


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_features_of_the_published_one(published, tmp_path, layout):
    name, state, network = published
    torch.save(LAYOUTS[layout](state), tmp_path / "other.pth")
    same = load_backbone(name, weights=tmp_path / "other.pth")
    x = torch.randn(2, 3, 4 * network.patch, 7 * network.patch)
    assert torch.equal(same(x), network(x))
    # with registers, timm has one sum where the others have its two parts
    assert (same.sha256 == network.sha256) == ("timm" not in layout or "reg" not in name)


def test_a_file_in_half_precision(published, tmp_path):
    name, state, network = published
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "half.pth")
    x = torch.randn(1, 3, 4 * network.patch, 7 * network.patch)
    half = load_backbone(name, weights=tmp_path / "half.pth")
    assert half(x).dtype == torch.float32
    torch.testing.assert_close(half(x), network(x), atol=0.01, rtol=0)


# ---- safetensors and folders -----------------------------------------------------------------------------------


def pack(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_safetensors(state: dict, path, dtype="F32"):
    """Header and data by the format's description; entries in another order than their data."""
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for key, value in state.items():
        values = value.contiguous().numpy().tobytes()
        place = [len(data), len(data) + len(values)]
        header[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": place}
        data += values
    path.write_bytes(pack(dict(reversed(header.items())), data))


@pytest.mark.parametrize("layout", ["Hugging Face", "timm"])
def test_safetensors(published, tmp_path, layout):
    name, state, network = published
    write_safetensors(LAYOUTS[layout](state), tmp_path / "model.safetensors")
    x = torch.randn(1, 3, 4 * network.patch, 7 * network.patch)
    assert torch.equal(load_backbone(name, weights=tmp_path / "model.safetensors")(x), network(x))


def test_a_folder_of_hugging_faces_cache(published, tmp_path):
    """models--facebook--x with blobs, and snapshots that link to them; the newest snapshot counts."""
    name, state, network = published
    model = tmp_path / "models--facebook--x"
    (model / "blobs").mkdir(parents=True)
    write_safetensors(other(hugging_face(state, 12)), model / "blobs/old")
    write_safetensors(hugging_face(state, 12), model / "blobs/new")
    for age, revision in enumerate(("new", "old")):
        folder = model / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "model.safetensors").symlink_to(f"../../blobs/{revision}")
        seconds = 1_700_000_000 - age
        os.utime(folder, (seconds, seconds))
    assert load_backbone(name, weights=model).sha256 == network.sha256
    assert load_backbone(name, weights=model / "snapshots/new").sha256 == network.sha256


def test_a_folder_with_a_pickled_model(published, tmp_path):
    name, state, network = published
    torch.save(hugging_face(state, 12), tmp_path / "pytorch_model.bin")
    assert load_backbone(name, weights=tmp_path).sha256 == network.sha256
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty; looked for model.safetensors and pytorch_model.bin"):
        load_backbone(name, weights=tmp_path / "empty")


def entry(begin, end, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DAMAGED = {
    "cut": pack({"a": entry(0, 8)}, bytes(7)),
    "longer": pack({"a": entry(0, 8)}, bytes(9)),
    "a hole": pack({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "an overlap": pack({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "a shape that is too large": pack({"a": entry(0, 8, (2**40, 2**40))}, bytes(8)),
    "a shape that is too small": pack({"a": entry(0, 8, (1,))}, bytes(8)),
    "a negative shape": pack({"a": entry(0, 8, (-1, -2))}, bytes(8)),
    "a shape of fractions": pack({"a": entry(0, 8, (0.5, 4))}, bytes(8)),
    "negative places": pack({"a": entry(-8, 0)}, bytes(8)),
    "bytes beyond the end": pack({"a": entry(0, 8), "b": entry(8, 2**50 + 8, (2**48,))}, bytes(8)),
    "no such type": pack({"a": entry(0, 8, dtype="F33")}, bytes(8)),
    "no places": pack({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "a list": pack({"a": [1, 2]}, bytes(8)),
    "no JSON": pack(b"{hello}", bytes(8)),
    "deep JSON": pack(b'{"a":' + b"[" * 200_000, bytes(8)),
    "a header beyond its end": struct.pack("<Q", 10_000) + b"{}",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_safetensors_that_do_not_add_up(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match="a.safetensors is a damaged safetensors file"):
        load_backbone("dino_vits8", weights=path)


# ---- files that are something else -----------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_unusable_weight_files(small_backbones, capsys):
    state = dino_state(BACKBONES["dino_vits8"])
    cases = {
        "evil": (Evil(), "holds a foreign object"),
        "list": ([1], "holds a list"),
        "lacks": ({k: v for k, v in state.items() if k != "norm.bias"}, "lacks norm.bias"),
        "extra": (state | {"surprise": torch.zeros(1)}, "unknown entry surprise"),
        "shape": (state | {"norm.bias": torch.zeros(5)}, r"is \(5,\), it should be \(24,\)"),
        "text": (state | {"norm.bias": "zero"}, "is str"),
        "int8": (state | {"norm.bias": torch.zeros(24, dtype=torch.int8)}, "norm.bias is no dense tensor"),
        "sparse": (state | {"norm.bias": torch.zeros(24).to_sparse()}, "norm.bias is no dense tensor"),
        "claim": (state | {"norm.bias": torch.zeros(1).expand(24)}, "norm.bias is no dense tensor"),
        "empty": ({}, "it has 0 entries"),
        "nan": (state | {"norm.bias": torch.full((24,), torch.nan)}, "NaN"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, small_backbones / name)
        with pytest.raises(ValueError, match=message):
            load_backbone("dino_vits8", weights=small_backbones / name)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="No weight file"):
        load_backbone("dino_vits8", weights=small_backbones / "none.pth")
    with pytest.raises(ValueError, match="Unknown backbone 'vgg'.*dino_vits8"):
        load_backbone("vgg")


def test_what_does_not_fit_says_what_it_looks_like(small_backbones):
    """Another backbone's weights, one that none here has, a part of a network, another network."""
    path = small_backbones / "w.pth"
    spec = BACKBONES["dino_vits8"]
    torch.save(dino_state(BACKBONES["dino_vits16"]), path)
    with pytest.raises(
        ValueError, match=r"look like a ViT-.*/16 .*: use --backbone dino_vits16 or dino_vitb16"
    ):
        load_backbone("dino_vits8", weights=path)
    torch.save(hugging_face(dino_state(BACKBONES["dinov2_vits14_reg"], v2=True), 12), path)
    with pytest.raises(ValueError, match=r"4 registers.*: use --backbone dinov2_vits14_reg"):
        load_backbone("dinov2_vits14", weights=path)
    torch.save(dino_state(spec._replace(depth=3)), path)
    with pytest.raises(ValueError, match="3 blocks.*which none of the backbones is"):
        load_backbone("dino_vits8", weights=path)
    torch.save({key: value for key, value in dino_state(spec).items() if key != "norm.bias"}, path)
    with pytest.raises(ValueError, match="lacks norm.bias; it looks like a ViT-.* all the same"):
        load_backbone("dino_vits8", weights=path)
    torch.save({"features.0.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="it has 1 entries, such as features.0.weight; give a backbone's"):
        load_backbone("dino_vits8", weights=path)


def test_a_small_file_that_claims_much(small_backbones):
    """Tensors of many values that share a few bytes are refused before anything is made of them."""
    state = hugging_face(dino_state(BACKBONES["dinov2_vits14"], v2=True), 12)
    huge = torch.zeros(1).expand(10**6, 10**6)
    for name in ("query", "key", "value"):
        state[f"encoder.layer.0.attention.attention.{name}.weight"] = huge
    state["encoder.layer.1.layer_scale1.lambda1"] = torch.zeros(1).expand(10**12)
    state["embeddings.position_embeddings"] = torch.zeros(1).expand(1, 10**12, 24)
    torch.save(state, small_backbones / "w.pth")
    assert (small_backbones / "w.pth").stat().st_size < 10**6
    with pytest.raises(ValueError, match="does not fit the backbone dinov2_vits14"):
        load_backbone("dinov2_vits14", weights=small_backbones / "w.pth")


def test_dicts_that_contain_each_other(small_backbones):
    """A pickle can refer to one dict many times, and to itself."""
    state = dino_state(BACKBONES["dino_vits8"])
    inner: dict = {"backbone." + key: value for key, value in state.items()}
    for _ in range(40):
        inner = inner | {f"again{i}": inner for i in range(1000)}
    inner["itself"] = inner
    torch.save({"teacher": inner}, small_backbones / "w.pth")
    torch.save(state, small_backbones / "plain.pth")
    network = load_backbone("dino_vits8", weights=small_backbones / "w.pth")
    assert network.sha256 == load_backbone("dino_vits8", weights=small_backbones / "plain.pth").sha256
