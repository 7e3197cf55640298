"""Every operator with the default kernels: derivatives, and dtypes under autocast.

Derivatives are those of `torch.func`, of forward mode, and batches of gradients. They are compared with reverse-mode
derivatives of PyTorch operators in float64.
"""

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad

from devices import DEVICE, IS_INTERPRETED
from evmamba_kernels import (
    atrous_selective_scan,
    depthwise_conv,
    depthwise_conv_and_mean,
    layer_norm_gated,
    layer_norm_mean,
    use_backend,
)
from evmamba_kernels.atrous_selective_scan_reference import random_arguments
from evmamba_kernels.backends import LOWER_DTYPES
from golden_values import relative_error


SHAPE = (2, 3, 2, 5)
SCAN_PARAMETERS = random_arguments(*SHAPE, state_size=3, rank=2)[1:]


def scan(u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return atrous_selective_scan(u, *(parameter.to(noise.dtype) for parameter in SCAN_PARAMETERS))


def gated(u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return layer_norm_gated(u, (u * noise).to(u.dtype), noise[0, 0, 0], noise[0, 0, 1], 1e-5)


def mean(u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return layer_norm_mean(u, noise[0, 0, 0], noise[0, 0, 1], 1e-5)


def convolved(u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return depthwise_conv(u, noise.flatten()[:45].view(5, 1, 3, 3), noise[0, 0, 0], "silu")


def convolved_and_mean(u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    y, means = depthwise_conv_and_mean(u, noise.flatten()[:45].view(5, 1, 3, 3), None, "gelu")
    return y * means[:, None, None]


def by_columns(function: Callable, u: torch.Tensor) -> torch.Tensor:
    """Return the Jacobian from a forward-mode derivative per input."""
    columns = []
    for unit in torch.eye(u.numel()).view(-1, *u.shape):
        with forward_ad.dual_level():
            columns.append(forward_ad.unpack_dual(function(forward_ad.make_dual(u, unit))).tangent)
    return torch.stack(columns, dim=-1).unflatten(-1, u.shape)


def by_batched_gradients(function: Callable, u: torch.Tensor) -> torch.Tensor:
    u = u.clone().requires_grad_()
    y = function(u)
    units = torch.eye(y.numel()).view(-1, *y.shape)
    return torch.autograd.grad(y, u, units, is_grads_batched=True)[0].unflatten(0, y.shape)


JACOBIANS = {
    "jacrev": lambda function, u: torch.func.jacrev(function)(u),
    "jacfwd": lambda function, u: torch.func.jacfwd(function)(u),
    "reverse, vectorized": lambda function, u: torch.autograd.functional.jacobian(function, u, vectorize=True),
    "forward": lambda function, u: torch.autograd.functional.jacobian(
        function, u, vectorize=True, strategy="forward-mode"
    ),
    "columns": by_columns,
    "batched gradients": by_batched_gradients,
}
HESSIANS = {
    "hessian": lambda function, u: torch.func.hessian(function)(u),
    "jacrev of grad": lambda function, u: torch.func.jacrev(torch.func.grad(function))(u),
}
FUNCTIONS = pytest.mark.parametrize("function", [scan, gated, mean, convolved, convolved_and_mean])
pytestmark = [
    pytest.mark.skipif(IS_INTERPRETED or DEVICE.type != "cpu", reason="small maps take CPU kernels or PyTorch's"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


def random_maps() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


@FUNCTIONS
@pytest.mark.parametrize("jacobian", JACOBIANS.values(), ids=JACOBIANS)
def test_jacobians(jacobian, function):
    u, noise = random_maps()
    expected = torch.autograd.functional.jacobian(lambda u: function(u, noise.double()), u.double())
    assert relative_error(jacobian(lambda u: function(u, noise), u), expected) < 2e-6


@FUNCTIONS
@pytest.mark.parametrize("hessian", HESSIANS.values(), ids=HESSIANS)
def test_hessians(hessian, function):
    u, noise = random_maps()

    def loss(u: torch.Tensor) -> torch.Tensor:
        return function(u, noise.to(u.dtype)).pow(3).sum()

    expected = torch.autograd.functional.hessian(loss, u.double())
    assert relative_error(hessian(loss, u), expected) < 1e-5


@FUNCTIONS
def test_gradients_per_image(function):
    u, noise = random_maps()

    def loss(image: torch.Tensor) -> torch.Tensor:
        return function(image.expand(2, -1, -1, -1), noise).square().sum()

    expected = torch.stack([torch.autograd.functional.jacobian(loss, image) for image in u])
    assert relative_error(torch.func.vmap(torch.func.grad(loss))(u), expected) < 2e-6


WAYS = {
    "kernels": lambda function: function,
    "PyTorch": lambda function: use_backend("torch")(function),
    "graph": lambda function: torch.compile(function, backend="aot_eager", fullgraph=True),
}


@FUNCTIONS
@pytest.mark.parametrize("dtype", LOWER_DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_autocast_changes_no_dtype(way, dtype, function):
    """Under autocast, PyTorch's operators may return another dtype than that of the map. Parameters stay float32."""
    u, noise = random_maps()
    u = u.to(dtype)
    exact = function(u.double(), noise.double())
    run, variable = way(function), u.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            results = [run(u, noise)]
        results.append(run(variable, noise))
    for y in results:
        assert y.dtype == dtype
        assert relative_error(y, exact) < 2e-2
    results[1].sum().backward()
    assert variable.grad.dtype == dtype
