"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.options import option


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    shape: Literal["cosine", "linear", "constant"] = option("cosine", "how the learning rate falls after the warmup")
    peak_lr: float = option(1e-3, "learning rate at the end of the warmup")
    end_lr: float = option(0.0, "learning rate at the last step")
    warmup_steps: int = option(0, "steps of linear warmup from 0")
    cooldown_steps: int = option(0, "with shape constant: last steps, which fall linearly to end_lr")

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "cooldown_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, found {getattr(self, name)}")
        if self.peak_lr < self.end_lr:
            raise ValueError(f"end_lr: {self.end_lr} is above peak_lr {self.peak_lr}")
        if self.cooldown_steps and self.shape != "constant":
            raise ValueError(f"cooldown_steps: shape={self.shape} falls all the way; set shape=constant, or 0 here")
        if self.end_lr and self.shape == "constant" and not self.cooldown_steps:
            raise ValueError("end_lr: shape=constant never reaches it; set cooldown_steps, or end_lr=0")


def learning_rate(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Linear warmup, then a fall from `peak_lr` to `end_lr`: half a cosine (arXiv 1608.03983, eq. 5), a line (the
    original ViT, arXiv 2010.11929, table 3), or constant with a line at the end (arXiv 2106.04560, section 3.5).

    `step` counts from 0; the update of step `warmup_steps` - 1 is the first at the peak, that of the last step
    lies one step before `end_lr`.
    """
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    begin = config.warmup_steps
    if config.shape == "constant":
        begin = max(total_steps - config.cooldown_steps, begin)
        if step < begin:
            return config.peak_lr
    progress = min((step - begin) / max(total_steps - begin, 1), 1.0)
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.shape == "cosine" else 1.0 - progress
    return config.end_lr + (config.peak_lr - config.end_lr) * left
