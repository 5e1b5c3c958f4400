"""The layers of a Vision Transformer.

A layer has two paths of one function: `reference`, tensor math to read beside the paper, and `fused`, the same by
torch's own kernels. Shapes in the margin use B images, N tokens, D width, H heads, d = D / H, F hidden width of the
MLP, C channels, P patch side, S image side.

Sources: "An Image is Worth 16x16 Words" (arXiv 2010.11929), "Attention Is All You Need" (arXiv 1706.03762).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layer(nn.Module):
    """A layer with two paths; `is_fused` chooses, and `ViT` sets it for all of its layers."""

    is_fused = False
    reference: Callable[[Tensor], Tensor]
    fused: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x) if self.is_fused else self.reference(x)


class Linear(Layer):
    """y = x W^T + b on the last dimension.

    Shapes: x (..., in_features) -> (..., out_features); W (out_features, in_features), b (out_features).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def reference(self, x: Tensor) -> Tensor:
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias

    def fused(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class LayerNorm(Layer):
    """Normalises each token over its features, then scales and shifts (arXiv 1607.06450, section 3).

    Shapes: x (..., D) -> (..., D). Statistics are taken in fp32 or better, whatever the dtype of x.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def reference(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)  # (..., 1)
        normal = (wide - mean) * torch.rsqrt(variance + self.eps)
        return (normal * self.weight + self.bias).to(x.dtype)

    def fused(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class GELU(Layer):
    """x times the standard normal distribution function of x: the exact form (arXiv 1606.08415, section 2)."""

    def reference(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))

    def fused(self, x: Tensor) -> Tensor:
        return functional.gelu(x)


class Dropout(Layer):
    """Zeroes each element with probability `rate` while training, and scales the rest by 1 / (1 - rate)."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def reference(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.empty_like(x).bernoulli_(1.0 - self.rate)
        return x * keep / (1.0 - self.rate)

    def fused(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.rate, self.training)


class DropPath(nn.Module):
    """Zeroes a whole residual branch of an image with probability `rate` while training (stochastic depth, arXiv
    1603.09382), and scales the rest by 1 / (1 - rate).

    Shapes: x (B, ...) -> (B, ...).
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.is_active = rate > 0.0
        # A tensor, so that blocks of different rates share one compiled graph; never on the meta device.
        self.keep_rate = torch.tensor(1.0 - rate, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.is_active:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) < self.keep_rate  # (B, 1, ...)
        return x * keep / self.keep_rate


class PatchEmbedding(Layer):
    """Cuts images into patches and projects each: a convolution whose stride is its kernel (2010.11929, eq. 1).

    Shapes: images (B, C, S, S) -> (B, (S / P)^2, D), patches in row-major order. The fused path is one matrix product.
    """

    def __init__(self, channels: int, patch_size: int, width: int):
        super().__init__()
        self.projection = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def reference(self, images: Tensor) -> Tensor:
        grid = self.projection(images)  # (B, D, S/P, S/P)
        return grid.flatten(2).transpose(1, 2)  # (B, N, D)

    def fused(self, images: Tensor) -> Tensor:
        weight, side = self.projection.weight, self.projection.kernel_size[0]
        batch, channels, height, width = images.shape
        cut = images.view(batch, channels, height // side, side, width // side, side)
        patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, weight[0].numel())  # (B, N, C*P*P)
        return functional.linear(patches, weight.flatten(1), self.projection.bias)  # (B, N, D)


def attention(query: Tensor, key: Tensor, value: Tensor, dropout: Dropout | None = None) -> Tensor:
    """One head of scaled dot-product attention: softmax(q k^T / sqrt(d)) v (arXiv 1706.03762, eq. 1).

    Shapes: query, key, value (..., N, d) -> (..., N, d). Leading dimensions are independent heads and images.
    """
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)  # (..., N, N)
    weights = scores.softmax(dim=-1).to(value.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return weights @ value


class MultiHeadAttention(Layer):
    """Runs `attention` for all heads at once and projects their concatenation (2010.11929, eq. 5-8).

    Shapes: x (B, N, D) -> (B, N, D). `qkv.weight` holds query, key and value of all heads one under another
    (3D, D); within each, head h owns rows h*d to (h+1)*d.
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.dropout = Dropout(dropout)
        self.projection = Linear(width, width)

    def reference(self, x: Tensor) -> Tensor:
        return self.concatenate(attention(*self.split(x), self.dropout))

    def fused(self, x: Tensor) -> Tensor:
        rate = self.dropout.rate if self.training else 0.0
        return self.concatenate(functional.scaled_dot_product_attention(*self.split(x), dropout_p=rate))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of every head: (B, N, D) -> three times (B, H, N, d)."""
        # Cut along the features, so that the backward pass writes the three gradients side by side in one copy.
        parts = self.qkv(x).chunk(3, dim=-1)  # three times (B, N, D)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return query, key, value

    def concatenate(self, heads: Tensor) -> Tensor:
        """The heads' results side by side, projected: (B, H, N, d) -> (B, N, D)."""
        return self.projection(heads.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between them (2010.11929, eq. 3).

    Shapes: x (..., D) -> (..., F) -> (..., D).
    """

    def __init__(self, width: int, mlp_dim: int, dropout: float = 0.0):
        super().__init__()
        self.expand = Linear(width, mlp_dim)
        self.gelu = GELU()
        self.contract = Linear(mlp_dim, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.contract(self.dropout(self.gelu(self.expand(x)))))


class EncoderBlock(nn.Module):
    """x + MSA(LN(x)), then x + MLP(LN(x)): the pre-norm encoder block (2010.11929, eq. 2 and 3).

    With `layer_scale` each branch is multiplied by a learned vector (arXiv 2103.17239, eq. 3). Shapes: x (B, N, D) ->
    (B, N, D).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_dim: int,
        *,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-6,
        layer_scale: bool = False,
    ):
        super().__init__()
        self.attention_norm = LayerNorm(width, layer_norm_eps)
        self.attention = MultiHeadAttention(width, heads, qkv_bias, attention_dropout)
        self.attention_dropout = Dropout(dropout)
        self.mlp_norm = LayerNorm(width, layer_norm_eps)
        self.mlp = MLP(width, mlp_dim, dropout)
        self.drop_path = DropPath(drop_path)
        self.attention_scale = nn.Parameter(torch.empty(width)) if layer_scale else None
        self.mlp_scale = nn.Parameter(torch.empty(width)) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(self.attention_dropout(self.attention(self.attention_norm(x))), self.attention_scale)
        return x + self.branch(self.mlp(self.mlp_norm(x)), self.mlp_scale)

    def branch(self, y: Tensor, scale: Tensor | None) -> Tensor:
        return self.drop_path(y if scale is None else y * scale)
