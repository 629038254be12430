"""How long does `stego --help` take, beyond the interpreter's own start? Does anything heavy come along?

    python bench/startup.py

Prints the median of the runs of both, their difference against the bound of 0.3 s, and the five slowest imports.
"""

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = 20
BOUND = 0.3  # seconds
HEAVY = {"torch", "torchvision", "numpy", "PIL", "scipy"}


def seconds(*args: str) -> float:
    """Median wall time of the interpreter with these arguments."""
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run([sys.executable, *args], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


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


def main():
    bare, full = seconds("-c", "pass"), seconds("cli.py", "--help")
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
    sys.exit(1 if heavy or full - bare > BOUND else 0)


if __name__ == "__main__":
    main()
