"""The augmentation of a batch, with our operators and with timm. timm may be missing."""

import math

import numpy as np
import pytest
import torch

from augmentation_cases import MIXING, UnchangedGenerators


def distinct_batch(batch_size: int, height: int = 12, width: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Image b has label b, with 1 in channel b and 0 elsewhere. Means over pixels are then fractions of images."""
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
    assert torch.equal(pixel_values, distinct_batch(batch_size)[0])  # the input batch is unchanged


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
    with pytest.raises(ValueError, match=f"^{name} is .*: give "):
        library.mixing(**MIXING | {name: value})
