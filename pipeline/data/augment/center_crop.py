"""Resizes the short side so that the model's size is `share` of it, and takes the centre: 224 of 256 by default."""

from dataclasses import dataclass

import numpy as np

from pipeline.data.decode import resize
from pipeline.options import option


@dataclass(frozen=True, kw_only=True)
class Config:
    share: float = option(0.875, "side of the crop as a share of the short side")

    def __call__(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        side = max(round(min(height, width) * self.share), 1)
        left, top = (width - side) // 2, (height - side) // 2
        return resize(image, size, (left, top, left + side, top + side))
