"""Checks of the operators that run: CPU kernels have no float64 form, and those for inference no gradients."""

from collections.abc import Callable

import pytest
import torch

from evmamba_kernels import backends, choose_backend, use_backend
from evmamba_kernels.backends import LOWER_DTYPES, Backend, load_numba


def is_run(operator: str, function: Callable, tensors: list[torch.Tensor]) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*tensors)
    return f"evmamba_kernels::{operator}" in {event.key for event in profile.key_averages()}


def check_kernel_is_chosen(operator: str, function: Callable, tensors: list[torch.Tensor]) -> None:
    assert is_run(operator, function, tensors)
    assert is_run(operator, function, [tensor.bfloat16() for tensor in tensors])
    for backend in (None, "numba"):
        with use_backend(backend):
            assert not is_run(operator, function, [tensor.double() for tensor in tensors])
    with use_backend("torch"):
        assert not is_run(operator, function, tensors)
    with pytest.MonkeyPatch.context() as patch:  # a backend of the scan alone, first in the order of preference
        first = {"first": Backend(("cpu",), LOWER_DTYPES, load_numba)}
        patch.setattr(backends, "BACKENDS", first | backends.BACKENDS)
        assert choose_backend("cpu", torch.float32).backend == "first"
        assert is_run(operator, function, tensors)
        with use_backend("first"):
            assert not is_run(operator, function, tensors)


def check_kernel_is_for_inference(operator: str, function: Callable, tensors: list[torch.Tensor]) -> None:
    check_kernel_is_chosen(operator, function, tensors)
    parameters = [tensor.requires_grad_() for tensor in tensors]
    assert not is_run(operator, function, parameters)
    with torch.no_grad():
        assert is_run(operator, function, parameters)
