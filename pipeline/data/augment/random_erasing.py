"""Random erasing (arXiv 1708.04896): a random rectangle is overwritten.

The usual code erases after normalisation by the mean and deviation of ImageNet's pixels, with normal noise of each
pixel ("noise") or with zeros ("constant"). On uint8 pixels the same is noise with that mean and deviation (about
120 +- 58), or the mean colour; what exceeds 0 to 255, about 2 deviations, is clipped.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.options import option

MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255  # of ImageNet's pixels
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32) * 255


@dataclass(frozen=True, kw_only=True)
class Config:
    probability: float = option(0.25, "of an image being erased in part")
    min_area: float = option(0.02, "smallest share of the image's area")
    max_area: float = option(1 / 3, "largest share of the image's area")
    max_aspect: float = option(10 / 3, "largest aspect ratio; the smallest is its inverse")
    pixels: Literal["noise", "constant"] = option("noise", "normal noise of each pixel, or the mean colour")

    def __post_init__(self) -> None:
        if not 0.0 < self.min_area <= self.max_area <= 1.0:
            raise ValueError(
                f"min_area: expected 0 < min_area <= max_area <= 1, found {self.min_area}, {self.max_area}"
            )
        if self.max_aspect < 1.0:
            raise ValueError(f"max_aspect: must be at least 1, found {self.max_aspect}")

    def __call__(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        if rng.random() >= self.probability:
            return image
        height, width = image.shape[:2]
        for _ in range(10):
            area = height * width * rng.uniform(self.min_area, self.max_area)
            aspect = math.exp(rng.uniform(-math.log(self.max_aspect), math.log(self.max_aspect)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                top, left = rng.integers(0, (height - h + 1, width - w + 1))
                erased = image.copy()
                erased[top : top + h, left : left + w] = self.fill(h, w, rng)
                return erased
        return image

    def fill(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Shape: (height, width, 3), or (3,)."""
        if self.pixels == "constant":
            return MEAN.round().astype(np.uint8)
        noise = rng.standard_normal((height, width, 3), dtype=np.float32) * DEVIATION + MEAN
        return noise.round().clip(0, 255).astype(np.uint8)
