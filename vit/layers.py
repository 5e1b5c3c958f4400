"""The layers of a Vision Transformer, written as tensor math.

From `torch.nn` come only `Module`, `Parameter` and the patch convolution `Conv2d`. Shapes in the margin use
B images, N tokens, D width, H heads, d = D / H, F hidden width of the MLP, C channels, P patch side, S image side.

Sources: "An Image is Worth 16x16 Words" (arXiv 2010.11929), "Attention Is All You Need" (arXiv 1706.03762).
"""

import math

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T + b on the last dimension.

    Shapes: x (..., in_features) -> (..., out_features); W (out_features, in_features), b (out_features).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x @ self.weight.T
        rows = x.reshape(-1, x.shape[-1])  # addmm adds the bias inside of the product, without a second pass
        return torch.addmm(self.bias, rows, self.weight.T).view(*x.shape[:-1], -1)


class LayerNorm(nn.Module):
    """Normalises each token over its features, then scales and shifts (arXiv 1607.06450, section 3).

    Shapes: x (..., D) -> (..., D). Statistics are taken in fp32 or better, whatever the dtype of x.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)  # (..., 1)
        normal = (wide - mean) * torch.rsqrt(variance + self.eps)
        return (normal * self.weight + self.bias).to(x.dtype)


class GELU(nn.Module):
    """x times the standard normal distribution function of x: the exact form (arXiv 1606.08415, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


class Dropout(nn.Module):
    """Zeroes each element with probability `rate` while training, and scales the rest by 1 / (1 - rate)."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.empty_like(x).bernoulli_(1.0 - self.rate)
        return x * keep / (1.0 - self.rate)


class DropPath(nn.Module):
    """Zeroes a whole residual branch of an image with probability `rate` (stochastic depth, arXiv 1603.09382).

    Shapes: x (B, ...) -> (B, ...).
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1.0 - self.rate)  # (B, 1, ...)
        return x * keep / (1.0 - self.rate)


class PatchEmbedding(nn.Module):
    """Cuts images into patches and projects each: a convolution whose stride is its kernel (2010.11929, eq. 1).

    Shapes: images (B, C, S, S) -> (B, (S / P)^2, D), patches in row-major order.
    """

    def __init__(self, channels: int, patch_size: int, width: int):
        super().__init__()
        self.projection = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        grid = self.projection(images)  # (B, D, S/P, S/P)
        return grid.flatten(2).transpose(1, 2)  # (B, N, D)


def attention(query: Tensor, key: Tensor, value: Tensor, dropout: Dropout | None = None) -> Tensor:
    """One head of scaled dot-product attention: softmax(q k^T / sqrt(d)) v (arXiv 1706.03762, eq. 1).

    Shapes: query, key, value (..., N, d) -> (..., N, d). Leading dimensions are independent heads and images.
    """
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)  # (..., N, N)
    weights = scores.softmax(dim=-1).to(value.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return weights @ value


class MultiHeadAttention(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)  # (B, N, 3, H, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # three times (B, H, N, d)
        heads = attention(query, key, value, self.dropout)  # (B, H, N, d)
        return self.projection(heads.transpose(1, 2).reshape(batch, tokens, width))  # (B, N, D)


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

    Shapes: x (B, N, D) -> (B, N, D).
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
    ):
        super().__init__()
        self.attention_norm = LayerNorm(width, layer_norm_eps)
        self.attention = MultiHeadAttention(width, heads, qkv_bias, attention_dropout)
        self.attention_dropout = Dropout(dropout)
        self.mlp_norm = LayerNorm(width, layer_norm_eps)
        self.mlp = MLP(width, mlp_dim, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention_dropout(self.attention(self.attention_norm(x))))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))
