"""What the backbone sees and what is kept of it: crops, windows, the token file."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Mean
from PIL import Image

from stego import Stego
from stego_parts import features, images
from stego_parts.backbones import load_backbone
from stego_parts.config import Config, fit_config
from stego_parts.features import TokenCache, encode, five_crops, to_tensor
from stego_parts.images import square


def test_to_tensor_is_normalised():
    x = to_tensor(Image.new("RGB", (3, 2), (255, 0, 128)))
    assert x.shape == (3, 2, 3)
    assert x[:, 0, 0].tolist() == pytest.approx(
        [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    )


def test_five_crops_cover_the_corners_and_the_centre():
    image = Image.fromarray(np.arange(10 * 8 * 3, dtype=np.uint8).reshape(10, 8, 3))
    array, crops = np.asarray(image), [np.asarray(crop) for crop in five_crops(image)]
    for crop, (y, x) in zip(crops, ((0, 0), (0, 4), (5, 0), (5, 4), (2, 2))):
        assert np.array_equal(crop, array[y : y + 5, x : x + 4])
    assert square(image, 4).size == (4, 4)


def test_a_gpu_computes_in_float16_unless_exact(monkeypatch):
    """Named backbones in float16, evaluation and callables in float32; no GPU here, so the context is recorded."""
    seen = []

    class Recorded(torch.autocast):
        def __init__(self, device_type, dtype=None, enabled=True):
            seen.append((device_type, dtype, enabled))
            super().__init__("cpu", enabled=False)

    monkeypatch.setattr(torch, "autocast", Recorded)
    monkeypatch.setattr(features, "to_device", lambda x, device: x)
    network, x = Mean(), torch.zeros(1, 3, 16, 16)
    features.dense_features(network, x, "cuda")  # a callable of the user's: float32
    network.name = "dino_vits8"
    features.dense_features(network, x, "cuda")
    features.dense_features(network, x, "cuda", exact=True)
    assert [enabled for *_, enabled in seen] == [False, True, False] and seen[1][1] == torch.float16


def test_convolutions_are_in_full_float32(monkeypatch):
    """Not in TF32, torch's default on a GPU, which is as before afterwards; no GPU here, so the switch is read."""
    seen = []
    network = Mean()
    network.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
        features.dense_features(network, torch.zeros(1, 3, 16, 16))
        assert torch.backends.cudnn.allow_tf32 is before
    assert seen == [False, False]


class Small(Mean):
    """A backbone on a GPU with memory for so many pixels."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def forward(self, x):
        if x[:, 0].numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)


def test_images_pass_in_halves_where_memory_is_short():
    x = torch.rand(5, 3, 16, 24)
    found = features.dense_features(Small(2 * 16 * 24), x)
    assert torch.equal(found, features.dense_features(Mean(), x))
    with pytest.raises(ValueError, match="one image of 24 x 16 pixels.*--device cpu"):
        features.dense_features(Small(16 * 24 - 1), x)


def test_encode_is_the_backbone_on_every_crop(scenes):
    paths = sorted(scenes.glob("*.png"))
    cache = encode(Mean(), paths, Config(views="five"))
    assert len(cache) == 5 * len(paths) and cache.tokens.shape == (40, 28 * 28, 3)
    crop = features.to_tensor(images.square(features.five_crops(Image.open(paths[2]))[3], 224))
    want = F.avg_pool2d(crop, 8).flatten(1).T  # (784, 3)
    assert np.allclose(cache.tokens[2 * 5 + 3], want, atol=2e-3)
    assert torch.allclose(cache.means[13], F.normalize(want.mean(0), dim=0), atol=1e-4)


def test_windows_are_parts_of_one_look_at_the_image(scenes):
    """Shorter side 320, half the height and half the width each; P random positions where a window has more."""
    path = min(scenes.glob("*.png"))
    cache, image = encode(Mean(), [path], Config(views="windows")), Image.open(path).convert("RGB")
    whole = F.avg_pool2d(features.to_tensor(features.input_image(image, 8))[None], 8)
    h, w = whole.shape[2:]
    assert min(h, w) == 40 and cache.tokens.shape == (5, 400, 3)
    lower_right = whole[0, :, h - h // 2 :, w - w // 2 :].flatten(1).T  # (positions, 3)
    assert torch.allclose(cache.means[3], F.normalize(lower_right.mean(0), dim=0), atol=1e-4)
    rows = {tuple(row) for row in lower_right.half().tolist()}
    assert all(tuple(row) in rows for row in cache.tokens[3].tolist())


def test_windows_of_a_strip_are_filled(tmp_path):
    """A strip of one row of patches has fewer positions than a window keeps: they are repeated."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 900, 3), np.uint8)).save(
        tmp_path / "strip.png"
    )
    cache = encode(Mean(), [tmp_path / "strip.png"], Config(views="windows"))
    assert cache.tokens.shape == (5, 400, 3) and cache.tokens.isfinite().all()
    assert len(np.unique(cache.tokens[0], axis=0)) == features.input_size((8, 900), 8)[1] // 8 // 2


def test_cache_above_its_bound_keeps_random_positions(scenes, caplog):
    paths = sorted(scenes.glob("*.png"))
    bound = 40 * 3 * 2 * 10.5 / 1e9  # ten positions of each crop
    cache = encode(Mean(), paths, Config(views="five", cache_size=bound))
    whole = encode(Mean(), paths, Config(views="five"))
    assert cache.tokens.shape == (40, 10, 3) and "10 random positions of 784" in caplog.text
    for crop in (0, 17, 39):
        rows = {tuple(row) for row in whole.tokens[crop].tolist()}
        assert all(tuple(row) in rows for row in cache.tokens[crop].tolist())
    assert torch.allclose(cache.means, whole.means)
    with pytest.raises(ValueError, match="larger --set cache_size=GB"):
        encode(Mean(), paths, Config(views="five", cache_size=1e-9))


def test_sample_takes_tokens_of_the_crops_asked_for():
    cache = TokenCache(4, 1, 9, 2)
    for i in range(4):
        cache.add(i, torch.full((1, 2, 3, 3), float(i)))
    cache.finalize()
    got = cache.sample(torch.tensor([2, 0, 3]), 5)
    assert got.shape == (3, 5, 2) and got[:, :, 0].tolist() == [[2.0] * 5, [0.0] * 5, [3.0] * 5]


@pytest.mark.parametrize("factor", [1e6, -1e6, float("nan")])
def test_features_beyond_float16_are_one_sentence(scenes, factor):
    """They are kept in float16; infinite ones would become NaN in the loss, long after."""

    class Large(Mean):
        def forward(self, x):
            return factor * super().forward(x)

    with pytest.raises(
        ValueError, match=r"features reach ([\d.e+]+|nan); they are kept in float16, which holds 65504"
    ):
        Stego.fit(scenes, clusters=2, backbone=Large(), steps=1)


def test_a_full_disk_is_one_sentence(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match="No room for 2 MB of features .* --set cache_size=GB"):
        TokenCache(10, 1, 10, 10_000)  # two bytes a value


def test_features_are_the_same_however_many_threads_there_are(scenes):
    paths = sorted(scenes.glob("*.png"))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        cache = encode(load_backbone("tiny"), paths, fit_config().on_backbone("tiny"))
        found.append((cache.tokens.clone(), cache.means.clone(), cache.images))
    torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0]))
