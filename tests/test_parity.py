"""Every family of backbones, its real layout at the sizes that are used, against plain implementations."""

import pytest
import torch
import torch.nn.functional as F
from test_backbones import dino_state, plain_vit

from stego_parts.backbones import BACKBONES, load_backbone

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module", params=["dino_vits8", "dinov2_vits14", "dinov2_vits14_reg"])
def transformer(request, tmp_path_factory):
    """(network, its state dict in the published layout, spec); three blocks of the twelve, which are alike."""
    name, path = request.param, tmp_path_factory.mktemp("weights") / "w.pth"
    spec = BACKBONES[name]._replace(depth=3, sha256="")
    state = dino_state(spec, v2="v2" in name, scale=0.02)
    torch.save(state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, name, spec)
        yield load_backbone(name, weights=path), state, spec


@pytest.mark.parametrize("height, width", [(224, 224), (320, 320), (160, 240)])
@torch.inference_mode()
def test_transformers(transformer, height, width):
    network, state, spec = transformer
    h, w = round(height / spec.patch), round(width / spec.patch)  # 322 pixels where a patch has 14
    torch.manual_seed(0)
    x = torch.randn(1, 3, h * spec.patch, w * spec.patch)
    torch.testing.assert_close(network(x), plain_vit(x, state, spec), **CLOSE)


def resnet_state() -> dict:
    """Random weights of a ResNet-50 under DINO's and torchvision's names; activations keep their size."""
    generator, state = torch.Generator().manual_seed(0), {}

    def add(conv: str, norm: str, inner: int, outer: int, side: int):
        fan = inner * side * side
        weight = torch.randn(outer, inner, side, side, generator=generator)
        state[f"{conv}.weight"] = weight * (2 / fan) ** 0.5
        for name, low, high in (
            ("weight", 0.4, 0.8),
            ("bias", -0.1, 0.1),
            ("running_mean", -0.1, 0.1),
            ("running_var", 0.5, 1.5),
        ):
            state[f"{norm}.{name}"] = low + (high - low) * torch.rand(outer, generator=generator)

    add("conv1", "bn1", 3, 64, 7)
    inner = 64
    for layer, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            for i, sizes in enumerate(((inner, width, 1), (width, width, 3), (width, 4 * width, 1)), 1):
                add(f"{name}.conv{i}", f"{name}.bn{i}", *sizes)
            if not block:
                add(f"{name}.downsample.0", f"{name}.downsample.1", inner, 4 * width, 1)
            inner = 4 * width
    return state


def plain_resnet(x, state, dilated=()):
    """ResNet-50 written out, to its last map; `dilated` layers widen filters where the others stride."""

    def conv(x, name, norm, stride=1, dilation=1):
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2 * dilation, dilation=dilation)
        mean, var, gain, bias = (
            state[f"{norm}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    x, dilation = F.max_pool2d(conv(x, "conv1", "bn1", 2).relu(), 3, 2, 1), 1
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            name, before = f"layer{layer}.{block}", dilation
            stride = 2 if layer > 1 and not block else 1
            if stride == 2 and layer in dilated:
                stride, dilation = 1, 2 * dilation
            y = conv(x, f"{name}.conv1", f"{name}.bn1").relu()
            y = conv(y, f"{name}.conv2", f"{name}.bn2", stride, dilation if block else before).relu()
            y = conv(y, f"{name}.conv3", f"{name}.bn3")
            x = (y + (x if block else conv(x, f"{name}.downsample.0", f"{name}.downsample.1", stride))).relu()
    return x


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(resnet_state(), path)
    return path


@pytest.mark.parametrize(
    "height, width, stride, dilated", [(224, 224, 32, ()), (96, 160, 16, (4,)), (96, 160, 8, (3, 4))]
)
@torch.inference_mode()
def test_resnet(resnet_file, height, width, stride, dilated):
    torch.manual_seed(0)
    x = torch.randn(1, 3, height, width)
    got = load_backbone("dino_resnet50", weights=resnet_file, stride=stride)(x)
    want = plain_resnet(x, torch.load(resnet_file), dilated)
    assert got.shape == (1, 2048, height // stride, width // stride) and 0.1 < want.mean() < 1
    torch.testing.assert_close(got, want, **CLOSE)
