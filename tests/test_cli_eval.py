"""`stego eval`: the command around the evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from cli import main
from stego_parts.images import IGNORE

OFFICIAL = Path(__file__).parents[2] / "shared/data/official"


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_command(model, drawn, tmp_path):
    model.save(tmp_path / "stego.pt")
    result = invoke(
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
        "-o",
        tmp_path / "out",
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out/scores.json").read_text())
    assert f"{100 * report['results'][0]['miou']:.1f}" in result.output and "protocol:" in result.output
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["confusion.png", "scores.json", "strips.png"]


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
    result = invoke(
        "eval", "--dataset", "cityscapes", "--root", tmp_path, "-m", tmp_path / "stego.pt", "--no-crf"
    )
    assert result.exit_code == 0, result.output
    assert "Warning: No linear probe" in result.output and "leftImg8bit/train is missing" in result.output
    assert "no train labels" in result.output
    row = next(line for line in result.stdout.splitlines() if line.startswith("stego "))
    assert row.split()[-2:] == ["-", "-"] and float(row.split()[1]) > 50  # no linear probe, but a clustering


@pytest.mark.usefixtures("short_probes")
@pytest.mark.parametrize(
    "dataset, folder",
    [("cityscapes", "cityscapes"), ("cocostuff27", "cocostuff"), ("potsdam3", "potsdam_stego_mat")],
)
def test_official_samples(saved, tmp_path, dataset, folder):
    if not (OFFICIAL / folder).is_dir():
        pytest.skip(f"no sample of {dataset} at {OFFICIAL / folder}")
    result = invoke(
        "eval", "--dataset", dataset, "--root", OFFICIAL / folder, "-m", saved, "--no-crf", "-o", tmp_path
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "scores.json").read_text())
    assert {result["probe"] for result in report["results"]} == {"cluster", "linear"}
    assert all(0 < result["accuracy"] < 1 for result in report["results"])


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "Give a --dataset, or your own --images and --labels"),
        (["--images", "x"], 2, "give both folders"),
        (["--images", "IMAGES", "--labels", "LABELS", "--train-labels", "LABELS"], 2, "give both folders"),
        (["--dataset", "potsdam3", "--train-images", "IMAGES"], 2, "brings its own"),
        (["--dataset", "cityscapes", "--root", "nowhere"], 2, "leftImg8bit/val is missing"),
        (["--images", "IMAGES", "--labels", "LABELS"], 2, "No model at missing.pt"),
        (["--images", "nowhere", "--labels", "LABELS"], 2, "No such file or folder"),
        (["--images", "IMAGES", "--labels", "LABELS", "--names", "nowhere.txt"], 2, "nowhere.txt"),
    ],
)
def test_what_cannot_be_evaluated(drawn, arguments, code, message):
    places = {"IMAGES": drawn / "images/val", "LABELS": drawn / "labels/val"}
    result = invoke("eval", "-m", "missing.pt", *[places.get(argument, argument) for argument in arguments])
    assert result.exit_code == code and message in result.output and "Traceback" not in result.output


def test_fit_takes_images_or_a_dataset():
    assert "Give images to fit on, or a --dataset" in invoke("fit").output and invoke("fit").exit_code == 2
    assert invoke("fit", "x.jpg", "--dataset", "cityscapes").exit_code == 2


def test_model_with_another_backbone(model, drawn, tmp_path):
    state_path = tmp_path / "stego.pt"
    model.save(state_path)
    state = torch.load(state_path, weights_only=True)
    torch.save(state | {"backbone_sha256": "0" * 64}, state_path)
    result = invoke(
        "eval", "--images", drawn / "images/val", "--labels", drawn / "labels/val", "-m", state_path
    )
    assert result.exit_code == 2 and "The model was fitted on tiny weights 000000000000" in result.output
