"""Cross-entropy against class labels, or against the soft targets of mixed images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.options import option


@dataclass(frozen=True, kw_only=True)
class Config:
    loss: Literal["softmax", "sigmoid"] = option("softmax", "one softmax over the classes, or a sigmoid for each")
    label_smoothing: float = option(0.0, "share of the target that is spread evenly over all classes")

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: must lie in [0, 1), found {self.label_smoothing}")

    def __call__(self, model: Callable[[Tensor], Tensor], batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Shapes: batch.images (B, 3, S, S) normalised, labels (B,), valid (B,), targets (B, classes) or None.

        Masked rows count nowhere. The metrics top1 and top5 are of the labels.
        """
        logits = model(batch.images).float()  # (B, classes)
        losses = self.per_row(logits, batch.labels, batch.targets) * batch.valid  # (B,)
        with torch.no_grad():
            true = logits.gather(1, batch.labels[:, None])  # (B, 1)
            earlier = torch.arange(logits.shape[1], device=logits.device) < batch.labels[:, None]  # (B, classes)
            # (B,): classes that are ranked above the true one; of equal logits the first counts, as for argmax
            above = ((logits > true) | ((logits == true) & earlier)).sum(1)
            finite = logits.isfinite().all(1) & batch.valid
            metrics = {
                "top1": ((above < 1) & finite).sum(),
                "top5": ((above < 5) & finite).sum(),
                "loss": losses.detach().sum(),
                "count": batch.valid.sum(),
            }
        return losses.sum(), metrics

    def per_row(self, logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
        """Shapes: logits (B, classes), labels (B,) -> (B,). Soft `targets` (B, classes) stand for the labels."""
        classes = logits.shape[1]
        if self.loss == "softmax":
            log_p = logits.log_softmax(1)
            true = log_p.gather(1, labels[:, None])[:, 0] if targets is None else (targets * log_p).sum(1)
            return -(1 - self.label_smoothing) * true - self.label_smoothing * log_p.mean(1)
        if targets is None:
            target = torch.full_like(logits, self.label_smoothing / classes)
            target.scatter_(1, labels[:, None], 1 - self.label_smoothing + self.label_smoothing / classes)
        else:
            target = (1 - self.label_smoothing) * targets + self.label_smoothing / classes
        # -(t log s(x) + (1 - t) log s(-x)), with log s(x) = -softplus(-x)
        softplus = torch.logaddexp(logits, logits.new_zeros(()))
        return (softplus - target * logits).sum(1)
