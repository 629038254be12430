"""The backbones: an independent plain-attention transformer, the weight files' layouts, downloads that go wrong."""

import hashlib
import runpy
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.nn.functional as F

from stego_parts import backbones
from stego_parts.backbones import BACKBONES, Spec, checkpoint_path, load_backbone


def dino_state(spec: Spec, *, v2=False, seed=0, scale=0.05) -> dict:
    """Random weights in the layout of the published files."""
    generator = torch.Generator().manual_seed(seed)
    c = spec.channels

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator)

    state = {
        "cls_token": draw(1, 1, c),
        "pos_embed": draw(1, 1 + spec.grid**2, c),
        "patch_embed.proj.weight": draw(c, 3, spec.patch, spec.patch),
        "patch_embed.proj.bias": draw(c),
        "norm.weight": 1 + draw(c),
        "norm.bias": draw(c),
    }
    for i in range(spec.depth):
        for name, shape in {
            "norm1": (c,),
            "norm2": (c,),
            "attn.qkv": (3 * c, c),
            "attn.proj": (c, c),
            "mlp.fc1": (4 * c, c),
            "mlp.fc2": (c, 4 * c),
        }.items():
            state[f"blocks.{i}.{name}.weight"] = draw(*shape) + (1 if "norm" in name else 0)
            state[f"blocks.{i}.{name}.bias"] = draw(shape[0])
        if v2:
            state[f"blocks.{i}.ls1.gamma"], state[f"blocks.{i}.ls2.gamma"] = 1 + draw(c), 1 + draw(c)
    if v2:
        state["mask_token"] = draw(1, c)
    if spec.registers:
        state["register_tokens"] = draw(1, spec.registers, c)
    return state


def bicubic(sources: int, targets: int, ratio: float, antialias: bool) -> torch.Tensor:
    """(targets, sources): how the originals' bicubic interpolation weighs a line of values, ends repeated.

    Keys' kernel with a = -0.75; with antialiasing a = -0.5, widened where lines shrink and cut off at the ends.
    """

    def kernel(t):
        t, a = t.abs(), -0.5 if antialias else -0.75
        near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
        return torch.where(t <= 1, near, torch.where(t < 2, far, 0))

    centers = (torch.arange(targets, dtype=torch.float64)[:, None] + 0.5) / ratio - 0.5
    if antialias:
        weights = kernel((torch.arange(sources) - centers) / max(1, 1 / ratio))
        return weights / weights.sum(1, keepdim=True)
    places = torch.arange(-3, sources + 3)
    weights = kernel(places - centers)
    ends = F.one_hot(places.clamp(0, sources - 1), sources).double()
    return weights @ ends


def positions(trained, h: int, w: int, registers: bool):
    """Position embeddings (grid, grid, C) -> (h * w, C): by ratios of h + 0.1, or with registers by the size itself."""
    grid = len(trained)
    if h == w == grid:
        return trained.flatten(0, 1)
    offset = 0 if registers else 0.1
    rows, columns = (bicubic(grid, side, (side + offset) / grid, registers) for side in (h, w))
    return torch.einsum("hi,wj,ijc->hwc", rows, columns, trained.double()).flatten(0, 1).float()


def plain_vit(x, state, spec):
    """The transformer written out with softmax attention: (B, 3, H, W) -> (B, C, h, w)."""
    c, p, heads = spec.channels, spec.patch, spec.heads
    h, w = x.shape[2] // p, x.shape[3] // p
    patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    grid = positions(state["pos_embed"][0, 1:].unflatten(0, (spec.grid, spec.grid)), h, w, spec.registers > 0)
    cls = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
    extra = state.get("register_tokens", torch.zeros(1, 0, c)).expand(len(x), -1, -1)
    x = torch.cat([cls, extra, x + grid], 1)
    for i in range(spec.depth):
        block = {
            key.removeprefix(f"blocks.{i}."): value
            for key, value in state.items()
            if key.startswith(f"blocks.{i}.")
        }
        y = F.layer_norm(x, (c,), block["norm1.weight"], block["norm1.bias"], 1e-6)
        q, k, v = (y @ block["attn.qkv.weight"].T + block["attn.qkv.bias"]).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = (q @ k.transpose(-1, -2) / (c // heads) ** 0.5).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2) @ block["attn.proj.weight"].T + block["attn.proj.bias"]
        x = x + y * block.get("ls1.gamma", torch.ones(c))
        y = F.layer_norm(x, (c,), block["norm2.weight"], block["norm2.bias"], 1e-6)
        y = F.gelu(y @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
        x = x + (y @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]) * block.get(
            "ls2.gamma", torch.ones(c)
        )
    x = F.layer_norm(x, (c,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 1 + spec.registers :]
    return x.transpose(1, 2).reshape(len(x), c, h, w)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Published names with a small width, and an empty torch cache."""
    for name, spec in BACKBONES.items():
        if spec.heads:
            monkeypatch.setitem(BACKBONES, name, spec._replace(channels=24, heads=3, grid=5, sha256=""))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.mark.parametrize("name", ["dino_vits8", "dino_vits16", "dinov2_vits14", "dinov2_vits14_reg"])
@pytest.mark.parametrize("grid", [(5, 5), (4, 7), (1, 3)])
def test_same_function_as_a_plain_transformer(small, name, grid):
    spec = BACKBONES[name]
    state = dino_state(spec, v2=name.startswith("dinov2"))
    torch.save(state, small / "w.pth")
    x = torch.randn(2, 3, grid[0] * spec.patch, grid[1] * spec.patch)
    got = load_backbone(name, weights=small / "w.pth")(x)
    assert got.shape == (2, 24, *grid)
    assert torch.allclose(got, plain_vit(x, state, spec), atol=1e-5)


def test_full_size_layout():
    """dino_vits8 as published: 384 channels, position grid 28 x 28, 21.7 million parameters."""
    state = dino_state(BACKBONES["dino_vits8"])
    assert state["pos_embed"].shape == (1, 785, 384)
    module = backbones.ViT(BACKBONES["dino_vits8"])
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in module.state_dict().items()}
    assert 21e6 < sum(p.numel() for p in module.parameters()) < 22e6


def test_training_checkpoint_with_teacher(small):
    state = dino_state(BACKBONES["dino_vits8"])
    torch.save(state, small / "plain.pth")
    teacher = {f"module.backbone.{key}": value for key, value in state.items()}
    torch.save(
        {"teacher": teacher | {"module.head.mlp.0.weight": torch.zeros(3)}, "epoch": 3},
        small / "training.pth",
    )
    one, other = (
        load_backbone("dino_vits8", weights=small / f"{name}.pth") for name in ("plain", "training")
    )
    assert one.sha256 == other.sha256
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(one(x), other(x))


def test_downloads_into_the_torch_cache(small, monkeypatch):
    source = small / "served" / "dino_deitsmall8_pretrain.pth"
    source.parent.mkdir()
    torch.save(dino_state(BACKBONES["dino_vits8"]), source)
    monkeypatch.setitem(BACKBONES, "dino_vits8", BACKBONES["dino_vits8"]._replace(url=source.as_uri()))
    first = load_backbone("dino_vits8")
    assert checkpoint_path("dino_vits8") == small / "torch" / "hub" / "checkpoints" / source.name
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
def test_auto_prefers_what_is_cached_then_downloads(small, monkeypatch, cached, served, expected):
    for name in cached:
        checkpoint_path(name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(dino_state(BACKBONES[name], v2="v2" in name), checkpoint_path(name))
    source = small / "dinov2_vits14_pretrain.pth"
    torch.save(dino_state(BACKBONES["dinov2_vits14"], v2=True), source)
    url = source.as_uri() if served else unreachable()
    monkeypatch.setitem(
        BACKBONES, "dinov2_vits14", BACKBONES["dinov2_vits14"]._replace(url=url.replace("w.pth", source.name))
    )
    assert load_backbone("auto").name == expected


def test_auto_takes_weights_for_its_first_choice_only(small):
    torch.save(dino_state(BACKBONES["dinov2_vits14"], v2=True), small / "w.pth")
    assert load_backbone("auto", weights=small / "w.pth").name == "dinov2_vits14"
    with pytest.raises(FileNotFoundError, match="No weight file"):  # and never the bundled one instead
        load_backbone("auto", weights=small / "none.pth")


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
def test_a_bad_download_leaves_nothing(small, server, monkeypatch, kind):
    handler, url = server
    torch.save(dino_state(BACKBONES["dino_vits8"]), small / "w.pth")
    whole = (small / "w.pth").read_bytes()
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
    assert not list((small / "torch").rglob("*.*"))


def test_fetching_ahead_of_time(small, server, monkeypatch, capsys):
    handler, url = server
    torch.save(dino_state(BACKBONES["dino_vits8"]), small / "w.pth")
    handler.body = (small / "w.pth").read_bytes()
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


def test_a_named_backbone_never_falls_back(small, monkeypatch):
    url = unreachable()
    monkeypatch.setitem(BACKBONES, "dino_vits8", BACKBONES["dino_vits8"]._replace(url=url))
    with pytest.raises(FileNotFoundError) as error:
        load_backbone("dino_vits8")
    for part in (url, str(checkpoint_path("dino_vits8")), "--backbone tiny"):
        assert part in str(error.value)


def test_auto_falls_back_and_says_so(small, monkeypatch, caplog, capsys):
    url = unreachable()
    monkeypatch.setitem(BACKBONES, "dinov2_vits14", BACKBONES["dinov2_vits14"]._replace(url=url))
    assert load_backbone("auto").name == "tiny"
    for part in (
        "using the bundled backbone tiny",
        "hardly any objects",
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


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_unusable_weight_files(small, capsys):
    state = dino_state(BACKBONES["dino_vits8"])
    cases = {
        "evil": (Evil(), "holds a foreign object"),
        "list": ([1], "holds a list"),
        "lacks": ({k: v for k, v in state.items() if k != "norm.bias"}, "lacks norm.bias"),
        "extra": (state | {"surprise": torch.zeros(1)}, "unknown entry surprise"),
        "shape": (state | {"norm.bias": torch.zeros(5)}, r"is \(5,\), it should be \(24,\)"),
        "text": (state | {"norm.bias": "zero"}, "is str"),
        "nan": (state | {"norm.bias": torch.full((24,), torch.nan)}, "NaN"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, small / name)
        with pytest.raises(ValueError, match=message):
            load_backbone("dino_vits8", weights=small / name)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="No weight file"):
        load_backbone("dino_vits8", weights=small / "none.pth")
    with pytest.raises(ValueError, match="Unknown backbone 'vgg'.*dino_vits8"):
        load_backbone("vgg")
