"""The operator against golden float64 values, and its contract. Golden values: `tests/golden_values.py`."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.library import CustomOpDef

import evmamba_kernels
from devices import BACKENDS, DEVICE, IS_INTERPRETED, sized
from evmamba_kernels import atrous_selective_scan, choose_backend, use_backend
from evmamba_kernels.atrous_selective_scan import (
    scan_bwd_operator,
    scan_from_states_bwd_operator,
    scan_keeping_states_operator,
    scan_operator,
)
from evmamba_kernels.atrous_selective_scan_reference import (
    atrous_selective_scan_reference,
    group_pixels,
    random_arguments,
)
from evmamba_kernels.backends import BACKENDS as ALL_BACKENDS
from golden_values import load_cases, relative_error
from strided_maps import STRIDED_MAPS


CASES = load_cases("atrous_scan_fp64.safetensors")
ORIGINAL_NAMES = ["x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"]


def golden_arguments(case: dict[str, torch.Tensor], prefix: str = "") -> list[torch.Tensor]:
    """The operator's arguments, or with "grad." their gradients, in its own layout: maps (B, H, W, D), K first."""
    num_groups, channels, _ = case["dt_projs_weight"].shape
    x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D = (case[prefix + name] for name in ORIGINAL_NAMES)
    x = x.permute(0, 2, 3, 1)
    A_log, D = A_log.view(num_groups, channels, -1), D.view(num_groups, channels)
    return [x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D]


NAMES = ["hidden_states", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D"]
WITH_KERNELS = [name for name in BACKENDS if name != "torch"]


def small_arguments(batch_size, height, width, channels, state_size=4, rank=2, seed=0):
    return random_arguments(batch_size, height, width, channels, state_size, rank, device=DEVICE, seed=seed)


def exact(arguments):
    """Return the arguments in float64 on the CPU, since some devices have no float64."""
    return [argument.detach().cpu().double().requires_grad_() for argument in arguments]


def differentiate_reference(arguments, grad):
    """Return the exact output and the six exact gradients."""
    arguments = exact(arguments)
    y = atrous_selective_scan_reference(*arguments)
    return [y.detach(), *torch.autograd.grad(y, arguments, grad.cpu().double())]


@pytest.mark.parametrize("function", [atrous_selective_scan, atrous_selective_scan_reference])
@pytest.mark.parametrize("name", CASES)
def test_golden_values_and_gradients(name, function):
    case = CASES[name]
    arguments = [argument.clone().requires_grad_() for argument in golden_arguments(case)]
    y = function(*arguments)
    assert relative_error(y, case["y"].permute(0, 2, 3, 1)) < 1e-10
    gradients = torch.autograd.grad(y, arguments, case["grad_y"].permute(0, 2, 3, 1))
    for name, gradient, expected in zip(ORIGINAL_NAMES, gradients, golden_arguments(case, "grad."), strict=True):
        assert relative_error(gradient, expected, floor=1e-6) < 1e-10, name


@pytest.mark.parametrize("height", [1, 2, 5, 6])
@pytest.mark.parametrize("width", [1, 2, 5, 6])
def test_groups_cover_every_pixel_once(height, width):
    visited = [pixel for group in range(4) for pixel in group_pixels(height, width, group)]
    assert sorted(visited) == [(row, column) for row in range(height) for column in range(width)]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 9, 3), (1, 16, 2, 5), (1, 23, 30, 7)], ids=str)
@pytest.mark.parametrize("state_size, rank", [(1, 1), (3, 5)])
def test_shapes_against_the_reference(shape, state_size, rank):
    arguments = exact(small_arguments(*shape, state_size, rank))
    assert relative_error(atrous_selective_scan(*arguments), atrous_selective_scan_reference(*arguments)) < 1e-12


BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of the result, relative norm

# some devices of these types have no float64
WIDEST = torch.float32 if DEVICE.type in ("mps", "xpu") else torch.float64
PARAMETER_DTYPES = (torch.bfloat16, WIDEST, torch.float16, torch.float32, WIDEST)


def with_dtypes(backends):
    """Run a test for each backend and each of its dtypes."""
    dtypes = {name: ALL_BACKENDS[name].dtypes if name in ALL_BACKENDS else tuple(BOUNDS) for name in backends}
    pairs = [(name, dtype) for name in backends for dtype in dtypes[name]]
    return pytest.mark.parametrize("backend, dtype", pairs, ids=str)


@with_dtypes(BACKENDS)
def test_lower_dtypes_run_the_recurrence_in_float32(backend, dtype):
    u, *parameters = small_arguments(1, *sized((40, 40), (10, 12)), 8)
    u = u.to(dtype)
    y = atrous_selective_scan(u, *parameters, backend=backend)
    assert y.dtype == dtype
    assert relative_error(y, atrous_selective_scan_reference(*exact([u, *parameters]))) < BOUNDS[dtype]


@with_dtypes(BACKENDS)
def test_gradients_have_the_dtypes_of_their_arguments(backend, dtype):
    u, *parameters = small_arguments(*sized((2, 9, 8), (1, 3, 5)), 20, state_size=sized(16, 5), rank=3)
    arguments = [argument.requires_grad_() for argument in (u.to(dtype), *parameters)]
    grad = torch.randn_like(arguments[0])
    gradients = torch.autograd.grad(atrous_selective_scan(*arguments, backend=backend), arguments, grad)
    expected = differentiate_reference(arguments, grad)[1:]
    for gradient, exact_gradient, argument in zip(gradients, expected, arguments, strict=True):
        assert gradient.dtype == argument.dtype
        assert relative_error(gradient, exact_gradient) < 2 * BOUNDS[dtype]


sides = st.integers(1, sized(13, 5))


@settings(max_examples=sized(40, 2), deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, sized(3, 2)), sides, sides, st.integers(1, sized(40, 20))),
    state_size=st.integers(1, sized(64, 5)),
    rank=st.integers(1, sized(24, 5)),
    seed=st.integers(0, 2**32 - 1),
)
@example(shape=(1, 1, 2, 3), state_size=64, rank=1, seed=0)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_shapes_against_the_reference(backend, shape, state_size, rank, seed):
    arguments = small_arguments(*shape, state_size, rank, seed=seed)
    arguments = [argument.requires_grad_() for argument in arguments]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    y = atrous_selective_scan(*arguments, backend=backend)
    expected_y, *expected = differentiate_reference(arguments, grad)
    assert relative_error(y, expected_y) < 3e-6
    for gradient, exact_gradient in zip(torch.autograd.grad(y, arguments, grad), expected, strict=True):
        assert relative_error(gradient, exact_gradient, floor=1e-6) < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode(backend):
    """Derivatives are those of the PyTorch operators, also for several feature maps at once."""
    u, *others = small_arguments(2, 3, 4, 5, 3, 2)
    tangent = torch.randn_like(u)

    def scan(u, backend):
        return atrous_selective_scan(u, *others, backend=backend)

    _, expected = torch.func.jvp(lambda u: scan(u, "torch"), (u,), (tangent,))
    assert relative_error(torch.func.jvp(lambda u: scan(u, backend), (u,), (tangent,))[1], expected) < 1e-6
    _, batched = torch.func.jvp(torch.func.vmap(lambda u: scan(u[None], backend)[0]), (u,), (tangent,))
    assert relative_error(batched, expected) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_recurrence_in_float32(backend):
    arguments = small_arguments(1, *sized((12, 12), (5, 4)), sized(8, 3))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = atrous_selective_scan(*arguments, backend=backend)
    assert torch.equal(y, atrous_selective_scan(*arguments, backend=backend))


def run_kernels(backend: str, grad: torch.Tensor, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output and the six gradients of a backend's functions, without the operators around them."""
    forward, backward = ALL_BACKENDS[backend].load()
    return [forward(*arguments), *backward(grad, *arguments)]


@pytest.mark.parametrize("backend", WITH_KERNELS)
def test_kernels_compute_in_float32_under_autocast(backend):
    arguments = small_arguments(1, *sized((12, 11), (3, 4)), 8)
    grad = arguments[0].flip(1)
    expected = run_kernels(backend, grad, arguments)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        results = run_kernels(backend, grad, arguments)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)


@with_dtypes(WITH_KERNELS)
def test_results_are_new_and_contiguous(backend, dtype):
    """Parameters have another dtype than the feature map, and no tensor is contiguous."""
    arguments = small_arguments(*sized((2, 3, 5, 4), (1, 2, 3, 2)), *sized((4, 2), (2, 1)))
    arguments[0] = arguments[0].to(dtype)
    grad = arguments[0].flip(1)
    arguments[1:] = [argument.to(other) for argument, other in zip(arguments[1:], PARAMETER_DTYPES, strict=True)]
    strided = [torch.stack([argument, argument], dim=-1)[..., 0] for argument in (grad, *arguments)]
    results = run_kernels(backend, strided[0], strided[1:])
    for result, argument, dense in zip(
        results, [arguments[0], *arguments], run_kernels(backend, grad, arguments), strict=True
    ):
        assert result.shape == argument.shape and result.dtype == argument.dtype
        assert result.is_contiguous() and torch.equal(result, dense)
    memory = [tensor.untyped_storage().data_ptr() for tensor in (*strided, *results)]
    assert len(set(memory)) == len(memory)


@pytest.mark.parametrize("argument", range(7), ids=[*NAMES, "grad"])
@pytest.mark.parametrize("backend", WITH_KERNELS)
def test_nan_reaches_what_depends_on_it(backend, argument):
    arguments = small_arguments(*sized((2, 5, 4, 6), (1, 3, 2, 3)), *sized((4, 2), (2, 1)))
    grad = torch.ones_like(arguments[0])
    [*arguments, grad][argument].view(-1)[0] = torch.nan
    expected = differentiate_reference(arguments, grad)
    for name, result, exact_result in zip(["y", *NAMES], run_kernels(backend, grad, arguments), expected, strict=True):
        assert result.cpu().isnan()[exact_result.isnan()].all(), name


@pytest.mark.parametrize("backend", WITH_KERNELS)
def test_two_calls_give_the_same_bits(backend):
    """Sums over images, groups and steps have a fixed order, on any number of threads."""
    arguments = small_arguments(*sized((5, 21, 18, 40), (2, 3, 5, 3)))
    grad = torch.randn_like(arguments[0])
    first = run_kernels(backend, grad, arguments)
    for _ in range(sized(5, 1)):
        assert all(map(torch.equal, run_kernels(backend, grad, arguments), first))


@pytest.mark.parametrize("backend", WITH_KERNELS)
def test_several_python_threads_at_once(backend):
    if IS_INTERPRETED and backend == "triton":
        pytest.skip("Triton's interpreter keeps its state in global variables")
    calls = [small_arguments(2, 9, 8, 20, 16, 3, seed=seed) for seed in range(12)]
    expected = [run_kernels(backend, arguments[0], arguments) for arguments in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(lambda arguments: run_kernels(backend, arguments[0], arguments), calls))
            torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", sized([32, 256], [8]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values_stay_finite_and_right(backend, side):
    arguments = small_arguments(1, side, side, 4)
    arguments[3].uniform_(-20, 50)  # dt_proj_bias
    arguments[4].uniform_(-8, 8)  # A_log
    arguments = [argument.requires_grad_() for argument in arguments]
    y = atrous_selective_scan(*arguments, backend=backend)
    assert relative_error(y, atrous_selective_scan(*exact(arguments), backend="torch")) < 1e-5
    for gradient in torch.autograd.grad(y.sum(), arguments):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_maps_stay_zero(backend):
    u, *parameters = small_arguments(1, 8, 8, 4)
    assert not atrous_selective_scan(torch.zeros_like(u), *parameters, backend=backend).any()


@pytest.mark.parametrize("make_view", STRIDED_MAPS.values(), ids=STRIDED_MAPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_maps(backend, make_view):
    u, *parameters = small_arguments(2, *sized((7, 6), (3, 5)), 5, sized(4, 1), sized(2, 1))
    view = make_view(u)
    assert not view.is_contiguous()
    dense = view.clone(memory_format=torch.contiguous_format)
    assert torch.equal(
        atrous_selective_scan(view, *parameters, backend=backend),
        atrous_selective_scan(dense, *parameters, backend=backend),
    )
    gradients = []
    for argument in (view, dense):
        argument = argument.detach().requires_grad_()
        y = atrous_selective_scan(argument, *parameters, backend=backend)
        gradients += torch.autograd.grad(y.square().sum(), argument)
    assert torch.equal(*gradients)


def test_gradcheck():
    arguments = small_arguments(1, 3, 4, 2, state_size=2, rank=1)
    assert torch.autograd.gradcheck(atrous_selective_scan, exact(arguments))


def differentiate(arguments, backend, order):
    """Return the gradients of nested sums of squares: of the output, of its gradients, and so on."""
    arguments = [argument.detach().requires_grad_() for argument in arguments]
    results = [atrous_selective_scan(*arguments, backend=backend)]
    for _ in range(order):
        loss = sum(result.float().square().sum() for result in results)
        results = torch.autograd.grad(loss, arguments, create_graph=True)
    return results


@pytest.mark.parametrize("shape", sized([(2, 5, 4, 3), (1, 1, 2, 17)], [(1, 2, 3, 3)]), ids=str)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_higher_derivatives(backend, order, shape):
    arguments = small_arguments(*shape)
    exact_results = differentiate(exact(arguments), "torch", order)
    for actual, expected in zip(differentiate(arguments, backend, order), exact_results, strict=True):
        assert relative_error(actual, expected, floor=1e-6) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_of_connected_arguments(backend):
    """The feature map depends on a weight, as in a network, and most arguments need no gradient."""
    arguments = small_arguments(1, 3, 2, 3)
    gradients = []
    for (u, weight, *others), name in ((arguments, backend), (exact(arguments), "torch")):
        weight.requires_grad_()
        y = atrous_selective_scan(u * weight.mean(), weight, *others, backend=name)
        [gradient] = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
        gradients += torch.autograd.grad(gradient.square().sum(), weight)
    assert relative_error(*gradients) < 1e-5


@with_dtypes(BACKENDS)
def test_second_derivatives_have_the_dtypes_of_their_arguments(backend, dtype):
    arguments = small_arguments(1, 3, 2, 3)
    arguments[0] = arguments[0].to(dtype)
    assert [each.dtype for each in differentiate(arguments, backend, 2)] == [each.dtype for each in arguments]


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_transforms(backend):
    """Gradients per image, and Hessians in both modes."""
    u, *parameters = small_arguments(2, 2, 3, 2)

    def loss(u):
        return atrous_selective_scan(u, *parameters, backend=backend).square().sum()

    variable = u.clone().requires_grad_()
    [gradient] = torch.autograd.grad(loss(variable), variable, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss)(u), gradient)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(lambda u: loss(u[None])))(u), gradient)
    [expected] = torch.autograd.grad(gradient.sum(), variable)
    torch.testing.assert_close(torch.func.hessian(loss)(u).sum(dim=(0, 1, 2, 3)), expected)
    torch.testing.assert_close(torch.func.grad(lambda u: torch.func.grad(loss)(u).sum())(u), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_of_a_backward_pass(backend):
    """The forward pass came before, outside of the transform. The backward pass is linear in its argument."""
    u, *parameters = small_arguments(2, 3, 2, 3)
    u.requires_grad_()
    y = atrous_selective_scan(u, *parameters, backend=backend)
    grad = y.detach()

    def backward(grad, **options):
        return torch.autograd.grad(y, u, grad, retain_graph=True, **options)[0]

    expected = backward(grad)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(backward(forward_ad.make_dual(torch.zeros_like(grad), grad))).tangent
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(torch.func.jvp(backward, (torch.zeros_like(grad),), (grad,))[1], expected)
    torch.testing.assert_close(torch.func.vmap(backward)(grad[None])[0], expected)
    adjoint = torch.func.grad(lambda grad: (backward(grad, create_graph=True) * expected).sum())(grad)
    torch.testing.assert_close((adjoint * grad).sum(), expected.square().sum())


@with_dtypes(BACKENDS)
def test_empty_batches(backend, dtype):
    u, *parameters = small_arguments(1, 5, 4, 3)
    arguments = [each.requires_grad_() for each in (u[:0].to(dtype), *parameters)]
    y = atrous_selective_scan(*arguments, backend=backend)
    assert y.shape == (0, 5, 4, 3) and y.dtype == dtype
    gradients = torch.autograd.grad(y.sum(), arguments, create_graph=True)
    for gradient, argument in zip(gradients, arguments, strict=True):
        assert gradient.dtype == argument.dtype
        assert torch.equal(gradient, torch.zeros_like(argument))
    second = torch.autograd.grad(sum(gradient.sum() for gradient in gradients), arguments, allow_unused=True)
    assert all(each is None or not each.any() for each in second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_export_with_dynamic_sizes(backend):
    class Scan(torch.nn.Module):
        def forward(self, u, parameters):
            return atrous_selective_scan(u, *parameters, backend=backend)

    arguments = small_arguments(2, 24, 20, 4)
    batch, height, width = (torch.export.Dim(name, min=2, max=512) for name in ("batch", "height", "width"))
    sizes = ({0: batch, 1: height, 2: width}, [None] * 5)
    program = torch.export.export(Scan(), (arguments[0], arguments[1:]), dynamic_shapes=sizes)
    for shape in sized([(2, 24, 20, 4), (3, 101, 67, 4), (2, 2, 3, 4)], [(2, 4, 3, 4), (3, 5, 6, 4)]):
        u = torch.randn(shape, device=DEVICE)
        assert relative_error(program.module()(u, arguments[1:]), atrous_selective_scan(u, *arguments[1:])) < 1e-6


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({0: torch.zeros(3, 4, 5)}, ValueError, r"hidden_states must have the shape \(B, H, W, D\)"),
        ({0: torch.zeros(1, 0, 4, 5)}, ValueError, "hidden_states must not be empty"),
        ({0: torch.zeros(0, 4, 0, 5)}, ValueError, "hidden_states must not be empty"),
        ({0: torch.zeros(1, 4, 4, 0)}, ValueError, "hidden_states must not be empty"),
        ({0: torch.zeros(1, 4, 4, 5, dtype=torch.int64)}, TypeError, "hidden_states must be a floating point"),
        ({1: torch.zeros(4, 9, 5)}, ValueError, "x_proj_weight must have the shape"),
        ({2: torch.zeros(3, 5, 2)}, ValueError, "dt_proj_weight must have the shape"),
        ({2: torch.zeros(4, 5, 0)}, ValueError, "rank R must be positive"),
        ({3: torch.zeros(4, 6)}, ValueError, "dt_proj_bias must have the shape"),
        ({4: torch.zeros(20, 4)}, ValueError, "A_log must have the shape"),
        ({5: torch.zeros(20)}, ValueError, "D must have the shape"),
        ({5: torch.zeros(4, 5, device="meta")}, ValueError, "D is on meta, but hidden_states is on cpu"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else None,
)
def test_broken_contracts_are_refused(changed, error, message):
    arguments = exact(small_arguments(1, 4, 4, 5, state_size=4, rank=2))
    for index, tensor in changed.items():
        arguments[index] = tensor
    with pytest.raises(error, match=message):
        atrous_selective_scan(*arguments)


def test_unknown_backend_is_refused():
    names = ", ".join(map(repr, [*ALL_BACKENDS, "torch"]))
    with pytest.raises(ValueError, match=f"unknown backend 'cuda'.*choose one of {names}"):
        atrous_selective_scan(*small_arguments(1, 2, 2, 2), backend="cuda")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), use_backend("cuda"):
        pass


def test_a_backend_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"'numba' computes on cpu in .*, not on cpu in torch\.float64"):
        atrous_selective_scan(*exact(small_arguments(1, 2, 2, 2)), backend="numba")


def test_choice_by_device_and_its_reasons():
    assert choose_backend("cpu", torch.float32).backend == "numba"
    assert choose_backend("cpu", torch.float64) == (
        "torch",
        "numba does not compute in torch.float64; triton computes on cuda and xpu",
    )
    assert choose_backend("mps", torch.float32) == (
        "torch",
        "numba computes on cpu; triton computes on cuda and xpu",
    )
    assert choose_backend("cuda", torch.float64) == (
        "torch",
        "numba computes on cpu; triton does not compute in torch.float64",
    )
    assert choose_backend("cuda", torch.bfloat16) == ("triton", "the first backend in the list that supports cuda")
    with use_backend("torch"):
        assert choose_backend("cpu", torch.float32) == ("torch", "it was requested")
        assert choose_backend("cpu", torch.float32, "numba").backend == "numba"
    assert choose_backend("cpu", torch.float32).backend == "numba"


def test_the_environment_chooses_a_backend():
    script = "import torch, evmamba_kernels as k; print(k.choose_backend('cpu', torch.float32).backend)"
    for name in ("torch", "numba"):
        variables = os.environ | {"EVMAMBA_SCAN_BACKEND": name}
        run = subprocess.run(
            [sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=120
        )
        assert run.stdout.strip() == name, run.stderr


@pytest.mark.parametrize("missing", [["numba", "triton"], ["numba", "triton", "numpy"]], ids=", ".join)
def test_pytorch_computes_where_packages_are_missing(missing):
    """PyTorch's operators compute unless another backend needs none of the packages. PyTorch does not need NumPy."""
    script = """
import json, sys
sys.modules |= dict.fromkeys(sys.argv[1:])  # importing them raises ImportError
import torch, evmamba_kernels as k
from evmamba_kernels.backends import BACKENDS, why_not
for device in ("cpu", "cuda"):
    reasons = {name: why_not(name, device, torch.float32) for name in BACKENDS}
    print(json.dumps([k.choose_backend(device, torch.float32).backend, reasons]))
arguments = [torch.ones(shape) for shape in [(1, 3, 3, 2), (4, 3, 2), (4, 2, 1), (4, 2), (4, 2, 1), (4, 2)]]
print(k.atrous_selective_scan(*arguments).shape)
k.atrous_selective_scan(*arguments, backend="numba")
"""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, *missing]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    *choices, shape = run.stdout.splitlines()
    for choice, package in zip(choices, ("numba", "triton"), strict=True):
        backend, reasons = json.loads(choice)
        assert f"pip install {package}" in reasons[package]
        usable = [name for name, reason in reasons.items() if reason is None]
        assert backend == [*usable, "torch"][0]
    assert shape == "torch.Size([1, 3, 3, 2])"
    assert run.stderr.splitlines()[-1].startswith(
        "ImportError: the CPU kernels of the atrous selective scan need numba"
    )


@pytest.mark.parametrize("shape", sized([(1, 4, 4, 16), (2, 5, 3, 7), (0, 3, 2, 4)], [(1, 2, 3, 3)]), ids=str)
@pytest.mark.parametrize("backend", WITH_KERNELS)
def test_operator_registration(backend, shape):
    arguments = [argument.requires_grad_() for argument in small_arguments(*shape, 2)]
    torch.library.opcheck(scan_operator, (*arguments, backend))
    grad = torch.ones_like(arguments[0]).requires_grad_()
    without_tracing = ("test_schema", "test_autograd_registration", "test_faketensor")  # tracing takes a minute
    torch.library.opcheck(scan_bwd_operator, (grad, *arguments, backend), test_utils=without_tracing)
    if backend == "numba":
        torch.library.opcheck(scan_keeping_states_operator, (*arguments, backend))
        y, states = scan_keeping_states_operator(*arguments, backend)
        assert y.requires_grad and not states.requires_grad
        kept = (grad, states, *arguments, backend)
        torch.library.opcheck(scan_from_states_bwd_operator, kept, test_utils=without_tracing)


def test_exported_files_find_their_operator():
    """Files and traces hold its name and arguments, and the backend's name: a changed operator gets a new name."""
    tensors = ", ".join(f"Tensor {name}" for name in NAMES)
    schema = f"evmamba_kernels::atrous_selective_scan({tensors}, str backend) -> Tensor"
    assert str(torch.ops.evmamba_kernels.atrous_selective_scan.default._schema) == schema
    assert {"numba", "triton"} <= set(ALL_BACKENDS)


def test_copies_do_not_take_each_others_operators(tmp_path, monkeypatch):
    """Repositories on the Hub carry copies of the kernels. A second definition would free an operator in use."""
    folder = Path(evmamba_kernels.__file__).parent
    shutil.copytree(folder, tmp_path / "copy-of kernels")
    monkeypatch.syspath_prepend(tmp_path)
    modules = [path.stem for path in folder.glob("*.py") if "torch.library" in path.read_text()]

    def operators_in(package: str) -> set[str]:
        values = [value for name in modules for value in vars(importlib.import_module(f"{package}.{name}")).values()]
        return {repr(value) for value in values if isinstance(value, CustomOpDef | OpOverload)}

    originals, copies = operators_in("evmamba_kernels"), operators_in("copy-of kernels")
    assert "<CustomOpDef(evmamba_kernels::atrous_selective_scan)>" in originals
    assert copies == {name.replace("evmamba_kernels::", "copy_of_kernels::") for name in originals}
    assert not copies & originals
