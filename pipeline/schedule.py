"""The learning rate as a pure function of the step."""

import math
from dataclasses import dataclass

from pipeline.options import option


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    peak_lr: float = option(1e-3, "learning rate at the end of the warmup")
    end_lr: float = option(0.0, "learning rate at the last step")
    warmup_steps: int = option(0, "steps of linear warmup from 0")

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: must not be negative, found {self.warmup_steps}")
        if self.peak_lr < self.end_lr:
            raise ValueError(f"end_lr: {self.end_lr} is above peak_lr {self.peak_lr}")


def learning_rate(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Linear warmup, then half a cosine to `end_lr` (arXiv 1608.03983, eq. 5).

    `step` counts from 0; the update of step `warmup_steps` - 1 is the first at the peak, that of the last step
    lies one step before `end_lr`.
    """
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return config.end_lr + (config.peak_lr - config.end_lr) * cosine
