"""Moves the image by up to `pixels` in each direction; what comes in from outside is black."""

from dataclasses import dataclass

import numpy as np

from pipeline.options import option


@dataclass(frozen=True, kw_only=True)
class Config:
    pixels: int = option(4, "largest shift in pixels")

    def __call__(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        down, right = rng.integers(0, 2 * self.pixels + 1, size=2)
        height, width = image.shape[:2]
        margin = ((self.pixels, self.pixels), (self.pixels, self.pixels), (0, 0))
        return np.pad(image, margin)[down : down + height, right : right + width]
