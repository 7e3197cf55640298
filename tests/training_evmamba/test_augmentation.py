"""The augmentation of an image, with our operators and with timm. timm may be missing."""

import math
import pickle
import random
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from augmentation_cases import FILL, MEAN, PLAIN, RECIPE, STD, UnchangedGenerators, picture
from training_evmamba.augmentation import (
    OPERATIONS,
    RandAugment,
    TrainingTransform,
    random_crop_box,
)


def transformed(library, image: Image.Image, seed: int = 0, **changes) -> torch.Tensor:
    return library.transform(**(RECIPE | changes))(image, np.random.default_rng(seed))


def test_an_image_is_a_function_of_the_generator(library):
    image = picture()
    before = image.tobytes()
    np.random.standard_normal()  # which caches a second number
    with UnchangedGenerators():
        first, again, other = (transformed(library, image, seed, random_invert=0.5) for seed in (1, 1, 2))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    assert torch.equal(first, transformed(library, image, 1, random_invert=0.5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert image.tobytes() == before


def test_an_image_that_cannot_be_decoded_leaves_the_generators_alone(library):
    file = BytesIO()
    picture().save(file, "PNG")
    image = Image.open(BytesIO(file.getvalue()[:3000]))
    with UnchangedGenerators(), pytest.raises(OSError):
        transformed(library, image)


def test_it_travels_to_other_processes(library):
    transform = library.transform(**RECIPE | {"random_invert": 0.5})
    copy = pickle.loads(pickle.dumps(transform))
    for seed in range(10):
        expected = transform(picture(), np.random.default_rng(seed))
        assert torch.equal(copy(picture(), np.random.default_rng(seed)), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    image_size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    increasing=st.integers(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_images_of_any_shape(library, width, height, image_size, increasing, seed):
    image = picture(width, height)
    options = {"rand_augment": f"rand-m9-mstd5-n4-p1-inc{increasing}", "random_invert": 0.5}
    pixel_values = transformed(library, image, seed, image_size=image_size, random_erasing=0.0, **options)
    assert pixel_values.shape == (3, *image_size)
    assert pixel_values.dtype == torch.float32 and pixel_values.is_contiguous()
    pixels = pixel_values * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    assert transformed(library, image, seed, image_size=image_size, random_erasing=1.0, **options).isfinite().all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
    seed=st.integers(0, 2**32 - 1),
)
def test_crops_lie_within_the_image(width, height, scale, ratio, seed):
    left, top, right, bottom = random_crop_box(width, height, scale, ratio, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_crops_are_spread_over_area_ratio_and_place():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(3000, 3000, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    area, log_ratio = width * height / 3000**2, np.log(width / height)
    assert 0.079 < area.min() < 0.09 and 0.9 < area.max() <= 1
    assert abs(log_ratio).max() < math.log(4 / 3) + 1e-3
    # the median of a uniform distribution, except for large crops whose ratio does not fit
    assert 0.45 < np.median(area) < 0.54
    assert abs(np.median(log_ratio)) < 0.02
    for begin, side in ((left, width), (top, height)):
        inner = side < 2900
        assert abs(np.mean(begin[inner] / (3000 - side[inner])) - 0.5) < 0.02


@pytest.mark.parametrize(
    "size, box",
    [
        ((1000, 10), (493, 0, 506, 10)),
        ((10, 1000), (0, 493, 10, 506)),
        ((1, 1), (0, 0, 1, 1)),
        ((1, 50), (0, 24, 1, 25)),
    ],
    ids=str,
)
def test_where_no_random_crop_fits_it_is_central(size, box):
    assert random_crop_box(*size, (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == box


def test_crops_do_not_see_what_is_around_them(library):
    """The filter that resizes the crop ends at its border."""
    pixels = np.zeros((40, 120, 3), dtype="uint8")
    pixels[:, 40:80] = 255  # white exactly inside the central crop
    options = {**PLAIN, "image_size": (16, 16)}
    assert transformed(library, Image.fromarray(pixels), **options).min() == 1


def test_one_pixel(library):
    color = (10, 200, 255)
    pixel_values = transformed(library, Image.new("RGB", (1, 1), color), **PLAIN)
    assert torch.equal(pixel_values, torch.tensor(color).div(255)[:, None, None].expand(3, 224, 224))


def test_flips_and_negatives_are_as_frequent_as_asked(library):
    image = picture(8, 8)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (C, H, W)
    kinds = {
        "same": pixels,
        "flip": pixels.flip(2),
        "negative": 255 - pixels,
        "flipped negative": 255 - pixels.flip(2),
    }
    transform = library.transform(**PLAIN | {"image_size": (8, 8), "horizontal_flip": 0.3, "random_invert": 0.8})
    rng, counts = np.random.default_rng(0), dict.fromkeys(kinds, 0)
    for _ in range(2000):
        result = transform(image, rng).mul(255).round()
        (kind,) = [name for name, expected in kinds.items() if torch.equal(result, expected.float())]
        counts[kind] += 1
    expected = {"same": 0.7 * 0.2, "flip": 0.3 * 0.2, "negative": 0.7 * 0.8, "flipped negative": 0.3 * 0.8}
    for kind, share in expected.items():
        assert abs(counts[kind] / 2000 - share) < 4 * math.sqrt(share * (1 - share) / 2000)


def test_operations_follow_on_the_negative(library):
    """Inversion precedes RandAugment, since the order changes the result."""
    image = picture(40, 30)
    options = PLAIN | {"image_size": (30, 40), "crop_ratio": (4 / 3, 4 / 3), "rand_augment": "rand-m7-n3-p1"}
    always, never = (library.transform(**options | {"random_invert": probability}) for probability in (1.0, 0.0))
    for seed in range(20):
        negative = never(ImageOps.invert(image), np.random.default_rng(seed))
        assert torch.equal(always(image, np.random.default_rng(seed)), negative)


def test_erased_rectangles(library):
    image = Image.new("RGB", (64, 64))
    transform = library.transform(**PLAIN | {"image_size": (100, 80), "random_erasing": 0.25})
    rng = np.random.default_rng(0)
    areas, noise = [], []
    for _ in range(2000):
        pixel_values = transform(image, rng)
        rows, columns = pixel_values.any(dim=0).nonzero().unbind(1)
        if len(rows):
            height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
            assert len(rows) == height * width
            assert 0.27 < height / width < 1 / 0.27  # whole pixels
            areas.append(height * width / (100 * 80))
            noise.append(pixel_values[:, rows, columns].flatten())
    assert abs(len(areas) / 2000 - 0.25) < 0.04
    assert 0.018 < min(areas) < 0.03 and 0.3 < max(areas) < 0.34
    noise = torch.cat(noise)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_what_is_moved_in_has_the_mean_color():
    apply, _ = OPERATIONS["TranslateX"]
    moved = np.asarray(apply(Image.new("RGB", (100, 10), "white"), 1.0, FILL))
    assert (moved[:, 56:] == FILL).all() and (moved[:, :54] == 255).all()
    transform = TrainingTransform(**RECIPE)
    assert transform.fill == FILL


def test_operations_are_as_frequent_as_asked():
    image = picture(16, 16)
    rng = np.random.default_rng(0)
    never, half, always = (RandAugment.parse(f"rand-m9-n1-p{p}") for p in ("0", "0.5", "1"))
    assert all(never(image, FILL, rng).tobytes() == image.tobytes() for _ in range(100))
    results = [always(image, FILL, rng).tobytes() for _ in range(3000)]
    # ten unsigned operations, and five signed ones
    operations = {
        apply(image, sign * 0.9, FILL).tobytes(): 1 / len(OPERATIONS) / (1 + signed)
        for apply, signed in OPERATIONS.values()
        for sign in ([1, -1] if signed else [1])
    }
    assert set(results) == set(operations) and len(operations) == 20
    for result, share in operations.items():
        assert abs(results.count(result) / 3000 - share) < 4 * math.sqrt(share * (1 - share) / 3000)
    unchanged = sum(half(image, FILL, rng).tobytes() == image.tobytes() for _ in range(3000))
    assert abs(unchanged / 3000 - 0.5) < 0.04


def test_notation():
    assert RandAugment.parse("rand") == RandAugment(10, 0, 2, 0.5, 0)
    assert RandAugment.parse("rand-m9-mstd0.5") == RandAugment(9, 0.5, 2, 0.5, 0)
    assert RandAugment.parse("rand-inc1-n3-p0.25-mstd1-m0") == RandAugment(0, 1, 3, 0.25, 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rand-",
        "rand-m",
        "rand-m11",
        "rand-m-1",
        "rand-m9.5",
        "rand-m9-m9",
        "rand-n0",
        "rand-p1.5",
        "rand-mstd100",
        "rand-inc2",
        "rand-tweights",
        "rand-mmax15",
        "rand-m9 ",
        "rand-m٣",
        "augmix-m5",
        "original-mstd0.5",
    ],
)
def test_other_notations_are_refused(library, text):
    with pytest.raises(ValueError, match=r"is invalid: give 'rand' and") as error:
        library.transform(**RECIPE | {"rand_augment": text})
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("image_size", (0, 224)),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 0.1)),
        ("crop_scale", (0.5, 1.5)),
        ("crop_scale", (math.nan, 1.0)),
        ("crop_ratio", (0.0, 1.0)),
        ("crop_ratio", (2.0, 1.0)),
        ("crop_ratio", (1.0, math.inf)),
        ("horizontal_flip", -0.1),
        ("random_invert", 1.1),
        ("random_erasing", math.nan),
        ("image_mean", [0.5]),
        ("image_mean", [124, 116, 104]),
        ("image_std", [0.2, 0.2, 0.0]),
    ],
)
def test_values_out_of_range_are_refused(library, name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*: give "):
        library.transform(**RECIPE | {name: value})


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_other_modes_are_refused(library, mode):
    with pytest.raises(ValueError, match=f"mode {mode}: convert it to RGB"):
        transformed(library, Image.new(mode, (4, 4)))
