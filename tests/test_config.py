"""Options: presets, settings given as text, what a model notes of its images."""

from pathlib import Path

import pytest

from stego_parts import config
from stego_parts.config import fit_config


def test_presets_are_the_published_ones():
    """Values of App. A.11 and the released configurations, each with the backbone it was tuned for."""
    want = {  # lambda self, knn, rand; b self, knn, rand; code size, steps, batch, views, centering
        "cityscapes": ("dino_vitb8", 1.0, 0.58, 0.91, 0.46, 0.18, 0.31, 100, 7000, 32, "five", False),
        "cocostuff": ("dino_vitb8", 0.1, 1.0, 0.15, 0.12, 0.2, 1.0, 90, 7000, 32, "five", True),
        "cocostuff-small": (
            "dino_vits8_300ep",
            0.67,
            0.25,
            0.63,
            0.08,
            0.02,
            0.66,
            70,
            5000,
            16,
            "five",
            True,
        ),
        "potsdam": ("dino_vits8_300ep", 0.67, 0.25, 0.63, 0.08, 0.02, 0.46, 70, 5000, 16, "whole", True),
        "small": ("dino_vits8_300ep", 0.67, 0.25, 0.63, 0.18, 0.12, 0.46, 70, 5000, 16, "five", True),
    }
    names = "backbone lambda_self lambda_knn lambda_rand b_self b_knn b_rand code_size steps batch_size views centering"
    for preset, values in want.items():
        assert tuple(getattr(fit_config(preset), name) for name in names.split()) == values
        published = fit_config(preset).on_backbone("dino_vits8")
        assert (published.learning_rate, published.decay) == (5e-4, False)
    assert set(config.PRESETS) == set(want) | {"default"}


def test_models_of_before_say_the_rate_they_were_trained_with():
    assert config.Config.from_saved({"steps": 5, "clusters": 3}).learning_rate == 5e-4


def test_settings_are_read_from_text():
    assert config.parse_settings(["decay=false", "learning_rate=0.001"]) == dict(
        decay=False, learning_rate=0.001
    )
    texts = ["b_self=0.3", "b_knn=data", "centering=false", "views=whole", "batch_size=4", "stride=16"]
    assert config.parse_settings(texts) == dict(
        b_self=0.3, b_knn=None, centering=False, views="whole", batch_size=4, stride=16
    )
    for wrong in ("steps=3", "zero=1", "eveness"):
        with pytest.raises(ValueError, match="give NAME=VALUE with one of: .*lambda_self.*, evenness,"):
            config.parse_settings([wrong])


@pytest.mark.parametrize(
    "wrong, needed",
    [
        ("b_self", "b_self= needs a number, or data: taken from the data."),
        ("batch_size=2.5", "batch_size= needs a whole number."),
        ("centering=maybe", "centering= needs true or false."),
        ("bands=red", "bands= needs one or three numbers from 1, such as 4,3,2."),
    ],
)
def test_of_a_wrong_value_it_says_what_that_setting_needs(wrong, needed):
    with pytest.raises(ValueError) as error:
        config.parse_settings([wrong])
    assert str(error.value) == f"Got the setting {wrong!r}; {needed}"


def test_absolute_paths_stay_out_of_the_model(scenes):
    assert config.source_names([Path("a"), "b/*.png"]) == ("a", "b/*.png")
    assert config.source_names(["a", scenes]) == () and config.source_names(["a"] * 17) == ()
