"""The evaluation against slow direct computations; its table, JSON and pictures say the same."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_scene, sets
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from cli_parts import evaluation
from cli_parts.evaluation import class_shares, evaluate, fit_probes, linear_probe
from cli_parts.labels import image_set
from cli_parts.scores import confusion_matrix, format_scores, headline, match_clusters, measure, write_json
from cli_parts.sheets import write_figures
from crf import dense_crf
from stego import Stego
from stego_parts.clusters import Probe, pixels
from stego_parts.features import dense_features, to_tensor
from stego_parts.images import IGNORE


@pytest.fixture(scope="module")
def report(model, drawn):
    val, train = sets(drawn)
    val.pairs = val.pairs[:2]
    return evaluate(model, val, train=train)


def result_of(report, features, probe, crf):
    return next(
        r for r in report["results"] if (r["features"], r["probe"], r["crf"]) == (features, probe, crf)
    )


@torch.inference_mode()
def direct_clusters(model, image, size, crf):
    """The protocol word by word: mirrored codes averaged, upsampled, cosine; CRF on log-softmax of 2 cosine."""
    x = to_tensor(image)[None]
    codes = (
        sum(flip(model.head.on_map(model.backbone(flip(x)))) for flip in (lambda t: t, lambda t: t.flip(-1)))
        / 2
    )
    centers = model.probe.adapted(codes).weight
    codes = F.normalize(F.interpolate(codes, size=size, mode="bilinear", align_corners=False), dim=1)[0]
    cosine = torch.einsum("dhw,kd->khw", codes, centers)
    return (dense_crf(pixels(image), (2 * cosine).log_softmax(0)) if crf else cosine).argmax(0).numpy()


@pytest.mark.parametrize("crf", [False, True])
def test_confusion_is_that_of_the_protocol(model, drawn, report, crf):
    val, _ = sets(drawn)
    expected = np.zeros((3, 3), np.int64)
    for i in range(2):
        image, label = val.read(i)
        assert image.size == (320, 320) and label.shape == (320, 320)
        clusters = direct_clusters(model, image, label.shape, crf)
        expected += confusion_matrix(label, clusters, n_classes=3, n_clusters=3)
    measured = np.array(result_of(report, "stego", "cluster", crf)["confusion"])
    assert np.abs(measured - expected).sum() <= 4e-4 * expected.sum()  # near ties may fall either way
    assert measured.sum() == expected.sum() < 2 * 320**2  # the ignored pixels are left out


def test_every_figure_follows_from_the_confusion(report):
    assert len(report["results"]) == 8  # 2 features x 2 probes x CRF or not
    for result in report["results"]:
        confusion, assignment = np.array(result["confusion"]), np.array(result["assignment"])
        again = measure(confusion, assignment)
        assert (result["accuracy"], result["miou"]) == (again["accuracy"], again["miou"])
        expected = match_clusters(confusion) if result["probe"] == "cluster" else np.arange(3)
        assert assignment.tolist() == expected.tolist()
        assert len(result["image_accuracy"]) == 2
    assert result_of(report, "stego", "linear", False)["accuracy"] > 0.85  # drawn scenes are easy


def test_table_json_and_console_agree(report, tmp_path):
    write_json(report, tmp_path / "scores.json")
    read, text = json.loads((tmp_path / "scores.json").read_text()), format_scores(report)
    assert read["results"] == report["results"] and read["protocol"] in text
    best = result_of(read, "stego", "cluster", True)
    line = next(line for line in text.splitlines() if line.startswith("stego + CRF"))
    results = [result_of(read, "stego", probe, True) for probe in ("cluster", "linear")]
    cells = [result[key] for result in results for key in ("accuracy", "miou")]
    assert line.split()[-4:] == [f"{100 * cell:.1f}" for cell in cells]
    for name, iou in zip(read["classes"], best["iou"]):
        assert f"{100 * iou:.1f}" in next(line for line in text.splitlines() if line.startswith(name))
    assert headline(report) == best


def test_pictures(report, model, drawn, tmp_path):
    val, _ = sets(drawn)
    write_figures(report, model, val, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["confusion.png", "strips.png"]
    strips = Image.open(tmp_path / "strips.png")
    assert strips.width >= 3 * 320 and strips.height >= 3 * 320
    label = val.read(int(np.argmax(headline(report)["image_accuracy"])))[1]
    # the best image's label is the second in its row, below a heading and a caption
    column = np.asarray(strips)[:, 8 + 328 : 8 + 328 + 320].astype(int) @ (1, 256, 65536)  # a number a colour
    assert any(
        all(len(np.unique(column[y : y + 320][label == value])) == 1 for value in np.unique(label))
        and len(np.unique(column[y : y + 320])) == len(np.unique(label))
        for y in range(20, 100)
    )  # one colour a class, pixel for pixel


@pytest.mark.parametrize("classes", [2, 5])
def test_more_and_fewer_clusters_than_classes(model, drawn, classes):
    centers = F.normalize(torch.randn(classes, 70, generator=torch.Generator().manual_seed(0)), dim=1)
    fitted = Stego(
        model.config,
        model.head,
        centers,
        torch.ones(classes) / classes,
        backbone_sha256=model.backbone.sha256,
    )
    val, _ = sets(drawn)
    val.pairs = val.pairs[:1]
    result = evaluate(fitted, val, crf=False)["results"][0]
    confusion = np.array(result["confusion"])
    assert confusion.shape == (3, classes)
    named = [k for k, c in enumerate(result["assignment"]) if c >= 0]
    assert len(named) == min(classes, 3)
    assert result["accuracy"] == sum(confusion[result["assignment"][k], k] for k in named) / confusion.sum()


def test_without_train_labels_there_is_no_linear_probe_and_it_is_said(model, drawn):
    val, _ = sets(drawn)
    val.pairs = val.pairs[:1]
    report = evaluate(model, val, crf=False)
    assert {result["probe"] for result in report["results"]} == {"cluster"}
    assert "no train labels" in report["protocol"] and "no CRF" in report["protocol"]


def test_nothing_labelled(model, drawn):
    val, _ = sets(drawn)
    val.pairs = val.pairs[:1]
    val.lookup = np.full(256, IGNORE, np.int16)
    with pytest.raises(ValueError, match="Not one labelled pixel"):
        evaluate(model, val, crf=False)


def test_linear_probe_reaches_the_optimum():
    torch.manual_seed(0)
    rows = torch.randn(3000, 5) * torch.tensor([1, 10, 0.1, 1, 1]) + torch.tensor([0, 5.0, 0.2, 0, 0])
    classes = (rows[:, :3] / torch.tensor([1, 10, 0.1]) + torch.randn(3000, 3)).argmax(1)
    probe = linear_probe(rows, F.one_hot(classes, 3).float())
    reached = F.cross_entropy(rows @ probe.weight.T + probe.bias, classes)
    layer, mean, deviation = torch.nn.Linear(5, 3), rows.mean(0), rows.std(0)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer((rows - mean) / deviation), classes)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert reached.item() < 1.01 * closure().item()


def test_linear_probe_of_features_that_vary_together():
    """Neighbouring channels say nearly the same, which leaves first-order steps on half the way."""
    torch.manual_seed(0)
    sources = torch.randn(4000, 6)
    rows = (sources @ torch.randn(6, 40) + 0.05 * torch.randn(4000, 40)).half()
    classes = (sources[:, :3] + 0.5 * torch.randn(4000, 3)).argmax(1)
    probe = linear_probe(rows, F.one_hot(classes, 3).float())
    reached = F.cross_entropy(rows.float() @ probe.weight.T + probe.bias, classes)
    weight = torch.zeros(3, 6, requires_grad=True)  # on what the channels were made of
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(sources @ weight.T, classes)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert reached.item() < closure().item() + 1e-3


def test_class_shares():
    label = np.array([[0, 0, 1, 1], [0, 2, 1, IGNORE], [2] * 4, [2] * 4], np.uint8)
    assert class_shares(label, 3, 2).tolist() == [[0.75, 0, 0.25], [0, 0.75, 0], [0, 0, 1], [0, 0, 1]]


# ---- what the baseline is fitted on -----------------------------------------------------------------------


def short(drawn):
    """One picture to score, and the train pictures' folder."""
    val, _ = sets(drawn)
    val.pairs = val.pairs[:1]
    return val, drawn / "images/train"


def baseline_of(model, labelled, train, monkeypatch):
    """The pictures that the backbone's k-means saw, and the protocol line."""
    read, seen = evaluation.LabelledSet.read, []

    def noted(self, index, **options):
        seen.append(self.pairs[index][0].name)
        return read(self, index, **options)

    monkeypatch.setattr(evaluation.LabelledSet, "read", noted)
    report = evaluate(model, labelled, train=train, crf=False)
    scored = [path.name for path, _ in labelled.pairs]
    return sorted(seen[: -len(scored)]), report["protocol"]


def with_images(model, *names):
    return Stego(
        replace(model.config, images=names),
        model.head,
        model.centers,
        model.share,
        backbone_sha256=model.backbone.sha256,
    )


def test_baseline_of_train_images_without_labels(model, drawn, monkeypatch):
    labelled, folder = short(drawn)
    seen, line = baseline_of(model, labelled, image_set(folder), monkeypatch)
    assert seen == sorted(path.name for path in folder.iterdir())
    assert str(folder) in line and "6 images" in line and "no linear probe" in line


def test_baseline_of_the_images_of_the_fit(model, drawn, monkeypatch):
    monkeypatch.chdir(drawn)
    labelled, folder = short(drawn)
    seen, line = baseline_of(with_images(model, "images/train"), labelled, None, monkeypatch)
    assert seen == sorted(path.name for path in folder.iterdir())
    assert "6 images (the images that the model was fitted on (images/train))" in line


def test_baseline_of_the_scored_images(model, drawn, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    labelled, _ = short(drawn)
    seen, line = baseline_of(with_images(model, "images/train"), labelled, None, monkeypatch)
    assert seen == [labelled.pairs[0][0].name] and "the scored images themselves" in line
    assert "fitted on are not here" in caplog.text and "images/train" in caplog.text


def test_an_unreadable_train_image_is_skipped(model, drawn, tmp_path, caplog):
    Image.fromarray(draw_scene(5)[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    rows, shares = evaluation.probe_rows(model, image_set(tmp_path))
    assert len(rows) == len(shares) > 0 and shares.shape[1] == 0 and "Skipped: " in caplog.text
    with pytest.raises(ValueError, match="None of the images"):
        evaluation.probe_rows(model, image_set(tmp_path / "b.png"))


# ---- what is clustered, merged, left over -----------------------------------------------------------------


def test_codes_with_features_beside_them(scenes, drawn, monkeypatch):
    monkeypatch.setattr(evaluation, "ROUNDS", 20)
    val, train = sets(drawn)
    val.pairs, train.pairs = val.pairs[:1], train.pairs[:2]
    image = scenes / "scene00.png"
    fitted = Stego.fit(image, clusters=3, backbone="tiny", steps=2, batch_size=4, feature_weight=0.5)
    probes = fit_probes(fitted, val, train=train)
    assert probes["stego", "linear"].weight.shape == (3, fitted.centers.shape[1])
    counts = evaluation.confusions(fitted, val, probes, crf=False)["stego", "linear", False].sum(0)
    assert measure(counts, range(3))["accuracy"] > 0.6


def test_more_clusters_than_classes_are_scored_both_ways(model, drawn, caplog):
    labelled, _ = short(drawn)
    centers = F.normalize(torch.randn(7, 70, generator=torch.Generator().manual_seed(0)), dim=1)
    sha = model.backbone.sha256
    fitted = Stego(model.config, model.head, centers, torch.ones(7) / 7, backbone_sha256=sha)
    report = evaluate(fitted, labelled, crf=False)
    assert "7 clusters for 3 classes: those left over count as errors" in caplog.text
    for result, name in zip(report["results"], ("stego", "k-means, tiny alone")):
        confusion, loose = np.array(result["confusion"]), result["many_to_one"]
        assert loose["accuracy"] == confusion.max(0).sum() / confusion.sum() > result["accuracy"]
        assert loose["assignment"] == confusion.argmax(0).tolist()
        line = next(x for x in format_scores(report).splitlines() if x.startswith(f"{name}, many-to-one"))
        assert line.split()[-4:-2] == [f"{100 * loose[key]:.1f}" for key in ("accuracy", "miou")]


def test_as_many_clusters_as_classes_have_no_second_score(report, caplog):
    assert all(result["many_to_one"] is None for result in report["results"])
    assert "many-to-one" not in format_scores(report) and "left over" not in report["protocol"]


def test_clusters_of_one_name_are_one(model, drawn, caplog):
    labelled, _ = short(drawn)
    centers = torch.cat([model.centers, model.centers.flip(0) + 1e-3, model.centers])  # 0 1 2 2 1 0 0 1 2
    sha = model.backbone.sha256
    config = replace(
        model.config, adaptation=0.0
    )  # three equal centres would each follow a third of an image
    model = Stego(config, model.head, model.centers, model.share, backbone_sha256=sha)
    fitted = Stego(config, model.head, centers, torch.ones(9) / 9, backbone_sha256=sha)
    alone = evaluate(model, labelled, crf=False)["results"][0]
    fitted.rename(dict(enumerate("abccbaabc")))
    report = evaluate(fitted, labelled, crf=False)
    merged = report["results"][0]
    assert report["clusters"] == 3 and "3 clusters" in report["protocol"] and not caplog.text
    assert merged["many_to_one"] is None and merged["assignment"][3:] == [-1] * 6
    confusion = np.array(merged["confusion"])
    assert not confusion[:, 3:].any() and confusion.sum() == np.sum(alone["confusion"])
    assert abs(confusion[:, :3] - np.array(alone["confusion"])).sum() < 0.02 * confusion.sum()


def test_clusters_that_are_part_of_others_take_no_class():
    """Three clusters of one name and another one, three classes: the other one is not left over."""
    counts = np.zeros((1, 3, 4), np.int64)
    counts[0, 0] = [10, 0, 0, 5]
    probe = Probe(torch.zeros(4, 1), merged=np.array([0, 0, 0, 3], np.uint8))
    result = evaluation._result(counts, probe, spare=False)
    alone = evaluation._result(counts[..., [0, 3]], Probe(torch.zeros(2, 1)), spare=False)
    assert result["assignment"][1:3] == [-1, -1]
    assert (result["assignment"][::3], result["miou"]) == (alone["assignment"], alone["miou"])


# ---- what is said, and where it runs ----------------------------------------------------------------------


@pytest.mark.usefixtures("short_probes")
def test_the_backbone_sees_float32(model, drawn, monkeypatch):
    val, train = sets(drawn)
    val.pairs, train.pairs, exact = val.pairs[:1], train.pairs[:1], []

    def noted(*args, **options):
        exact.append(options.get("exact"))
        return dense_features(*args, **options)

    monkeypatch.setattr(evaluation, "dense_features", noted)
    report = evaluate(model, val, train=train, crf=False)
    assert exact == [True, True] and "float32" in report["protocol"]


def test_differences_from_the_reference_are_named(report):
    line = report["protocol"]
    for part in ("images bilinear (reference: nearest)", "to convergence on 320 x 320", "6 images"):
        assert part in line


@pytest.mark.usefixtures("short_probes")
@pytest.mark.parametrize(
    "classes, source", [(3, "probe of the checkpoint"), (7, "probes fitted on their labels")]
)
def test_whose_the_linear_probe_is(model, drawn, monkeypatch, classes, source):
    """A released checkpoint's, if it tells these classes; the protocol says so."""
    val, train = sets(drawn)
    val.pairs = val.pairs[:1]
    linear = torch.zeros(classes, model.centers.shape[1]), torch.zeros(classes)
    monkeypatch.setattr(model, "linear", linear)
    assert f"; linear {source}" in evaluate(model, val, train=train, crf=False)["protocol"]


@pytest.mark.usefixtures("short_probes")
def test_progress_before_the_first_image(model, drawn):
    val, train = sets(drawn)
    val.pairs, train.pairs, stages = val.pairs[:1], train.pairs[:1], []
    evaluate(
        model,
        val,
        train=train,
        crf=False,
        progress=lambda stage, done, total: stages.append((stage, done == total)),
    )
    names = list(dict.fromkeys(stage for stage, _ in stages))
    assert names == ["baseline", "k-means", "probe", "evaluate"]
    assert all((name, True) in stages for name in names)  # each comes to its end


class NoDouble(TorchDispatchMode):
    """A device like mps: no float64, no adaptive pooling."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "adaptive" in str(function) or getattr(result, "dtype", None) == torch.float64:
            raise NotImplementedError(str(function))
        return result


@pytest.mark.usefixtures("short_probes")
def test_nothing_that_mps_lacks(model, drawn):
    val, train = sets(drawn)
    val.pairs, train.pairs = val.pairs[:1], train.pairs[:1]
    with NoDouble():
        assert len(evaluate(model, val, train=train, crf=False)["results"]) == 4


@pytest.mark.usefixtures("short_probes")
def test_probes_of_one_seed_are_the_same(model, drawn):
    val, train = sets(drawn)
    train.pairs = train.pairs[:1]
    first, second = (fit_probes(model, val, train=train, seed=3) for _ in range(2))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(first.values(), second.values()))
