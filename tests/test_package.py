"""What is shipped: the wheel and the sdist, and an installation in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
MODULES = {"stego.py", "crf.py", "kmeans.py", "cli.py"}
BUILD = "import setuptools.build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with a wheel and an sdist, built from a copy of the checkout."""
    pytest.importorskip("setuptools", minversion="70.1")
    copy = tmp_path_factory.mktemp("build") / "stego"
    clutter = shutil.ignore_patterns(".git", "data", "build", "*.egg-info", "__pycache__", "out")
    shutil.copytree(ROOT, copy, ignore=clutter)
    (copy / "dist").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return copy / "dist"


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        info = {name.split(".dist-info/")[1] for name in wheel.namelist() if ".dist-info/" in name}
        metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("METADATA"))
    packages = ("stego_parts", "cli_parts")
    parts = {f"{name}/{path.name}" for name in packages for path in (ROOT / name).glob("*.py")}
    assert names == MODULES | parts | {
        "stego_parts/tiny.pt",
        "stego_parts/TINY.md",
        "stego_parts/py.typed",
        "cli_parts/py.typed",
    }
    assert {"licenses/LICENSE", "entry_points.txt", "METADATA"} <= info
    run_time = {
        line.split()[1].split(">")[0]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    assert run_time == {"torch", "torchvision", "numpy", "pillow", "scipy", "click"}


def test_the_sdist_holds_what_builds_and_tests_it(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    wanted = MODULES | {
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "setup.cfg",
        "pyproject.toml",
        "stego_parts/tiny.pt",
        "docs/sheet.png",
        "tests/conftest.py",
        "tools/pretrain.py",
    }
    assert wanted <= names and not [
        name for name in names if name.startswith("data/") or name.endswith(".pyc")
    ]


def test_an_environment_of_its_own(dist, tmp_path):
    """As pipx does it: a fresh environment, the wheel, its `stego` called where files bear the names of our modules."""
    place = tmp_path / "env"
    venv.create(place, with_pip=False)
    python, tool = place / "bin" / "python", place / "bin" / "stego"
    site = next(place.glob("lib/python*/site-packages"))
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        next(dist.glob("*.whl")),
    ]
    subprocess.run(install, check=True, env=clean, timeout=120)
    (site / "torch_and_others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # not downloaded anew
    for name in MODULES:
        (tmp_path / name).write_text("raise ImportError('not ours')\n")
    shown = subprocess.run(
        [tool, "--version"], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=60
    )
    assert shown.stdout.startswith("stego, version"), shown.stderr
    code = "import stego, sys; print(stego.__file__); stego.load_backbone('tiny')"
    shown = subprocess.run(
        [python, "-I", "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0 and Path(shown.stdout.strip()).parent.resolve() == site.resolve(), (
        shown.stderr
    )
