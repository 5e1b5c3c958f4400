"""Decoding gives PIL's pixels for every kind of file, refuses broken and huge ones, and says nothing on stderr."""

import io
import re
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from pipeline.data.augment import center_crop, flip, inception_crop
from pipeline.data.decode import decode, resize
from pipeline.errors import UserError

sklearn_datasets = pytest.importorskip("sklearn.datasets")
PHOTOGRAPHS = sklearn_datasets.load_sample_images().images  # china, flower: (427, 640, 3)
PHOTOGRAPH = Image.fromarray(PHOTOGRAPHS[0]).resize((151, 101))  # odd sides: partial blocks in a JPEG


def encode(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def with_orientation(number):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    return exif.tobytes()


def translucent():
    image = PHOTOGRAPH.convert("RGBA")
    image.putalpha(PHOTOGRAPH.convert("L"))
    return image


def ycck():
    """Four channels whose marker says YCCK instead of CMYK: what Adobe's tools write."""
    data = encode(PHOTOGRAPH.convert("CMYK"), "JPEG", quality=95)
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    return data[:place] + b"\x02" + data[place + 1 :]


FILES = {
    "jpeg 4:4:4": encode(PHOTOGRAPH, "JPEG", quality=95, subsampling=0),
    "jpeg 4:2:2": encode(PHOTOGRAPH, "JPEG", quality=90, subsampling=1),
    "jpeg 4:2:0": encode(PHOTOGRAPH, "JPEG", quality=75, subsampling=2),
    "jpeg progressive": encode(PHOTOGRAPH, "JPEG", progressive=True),
    "jpeg grey": encode(PHOTOGRAPH.convert("L"), "JPEG"),
    "jpeg cmyk": encode(PHOTOGRAPH.convert("CMYK"), "JPEG"),
    "jpeg ycck": ycck(),
    "jpeg of two pictures": encode(PHOTOGRAPH, "MPO", save_all=True, append_images=[PHOTOGRAPH.convert("L")]),
    "jpeg with bytes after its end": encode(PHOTOGRAPH, "JPEG") + b"more",
    "png": encode(PHOTOGRAPH, "PNG"),
    "png grey": encode(PHOTOGRAPH.convert("L"), "PNG"),
    "png black and white": encode(PHOTOGRAPH.convert("1"), "PNG"),
    "png palette": encode(PHOTOGRAPH.quantize(64), "PNG"),
    "png palette, one colour transparent": encode(PHOTOGRAPH.quantize(64), "PNG", transparency=3),
    "png palette, many transparent": encode(PHOTOGRAPH.quantize(64), "PNG", transparency=bytes(range(64))),
    "png rgba": encode(translucent(), "PNG"),
    "png grey with alpha": encode(translucent().convert("LA"), "PNG"),
    "png one colour transparent": encode(PHOTOGRAPH, "PNG", transparency=(0, 0, 0)),
    "webp": encode(PHOTOGRAPH, "WEBP", quality=90),
    "webp lossless": encode(PHOTOGRAPH, "WEBP", lossless=True),
    "webp rgba": encode(translucent(), "WEBP", lossless=True),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # PIL's, of the reference
@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_those_of_pil(kind, capfd):
    data = bytearray(FILES[kind])
    pixels = decode(bytes(data), "x")
    expected = np.asarray(Image.open(io.BytesIO(FILES[kind])).convert("RGB"))
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert data == FILES[kind]
    # No tolerance: the same libjpeg, DCT and chroma filter are asked for.
    np.testing.assert_array_equal(pixels, expected)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))  # 1 to 8 are defined
def test_photographs_come_upright(form, orientation):
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(PHOTOGRAPH, form, exif=with_orientation(orientation), **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decode(data, "x"), np.asarray(expected))


def test_the_orientation_of_a_jpeg_may_stand_in_its_xmp():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(PHOTOGRAPH, "JPEG", xmp=xmp)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected.size == (101, 151)
    np.testing.assert_array_equal(decode(data, "x"), np.asarray(expected))


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_broken_metadata_do_not_lose_the_photograph_nor_warn(form, capfd):
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.XResolution] = "a camera", 72.0
    content = exif.tobytes()
    whole = encode(PHOTOGRAPH, form, exif=content)
    begin = whole.index(content.removeprefix(b"Exif\0\0"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for place in range(begin, begin + len(content) - 6):
            data = bytearray(whole)
            data[place] ^= 0xFF
            assert decode(bytes(data), "x").size == 151 * 101 * 3
    assert warned == []
    assert capfd.readouterr().err == ""


def png(width, height, bits, colour, rows):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_sixteen_bits_keep_the_high_byte(colour, channels):
    values = np.linspace(0, 65535, 40 * 30 * channels).astype(">u2").reshape(30, 40, channels)
    data = png(40, 30, 16, colour, b"".join(b"\0" + row.tobytes() for row in values))
    expected = np.broadcast_to(values.astype(np.uint16) >> 8, (30, 40, 3))
    np.testing.assert_array_equal(decode(data, "x"), expected)


def jpeg_that_claims(width, height):
    data = bytearray(FILES["jpeg 4:2:0"])
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_that_claims(width, height):
    data = bytearray(FILES["webp lossless"])
    place = data.index(b"VP8L") + 9
    data[place : place + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


def test_bombs_are_refused_before_they_take_memory(tmp_path):
    # 9,500 x 9,500 is just above the limit, where PIL alone only warns; 16,000 is about all that WebP can say.
    makers = {"jpeg": jpeg_that_claims, "png": lambda w, h: png(w, h, 8, 2, bytes(100)), "webp": webp_that_claims}
    sides = {"jpeg": (9_500, 60_000), "png": (9_500, 60_000), "webp": (9_500, 16_000)}
    paths = [tmp_path / f"{form}-{side}" for form in makers for side in sides[form]]
    for path in paths:
        form, _, side = path.name.partition("-")
        path.write_bytes(makers[form](int(side), int(side)))
    # In a process of its own, whose peak of memory is its own.
    script = """
import resource, sys
from pipeline.data.decode import decode
for path in sys.argv[1:]:
    data = open(path, "rb").read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode(data, path)
    except ValueError as error:
        print(error)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    for path, message, grown_mib in zip(paths, lines[::2], lines[1::2], strict=True):
        expected = (
            rf"{path}: can't be decoded: \d+ x \d+ pixels, expected at most 89478485 in all .*; mend or remove .*"
        )
        assert re.fullmatch(expected, message)
        assert int(grown_mib) < 32


@pytest.mark.parametrize("kind", ["jpeg 4:2:0", "jpeg progressive", "jpeg grey", "jpeg cmyk", "png", "webp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_is_an_error(kind, share, capfd):
    data = FILES[kind][: int(len(FILES[kind]) * share)]
    with pytest.raises(UserError, match=r"^shard.tar: sample 7: can't be decoded: .+; mend or remove the sample$"):
        decode(data, "shard.tar: sample 7")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "data",
    [b"", b"a text", b"<html>" * 100, b"\xff\xd8\xff", encode(PHOTOGRAPH, "GIF"), encode(PHOTOGRAPH, "TIFF")],
    ids=["empty", "text", "html", "three bytes", "gif", "tiff"],
)
def test_what_is_no_jpeg_png_or_webp_is_an_error(data, capfd):
    with pytest.raises(UserError, match=r"^x: can't be decoded: no image \(JPEG, PNG or WebP\); mend or remove"):
        decode(data, "x")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["jpeg 4:2:0", "jpeg progressive", "png", "webp"])
def test_flipped_bytes_are_judged_as_pil_judges_them(kind, capfd):
    rng = np.random.default_rng(0)
    verdicts = set()
    for _ in range(60):
        data = bytearray(FILES[kind])
        data[rng.integers(len(data))] ^= rng.integers(1, 256)
        try:
            expected = np.asarray(Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")).convert("RGB"))
        except (OSError, SyntaxError, ValueError):
            expected = None
        try:
            np.testing.assert_array_equal(decode(bytes(data), "x"), expected)
        except UserError:
            assert expected is None
        verdicts.add(expected is None)
    assert False in verdicts or kind == "png", "PNG has checksums; the others bear some"
    assert capfd.readouterr().err == ""


def crops(count):
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = rng.integers(60, 427), rng.integers(60, 640)
        top, left = rng.integers(0, 428 - height), rng.integers(0, 641 - width)
        yield PHOTOGRAPHS[number % 2], tuple(int(side) for side in (left, top, left + width, top + height))


@pytest.mark.parametrize("size", [32, 224, 384])
def test_resizing_is_pils_antialiased_bicubic(size):
    means, worst = [], 0
    for image, box in crops(30):
        resized = resize(image, size, box)
        expected = np.asarray(Image.fromarray(image).crop(box).resize((size, size), Image.Resampling.BICUBIC))
        assert resized.shape == (size, size, 3)
        assert resized.flags.c_contiguous, "or every later step is several times slower"
        difference = np.abs(resized.astype(int) - expected)
        means.append(difference.mean())
        worst = max(worst, difference.max())
    assert max(means) < 0.5, "of 255; the mean of each crop"
    assert worst <= 16


def test_an_image_of_the_right_size_is_left_alone():
    image = PHOTOGRAPHS[0][:224, :224]
    assert resize(image, 224) is image
    np.testing.assert_array_equal(resize(PHOTOGRAPHS[0], 200, (7, 5, 207, 205)), PHOTOGRAPHS[0][5:205, 7:207])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 4000)])
def test_extreme_shapes_are_cropped_and_resized(shape):
    image = np.full((*shape, 3), 93, np.uint8)
    for policy in (inception_crop.Config(), center_crop.Config(), center_crop.Config(share=0.1)):
        np.testing.assert_array_equal(policy(image, 32, np.random.default_rng(0)), np.full((32, 32, 3), 93))


def test_the_centre_crop_takes_the_centre():
    expected = Image.fromarray(PHOTOGRAPHS[0]).crop((133, 26, 507, 400)).resize((224, 224), Image.Resampling.BICUBIC)
    cropped = center_crop.Config()(PHOTOGRAPHS[0], 224, np.random.default_rng(0))  # 374 of 427 rows
    assert np.abs(cropped.astype(int) - np.asarray(expected)).max() <= 2


def test_a_flip_mirrors_about_half_of_the_images():
    image, rng = PHOTOGRAPHS[0][:30, :40], np.random.default_rng(0)
    flipped = [flip.Config()(image, 32, rng) for _ in range(200)]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in flipped)
    assert mirrored + sum(np.array_equal(result, image) for result in flipped) == 200
    assert 70 < mirrored < 130
    np.testing.assert_array_equal(flip.Config(rate=1.0)(image[::-1, ::-1], 32, rng), image[::-1])
