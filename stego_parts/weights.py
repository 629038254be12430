"""Weight files: read without executing anything, downloaded whole or not at all, checked before they fill a module."""

import hashlib
import json
import math
import os
import pickle
import re
import socket
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from stego_parts.layouts import is_plain

NET_TIMEOUT = 10  # seconds without an answer from the server before a download is given up
HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")  # a model's file in a folder, the better one first
MAX_HEADER = 100_000_000  # bytes: of a safetensors file, by its specification
SAFE_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def download(name: str, url: str, path: Path, *, sha256: str, progress: bool) -> None:
    """Fetch a published weight file, whole or not at all; FileNotFoundError if it cannot be had."""
    by_hand = (
        f"put the file at {path} by hand, pass it as --weights FILE, or use --backbone tiny (no download)."
    )
    timeout = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(
            NET_TIMEOUT
        )  # torch.hub writes to a temporary name and renames, but sets none
        torch.hub.download_url_to_file(url, str(path), progress=progress and sys.stderr.isatty())
        read_weights(path, sha256)
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


def weight_file(path: Path) -> Path:
    """The weight file that a path means: itself, or the one in a folder or in the newest snapshot of a cached model.

    Hugging Face's cache has a folder models--ORGANISATION--NAME for a model, with snapshots/REVISION/ in it.
    """
    if not path.is_dir():
        return path
    folders = [path, *sorted(path.glob("snapshots/*"), key=os.path.getmtime, reverse=True)]
    for folder in folders:
        for name in HUGGING_FACE:
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(
        f"No weight file in the folder {path}; looked for {' and '.join(HUGGING_FACE)} in it and in its snapshots. "
        "Name the file."
    )


def read_weights(path: Path, sha256: str = "") -> dict:
    """The dict in a file, tensors and whatever else, nothing executed; ValueError if damaged or something else."""
    if not path.is_file():
        raise FileNotFoundError(
            f"No weight file at {path}; give the path of a file (.pth, .safetensors, ...) or of a Hugging Face folder."
        )
    if sha256 and not (found := hashlib.sha256(path.read_bytes()).hexdigest()).startswith(sha256):
        raise ValueError(f"{path} is damaged: its SHA-256 is {found[:12]}…, it should be {sha256[:12]}….")
    state = read_safetensors(path) if is_safetensors(path) else read_checkpoint(path)
    if not isinstance(state, dict):
        what = "foreign object" if isinstance(state, Inert) else type(state).__name__
        raise ValueError(
            f"{path} holds a {what}; a backbone needs a dict of tensors: save the network's state_dict()."
        )
    return state


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header in eight bytes, then the header, JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: {name: {dtype, shape, data_offsets}} as JSON, then their bytes.

    ValueError where the header and the bytes do not add up: the tensors must fill them without gap or overlap.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    data = memoryview(content)[8 + length :]
    try:
        if 8 + length > len(content):
            raise ValueError("its header is cut off")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        end = 0
        state = {}
        for name, entry in sorted(header.items(), key=_place):
            begin = end
            end = begin + _nbytes(entry)
            if entry["data_offsets"] != [begin, end]:
                raise ValueError(f"{name} is at bytes {entry['data_offsets']}, not at {begin} to {end}")
            state[name] = _tensor(data[begin:end], entry)
        if end != len(data):
            raise ValueError(f"{len(data)} bytes of tensors where the header tells of {end}")
    except Exception as error:  # a header may hold anything
        raise ValueError(
            f"{path} is a damaged safetensors file ({first_line(error)}); get it again."
        ) from error
    return state


def _place(item: tuple[str, dict]) -> list[int]:
    return item[1]["data_offsets"]


def _nbytes(entry: dict) -> int:
    """Size of a tensor in a safetensors header, in bytes."""
    shape = entry["shape"]
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"a shape {shape}")
    return math.prod(shape) * SAFE_TYPES[entry["dtype"]].itemsize


def _tensor(data: memoryview, entry: dict) -> Tensor:
    dtype = SAFE_TYPES[entry["dtype"]]
    if 0 in entry["shape"]:
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(entry["shape"])


def read_checkpoint(path: Path) -> Any:
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

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return object.__new__(cls)

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    __setstate__ = __setitem__ = append = extend = add = nothing


class _InertUnpickler(pickle._Unpickler):  # in Python: the one in C lets a few bytes ask for 16 GB of memo
    """Builds tensors and ordered dicts; whatever else a pickle names becomes Inert, never the thing named."""

    def find_class(self, module: str, name: str) -> Any:
        rebuilds = module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter")
        storage = module == "torch" and re.fullmatch(r"[A-Z][A-Za-z0-9]*Storage", name)
        if rebuilds or storage or (module, name) == ("collections", "OrderedDict"):
            return super().find_class(module, name)
        return Inert


class _InertPickle:
    """What torch.load asks of a pickle module."""

    Unpickler = _InertUnpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return _InertUnpickler(file, **options).load()


def misfit(module: nn.Module, state: dict) -> str:
    """The first thing that keeps a state dict from filling a module, as part of a sentence; "" if nothing does."""
    needed = module.state_dict()
    for key in sorted(needed.keys() - state.keys()):
        return f"it lacks {key}"
    for key in sorted(state.keys() - needed.keys()):
        return f"it has an unknown entry {key}"
    for key, want in needed.items():
        if shape_of(state[key]) != shape_of(want):
            return f"{key} is {shape_of(state[key])}, it should be {shape_of(want)}"
        if not is_plain(state[key]) or state[key].is_floating_point() != want.is_floating_point():
            return f"{key} is no dense tensor of {want.dtype} in memory"
    return ""


def fill(module: nn.Module, state: dict, *, source: str | Path) -> None:
    """Load a state dict that fits; ValueError for values that no training leaves behind."""
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{source} is damaged: {key} holds NaN or infinite values.")
    needed = module.state_dict()
    module.load_state_dict({key: state[key].to(want.dtype) for key, want in needed.items()}, assign=True)


def shape_of(value: Any) -> tuple | str:
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
