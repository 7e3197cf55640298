"""Gated LayerNorm and mean of LayerNorm: CPU kernels and PyTorch operators against float64, and the choice."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch._subclasses import FakeTensorMode

import evmamba_kernels
from evmamba_kernels import layer_norm_gated, layer_norm_mean, use_backend
from evmamba_kernels.layer_norm import gated_bwd_operator, gated_operator, mean_bwd_operator, mean_operator
from golden_values import relative_error
from kernel_choice import check_kernel_is_chosen, is_run
from strided_maps import STRIDED_MAPS


def arguments(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels = shape[-1]
    tensors = [torch.randn(size, generator=generator) for size in (shape, shape, (channels,), (channels,))]
    return [tensor.to(dtype) for tensor in tensors]


def exact(hidden_states, gate, weight, bias, eps):
    hidden_states, gate, weight, bias = (tensor.double() for tensor in (hidden_states, gate, weight, bias))
    return F.layer_norm(hidden_states, weight.shape, weight, bias, eps) * F.silu(gate)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(2, 200)),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_shapes(shape, seed):
    """Two channels may be almost equal. Then their deviations from the mean cancel, as in PyTorch's LayerNorm."""
    tensors = arguments(*shape, seed=seed)
    bound = 5e-7 if shape[-1] > 2 else 5e-6
    assert relative_error(gated_operator(*tensors, 1e-5), exact(*tensors, 1e-5)) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameter_dtype", [None, torch.float32], ids=str)
def test_maps_of_16_bits(parameter_dtype, dtype):
    """The kernels compute in float32, and round once."""
    x, gate, weight, bias = (tensor.to(dtype) for tensor in arguments(2, 5, 7, 37))
    weight, bias = weight.to(parameter_dtype or dtype), bias.to(parameter_dtype or dtype)
    expected = exact(x, gate, weight, bias, 1e-5)
    y = gated_operator(x, gate, weight, bias, 1e-5)
    rounding = torch.finfo(dtype).eps / 2
    assert y.dtype == dtype
    assert ((y - expected).abs() <= rounding * expected.abs() + 2e-6).all()
    mean = mean_operator(x, weight, bias, 1e-5)
    expected = F.layer_norm(x.double(), (37,), weight.double(), bias.double(), 1e-5).mean(dim=(1, 2))
    assert mean.dtype == dtype
    assert ((mean - expected).abs() <= rounding * expected.abs() + 2e-6).all()


def test_large_means_keep_their_precision():
    x, *others = arguments(70, 50)
    x = x + 1000
    assert relative_error(gated_operator(x, *others, 1e-5), exact(x, *others, 1e-5)) < 1e-4


def test_gates_of_any_size():
    x, gate, weight, bias = arguments(9, 16)
    gate = torch.linspace(-200, 200, gate.numel()).view_as(gate)
    torch.testing.assert_close(
        gated_operator(x, gate, weight, bias, 1e-5), exact(x, gate, weight, bias, 1e-5).float(), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("make_view", STRIDED_MAPS.values(), ids=STRIDED_MAPS)
def test_strided_maps(make_view):
    x, gate, *others = arguments(2, 5, 6, 24)
    x, gate = make_view(x), make_view(gate)
    expected = layer_norm_gated(x.contiguous(), gate.contiguous(), *others, 1e-5)
    assert torch.equal(layer_norm_gated(x, gate, *others, 1e-5), expected)


def test_forward_mode():
    """Derivatives are those of PyTorch operators."""
    x, gate, weight, bias = arguments(2, 5, 6, 24)
    for function in (
        lambda x: layer_norm_gated(x, gate, weight, bias, 1e-5),
        lambda x: layer_norm_mean(x, weight, bias, 1e-5),
    ):
        _, derivative = torch.func.jvp(function, (x,), (gate,))
        with use_backend("torch"):
            torch.testing.assert_close(derivative, torch.func.jvp(function, (x,), (gate,))[1])
        assert derivative.abs().max() > 0.1


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"gate": torch.randn(2, 3, 4, 8)},
            r"gate must have the shape \(2, 3, 4, 16\) for hidden_states .* got \(2, 3",
        ),
        ({"weight": torch.randn(8)}, r"weight must have the shape \(16,\)"),
        ({"weight": torch.randn(4, 16), "bias": torch.randn(4, 16)}, r"weight must have the shape \(16,\)"),
        ({"bias": torch.randn(32)}, r"bias must have the shape \(16,\)"),
        ({"bias": torch.randn(16, device="meta")}, "bias must be on cpu, like hidden_states, got meta"),
        ({"hidden_states": torch.randn(16)}, "hidden_states must have the shape"),
    ],
)
def test_broken_contracts_are_refused(changed, message):
    names = ("hidden_states", "gate", "weight", "bias")
    tensors = dict(zip(names, arguments(2, 3, 4, 16), strict=True)) | changed
    with pytest.raises(ValueError, match=message):
        layer_norm_gated(**tensors, eps=1e-5)
    if "gate" not in changed:
        del tensors["gate"]
        with pytest.raises(ValueError, match=message):
            layer_norm_mean(**tensors, eps=1e-5)


def test_every_element_is_written(monkeypatch):
    tensors = arguments(3, 7, 5, 21)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *size: new_empty(tensor, *size).fill_(torch.nan))
    assert gated_operator(*tensors, 1e-5).isfinite().all()
    x, _, *others = arguments(3, 70, 15, 21)
    assert mean_operator(x, *others, 1e-5).isfinite().all()


def test_the_number_of_threads_changes_nothing(num_threads):
    x, gate, *others = arguments(3, 70, 15, 37)
    y, mean = layer_norm_gated(x, gate, *others, 1e-5), layer_norm_mean(x, *others, 1e-5)
    torch.set_num_threads(1)
    assert torch.equal(layer_norm_gated(x, gate, *others, 1e-5), y)
    assert torch.equal(layer_norm_mean(x, *others, 1e-5), mean)


def test_nan_stays_visible():
    x, *others = arguments(4, 20)
    x[1, 3] = torch.nan
    assert layer_norm_gated(x, *others, 1e-5).isnan().any(dim=1).tolist() == [False, True, False, False]


def mean_of(x, gate, weight, bias, eps):
    return layer_norm_mean(x, weight, bias, eps)


FUNCTIONS = {"layer_norm_gated": layer_norm_gated, "layer_norm_mean": mean_of}
OF_BOTH = pytest.mark.parametrize("name", FUNCTIONS)


@OF_BOTH
def test_what_runs(name):
    def run(*tensors):
        return FUNCTIONS[name](*tensors, 1e-5)

    def run_backward(*tensors):
        with torch.enable_grad():
            run(*(tensor.detach().requires_grad_() for tensor in tensors)).sum().backward()

    tensors = arguments(2, 3, 4, 20)
    check_kernel_is_chosen(name, run, tensors)
    check_kernel_is_chosen(f"{name}_backward", run_backward, tensors)
    frozen = [tensors[0].requires_grad_(), *(tensor.detach() for tensor in tensors[1:])]
    assert is_run(f"{name}_backward", lambda *tensors: run(*tensors).sum().backward(), frozen)


def test_gradients():
    tensors = [tensor.requires_grad_() for tensor in arguments(3, 20, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: layer_norm_gated(*tensors, 1e-5), tensors)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_vmap():
    """Under `vmap`, `requires_grad` of tensors is False."""
    x, gate, weight, bias = arguments(2, 3, 4, 20)
    x.requires_grad_()

    def loss(x):
        return (torch.func.vmap(lambda x: layer_norm_mean(x[None], weight, bias, 1e-5))(x) * gate[:, :1, 0]).sum()

    gradient = torch.autograd.grad(loss(x), x)[0]
    with use_backend("torch"):
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(x), x)[0])
    assert gradient.abs().max() > 1e-3


def test_operator_registration():
    torch.library.opcheck(gated_operator, (*arguments(4, 20), 1e-5))


@pytest.fixture
def autocast_of_gpus():
    """Enable autocast as `torch.autocast("cuda")` does, which refuses without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


@OF_BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_gpus_changes_no_dtype(autocast_of_gpus, dtype, name):
    """There, PyTorch's LayerNorm returns float32. Fake tensors show it without a GPU."""
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 20, device="cuda", dtype=dtype)
        weight = torch.empty(20, device="cuda")
        assert F.layer_norm(x, (20,), weight, weight).dtype == torch.float32
        assert FUNCTIONS[name](x, x, weight, weight, 1e-5).dtype == dtype


def test_empty_batches():
    x, gate, weight, bias = arguments(0, 5, 4, 20)
    assert layer_norm_gated(x, gate, weight, bias, 1e-5).shape == (0, 5, 4, 20)
    assert layer_norm_mean(x, weight, bias, 1e-5).shape == (0, 20)


def exact_mean(hidden_states, weight, bias, eps):
    hidden_states, weight, bias = (tensor.double() for tensor in (hidden_states, weight, bias))
    return F.layer_norm(hidden_states, weight.shape, weight, bias, eps).mean(dim=(1, 2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(2, 100)),
    seed=st.integers(0, 2**32 - 1),
)
def test_means_of_random_shapes(shape, seed):
    x, _, weight, bias = arguments(*shape, seed=seed)
    error = mean_operator(x, weight, bias, 1e-5) - exact_mean(x, weight, bias, 1e-5)
    assert error.norm() < 1e-6 * (weight.norm() + bias.norm())  # the sum of both may be small


@pytest.mark.parametrize("make_view", STRIDED_MAPS.values(), ids=STRIDED_MAPS)
def test_means_of_strided_maps(make_view):
    x, _, weight, bias = arguments(2, 5, 6, 24)
    x = make_view(x)
    assert torch.equal(layer_norm_mean(x, weight, bias, 1e-5), layer_norm_mean(x.contiguous(), weight, bias, 1e-5))


def test_what_has_no_kernel_is_the_same_in_pytorch():
    x, _, weight, bias = arguments(2, 5, 6, 24)
    expected = layer_norm_mean(x, weight, bias, 1e-5)
    parameters = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = layer_norm_mean(*parameters, 1e-5)
    torch.testing.assert_close(y, expected)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.square().sum(), parameters))


def test_the_mean_of_what_is_no_map_is_refused():
    x, _, weight, bias = arguments(4, 20)
    with pytest.raises(ValueError, match=r"hidden_states must have the shape \(B, H, W, D\), got \(4, 20\)"):
        layer_norm_mean(x, weight, bias, 1e-5)


def test_mean_registration():
    x, _, weight, bias = arguments(2, 3, 4, 20)
    torch.library.opcheck(mean_operator, (x, weight, bias, 1e-5))


def test_a_module_can_be_imported_again(tmp_path, monkeypatch):
    """Notebooks reload edited modules, which defines operators again. A copy, since that frees the old ones."""
    shutil.copytree(Path(evmamba_kernels.__file__).parent, tmp_path / "edited_kernels")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("edited_kernels.layer_norm")
    tensors = arguments(2, 3, 4, 20)
    expected = module.layer_norm_gated(*tensors, 1e-5)
    importlib.reload(module)
    assert torch.equal(module.layer_norm_gated(*tensors, 1e-5), expected)
    torch.library.opcheck(module.gated_operator, (*tensors, 1e-5))


def gradients_of(name, tensors, grad_y):
    """Return the gradients of the operator, and those of PyTorch's in float64. Both are in the tensors' dtypes."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    if name == "layer_norm_mean":
        del tensors[1]
        actual = torch.autograd.grad(layer_norm_mean(*tensors, 1e-5), tensors, grad_y)
        return actual, torch.autograd.grad(exact_mean(*tensors, 1e-5), tensors, grad_y.double())
    actual = torch.autograd.grad(layer_norm_gated(*tensors, 1e-5), tensors, grad_y)
    return actual, torch.autograd.grad(exact(*tensors, 1e-5), tensors, grad_y.double())


def check_gradients(name, tensors, bound):
    x = tensors[0]
    shape = x.shape if name == "layer_norm_gated" else (x.shape[0], x.shape[-1])
    grad_y = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    for actual, expected in zip(*gradients_of(name, tensors, grad_y), strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        # the gradients of a few channels may cancel to nothing
        assert (actual.double() - expected.double()).norm() < bound * max(expected.double().norm(), 0.1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30), st.integers(3, 100)),
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(sorted(FUNCTIONS)),
)
def test_gradients_of_random_shapes(shape, seed, name):
    check_gradients(name, arguments(*shape, seed=seed), 1e-5)


@OF_BOTH
@pytest.mark.parametrize("shape", [(2, 9, 7, 1), (1, 1, 1, 2), (8, 28, 28, 96), (2, 30, 30, 21)], ids=str)
def test_gradients_of_some_shapes(shape, name):
    check_gradients(name, arguments(*shape), 2e-6)


@OF_BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision(dtype, name):
    """Gradients are exact to their rounding, also under autocast, which keeps parameters in float32."""
    x, gate, weight, bias = arguments(2, 15, 17, 40)
    bound = torch.finfo(dtype).eps
    check_gradients(name, [tensor.to(dtype) for tensor in (x, gate, weight, bias)], bound)
    check_gradients(name, [x.to(dtype), gate.to(dtype), weight, bias], bound)


@OF_BOTH
@pytest.mark.parametrize("make_view", STRIDED_MAPS.values(), ids=STRIDED_MAPS)
def test_gradients_of_strided_maps(make_view, name):
    x, gate, *others = arguments(2, 5, 6, 24)
    x, gate = make_view(x), make_view(gate)
    y = FUNCTIONS[name](x, gate, *others, 1e-5)
    grad_y = make_view(torch.randn(2, 5, 6, 24)) if name == "layer_norm_gated" else torch.randn(y.shape)
    expected, _ = gradients_of(name, [x.contiguous(), gate.contiguous(), *others], grad_y.contiguous())
    actual, _ = gradients_of(name, [x, gate, *others], grad_y)
    assert all(map(torch.equal, actual, expected))


def test_gradients_of_gates_of_any_size():
    x, gate, weight, bias = arguments(9, 16)
    gate = torch.linspace(-200, 200, gate.numel()).view_as(gate)
    for actual, expected in zip(*gradients_of("layer_norm_gated", [x, gate, weight, bias], x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_gradient_is_written(monkeypatch):
    x, gate, weight, bias = arguments(3, 70, 15, 21)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda tensor, *size, **options: new_empty(tensor, *size, **options).fill_(torch.nan),
    )
    assert all(each.isfinite().all() for each in gated_bwd_operator(x, x, gate, weight, bias, 1e-5))
    assert all(each.isfinite().all() for each in mean_bwd_operator(x[:, 0, 0], x, weight, bias, 1e-5))


@OF_BOTH
def test_the_number_of_threads_changes_no_gradient(num_threads, name):
    tensors = arguments(3, 70, 15, 37)
    grad_y = torch.ones_like(FUNCTIONS[name](*tensors, 1e-5))
    actual, _ = gradients_of(name, tensors, grad_y)
    torch.set_num_threads(1)
    assert all(map(torch.equal, gradients_of(name, tensors, grad_y)[0], actual))


def test_registration_of_gradients():
    x, gate, weight, bias = (tensor.requires_grad_() for tensor in arguments(2, 3, 4, 20))
    torch.library.opcheck(gated_operator, (x, gate, weight, bias, 1e-5))
    torch.library.opcheck(mean_operator, (x, weight, bias, 1e-5))
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if Version(torch.__version__) < Version("2.11"):
        checks.remove("test_aot_dispatch_dynamic")  # older PyTorch cannot trace a gradient inside of a gradient
    for operator, tensors in (
        (gated_bwd_operator, (gate.detach(), x, gate, weight, bias)),
        (mean_bwd_operator, (gate.detach()[:, 0, 0], x, weight, bias)),
    ):
        torch.library.opcheck(operator, (*tensors, 1e-5), test_utils=checks)
