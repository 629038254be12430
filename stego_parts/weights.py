"""Weight files: read without executing anything, downloaded whole or not at all, checked before they fill a module."""

import hashlib
import io
import pickle
import re
import socket
import sys
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

NET_TIMEOUT = 10  # seconds without an answer from the server before a download is given up


def download(name: str, url: str, path: Path, *, sha256: str, progress: bool) -> dict:
    """The state dict of a published backbone, from the torch cache or the network; never leaves half a file."""
    if path.exists():
        return read_weights(path, sha256)
    watched, timeout = progress and sys.stderr.isatty(), socket.getdefaulttimeout()
    by_hand = (
        f"put the file at {path} by hand, pass it as --weights FILE, or use --backbone tiny (no download)."
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch.hub writes to a temporary name and renames, but sets no time-out and announces downloads on stdout
        socket.setdefaulttimeout(NET_TIMEOUT)
        with redirect_stdout(sys.stderr if watched else io.StringIO()):
            options = dict(map_location="cpu", progress=watched, weights_only=True)
            torch.hub.load_state_dict_from_url(url, **options)
        return read_weights(path, sha256)
    except OSError as error:
        raise FileNotFoundError(
            f"Could not download {name} from {url} ({first_line(error)}): {by_hand}"
        ) from error
    except Exception as error:  # what came is not the file: a cut connection, a proxy's web page
        path.unlink(missing_ok=True)
        raise FileNotFoundError(
            f"What {url} sent is not a usable weight file ({first_line(error)}): try again, {by_hand}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def read_weights(path: Path, sha256: str = "") -> dict:
    """A dict of tensors from a file, nothing executed; ValueError if it is damaged or something else."""
    if not path.is_file():
        raise FileNotFoundError(f"No weight file at {path}; give the path of a .pth file.")
    if sha256 and not (found := hashlib.sha256(path.read_bytes()).hexdigest()).startswith(sha256):
        raise ValueError(f"{path} is damaged: its SHA-256 is {found[:12]}…, it should be {sha256[:12]}….")
    state = read_checkpoint(path)
    if not isinstance(state, dict):
        what = "foreign object" if isinstance(state, Inert) else type(state).__name__
        raise ValueError(f"{path} holds a {what}; a backbone needs a dict of tensors.")
    return state


def read_checkpoint(path: Path):
    """What torch.save wrote, nothing executed: tensors and plain values, an Inert for any other object.

    weights_only=True refuses files that name unknown classes, as Lightning checkpoints do (their omegaconf
    hyper-parameters); those are read again with every such class turned into Inert. Raises ValueError.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("constants.pkl") for name in archive.namelist()):
                    raise ValueError("a TorchScript program")  # torch.load would run it
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_InertPickle)
    except Exception as error:  # unpicklers raise whatever a confused file leads them to: struct.error, ...
        reason = first_line(error)
        raise ValueError(f"{path} is not a weight file that can be loaded safely ({reason}).") from error


class Inert:
    """Stands for an object of a stranger's pickle: takes whatever it is given and does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def nothing(self, *args, **kwargs):
        return None

    __setstate__ = __setitem__ = append = extend = add = nothing


class _InertUnpickler(pickle._Unpickler):  # in Python: the one in C lets a few bytes ask for 16 GB of memo
    """Builds tensors and ordered dicts; whatever else a pickle names becomes Inert, never the thing named."""

    def find_class(self, module, name):
        rebuilds = module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter")
        storage = module == "torch" and re.fullmatch(r"[A-Z][A-Za-z0-9]*Storage", name)
        if rebuilds or storage or (module, name) == ("collections", "OrderedDict"):
            return super().find_class(module, name)
        return Inert


class _InertPickle:
    """What torch.load asks of a pickle module."""

    Unpickler = _InertUnpickler

    @staticmethod
    def load(file, **options):
        return _InertUnpickler(file, **options).load()


def fill(module: nn.Module, state: dict, name: str, *, source):
    """Load a state dict after checking every name, shape and value."""
    needed = module.state_dict()
    misfits = [f"it lacks {key}" for key in sorted(needed.keys() - state.keys())]
    misfits += [f"it has an unknown entry {key}" for key in sorted(state.keys() - needed.keys())]
    misfits += [
        f"{key} is {shape_of(state[key])}, it should be {shape_of(want)}"
        for key, want in needed.items()
        if key in state and shape_of(state[key]) != shape_of(want)
    ]
    if misfits:
        raise ValueError(
            f"{source} does not fit the backbone {name}: {misfits[0]}; name the backbone it was made for."
        )
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{source} is damaged: {key} holds NaN or infinite values.")
    module.load_state_dict({key: state[key].to(want.dtype) for key, want in needed.items()}, assign=True)


def shape_of(value) -> tuple | str:
    """What tells a tensor that is needed from what came in its place."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def first_line(error: Exception) -> str:
    """An error's message as part of a sentence; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def fingerprint(state: dict) -> str:
    """SHA-256 over names, shapes and float32 values: the same however the file that held them was packed."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().float().contiguous()
        digest.update(f"{key} {tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
