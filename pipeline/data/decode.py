"""Encoded image -> RGB pixels, and the resizing of them."""

import io
import math
import warnings

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from pipeline.errors import UserError, is_out_of_memory

Turn = Image.Transpose
UPRIGHT = {  # by EXIF orientation
    2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90,
}  # fmt: skip


HEADER_BYTES = 4096  # most JPEGs' headers end within


def decode(data: bytes | memoryview, where: str) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP file, upright by its EXIF orientation; transparency is dropped.

    Returns uint8 RGB, (height, width, 3), writable.

    Raises:
        UserError: the bytes are no image, a broken one, or one of more than PIL's limit of 89 million pixels (268 MB
            here, and far more than a photograph in a data set has); `where` names the sample.
        MemoryError: the host has no memory for the pixels; the sample may be a good one.
    """
    pixels = _decode_jpeg(data)
    if pixels is not None and not _has_orientation(data):
        return pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on broken metadata, which don't concern the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Opening reads the header only, so too many pixels are refused before memory is taken for them.
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                if pixels is None:
                    pixels = _decode_any(image)
                turn = UPRIGHT.get(_orientation(image))
                return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))
    except Exception as error:  # PIL's readers raise almost anything on damaged files
        if is_out_of_memory(error):
            raise MemoryError(where) from None
        reason = "no image (JPEG, PNG or WebP)" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UserError(f"{where}: can't be decoded: {reason}; mend or remove the sample") from None


def _decode_jpeg(data: bytes | memoryview) -> np.ndarray | None:
    """PIL's very pixels, sooner. None for what PIL has to judge: other formats, damaged, huge or CMYK files."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > (Image.MAX_IMAGE_PIXELS or math.inf) or colours in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        if is_out_of_memory(error):
            raise MemoryError("an image") from None
        return None


def _has_orientation(jpeg: bytes | memoryview) -> bool:
    header = bytes(jpeg[:HEADER_BYTES])
    begin_of_scan = header.find(b"\xff\xda")
    header = header[:begin_of_scan] if begin_of_scan >= 0 else bytes(jpeg)
    return b"Exif\0\0" in header or b"tiff:Orientation" in header


def _decode_any(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip to white: keep the high byte
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # broken metadata don't make the pixels unusable
        return 1


def resize(image: np.ndarray, size: int, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Resizes `box` (left, top, right, bottom in pixels; default all) to a square, bicubic and antialiased.

    Torch's kernel for uint8 gives PIL's pixels up to rounding, several times sooner.

    Shapes: (height, width, 3) -> (size, size, 3), uint8.
    """
    if box is not None:
        left, top, right, bottom = box
        image = image[top:bottom, left:right]
    if image.shape[:2] == (size, size):
        return image
    # The view of the batch before the channels: only so the result has channels last too, and nothing is rearranged.
    batch = torch.from_numpy(np.require(image, requirements=("C", "W")))[None].permute(0, 3, 1, 2)  # (1, 3, H, W)
    return F.interpolate(batch, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
