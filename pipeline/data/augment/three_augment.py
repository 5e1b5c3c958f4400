"""3-Augment (DeiT III, arXiv 2204.07118, section 3.2): grayscale, solarize or Gaussian blur, each as likely."""

from dataclasses import dataclass

import numpy as np

from pipeline.data import pixels
from pipeline.options import option

MOST_RADIUS = 100.0  # time grows with it


@dataclass(frozen=True, kw_only=True)
class Config:
    min_radius: float = option(0.1, "smallest standard deviation of the blur in pixels")
    max_radius: float = option(2.0, "largest standard deviation of the blur in pixels")

    def __post_init__(self) -> None:
        if not 0.0 < self.min_radius <= self.max_radius <= MOST_RADIUS:
            raise ValueError(
                f"min_radius: expected 0 < min_radius <= max_radius <= {MOST_RADIUS}, found {self.min_radius},"
                f" {self.max_radius}"
            )

    def __call__(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        match rng.integers(0, 3):
            case 0:
                return pixels.grayscale(image)
            case 1:
                return pixels.solarize(image)
            case _:
                return pixels.gaussian_blur(image, rng.uniform(self.min_radius, self.max_radius))
