"""Augmentation: Pillow's numbers, the published strengths, the distributions, and keys that decide everything."""

from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pipeline.data import pixels
from pipeline.data.augment import color_jitter, rand_augment, random_erasing, resize, shift, three_augment
from pipeline.data.index import load_index
from pipeline.data.loader import DataConfig, Loader, train_stream
from pipeline.runtime import Ranks

SHAPES = [(1, 1), (1, 7), (2, 2), (5, 3), (33, 47), (64, 64)]
FILL = (124, 116, 104)
AFFINE = Image.Transform.AFFINE


def rng(*key):
    return np.random.default_rng(key)


def picture(height, width, key=0):
    """Smooth colours with a little noise, as photographs have them."""
    coarse = rng(key).integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (smooth + rng(key, 1).normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


def images():
    for key, shape in enumerate(SHAPES):
        yield rng(key).integers(0, 256, (*shape, 3), dtype=np.uint8)
        yield picture(*shape, key)
        yield rng(key).integers(90, 97, (*shape, 3), dtype=np.uint8)
        yield np.full((*shape, 3), 37 * key % 256, np.uint8)
        yield np.repeat(rng(key).integers(0, 256, (*shape, 1), dtype=np.uint8), 3, axis=2)


def enhanced(kind):
    return lambda image, factor: getattr(ImageEnhance, kind)(image).enhance(factor)


def added(image, addition):
    return image.point([min(level + addition, 255) if level < 128 else level for level in range(256)] * 3)


FACTORS = [0.0, 0.1, 0.37, 0.7, 1.0, 1.3, 1.9, 2.8]
PILLOWS = {
    "autocontrast": (ImageOps.autocontrast, [()]),
    "equalize": (ImageOps.equalize, [()]),
    "invert": (ImageOps.invert, [()]),
    "posterize": (ImageOps.posterize, [(bits,) for bits in range(1, 9)]),
    "solarize": (ImageOps.solarize, [(), *((threshold,) for threshold in (0, 1, 25, 128, 255, 256))]),
    "solarize_add": (added, [(0,), (44,), (99,), (165,)]),
    "brightness": (enhanced("Brightness"), [(factor,) for factor in FACTORS]),
    "contrast": (enhanced("Contrast"), [(factor,) for factor in FACTORS]),
    "color": (enhanced("Color"), [(factor,) for factor in FACTORS]),
    "sharpness": (enhanced("Sharpness"), [(factor,) for factor in FACTORS]),
    "grayscale": (lambda image: image.convert("L").convert("RGB"), [()]),
}


@pytest.mark.parametrize("name", PILLOWS)
def test_operations_are_those_of_pillow_bit_for_bit(name):
    theirs, arguments = PILLOWS[name]
    for image in images():
        for given in arguments:
            np.testing.assert_array_equal(
                getattr(pixels, name)(image, *given), theirs(Image.fromarray(image), *given), f"{image.shape} {given}"
            )


def warps():
    """Ours and Pillow's, at the strengths of magnitude 9."""
    for sign in (-1, 1):
        yield (lambda i, m, s=sign: pixels.rotate(i, s * 27, FILL, m),
               lambda i, m, s=sign: i.rotate(s * 27, m, fillcolor=FILL))  # fmt: skip
        for matrix in ((1, sign * 0.27, 0, 0, 1, 0), (1, 0, 0, sign * 0.27, 1, 0),
                       (1, 0, sign * 38.9, 0, 1, 0), (1, 0, 0, 0, 1, sign * 38.9)):  # fmt: skip
            yield (lambda i, m, a=matrix: pixels.affine(i, a, FILL, m),
                   lambda i, m, a=matrix: i.transform(i.size, AFFINE, a, m, fillcolor=FILL))  # fmt: skip


def test_nearest_warps_differ_from_pillow_in_less_than_one_pixel_of_a_hundred():
    image = picture(96, 80)
    for ours, theirs in warps():
        expected = np.asarray(theirs(Image.fromarray(image), Image.Resampling.NEAREST))
        assert (ours(image, pixels.NEAREST) != expected).any(2).mean() < 0.01


def test_cubic_warps_are_within_one_level_of_pillow_on_average():
    image = picture(96, 80)
    for ours, theirs in warps():
        expected = np.asarray(theirs(Image.fromarray(image), Image.Resampling.BICUBIC)).astype(int)
        difference = np.abs(ours(image, pixels.CUBIC) - expected).max(2)
        # Pillow doesn't blend the image's edge with the fill.
        assert np.median(difference) <= 1
        assert (difference > 8).mean() < 0.04
        assert np.minimum(difference, 8).mean() < 1.5


def test_blur_is_within_one_level_of_pillow_on_average_and_four_at_most():
    image = picture(64, 48)
    for radius in (0.1, 0.4, 1.0, 1.7, 2.0):
        expected = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
        difference = np.abs(pixels.gaussian_blur(image, radius).astype(int) - expected)
        assert difference.mean() < 1
        assert difference.max() <= 4


IMAGE = picture(224, 224)
PIL_IMAGE = Image.fromarray(IMAGE)
DEIT = rand_augment.Config(
    flavour="timm", magnitude=9.0, magnitude_std=0.5, increasing=True, probability=0.5
)  # fmt: skip
TIMM = rand_augment.Config(flavour="timm", magnitude=9.0)
TF = rand_augment.Config()


# Worked out by hand from the tables of the published code; a tuple holds the results of both signs.
@pytest.mark.parametrize(
    ("config", "name", "level", "expected"),
    [
        (DEIT, "Posterize", 0.9, ImageOps.posterize(PIL_IMAGE, 1)),
        (DEIT, "Posterize", 1.0, Image.new("RGB", (224, 224))),
        (DEIT, "Solarize", 0.9, ImageOps.solarize(PIL_IMAGE, 26)),
        (DEIT, "SolarizeAdd", 0.9, added(PIL_IMAGE, 99)),
        (DEIT, "Color", 0.9, tuple(ImageEnhance.Color(PIL_IMAGE).enhance(f) for f in (0.19, 1.81))),
        (DEIT, "Sharpness", 1.0, tuple(ImageEnhance.Sharpness(PIL_IMAGE).enhance(f) for f in (0.1, 1.9))),
        (DEIT, "Contrast", 0.9, tuple(ImageEnhance.Contrast(PIL_IMAGE).enhance(f) for f in (0.19, 1.81))),
        (TIMM, "Posterize", 0.9, ImageOps.posterize(PIL_IMAGE, 3)),
        (TIMM, "Solarize", 0.9, ImageOps.solarize(PIL_IMAGE, 230)),
        (TIMM, "Brightness", 0.9, ImageEnhance.Brightness(PIL_IMAGE).enhance(1.72)),
        (TIMM, "Contrast", 0.5, ImageEnhance.Contrast(PIL_IMAGE).enhance(1.0)),
        (TF, "Posterize", 1.0, ImageOps.posterize(PIL_IMAGE, 4)),
        (TF, "Posterize", 1.5, ImageOps.posterize(PIL_IMAGE, 6)),
        (TF, "Solarize", 1.0, ImageOps.invert(PIL_IMAGE)),
        (TF, "Solarize", 1.5, ImageOps.solarize(PIL_IMAGE, 128)),
        (TF, "SolarizeAdd", 1.5, added(PIL_IMAGE, 165)),
        (TF, "Contrast", 1.0, Image.blend(Image.new("RGB", (224, 224), (196,) * 3), PIL_IMAGE, 1.9)),
        (TF, "Color", 1.5, ImageEnhance.Color(PIL_IMAGE).enhance(2.8)),
        (TF, "TranslateX", 1.0, tuple(
            PIL_IMAGE.transform((224, 224), AFFINE, (1, 0, t, 0, 1, 0), fillcolor=(128,) * 3)
            for t in (-100, 100))),
        (TF, "TranslateY", 1.5, tuple(
            PIL_IMAGE.transform((224, 224), AFFINE, (1, 0, 0, 0, 1, t), fillcolor=(128,) * 3)
            for t in (-150, 150))),
    ],
)  # fmt: skip
def test_strengths_are_the_published_ones(config, name, level, expected):
    wanted = {np.asarray(image).tobytes() for image in (expected if isinstance(expected, tuple) else (expected,))}
    found = {config.apply(name, IMAGE, level, rng(key)).tobytes() for key in range(16)}
    assert found == wanted


def test_warps_of_timm_scale_with_the_image_and_end_at_its_colour():
    image = np.full((40, 100, 3), 250, np.uint8)
    for key in range(4):
        moved = TIMM.apply("TranslateX", image, 1.0, rng(key))
        assert 44 <= (moved[20] == FILL).all(1).sum() <= 46
        assert 17 <= (TIMM.apply("TranslateY", image, 1.0, rng(key))[:, 50] == FILL).all(1).sum() <= 19
        sheared = TIMM.apply("ShearX", image, 1.0, rng(key))
        assert 10 <= max((sheared[0] == FILL).all(1).sum(), (sheared[-1] == FILL).all(1).sum()) <= 12


def test_cutout_greys_a_square_of_eighty_pixels_around_any_pixel():
    image = np.zeros((224, 224, 3), np.uint8)
    areas = [(TF.apply("Cutout", image, 1.0, rng(key)) == 128).all(2).sum() for key in range(200)]
    assert max(areas) == 80 * 80
    assert min(areas) < 80 * 50, "squares at the border are cut"
    assert not image.any(), "the input was changed"


class Recorder(rand_augment.Config):
    """Notes the operations instead of applying them."""

    seen: list = []  # noqa: RUF012

    def apply(self, name, image, level, rng):
        self.seen.append((name, level))
        return image


@pytest.mark.parametrize(("flavour", "count"), [("tf", 16), ("timm", 15)])
def test_operations_are_drawn_uniformly_and_magnitudes_normally(flavour, count):
    Recorder.seen = []
    config = Recorder(flavour=flavour, magnitude=5.0, magnitude_std=0.5, probability=0.5)
    draws, generator = 8000, rng(0)
    for _ in range(draws):
        config(np.zeros((1, 1, 3), np.uint8), 1, generator)
    levels = np.array([level for _, level in Recorder.seen])
    counts = Counter(name for name, _ in Recorder.seen)
    expected = draws / count  # two operations an image, each with probability one half
    assert len(counts) == count
    assert abs(len(levels) / draws - 1.0) < 0.03
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 40  # chi-squared, p about 1e-3
    assert levels.mean() == pytest.approx(0.5, abs=0.003)
    assert levels.std() == pytest.approx(0.05, rel=0.05)


def test_the_scale_of_timm_ends_at_ten_and_that_of_tf_does_not():
    high = rand_augment.Config(flavour="timm", magnitude=9.9, magnitude_std=2.0)
    assert max(high.draw_level(rng(key)) for key in range(100)) == 1.0
    assert rand_augment.Config(magnitude=15.0).draw_level(rng(0)) == 1.5
    assert min(rand_augment.Config(magnitude=0.1, magnitude_std=2.0).draw_level(rng(key)) for key in range(100)) == 0.0


POLICIES = {
    "tf": TF,
    "tf 15": rand_augment.Config(magnitude=15.0),
    "deit": DEIT,
    "three_augment": three_augment.Config(),
    "color_jitter": color_jitter.Config(),
    "random_erasing": random_erasing.Config(probability=1.0),
    "random_erasing constant": random_erasing.Config(probability=1.0, pixels="constant"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_keep_shape_and_type_and_leave_their_input_alone(name):
    for key, image in enumerate(images()):
        mirrored = image[:, ::-1]
        before = mirrored.copy()
        for draw in range(8):
            result = POLICIES[name](mirrored, 64, rng(key, draw))
            assert (result.shape, result.dtype) == (image.shape, np.uint8)
        np.testing.assert_array_equal(mirrored, before)


@pytest.mark.parametrize("name", POLICIES)
def test_the_key_alone_decides(name):
    image = picture(48, 48)
    first = [POLICIES[name](image, 48, rng(key)).tobytes() for key in range(20)]
    again = [POLICIES[name](image, 48, rng(key)).tobytes() for key in range(20)]
    assert first == again
    assert len(set(first)) > 2


def test_every_operation_can_be_applied():
    for config in (TF, TIMM):
        for name in rand_augment.OPERATIONS[config.flavour]:
            assert (config.apply(name, IMAGE // 2 + 40, 0.6, rng(1)) != IMAGE // 2 + 40).any(), name


def test_three_augment_draws_each_of_its_three():
    grey, solarized = PIL_IMAGE.convert("L").convert("RGB").tobytes(), ImageOps.solarize(PIL_IMAGE).tobytes()
    names = {grey: "grey", solarized: "solarized"}
    counts = Counter(names.get(three_augment.Config()(IMAGE, 224, rng(k)).tobytes(), "blurred") for k in range(600))
    assert len(counts) == 3
    assert all(abs(count - 200) < 50 for count in counts.values()), counts


def test_color_jitter_draws_factors_evenly_and_changes_what_is_asked():
    flat = np.full((4, 4, 3), 100, np.uint8)
    only = color_jitter.Config(brightness=0.4, contrast=0.0, saturation=0.0)
    levels = np.array([only(flat, 4, rng(key))[0, 0, 0] for key in range(2000)])
    assert (levels.min(), levels.max()) == (60, 139)
    assert levels.mean() == pytest.approx(99.5, abs=2)
    nothing = color_jitter.Config(brightness=0.0, contrast=0.0, saturation=0.0)
    np.testing.assert_array_equal(nothing(IMAGE, 224, rng(0)), IMAGE)


def test_color_jitter_changes_as_pillow_does_in_any_order():
    orders = set()
    for key in range(24):
        generator, expected = rng(key), PIL_IMAGE
        order = generator.permutation(3).tolist()
        for number in order:
            kind, factor = ("Brightness", "Contrast", "Color")[number], generator.uniform(0.7, 1.3)
            expected = enhanced(kind)(expected, factor)
        np.testing.assert_array_equal(color_jitter.Config()(IMAGE, 224, rng(key)), expected)
        orders.add(tuple(order))
    assert len(orders) == 6


def test_random_erasing_has_its_rate_areas_and_noise():
    image = np.zeros((60, 80, 3), np.uint8)
    config = random_erasing.Config()
    erased = [config(image, 0, rng(key)) for key in range(2000)]
    touched = [(e != 0).any(2) for e in erased if (e != 0).any()]
    assert len(touched) / 2000 == pytest.approx(0.25, abs=0.03)
    for mask in touched:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert 0.015 <= height * width / 4800 <= 0.36  # sides are rounded to pixels
        assert 0.24 < height / width < 4.2
    values = np.concatenate([e[mask] for e, mask in zip([e for e in erased if e.any()], touched, strict=True)])
    np.testing.assert_allclose(values.mean(0), random_erasing.MEAN, atol=2)
    np.testing.assert_allclose(values.std(0), random_erasing.DEVIATION, rtol=0.06)  # clipped at 0 and 255
    constant = random_erasing.Config(probability=1.0, pixels="constant")(image, 0, rng(1))
    assert set(map(tuple, constant.reshape(-1, 3).tolist())) == {(0, 0, 0), FILL}


def test_augmented_batches_do_not_depend_on_workers(digits):
    pixels.rotate(picture(600, 600), 20, FILL, pixels.CUBIC)  # a use of OpenCV before the workers are forked
    config = DataConfig(train=(f"{digits}/train-{{000..003}}.tar",), global_batch_size=24)
    policies = (resize.Config(), *POLICIES.values())
    found = []
    for workers in (0, 2):
        stream = train_stream(config, load_index(config.train), policies, 32, 10, 0, Ranks(0, 1, 0, 1), 0)
        loader = Loader(stream, workers, torch.device("cpu"))
        found.append(next(iter(loader)).images)
        loader.close()
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (rand_augment, {"ops": -1}, "ops: must not be negative"),
        (rand_augment, {"ops": 10**12}, "ops: must be at most 100"),
        (shift, {"pixels": -1}, "pixels: expected 0 to 1024"),
        (shift, {"pixels": 10**6}, "pixels: expected 0 to 1024"),
        (three_augment, {"max_radius": 1e6}, "min_radius: expected 0 < min_radius <= max_radius <= 100"),
        (rand_augment, {"flavour": "timm", "magnitude": 15.0}, "magnitude: expected 0 to 10"),
        (rand_augment, {"increasing": True}, "increasing: only flavour timm"),
        (three_augment, {"min_radius": 0.0}, "min_radius: expected 0 <"),
        (color_jitter, {"contrast": -0.1}, "contrast: must not be negative"),
        (random_erasing, {"max_area": 0.01}, "min_area: expected 0 <"),
        (random_erasing, {"max_aspect": 0.3}, "max_aspect: must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_named(module, options, message):
    with pytest.raises(ValueError, match=message):
        module.Config(**options)
