"""Layouts of weight files: the tensors of a backbone, wherever a file has them and whatever they are called there.

DINO, DINOv2, MoCo v2, torchvision, timm and Hugging Face name the same tensors differently, and training programs
keep them below other names, beside a student, a key encoder or an optimizer. `to_native` finds them by the one tensor
that every layout has, the patch embedding of a transformer or the last stage of a ResNet, and gives them the names of
vit.py and resnet.py.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

DEPTH = 3  # dicts within dicts that are looked into: {"model": {"teacher": {"backbone.cls_token": ...}}}
FIRST = re.compile(
    r"(.*\.)?(patch_embed\.proj|embeddings\.patch_embeddings\.projection|layer4\.0\.conv1)\.weight"
)
# Of several networks in a file: the slowly moving average, or the one that MoCo's queries pass
BETTER = re.compile(r"(^|[._])(teacher|ema|encoder_q)[._]")
# Names in one of the layouts, as patterns, and what takes their place; applied in this order
NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),  # Hugging Face
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.", ""),
        (r"^encoder\.layer\.", "blocks."),
        (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"),  # DINOv2's training: blocks in chunks, numbered throughout
        (r"^reg_token$", "register_tokens"),  # timm
        (r"^fc_norm\.", "norm."),
    )
)
UNUSED = re.compile(r"head|mask_token$|fc\.|pooler\.|classifier\.")  # what features do not depend on
QKV = ("query", "key", "value")  # in the order in which attn.qkv has them
# Which layer a LayerScale follows
SCALED = {"ls1": "attn.proj", "ls2": "mlp.fc2"}
SIZES = {192: "T", 384: "S", 768: "B", 1024: "L", 1280: "H", 1536: "g"}  # ViT's letters, by channels


def to_native(state: dict) -> dict:
    """The tensors of the backbone in a file's content under our names, LayerScale folded into the layers before it.

    What is not understood keeps its name, so that whoever fills a module with it can say what it is.
    """
    state = _rename(_network_in(flatten(state)))
    state = {key: value for key, value in state.items() if not UNUSED.match(key)}
    _join_attention(state)
    _fold_layer_scale(state)
    _complete_positions(state)
    for key in [key for key in state if key.endswith("running_mean")]:
        # counters of batches say nothing about features, and older files lack them
        state[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return state


def flatten(nested: dict) -> dict:
    """One dict of dicts within dicts, names joined by dots; each dict once, however often a pickle refers to it."""
    flat = {}
    seen = {id(nested)}
    pending = [("", nested, 0)]
    for prefix, part, depth in pending:  # grows on the way
        for key, value in dict.items(part):  # not part.items: a pickle can put something else there
            if not isinstance(key, str):
                continue
            if not isinstance(value, dict):
                flat[prefix + key] = value
            elif id(value) not in seen and depth < DEPTH:
                seen.add(id(value))
                pending.append((f"{prefix}{key}.", value, depth + 1))
    return flat


def _network_in(flat: dict) -> dict:
    """The entries of one network, their common prefix removed; all there is if none is known."""
    prefixes = [match[1] or "" for key in flat if (match := FIRST.fullmatch(key))]
    if not prefixes:
        return flat
    prefix = min(prefixes, key=_preference)
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}


def _preference(prefix: str) -> tuple[bool, int]:
    return not BETTER.search(prefix), len(prefix)


def _rename(state: dict) -> dict:
    named = {}
    for key, value in state.items():
        ours = key
        for pattern, name in NAMES:
            ours = pattern.sub(name, ours)
        named[key if ours in named else ours] = value
    return named


def _complete_positions(state: dict) -> None:
    """Put a position of zero before those of patches alone: timm, with registers, adds the class token's to that."""
    positions: Any = state.get("pos_embed")
    if (
        is_plain(positions)
        and positions.ndim == 3
        and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]
    ):
        none = torch.zeros_like(positions[:, :1])
        state["pos_embed"] = torch.cat([none, positions], 1)  # (1, 1 + grid * grid, C)


def _join_attention(state: dict) -> None:
    """Three layers for queries, keys and values in one, where they come apart."""
    suffix = ".attn.query."
    for key in [key for key in state if suffix in key]:
        block, part = key.split(suffix, 1)
        names = [f"{block}.attn.{name}.{part}" for name in QKV]
        tensors: list[Any] = [state.get(name) for name in names]
        if all(is_plain(tensor) and tensor.ndim for tensor in tensors) and _stackable(tensors):
            for name in names:
                del state[name]
            state[f"{block}.attn.qkv.{part}"] = torch.cat(tensors)  # (3 * C, ...)


def _stackable(tensors: list[Tensor]) -> bool:
    return len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1


def _fold_layer_scale(state: dict) -> None:
    """LayerScale multiplies what a layer gives: the same as multiplying its weights."""
    for key in [key for key in state if re.search(r"\.ls[12]\.gamma$", key)]:
        block, scale, _ = key.rsplit(".", 2)
        names = [f"{block}.{SCALED[scale]}.{part}" for part in ("weight", "bias")]
        gamma = state[key]
        if all(_can_scale(state.get(name), gamma) for name in names):
            del state[key]
            for name in names:
                value = state[name].float()
                state[name] = value * gamma.float().view(-1, *[1] * (value.ndim - 1))


def _can_scale(value: Any, gamma: Any) -> bool:
    return is_plain(value) and is_plain(gamma) and gamma.ndim == 1 and value.shape[:1] == gamma.shape


def is_plain(value: Any) -> bool:
    """Whether this is a dense tensor in memory, no larger than what the file has for it: a few bytes can claim more."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.is_quantized is False and value.nbytes <= value.untyped_storage().nbytes()


def sizes(state: dict) -> dict[str, int]:
    """What a state dict under our names tells of its network, by the fields of backbones.Spec; {} for no known kind."""
    shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    if shapes.get("layer4.2.conv3.weight", ())[:1] == (2048,):
        return dict(channels=2048, heads=0)
    patches = shapes.get("patch_embed.proj.weight", ())
    positions = shapes.get("pos_embed", ())
    if len(patches) != 4 or len(positions) != 3:
        return {}
    blocks = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
    registers = shapes.get("register_tokens", (1, 0))[1:2]
    grid = math.isqrt(max(positions[1] - 1, 0))
    return dict(
        channels=patches[0], patch=patches[-1], grid=grid, registers=sum(registers), depth=len(blocks)
    )


def kind(found: dict[str, int]) -> str:
    """Sizes as people name them."""
    if found.get("heads") == 0:
        return "a ResNet-50"
    name = f"a ViT-{SIZES.get(found['channels'], '?')}/{found['patch']}"
    parts = [
        f"{found['channels']} channels",
        f"{found['depth']} blocks",
        f"positions {found['grid']} x {found['grid']}",
    ]
    if found["registers"]:
        parts.append(f"{found['registers']} registers")
    return f"{name} ({', '.join(parts)})"
