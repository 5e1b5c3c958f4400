"""The Vision Transformer (arXiv 2010.11929): its configuration, its variants, and embed -> encode -> pool -> head."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit.layers import Dropout, EncoderBlock, Layer, LayerNorm, Linear, PatchEmbedding

# Table 1 of arXiv 2010.11929 for B, L and H; Ti and S from DeiT (arXiv 2012.12877) and AugReg (arXiv 2106.10270).
SIZES: dict[str, dict[str, int]] = {
    "Ti": {"width": 192, "depth": 12, "heads": 3, "mlp_dim": 768},
    "S": {"width": 384, "depth": 12, "heads": 6, "mlp_dim": 1536},
    "B": {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072},
    "L": {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096},
    "H": {"width": 1280, "depth": 32, "heads": 16, "mlp_dim": 5120},
}
LARGEST, DEEPEST = 10_000_000, 10_000  # numbers that a config may give without taking minutes to be refused
PATCHES = (8, 14, 16, 32)
VARIANTS: dict[str, dict[str, int]] = {
    f"{name}/{patch}": {**size, "patch_size": patch} for name, size in SIZES.items() for patch in PATCHES
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """What a ViT is. The defaults are ViT-B/16 at 224 pixels with 1000 classes: 86,567,656 parameters.

    Raises:
        ValueError: a combination that no ViT can have, with the field named and a value that works.
    """

    image_size: int = _option(224, "side of the square input image in pixels")
    patch_size: int = _option(16, "side of a square patch in pixels; must divide image_size")
    channels: int = _option(3, "colour channels of the input")
    num_classes: int = _option(1000, "outputs of the head")
    width: int = _option(768, "features of a token (D)")
    depth: int = _option(12, "number of encoder blocks")
    heads: int = _option(12, "attention heads in a block; must divide width")
    mlp_dim: int = _option(3072, "hidden features of a block's MLP")
    pool: Literal["cls", "avg"] = _option("cls", "what the head sees: the class token, or the mean of all patches")
    position_embedding: Literal["learned", "sincos"] = _option(
        "learned", "learned positions, or fixed 2-D sines and cosines (arXiv 2205.01580)"
    )
    registers: int = _option(0, "extra tokens without a patch, dropped at the end (arXiv 2309.16588)")
    representation_size: int | None = _option(None, "features of a tanh layer before the head; null: no such layer")
    layer_scale: float | None = _option(None, "initial LayerScale (arXiv 2103.17239); null: no LayerScale")
    qkv_bias: bool = _option(True, "whether query, key and value have a bias")
    dropout: float = _option(0.0, "dropout after the embedding, the attention projection and inside of the MLP")
    attention_dropout: float = _option(0.0, "dropout of the attention weights")
    drop_path: float = _option(0.0, "stochastic depth: rate of the last block, rising linearly from 0 at the first")
    layer_norm_eps: float = _option(1e-6, "epsilon of every LayerNorm")
    head_bias: float = _option(0.0, "initial bias of the head (-6.9 starts a sigmoid at 1/1000)")

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "channels", "num_classes", "width", "depth", "heads", "mlp_dim"):
            most = DEEPEST if name == "depth" else LARGEST
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, found {getattr(self, name)}")
            if getattr(self, name) > most:
                raise ValueError(f"{name}: must be at most {most}, found {getattr(self, name)}")
        for name in ("dropout", "attention_dropout", "drop_path"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: must lie in [0, 1), found {getattr(self, name)}")
        if self.pool not in ("cls", "avg"):
            raise ValueError(f"pool: must be 'cls' or 'avg', found {self.pool!r}")
        if self.position_embedding not in ("learned", "sincos"):
            raise ValueError(f"position_embedding: must be 'learned' or 'sincos', found {self.position_embedding!r}")
        if self.position_embedding == "sincos" and (self.width % 4 or self.width < 8):
            raise ValueError(
                f"width: sincos positions need a multiple of 4 from 8 on, found {self.width};"
                f" the nearest: {max(8, round(self.width / 4) * 4)}"
            )
        if not 0 <= self.registers <= LARGEST:
            raise ValueError(f"registers: must be from 0 to {LARGEST}, found {self.registers}")
        if self.representation_size is not None and not 1 <= self.representation_size <= LARGEST:
            raise ValueError(
                f"representation_size: must be null or from 1 to {LARGEST}, found {self.representation_size}"
            )
        if self.image_size % self.patch_size:
            low = self.image_size // self.patch_size * self.patch_size
            near = [size for size in (low, low + self.patch_size) if size]
            raise ValueError(
                f"image_size: {self.image_size} is no multiple of patch_size {self.patch_size};"
                f" the nearest that are: {', '.join(map(str, near))}"
            )
        if self.width % self.heads:
            small = [n for n in range(1, min(math.isqrt(self.width), 1 << 16) + 1) if self.width % n == 0]
            divisors = [*small, *(self.width // n for n in small)]
            raise ValueError(
                f"heads: {self.heads} does not divide width {self.width};"
                f" the nearest that does: {min(divisors, key=lambda n: abs(n - self.heads))}"
            )

    @classmethod
    def expand(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Replaces a `variant` such as "B/16" by the fields it stands for; fields given beside it win.

        Raises:
            ValueError: an unknown variant; the message lists the known ones.
        """
        given = dict(fields)
        variant = given.pop("variant", None)
        if variant is None:
            return given
        if not isinstance(variant, str) or variant not in VARIANTS:
            raise ValueError(f"variant: unknown {str(variant)[:80]!r}; known are {', '.join(VARIANTS)}")
        return {**VARIANTS[variant], **given}

    @property
    def variant(self) -> str:
        """The published name of this shape ("B/16"), or "custom"."""
        matches = (n for n, v in VARIANTS.items() if all(getattr(self, k) == x for k, x in v.items()))
        return next(matches, "custom")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def positions(self) -> int:
        """Tokens that have a position: all patches, and the class token before them."""
        return self.patches + (self.pool == "cls")

    @property
    def tokens(self) -> int:
        """Sequence length N in the encoder."""
        return self.positions + self.registers

    @property
    def features(self) -> int:
        """What the head sees of an image."""
        return self.width if self.representation_size is None else self.representation_size


class ViT(nn.Module):
    """A pre-norm Vision Transformer.

    Shapes: images (B, C, S, S), normalised floats -> logits (B, num_classes).
    Parameters are uninitialised after construction (so that a model can be built on the meta device first):
    call `init_weights`, or load a state dict.

    How it is computed is no part of the config: `fused` chooses the layers' path, and `activation_checkpointing` keeps
    only the input of each block for the backward pass and computes the rest again (arXiv 1604.06174).
    """

    positions: Tensor

    def __init__(self, config: ViTConfig, *, fused: bool = True, activation_checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.patch = PatchEmbedding(config.channels, config.patch_size, config.width)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.width)) if config.pool == "cls" else None
        self.registers = nn.Parameter(torch.empty(1, config.registers, config.width)) if config.registers else None
        if config.position_embedding == "learned":
            self.positions = nn.Parameter(torch.empty(1, config.positions, config.width))
        else:
            self.register_buffer("positions", sincos_positions(config), persistent=False)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                config.width,
                config.heads,
                config.mlp_dim,
                qkv_bias=config.qkv_bias,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                drop_path=config.drop_path * index / max(config.depth - 1, 1),
                layer_norm_eps=config.layer_norm_eps,
                layer_scale=config.layer_scale is not None,
            )
            for index in range(config.depth)
        )
        self.norm = LayerNorm(config.width, config.layer_norm_eps)
        has_representation = config.representation_size is not None
        self.representation = Linear(config.width, config.features) if has_representation else None
        self.head = Linear(config.features, config.num_classes)
        for module in self.modules():
            if isinstance(module, Layer):
                module.is_fused = fused

    def embed(self, images: Tensor) -> Tensor:
        """Class token, registers and patches, with positions added (eq. 1): (B, C, S, S) -> (B, N, D).

        Raises:
            ValueError: images of another shape than the config's.
        """
        c = self.config
        if images.ndim != 4 or images.shape[1:] != (c.channels, c.image_size, c.image_size):
            raise ValueError(
                f"images: expected (B, {c.channels}, {c.image_size}, {c.image_size}), found {tuple(images.shape)};"
                " resize them, or set image_size and channels"
            )
        x = self.patch(images)  # (B, patches, D)
        if self.class_token is not None:
            token = self.class_token.expand(len(x), -1, -1).to(x.dtype)  # (B, 1, D)
            x = torch.cat((token, x), dim=1)
        x = x + self.positions
        if self.registers is not None:
            first = c.positions - c.patches
            registers = self.registers.expand(len(x), -1, -1).to(x.dtype)
            x = torch.cat((x[:, :first], registers, x[:, first:]), dim=1)  # (B, N, D)
        return self.dropout(x)

    def encode(self, x: Tensor) -> Tensor:
        """All blocks and the final norm (eq. 2-4): (B, N, D) -> (B, N, D)."""
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        """What stands for the image: the class token, or the mean over patches: (B, N, D) -> (B, features)."""
        x = x[:, 0] if self.config.pool == "cls" else x[:, -self.config.patches :].mean(dim=1)
        return x if self.representation is None else torch.tanh(self.representation(x))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.encode(self.embed(images))))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fills every parameter as the original release does (google-research/vision_transformer, models_vit.py).

        Linear layers: Xavier uniform (query, key and value each on their own), zero bias, MLP biases normal with
        deviation 1e-6. Patch convolution and representation layer: LeCun truncated normal, zero bias. Norms: one and
        zero. Head: zero, with the configured bias. LayerScale: its configured value (arXiv 2103.17239).

        Positions, class token and registers: truncated normal with deviation 0.02. Only here the release differs: its
        positions are normal with this deviation, not cut, and its class token is zero.
        """
        for layer in (self.patch.projection, self.representation):
            if layer is not None:
                assert layer.bias is not None
                _truncated_normal(layer.weight, 1 / math.sqrt(layer.weight[0].numel()), generator)
                layer.bias.zero_()
        if self.config.position_embedding == "sincos":
            self.positions.copy_(sincos_positions(self.config))
        for tokens in (self.positions, self.class_token, self.registers):
            if isinstance(tokens, nn.Parameter):
                _truncated_normal(tokens, 0.02, generator)
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
        for block in self.blocks:
            assert isinstance(block, EncoderBlock)
            qkv, out, mlp = block.attention.qkv, block.attention.projection, block.mlp
            for weight in (*qkv.weight.chunk(3), out.weight, mlp.expand.weight, mlp.contract.weight):
                bound = math.sqrt(6 / sum(weight.shape))  # Xavier uniform
                weight.uniform_(-bound, bound, generator=generator)
            for bias in (qkv.bias, out.bias):
                if bias is not None:
                    bias.zero_()
            for layer in (mlp.expand, mlp.contract):
                assert layer.bias is not None
                layer.bias.normal_(0.0, 1e-6, generator=generator)
            for scale in (block.attention_scale, block.mlp_scale):
                if scale is not None and self.config.layer_scale is not None:
                    scale.fill_(self.config.layer_scale)
        assert self.head.bias is not None
        self.head.weight.zero_()
        self.head.bias.fill_(self.config.head_bias)


def sincos_positions(config: ViTConfig) -> Tensor:
    """Fixed positions of a grid (arXiv 2205.01580; its first users: MoCo v3, arXiv 2104.02057): (1, positions, D).

    A quarter of the features each: sine and cosine of the column, sine and cosine of the row, at wavelengths that rise
    geometrically up to 10,000. The class token's position is zero.
    """
    side, quarter = config.image_size // config.patch_size, config.width // 4
    omega = 10_000.0 ** (-torch.arange(quarter) / (quarter - 1))  # (D/4,)
    angles = torch.arange(side)[:, None] * omega  # (S/P, D/4)
    columns, rows = angles.repeat(side, 1), angles.repeat_interleave(side, 0)  # (patches, D/4), row-major
    table = torch.cat((columns.sin(), columns.cos(), rows.sin(), rows.cos()), dim=1)  # (patches, D)
    if config.pool == "cls":
        table = torch.cat((table.new_zeros(1, config.width), table))
    return table[None]


def _truncated_normal(tensor: Tensor, deviation: float, generator: torch.Generator | None) -> None:
    """Normal numbers cut at two sigma, rescaled so that `deviation` is what remains after the cut (as in JAX)."""
    tail = math.erf(2 / math.sqrt(2))  # the share of a normal distribution within two sigma
    cut_deviation = 0.87962566103423978
    tensor.uniform_(-tail, tail, generator=generator).erfinv_().mul_(math.sqrt(2) * deviation / cut_deviation)


def count_parameters(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def forward_flops(config: ViTConfig) -> int:
    """Floating-point operations of one image's forward pass, in matrix products (a multiply-add counts as 2)."""
    n, d, f = config.tokens, config.width, config.mlp_dim
    block = 4 * n * d * d + 2 * n * d * f + 2 * n * n * d  # qkv and projection, MLP, scores and weighted sum
    patch = config.patches * config.channels * config.patch_size**2 * d
    head = config.features * config.num_classes
    if config.representation_size is not None:
        head += d * config.features
    return 2 * (config.depth * block + patch + head)


def training_flops(config: ViTConfig) -> int:
    """Floating-point operations of one image's training step: the backward pass costs two forward passes, but the
    patch convolution needs no gradient of its input."""
    patch = config.patches * config.channels * config.patch_size**2 * config.width
    return 3 * forward_flops(config) - 2 * patch
