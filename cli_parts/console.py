"""What all commands share: what is said and where, exit codes, options, and how arguments are read.

Exit codes: 0 all done; 1 something failed while working, the rest is written; 2 an argument or an input cannot be
used, found before any work; 130 interrupted with Ctrl-C. Results go to stdout, all else to stderr. No torch here: it is
imported inside the commands, so that --help and --version answer at once.
"""

import ctypes
import functools
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from cli_parts.datasets import DATASETS
from stego_parts.config import MAX_CLUSTERS

MODEL = Path("stego.pt")  # where a model is, if nothing else is said
OUTPUTS = "stego-out"  # folder of what predict writes, which fit leaves out
M_TRIM_THRESHOLD = -1  # this and the next two: of malloc.h
M_TOP_PAD = -2
M_MMAP_MAX = -4
FEATURES = "stego-features"  # folder, beside the model, of features that are kept for other fits
REFRESH = 0.2  # seconds between two updates of the progress line on a terminal
REPORT = 60.0  # seconds between two lines of progress where stderr is none

PATH = click.Path(path_type=Path)
POSITIVE = click.FloatRange(0, min_open=True)
WHOLE = click.IntRange(0)
option = functools.partial(click.option, show_default=True)
log = logging.getLogger("stego")


# ---- what is said, and the exit codes ----------------------------------------------------------------------


class Progress:
    """progress(stage, done, total) on stderr, with the time left: one line that changes, if it is a terminal.

    Else a line at the start of each stage, and at most one a minute. stage: None before the work begins; go_on: what to
    do after an interruption.
    """

    def __init__(self) -> None:
        self.stage: str | None = None
        self.done = 0
        self.total = 0
        self.began = 0.0  # of the stage
        self.shown = 0.0
        self.started = time.monotonic()
        self.go_on = "the same command starts afresh"

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        begins = stage != self.stage
        if begins:
            self.began = now
        self.stage = stage
        self.done = done
        self.total = total
        terminal = sys.stderr.isatty()
        due = now - self.shown >= (REFRESH if terminal else REPORT) or (terminal and done == total)
        if is_quiet() or not (begins or due):
            return
        self.shown = now
        if terminal:
            ending = "\n" if done == total else ""
            click.echo(f"\r{stage:>9} {done}/{total}  {self.clock(now):12}{ending}", err=True, nl=False)
        else:
            click.echo(f"{stage} {done}/{total}  {self.clock(now)}".rstrip(), err=True)

    def clock(self, now: float) -> str:
        """How long the rest of the stage will take, as far as it can be told."""
        seconds = (now - self.began) * (self.total - self.done) / max(self.done, 1)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} left" if seconds >= 1 and self.done else ""

    def summary(self, what: str, outputs: str = "", *, err: bool = False) -> None:
        """The last line of a command: what was done, how long it took, where the outputs are."""
        if not is_quiet():
            seconds = f"{time.monotonic() - self.started:.0f} s"
            click.echo(f"{what}, {seconds}" + (f": {outputs}" if outputs else ""), err=err)


class NotBegun(click.ClickException):
    """What is wrong with a command itself."""

    exit_code = 2


class Failed(click.ClickException):
    """What went wrong in the work."""

    exit_code = 1


class Commands(click.Group):
    """The commands; whatever one ends with becomes one sentence and an exit code, by one rule."""

    def invoke(self, context: click.Context) -> Any:
        progress = context.obj = Progress()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            place = f" at {progress.stage} {progress.done}/{progress.total}" if progress.stage else ""
            click.echo(f"\nInterrupted{place}; {progress.go_on}.", err=True)
            context.exit(130)
        except BrokenPipeError:  # the reader has seen enough: click ends in silence
            raise
        except (ValueError, OSError) as error:
            kind = Failed if progress.stage else NotBegun
            raise kind(error_message(error)) from error


def error_message(error: Exception) -> str:
    """An error for people: the system's without its number."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    return f"Cannot use {error.filename or 'an output'} ({error.strerror.lower()})."


class StderrHandler(logging.Handler):
    """The library's messages as plain lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: "
        click.echo(f"{prefix}{record.getMessage()}", err=True)


def is_quiet() -> bool:
    return not log.isEnabledFor(logging.WARNING)


def print_model(model: Any, lines: Iterable[str]) -> None:
    """Lines about a model, and with -v its configuration."""
    for line in lines:
        click.echo(line)
    for key, value in vars(model.config).items():
        log.info("%s: %s", key, value)


# ---- options that commands share ---------------------------------------------------------------------------


def verbosity_options(command: Callable) -> Callable:
    """-v and -q: how much is said."""

    def set_level(context: click.Context, parameter: click.Parameter, verbose: bool | None) -> None:
        if verbose is not None:
            log.setLevel(logging.INFO if verbose else logging.ERROR)

    text = "Also say what was chosen and each file written; or errors only."
    flags = ("-v/-q", "--verbose/--quiet")
    return option(*flags, default=None, expose_value=False, callback=set_level, help=text)(command)


def limit_pixels(context: click.Context, parameter: click.Parameter, megapixels: float | None) -> None:
    """Pillow refuses to decode pictures above twice its limit, which may be bombs: move that limit."""
    if megapixels:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = round(min(megapixels * 1e6 / 2, sys.maxsize))  # inf: no limit


def network_options(command: Callable) -> Callable:
    """Options of everything that runs the backbone; the hidden one is named by the error that it avoids."""
    limit: dict = dict(type=POSITIVE, callback=limit_pixels, expose_value=False, hidden=True)
    device = "cpu, cuda, cuda:1, mps; auto takes CUDA where there is one."
    command = option("--max-megapixels", help="Refuse larger images.  [default: 179]", **limit)(command)
    command = option("--weights", type=PATH, help="The backbone's, as a file.  [default: cached]")(command)
    return option("--device", default="auto", help=device)(command)


model_option = option("-m", "--model", default="stego.pt", type=PATH, help="The fitted model.")
model_or_first = option("-m", "--model", type=PATH, help="If not named first.  [default: stego.pt]")


def model_and_rest(model: Path | None, arguments: tuple, *, first: bool) -> tuple[Path | None, tuple]:
    """The model, named with -m or as the first argument, and the other arguments."""
    if not first:
        return model, arguments
    if model:
        raise click.UsageError(f"Two models, {model} and {arguments[0]}; name one.")
    return Path(arguments[0]), arguments[1:]


def dataset_options(command: Callable) -> Callable:
    root = "Its folder.  [default: $STEGO_DATA/DATASET, or ./data/DATASET]"
    command = option("--root", type=PATH, help=root)(command)
    return option("--dataset", type=click.Choice(list(DATASETS)), help="A published dataset.")(command)


def made_in(*folders: Path) -> list[Path]:
    """The outputs of earlier runs in folders of images, which are none to work on."""
    return [folder / OUTPUTS for folder in folders]


def cluster_counts(text: str) -> list[int]:
    """Numbers of clusters: "12,8" -> [8, 12]."""
    counts = text.split(",")
    if not all(count.isdecimal() and 1 <= int(count) <= MAX_CLUSTERS for count in counts):
        raise click.BadParameter(f"got {text}; give a number from 1 to {MAX_CLUSTERS}, or several: 8,12,20.")
    return sorted({int(count) for count in counts})


def split_names(context: click.Context, parameter: click.Parameter, texts: Iterable[str]) -> list[str]:
    """("road,sky", "7") -> ["road", "sky", "7"]."""
    names = [name.strip() for text in texts for name in text.split(",")]
    if "" in names:
        raise click.BadParameter("got an empty name; give names or numbers of clusters, like road,7.")
    return names


def point(text: str) -> tuple[int, ...]:
    """ "120,80" -> (120, 80)."""
    pair = text.split(",")
    if len(pair) != 2 or not all(map(str.isdecimal, pair)):
        raise click.BadParameter(f"got {text}; a point is two whole numbers, x and y, like 120,80.")
    return tuple(map(int, pair))


def keep_memory() -> None:
    """Let glibc reuse the memory of short-lived tensors, where it gives each back and asks anew.

    dino_vits8 at 320 x 424 on a CPU core: 4.1 s in place of 5.2 s, for 0.1 to 0.3 GB more resident memory.
    """
    with suppress(OSError, AttributeError):  # another system, another allocator
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 512 << 20)
        libc.mallopt(M_TOP_PAD, 64 << 20)


def versions() -> str:
    """The versions of what this program stands on, and what it runs on: for a report of a fault."""
    import platform
    from importlib.metadata import version

    import torch

    packages = ("torch", "torchvision", "numpy", "pillow", "scipy", "click")
    lines = [f"{name} {version(name)}" for name in packages]
    lines.append(f"Python {platform.python_version()}, {platform.platform()}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines.append(f"{device}, {torch.get_num_threads()} threads")
    return "\n".join(lines)
