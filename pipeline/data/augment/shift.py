"""Moves the image by up to `pixels` in each direction; what comes in from outside is black."""

from dataclasses import dataclass

import numpy as np

from pipeline.options import option

MOST_PIXELS = 1024  # memory grows with the square; a checkpoint of a stranger's may name any number


@dataclass(frozen=True, kw_only=True)
class Config:
    pixels: int = option(4, "largest shift in pixels")

    def __post_init__(self) -> None:
        if not 0 <= self.pixels <= MOST_PIXELS:
            raise ValueError(f"pixels: expected 0 to {MOST_PIXELS}, found {self.pixels}")

    def __call__(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        down, right = rng.integers(0, 2 * self.pixels + 1, size=2)
        height, width = image.shape[:2]
        margin = ((self.pixels, self.pixels), (self.pixels, self.pixels), (0, 0))
        return np.pad(image, margin)[down : down + height, right : right + width]
