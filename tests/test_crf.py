"""crf.py against the O(N^2) definition, and the promises of its docstrings. Draws its own images."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import crf
from crf import dense_crf, upsample_along_edges, working_size

H, W, C = 12, 16, 5


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scene(seed=0, *, H=H, W=W):
    """Two-coloured image (3, H, W) uint8 with a curved edge, a ramp and a little noise."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    inside = (x > W / 2 + 2 * torch.sin(y / 3)).float()
    image = 90 + 60 * inside * torch.tensor([1.0, -0.5, 0.7])[:, None, None] + 0.5 * x
    return (image + 2 * torch.randn(3, H, W, generator=g)).clamp(0, 255).to(torch.uint8)


def noise_image(seed=0, *, H=H, W=W):
    return torch.randint(256, (3, H, W), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def draw_scores(seed=0, *, C=C, H=H, W=W, scale=1.0):
    return scale * torch.randn(C, H, W, generator=torch.Generator().manual_seed(seed))


def oracle(image, scores, *, iterations=10, sxy=67, srgb=3, compat=4, smooth_sxy=1, smooth_compat=3):
    """The paper's mean field over all pairs, in float64; symmetric normalisation, the pixel itself in it."""
    C, H, W = scores.shape
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    place = torch.stack([y, x], -1).view(-1, 2).double()  # (N, 2)
    colour = image.permute(1, 2, 0).reshape(-1, 3).double()  # (N, 3)
    far, unlike = torch.cdist(place, place) ** 2, torch.cdist(colour, colour) ** 2  # (N, N)

    def normalised(kernel):
        norm = kernel.sum(1)
        return kernel / (norm[:, None] * norm).sqrt()

    kernel = compat * normalised(
        torch.exp(-far / (2 * sxy**2) - unlike / (2 * srgb**2))
    ) + smooth_compat * normalised(torch.exp(-far / (2 * smooth_sxy**2)))
    logits = scores.view(C, -1).T.double()
    q = logits.softmax(1)
    for _ in range(iterations):
        q = (logits + kernel @ q).softmax(1)
    return q.T.view(C, H, W)


def gap(image, scores, **settings):
    """Mean absolute difference to the oracle."""
    return (dense_crf(image, scores, **settings) - oracle(image, scores, **settings)).abs().mean().item()


# ------------------------------------------------------------------------------- against the definition


def test_smooth_kernel_is_exact():
    assert gap(scene(), draw_scores(), compat=0) < 1e-4
    assert gap(scene(), draw_scores(), compat=0, smooth_sxy=2.5, smooth_compat=7) < 1e-4


@pytest.mark.parametrize("sxy, srgb", [(67, 3), (6, 10), (4, 200)])
def test_colour_kernel_is_close(sxy, srgb):
    scores = draw_scores()
    settings = dict(sxy=sxy, srgb=srgb, smooth_compat=0)
    assert gap(scene(), scores, **settings) < 0.02
    moved = (oracle(scene(), scores, **settings) - scores.softmax(0)).abs().mean()
    assert gap(scene(), scores, **settings) < 0.15 * moved  # so that an identity could not pass


@pytest.mark.parametrize("scale, same", [(0.3, 0.93), (3.0, 0.97)], ids=["soft", "sharp"])
def test_both_kernels_are_close(scale, same):
    """White noise for scores is the hardest case there is; bench/crf_speed.py measures real ones."""
    ours, exact = zip(
        *(
            (dense_crf(scene(i), s), oracle(scene(i), s))
            for i in range(8)
            for s in [draw_scores(i, scale=scale)]
        )
    )
    ours, exact = torch.stack(ours), torch.stack(exact)  # (8, C, H, W)
    assert (ours - exact).abs().mean() < 0.02
    assert (ours.argmax(1) == exact.argmax(1)).float().mean() >= same


def test_zero_weights_return_the_softmax():
    scores = draw_scores(scale=4.0)
    assert torch.equal(
        dense_crf(scene(), scores, compat=0, smooth_compat=0),
        scores.permute(1, 2, 0).softmax(-1).permute(2, 0, 1),
    )
    assert torch.equal(
        dense_crf(scene(), scores, iterations=0), dense_crf(scene(), scores, compat=0, smooth_compat=0)
    )


# ------------------------------------------------------------------------------- symmetries


@pytest.mark.parametrize("image", [scene(), noise_image()], ids=["scene", "noise"])
def test_rows_sum_to_one(image):
    q = dense_crf(image, draw_scores())
    assert q.shape == (C, H, W) and q.dtype == torch.float32 and (q >= 0).all()
    torch.testing.assert_close(q.sum(0), torch.ones(H, W))


def test_permuting_classes_permutes_the_result():
    scores, order = draw_scores(), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(dense_crf(scene(), scores[order]), dense_crf(scene(), scores)[order])


def test_a_constant_added_to_a_pixel_changes_nothing():
    scores, shift = draw_scores(), 50 * draw_scores(1, C=1)
    shifted = dense_crf(scene(), scores + shift)
    torch.testing.assert_close(shifted, dense_crf(scene(), scores), atol=1e-4, rtol=0)


def test_mirroring_both_mirrors_the_smooth_result():
    """The lattice is not mirror symmetric, the Gaussian is."""
    scores = draw_scores()
    torch.testing.assert_close(
        dense_crf(scene().flip(2), scores.flip(2), compat=0), dense_crf(scene(), scores, compat=0).flip(2)
    )


def test_a_batch_is_its_images_one_by_one():
    images = torch.stack([scene(0), noise_image(1), torch.full((3, H, W), 7, dtype=torch.uint8)])
    scores = torch.stack([draw_scores(i) for i in range(3)])
    single = torch.stack([dense_crf(image, s) for image, s in zip(images, scores)])
    torch.testing.assert_close(dense_crf(images, scores), single)


def test_score_sets_of_one_image_are_solved_one_by_one(monkeypatch):
    scores = torch.stack([draw_scores(i) for i in range(3)])
    single = torch.stack([dense_crf(scene(), each) for each in scores])
    built, build = [], crf._colour_kernel
    monkeypatch.setattr(crf, "_colour_kernel", lambda *settings: built.append(1) or build(*settings))
    assert torch.equal(dense_crf(scene(), scores), single)
    assert len(built) == 1  # they share the lattice


def test_one_and_two_threads_agree():
    image, scores = scene(H=100, W=300), draw_scores(H=100, W=300)  # two strips
    one = dense_crf(image, scores)
    torch.set_num_threads(2)
    assert torch.equal(dense_crf(image, scores), one)


@pytest.mark.parametrize("rows, sigma", [(5, 1), (1, 1), (1, 20), (2, 1.2)])
def test_strips_and_the_whole_agree(monkeypatch, rows, sigma):
    """Q is overwritten strip by strip: also where the small Gaussian reaches across several of them."""
    images, scores = torch.stack([scene(0), scene(1)]), torch.stack([draw_scores(0), draw_scores(1)])
    whole = dense_crf(images, scores, smooth_sxy=sigma)
    monkeypatch.setattr(crf, "STRIP", rows * W)  # 24 rows in strips of this many
    assert torch.equal(dense_crf(images, scores, smooth_sxy=sigma), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_computed_in_float32(dtype):
    scores = draw_scores().to(dtype)
    q = dense_crf(scene(), scores)
    assert q.dtype == torch.float32 and torch.equal(q, dense_crf(scene(), scores.float()))


def test_inputs_are_left_alone_and_layout_does_not_matter():
    image, scores = scene(), draw_scores()
    copies = image.clone(), scores.clone()
    scattered = scores.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(dense_crf(image, scattered), dense_crf(image, scores))
    assert torch.equal(image, copies[0]) and torch.equal(scores, copies[1])


# ------------------------------------------------------------------------------- odd images


def test_constant_image_pulls_all_pixels_together():
    scores = draw_scores()
    scores[2] += 0.5
    q = dense_crf(torch.full((3, H, W), 128, dtype=torch.uint8), scores, compat=10)
    assert (q.argmax(0) == 2).all()
    assert gap(torch.full((3, H, W), 128, dtype=torch.uint8), scores) < 0.02


def test_noise_image_is_left_to_the_small_gaussian():
    """No two colours are alike: the colour kernel holds little but the pixel itself."""
    image, scores = noise_image(), draw_scores()
    assert gap(image, scores, srgb=1) < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_thin_images(size):
    image, scores = scene(H=size[0], W=size[1]), draw_scores(H=size[0], W=size[1], scale=3.0)
    assert gap(image, scores, compat=0) < 1e-4
    assert gap(image, scores) < 0.02
    torch.testing.assert_close(dense_crf(image, scores).sum(0), torch.ones(size))


@pytest.mark.parametrize("sigma", [crf.MIN_SIGMA, 0.05, 1e-3, 1e-30])
def test_very_small_sigmas_leave_the_pixel_itself(sigma):
    """Neighbouring integers are then strangers: the kernel is the identity, to what float32 holds."""
    ramp = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")).to(torch.uint8)
    ramp = torch.cat([ramp, ramp[:1]])  # neighbours are one level apart
    scores = draw_scores()
    for image in (ramp, noise_image()):
        expected = oracle(image, scores, sxy=1e-9, srgb=1e-9, smooth_compat=0).float()
        for settings in (dict(sxy=sigma, srgb=sigma), dict(sxy=sigma), dict(srgb=sigma)):
            q = dense_crf(image, scores, **settings, smooth_compat=0)
            torch.testing.assert_close(q, expected, atol=1e-4, rtol=0)
        assert gap(image, scores, smooth_sxy=max(sigma, 1e-9), compat=0) < 1e-4


def test_keys_stay_apart_when_they_do_not_fit_beside_positions(monkeypatch):
    """The slow sort gives the lattice of the fast one."""
    image, scores = noise_image(), draw_scores()
    fast = dense_crf(image, scores)
    monkeypatch.setattr(crf, "_sort", lambda key, size: key.sort(stable=True))
    assert torch.equal(dense_crf(image, scores), fast)


def test_keys_that_would_overflow_are_refused():
    floor = torch.tensor([[0] * 5, [10_000] * 5])
    with pytest.raises(ValueError, match="larger sxy or srgb"):
        crf._pack(floor, torch.zeros(2, dtype=torch.long), 1)
    key, stride, size = crf._pack(floor // 4, torch.zeros(2, dtype=torch.long), 1)
    assert 0 < key[0] < key[1] < size < 2**63


def test_large_sigmas():
    scores = draw_scores()
    assert gap(scene(), scores, smooth_sxy=1000, compat=0) < 1e-3
    assert torch.isfinite(dense_crf(scene(), scores, sxy=1e6, srgb=1e6)).all()


@pytest.mark.parametrize("classes", [1, 2, 255])
def test_number_of_classes(classes):
    scores = draw_scores(C=classes)
    q = dense_crf(scene(), scores)
    assert q.shape == (classes, H, W) and gap(scene(), scores) < 0.02
    torch.testing.assert_close(q.sum(0), torch.ones(H, W))


def test_impossible_classes_and_large_scores():
    scores = draw_scores()
    scores[0, :, :4] = -math.inf
    q = dense_crf(scene(), scores)
    assert (q[0, :, :4] == 0).all() and torch.isfinite(q).all()
    assert torch.isfinite(dense_crf(scene(), 1e30 * draw_scores(), compat=1e4)).all()


# ------------------------------------------------------------------------------- the lattice by itself


@pytest.mark.parametrize("d", [1, 2, 3])
def test_lattice_is_a_unit_gaussian(d):
    """The answer to one point, r away in any direction and averaged over where it lies in its cell."""
    g = torch.Generator().manual_seed(d)
    trials, radius = 200, torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0])
    source = 20 * torch.rand(trials, 1, d, generator=g)
    way = F.normalize(torch.randn(trials, 1, d, generator=g), dim=2)
    crowd = source + 8 * torch.rand(trials, 1000, d, generator=g) - 4  # so that no vertex is missing
    points = torch.cat([source, source + radius[:, None] * way, crowd], 1)  # (trials, n, d)
    n = points.shape[1]
    lattice = crf.Lattice(points.view(-1, d), torch.arange(trials).repeat_interleave(n), trials)
    impulse = torch.zeros(trials, n)
    impulse[:, 0] = 1
    answer = lattice.slice(lattice.blur(impulse.view(-1, 1)), 0, trials * n).view(trials, n)[:, 1:6].mean(0)
    torch.testing.assert_close(answer / answer[0], torch.exp(-0.5 * radius**2), atol=0.08, rtol=0)


def test_barycentric_weights_give_the_point_back():
    features = 30 * torch.rand(500, 5, generator=torch.Generator().manual_seed(0)) - 15
    lattice = crf.Lattice(features, torch.zeros(500, dtype=torch.long), 1)
    assert (lattice.slice_weight >= 0).all()
    torch.testing.assert_close(lattice.slice_weight.sum(1), torch.ones(500))
    # splatting keeps the mass, and no point shares a vertex with itself
    assert lattice.splat_start[-1] == 500 * 6
    assert (lattice.slice_vertex.sort(1)[0].diff(dim=1) > 0).all()


# ------------------------------------------------------------------------------- bad input

BAD = {
    "numpy image": (lambda: (scene().numpy(), draw_scores()), "image is a ndarray"),
    "float image": (lambda: (scene().float(), draw_scores()), "image is torch.float32, .*; need uint8"),
    "integer scores": (lambda: (scene(), draw_scores().long()), "scores torch.int64; need .*floating point"),
    "sizes differ": (lambda: (scene(), draw_scores(H=13)), r"image \(3, 12, 16\) and scores \(5, 13, 16\)"),
    "H and W swapped": (lambda: (scene().transpose(1, 2), draw_scores()), "of the same size"),
    "channels last": (lambda: (scene().permute(1, 2, 0), draw_scores()), r"need \(3, H, W\)"),
    "grey image": (lambda: (scene()[:1], draw_scores()), r"need \(3, H, W\)"),
    "only one has a batch": (lambda: (scene()[None], draw_scores()), r"\(B, 3, H, W\)"),
    "batches differ": (lambda: (scene().expand(2, 3, H, W), draw_scores().expand(3, C, H, W)), r"\(B, 3"),
    "flat scores": (lambda: (scene(), draw_scores().view(C, -1)), r"\(C, H, W\)"),
    "no pixels": (lambda: (scene()[:, :0], draw_scores()[:, :0]), "not empty"),
    "no classes": (lambda: (scene(), draw_scores()[:0]), "not empty"),
    "too many pixels": (lambda: [x.expand(2 * 10**6, *x.shape) for x in (scene(), draw_scores())], "smaller"),
    "a NaN": (lambda: (scene(), draw_scores().index_fill(0, torch.tensor(1), math.nan)), "NaN"),
    "an infinite score": (lambda: (scene(), draw_scores().index_fill(0, torch.tensor(1), math.inf)), "inf"),
    "all impossible": (lambda: (scene(), torch.full((C, H, W), -math.inf)), "-inf"),
}


@pytest.mark.parametrize("make, says", BAD.values(), ids=BAD)
def test_bad_inputs_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        dense_crf(*make())


@pytest.mark.parametrize("setting", ["sxy", "srgb", "smooth_sxy"])
@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
def test_bad_sigmas_are_refused(setting, value):
    with pytest.raises(ValueError, match=rf"got {setting}={value}; need a standard deviation above 0"):
        dense_crf(scene(), draw_scores(), **{setting: value})


@pytest.mark.parametrize("setting", ["compat", "smooth_compat"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_weights_are_refused(setting, value):
    with pytest.raises(ValueError, match=rf"got {setting}={value}; need a weight of 0 or more"):
        dense_crf(scene(), draw_scores(), **{setting: value})


@pytest.mark.parametrize("value", [-1, 2.5, "10"])
def test_bad_iterations_are_refused(value):
    with pytest.raises(ValueError, match="got iterations="):
        dense_crf(scene(), draw_scores(), iterations=value)


# ------------------------------------------------------------------------------- large photos


@pytest.mark.parametrize(
    "size, megapixels, want",
    [
        ((3000, 4000), 0.5, (612, 816)),
        ((320, 320), 0.5, (320, 320)),
        ((1, 4_000_000), 0.5, (1, 1_414_214)),
        ((1, 1), 0.5, (1, 1)),
        ((1000, 2000), 2.0, (1000, 2000)),
    ],
)
def test_working_size(size, megapixels, want):
    assert working_size(size, megapixels=megapixels) == want


@pytest.mark.parametrize("size, megapixels", [((0, 5), 0.5), ((5, 5), 0), ((5, 5), -1), ((5, 5), math.nan)])
def test_working_size_refuses_nonsense(size, megapixels):
    with pytest.raises(ValueError, match="megapixels"):
        working_size(size, megapixels=megapixels)


def test_upsampling_a_flat_image_is_bilinear():
    probs = draw_scores(H=9, W=11).softmax(0)
    image = torch.full((3, 50, 70), 99, dtype=torch.uint8)
    bilinear = F.interpolate(probs[None], (50, 70), mode="bilinear")[0]
    top = bilinear.topk(2, dim=0).values
    clear = top[0] - top[1] > 10 * crf.UPSAMPLE_FLOOR  # elsewhere the floor may tip the scales
    labels = upsample_along_edges(image, probs)
    assert labels.dtype == torch.uint8 and labels.shape == (50, 70) and clear.float().mean() > 0.9
    assert torch.equal(labels[clear], bilinear.argmax(0).to(torch.uint8)[clear])


@pytest.mark.parametrize("edge", range(44, 53))
@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned"])
def test_upsampling_follows_a_step_edge(edge, turned):
    """The edge runs through a coarse pixel (8 wide) wherever it likes; labels follow it to the pixel."""
    image = torch.full((3, 64, 96), 60, dtype=torch.uint8)
    image[:, :, edge:] = 200
    truth = (torch.arange(96) >= edge).expand(64, 96)
    probs = F.adaptive_avg_pool2d(truth[None].float(), (8, 12))
    probs = torch.cat([1 - probs, probs])
    if turned:
        image, probs, truth = image.mT, probs.mT, truth.mT
    labels = upsample_along_edges(image, probs)
    assert torch.equal(labels.bool(), truth)


def test_upsampling_to_the_same_size_is_the_argmax():
    probs = draw_scores().softmax(0)
    assert torch.equal(upsample_along_edges(scene(), probs).long(), probs.argmax(0))


def test_upsampling_shortcut_changes_nothing(monkeypatch):
    probs, image = F.avg_pool2d(draw_scores(H=24, W=24, scale=9.0), 5, 1).softmax(0), scene(H=77, W=91)
    quick = upsample_along_edges(image, probs)
    monkeypatch.setattr(crf, "_disagree", lambda labels: torch.ones_like(labels, dtype=torch.bool))
    monkeypatch.setattr(crf, "UPSAMPLE_PIXELS", 100)
    assert torch.equal(upsample_along_edges(image, probs), quick)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1)])
def test_upsampling_thin_images(size):
    probs = draw_scores(C=256, H=1, W=1).softmax(0)
    labels = upsample_along_edges(scene(H=size[0], W=size[1]), probs)
    assert (labels == probs.argmax(0)).all()


BAD_UPSAMPLING = {
    "probs larger": (lambda: (scene(), draw_scores(H=H + 1)), "need them no larger than the image"),
    "too many classes": (lambda: (scene(), draw_scores(C=257, H=2, W=2)), "1 to 256 classes"),
    "integer probs": (lambda: (scene(), draw_scores().long()), "floating point"),
    "a batch": (lambda: (scene()[None], draw_scores()[None]), r"need \(3, H, W\) and"),
    "a list": (lambda: (scene(), [1]), "probs is a list"),
    "a NaN": (lambda: (scene(), draw_scores(H=2, W=2) * math.nan), "NaN"),
}


@pytest.mark.parametrize("make, says", BAD_UPSAMPLING.values(), ids=BAD_UPSAMPLING)
def test_bad_upsampling_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        upsample_along_edges(*make())


# ------------------------------------------------------------------------------- by itself, and on CUDA


def test_crf_imports_nothing_of_ours():
    tree = ast.parse(Path(crf.__file__).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"numpy", "torch"}


class OnMps(torch.Tensor):
    """A tensor that says it is on mps."""

    device = property(lambda self: torch.device("mps"))


class FakeMps(TorchFunctionMode):
    """Moves tensors to a pretended mps device and back, and refuses what the real one does not have."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        here = any(isinstance(x, OnMps) for x in tensors)
        target = [torch.device(x).type for x in args[1:] if isinstance(x, (torch.device, str))]
        if function is torch.Tensor.to and target == ["mps"]:
            return args[0].as_subclass(OnMps)
        if function is torch.Tensor.to and target == ["cpu"]:
            return args[0].as_subclass(torch.Tensor)
        if here and any(
            name in function.__name__ for name in ("embedding_bag", "adaptive", "double", "numpy")
        ):
            raise NotImplementedError(f"{function.__name__} is not implemented for mps")
        return function(*args, **(kwargs or {}))


def test_mps_tensors_are_computed_on_the_cpu():
    image, scores = scene(H=48, W=64), draw_scores(H=48, W=64)
    q = dense_crf(image, scores)
    probs = F.avg_pool2d(q, 4)
    labels = upsample_along_edges(image, probs)
    with FakeMps():
        with pytest.raises(NotImplementedError):  # the pretended device is as strict as it should be
            F.adaptive_avg_pool2d(image.float().to("mps"), (4, 4))
        fake_q = dense_crf(image.to("mps"), scores.to("mps"))
        fake_labels = upsample_along_edges(image.to("mps"), probs.to("mps"))
        same_size = upsample_along_edges(image.to("mps"), q.to("mps"))
        assert all(isinstance(x, OnMps) for x in (fake_q, fake_labels, same_size))
        fake_q, fake_labels, same_size = (x.to("cpu") for x in (fake_q, fake_labels, same_size))
    assert torch.equal(fake_q, q) and torch.equal(fake_labels, labels)
    assert torch.equal(same_size.long(), q.argmax(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_agrees_with_the_cpu():
    images = torch.stack([scene(0, H=64, W=80), noise_image(1, H=64, W=80)])
    scores = torch.stack([draw_scores(i, H=64, W=80) for i in range(2)])
    cuda = dense_crf(images.cuda(), scores.cuda()).cpu()
    torch.testing.assert_close(cuda, dense_crf(images, scores), atol=1e-4, rtol=0)
    probs = cuda[0, :, ::4, ::4]
    labels = upsample_along_edges(images[0].cuda(), probs.cuda()).cpu()
    assert torch.equal(labels, upsample_along_edges(images[0], probs))
