"""Operations on uint8 RGB images (height, width, 3): those of Pillow bit for bit, unless they say otherwise.

What changes each level on its own is one table look-up, which is several times as fast as Pillow.
"""

import math

import cv2
import numpy as np
from PIL import Image, ImageEnhance

cv2.setNumThreads(0)  # images are small, workers are processes of their own, and threads don't survive a fork

LEVELS = np.arange(256)
NEAREST, CUBIC = cv2.INTER_NEAREST, cv2.INTER_CUBIC
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def blend(first: np.ndarray | int, second: np.ndarray, factor: float) -> np.ndarray:
    """`first` at factor 0, `second` at 1; beyond, what differs is exaggerated. Clipped to uint8."""
    start = np.asarray(first).astype(np.float32)
    mixed = second.astype(np.float32) - start
    mixed *= np.float32(factor)
    mixed += start
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)


def look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replaces each level by its entry: one table (256,) for all channels, or (256, 3)."""
    return cv2.LUT(image, table.reshape(1, 256, -1).astype(np.uint8))


def invert(image: np.ndarray) -> np.ndarray:
    return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the highest bits of each level; none leaves black."""
    return image & np.uint8(0xFF00 >> bits & 0xFF)


def solarize(image: np.ndarray, threshold: int = 128) -> np.ndarray:
    """Inverts the levels from the threshold on."""
    return look_up(image, np.where(threshold > LEVELS, LEVELS, 255 - LEVELS))


def solarize_add(image: np.ndarray, addition: int, threshold: int = 128) -> np.ndarray:
    """Adds to the levels below the threshold."""
    return look_up(image, np.where(threshold > LEVELS, np.minimum(LEVELS + addition, 255), LEVELS))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return look_up(image, blend(0, LEVELS, factor))


def contrast(image: np.ndarray, factor: float, middle: int | None = None) -> np.ndarray:
    """Moves all levels away from `middle`, by default the mean grey level."""
    if middle is None:
        middle = int(grey(image).mean() + 0.5)
    return look_up(image, blend(middle, LEVELS, factor))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))


def grey(image: np.ndarray) -> np.ndarray:
    """(height, width, 3) -> (height, width): OpenCV's weights are not Pillow's."""
    return np.asarray(Image.fromarray(image).convert("L"))


def grayscale(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(grey(image), cv2.COLOR_GRAY2RGB)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel so that its darkest level becomes 0 and its brightest 255."""
    table = np.stack([LEVELS] * 3, axis=1)  # (256, 3)
    for channel, counts in enumerate(histograms(image)):
        used = np.flatnonzero(counts)
        low, high = used[0], used[-1]
        if high > low:
            scale = 255.0 / (high - low)
            table[:, channel] = np.clip(LEVELS * scale - low * scale, 0, 255)
    return look_up(image, table)


def equalize(image: np.ndarray) -> np.ndarray:
    """Spreads the levels of each channel so that they are used about equally."""
    table = np.stack([LEVELS] * 3, axis=1)  # (256, 3)
    for channel, counts in enumerate(histograms(image)):
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        if step:
            below = np.cumsum(counts) - counts
            table[:, channel] = np.minimum((below + step // 2) // step, 255)
    return look_up(image, table)


def histograms(image: np.ndarray) -> list[np.ndarray]:
    """How often each level occurs, (256,) for each channel."""
    return [cv2.calcHist([image], [c], None, [256], [0, 256]).ravel().astype(np.int64) for c in range(3)]


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    smooth = cv2.filter2D(image, -1, SMOOTH)
    smooth[[0, -1]], smooth[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    return blend(smooth, image, factor)


def gaussian_blur(image: np.ndarray, radius: float) -> np.ndarray:
    """A true Gaussian of that standard deviation in pixels, which Pillow nears by repeated means."""
    return cv2.GaussianBlur(image, (0, 0), radius, borderType=cv2.BORDER_REPLICATE)


def affine(image: np.ndarray, matrix: tuple[float, ...], fill: tuple[int, ...], interpolation: int) -> np.ndarray:
    """The input at (a x + b y + c, d x + e y + f) for each output (x, y); `matrix` is (a, b, c, d, e, f).

    Centres of pixels lie at halves, as for Pillow. OpenCV's interpolation: `NEAREST` differs from Pillow's where a
    coordinate falls between two pixels, `CUBIC` has another kernel.
    """
    a, b, c, d, e, f = matrix
    shifted = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    height, width = image.shape[:2]
    return cv2.warpAffine(
        image, shifted, (width, height), flags=interpolation | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT, borderValue=fill,
    )  # fmt: skip


def rotate(image: np.ndarray, degrees: float, fill: tuple[int, ...], interpolation: int) -> np.ndarray:
    """Counterclockwise about the centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.shape[1] / 2, image.shape[0] / 2
    return affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), fill, interpolation)
