"""CosineKMeans: finds directions whatever the lengths, repeats itself, repairs starved centres."""

import pytest
import torch
import torch.nn.functional as F

from kmeans import CosineKMeans


def blobs(clusters=6, each=200, size=16, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(clusters, size, generator=generator), dim=1)
    label = torch.arange(clusters).repeat_interleave(each)
    x = directions[label] + noise * torch.randn(clusters * each, size, generator=generator)
    return x * torch.rand(len(x), 1, generator=generator).add(0.1), label, directions


def test_finds_the_directions():
    x, label, directions = blobs()
    kmeans = CosineKMeans(6).fit(x)
    cosine = kmeans.cluster_centers_ @ directions.T  # (6, 6)
    assert cosine.max(0).values.min() > 0.99
    found = kmeans.predict(x)
    for k in range(6):
        assert len(found[label == k].unique()) == 1


def test_centers_have_unit_length_and_inertia_is_the_mean_distance():
    x, _, _ = blobs(noise=0.5)
    kmeans = CosineKMeans(6).fit(x)
    assert torch.allclose(kmeans.cluster_centers_.norm(dim=1), torch.ones(6))
    nearest = (F.normalize(x, dim=1) @ kmeans.cluster_centers_.T).max(1).values
    assert kmeans.inertia_ == pytest.approx(float((1 - nearest).mean()), abs=1e-6)


def test_length_of_rows_does_not_matter():
    x, _, _ = blobs()
    one, other = CosineKMeans(6).fit(x), CosineKMeans(6).fit(x * 1024)
    assert torch.equal(one.cluster_centers_, other.cluster_centers_)


def test_same_seed_same_centers():
    x, _, _ = blobs(noise=1.0)
    one, same, other = (CosineKMeans(6, seed=seed).fit(x).cluster_centers_ for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_starved_center_is_put_where_it_is_needed():
    x, _, directions = blobs(clusters=4, each=500, noise=0.05)
    kmeans = CosineKMeans(4).partial_fit(x)
    lost = (kmeans.cluster_centers_ @ directions[0]).argmax()
    kmeans.cluster_centers_[lost] = -F.normalize(directions.sum(0), dim=0)  # where no row is
    kmeans._sums[lost], kmeans._counts[lost] = 0.0, 0.0
    for _ in range(60):
        kmeans.partial_fit(x)
    assert (kmeans.cluster_centers_ @ directions.T).max(0).values.min() > 0.95


def test_more_starts_are_never_worse():
    x, _, _ = blobs(clusters=12, each=50, noise=0.3)
    assert CosineKMeans(12, n_init=5).fit(x).inertia_ <= CosineKMeans(12, n_init=1).fit(x).inertia_ + 1e-6


def test_mini_batches_end_near_an_optimum_of_all_rows():
    """Full passes of spherical k-means (Dhillon & Modha) from our centres gain next to nothing."""
    x, _, _ = blobs(clusters=12, each=2000, noise=0.4)
    kmeans, x = CosineKMeans(8, batch_size=1024).fit(x), F.normalize(x, dim=1)
    before, centers = x.clone(), kmeans.cluster_centers_
    for _ in range(30):
        labels = (x @ centers.T).argmax(1)
        centers = F.normalize(torch.stack([x[labels == k].sum(0) for k in range(8)]), dim=1)
    optimum = float(1 - (x @ centers.T).amax(1).mean())
    assert kmeans.inertia_ < 1.02 * optimum
    CosineKMeans(8).fit(x)
    assert torch.equal(x, before)  # the rows stay as they are


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.randn(3, 4), "3 non-zero rows for 5 clusters"),
        (torch.zeros(10, 4), "0 non-zero rows"),
        (torch.full((10, 4), torch.nan), "finite"),
        (torch.randn(10), "floating point rows"),
        (torch.ones(10, 4, dtype=torch.int64), "floating point rows"),
    ],
)
def test_bad_rows(x, message):
    with pytest.raises(ValueError, match=message):
        CosineKMeans(5).fit(x)


def test_predict_needs_a_fit():
    with pytest.raises(ValueError, match="call fit"):
        CosineKMeans(2).predict(torch.randn(3, 4))


def test_zero_rows_get_some_cluster():
    x, _, _ = blobs()
    labels = CosineKMeans(6).fit(x).predict(torch.cat([x, torch.zeros(3, 16)]))
    assert len(labels) == len(x) + 3


def test_the_last_round_moves_no_starved_centre(monkeypatch):
    """A centre put on a row in the last batch would stay that one row: nothing refines it any more."""
    repaired, repair = [], CosineKMeans._repair

    def record(self, x, cosine):
        repaired.append(self._batches)
        repair(self, x, cosine)

    monkeypatch.setattr(CosineKMeans, "_repair", record)
    CosineKMeans(20, n_init=1, max_iter=40, batch_size=64).fit(torch.randn(500, 8))
    assert repaired == [10, 20, 30]


def test_sums_do_not_depend_on_the_order_of_additions(monkeypatch):
    """index_add_ adds in any order on CUDA; sums are a matrix product instead."""

    def refuse(*args, **kwargs):
        raise AssertionError("index_add_ is not deterministic on CUDA")

    monkeypatch.setattr(torch.Tensor, "index_add_", refuse)
    CosineKMeans(3, n_init=1, max_iter=12).fit(torch.randn(200, 5))


@pytest.fixture
def threads():
    """Sets how many threads torch has, until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_starts_are_the_same_however_many_run_at_once(threads):
    x, _, _ = blobs(clusters=12, each=100, noise=0.5)
    found = []
    for count in (1, 2, 3):
        threads(count)
        kmeans = CosineKMeans(9, n_init=5, max_iter=20, batch_size=300).fit(x)
        found.append((kmeans.cluster_centers_, torch.rand(4, generator=kmeans._generator)))
        assert torch.get_num_threads() == count
    for centers, drawn in found[1:]:
        assert torch.equal(centers, found[0][0]) and torch.equal(drawn, found[0][1])


def test_starts_go_on_with_the_random_numbers_where_the_last_ended():
    """As if they came one after the other, each as a k-means of one start."""
    x, _, _ = blobs(clusters=12, each=100, noise=0.5)
    options = dict(max_iter=20, batch_size=300)
    together, alone = CosineKMeans(9, n_init=4, **options).fit(x), CosineKMeans(9, n_init=1, **options)
    inertias = [alone.fit(x).inertia_ for _ in range(4)]
    assert together.inertia_ == pytest.approx(min(inertias), abs=1e-6)
    assert len(set(inertias)) > 1


def test_further_batches_refine_the_best_start():
    x, _, _ = blobs(clusters=12, each=100, noise=0.5)
    kmeans = CosineKMeans(12, n_init=6, max_iter=30, seed=1).fit(x)  # the last start is not the best
    before = kmeans.cluster_centers_.clone()
    kmeans.partial_fit(x)
    assert ((before * kmeans.cluster_centers_).sum(1) > 0.99).all()
