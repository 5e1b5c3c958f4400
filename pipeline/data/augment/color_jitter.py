"""Brightness, contrast and saturation by random factors, in random order (as DeiT III, arXiv 2204.07118, uses it)."""

from dataclasses import dataclass

import numpy as np

from pipeline.data import pixels
from pipeline.options import option


@dataclass(frozen=True, kw_only=True)
class Config:
    brightness: float = option(0.3, "the factor is drawn from 1 - this (at least 0) to 1 + this")
    contrast: float = option(0.3, "the same for contrast")
    saturation: float = option(0.3, "the same for saturation")

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, found {getattr(self, name)}")

    def __call__(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        changes = [
            (pixels.brightness, self.brightness), (pixels.contrast, self.contrast), (pixels.color, self.saturation)
        ]  # fmt: skip
        for number in rng.permutation(3):
            change, reach = changes[number]
            if reach > 0:
                image = change(image, rng.uniform(max(1 - reach, 0), 1 + reach))
        return image
