"""bench/paper/diagnostics.py: average precision by its definition, couplings, and the script as a whole."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import draw_scene
from PIL import Image

from cli_parts.labels import folder_set

SCRIPT = Path(__file__).parents[1] / "bench/paper/diagnostics.py"
if not SCRIPT.exists():
    pytest.skip("bench/ is not installed with the package", allow_module_level=True)
spec = importlib.util.spec_from_file_location("paper_diagnostics", SCRIPT)
diagnostics = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diagnostics)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Folders of 4 drawn scenes and their labels."""
    root = tmp_path_factory.mktemp("drawn")
    for seed in range(100, 104):
        for folder, array in zip(("images", "labels"), draw_scene(seed)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{seed}.png")
    return root


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
    curve = diagnostics.precision_recall(values, positive)
    assert curve["average_precision"] == pytest.approx(average, abs=1e-12)
    assert curve["recall"][-1] == 1 and curve["precision"][-1] == positive.mean()
    assert sorted(curve["recall"]) == curve["recall"]


def test_diagnostics(model, drawn):
    val = folder_set(drawn / "images", drawn / "labels")
    report = diagnostics.diagnose(model, val)
    assert list(report["curves"]) == ["backbone features", "codes", "CRF kernel"]
    assert all(report["base_rate"] < curve["average_precision"] <= 1 for curve in report["curves"].values())
    couplings = np.array(report["couplings"]["codes"])
    assert couplings.shape == (3, 3) and couplings.sum() > 400  # 4 images of up to 121 positions
    assert np.trace(couplings) / couplings.sum() > 0.6  # couplings mostly join equal labels


def test_script(saved, drawn, tmp_path):
    arguments = [saved, "--images", drawn / "images", "--labels", drawn / "labels", "-o", tmp_path / "out"]
    result = CliRunner().invoke(diagnostics.main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert {"backbone", "codes", "CRF"} <= {line.split()[0] for line in result.output.splitlines()[1:]}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"precision-recall.png", "couplings-codes.png", "couplings-features.png"}
