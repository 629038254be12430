"""The backbones: what `auto` takes, the torch cache, downloads that go wrong, the bundled file."""

import hashlib
import runpy
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from networks import dino_state

from stego_parts import backbones
from stego_parts.backbones import BACKBONES, checkpoint_path, load_backbone


def test_downloads_into_the_torch_cache(small_backbones, monkeypatch):
    source = small_backbones / "served" / "dino_deitsmall8_pretrain.pth"
    source.parent.mkdir()
    torch.save(dino_state(BACKBONES["dino_vits8"]), source)
    monkeypatch.setitem(BACKBONES, "dino_vits8", BACKBONES["dino_vits8"]._replace(url=source.as_uri()))
    first = load_backbone("dino_vits8")
    assert checkpoint_path("dino_vits8") == small_backbones / "torch" / "hub" / "checkpoints" / source.name
    source.unlink()
    assert load_backbone("dino_vits8").sha256 == first.sha256  # from the cache now
    assert sorted(p.name for p in checkpoint_path("dino_vits8").parent.iterdir()) == [source.name]


@pytest.mark.parametrize(
    "cached, served, expected",
    [
        (["dinov2_vits14", "dino_vits8"], False, "dinov2_vits14"),
        (["dino_vits8"], True, "dino_vits8"),
        (["dino_vits8_300ep"], True, "dinov2_vits14"),
        ([], True, "dinov2_vits14"),
        ([], False, "tiny"),
    ],
)
def test_auto_prefers_what_is_cached_then_downloads(small_backbones, monkeypatch, cached, served, expected):
    for name in cached:
        checkpoint_path(name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(dino_state(BACKBONES[name], v2="v2" in name), checkpoint_path(name))
    source = small_backbones / "dinov2_vits14_pretrain.pth"
    torch.save(dino_state(BACKBONES["dinov2_vits14"], v2=True), source)
    url = source.as_uri() if served else unreachable()
    monkeypatch.setitem(
        BACKBONES, "dinov2_vits14", BACKBONES["dinov2_vits14"]._replace(url=url.replace("w.pth", source.name))
    )
    assert load_backbone("auto").name == expected


def test_auto_takes_weights_for_its_first_choice_only(small_backbones):
    torch.save(dino_state(BACKBONES["dinov2_vits14"], v2=True), small_backbones / "w.pth")
    assert load_backbone("auto", weights=small_backbones / "w.pth").name == "dinov2_vits14"
    with pytest.raises(FileNotFoundError, match="No weight file"):  # and never the bundled one instead
        load_backbone("auto", weights=small_backbones / "none.pth")


@pytest.fixture
def server():
    """An HTTP server that sends `body`, claiming `length` bytes."""

    class Handler(BaseHTTPRequestHandler):
        body, length = b"", None

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(self.length or len(self.body)))
            self.end_headers()
            self.wfile.write(self.body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # 0.01 s to shut down
    yield Handler, f"http://127.0.0.1:{server.server_port}/dino_deitsmall8_pretrain.pth"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["page", "cut", "other", "tampered"])
def test_a_bad_download_leaves_nothing(small_backbones, server, monkeypatch, kind):
    handler, url = server
    torch.save(dino_state(BACKBONES["dino_vits8"]), small_backbones / "w.pth")
    whole = (small_backbones / "w.pth").read_bytes()
    spec = BACKBONES["dino_vits8"]._replace(url=url, sha256="ab" * 32 if kind == "tampered" else "")
    monkeypatch.setitem(BACKBONES, "dino_vits8", spec)
    handler.body = {
        "page": b"<html>log in first</html>",
        "cut": whole[: len(whole) // 2],
        "tampered": whole,
        "other": b"\x80\x02}q\x00.",
    }[kind]
    if kind == "cut":
        handler.length = len(whole)
    with pytest.raises(FileNotFoundError, match="--backbone tiny"):
        load_backbone("dino_vits8")
    assert not list((small_backbones / "torch").rglob("*.*"))


def test_fetching_ahead_of_time(small_backbones, server, monkeypatch, capsys):
    handler, url = server
    torch.save(dino_state(BACKBONES["dino_vits8"]), small_backbones / "w.pth")
    handler.body = (small_backbones / "w.pth").read_bytes()
    monkeypatch.setitem(BACKBONES, "dino_vits8", BACKBONES["dino_vits8"]._replace(url=url))
    backbones.main(["dino_vits8"])
    path = checkpoint_path("dino_vits8")
    assert capsys.readouterr().out == f"{path}\n" and path.read_bytes() == handler.body
    path.unlink()
    handler.body = b"<html>log in first</html>"
    with pytest.raises(SystemExit, match="is not a usable weight file"):
        backbones.main(["dino_vits8"])
    monkeypatch.setattr(sys, "argv", ["backbones", "vgg"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(backbones.__file__, run_name="__main__")
    assert "dinov2_vits14" in capsys.readouterr().err


def unreachable() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/w.pth"


def test_a_named_backbone_never_falls_back(small_backbones, monkeypatch):
    url = unreachable()
    monkeypatch.setitem(BACKBONES, "dino_vits8", BACKBONES["dino_vits8"]._replace(url=url))
    with pytest.raises(FileNotFoundError) as error:
        load_backbone("dino_vits8")
    for part in (url, str(checkpoint_path("dino_vits8")), "--backbone tiny"):
        assert part in str(error.value)


def test_auto_falls_back_and_says_so(small_backbones, monkeypatch, caplog, capsys):
    url = unreachable()
    monkeypatch.setitem(BACKBONES, "dinov2_vits14", BACKBONES["dinov2_vits14"]._replace(url=url))
    assert load_backbone("auto").name == "tiny"
    for part in (
        "using the bundled backbone tiny",
        "learned from fewer and smaller images",
        url,
        "--backbone dinov2_vits14 --weights",
    ):
        assert part in caplog.text
    assert len(caplog.records) == 1
    assert capsys.readouterr() == ("", "")  # torch.hub's own announcement is kept away


def test_a_damaged_or_missing_bundled_file(monkeypatch, tmp_path):
    damaged = bytearray(backbones.TINY_FILE.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "tiny.pt").write_bytes(damaged)
    monkeypatch.setattr(backbones, "TINY_FILE", tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match="damaged.*[Rr]einstall"):
        load_backbone("tiny")
    (tmp_path / "tiny.pt").unlink()
    with pytest.raises(FileNotFoundError, match="reinstall"):
        load_backbone("tiny")


def test_the_bundled_file_is_the_one_we_mean():
    assert hashlib.sha256(backbones.TINY_FILE.read_bytes()).hexdigest() == backbones.TINY_SHA256
