"""The weights of other projects: their names and shapes to ours and back. Pure: state dict in, state dict out.

Layouts: `native` (ours), `timm`, `hf` (Hugging Face's ViTForImageClassification), `torchvision`, and `jax` (the .npz
files of the original release, google-research/vision_transformer).
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from vit.model import ViTConfig, sincos_positions

State = dict[str, Tensor]
LAYOUTS = ("native", "timm", "hf", "torchvision", "jax")

# Our module or parameter -> its name there. `*` is the block's number, `{}` where weight or bias goes (else at the
# end); three names: query, key and value apart.
_HF, _TV, _JAX = "vit.encoder.layer.*", "encoder.layers.encoder_layer_*", "Transformer/encoderblock_*"
_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "timm": {
        "class_token": ("cls_token",),
        "registers": ("reg_token",),
        "positions": ("pos_embed",),
        "patch.projection": ("patch_embed.proj",),
        "blocks.*.attention_norm": ("blocks.*.norm1",),
        "blocks.*.attention.qkv": ("blocks.*.attn.qkv",),
        "blocks.*.attention.projection": ("blocks.*.attn.proj",),
        "blocks.*.attention_scale": ("blocks.*.ls1.gamma",),
        "blocks.*.mlp_norm": ("blocks.*.norm2",),
        "blocks.*.mlp.expand": ("blocks.*.mlp.fc1",),
        "blocks.*.mlp.contract": ("blocks.*.mlp.fc2",),
        "blocks.*.mlp_scale": ("blocks.*.ls2.gamma",),
        "norm": ("norm",),
        "head": ("head",),
    },
    "hf": {
        "class_token": ("vit.embeddings.cls_token",),
        "positions": ("vit.embeddings.position_embeddings",),
        "patch.projection": ("vit.embeddings.patch_embeddings.projection",),
        "blocks.*.attention_norm": (f"{_HF}.layernorm_before",),
        "blocks.*.attention.qkv": tuple(f"{_HF}.attention.attention.{part}" for part in ("query", "key", "value")),
        "blocks.*.attention.projection": (f"{_HF}.attention.output.dense",),
        "blocks.*.mlp_norm": (f"{_HF}.layernorm_after",),
        "blocks.*.mlp.expand": (f"{_HF}.intermediate.dense",),
        "blocks.*.mlp.contract": (f"{_HF}.output.dense",),
        "norm": ("vit.layernorm",),
        "representation": ("vit.pooler.dense",),
        "head": ("classifier",),
    },
    "torchvision": {
        "class_token": ("class_token",),
        "positions": ("encoder.pos_embedding",),
        "patch.projection": ("conv_proj",),
        "blocks.*.attention_norm": (f"{_TV}.ln_1",),
        "blocks.*.attention.qkv": (f"{_TV}.self_attention.in_proj_{{}}",),
        "blocks.*.attention.projection": (f"{_TV}.self_attention.out_proj",),
        "blocks.*.mlp_norm": (f"{_TV}.ln_2",),
        "blocks.*.mlp.expand": (f"{_TV}.mlp.0",),
        "blocks.*.mlp.contract": (f"{_TV}.mlp.3",),
        "norm": ("encoder.ln",),
        "representation": ("heads.pre_logits",),
        "head": ("heads.head",),
    },
    "jax": {
        "class_token": ("cls",),
        "positions": ("Transformer/posembed_input/pos_embedding",),
        "patch.projection": ("embedding/{}",),
        "blocks.*.attention_norm": (f"{_JAX}/LayerNorm_0/{{}}",),
        "blocks.*.attention.qkv": tuple(
            f"{_JAX}/MultiHeadDotProductAttention_1/{part}/{{}}" for part in ("query", "key", "value")
        ),
        "blocks.*.attention.projection": (f"{_JAX}/MultiHeadDotProductAttention_1/out/{{}}",),
        "blocks.*.mlp_norm": (f"{_JAX}/LayerNorm_2/{{}}",),
        "blocks.*.mlp.expand": (f"{_JAX}/MlpBlock_3/Dense_0/{{}}",),
        "blocks.*.mlp.contract": (f"{_JAX}/MlpBlock_3/Dense_1/{{}}",),
        "norm": ("Transformer/encoder_norm/{}",),
        "representation": ("pre_logits/{}",),
        "head": ("head/{}",),
    },
}
_LONGEST_NAME = 200  # that is searched for and shown whole
_MOST_PROBLEMS = 200  # that are listed
_REQUIRED = {"hf": ("class_token",), "torchvision": ("class_token", "qkv.bias"), "jax": ("qkv.bias",)}

# The name by which a layout is known, and spellings of other releases of the same project.
_MARKS = {
    "hf": "vit.embeddings.patch_embeddings.projection.weight",
    "timm": "patch_embed.proj.weight",
    "torchvision": "conv_proj.weight",
    "jax": "embedding/kernel",
    "native": "patch.projection.weight",
}
_SPELLINGS = {
    "hf": (
        ("vit.layers.", "vit.encoder.layer."),
        (".attention.q_proj.", ".attention.attention.query."),
        (".attention.k_proj.", ".attention.attention.key."),
        (".attention.v_proj.", ".attention.attention.value."),
        (".attention.o_proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ),
    "torchvision": ((".mlp.linear_1.", ".mlp.0."), (".mlp.linear_2.", ".mlp.3.")),
    "jax": (
        ("/MultiHeadDotProductAttention_0/", "/MultiHeadDotProductAttention_1/"),
        ("/LayerNorm_1/", "/LayerNorm_2/"),
        ("/MlpBlock_0/", "/MlpBlock_3/"),
    ),
}


def to_layout(state: Mapping[str, Tensor], layout: str, config: ViTConfig) -> State:
    """A state dict of ours under another project's names and shapes; values are the same bits.

    timm's model for it is `VisionTransformer(class_token=pool == "cls", global_pool="token" or "avg", fc_norm=False,
    reg_tokens=registers, init_values=layer_scale, ...)`.

    Raises:
        ValueError: that project's model has no place for something in ours, or needs what ours lacks.
    """
    if layout == "native":
        return dict(state)
    if config.position_embedding == "sincos":
        state = {**state, "positions": sincos_positions(config)}
    for name in _REQUIRED.get(layout, ()):
        if not any(own.endswith(name) for own in state):
            raise ValueError(f"the {layout} layout needs {name}, which this model lacks")
    result = {}
    for name, tensor in state.items():
        names = foreign_names(name, layout)
        if name == "positions" and layout == "timm":  # registers have positions there
            first = config.positions - config.patches
            none = tensor.new_zeros(1, config.registers, config.width)
            tensor = torch.cat((tensor[:, :first], none, tensor[:, first:]), dim=1)
        for other, part in zip(names, tensor.chunk(len(names)), strict=True):
            result[other] = (_to_jax(name, part, config.heads) if layout == "jax" else part).contiguous()
    return result


def from_layout(
    state: Mapping[str, Tensor], like: Mapping[str, Tensor], config: ViTConfig, *, new_head: bool = False
) -> State:
    """A state dict for our model from another project's, whose layout is recognised by its names.

    `like` is the state dict of the model to fill: its names and shapes, and the values of a fresh head. Positions of
    another grid are resized. With `new_head` the head stays as in `like`, and so does the representation layer where
    the given one does not fit.

    Raises:
        ValueError: unknown layout; missing, unexpected and mis-shaped tensors, all in one message.
    """
    layout, given = recognise(state)
    expected = to_layout(like, layout, config)
    where = positions_name(layout)
    if where in given and (layout != "native" or where in expected):
        prefix = config.tokens - config.patches if layout == "timm" else config.positions - config.patches
        given[where] = _fit_positions(given[where], config.image_size // config.patch_size, prefix)
    fresh: set[str] = set()
    for part in ("representation", "head") if new_head else ():
        theirs = _under(part, layout)
        fits = all(n in given and n in expected and given[n].shape == expected[n].shape for n in theirs)
        if part == "head" or not fits:
            fresh |= {name for name in like if name.startswith(f"{part}.")}
            for name in theirs:
                given.pop(name, None)
                expected.pop(name, None)
    _check(given, expected, layout, config)
    if config.position_embedding == "sincos" and layout != "native":
        own = to_layout(like, layout, config)[where]
        if not torch.allclose(given[where].to(own), own, atol=1e-4):
            raise ValueError(f"{where}: learned positions, but the model has position_embedding 'sincos'")
    return {
        name: tensor if name in fresh else _native(name, given, layout, config).to(tensor.dtype).contiguous()
        for name, tensor in like.items()
    }


def recognise(state: Mapping[str, Tensor]) -> tuple[str, State]:
    """The layout of a state dict, and the state dict without a wrapper's prefix, in one spelling.

    Raises:
        ValueError: no known layout.
    """
    for layout, mark in _MARKS.items():
        core = mark.removeprefix("vit.")  # Hugging Face's bare ViTModel has no such prefix
        found = next((name for name in state if name == core or name.endswith(f".{core}")), None)
        if found is None:
            continue
        old, new = found.removesuffix(core), mark.removesuffix(core)
        result = {}
        for name, tensor in state.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
            for spelling, usual in _SPELLINGS.get(layout, ()):
                name = name.replace(spelling, usual)
            result[name] = tensor
        return layout, result
    raise ValueError(
        f"no known layout of a ViT: expected a tensor such as {', '.join(_MARKS.values())}; found "
        + (", ".join(map(_short, list(state)[:5])) or "nothing")
    )


def foreign_names(name: str, layout: str) -> list[str]:
    """The names of one of our tensors in a layout.

    Raises:
        ValueError: there is no place for it.
    """
    if layout == "native":
        return [name]
    number = re.search(r"\.(\d+)\.", name)
    general = re.sub(r"\.\d+\.", ".*.", name)
    table = _NAMES[layout]
    stem, leaf = (general, "") if general in table else general.rpartition(".")[::2]
    if stem not in table:
        raise ValueError(f"the {layout} layout has no place for {name}")
    if layout == "jax" and leaf == "weight":
        leaf = "scale" if stem.endswith("norm") else "kernel"
    names = [n if "{}" in n or not leaf else f"{n}.{{}}" for n in table[stem]]
    return [n.format(leaf).replace("*", number.group(1) if number else "") for n in names]


def positions_name(layout: str) -> str:
    return foreign_names("positions", layout)[0]


def resize_positions(positions: Tensor, grid: int, prefix: int) -> Tensor:
    """Positions for another grid of patches: bicubic with antialiasing; the first `prefix` are kept as they are.

    Shapes: positions (1, prefix + G^2, D) -> (1, prefix + grid^2, D).
    """
    kept, patches = positions[:, :prefix], positions[:, prefix:]
    old = math.isqrt(patches.shape[1])
    if old == grid:
        return positions
    image = patches.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, G, G)
    image = functional.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat((kept, image.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)


def _fit_positions(positions: Tensor, grid: int, prefix: int) -> Tensor:
    """Resized where the number of positions is that of a square grid; those without a prefix (timm's no_embed_class)
    get one of zeros."""
    if positions.ndim != 3:
        return positions
    count = positions.shape[1]
    if count - prefix != grid**2 and math.isqrt(count) ** 2 == count:
        positions = functional.pad(positions, (0, 0, prefix, 0))
    if count > prefix and math.isqrt(positions.shape[1] - prefix) ** 2 == positions.shape[1] - prefix:
        return resize_positions(positions, grid, prefix)
    return positions


def _under(part: str, layout: str) -> list[str]:
    """A layout's names of the weight and bias of one of our layers; none where it has no such layer."""
    if layout != "native" and part not in _NAMES[layout]:
        return []
    return [other for leaf in ("weight", "bias") for other in foreign_names(f"{part}.{leaf}", layout)]


def _native(name: str, given: State, layout: str, config: ViTConfig) -> Tensor:
    """One of our tensors from those of a layout."""
    parts = [given[other] for other in foreign_names(name, layout)]
    if layout == "jax":
        parts = [_from_jax(name, part) for part in parts]
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    if layout == "timm" and config.registers and name in ("positions", "registers"):
        first = config.positions - config.patches
        positions = given[positions_name(layout)]
        if name == "registers":
            return tensor + positions[:, first : first + config.registers]
        return torch.cat((tensor[:, :first], tensor[:, first + config.registers :]), dim=1)
    return tensor


def _to_jax(name: str, tensor: Tensor, heads: int) -> Tensor:
    if name == "patch.projection.weight":
        return tensor.permute(2, 3, 1, 0)  # (P, P, C, D)
    if tensor.ndim == 2:
        tensor = tensor.T  # kernels are (in, out)
    if ".qkv." in name:
        return tensor.unflatten(-1, (heads, -1))  # (D, H, d) and (H, d)
    if name.endswith("attention.projection.weight"):
        return tensor.unflatten(0, (heads, -1))  # (H, d, D)
    return tensor


def _from_jax(name: str, tensor: Tensor) -> Tensor:
    if name == "patch.projection.weight":
        return tensor.permute(3, 2, 0, 1)
    if ".qkv." in name:
        tensor = tensor.flatten(-2)
    if name.endswith("attention.projection.weight"):
        tensor = tensor.flatten(0, 1)
    return tensor.T if tensor.ndim == 2 else tensor


def _check(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], layout: str, config: ViTConfig) -> None:
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    shapes = [n for n in expected if n in given and given[n].shape != expected[n].shape]
    most = _MOST_PROBLEMS
    problems = [f"missing {n} {_shape(expected[n])}{_nearest(n, unexpected)}" for n in missing[:most]]
    problems += [
        f"unexpected {_short(n)} {_shape(given[n])}{_nearest(n, missing or expected)}" for n in unexpected[:most]
    ]
    for n in shapes:
        fix = "; model.new_head=true starts with a fresh head" if n in _under("head", layout) else ""
        problems.append(f"{n}: the file has {_shape(given[n])}, the model {_shape(expected[n])}{fix}")
    count = len(missing) + len(unexpected) + len(shapes)
    if count > most:
        problems = [*problems[:most], f"... {count} tensors in all"]
    if problems:
        raise ValueError(
            f"these weights (layout {layout}) are of another model than {config.variant} at {config.image_size} pixels"
            f" with {config.num_classes} classes:\n  " + "\n  ".join(problems)
        )


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]} ..."


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _nearest(name: str, names: Iterable[str]) -> str:
    if len(name) > _LONGEST_NAME:  # the search takes long for long names, and for many
        return ""
    near = difflib.get_close_matches(name, [n for n in names if len(n) <= _LONGEST_NAME][:1000], n=1, cutoff=0.5)
    return f"; nearest there: {near[0]}" if near else ""
