"""The evaluation against slow direct computations, and its report: table, JSON and pictures tell one story."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import draw_scene
from PIL import Image

from cli import main
from crf import dense_crf
from stego import Stego, pixels
from stego_parts import protocol
from stego_parts.datasets import folder_set
from stego_parts.images import IGNORE, to_tensor
from stego_parts.protocol import (
    class_shares,
    confusion_matrix,
    diagnose,
    evaluate,
    fit_probes,
    linear_probe,
    match_clusters,
    precision_recall,
    scores,
    table,
)
from stego_parts.report import write_figures


@pytest.fixture(scope="module", autouse=True)
def small_probes():
    """Probes on 1,200 positions: enough for drawn scenes, and quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "PROBE_ROWS", 1200)
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Folders val (4 pictures) and train (6) of drawn scenes with their labels; part of one label is ignored."""
    root = tmp_path_factory.mktemp("drawn")
    for split, seeds in (("val", range(100, 104)), ("train", range(200, 206))):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for seed in seeds:
            image, label = draw_scene(seed)
            if seed == 101:
                label[:, :30] = IGNORE
            Image.fromarray(image).save(root / f"images/{split}/{seed}.png")
            Image.fromarray(label).save(root / f"labels/{split}/{seed}.png")
    (root / "names.txt").write_text("sky\nground\nblock\n")
    return root


def sets(drawn):
    return [
        folder_set(drawn / f"images/{split}", drawn / f"labels/{split}", names=drawn / "names.txt")
        for split in ("val", "train")
    ]


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
    codes = F.normalize(F.interpolate(codes, size=size, mode="bilinear", align_corners=False), dim=1)[0]
    cosine = torch.einsum("dhw,kd->khw", codes, model.centers)
    return (dense_crf(pixels(image), (2 * cosine).log_softmax(0)) if crf else cosine).argmax(0).numpy()


@pytest.mark.parametrize("crf", [False, True])
def test_confusion_is_that_of_the_protocol(model, drawn, report, crf):
    val, _ = sets(drawn)
    expected = np.zeros((3, 3), np.int64)
    for i in range(2):
        image, label = val.read(i)
        assert image.size == (320, 320) and label.shape == (320, 320)
        found = direct_clusters(model, image, label.shape, crf)
        expected += confusion_matrix(label, found, n_classes=3, n_clusters=3)
    measured = np.array(result_of(report, "stego", "cluster", crf)["confusion"])
    assert np.abs(measured - expected).sum() <= 4e-4 * expected.sum()  # near ties may fall either way
    assert measured.sum() == expected.sum() < 2 * 320**2  # the ignored pixels are left out


def test_every_figure_follows_from_the_confusion(report):
    assert len(report["results"]) == 8  # 2 features x 2 probes x CRF or not
    for result in report["results"]:
        confusion, assignment = np.array(result["confusion"]), np.array(result["assignment"])
        again = scores(confusion, assignment)
        assert (result["accuracy"], result["miou"]) == (again["accuracy"], again["miou"])
        expected = match_clusters(confusion) if result["probe"] == "cluster" else np.arange(3)
        assert assignment.tolist() == expected.tolist()
        assert len(result["image_accuracy"]) == 2
    assert result_of(report, "stego", "linear", False)["accuracy"] > 0.85  # drawn scenes are easy


def test_table_json_and_console_agree(report, tmp_path):
    protocol.write_json(report, tmp_path / "scores.json")
    read, text = json.loads((tmp_path / "scores.json").read_text()), table(report)
    assert read["results"] == report["results"] and read["protocol"] in text
    best = result_of(read, "stego", "cluster", True)
    line = next(line for line in text.splitlines() if line.startswith("stego + CRF"))
    results = [result_of(read, "stego", probe, True) for probe in ("cluster", "linear")]
    cells = [result[key] for result in results for key in ("accuracy", "miou")]
    assert line.split()[-4:] == [f"{100 * cell:.1f}" for cell in cells]
    for name, iou in zip(read["classes"], best["iou"]):
        assert f"{100 * iou:.1f}" in next(line for line in text.splitlines() if line.startswith(name))
    assert protocol.headline(report) == best


def test_pictures(report, model, drawn, tmp_path):
    val, _ = sets(drawn)
    paths = write_figures(report, model, val, tmp_path)
    assert [path.name for path in paths] == ["confusion.png", "strips.png"]
    strips = Image.open(tmp_path / "strips.png")
    assert strips.width >= 3 * 320 and strips.height >= 3 * 320
    label = val.read(int(np.argmax(protocol.headline(report)["image_accuracy"])))[1]
    shown = np.asarray(strips)[29:349, 8 + 328 : 8 + 328 + 320]  # the best image's label, second in its row
    for value in np.unique(label):
        assert len(np.unique(shown[label == value], axis=0)) == 1  # one colour a class, pixel for pixel
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == len(np.unique(label))


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
    found = evaluate(model, val, crf=False)
    assert {result["probe"] for result in found["results"]} == {"cluster"}
    assert "no train labels" in found["protocol"] and "no CRF" in found["protocol"]


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
    found = F.cross_entropy(rows @ probe.weight.T + probe.bias, classes)
    layer, mean, deviation = torch.nn.Linear(5, 3), rows.mean(0), rows.std(0)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer((rows - mean) / deviation), classes)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert found.item() < 1.01 * closure().item()


def test_class_shares():
    label = np.array([[0, 0, 1, 1], [0, 2, 1, IGNORE], [2] * 4, [2] * 4], np.uint8)
    assert class_shares(label, 3, 2).tolist() == [[0.75, 0, 0.25], [0, 0.75, 0], [0, 0, 1], [0, 0, 1]]


def test_probes_of_one_seed_are_the_same(model, drawn):
    val, train = sets(drawn)
    train.pairs = train.pairs[:1]
    first, second = (fit_probes(model, val, train=train, seed=3) for _ in range(2))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(first.values(), second.values()))


# ---- diagnostics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_against_the_definition(seed):
    rng = np.random.default_rng(seed)
    values, positive = rng.integers(0, 12, 80) / 4, rng.random(80) < 0.4  # with many ties
    average, recall_before = 0.0, 0.0
    for threshold in sorted(set(values), reverse=True):
        kept = values >= threshold
        recall = positive[kept].sum() / positive.sum()
        average += (recall - recall_before) * positive[kept].mean()
        recall_before = recall
    found = precision_recall(values, positive)
    assert found["average_precision"] == pytest.approx(average, abs=1e-12)
    assert found["recall"][-1] == 1 and found["precision"][-1] == positive.mean()
    assert sorted(found["recall"]) == found["recall"]


def test_diagnostics(model, drawn):
    val, _ = sets(drawn)
    found = diagnose(model, val)
    assert list(found["curves"]) == ["backbone features", "codes", "CRF kernel"]
    assert all(found["base_rate"] < curve["average_precision"] <= 1 for curve in found["curves"].values())
    couplings = np.array(found["couplings"]["codes"])
    assert couplings.shape == (3, 3) and couplings.sum() > 400  # 4 images of up to 121 positions
    assert np.trace(couplings) / couplings.sum() > 0.6  # couplings mostly join equal labels


# ---- the command -----------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_command(model, drawn, tmp_path):
    model.save(tmp_path / "stego.pt")
    result = run(
        "eval",
        "--images",
        drawn / "images/val",
        "--labels",
        drawn / "labels/val",
        "--names",
        drawn / "names.txt",
        "-m",
        tmp_path / "stego.pt",
        "--no-crf",
        "--diagnostics",
        "--json",
        tmp_path / "out/scores.json",
        "--figures",
        tmp_path / "figures",
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out/scores.json").read_text())
    assert f"{100 * report['results'][0]['miou']:.1f}" in result.output and "protocol:" in result.output
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert written == [
        "confusion.png",
        "couplings-codes.png",
        "couplings-features.png",
        "precision-recall.png",
        "strips.png",
    ]


def test_dataset_without_its_train_split(model, drawn, tmp_path):
    for source in sorted((drawn / "images/val").glob("*.png")):
        for folder, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            (tmp_path / folder / "val/bonn").mkdir(parents=True, exist_ok=True)
            pixels = np.array(Image.open(source if suffix == folder else drawn / "labels/val" / source.name))
            shifted = (
                pixels if suffix == folder else np.where(pixels == IGNORE, 0, pixels + 7).astype(np.uint8)
            )
            Image.fromarray(shifted).save(
                tmp_path / folder / f"val/bonn/bonn_{source.stem}_000019_{suffix}.png"
            )
    model.save(tmp_path / "stego.pt")
    result = run(
        "eval", "--dataset", "cityscapes", "--root", tmp_path, "-m", tmp_path / "stego.pt", "--no-crf"
    )
    assert result.exit_code == 0, result.output
    assert "Warning: No linear probe" in result.output and "leftImg8bit/train is missing" in result.output
    assert "no train labels" in result.output
    row = next(line for line in result.stdout.splitlines() if line.startswith("stego "))
    assert row.split()[-2:] == ["-", "-"] and float(row.split()[1]) > 50  # no linear probe, but a clustering


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "Give a --dataset, or your own --images and --labels"),
        (["--images", "x"], 2, "give both folders"),
        (["--dataset", "cityscapes", "--root", "nowhere"], 1, "leftImg8bit/val is missing"),
        (["--images", "IMAGES", "--labels", "LABELS"], 1, "No model at missing.pt"),
        (["--images", "nowhere", "--labels", "LABELS"], 1, "No such file or folder"),
        (["--images", "IMAGES", "--labels", "LABELS", "--names", "nowhere.txt"], 1, "nowhere.txt"),
    ],
)
def test_what_cannot_be_evaluated(drawn, arguments, code, message):
    places = {"IMAGES": drawn / "images/val", "LABELS": drawn / "labels/val"}
    result = run("eval", "-m", "missing.pt", *[places.get(argument, argument) for argument in arguments])
    assert result.exit_code == code and message in result.output and "Traceback" not in result.output


def test_model_with_another_backbone(model, drawn, tmp_path):
    state_path = tmp_path / "stego.pt"
    model.save(state_path)
    state = torch.load(state_path, weights_only=True)
    torch.save(state | {"backbone_sha256": "0" * 64}, state_path)
    result = run("eval", "--images", drawn / "images/val", "--labels", drawn / "labels/val", "-m", state_path)
    assert result.exit_code == 1 and "The model was fitted on tiny weights 000000000000" in result.output


def test_fit_takes_images_or_a_dataset():
    assert "Give images to fit on, or a --dataset" in run("fit").output and run("fit").exit_code == 2
    assert run("fit", "x.jpg", "--dataset", "cityscapes").exit_code == 2
