"""The transformers, in their published layouts and at the sizes that are used, against one written out plainly."""

import pytest
import torch
from networks import dino_state, plain_vit

from stego_parts import backbones
from stego_parts.backbones import BACKBONES, load_backbone

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module", params=["dino_vits8", "dino_vits16", "dinov2_vits14", "dinov2_vits14_reg"])
def transformer(request, tmp_path_factory):
    """(network, its state dict in the published layout, spec); three blocks of the twelve, which are alike."""
    name, path = request.param, tmp_path_factory.mktemp("weights") / "w.pth"
    spec = BACKBONES[name]._replace(depth=3, sha256="")
    state = dino_state(spec, v2="v2" in name, scale=0.02)
    torch.save(state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, name, spec)
        yield load_backbone(name, weights=path), state, spec


@pytest.mark.parametrize("height, width", [(224, 224), (320, 320), (160, 240), (14, 42)])
@torch.inference_mode()
def test_transformers(transformer, height, width):
    network, state, spec = transformer
    h, w = round(height / spec.patch), round(width / spec.patch)  # 322 pixels where a patch has 14
    torch.manual_seed(0)
    x = torch.randn(2, 3, h * spec.patch, w * spec.patch)
    maps = network(x)
    assert maps.shape == (2, spec.channels, h, w)
    torch.testing.assert_close(maps, plain_vit(x, state, spec), **CLOSE)


def test_full_size_layout():
    """dino_vits8 as published: 384 channels, position grid 28 x 28, 21.7 million parameters."""
    state = dino_state(BACKBONES["dino_vits8"])
    assert state["pos_embed"].shape == (1, 785, 384)
    module = backbones.ViT(BACKBONES["dino_vits8"])
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in module.state_dict().items()}
    assert 21e6 < sum(p.numel() for p in module.parameters()) < 22e6
