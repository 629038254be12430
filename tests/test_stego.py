"""The method: loss, derangements, neighbours, cache, fit, predict, save and load."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import stego
from cli_parts import sheets as report
from stego import (
    Head,
    Stego,
    correlation_loss,
    derangement,
    drop_channels,
    nearest_neighbors,
    training_loss,
    unit,
)
from stego_parts import backbones, config, diagnostics, features, images, running
from stego_parts import clusters as maps
from stego_parts import features as tokens
from stego_parts.clusters import upsampled_argmax
from stego_parts.config import Config, fit_config
from stego_parts.features import TokenCache, encode
from stego_parts.running import pick_device

ROOT = Path(stego.__file__).parent


# ---- loss and head ---------------------------------------------------------------------------------------------


def direct_loss(f, g, s, t, b, centering, zero_clamp=True):
    """Eq. 1, 3 and 4 with the mean added back, position by position."""
    weight = F.cosine_similarity(f[:, :, None], g[:, None], dim=-1)
    if centering:
        weight = weight - weight.mean(2, keepdim=True) + weight.mean()
    code = F.cosine_similarity(s[:, :, None], t[:, None], dim=-1)
    return -((weight - b) * (torch.maximum(code, torch.zeros(())) if zero_clamp else code)).mean()


@pytest.mark.parametrize("centering, zero_clamp", [(True, True), (False, True), (True, False)])
def test_loss_against_the_formula(centering, zero_clamp):
    torch.manual_seed(0)
    f, g, s, t = torch.randn(3, 5, 8), torch.randn(3, 7, 8), torch.randn(3, 5, 4), torch.randn(3, 7, 4)
    s.requires_grad_(), f.requires_grad_()
    got = correlation_loss(
        unit(f), unit(g), unit(s), unit(t), 0.3, centering=centering, zero_clamp=zero_clamp
    )
    assert torch.allclose(got, direct_loss(f, g, s, t, 0.3, centering, zero_clamp), atol=1e-6)
    got.backward()
    assert s.grad.abs().sum() > 0 and f.grad is None  # no gradient through the features


def test_centering_keeps_the_mean():
    """With codes that correspond fully everywhere, the loss is b minus the mean of F, centred or not."""
    f, g, ones = unit(torch.randn(2, 6, 8)), unit(torch.randn(2, 6, 8)), unit(torch.ones(2, 6, 3))
    plain, centred = (correlation_loss(f, g, ones, ones, 0.2, centering=c) for c in (False, True))
    assert torch.allclose(plain, centred, atol=1e-6)
    assert torch.allclose(plain, 0.2 - (f @ g.transpose(1, 2)).mean(), atol=1e-6)


def test_loss_is_the_energy_of_a_potts_model():
    """Sec. 3.4: over the pixels of two images, weights F - b, unlike labels cost nothing and equal ones -weight.

    For every labelling of the six pixels in two classes the loss of its one-hot codes is that energy, so the labelling
    of least loss is the cut of least energy; codes in between give the energy with max(cos, 0) for equality.
    """
    torch.manual_seed(0)
    f, g, b = torch.randn(3, 4), torch.randn(3, 4), 0.1
    weight = F.cosine_similarity(f[:, None], g[None], dim=-1) - b  # (3, 3): edges from one image to the other

    def loss(s, t):
        return correlation_loss(unit(f)[None], unit(g)[None], s[None], t[None], b, centering=False).item()

    found = {}
    for labels in itertools.product((0, 1), repeat=6):
        here, there = labels[:3], labels[3:]
        energy = -sum(weight[i, j].item() for i in range(3) for j in range(3) if here[i] == there[j])
        one_hot = F.one_hot(torch.tensor(labels), 2).float()
        found[labels] = energy
        assert 9 * loss(one_hot[:3], one_hot[3:]) == pytest.approx(energy, abs=1e-5)
    cut = min(found, key=found.get)
    assert found[cut] < found[(0,) * 6] and len(set(cut)) == 2
    s, t = unit(torch.randn(3, 5)), unit(torch.randn(3, 5))
    energy = sum(-weight[i, j] * max(float(s[i] @ t[j]), 0) for i in range(3) for j in range(3))
    assert 9 * loss(s, t) == pytest.approx(float(energy), abs=1e-5)


def test_full_loss_is_the_weighted_sum():
    """Eq. 5 without dropout; with two crops there is only one derangement, so the random term is known."""
    torch.manual_seed(0)
    head, config = Head(8, 4).eval(), fit_config(classes=2, preset="small")
    f, g, k = torch.randn(3, 2, 5, 8).unbind()
    terms = (("self", f, f, slice(None)), ("knn", f, k, slice(None)), ("rand", f, g, [1, 0]))
    want = sum(
        getattr(config, f"lambda_{name}")
        * direct_loss(x, y[order], head(x), head(y)[order], getattr(config, f"b_{name}"), True)
        for name, x, y, order in terms
    )
    assert torch.allclose(training_loss(head, f, g, k, config), want, atol=1e-6)


@pytest.mark.parametrize(
    "off", [("self",), ("knn",), ("rand",), ("knn", "rand"), ("self", "rand"), ("self", "knn")]
)
def test_a_lambda_of_zero_switches_its_term_off(monkeypatch, off):
    """What is off is not computed: its codes are not asked for, its correspondences not taken."""
    torch.manual_seed(0)
    head, config = (
        Head(8, 4).eval(),
        fit_config(classes=2, preset="small", **{f"lambda_{name}": 0.0 for name in off}),
    )
    f, g, k = torch.randn(3, 2, 5, 8).unbind()
    compared, asked, compare = [], [], stego.correlation_loss
    monkeypatch.setattr(
        stego, "correlation_loss", lambda *args, **kw: compared.append(args[4]) or compare(*args, **kw)
    )
    with head.register_forward_hook(lambda module, args, output: asked.append(args[0])):
        loss = training_loss(head, f, g, None if "knn" in off else k, config)
    terms = {"self": (f, f, slice(None)), "knn": (f, k, slice(None)), "rand": (f, g, [1, 0])}
    want = sum(
        getattr(config, f"lambda_{name}")
        * direct_loss(x, y[order], head(x), head(y)[order], getattr(config, f"b_{name}"), True)
        for name, (x, y, order) in terms.items()
        if name not in off
    )
    assert torch.allclose(loss, want, atol=1e-6) and loss.requires_grad
    assert len(asked) == (1 if "knn" in off else 2)
    assert len(compared) == sum({"self": 1, "knn": 1, "rand": 5}[name] for name in terms if name not in off)


def test_head_is_the_references_convolutions():
    head, x = Head(8, 4).eval(), torch.randn(2, 8, 3, 5)
    linear, first, second = head.linear, head.mlp[0], head.mlp[2]
    conv = [F.conv2d(x, layer.weight[..., None, None], layer.bias) for layer in (linear, first)]
    want = conv[0] + F.conv2d(conv[1].relu(), second.weight[..., None, None], second.bias)
    got = head(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (3, 5))
    assert torch.allclose(got, want, atol=1e-6)


def test_dropout_takes_whole_channels_of_an_image():
    torch.manual_seed(0)
    dropped = drop_channels(torch.ones(4, 6, 1000))
    assert (dropped == dropped[:, :1]).all()  # the same for all positions
    assert not torch.equal(dropped[0], dropped[1])  # another draw for another image
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_dropout_is_drawn_on_the_cpu_for_every_device():
    """So that a fit that goes on with --resume drops the same channels on a GPU: a meta tensor stands for one."""
    torch.manual_seed(0)
    drop_channels(torch.empty(4, 6, 10, device="meta"))
    there = torch.get_rng_state()
    torch.manual_seed(0)
    drop_channels(torch.ones(4, 6, 10))
    assert torch.equal(torch.get_rng_state(), there)


@pytest.mark.parametrize("count", [2, 3, 5, 32])
def test_derangements(count):
    draws = [derangement(count) for _ in range(50)]
    for draw in draws:
        assert sorted(draw.tolist()) == list(range(count)) and (draw != torch.arange(count)).all()
    assert count == 2 or len({tuple(draw.tolist()) for draw in draws}) > 1


# ---- features and neighbours -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 8, 50])
def test_neighbors_against_sorting(n, monkeypatch):
    monkeypatch.setattr(stego, "SIMILARITIES", 16 * n)  # several chunks
    means = unit(torch.randn(n, 6))
    got = nearest_neighbors(means, 7)
    assert got.shape == (n, 1 if n == 1 else min(7, n - 1))
    for i in range(n if n > 1 else 0):
        others = sorted((j for j in range(n) if j != i), key=lambda j: -float(means[i] @ means[j]))
        assert got[i].tolist() == others[:7]


def test_batches_are_of_one_shape_in_order():
    items = [
        (i, None if size is None else torch.empty(size))
        for i, size in enumerate([2, 2, 2, 3, None, None, 3, 2])
    ]
    assert [[i for i, _ in batch] for batch in running.same_shape_batches(items, 2)] == [
        [0, 1],
        [2],
        [3],
        [4, 5],
        [6],
        [7],
    ]
    assert [len(batch) for batch in running.same_shape_batches(items, 1)] == [1] * 8


def test_a_gpu_computes_in_float16_unless_exact(monkeypatch):
    """Named backbones in float16, evaluation and callables in float32; no GPU here, so the context is recorded."""
    seen = []

    class Recorded(torch.autocast):
        def __init__(self, device_type, dtype=None, enabled=True):
            seen.append((device_type, dtype, enabled))
            super().__init__("cpu", enabled=False)

    monkeypatch.setattr(torch, "autocast", Recorded)
    monkeypatch.setattr(tokens, "to_device", lambda x, device: x)
    network, x = Mean(), torch.zeros(1, 3, 16, 16)
    tokens.dense_features(network, x, "cuda")  # a callable of the user's: float32
    network.name = "dino_vits8"
    tokens.dense_features(network, x, "cuda")
    tokens.dense_features(network, x, "cuda", exact=True)
    assert [enabled for *_, enabled in seen] == [False, True, False] and seen[1][1] == torch.float16


class Mean(torch.nn.Module):
    """A stand-in backbone: mean colour of each patch, so that a token tells where it came from."""

    patch, channels, name, sha256 = 8, 3, "mean", "none"

    def forward(self, x):
        return F.avg_pool2d(x, 8)


def test_encode_is_the_backbone_on_every_crop(scenes):
    paths = sorted(scenes.glob("*.png"))
    cache = encode(Mean(), paths, Config())
    assert len(cache) == 5 * len(paths) and cache.tokens.shape == (40, 28 * 28, 3)
    crop = features.to_tensor(images.square(features.five_crops(Image.open(paths[2]))[3], 224))
    want = F.avg_pool2d(crop, 8).flatten(1).T  # (784, 3)
    assert np.allclose(cache.tokens[2 * 5 + 3], want, atol=2e-3)
    assert torch.allclose(cache.means[13], F.normalize(want.mean(0), dim=0), atol=1e-4)


def test_windows_are_parts_of_one_look_at_the_image(scenes):
    """Shorter side 320, half the height and half the width each; P random positions where a window has more."""
    path = sorted(scenes.glob("*.png"))[0]
    cache, image = encode(Mean(), [path], Config(views="windows")), Image.open(path).convert("RGB")
    size = tokens.backbone_size(image, 8)
    whole = F.avg_pool2d(features.to_tensor(image.resize(size, tokens.BILINEAR))[None], 8)
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
    assert (
        len(np.unique(cache.tokens[0], axis=0))
        == tokens.backbone_size(Image.new("RGB", (900, 8)), 8)[0] // 8 // 2
    )


def test_cache_above_its_bound_keeps_random_positions(scenes, caplog):
    paths = sorted(scenes.glob("*.png"))
    bound = 40 * 3 * 2 * 10.5 / 1e9  # ten positions of each crop
    cache = encode(Mean(), paths, Config(cache_size=bound))
    whole = encode(Mean(), paths, Config())
    assert cache.tokens.shape == (40, 10, 3) and "10 random positions of 784" in caplog.text
    for crop in (0, 17, 39):
        rows = {tuple(row) for row in whole.tokens[crop].tolist()}
        assert all(tuple(row) in rows for row in cache.tokens[crop].tolist())
    assert torch.allclose(cache.means, whole.means)
    with pytest.raises(ValueError, match="larger --set cache_size=GB"):
        encode(Mean(), paths, Config(cache_size=1e-9))


def test_sample_takes_tokens_of_the_crops_asked_for():
    cache = TokenCache(4, 1, 9, 2)
    for i in range(4):
        cache.add(i, torch.full((1, 2, 3, 3), float(i)))
    cache.finalize()
    got = cache.sample(torch.tensor([2, 0, 3]), 5)
    assert got.shape == (3, 5, 2) and got[:, :, 0].tolist() == [[2.0] * 5, [0.0] * 5, [3.0] * 5]


def test_features_beyond_float16_are_one_sentence(scenes):
    """They are kept in float16; infinite ones would become NaN in the loss, long after."""

    class Large(Mean):
        def forward(self, x):
            return 1e6 * super().forward(x)

    with pytest.raises(
        ValueError, match=r"features reach [\d.e+]+; they are kept in float16, which holds 65504"
    ):
        Stego.fit(scenes, classes=2, backbone=Large(), steps=1)


def test_a_full_disk_is_one_sentence(monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match="No room for .* --set cache_size=GB"):
        TokenCache(10, 1, 10, 10)


# ---- fit -------------------------------------------------------------------------------------------------------


def test_fit_finds_the_parts_of_drawn_scenes(model):
    """Three clusters line up with sky, land and what stands on it; chance is a third."""
    from conftest import draw_scene

    from cli_parts.evaluation import confusion_matrix, match_clusters, scores

    confusion = np.zeros((3, 3), np.int64)
    for seed in range(100, 108):
        image, labels = draw_scene(seed)
        mask = model.predict(image, crf=False, resolution=160)
        confusion += confusion_matrix(labels, mask, n_classes=3, n_clusters=3)
    assert scores(confusion, match_clusters(confusion))["miou"] > 0.6


def test_same_seed_same_model(scenes):
    before = torch.random.get_rng_state()
    two = [scenes / "scene00.png", scenes / "scene01.png"]
    one, same, other = (Stego.fit(two, classes=3, backbone="tiny", steps=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's generator is left alone
    assert torch.equal(one.centers, same.centers) and not torch.equal(one.centers, other.centers)
    for key, value in one.head.state_dict().items():
        assert torch.equal(value, same.head.state_dict()[key])


def test_training_moves_the_loss(scenes):
    paths = sorted(scenes.rglob("*.png"))[:2]
    cache = encode(backbones.load_backbone("tiny"), paths, Config())
    losses = []
    for steps in (1, 40):
        torch.manual_seed(0)
        config = fit_config("small", classes=2, steps=steps)
        neighbors = nearest_neighbors(cache.means)
        head, _ = stego.train_head(cache, neighbors, config)
        crops, partner = torch.arange(len(cache)), neighbors[:, 0]
        losses.append(
            training_loss(
                head, cache.sample(crops, 121), cache.sample(crops, 121), cache.sample(partner, 121), config
            ).item()
        )
    assert losses[1] < losses[0]


def test_one_image_is_enough(tmp_path, scenes):
    Image.open(scenes / "scene00.png").save(tmp_path / "only.png")
    mask = Stego.fit(tmp_path, classes=2, backbone="tiny", steps=3).predict(tmp_path / "only.png", crf=False)
    assert set(np.unique(mask)) <= {0, 1}
    Stego.fit(
        tmp_path, classes=2, backbone="tiny", steps=2, views="whole", lambda_self=0, lambda_knn=0
    )  # nothing left


def test_unreadable_images_are_named_and_left_out(tmp_path, scenes, caplog):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (5, 5)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="None of the 2 images"):
        Stego.fit(tmp_path, backbone="tiny")
    Image.open(scenes / "scene00.png").save(tmp_path / "good.png")
    model = Stego.fit(tmp_path, classes=2, backbone="tiny", steps=2)
    assert model.config.crops == 5
    assert "broken.jpg" in caplog.text and "5 x 5 pixels, smaller than one patch" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(classes=256), "1 to 255"),
        (dict(classes=0), "1 to 255"),
        (dict(preset="moon"), "Unknown preset 'moon'"),
        (dict(b_self="yes"), "Got b_self 'yes'; a number, or data: taken"),
        (dict(steps=2.5), "Got steps 2.5; a whole number"),
        (dict(stepz=3), "Unknown setting 'stepz'"),
        (dict(lambda_self=0.0, lambda_knn=0.0, lambda_rand=0.0), "one lambda and cache_size are above 0"),
        (dict(stride=16), "Got stride 16; tiny sees patches of 8"),
        (dict(lambda_knn=-1.0), "lambda_knn -1.0; it must be at least 0"),
        (dict(lambda_rand=float("nan")), "lambda_rand nan; a finite"),
        (dict(steps=0), "steps 0"),
        (dict(views="six"), "Unknown views 'six'"),
        (dict(evenness=2.0), "evenness 2.0"),
        (dict(adaptation=-1.0), "adaptation -1.0"),
        (dict(backbone="vgg"), "Unknown backbone"),
        (dict(device="cuda:99"), "not available"),
        (dict(device="abacus"), "not available"),
    ],
)
def test_bad_options(scenes, options, message):
    with pytest.raises(ValueError, match=message):
        Stego.fit(scenes, **{"backbone": "tiny", **options})


def test_more_classes_than_positions(tmp_path, scenes):
    Image.open(scenes / "scene00.png").save(tmp_path / "only.png")
    with pytest.raises(ValueError, match="more than there are positions"):
        Stego.fit(tmp_path, classes=200, backbone="tiny", steps=1, cache_size=5 * 2 * 600 * 10 / 1e9)


def test_shifts_follow_the_features():
    """Tokens around one direction correspond more: every b moves with them, by the documented rule."""
    torch.manual_seed(0)
    shifts = {}
    for common in (0.0, 2.0):
        cache = filled_cache(torch.randn(20, 16, 20, 20) + common)
        shifts[common] = stego.shifts_from_data(cache, nearest_neighbors(cache.means), Config())
    for name in stego.SHIFTS:
        assert shifts[2.0][name] > shifts[0.0][name] + 0.3
    scattered = 1 / 16**0.5  # standard deviation of random cosines
    assert shifts[0.0]["b_rand"] == pytest.approx(stego.SHIFTS["b_rand"] * scattered, abs=0.02)


def test_what_is_given_is_kept_and_the_rest_from_the_data(scenes):
    image = scenes / "scene00.png"
    one = Stego.fit(image, classes=2, backbone="tiny", steps=1, b_rand=0.7).config
    assert one.preset == "default" and one.b_rand == 0.7 and None not in (one.b_self, one.b_knn)
    fixed = Stego.fit(image, classes=2, backbone="tiny", steps=1, preset="small").config
    assert (fixed.preset, fixed.b_self, fixed.b_rand, fixed.views) == ("small", 0.18, 0.46, "five")


def test_defaults_go_with_the_backbone(scenes, monkeypatch):
    """The published way where features were learned from millions of images, what was measured for it with tiny."""
    monkeypatch.setattr(stego, "load_backbone", lambda *args, **options: Mean())
    other = Stego.fit(scenes / "sub", classes=2, backbone="dinov2_vits14", steps=1).config
    assert (other.views, other.evenness, fit_config(backbone="mean").steps) == ("five", 0.0, 2000)
    tiny = fit_config(backbone="tiny")
    assert (tiny.views, tiny.steps, tiny.b_self, tiny.preset) == ("windows", 300, None, "default")


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
    assert set(config.PRESETS) == set(want) | {"default"}


def test_settings_are_read_from_text():
    texts = ["b_self=0.3", "b_knn=data", "centering=false", "views=whole", "batch_size=4", "stride=16"]
    assert config.parse_settings(texts) == dict(
        b_self=0.3, b_knn=None, centering=False, views="whole", batch_size=4, stride=16
    )
    for wrong in ("steps=3", "b_self", "b_self=much", "batch_size=2.5", "centering=maybe", "zero=1"):
        with pytest.raises(ValueError, match="give NAME=VALUE with one of: .*lambda_self \\(a number\\)"):
            config.parse_settings([wrong])


def test_evened_rows_give_rare_directions_a_chance():
    torch.manual_seed(0)
    direction = unit(torch.randn(2, 16))
    codes = torch.cat([direction[:1].expand(3800, -1), direction[1:].expand(200, -1)]) + 0.05 * torch.randn(
        4000, 16
    )
    share = [
        (unit(stego.resample_by_density(codes, evenness)) @ direction[1] > 0.7).float().mean().item()
        for evenness in (0, 0.5, 1)
    ]
    assert share == pytest.approx([0.05, 0.19, 0.5], abs=0.1)  # 1 : 19, its root, as many


def test_a_look_at_the_similarities():
    """Codes equal everywhere are all alike; the head goes on training as before."""
    head = Head(8, 4).train()
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(head.linear.bias)
    seen = stego.code_similarities(head, torch.randn(3, 5, 8), torch.randn(3, 5, 8))
    assert head.training and [seen[name] for name in ("self", "knn", "rand")] == pytest.approx([1, 1, 1])
    assert "rand" not in stego.code_similarities(head, torch.randn(1, 5, 8), torch.randn(1, 5, 8))


@pytest.mark.parametrize("b, word", [(-1.0, "collapsed"), (1.0, "scattered"), (None, None)])
def test_bad_runs_are_named_in_words(b, word, monkeypatch):
    """Pressure that is all positive puts every code in one place, all negative drives them apart."""
    torch.manual_seed(0)
    monkeypatch.setattr(stego, "LEARNING_RATE", 5e-3)  # bad quickly
    kinds = (
        torch.randint(2, (20, 12, 12)) + 2 * (torch.arange(20) % 2)[:, None, None]
    )  # two of four in each crop
    parts = torch.randn(4, 16)[kinds].permute(0, 3, 1, 2)  # (crops, C, h, w)
    cache = filled_cache(parts + 0.5 * torch.randn(parts.shape))
    neighbors, options = nearest_neighbors(cache.means), fit_config(classes=2, steps=60, batch_size=8)
    shifts = (
        stego.shifts_from_data(cache, neighbors, options) if b is None else dict(b_self=b, b_knn=b, b_rand=b)
    )
    _, history = stego.train_head(cache, neighbors, replace(options, **shifts))
    said = diagnostics.training_warning(history)
    assert word in said if word else said is None
    assert diagnostics.training_warning(history[:3]) is None  # too short to tell


def directions_cache(kinds: int, *, noise: float, images: int = 20) -> TokenCache:
    """A cache of positions that are `kinds` directions in 16 dimensions, with noise."""
    torch.manual_seed(1)
    parts = torch.eye(16)[torch.randint(kinds, (images, 12, 12))].permute(0, 3, 1, 2)  # (images, C, h, w)
    return filled_cache([features + noise * torch.randn(features.shape) for features in parts])


def filled_cache(features) -> TokenCache:
    """A cache of one crop an image, all of its features (C, h, w)."""
    channels, h, w = features[0].shape
    cache = TokenCache(len(features), 1, h * w, channels)
    for i, each in enumerate(features):
        cache.add(i, each[None])
    cache.finalize()
    return cache


@pytest.fixture
def brief_agreement(monkeypatch):
    monkeypatch.setattr(stego, "AGREEMENT_ROWS", 600)
    monkeypatch.setattr(diagnostics, "COUNTS", (2, 3, 4, 5, 6, 7, 10))
    monkeypatch.setattr(diagnostics, "SPLITS", 2)


def agreement_in(cache: TokenCache) -> dict:
    return diagnostics.cluster_agreement(lambda: stego.sample_halves(unit, cache))


@pytest.mark.parametrize("kinds", [3, 6])
def test_halves_of_the_images_agree_on_the_clusters_that_are_there(kinds, brief_agreement):
    torch.manual_seed(0)
    agreement = agreement_in(directions_cache(kinds, noise=0.15))
    assert diagnostics.plausible_counts(agreement)[0] == kinds
    assert np.mean(agreement[kinds]) > 0.95 > np.mean(agreement[kinds + 1])


def test_noise_agrees_on_nothing(brief_agreement):
    torch.manual_seed(0)
    agreement = agreement_in(directions_cache(1, noise=5.0))
    assert max(np.mean(scores) for scores in agreement.values()) < 0.5


def test_adjusted_rand_index_counts_pairs():
    a, b = torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor([1, 1, 0, 0, 0, 2, 2])
    same = lambda x: (x[:, None] == x)[tuple(torch.triu_indices(7, 7, 1))].double()  # noqa: E731  (21 pairs,)
    both, left, right = (same(a) * same(b)).sum(), same(a).sum(), same(b).sum()
    chance = left * right / 21
    assert diagnostics.adjusted_rand_index(a, b) == pytest.approx(
        float((both - chance) / ((left + right) / 2 - chance))
    )
    assert diagnostics.adjusted_rand_index(a, (a + 1) % 3) == 1
    assert abs(diagnostics.adjusted_rand_index(torch.randint(4, (9999,)), torch.randint(4, (9999,)))) < 0.01


def test_fit_takes_as_many_classes_as_halves_agree_on(scenes, monkeypatch, brief_agreement):
    monkeypatch.setattr(stego, "load_backbone", lambda *args, **options: Mean())
    model = Stego.fit(scenes, classes="auto", steps=3)
    assert (
        model.config.classes == len(model.centers) == diagnostics.plausible_counts(model.record.agreement)[0]
    )
    assert f"{len(model.centers)} clusters: halves" in report.agreement_line(model.record.agreement)
    with pytest.raises(ValueError, match="auto finds a number"):
        fit_config(classes="many")


def test_features_join_the_codes_by_their_weight(scenes, tmp_path):
    """The cosine of two descriptions is the mean of both cosines, weighted by 1 and the square of the weight."""
    picture = scenes / "scene00.png"
    model = Stego.fit(picture, classes=3, backbone="tiny", steps=2, feature_weight=0.5)
    head, f = model.head, torch.randn(1, 9, model.backbone.channels)
    codes, own = unit(head(f)), unit(unit(f) - head.mean)
    want = (codes @ codes.mT + 0.25 * own @ own.mT) / 1.25
    together = unit(head.describe(f))
    assert torch.allclose(together @ together.mT, want, atol=1e-5)
    assert 0 < head.mean.norm() < 1 and model.centers.shape == (3, head.size) == (
        3,
        70 + model.backbone.channels,
    )
    model.save(tmp_path / "m.pt")
    again, options = Stego.load(tmp_path / "m.pt"), dict(crf=False, resolution=160)
    assert (again.predict(picture, **options) == model.predict(picture, **options)).all()
    with pytest.raises(ValueError, match="feature_weight -1"):
        fit_config(classes=3, feature_weight=-1)


def test_class_scores_are_cosines_of_upsampled_codes(monkeypatch):
    monkeypatch.setattr(maps, "BLOCK_VALUES", 500)  # strips of a few rows
    codes, centers = torch.randn(5, 6, 7), unit(torch.randn(4, 5))
    wide = F.normalize(
        F.interpolate(codes[None], size=(33, 47), mode="bilinear", align_corners=False)[0], dim=0
    )
    want = maps.LOGIT_SCALE * torch.einsum("dhw,kd->khw", wide, centers)
    assert torch.allclose(maps.class_scores(codes, centers, (33, 47)), want, atol=1e-5)


def test_report_draws_the_history(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(stego, "load_backbone", lambda *args, **options: Mean())
    model = Stego.fit(scenes, classes=2, steps=12)
    report.write_report(model, tmp_path)
    names = ["loss", "neighbors", "report", "similarity"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == names
    assert (
        "12 steps" in (words := (tmp_path / "report.txt").read_text())
        and report.neighbor_line(model.record) in words
    )
    assert [entry["step"] for entry in model.record.history] == [0, 10, 11]
    model.save(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="right after fit"):
        report.write_report(Stego.load(tmp_path / "m.pt"), tmp_path)


def test_a_crop_of_the_record_is_the_part_of_the_image_it_says(tmp_path):
    """Two images in quarters of one colour each: crop 5 is the upper left quarter of the second image."""
    for name, first in (("a", 10), ("b", 110)):
        quarters = np.array([[first, first + 20], [first + 40, first + 60]], np.uint8)
        Image.fromarray(quarters.repeat(40, 0).repeat(40, 1)).convert("RGB").save(tmp_path / f"{name}.png")
    of = torch.arange(2).repeat_interleave(5)  # (10,)
    neighbors = torch.tensor([[1, 5]] * 10)  # one of image 0, one of image 1
    record = stego.FitRecord([tmp_path / "a.png", tmp_path / "b.png"], of, neighbors, [], {})
    shown = [report._crop_picture(record, crop, "five").getpixel((3, 3))[0] for crop in (0, 1, 5, 8)]
    assert shown == [10, 30, 110, 170]
    assert report._crop_picture(record, 7, "whole").getpixel((3, 3))[0] == 110
    assert report.neighbor_line(record).startswith("Of a crop's 2 nearest neighbours, 1.0 are")
    mixed = record._replace(neighbors=torch.tensor([[1, 5]] * 5 + [[6, 7]] * 3 + [[1, 2]] * 2))
    assert report.neighbor_line(mixed).endswith("2 such: 20%, 50%, 30%.")


# ---- predict ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(97, 131), (131, 97), (16, 16), (40, 400), (9, 300)])
@pytest.mark.parametrize("crf", [True, False])
def test_mask_has_the_size_of_the_image(model, size, crf):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    mask = model.predict(image, crf=crf, resolution=64)
    assert mask.shape == size and mask.dtype == np.uint8 and mask.max() < 3


def test_a_mirrored_image_gets_the_mirrored_mask(model):
    image = np.asarray(
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 16, 3), np.uint8)).resize((128, 96))
    )
    options = dict(crf=False, resolution=160)
    mask, mirrored = model.predict(image, **options), model.predict(image[:, ::-1].copy(), **options)
    assert (mask == mirrored[:, ::-1]).mean() > 0.99


def test_upsampled_argmax_equals_upsampling_everything(monkeypatch):
    monkeypatch.setattr(maps, "BLOCK_VALUES", 300)  # strips of a few rows
    scores = torch.randn(5, 6, 7)
    want = F.interpolate(scores[None], size=(33, 47), mode="bilinear", align_corners=False)[0].argmax(0)
    assert (upsampled_argmax(scores, 33, 47) == want.numpy()).mean() > 0.999


def test_labels_are_those_of_upsampled_codes(model):
    """Upsampling cosine numerators and taking the argmax is upsampling codes and then comparing with centres."""
    image = np.random.default_rng(1).integers(0, 256, (96, 128, 3), np.uint8)
    x = features.to_tensor(Image.fromarray(image).resize((256, 192), Image.Resampling.BILINEAR))[None]
    centers = model.image_centers(model.codes(x))
    codes = F.interpolate(model.codes(x), size=(96, 128), mode="bilinear", align_corners=False)
    want = torch.einsum("bdhw,kd->bkhw", F.normalize(codes, dim=1), centers).argmax(1)[0]
    assert (model.predict(image, crf=False, resolution=192) == want.numpy()).mean() > 0.999


def test_too_small_an_image(model):
    with pytest.raises(ValueError, match="4 x 30 pixels, smaller than one patch"):
        model.predict(np.zeros((30, 4, 3), np.uint8))


# ---- save and load ---------------------------------------------------------------------------------------------


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
    assert saved["classes"] == 3 and saved["preset"] == "default" and saved["backbone"] == "tiny"
    large = Stego(
        model.config, Head(768, 100), unit(torch.randn(255, 100)), torch.ones(255) / 255, backbone_sha256=""
    )
    large.save(tmp_path / "large.pt")
    assert (tmp_path / "large.pt").stat().st_size < 2e6


def test_other_backbone_weights_are_refused(model, tmp_path):
    model.save(tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(state | {"backbone_sha256": "f" * 64}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="fitted on tiny weights ffff"):
        Stego.load(tmp_path / "other.pt").predict(np.zeros((64, 64, 3), np.uint8))


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


def test_saving_replaces_only_when_complete(model, tmp_path, monkeypatch):
    model.save(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()

    def broken(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError):
        model.save(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_the_library_prints_nothing(tmp_path, scenes):
    code = f"from stego import Stego; Stego.fit({str(scenes / 'scene00.png')!r}, classes=2, backbone='tiny', steps=1)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert (result.stdout, result.stderr) == ("", "")


def test_device_auto_is_there():
    assert pick_device("auto").type in ("cpu", "cuda") and pick_device("cpu").type == "cpu"
