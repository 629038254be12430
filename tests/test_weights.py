"""Weight files: the layouts in which people have them, and files that are something else."""

import pytest
import torch
from networks import dino_state

from stego_parts.backbones import BACKBONES, load_backbone


def test_training_checkpoint_with_teacher(small_backbones):
    state = dino_state(BACKBONES["dino_vits8"])
    torch.save(state, small_backbones / "plain.pth")
    teacher = {f"module.backbone.{key}": value for key, value in state.items()}
    torch.save(
        {"teacher": teacher | {"module.head.mlp.0.weight": torch.zeros(3)}, "epoch": 3},
        small_backbones / "training.pth",
    )
    one, other = (
        load_backbone("dino_vits8", weights=small_backbones / f"{name}.pth") for name in ("plain", "training")
    )
    assert one.sha256 == other.sha256
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(one(x), other(x))


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_unusable_weight_files(small_backbones, capsys):
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
        torch.save(content, small_backbones / name)
        with pytest.raises(ValueError, match=message):
            load_backbone("dino_vits8", weights=small_backbones / name)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="No weight file"):
        load_backbone("dino_vits8", weights=small_backbones / "none.pth")
    with pytest.raises(ValueError, match="Unknown backbone 'vgg'.*dino_vits8"):
        load_backbone("vgg")
