"""A random part of the image, resized to the model's size (arXiv 1409.4842, section 6; big_vision's inception crop)."""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.data.decode import resize
from pipeline.options import option


@dataclass(frozen=True, kw_only=True)
class Config:
    min_area: float = option(0.05, "smallest share of the image's area")
    max_area: float = option(1.0, "largest share of the image's area")
    max_aspect: float = option(4 / 3, "largest aspect ratio; the smallest is its inverse")

    def __post_init__(self) -> None:
        if not 0.0 < self.min_area <= self.max_area <= 1.0:
            raise ValueError(
                f"min_area: expected 0 < min_area <= max_area <= 1, found {self.min_area}, {self.max_area}"
            )

    def __call__(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        for _ in range(100):
            area = height * width * rng.uniform(self.min_area, self.max_area)
            aspect = math.exp(rng.uniform(-math.log(self.max_aspect), math.log(self.max_aspect)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
                return resize(image, size, (left, top, left + w, top + h))
        return resize(image, size)
