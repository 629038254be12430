"""Files of models: ours, and the released checkpoints of the reference implementation, read as if they were ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from stego_parts.backbones import BACKBONES, CUSTOM
from stego_parts.checkpoint import write_state
from stego_parts.config import MAX_CLUSTERS, RELEASED, Config
from stego_parts.images import distinct_colors
from stego_parts.weights import first_line, read_checkpoint

FORMAT = "stego"
VERSION = 1
# ours: the reference's
RELEASED_HEAD = {"linear": "cluster1.0", "mlp.0": "cluster2.0", "mlp.2": "cluster2.2"}
# The tensors of `tiny` before it had a second branch
FIRST_TINY = "b9e04a086cda9f1b1dc0d1eb759f1f41096fe40869dfce827d51d03a8d25ccd6"
RELEASED_PATCH = "net.model.patch_embed.proj.weight"


def write_model(state: dict, path: str | Path) -> None:
    """Write what describes a model, whole or not at all."""
    write_state(dict(format=FORMAT, version=VERSION) | state, path)


def read_model(path: Path) -> dict:
    """What describes a model: config (a Config), channels, head, centers, share, palette, names, backbone_sha256.

    Raises FileNotFoundError, or ValueError for what is no model or a damaged one.
    """
    state = _read_state(path)
    with damaged(path):
        if state["backbone_sha256"] == FIRST_TINY:
            state["config"] = state["config"] | {"backbone": "tiny_detail"}
        state["config"] = Config.from_saved(state["config"])
        state["channels"] = dict(state["head"])["linear.weight"].shape[1]
    return state


def _read_state(path: Path) -> dict:
    """What a model file holds, of a checkpoint of the reference implementation in our form; not looked into."""
    if not path.is_file():
        raise FileNotFoundError(f"No model at {path}; make one with `stego fit IMAGES`, or name one with -m.")
    foreign = f"{path} is not a stego model; make one with `stego fit IMAGES`."
    try:
        state = read_checkpoint(path)
    except ValueError as error:
        raise ValueError(foreign) from error
    state = state if isinstance(state, dict) else {}
    weights = state.get("state_dict")
    if isinstance(weights, dict) and RELEASED_PATCH in weights:
        with damaged(path, "it is not a usable STEGO checkpoint"):
            return _released(weights)
    if state.get("format") != FORMAT:
        raise ValueError(foreign)
    if state.get("version") != VERSION:
        raise ValueError(
            f"{path} is a stego model of version {state.get('version')}, this program reads {VERSION}; install the "
            "matching stego or fit again."
        )
    return state


@contextmanager
def damaged(path: str | Path, what: str = "it is a damaged stego model") -> Iterator[None]:
    """Whatever a damaged or forged file leads its reader to, as one ValueError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Cannot use {path}: {what} ({first_line(error)}); get it again, or fit anew."
        ) from error


def _released(state: dict) -> dict:
    """A checkpoint of the reference implementation in our form; its sizes come from its tensors."""
    head = {
        f"{ours}.{part}": state[f"net.{theirs}.{part}"].flatten(1 if part == "weight" else 0)
        for ours, theirs in RELEASED_HEAD.items()
        for part in ("weight", "bias")
    }
    centers = F.normalize(state["cluster_probe.clusters"].float(), dim=1)
    code_size, channels = head["linear.weight"].shape
    patch = state[RELEASED_PATCH].shape[-1]
    count = len(centers)
    backbone = _dino_backbone(channels, patch)
    linear = None
    if "linear_probe.weight" in state:
        linear = state["linear_probe.weight"].flatten(1), state["linear_probe.bias"]
    return dict(
        config=dict(preset=RELEASED, backbone=backbone, clusters=count, code_size=code_size, stride=patch),
        head=head,
        centers=centers,
        share=torch.zeros(count),  # it does not tell
        palette=torch.from_numpy(distinct_colors(count)),
        names=[""] * count,
        backbone_sha256="",
        linear=linear,
    )


def _dino_backbone(channels: int, patch: int) -> str:
    """The name of the first DINO transformer of this size."""
    for name, spec in BACKBONES.items():
        if name.startswith("dino_vit") and (spec.channels, spec.patch) == (channels, patch):
            return name
    raise ValueError(f"no known transformer has {channels} channels and patches of {patch}")


def check_model(state: dict, head: Any) -> None:
    """ValueError for what no fit leaves behind, so that a damaged or forged file is found before it is used."""
    centers, share, palette, names = (state[name] for name in ("centers", "share", "palette", "names"))
    count = len(share)
    values = (centers, share, *head.state_dict().values())
    shapes = (centers.shape, share.shape, palette.shape, len(names))
    if not 1 <= count <= MAX_CLUSTERS or shapes != ((count, head.size), (count,), (count, 3), count):
        raise ValueError("shapes that do not fit each other")
    if palette.dtype != torch.uint8 or not all(x.is_floating_point() and x.isfinite().all() for x in values):
        raise ValueError("values that are not finite or not of the right type")
    if not all(isinstance(name, str) for name in (*names, state["backbone_sha256"])):
        raise ValueError("names that are no text")


def check_backbone(network: Any, model: Any) -> Any:
    """A backbone that fits this model; ValueError for another."""
    name = network.name.removeprefix(CUSTOM)
    fitted_on = model.config.backbone.removeprefix(CUSTOM)
    if network.sha256 != model.backbone_sha256:
        raise ValueError(
            f"The model was fitted on {fitted_on} weights {model.backbone_sha256[:12] or 'unknown'}…, these are {name} "
            f"{network.sha256[:12] or 'unknown'}…; give the right ones with --weights FILE, or fit again."
        )
    if network.channels != model.head.linear.in_features:
        raise ValueError(
            f"The model's head reads {model.head.linear.in_features} channels, {name} gives {network.channels}; the "
            "model file is damaged: fit it again."
        )
    return network
