"""Encoded image -> RGB pixels, and the resizing of them."""

import io
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
MAX_IMAGE_PIXELS = 89_478_485  # 268 MB as RGB; PIL warns from here on
MAX_JPEG_SCANS = 100  # a progressive JPEG has about ten; each scan is a pass over all pixels
MAX_JPEG_SEGMENTS = 64  # headers that are looked at before a JPEG's scans are counted instead
FORMATS = ("JPEG", "PNG", "WEBP")
Image.MAX_IMAGE_PIXELS = None  # `decode` has a limit of its own, which is an option


def decode(data: bytes | memoryview, where: str, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP file, upright by its EXIF orientation; transparency is dropped.

    Returns uint8 RGB, (height, width, 3), writable.

    Raises:
        UserError: the bytes are no image, a broken one, one of more than `max_pixels`, or a JPEG of too many scans. The
            header says so: no memory is taken for the pixels. `where` names the sample.
        MemoryError: the host has no memory for the pixels; the sample may be a good one.
    """
    if data[:2] == b"\xff\xd8" and not _has_one_scan(data):
        scans = bytes(data).count(b"\xff\xda")
        if scans > MAX_JPEG_SCANS:
            raise UserError(
                f"{where}: can't be decoded: a JPEG of {scans} scans, expected at most {MAX_JPEG_SCANS}; mend or remove"
                " the sample"
            )
    pixels = _decode_jpeg(data, max_pixels)
    if pixels is not None and not _has_orientation(data):
        return pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on broken metadata, which don't concern the pixels
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
                if image.width * image.height > max_pixels:
                    raise ValueError(
                        f"{image.width} x {image.height} pixels, expected at most {max_pixels} in all (set"
                        " data.read.max_image_pixels, or --max-image-pixels of shards, if the image is meant)"
                    )
                if pixels is None:
                    pixels = _decode_any(image)
                turn = UPRIGHT.get(_orientation(image))
                return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))
    except Exception as error:  # PIL's readers raise almost anything on damaged files
        if is_out_of_memory(error):
            raise MemoryError(where) from None
        reason = "no image (JPEG, PNG or WebP)" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UserError(f"{where}: can't be decoded: {reason}; mend or remove the sample") from None


def is_image(data: bytes | memoryview) -> bool:
    """Whether a file begins as a JPEG, PNG or WebP does."""
    start = bytes(data[:12])
    return start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def _has_one_scan(jpeg: bytes | memoryview) -> bool:
    """Whether libjpeg reads one scan only: the file is sequential, and its first scan has all colour components."""
    position, components = 2, 0
    try:
        for _ in range(MAX_JPEG_SEGMENTS):
            marker, kind = jpeg[position], jpeg[position + 1]
            if marker != 0xFF:
                return False
            if kind == 0xDA:
                return jpeg[position + 4] == components
            if kind in (0xC0, 0xC1):
                components = jpeg[position + 9]
            elif not (kind in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= kind <= 0xEF):  # tables, comments, applications' data
                return False
            position += 2 + (jpeg[position + 2] << 8 | jpeg[position + 3])
    except IndexError:
        pass
    return False


def _decode_jpeg(data: bytes | memoryview, max_pixels: int) -> np.ndarray | None:
    """PIL's very pixels, sooner. None for what PIL has to judge: other formats, damaged, huge or CMYK files."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > max_pixels or colours in ("CMYK", "YCCK"):
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
