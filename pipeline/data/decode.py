"""Encoded image -> RGB pixels."""

import io

import numpy as np
from PIL import Image

from pipeline.errors import UserError


def decode(data: bytes, where: str) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP file.

    Returns uint8 RGB, (height, width, 3).

    Raises:
        UserError: the bytes are no image, or a broken one; `where` names the sample.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no image (JPEG, PNG or WebP)" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UserError(f"{where}: can't be decoded: {reason}; mend or remove the sample") from None


def resize(image: np.ndarray, size: int, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """Resizes `box` (left, top, right, bottom in pixels; default all) to a square, bicubic and antialiased.

    Shapes: (height, width, 3) -> (size, size, 3), uint8.
    """
    if image.shape[:2] == (size, size) and box is None:
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))
