"""Speed, accuracy and memory of crf.dense_crf, all in one run:

    python bench/crf_speed.py --data ../shared/data

Images: CamVid val, scaled and centre-cropped. Scores: the labels as one-hot planes averaged over 8 x 8 pixels
and brought back bilinearly, plus noise of the same grain (standard deviation 0.3) on all 27 planes, times the
factor at which the mean maximum probability is 0.10 (`soft`, as STEGO's cosine logits) or 0.62 (`sharp`).

Times are medians of interleaved runs, one image a call, the build of the lattice included; `ratio` is to a
2048 x 2048 float32 matrix product on one thread, timed between them. `exact` is the mean field over all pairs
of pixels but those whose kernel is below exp(-18) by colour alone.
Memory is the peak of the resident set during a call less the resident set before it, in a process of its own
that has made a small call first and has given freed memory back; the result is in it, the inputs are not.
The C++ library (pydensecrf) has its rows where it can be imported.
The exact mean field takes minutes an image; --no-exact leaves the agreement out.
--profile prints where one call's time goes instead, one thread, and the floor of each part: for weighted sums of
rows the time of as many rows from a table that the first cache holds, for the softmax that of its exponentials.
Memory is kept as in the command line.
"""

import argparse
import ctypes
import importlib.util
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import crf
from cli import keep_memory
from crf import dense_crf

CLASSES = 27
MEAN_MAX = {"soft": 0.10, "sharp": 0.62}  # mean maximum probability
GRAIN, NOISE = 8, 0.3  # pixels, share of a one-hot plane
REACH = 6.0  # standard deviations of colour at which the exact kernel counts as 0
BLOCK, GROUP = 256, 16  # pixels a block of alike colours, blocks of the exact kernel in work at once
PARTS = {  # of dense_crf, for --profile; time within an inner one is not counted twice
    "lattice: build, normalise": (crf, "_colour_kernel"),
    "sums of rows": (crf, "_bags"),
    "softmax": (torch, "softmax"),
}
SIZES = [(320, 320), (360, 480), (960, 1280)]  # (H, W)


# ------------------------------------------------------------------------------- data


def camvid(data: Path, count: int, size: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`count` evenly spaced val pairs: image (3, H, W) uint8, labels (H, W) int64 with 255 = ignore."""
    paths = sorted((data / "camvid/images/val").iterdir())
    pairs = []
    for path in paths[len(paths) // (2 * count) :: len(paths) // count][:count]:
        label = data / "camvid/labels/val" / f"{path.stem}.png"
        image = fit(Image.open(path).convert("RGB"), size, Image.Resampling.BILINEAR)
        pairs.append((image.permute(2, 0, 1).contiguous(), fit(Image.open(label), size, 0).long()))
    return pairs


def fit(picture: Image.Image, size: tuple[int, int], how: int) -> torch.Tensor:
    """Scale to cover `size` (H, W), then cut the centre out."""
    (H, W), scale = size, max(size[0] / picture.height, size[1] / picture.width)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), how)
    top, left = (picture.height - H) // 2, (picture.width - W) // 2
    return torch.from_numpy(np.array(picture)[top : top + H, left : left + W].copy())


def make_scores(labels: torch.Tensor, kind: str) -> torch.Tensor:
    """Labels (H, W) -> logits (27, H, W), see above."""
    H, W = labels.shape
    planes = F.one_hot(torch.where(labels == 255, CLASSES, labels), CLASSES + 1)[..., :CLASSES]  # (H, W, C)
    coarse = F.avg_pool2d(planes.permute(2, 0, 1)[None].float(), GRAIN)
    coarse += NOISE * torch.randn(coarse.shape, generator=torch.Generator().manual_seed(0))
    scores = F.interpolate(coarse, (H, W), mode="bilinear")[0]
    low, high = 0.0, 100.0
    for _ in range(30):  # bisection
        middle = (low + high) / 2
        sharp = (middle * scores).softmax(0).amax(0).mean() > MEAN_MAX[kind]
        low, high = (low, middle) if sharp else (middle, high)
    return (middle * scores).contiguous()


# ------------------------------------------------------------------------------- references


def exact_crf(
    image: torch.Tensor,
    scores: torch.Tensor,
    *,
    iterations=10,
    sxy=67,
    srgb=3,
    compat=4,
    smooth_sxy=1,
    smooth_compat=3,
) -> torch.Tensor:
    """Mean field over all pairs; scores (K, C, H, W) hold K problems on one image, solved together."""
    K, C, H, W = scores.shape
    colour = image.permute(1, 2, 0).reshape(-1, 3).float() / srgb  # (N, 3)
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    features = torch.cat([torch.stack([y, x], -1).view(-1, 2) / sxy, colour], 1)  # (N, 5)
    blocks = colour_blocks(colour, torch.arange(len(colour)))
    box = torch.stack([torch.stack([colour[b].amin(0), colour[b].amax(0)]) for b in blocks])  # (n, 2, 3)
    gap = (box[:, None, 0] - box[None, :, 1]).clamp_(min=0)  # (n, n, 3)
    near = (gap + gap.transpose(0, 1)).norm(dim=2) < REACH  # (n, n)
    rows, columns = (
        torch.exp(-((torch.arange(n)[:, None] - torch.arange(n)) ** 2) / (2 * smooth_sxy**2)) for n in (H, W)
    )

    def bilateral(q):  # (N, D)
        out = torch.zeros_like(q)
        for block, others in zip(blocks, near):
            centre = features[block].mean(0)  # so that float32 holds the difference of squares
            a = features[block] - centre
            a = torch.cat([a, -0.5 * (a**2).sum(1, keepdim=True), torch.ones(len(a), 1)], 1)
            for group in others.nonzero().view(-1).split(GROUP):
                other = torch.cat([blocks[i] for i in group.tolist()])
                b = features[other] - centre
                b = torch.cat([b, torch.ones(len(b), 1), -0.5 * (b**2).sum(1, keepdim=True)], 1)
                out[block] += (a @ b.T).exp_() @ q[other]  # a . b = -|difference|^2 / 2
        return out

    def smooth(q):  # (N, D)
        across = torch.einsum("kl,jld->jkd", columns, q.view(H, W, -1))
        return torch.einsum("ij,jkd->ikd", rows, across).reshape(q.shape)

    pairs = ((compat, bilateral), (smooth_compat, smooth))
    kernels = [(weight, apply, apply(torch.ones(H * W, 1)).rsqrt()) for weight, apply in pairs]
    logits = scores.permute(2, 3, 0, 1).reshape(H * W, K, C)
    q = logits.softmax(2)
    for _ in range(iterations):
        message = sum(weight * norm * apply(norm * q.view(H * W, -1)) for weight, apply, norm in kernels)
        q = (logits + message.view(logits.shape)).softmax(2)
    return q.view(H, W, K, C).permute(2, 3, 0, 1)


def colour_blocks(colour: torch.Tensor, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Pixels (n,) in blocks of alike colours: halved along the widest channel until they are small."""
    if len(pixels) <= BLOCK:
        return [pixels]
    here = colour[pixels]
    order = pixels[here[:, (here.amax(0) - here.amin(0)).argmax()].argsort()]
    return colour_blocks(colour, order[: len(order) // 2]) + colour_blocks(colour, order[len(order) // 2 :])


def cpp_crf(image: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    from pydensecrf import densecrf

    C, H, W = scores.shape
    model = densecrf.DenseCRF2D(W, H, C)
    model.setUnaryEnergy(np.ascontiguousarray(-scores.reshape(C, -1).numpy()))
    model.addPairwiseGaussian(sxy=1, compat=3)
    model.addPairwiseBilateral(sxy=67, srgb=3, rgbim=np.ascontiguousarray(image.permute(1, 2, 0)), compat=4)
    return torch.from_numpy(np.array(model.inference(10))).view(C, H, W)


def methods() -> dict:
    """Name -> (threads, function)."""
    found = {"ours, 1 thread": (1, dense_crf), "ours, 2 threads": (2, dense_crf)}
    if importlib.util.find_spec("pydensecrf"):
        found["C++ library"] = (1, cpp_crf)
    return found


# ------------------------------------------------------------------------------- measuring


def seconds(function, *args, threads: int = 1) -> float:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    function(*args)
    elapsed = time.perf_counter() - start
    torch.set_num_threads(1)
    return elapsed


def median(values) -> float:
    return float(np.median(list(values)))


def time_all(pairs: list, kind: str, repeats: int) -> None:
    """A line a method: median seconds, and their ratio to the matrix product's. The first round warms up."""
    a = torch.randn(2048, 2048)
    problems = [(image, make_scores(labels, kind)) for image, labels in pairs]
    runs = {name: [] for name in ["matrix product", *methods()]}
    for image, scores in problems * (repeats + 1):
        runs["matrix product"].append(seconds(torch.mm, a, a))
        for name, (threads, function) in methods().items():
            runs[name].append(seconds(function, image, scores, threads=threads))
    runs = {name: median(values[len(problems) :]) for name, values in runs.items()}
    H, W = pairs[0][0].shape[1:]
    for name, value in runs.items():
        ratio = value / runs["matrix product"]
        print(f"| {W} x {H} {kind} | {name} | {value:.3f} | {ratio:.2f} |", flush=True)


def agreement(pairs: list) -> None:
    """Against the exact mean field: labels that agree, mean absolute difference of probabilities."""
    exact = [
        exact_crf(image, torch.stack([make_scores(labels, kind) for kind in MEAN_MAX]))
        for image, labels in pairs
    ]
    for name, (threads, function) in methods().items():
        if threads != 1:
            continue
        for k, kind in enumerate(MEAN_MAX):
            results = [
                (function(image, make_scores(labels, kind)), e[k]) for (image, labels), e in zip(pairs, exact)
            ]
            same = [(q.argmax(0) == e.argmax(0)).float().mean().item() * 100 for q, e in results]
            off = [(q - e).abs().mean().item() for q, e in results]
            method = name.split(",")[0]
            line = f"| {method} | {kind} | {np.mean(same):.2f} | {min(same):.2f} | {np.mean(off):.5f} |"
            print(line, flush=True)


def profile(pairs: list, repeats: int) -> None:
    """A line a part of dense_crf: milliseconds a call, share, floor. Medians over the rounds, soft scores."""
    rounds = []
    for image, labels in pairs * (repeats + 1):
        spent, rows, scores = dict.fromkeys(PARTS, 0.0), [0], make_scores(labels, "soft")

        def timed(part, function):
            def call(*args, **named):
                began, inner = time.perf_counter(), sum(spent.values())
                result = function(*args, **named)
                spent[part] += time.perf_counter() - began - (sum(spent.values()) - inner)
                rows[0] += args[1].numel() if part == "sums of rows" and args[0].shape[1] > 1 else 0
                return result

            return call

        with ExitStack() as stack:
            for part, (place, name) in PARTS.items():
                stack.enter_context(patch.object(place, name, timed(part, getattr(place, name))))
            total = seconds(crf.dense_crf, image, scores)
        small, q = torch.rand(128, CLASSES), torch.rand(crf.STRIP, CLASSES)
        index, weight = torch.randint(128, (crf.STRIP, 6), dtype=torch.int32), torch.rand(crf.STRIP, 6)
        row = seconds(crf._gather, small, index, weight) / index.numel()
        floors = {
            "sums of rows": rows[0] * row,
            "softmax": seconds(torch.exp, q) / len(q) * crf.ITERATIONS * image[0].numel(),
        }
        spent["everything else"] = total - sum(spent.values())
        rounds.append([(spent[part], floors.get(part, np.nan)) for part in spent])
    rounds = np.median(rounds[len(pairs) :], 0)
    for part, (value, floor) in zip(spent, rounds):
        print(
            f"| {part} | {value * 1000:.0f} | {value / rounds[:, 0].sum():.0%} | {floor * 1000:.0f} |",
            flush=True,
        )


def extra_memory(size: tuple[int, int], data: Path) -> float:
    """Peak MB of one call beyond what was resident before, in a process of its own."""
    command = [sys.executable, __file__, "--data", str(data), "--memory", *map(str, size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory_of_one_call(data: Path, size: tuple[int, int]) -> None:
    torch.set_num_threads(1)
    [(image, labels)] = camvid(data, 1, size)
    scores = make_scores(labels, "soft")
    dense_crf(image[:, :16, :16], scores[:, :16, :16], iterations=1)
    ctypes.CDLL(None).malloc_trim(0)  # else what earlier steps freed would be used again uncounted
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    dense_crf(image, scores)
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """MB in a field of this process's status: VmRSS now, VmHWM at its peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024 / 1e6


def cuda_rows(data: Path, repeats: int) -> None:
    images, labels = zip(*camvid(data, 16, (320, 320)))
    images = torch.stack(images).cuda()
    for kind in MEAN_MAX:
        scores = torch.stack([make_scores(x, kind) for x in labels]).cuda()
        for count in (1, 16):

            def call():
                dense_crf(images[:count], scores[:count])
                torch.cuda.synchronize()

            call()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            value = median(seconds(call) for _ in range(repeats))
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
            device = f"{torch.cuda.get_device_name()}, batch of {count}"
            print(f"| 320 x 320 {kind} | {device} | {value:.4f} | {peak:.0f} |")


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with camvid/")
    parser.add_argument("--images", type=int, default=4, help="CamVid val images")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds over the images")
    parser.add_argument("--no-exact", action="store_true", help="leave the slow agreement out")
    parser.add_argument("--profile", action="store_true", help="where the time goes, and nothing else")
    parser.add_argument("--memory", type=int, nargs=2, metavar=("H", "W"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        memory_of_one_call(options.data, tuple(options.memory))
        return

    torch.set_num_threads(1)
    keep_memory()
    if options.profile:
        print("| size | part | ms | share | floor, ms |\n|---|---|---|---|---|")
        for size in SIZES[:2]:
            profile(camvid(options.data, options.images, size), options.repeats)
        return
    if "C++ library" not in methods():
        print("pydensecrf is not importable here: its rows are left out\n")
    print("| size, scores | what | seconds | ratio |\n|---|---|---|---|")
    for kind in MEAN_MAX:
        time_all(camvid(options.data, options.images, SIZES[0]), kind, options.repeats)
    for size in SIZES[1:]:
        time_all(camvid(options.data, 1, size), "soft", options.repeats)
    print("\n| size | peak extra memory, MB |\n|---|---|")
    for size in SIZES:
        print(f"| {size[1]} x {size[0]} | {extra_memory(size, options.data):.0f} |", flush=True)
    if torch.cuda.is_available():
        print("\n| size, scores | device | seconds | peak extra memory, MB |\n|---|---|---|---|")
        cuda_rows(options.data, options.repeats)
    if not options.no_exact:
        print("\n| to exact, 320 x 320 | scores | labels equal, % | worst image, % | mean abs dQ |")
        print("|---|---|---|---|---|")
        agreement(camvid(options.data, options.images, (320, 320)))


if __name__ == "__main__":
    main()
