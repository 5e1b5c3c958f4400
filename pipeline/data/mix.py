"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of normalised images on the device.

Rows are mixed within aligned blocks of the global batch, row i of a block with row i from its end, all with one
share and one box drawn from (seed, step, block). So a global batch is mixed the same on any number of ranks, and
however it is cut into micro batches.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.order import MIX
from pipeline.errors import UserError
from pipeline.options import option


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    mixup_alpha: float = option(0.0, "share of a row's own image in mixup: Beta(alpha, alpha); 0: no mixup")
    cutmix_alpha: float = option(0.0, "share of a row's own image in CutMix: Beta(alpha, alpha); 0: no CutMix")
    probability: float = option(1.0, "of a block being mixed")
    switch_probability: float = option(0.5, "of CutMix in a mixed block, where both are on")
    block_rows: int = option(8, "rows of the global batch that are mixed among themselves")

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, found {getattr(self, name)}")
        for name in ("probability", "switch_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: must lie in [0, 1], found {getattr(self, name)}")
        if self.block_rows < 2:
            raise ValueError(f"block_rows: must be at least 2, found {self.block_rows}")

    @property
    def on(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


def check_blocks(config: MixConfig, micro_batch: int, rank_rows: int) -> None:
    """Raises UserError where a block would be cut by the rows of a micro batch, with the nearest that don't."""
    block = config.block_rows
    if not config.on or micro_batch % block == 0:
        return
    near = [n for n in range(block, rank_rows + 1, block) if rank_rows % n == 0]
    near.sort(key=lambda n: abs(n - micro_batch))
    fix = f"nearest engine.micro_batch_size that works: {', '.join(map(str, near[:2]))}"
    if not near:
        fix = f"nearest rows of a rank: {max(rank_rows // block, 1) * block}, {(rank_rows // block + 1) * block}"
    raise UserError(
        f"mix.block_rows: rows are mixed in blocks of {block}, which do not divide a micro batch of {micro_batch} (of"
        f" {rank_rows} rows of a rank); {fix}; or set mix.block_rows to a divisor of {micro_batch}"
    )


def draw_block(config: MixConfig, size: int, *key: int) -> tuple[float, ...]:
    """(weight, top, bottom, left, right, share) of one block: see `mix`."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    if rng.random() >= config.probability:
        return 1.0, 0, 0, 0, 0, 1.0
    cut = config.mixup_alpha == 0 or (config.cutmix_alpha > 0 and rng.random() < config.switch_probability)
    alpha = config.cutmix_alpha if cut else config.mixup_alpha
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return share, 0, 0, 0, 0, share
    half = int(size * (1 - share) ** 0.5) // 2
    y, x = (int(centre) for centre in rng.integers(0, size, size=2))
    top, bottom, left, right = max(y - half, 0), min(y + half, size), max(x - half, 0), min(x + half, size)
    return 1.0, top, bottom, left, right, 1 - (bottom - top) * (right - left) / size**2


def mix(
    images: Tensor, labels: Tensor, valid: Tensor, num_classes: int, config: MixConfig, *, seed: int, step: int,
    first_row: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mixed images, and what share of each class they show.

    Outside of the block's box, `weight` of an image is its own and the rest its partner's; inside, all is the
    partner's. `share` is its own part of the whole, after the box was clipped. A row that only pads, and its partner,
    stay as they are.

    Shapes: images (B, 3, S, S) normalised, labels (B,), valid (B,) -> (B, 3, S, S), (B, num_classes) float32.
    `first_row` is the first row's number in the global batch; it and B are multiples of `block_rows`.
    """
    rows, size = config.block_rows, images.shape[-1]
    assert len(images) % rows == 0
    assert first_row % rows == 0
    blocks = range(first_row // rows, (first_row + len(images)) // rows)
    drawn = torch.tensor([draw_block(config, size, seed, MIX, step, block) for block in blocks])  # (blocks, 6)
    if images.is_cuda:
        drawn = drawn.pin_memory()
    weight, top, bottom, left, right, share = drawn.to(images.device, non_blocking=True)[:, :, None].unbind(1)

    def partners(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, rows)).flip(1)

    both = valid & partners(valid).flatten()  # (B,)
    place = torch.arange(size, device=images.device)
    in_rows, in_columns = (place >= top) & (place < bottom), (place >= left) & (place < right)  # (blocks, S)
    box = in_rows[:, :, None] & in_columns[:, None, :]  # (blocks, S, S)
    own = torch.where(box, 0.0, weight[:, :, None])[:, None, None]  # (blocks, 1, 1, S, S)
    own = torch.where(both.view(-1, rows, 1, 1, 1), own, 1.0).to(images.dtype)  # (blocks, rows, 1, S, S)
    mixed = torch.lerp(partners(images), images.unflatten(0, (-1, rows)), own).flatten(0, 1)

    share = torch.where(both.view(-1, rows), share, 1.0).reshape(-1, 1)  # (B, 1)
    targets = torch.zeros(len(labels), num_classes, device=images.device).scatter_(1, labels[:, None], share)
    return mixed, targets.scatter_add_(1, partners(labels).reshape(-1, 1), 1 - share)
