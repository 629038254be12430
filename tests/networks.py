"""Made-up weights in the published layouts, and what they compute, written out plainly."""

import torch
import torch.nn.functional as F

from stego_parts.backbones import Spec


def dino_state(spec: Spec, *, v2=False, seed=0, scale=0.05) -> dict:
    """Random weights in the layout of the published files."""
    generator = torch.Generator().manual_seed(seed)
    c = spec.channels

    def draw(*shape):
        return scale * torch.randn(*shape, generator=generator)

    state = {
        "cls_token": draw(1, 1, c),
        "pos_embed": draw(1, 1 + spec.grid**2, c),
        "patch_embed.proj.weight": draw(c, 3, spec.patch, spec.patch),
        "patch_embed.proj.bias": draw(c),
        "norm.weight": 1 + draw(c),
        "norm.bias": draw(c),
    }
    for i in range(spec.depth):
        for name, shape in {
            "norm1": (c,),
            "norm2": (c,),
            "attn.qkv": (3 * c, c),
            "attn.proj": (c, c),
            "mlp.fc1": (4 * c, c),
            "mlp.fc2": (c, 4 * c),
        }.items():
            state[f"blocks.{i}.{name}.weight"] = draw(*shape) + (1 if "norm" in name else 0)
            state[f"blocks.{i}.{name}.bias"] = draw(shape[0])
        if v2:
            state[f"blocks.{i}.ls1.gamma"], state[f"blocks.{i}.ls2.gamma"] = 1 + draw(c), 1 + draw(c)
    if v2:
        state["mask_token"] = draw(1, c)
    if spec.registers:
        state["register_tokens"] = draw(1, spec.registers, c)
    return state


# A block's entries beside the attention's: the name at DINO, at Hugging Face's ViT (DINO) and its DINOv2
BLOCK_NAMES = (
    ("norm1", "layernorm_before", "norm1"),
    ("norm2", "layernorm_after", "norm2"),
    ("attn.proj", "attention.output.dense", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp.fc2", "output.dense", "mlp.fc2"),
)


def hugging_face(state: dict, depth: int) -> dict:
    """A state dict of DINO or DINOv2 as the transformers library saves it."""
    v2 = "mask_token" in state
    made = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    if v2:
        made["embeddings.mask_token"] = state["mask_token"]
    else:
        made["pooler.dense.bias"] = torch.zeros(3)
    if "register_tokens" in state:
        made["embeddings.register_tokens"] = state["register_tokens"]
    for i in range(depth):
        theirs = f"encoder.layer.{i}"
        for part in ("weight", "bias"):
            query, key, value = state[f"blocks.{i}.attn.qkv.{part}"].chunk(3)
            made[f"{theirs}.attention.attention.query.{part}"] = query.clone()
            made[f"{theirs}.attention.attention.key.{part}"] = key.clone()
            made[f"{theirs}.attention.attention.value.{part}"] = value.clone()
            for published, vit, dinov2 in BLOCK_NAMES:
                made[f"{theirs}.{dinov2 if v2 else vit}.{part}"] = state[f"blocks.{i}.{published}.{part}"]
        if v2:
            made[f"{theirs}.layer_scale1.lambda1"] = state[f"blocks.{i}.ls1.gamma"]
            made[f"{theirs}.layer_scale2.lambda1"] = state[f"blocks.{i}.ls2.gamma"]
    return made


def bicubic(sources: int, targets: int, ratio: float, antialias: bool) -> torch.Tensor:
    """(targets, sources): how the originals' bicubic interpolation weighs a line of values, ends repeated.

    Keys' kernel with a = -0.75; with antialiasing a = -0.5, widened where lines shrink and cut off at the ends.
    """

    def kernel(t):
        t, a = t.abs(), -0.5 if antialias else -0.75
        near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
        return torch.where(t <= 1, near, torch.where(t < 2, far, 0))

    centers = (torch.arange(targets, dtype=torch.float64)[:, None] + 0.5) / ratio - 0.5
    if antialias:
        weights = kernel((torch.arange(sources) - centers) / max(1, 1 / ratio))
        return weights / weights.sum(1, keepdim=True)
    places = torch.arange(-3, sources + 3)
    weights = kernel(places - centers)
    ends = F.one_hot(places.clamp(0, sources - 1), sources).double()
    return weights @ ends


def positions(trained, h: int, w: int, registers: bool):
    """Position embeddings (grid, grid, C) -> (h * w, C): by ratios of h + 0.1, or with registers by the size itself."""
    grid = len(trained)
    if h == w == grid:
        return trained.flatten(0, 1)
    offset = 0 if registers else 0.1
    rows, columns = (bicubic(grid, side, (side + offset) / grid, registers) for side in (h, w))
    return torch.einsum("hi,wj,ijc->hwc", rows, columns, trained.double()).flatten(0, 1).float()


def plain_vit(x, state, spec):
    """The transformer written out with softmax attention: (B, 3, H, W) -> (B, C, h, w)."""
    c, p, heads = spec.channels, spec.patch, spec.heads
    h, w = x.shape[2] // p, x.shape[3] // p
    patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    grid = positions(state["pos_embed"][0, 1:].unflatten(0, (spec.grid, spec.grid)), h, w, spec.registers > 0)
    cls = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
    extra = state.get("register_tokens", torch.zeros(1, 0, c)).expand(len(x), -1, -1)
    x = torch.cat([cls, extra, x + grid], 1)
    for i in range(spec.depth):
        block = {
            key.removeprefix(f"blocks.{i}."): value
            for key, value in state.items()
            if key.startswith(f"blocks.{i}.")
        }
        y = F.layer_norm(x, (c,), block["norm1.weight"], block["norm1.bias"], 1e-6)
        q, k, v = (y @ block["attn.qkv.weight"].T + block["attn.qkv.bias"]).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = (q @ k.transpose(-1, -2) / (c // heads) ** 0.5).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2) @ block["attn.proj.weight"].T + block["attn.proj.bias"]
        x = x + y * block.get("ls1.gamma", torch.ones(c))
        y = F.layer_norm(x, (c,), block["norm2.weight"], block["norm2.bias"], 1e-6)
        y = F.gelu(y @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
        x = x + (y @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]) * block.get(
            "ls2.gamma", torch.ones(c)
        )
    x = F.layer_norm(x, (c,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 1 + spec.registers :]
    return x.transpose(1, 2).reshape(len(x), c, h, w)


def resnet_state() -> dict:
    """Random weights of a ResNet-50 under DINO's and torchvision's names; activations keep their size."""
    generator, state = torch.Generator().manual_seed(0), {}

    def add(conv: str, norm: str, inner: int, outer: int, side: int):
        fan = inner * side * side
        weight = torch.randn(outer, inner, side, side, generator=generator)
        state[f"{conv}.weight"] = weight * (2 / fan) ** 0.5
        for name, low, high in (
            ("weight", 0.4, 0.8),
            ("bias", -0.1, 0.1),
            ("running_mean", -0.1, 0.1),
            ("running_var", 0.5, 1.5),
        ):
            state[f"{norm}.{name}"] = low + (high - low) * torch.rand(outer, generator=generator)

    add("conv1", "bn1", 3, 64, 7)
    inner = 64
    for layer, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            for i, sizes in enumerate(((inner, width, 1), (width, width, 3), (width, 4 * width, 1)), 1):
                add(f"{name}.conv{i}", f"{name}.bn{i}", *sizes)
            if not block:
                add(f"{name}.downsample.0", f"{name}.downsample.1", inner, 4 * width, 1)
            inner = 4 * width
    return state


def plain_resnet(x, state, dilated=()):
    """ResNet-50 written out, to its last map; `dilated` layers widen filters where the others stride."""

    def conv(x, name, norm, stride=1, dilation=1):
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2 * dilation, dilation=dilation)
        mean, var, gain, bias = (
            state[f"{norm}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    x, dilation = F.max_pool2d(conv(x, "conv1", "bn1", 2).relu(), 3, 2, 1), 1
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            name, before = f"layer{layer}.{block}", dilation
            stride = 2 if layer > 1 and not block else 1
            if stride == 2 and layer in dilated:
                stride, dilation = 1, 2 * dilation
            y = conv(x, f"{name}.conv1", f"{name}.bn1").relu()
            y = conv(y, f"{name}.conv2", f"{name}.bn2", stride, dilation if block else before).relu()
            y = conv(y, f"{name}.conv3", f"{name}.bn3")
            x = (y + (x if block else conv(x, f"{name}.downsample.0", f"{name}.downsample.1", stride))).relu()
    return x


class Mean(torch.nn.Module):
    """A stand-in backbone: mean colour of each patch, so that a token tells where it came from."""

    patch, channels, name, sha256 = 8, 3, "mean", "none"

    def forward(self, x):
        return F.avg_pool2d(x, 8)
