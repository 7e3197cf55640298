"""Comparison of weights."""

from collections.abc import Mapping

import torch


def assert_same_weights(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check that two state dicts hold the same names and, bit for bit, the same tensors, on any devices."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor.cpu(), expected[name].cpu()), name
