"""Stretches the whole image to the model's size."""

from dataclasses import dataclass

import numpy as np

from pipeline.data.decode import resize


@dataclass(frozen=True, kw_only=True)
class Config:
    def __call__(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        return resize(image, size)
