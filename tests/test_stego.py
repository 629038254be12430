"""The method: loss, derangements, neighbours, head, training, fit, predict."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Mean
from PIL import Image

import stego
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
from stego_parts import backbones
from stego_parts.checkpoint import training_warning
from stego_parts.clusters import inherit_ids, resample_by_density
from stego_parts.config import Config, fit_config
from stego_parts.features import TokenCache, encode

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
    head, config = Head(8, 4).eval(), fit_config(clusters=2, preset="small")
    f, k = torch.randn(2, 2, 5, 8).unbind()
    terms = (("self", f, f, slice(None)), ("knn", f, k, slice(None)), ("rand", f, f, [1, 0]))
    want = sum(
        getattr(config, f"lambda_{name}")
        * direct_loss(x, y[order], head(x), head(y)[order], getattr(config, f"b_{name}"), True)
        for name, x, y, order in terms
    )
    assert torch.allclose(training_loss(head, f, k, config), want, atol=1e-6)


@pytest.mark.parametrize(
    "off", [("self",), ("knn",), ("rand",), ("knn", "rand"), ("self", "rand"), ("self", "knn")]
)
def test_a_lambda_of_zero_switches_its_term_off(monkeypatch, off):
    """What is off is not computed: its codes are not asked for, its correspondences not taken."""
    torch.manual_seed(0)
    head, config = (
        Head(8, 4).eval(),
        fit_config(clusters=2, preset="small", **{f"lambda_{name}": 0.0 for name in off}),
    )
    f, k = torch.randn(2, 2, 5, 8).unbind()
    compared, asked, compare = [], [], stego.correlation_loss
    monkeypatch.setattr(
        stego, "correlation_loss", lambda *args, **kw: compared.append(args[4]) or compare(*args, **kw)
    )
    with head.register_forward_hook(lambda module, args, output: asked.append(args[0])):
        loss = training_loss(head, f, None if "knn" in off else k, config)
    terms = {"self": (f, f, slice(None)), "knn": (f, k, slice(None)), "rand": (f, f, [1, 0])}
    want = sum(
        getattr(config, f"lambda_{name}")
        * direct_loss(x, y[order], head(x), head(y)[order], getattr(config, f"b_{name}"), True)
        for name, (x, y, order) in terms.items()
        if name not in off
    )
    assert torch.allclose(loss, want, atol=1e-6) and loss.requires_grad
    assert len(asked) == (1 if "knn" in off else 2)
    assert len(compared) == len(terms) - len(off)


def test_head_is_the_references_convolutions():
    head, x = Head(8, 4).eval(), torch.randn(2, 8, 3, 5)
    linear, first, second = head.linear, head.mlp[0], head.mlp[2]
    conv = [F.conv2d(x, layer.weight[..., None, None], layer.bias) for layer in (linear, first)]
    want = conv[0] + F.conv2d(conv[1].relu(), second.weight[..., None, None], second.bias)
    got = head(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (3, 5))
    assert torch.allclose(got, want, atol=1e-6)


def test_a_head_starts_from_the_principal_directions():
    """Its codes correspond like the best approximation of the features by so few numbers, that of an SVD."""
    torch.manual_seed(0)
    f = torch.randn(500, 12) @ torch.diag(torch.arange(12, 0, -1).float()) + 3
    head = Head(12, 4).eval()
    at_random = unit(head(f))
    head.start_from(f)
    u, s, v = np.linalg.svd(unit(f).numpy(), full_matrices=False)
    best = unit(torch.from_numpy(u[:, :4] * s[:4]))  # rows of length one, as codes are compared
    error = (unit(head(f)) @ unit(head(f)).T - best @ best.T).abs().mean()
    assert error < 0.05 < (at_random @ at_random.T - best @ best.T).abs().mean()
    few = Head(3, 4)  # more numbers than channels: those left over start at 0
    few.start_from(torch.randn(50, 3))
    assert (few.linear.weight[3] == 0).all() and (few.linear.weight[:3] != 0).any(1).all()


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
    got = nearest_neighbors(means, torch.arange(n), 7)
    assert got.shape == (n, 1 if n == 1 else min(7, n - 1))
    for i in range(n if n > 1 else 0):
        others = sorted((j for j in range(n) if j != i), key=lambda j: -float(means[i] @ means[j]))
        assert got[i].tolist() == others[:7]


def test_neighbors_are_of_other_images_where_there_are_enough():
    means = unit(torch.randn(10, 6))
    images = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2])
    got = nearest_neighbors(means, images, 7)
    for i in range(10):
        others = [j for j in range(10) if images[j] != images[i]]
        near = sorted(others, key=lambda j: -float(means[i] @ means[j]))[:7]
        assert got[i, : len(near)].tolist() == near
        assert len(set(got[i].tolist()) - {i}) == 7  # filled up with its own image's crops
    assert nearest_neighbors(means[:5], images[:5], 7).shape == (5, 4)


# ---- fit -------------------------------------------------------------------------------------------------------


def test_fit_finds_the_parts_of_drawn_scenes(model, scenes):
    """Four clusters keep sky, land and what stands on it apart; the largest of the parts is half of all."""
    from conftest import draw_scene

    from cli_parts.scores import confusion_matrix

    four = model.recluster(scenes, clusters=4)
    confusion = np.zeros((3, 4), np.int64)
    for seed in range(100, 108):
        image, labels = draw_scene(seed)
        mask = four.predict(image, crf=False, resolution=160)
        confusion += confusion_matrix(labels, mask, n_classes=3, n_clusters=4)
    assert confusion.sum(1).max() / confusion.sum() < 0.6
    assert confusion.max(0).sum() / confusion.sum() > 0.85  # each cluster in its majority part


def test_same_seed_same_model(scenes):
    before = torch.random.get_rng_state()
    two = [scenes / "scene00.png", scenes / "scene01.png"]
    one, same, other = (Stego.fit(two, clusters=3, backbone="tiny", steps=5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's generator is left alone
    assert torch.equal(one.centers, same.centers) and not torch.equal(one.centers, other.centers)
    for key, value in one.head.state_dict().items():
        assert torch.equal(value, same.head.state_dict()[key])


def test_training_moves_the_loss(scenes):
    paths = sorted(scenes.rglob("*.png"))[:2]
    cache = encode(backbones.load_backbone("tiny"), paths, Config(views="five"))
    losses = []
    for steps in (1, 40):
        torch.manual_seed(0)
        config = fit_config("small", clusters=2, steps=steps)
        neighbors = nearest_neighbors(cache.means, cache.images)
        head, _ = stego.train_head(cache, neighbors, config)
        crops, partner = torch.arange(len(cache)), neighbors[:, 0]
        loss = training_loss(head, cache.sample(crops, 121), cache.sample(partner, 121), config)
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_the_learning_rate_falls_to_zero_where_it_decays():
    config = fit_config(steps=4, learning_rate=1.0, decay=True)
    assert [config.learning_rate_at(step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert fit_config(steps=4, learning_rate=1.0, decay=False).learning_rate_at(3) == 1.0


def test_the_decay_reaches_the_optimizer(monkeypatch):
    """With a rate of nothing the head stays where it began, so the rate of each step is the config's."""
    monkeypatch.setattr(Config, "learning_rate_at", lambda self, step: 0.0)
    cache = filled_cache(torch.randn(4, 8, 6, 6))
    config = fit_config(
        steps=3, learning_rate=1.0, decay=True, batch_size=2, b_self=0.1, b_knn=0.1, b_rand=0.1
    )
    heads = []
    for steps in (1, 3):
        torch.manual_seed(0)
        neighbors = nearest_neighbors(cache.means, cache.images)
        heads.append(stego.train_head(cache, neighbors, replace(config, steps=steps))[0])
    assert torch.equal(heads[0].linear.weight, heads[1].linear.weight)


def test_one_image_is_enough(tmp_path, scenes):
    Image.open(scenes / "scene00.png").save(tmp_path / "only.png")
    mask = Stego.fit(tmp_path, clusters=2, backbone="tiny", steps=3).predict(tmp_path / "only.png", crf=False)
    assert set(np.unique(mask)) <= {0, 1}
    Stego.fit(
        tmp_path, clusters=2, backbone="tiny", steps=2, views="whole", lambda_self=0, lambda_knn=0
    )  # nothing left


def test_unreadable_images_are_named_and_left_out(tmp_path, scenes, caplog):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (5, 5)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="None of the 2 images"):
        Stego.fit(tmp_path, backbone="tiny")
    Image.open(scenes / "scene00.png").save(tmp_path / "good.png")
    model = Stego.fit(tmp_path, clusters=2, backbone="tiny", steps=2)
    assert model.config.crops == 5
    assert "broken.jpg" in caplog.text and "5 x 5 pixels, smaller than one patch" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(clusters=256), "1 to 255"),
        (dict(clusters=0), "1 to 255"),
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
        Stego.fit(tmp_path, clusters=200, backbone="tiny", steps=1, cache_size=5 * 2 * 600 * 10 / 1e9)


def test_shifts_follow_the_features():
    """Tokens around one direction correspond more: every b moves with them, by the documented rule."""
    torch.manual_seed(0)
    shifts = {}
    for common in (0.0, 2.0):
        cache = filled_cache(torch.randn(20, 16, 20, 20) + common)
        neighbors = nearest_neighbors(cache.means, cache.images)
        shifts[common] = stego.shifts_from_data(cache, neighbors, Config(centering=True))
    for name in stego.SHIFTS:
        assert shifts[2.0][name] > shifts[0.0][name] + 0.3
    scattered = 1 / 16**0.5  # standard deviation of random cosines
    assert shifts[0.0]["b_rand"] == pytest.approx(stego.SHIFTS["b_rand"] * scattered, abs=0.02)


def test_what_is_given_is_kept_and_the_rest_from_the_data(scenes):
    image = scenes / "scene00.png"
    one = Stego.fit(image, clusters=2, backbone="tiny", steps=1, b_rand=0.7).config
    assert one.preset == "default" and one.b_rand == 0.7 and None not in (one.b_self, one.b_knn)
    fixed = Stego.fit(image, clusters=2, backbone="tiny", steps=1, preset="small").config
    assert (fixed.preset, fixed.b_self, fixed.b_rand, fixed.views) == ("small", 0.18, 0.46, "five")


def test_defaults_go_with_the_backbone(scenes, monkeypatch):
    """What was measured with transformers for them and others, and with tiny for it; presets stay as published."""
    monkeypatch.setattr(stego, "load_backbone", lambda *args, **options: Mean())
    other = Stego.fit(scenes / "sub", clusters=2, backbone="dinov2_vits14", steps=1).config
    assert (other.views, other.evenness, other.adaptation) == ("windows", 0.5, 8.0)
    assert (other.learning_rate, other.decay) == (2e-3, True)
    assert fit_config().on_backbone("mean").steps == 1000
    published = fit_config("small").on_backbone("dinov2_vits14")
    assert (published.learning_rate, published.decay, published.evenness) == (5e-4, False, 0.0)
    tiny = fit_config().on_backbone("tiny")
    assert (tiny.views, tiny.b_self, tiny.preset) == ("windows", None, "default")
    assert (tiny.steps, tiny.learning_rate) == (300, 4e-3)
    own = fit_config(steps=7, learning_rate=1e-3).on_backbone("tiny")
    assert (own.steps, own.learning_rate) == (7, 1e-3)


def test_evened_rows_give_rare_directions_a_chance():
    torch.manual_seed(0)
    direction = unit(torch.randn(2, 16))
    codes = torch.cat([direction[:1].expand(3800, -1), direction[1:].expand(200, -1)]) + 0.05 * torch.randn(
        4000, 16
    )
    share = [
        (unit(resample_by_density(codes, evenness)) @ direction[1] > 0.7).float().mean().item()
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
def test_bad_runs_are_named_in_words(b, word):
    """Pressure that is all positive puts every code in one place, all negative drives them apart."""
    torch.manual_seed(0)
    kinds = (
        torch.randint(2, (20, 12, 12)) + 2 * (torch.arange(20) % 2)[:, None, None]
    )  # two of four in each crop
    parts = torch.randn(4, 16)[kinds].permute(0, 3, 1, 2)  # (crops, C, h, w)
    cache = filled_cache(parts + 0.5 * torch.randn(parts.shape))
    neighbors = nearest_neighbors(cache.means, cache.images)
    quick = dict(steps=60, learning_rate=5e-3, decay=False, centering=True)  # bad quickly
    options = fit_config(clusters=2, batch_size=8, **quick)
    shifts = (
        stego.shifts_from_data(cache, neighbors, options) if b is None else dict(b_self=b, b_knn=b, b_rand=b)
    )
    _, history = stego.train_head(cache, neighbors, replace(options, **shifts))
    said = training_warning(history)
    assert word in said if word else said is None
    assert training_warning(history[:3]) is None  # too short to tell


def filled_cache(features) -> TokenCache:
    """A cache of one crop an image, all of its features (C, h, w)."""
    channels, h, w = features[0].shape
    cache = TokenCache(len(features), 1, h * w, channels)
    for i, each in enumerate(features):
        cache.add(i, each[None])
    cache.finalize()
    return cache


def test_features_join_the_codes_by_their_weight(scenes, tmp_path):
    """The cosine of two descriptions is the mean of both cosines, weighted by 1 and the square of the weight."""
    picture = scenes / "scene00.png"
    model = Stego.fit(picture, clusters=3, backbone="tiny", steps=2, feature_weight=0.5)
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
        fit_config(clusters=3, feature_weight=-1)


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


def test_too_small_an_image(model):
    with pytest.raises(ValueError, match="4 x 30 pixels, smaller than one patch"):
        model.predict(np.zeros((30, 4, 3), np.uint8))


# ---- save and load ---------------------------------------------------------------------------------------------


def test_the_library_prints_nothing(tmp_path, scenes):
    code = f"from stego import Stego; Stego.fit({str(scenes / 'scene00.png')!r}, clusters=2, backbone='tiny', steps=1)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert (result.stdout, result.stderr) == ("", "")


def test_from_python(scenes, model):
    other = model.recluster(scenes / "sub", clusters=2, adaptation=0.0)
    assert len(other.centers) == 2 and other.head is model.head and other.backbone is model.backbone
    assert (other.config.adaptation, other.config.steps, other.config.crops) == (0.0, 60, 20)
    with pytest.raises(ValueError, match="Got batch_size, steps for"):
        model.recluster(scenes, steps=5, batch_size=3)


def test_images_that_can_be_listed_once(scenes, model, monkeypatch):
    """A generator's images are noted as a list's are."""
    monkeypatch.chdir(scenes)
    found = Path().glob("scene0[01].png")
    fitted = Stego.fit(found, clusters=2, backbone="tiny", steps=1, batch_size=2)
    assert sorted(fitted.config.images) == ["scene00.png", "scene01.png"]
    assert len(fitted.recluster(clusters=3).centers) == 3
    assert model.recluster(iter(["scene01.png"]), clusters=2).config.images == ("scene01.png",)


def test_one_name_for_two_clusters(saved):
    model = Stego.load(saved)
    model.rename({0: "ground", 2: "ground"})
    assert model.select(["Ground"]) == model.select([2]) == [0, 2]
    assert model.select(["1", "ground"]) == [0, 1, 2]


def test_the_same_data_fitted_anew_keeps_numbers_names_and_colours(scenes, tmp_path):
    two = [scenes / "scene00.png", scenes / "scene01.png"]
    options = dict(clusters=3, backbone="tiny", steps=20, batch_size=8)
    earlier = Stego.fit(two, **options)
    inherit_ids(earlier, earlier, {0: 2, 1: 0, 2: 1})  # another order than by share
    earlier.rename({0: "a", 1: "b", 2: "c"})
    earlier.palette = np.array([[9, 0, 0], [0, 9, 0], [0, 0, 9]], np.uint8)
    earlier.save(tmp_path / "earlier.pt")
    again = Stego.fit(two, match=Stego.load(tmp_path / "earlier.pt"), **options)
    assert again.names == ["a", "b", "c"] and np.array_equal(again.palette, earlier.palette)
    image = np.asarray(Image.open(scenes / "scene00.png").convert("RGB"))
    before, after = (model.predict(image, crf=False, resolution=160) for model in (earlier, again))
    assert (before == after).mean() > 0.99


def test_probabilities_of_a_large_photo_are_bounded(model):
    q = model.probabilities(np.zeros((600, 900, 3), np.uint8), crf_size=0.05, resolution=64, crf=False)
    assert (
        q.dtype == np.float32
        and q[0].size <= 50_500
        and q.shape[2] / q.shape[1] == pytest.approx(1.5, abs=0.02)
    )
