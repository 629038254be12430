"""How long does `stego --help` take, beyond the interpreter's own start? And `stego predict`, beyond what it must do?

    python bench/startup.py [IMAGE]

Prints the median of the runs of both, their difference against the bound of 0.3 s, and the five slowest imports. With
an image also the time from the command to its mask (`tiny`, a head and 27 centres at random, with the CRF), against
`import torch` in a process of its own plus the backbone and the CRF alone in a warm one; bound 1.3.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import median_seconds, network_of, random_model

import crf
from stego_parts.clusters import pixels
from stego_parts.images import read_image

ROOT = Path(__file__).parents[1]
RUNS = 20
BOUND = 0.3  # seconds
RUNS_OF_PREDICT, BOUND_OF_PREDICT = 5, 1.3
HEAVY = {"torch", "torchvision", "numpy", "PIL", "scipy"}


def seconds(*args: str, runs: int = RUNS) -> float:
    """Median wall time of the interpreter with these arguments."""
    command = [sys.executable, *args]
    return median_seconds(
        lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL), runs
    )


def imports() -> list[tuple[int, str]]:
    """(own microseconds, module) of everything that `import cli` loads."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import cli"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [
        (int(own), name) for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr)
    ]


def predict(path: str):
    """A prediction from the command to the mask, and the sum of what it cannot do without."""
    model = random_model(network_of("tiny"), 27)
    image = read_image(path)
    scores = torch.from_numpy(model.probabilities(image, crf=False)).log()  # (27, h, w)
    small = pixels(image.resize(scores.shape[:0:-1]))  # (3, h, w)
    parts = {
        "import torch": seconds("-c", "import torch", runs=RUNS_OF_PREDICT),
        "backbone": median_seconds(lambda: model.predict(image, crf=False), RUNS_OF_PREDICT),
        "CRF": median_seconds(lambda: crf.dense_crf(small, scores), RUNS_OF_PREDICT),
    }
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/stego.pt")
        args = ["cli.py", "predict", path, "-m", f"{folder}/stego.pt", "-o", f"{folder}/mask.png", "-q"]
        whole = seconds(*args, runs=RUNS_OF_PREDICT)
    floor = sum(parts.values())
    each = ", ".join(f"{name} {value:.2f} s" for name, value in parts.items())
    print(f"stego predict {whole:.2f} s; {each}; ratio {whole / floor:.2f}, bound {BOUND_OF_PREDICT}")


def main():
    bare = seconds("-c", "pass")
    full = seconds("cli.py", "--help")
    loaded = imports()
    heavy = sorted({name.split(".")[0] for _, name in loaded} & HEAVY)
    print(
        f"python -c pass {bare:.3f} s, stego --help {full:.3f} s (medians of {RUNS}): {full - bare:.3f} s beyond it, "
        f"bound {BOUND} s"
    )
    print(
        f"{len(loaded)} modules by `import cli`; heavy among them: {', '.join(heavy) or 'none'}; slowest: "
        + ", ".join(f"{name} {own / 1000:.1f} ms" for own, name in sorted(loaded, reverse=True)[:5])
    )
    for path in sys.argv[1:2]:
        predict(path)
    sys.exit(1 if heavy or full - bare > BOUND else 0)


if __name__ == "__main__":
    main()
