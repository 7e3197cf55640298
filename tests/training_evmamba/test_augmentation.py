"""Augmentation by our operators and by timm: what must hold for both, and that they agree. timm may be missing."""

import math
import pickle
import random
from functools import partial
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from training_evmamba.augmentation import (
    INCREASING_OPERATIONS,
    OPERATIONS,
    Mixing,
    RandAugment,
    TrainingTransform,
    random_crop_box,
)


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FILL = (124, 116, 104)
RECIPE = {
    "image_size": (224, 224),
    "crop_scale": (0.08, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "horizontal_flip": 0.5,
    "random_invert": 0.0,
    "rand_augment": "rand-m9-mstd0.5",
    "random_erasing": 0.25,
    "image_mean": MEAN,
    "image_std": STD,
}
# the picture itself, scaled to [0, 1]
PLAIN = RECIPE | {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "horizontal_flip": 0.0,
    "rand_augment": None,
    "random_erasing": 0.0,
    "image_mean": [0.0] * 3,
    "image_std": [1.0] * 3,
}
MIXING = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1, "num_labels": 10}


def picture(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    """Colors that change slowly, and noise: every operation alters it."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    across = np.linspace(0, 150, width)[None, :, None] * np.array([1, 0.6, 0.3])
    down = np.linspace(40, 0, height)[:, None, None]
    return Image.fromarray((noise + across + down).astype("uint8"))


def import_timm():
    """Skips the test where timm cannot be imported; a torchvision that does not fit raises more than ImportError."""
    return pytest.importorskip("timm.data", exc_type=Exception)


@pytest.fixture(params=["pillow", "timm"], scope="module")
def library(request) -> SimpleNamespace:
    """The two classes of a library: `transform` and `mixing`."""
    if request.param == "pillow":
        return SimpleNamespace(name="pillow", transform=TrainingTransform, mixing=Mixing)
    import_timm()
    from training_evmamba.augmentation_timm import TimmMixing, TimmTransform

    return SimpleNamespace(name="timm", transform=TimmTransform, mixing=TimmMixing)


@pytest.fixture
def timm(monkeypatch):
    """timm.data, which needs torchvision, too."""
    data = import_timm()
    # timm relies on what Pillow up to version 12 does where no bit is kept: the image becomes black
    posterize = ImageOps.posterize
    monkeypatch.setattr(
        ImageOps,
        "posterize",
        lambda image, bits: posterize(image, bits) if bits else Image.new(image.mode, image.size),
    )
    return data


@pytest.fixture
def shared_draws(monkeypatch, timm):
    """Makes timm draw from a generator of numpy, in place of the global ones of Python, numpy and PyTorch."""

    def share(rng: np.random.Generator) -> None:
        monkeypatch.setattr(random, "random", rng.random)
        monkeypatch.setattr(random, "uniform", rng.uniform)
        monkeypatch.setattr(random, "gauss", rng.normal)
        monkeypatch.setattr(random, "randint", lambda low, high: int(rng.integers(low, high, endpoint=True)))
        monkeypatch.setattr(
            np.random, "choice", lambda items, size, **_: [items[i] for i in rng.integers(len(items), size=size)]
        )
        monkeypatch.setattr(np.random, "beta", rng.beta)
        monkeypatch.setattr(np.random, "randint", lambda low, high, size: rng.integers(low, high, size=size))
        # for the flip; what ours draws next is for the negative, which timm does not have
        monkeypatch.setattr(torch, "rand", lambda size: torch.tensor([rng.random(), rng.random()])[:size])
        monkeypatch.setattr(
            timm.random_erasing,
            "_get_pixels",
            lambda per_pixel, rand_color, size, dtype, device: torch.from_numpy(
                rng.standard_normal(size, dtype=np.float32)
            ),
        )

    return share


TIMM_NAMES = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}
INCREASING_NAMES = {
    name: f"{name}Increasing" for name in OPERATIONS if INCREASING_OPERATIONS[name] is not OPERATIONS[name]
}


@pytest.mark.parametrize("increasing", [False, True], ids=["original", "increasing"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_pixels_of_every_operation(timm, monkeypatch, name, increasing):
    timm_name = TIMM_NAMES.get(name, INCREASING_NAMES.get(name, name) if increasing else name)
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    apply, signed = (INCREASING_OPERATIONS if increasing else OPERATIONS)[name]
    image, altered = picture(), set()
    for magnitude in [0, 0.1, 1, 2.4, 2.5, 5, 7.3, 9, 9.99, 10]:
        for sign in [1, -1] if signed else [1]:
            monkeypatch.setattr(random, "random", lambda sign=sign: 0.5 - 0.25 * sign)
            theirs = timm.auto_augment.AugmentOp(timm_name, prob=1, magnitude=magnitude, hparams=hparams)(image)
            ours = apply(image, sign * magnitude / 10, FILL)
            assert ours.tobytes() == theirs.tobytes(), (magnitude, sign)
            altered.add(ours.tobytes() != image.tobytes())
    assert True in altered


def test_the_same_operations(timm):
    for increasing, operations in enumerate((OPERATIONS, INCREASING_OPERATIONS)):
        theirs = timm.auto_augment.rand_augment_transform(f"rand-inc{increasing}").ops
        names = [TIMM_NAMES.get(name, INCREASING_NAMES.get(name, name) if increasing else name) for name in operations]
        assert names == [operation.name for operation in theirs]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rand_augment": "rand-m5-n3-mstd3-inc1-p0.8", "random_erasing": 1.0},
        {"rand_augment": "rand-mstd1", "image_size": (48, 80), "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"rand_augment": None, "crop_scale": (0.5, 0.9), "crop_ratio": (0.5, 3.0), "random_erasing": 0.7},
    ],
    ids=["recipe", "increasing", "other size", "crop and erasing"],
)
def test_pixels_of_the_whole_transform(timm, shared_draws, changes):
    settings = RECIPE | {"image_size": (96, 96)} | changes
    ours = TrainingTransform(**settings)
    theirs = timm.create_transform(
        settings["image_size"],
        is_training=True,
        scale=settings["crop_scale"],
        ratio=settings["crop_ratio"],
        hflip=settings["horizontal_flip"],
        color_jitter=None,
        auto_augment=settings["rand_augment"],
        interpolation="bicubic",
        mean=settings["image_mean"],
        std=settings["image_std"],
        re_prob=settings["random_erasing"],
        re_mode="pixel",
    )
    for seed, size in enumerate([(90, 60), (60, 90), (96, 96), (300, 40), (40, 300), (7, 5)] * 20):
        image = picture(*size, seed=seed)
        shared_draws(np.random.default_rng(seed))
        expected = theirs(image)
        assert torch.equal(ours(image, np.random.default_rng(seed)), expected), (seed, size)


@pytest.mark.parametrize("alphas", [(0.2, 1.0), (0.8, 0.0), (0.0, 1.0)], ids=str)
def test_mixed_batches_are_those_of_timm(timm, shared_draws, monkeypatch, alphas):
    options = {"mixup_alpha": alphas[0], "cutmix_alpha": alphas[1], "switch_prob": 0.5, "label_smoothing": 0.1}
    ours, theirs = Mixing(**options, num_labels=7), timm.Mixup(**options, num_classes=7)
    pixel_values = torch.randn(4, 3, 9, 14, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 0, 6, 3])
    for seed in range(200):
        shared_draws(rng := np.random.default_rng(seed))
        # timm draws whether to mix at all, which it always does here, then which of the kinds where there are both
        draws = iter([0.0, rng.random()] if all(alphas) else [0.0])
        monkeypatch.setattr(np.random, "rand", partial(next, draws))
        expected = theirs(pixel_values.clone(), labels)
        mixed = ours(pixel_values, labels, np.random.default_rng(seed))
        torch.testing.assert_close(mixed, expected, rtol=0, atol=5e-7)  # rounding


@pytest.mark.parametrize(
    "changes", [{}, {"rand_augment": "rand-m7-mstd1-inc1", "image_size": (48, 80)}, {"random_erasing": 0.0}], ids=str
)
def test_timm_does_what_the_authors_call_it_for(changes):
    """In one piece and with timm's defaults where the authors' recipe says nothing."""
    timm = import_timm()
    from training_evmamba.augmentation_timm import TimmTransform, seeded

    settings = RECIPE | changes
    ours = TimmTransform(**settings)
    theirs = timm.create_transform(
        settings["image_size"],
        is_training=True,
        auto_augment=settings["rand_augment"],
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        re_prob=settings["random_erasing"],
        re_mode="pixel",
    )
    results = []
    for seed in range(40):
        image = picture(seed=seed)
        results.append(ours(image, np.random.default_rng(seed)))
        with seeded(np.random.default_rng(seed)):
            assert torch.equal(results[-1], theirs(image)), seed
    assert not any(torch.equal(result, results[0]) for result in results[1:])


class UnchangedGenerators:
    """Fails where the process's random number generators are others at the end than at the beginning."""

    def __enter__(self):
        self.states = self.get_states()

    def __exit__(self, *error):
        before, after = self.states, self.get_states()
        assert before[0] == after[0] and torch.equal(before[2], after[2])
        np.testing.assert_equal(after[1], before[1])

    def get_states(self):
        return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()


def transformed(library, image: Image.Image, seed: int = 0, **changes) -> torch.Tensor:
    return library.transform(**(RECIPE | changes))(image, np.random.default_rng(seed))


def test_an_image_is_a_function_of_the_generator(library):
    image = picture()
    before = image.tobytes()
    np.random.standard_normal()  # which keeps a second number for later
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
    # the median of an even distribution, but for large crops of a ratio that does not fit
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
    """The filter of the resizing ends at the crop's border."""
    pixels = np.zeros((40, 120, 3), dtype="uint8")
    pixels[:, 40:80] = 255  # white, exactly where the central crop is
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
    """A negative is taken before RandAugment alters the image, after which it would be another."""
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
    # ten operations, and five in two directions
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
    with pytest.raises(ValueError, match=r"is not understood\. Accepted are 'rand' and") as error:
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
    with pytest.raises(ValueError, match=f"^{name} is .* accepted"):
        library.transform(**RECIPE | {name: value})


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_other_modes_are_refused(library, mode):
    with pytest.raises(ValueError, match=f"mode {mode}: RGB is accepted"):
        transformed(library, Image.new(mode, (4, 4)))


def distinct_batch(batch_size: int, height: int = 12, width: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Image b of label b is 1 in channel b and 0 elsewhere: means over pixels are shares of images."""
    return torch.eye(batch_size)[:, :, None, None].expand(-1, -1, height, width), torch.arange(batch_size)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
@pytest.mark.parametrize("alphas", [(0.2, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=str)
def test_targets_are_the_shares_of_the_images(library, batch_size, alphas):
    if library.name == "timm" and batch_size % 2:
        pytest.skip("timm mixes an even number of images")
    options = {"mixup_alpha": alphas[0], "cutmix_alpha": alphas[1], "label_smoothing": 0.0, "num_labels": batch_size}
    mixing = library.mixing(**MIXING | options)
    pixel_values, labels = distinct_batch(batch_size)
    rng = np.random.default_rng(0)
    for _ in range(50):
        mixed, targets = mixing(pixel_values, labels, rng)
        torch.testing.assert_close(mixed.mean(dim=(2, 3)), targets, rtol=0, atol=1e-5)
        if batch_size % 2:
            middle = batch_size // 2
            torch.testing.assert_close(mixed[middle], pixel_values[middle])
            torch.testing.assert_close(targets[middle], torch.eye(batch_size)[middle])
    assert torch.equal(pixel_values, distinct_batch(batch_size)[0])  # the batch itself stays


def test_both_kinds_are_mixed_and_as_frequent_as_asked(library):
    pixel_values, labels = distinct_batch(4, 32, 32)
    rng = np.random.default_rng(0)
    mixing = library.mixing(**MIXING | {"switch_prob": 0.3, "mixup_alpha": 1.0})
    cut, shares = 0, []
    for _ in range(1000):
        mixed, targets = mixing(pixel_values, labels, rng)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
        if set(mixed.unique().tolist()) <= {0.0, 1.0}:
            cut += 1
        else:
            shares.append(mixed[0, 0, 0, 0].item())
    assert abs(cut / 1000 - 0.3) < 0.05
    assert abs(np.mean(shares) - 0.5) < 0.05 and min(shares) < 0.02 and max(shares) > 0.98  # Beta(1, 1)


def test_without_mixing_only_labels_are_smoothed(library):
    pixel_values, labels = distinct_batch(3)
    options = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "num_labels": 5}
    mixed, targets = library.mixing(**MIXING | options)(pixel_values, labels, np.random.default_rng(0))
    assert torch.equal(mixed, pixel_values)
    torch.testing.assert_close(targets, torch.eye(5)[:3] * 0.9 + 0.02)


def test_mixing_is_a_function_of_the_generator(library):
    batch = distinct_batch(6)
    with UnchangedGenerators():
        first, again, other = (library.mixing(**MIXING)(*batch, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixing_keeps_the_dtype_of_images(library, dtype):
    pixel_values, labels = distinct_batch(4)
    for seed in range(8):
        mixed, targets = library.mixing(**MIXING)(pixel_values.to(dtype), labels, np.random.default_rng(seed))
        assert (mixed.dtype, targets.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize(
    "name, value",
    [
        ("mixup_alpha", -1.0),
        ("cutmix_alpha", math.inf),
        ("switch_prob", 1.5),
        ("label_smoothing", -0.1),
        ("num_labels", 0),
    ],
)
def test_settings_of_mixing_out_of_range_are_refused(library, name, value):
    with pytest.raises(ValueError, match=f"^{name} is .* accepted"):
        library.mixing(**MIXING | {name: value})
