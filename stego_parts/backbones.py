"""The frozen backbones: where their weights come from and how an image becomes dense features.

`load_backbone(name)` returns a module that maps (B, 3, H, W) images, normalised (images.to_tensor), to features
(B, channels, H / patch, W / patch): of a transformer the tokens of the last block after the final LayerNorm, class
token dropped (STEGO Sec. 3, DINO: Caron et al. 2021, DINOv2: Oquab et al. 2023, registers: Darcet et al. 2024), of a
ResNet the last feature map (resnet.py).

`python -m stego_parts.backbones NAME` fetches a backbone ahead of time and prints the path of its file.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stego_parts import focus
from stego_parts.config import NOTICE
from stego_parts.layouts import kind, sizes, to_native
from stego_parts.tiny import Detail, Tiny
from stego_parts.vit import ViT
from stego_parts.weights import download, fill, fingerprint, misfit, read_weights, shape_of, weight_file

TINY_FILE = Path(__file__).with_name("tiny.pt")
TINY_SHA256 = "75dad6eed0a9d1c3b7a6768378f8e6d46e6fa599c2de9983796286072a4255ca"
AUTO = "dinov2_vits14"  # plain k-means on CocoStuff-27 reaches 22.9 mIoU, 9.5 on dino_vits8 at 4 x the time
AUTO_CACHED = (AUTO, "dino_vits8", "focus_vits14")  # what `auto` takes from the cache, the best first
AUTO_FETCHED = (AUTO, "focus_vits14")  # what it fetches if none of them is there

log = logging.getLogger("stego")


# ---- the table -------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """A published vision transformer, or a ResNet-50, which has no heads."""

    url: str  # "": made from a package, see focus.py
    channels: int
    heads: int
    patch: int  # pixels; a ResNet's stride
    grid: int  # side of the grid of position embeddings it was trained with
    registers: int = 0
    depth: int = 12  # blocks
    sha256: str = ""  # of the file, or its first digits, where several sources agree on it
    tensors: str = ""  # their fingerprint, where the file is made here


DINOV2_SHA256 = {  # several sources agree on them
    "vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
}
META = "https://dl.fbaipublicfiles.com/"
# Channels, heads
SMALL = (384, 6)
BASE = (768, 12)
LARGE = (1024, 16)
RESNET50 = (2048, 0, 32, 0)


def _dino(name: str, channels: int, heads: int, patch: int, grid: int) -> Spec:
    return Spec(f"{META}dino/{name}_pretrain/{name}_pretrain.pth", channels, heads, patch, grid)


def _dinov2(name: str, channels: int, heads: int, *, registers: int = 0, depth: int = 12) -> Spec:
    file = f"dinov2_{name}{'_reg4' if registers else ''}_pretrain.pth"
    sha256 = "" if registers else DINOV2_SHA256[name]
    return Spec(f"{META}dinov2/dinov2_{name}/{file}", channels, heads, 14, 37, registers, depth, sha256)


BACKBONES = {
    "dino_vits8": _dino("dino_deitsmall8", *SMALL, 8, 28),
    "dino_vits8_300ep": _dino("dino_deitsmall8_300ep", *SMALL, 8, 28),
    "dino_vits16": _dino("dino_deitsmall16", *SMALL, 16, 14),
    "dino_vitb8": _dino("dino_vitbase8", *BASE, 8, 28),
    "dino_vitb16": _dino("dino_vitbase16", *BASE, 16, 14),
    "dinov2_vits14": _dinov2("vits14", *SMALL),
    "dinov2_vitb14": _dinov2("vitb14", *BASE),
    "dinov2_vitl14": _dinov2("vitl14", *LARGE, depth=24),
    "dinov2_vits14_reg": _dinov2("vits14", *SMALL, registers=4),
    "dinov2_vitb14_reg": _dinov2("vitb14", *BASE, registers=4),
    "focus_vits14": Spec("", *SMALL, 14, 37, depth=focus.BLOCKS, tensors=focus.TENSORS_SHA256),
    "dino_resnet50": _dino("dino_resnet50", *RESNET50),
    "mocov2": Spec(f"{META}moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar", *RESNET50),
    "resnet50": Spec(
        "https://download.pytorch.org/models/resnet50-0676ba61.pth", *RESNET50, sha256="0676ba61"
    ),
}
BUNDLED = {"tiny": Tiny, "tiny_detail": Detail}
NAMES = (*BACKBONES, *BUNDLED)
CUSTOM = "custom:"  # before the name of a feature extractor that came as a callable
PROBE = 224  # pixels: side of the blank image that tells a callable's stride and channels; all usual strides divide it


# ---- weights ---------------------------------------------------------------------------------------------------


def load_backbone(
    name: Any = "auto",
    *,
    weights: str | Path | None = None,
    stride: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Any:
    """A frozen backbone in eval mode, with `.name`, `.patch` (pixels), `.channels` and `.sha256` (of its tensors).

    name: one of NAMES; or "auto": the first of AUTO_CACHED that is in the cache, else the first of AUTO_FETCHED that
    can be fetched, else the bundled tiny; or any callable, see Custom.
    weights: a local file to take the weights from instead of the torch cache, in any of the layouts of layouts.py, or
    a folder of Hugging Face's with one.
    stride: of a ResNet, 32 as trained, or 16 or 8 by dilation; the others have their patch only.
    Raises ValueError (unknown name, unusable file) or FileNotFoundError (no such file, download failed).
    """
    if callable(name):
        if weights or stride:
            raise ValueError(
                "Weights and a stride go with the name of a backbone; this one is a callable of your own."
            )
        return Custom(name, device)
    if name == "auto":
        return _load_auto(weights, stride=stride, device=device, progress=progress)
    if name not in NAMES:
        raise ValueError(f"Unknown backbone {name!r}; choose one of: auto, {', '.join(NAMES)}.")
    module: Any = _empty(name, stride)
    state = _read_bundled(name, weights) if name in BUNDLED else _read_published(name, weights, progress)
    source = weights or f"the weights of {name}"
    if problem := misfit(module, state):
        raise ValueError(f"{source} does not fit the backbone {name}: {problem}; {_advice(name, state)}.")
    fill(module, state, source=source)
    module.name = name
    module.sha256 = fingerprint(module.state_dict())
    if name in BACKBONES and BACKBONES[name].tensors not in ("", module.sha256):
        what = weights or f"{checkpoint_path(name)}, which can be removed and is fetched again then,"
        raise ValueError(
            f"{what} does not have the tensors of {name}: their SHA-256 is {module.sha256[:12]}…, it should be "
            f"{BACKBONES[name].tensors[:12]}…."
        )
    return module.requires_grad_(False).eval().to(device)


def _empty(name: str, stride: int | None) -> nn.Module:
    """The network of a name, without memory for its weights."""
    spec = BACKBONES.get(name)
    with torch.device("meta"):
        if spec and not spec.heads:
            # here: torchvision imports slowly
            from stego_parts.resnet import DILATED, ResNet50

            stride = spec.patch if stride is None else stride
            if stride not in DILATED:
                raise ValueError(f"Got stride {stride}; {name} has {', '.join(map(str, DILATED))}.")
            return ResNet50(stride)
        module = ViT(spec) if spec else BUNDLED[name]()
    if stride not in (None, module.patch):
        resnets = ", ".join(name for name, spec in BACKBONES.items() if not spec.heads)
        raise ValueError(
            f"Got stride {stride}; {name} sees patches of {module.patch} pixels, leave the stride out. "
            f"It is for {resnets}."
        )
    return module


class Custom(nn.Module):
    """A feature extractor of the caller's: any callable that maps normalised images (B, 3, H, W) to (B, C, h, w).

    A module is frozen, put into eval mode and on the device, and known by its weights; of another callable nothing
    tells whether it is the same the next time: `sha256` is "". Its stride is its attribute `patch`, or is found out.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], device: str | torch.device) -> None:
        super().__init__()
        self.function = function
        self.requires_grad_(False).eval().to(device)
        self.name = CUSTOM + getattr(function, "__name__", type(function).__name__)
        state = self.state_dict()
        self.sha256 = fingerprint(state) if state else ""
        patch = getattr(function, "patch", None)
        side = PROBE if patch is None else 2 * patch
        with torch.inference_mode():
            maps = function(torch.zeros(1, 3, side, side, device=device))
        is_map = isinstance(maps, Tensor) and maps.ndim == 4 and len(maps) == 1 and maps[0, 0].numel() > 1
        if not is_map or not maps.is_floating_point():
            raise ValueError(
                f"The backbone {self.name} made {shape_of(maps)} of an image (1, 3, {side}, {side}); it must give "
                "a float tensor (1, C, h, w) of more than one position."
            )
        self.channels = maps.shape[1]
        h, w = maps.shape[2:]
        self.patch = side // max(h, 1) if patch is None else patch
        if (h * self.patch, w * self.patch) != (side, side):
            raise ValueError(
                f"The backbone {self.name} made a map of {h} x {w} of {side} x {side} pixels; both must "
                "be whole multiples: give it an attribute `patch`, its stride in pixels."
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x).float()


def _load_auto(weights: str | Path | None, **options: Any) -> Any:
    if weights:
        return load_backbone(AUTO, weights=weights, **options)
    cached = [name for name in AUTO_CACHED if checkpoint_path(name).exists()]
    for name in cached[:1] or AUTO_FETCHED:
        try:
            network = load_backbone(name, **options)
        except FileNotFoundError as error:
            log.info(error)
            continue
        if name == "focus_vits14":
            log.log(NOTICE, focus.CHOSEN)
        return network
    log.warning(
        f"{AUTO} is not in the cache and cannot be downloaded, nor can focus_vits14 from a package index; using the "
        "bundled backbone tiny, which learned from fewer and smaller images. For better segments of photos get "
        f"{BACKBONES[AUTO].url} and pass it: --backbone {AUTO} --weights FILE."
    )
    return load_backbone("tiny", device=options["device"])


def checkpoint_path(name: str) -> Path:
    """Where the torch cache has the weight file of a published backbone."""
    file = BACKBONES[name].url.rsplit("/", 1)[-1] or f"{name}.pth"
    return Path(torch.hub.get_dir()) / "checkpoints" / file


def _read_published(name: str, weights: str | Path | None, progress: bool) -> dict:
    """The state dict of a published backbone, from a file, the torch cache, or fetched into that."""
    if weights:
        path = weight_file(Path(weights))
        if path.suffix.lower() in focus.SUFFIXES:
            return focus.read_focus(path)
        return to_native(read_weights(path))
    spec = BACKBONES[name]
    path = checkpoint_path(name)
    if not path.exists():
        if spec.url:
            download(name, spec.url, path, sha256=spec.sha256, progress=progress)
        else:
            focus.fetch_focus(path, spec.tensors)
    return to_native(read_weights(path, spec.sha256))


def _advice(name: str, state: dict) -> str:
    """What to do about a state dict that does not fit a backbone, by what it holds."""
    if not (found := sizes(state)):
        return f"it has {len(state)} entries, such as {', '.join(sorted(state)[:3])[:200] or 'none'}; give a backbone's"
    fitting = [other for other, spec in BACKBONES.items() if found.items() <= spec._asdict().items()]
    if name in fitting:
        return f"it looks like {kind(found)} all the same, but is no published file of it: get that"
    if fitting:
        return f"these look like {kind(found)}: use --backbone {' or '.join(fitting)}"
    return f"these look like {kind(found)}, which none of the backbones is"


def _read_bundled(name: str, weights: str | Path | None) -> dict:
    if weights:
        raise ValueError(
            f"{name} comes with its weights; leave them out, or name the backbone that they are of."
        )
    if not TINY_FILE.exists():
        raise FileNotFoundError(f"The bundled weights {TINY_FILE} are missing; reinstall stego.")
    try:
        state = read_weights(TINY_FILE, TINY_SHA256)
    except ValueError as error:
        raise ValueError(f"{error} Reinstall stego to get the bundled weights again.") from error
    if name == "tiny":
        return state
    branch = name.removeprefix("tiny_") + "."
    return {key.removeprefix(branch): value for key, value in state.items() if key.startswith(branch)}


def main(arguments: list[str] | None = None) -> None:
    """Fetch a published backbone ahead of time, check it, print the file's path."""
    parser = argparse.ArgumentParser(prog="python -m stego_parts.backbones", description=main.__doc__)
    parser.add_argument("name", choices=BACKBONES)
    name = parser.parse_args(arguments).name
    logging.basicConfig(format="%(message)s", level=NOTICE)
    try:
        load_backbone(name, progress=True)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    print(checkpoint_path(name))


if __name__ == "__main__":
    main()
