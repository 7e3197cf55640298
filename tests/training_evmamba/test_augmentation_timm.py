"""Our operators make the same pixels as timm, if timm can be imported."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from augmentation_cases import FILL, MEAN, RECIPE, STD, import_timm, picture
from training_evmamba.augmentation import (
    INCREASING_OPERATIONS,
    OPERATIONS,
    Mixing,
    TrainingTransform,
)


@pytest.fixture
def timm(monkeypatch):
    """Return `timm.data`, which also needs torchvision."""
    data = import_timm()
    # timm relies on Pillow up to version 12, where an image that keeps 0 bits becomes black
    posterize = ImageOps.posterize
    monkeypatch.setattr(
        ImageOps,
        "posterize",
        lambda image, bits: posterize(image, bits) if bits else Image.new(image.mode, image.size),
    )
    return data


@pytest.fixture
def shared_draws(monkeypatch, timm):
    """Make timm draw from one NumPy generator, instead of the global ones of Python, NumPy and PyTorch."""

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
        # for the flip; ours then draws for the inversion, which timm does not have
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
        # timm draws whether to mix (here always), then chooses between MixUp and CutMix if both are enabled
        draws = iter([0.0, rng.random()] if all(alphas) else [0.0])
        monkeypatch.setattr(np.random, "rand", partial(next, draws))
        expected = theirs(pixel_values.clone(), labels)
        mixed = ours(pixel_values, labels, np.random.default_rng(seed))
        torch.testing.assert_close(mixed, expected, rtol=0, atol=5e-7)  # rounding


@pytest.mark.parametrize(
    "changes", [{}, {"rand_augment": "rand-m7-mstd1-inc1", "image_size": (48, 80)}, {"random_erasing": 0.0}], ids=str
)
def test_timm_does_what_the_authors_call_it_for(changes):
    """One transform, with timm's defaults for everything that the authors' recipe leaves out."""
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
