"""RandAugment (arXiv 1909.13719): a few operations drawn at random, all of one magnitude, as two code bases have it.

A magnitude is out of 10: `level` = magnitude / 10 scales the ranges below, the sign of what has one is drawn.

| operation | tf | timm | timm, increasing |
|---|---|---|---|
| AutoContrast, Equalize, Invert | no level | no level | no level |
| Rotate, degrees | 30 level | 30 level | 30 level |
| ShearX, ShearY | 0.3 level | 0.3 level | 0.3 level |
| TranslateX, TranslateY | 100 level pixels | 0.45 level of the side | 0.45 level of the side |
| Color, Contrast, Brightness, Sharpness: factor | 0.1 + 1.8 level | 0.1 + 1.8 level | 1 +- 0.9 level, at least 0.1 |
| Posterize, bits kept | 4 level | 4 level | 4 - 4 level |
| Solarize, threshold | 256 level, modulo 256 | 256 level | 256 - 256 level |
| SolarizeAdd, added below 128 | 110 level | 110 level | 110 level |
| Cutout, half of the side in pixels | 40 level | - | - |

`tf` is big_vision's (magnitudes 10 and 15; 15 means level 1.5), with what its authors trained with: the threshold of
Solarize wraps around in uint8 (10 inverts all, 15 has threshold 128; its issue 110), Contrast moves levels away from
area / 256, 196 at 224 pixels, not from the mean (issue 109); it takes the nearest pixel and fills with grey.
`timm` is that of DeiT: rand-m9-mstd0.5-inc1 is magnitude 9, magnitude_std 0.5, increasing, probability 0.5. Its
scale ends at 10; it interpolates (bicubic) and fills with the mean colour of ImageNet.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.data import pixels
from pipeline.options import option

SHARED = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
OPERATIONS = {"tf": (*SHARED, "Cutout"), "timm": SHARED}

MOST_OPS = 100


@dataclass(frozen=True, kw_only=True)
class Config:
    flavour: Literal["tf", "timm"] = option("tf", "whose operations and ranges: big_vision's or timm's")
    ops: int = option(2, "operations on an image, one after another")
    magnitude: float = option(10.0, "strength of each, out of 10 (tf goes beyond)")
    magnitude_std: float = option(0.0, "standard deviation of the magnitude, drawn for each operation (mstd)")
    increasing: bool = option(False, "timm only: every operation grows with the magnitude (inc1)")
    probability: float = option(1.0, "of each operation being applied; timm's default is 0.5")

    def __post_init__(self) -> None:
        if self.ops < 0:
            raise ValueError(f"ops: must not be negative, found {self.ops}")
        if self.ops > MOST_OPS:
            raise ValueError(f"ops: must be at most {MOST_OPS}, found {self.ops}")
        if self.magnitude < 0 or (self.flavour == "timm" and self.magnitude > 10):
            raise ValueError(f"magnitude: expected 0 to 10 (flavour tf goes beyond), found {self.magnitude}")
        if self.increasing and self.flavour == "tf":
            raise ValueError("increasing: only flavour timm has it")

    def __call__(self, image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        names = OPERATIONS[self.flavour]
        for number in rng.integers(0, len(names), size=self.ops):
            if rng.random() < self.probability:
                image = self.apply(names[number], image, self.draw_level(rng), rng)
        return image

    def draw_level(self, rng: np.random.Generator) -> float:
        magnitude = rng.normal(self.magnitude, self.magnitude_std)
        return max(magnitude if self.flavour == "tf" else min(magnitude, 10.0), 0.0) / 10

    def apply(self, name: str, image: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
        """One operation at strength `level` (1 is magnitude 10)."""
        tf = self.flavour == "tf"
        height, width = image.shape[:2]
        sign = 1 if rng.random() < 0.5 else -1
        factor = max(1 + sign * 0.9 * level, 0.1) if self.increasing else 0.1 + 1.8 * level
        warp = ((128, 128, 128), pixels.NEAREST) if tf else ((124, 116, 104), pixels.CUBIC)
        match name:
            case "AutoContrast":
                return pixels.autocontrast(image)
            case "Equalize":
                return pixels.equalize(image)
            case "Invert":
                return pixels.invert(image)
            case "Rotate":
                return pixels.rotate(image, sign * 30 * level, *warp)
            case "Posterize":
                bits = int(4 * level)
                return pixels.posterize(image, 4 - bits if self.increasing else min(bits, 8))
            case "Solarize":
                threshold = int(256 * level)
                if self.increasing:
                    threshold = 256 - threshold
                return pixels.solarize(image, threshold % 256 if tf else threshold)
            case "SolarizeAdd":
                return pixels.solarize_add(image, int(110 * level))
            case "Color":
                return pixels.color(image, factor)
            case "Contrast":
                return pixels.contrast(image, factor, min(height * width // 256, 255) if tf else None)
            case "Brightness":
                return pixels.brightness(image, factor)
            case "Sharpness":
                return pixels.sharpness(image, factor)
            case "ShearX":
                return pixels.affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0), *warp)
            case "ShearY":
                return pixels.affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0), *warp)
            case "TranslateX":
                return pixels.affine(image, (1, 0, sign * level * (100 if tf else 0.45 * width), 0, 1, 0), *warp)
            case "TranslateY":
                return pixels.affine(image, (1, 0, 0, 0, 1, sign * level * (100 if tf else 0.45 * height)), *warp)
            case "Cutout":
                return cut_out(image, int(40 * level), rng)
        raise AssertionError(name)


def cut_out(image: np.ndarray, reach: int, rng: np.random.Generator) -> np.ndarray:
    """Greys the pixels up to `reach` from a random one."""
    y, x = rng.integers(0, image.shape[:2])
    cut = image.copy()
    cut[max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach] = 128
    return cut
