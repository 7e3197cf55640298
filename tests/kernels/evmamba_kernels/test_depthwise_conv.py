"""Depthwise convolution, activation and mean: CPU kernel and PyTorch operators against float64, and the choice."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from evmamba_kernels import depthwise_conv, depthwise_conv_and_mean, use_backend
from evmamba_kernels.depthwise_conv import ACTIVATIONS, convolution_and_mean_operator, convolution_operator
from golden_values import relative_error
from kernel_choice import check_kernel_is_for_inference, is_run
from strided_maps import STRIDED_MAPS


def arguments(*shape, kernel_size=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape, (shape[-1], 1, kernel_size, kernel_size), shape[-1:])
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def exact(hidden_states, weight, bias, activation):
    """Return the sum of shifted feature maps times their weights."""
    hidden_states, weight = hidden_states.double(), weight.double()
    (_, height, width, _), kernel_size = hidden_states.shape, weight.shape[-1]
    beside = kernel_size // 2
    padded = F.pad(hidden_states, (0, 0, beside, beside, beside, beside))
    y = torch.zeros_like(hidden_states) if bias is None else bias.double()
    for i in range(kernel_size):
        for j in range(kernel_size):
            y = y + weight[:, 0, i, j] * padded[:, i : i + height, j : j + width]
    return ACTIVATIONS[activation](y)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 70)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_shapes(shape, activation, has_bias, seed):
    x, weight, bias = arguments(*shape, seed=seed)
    bias = bias if has_bias else None
    expected = exact(x, weight, bias, activation)
    scale = exact(x.abs(), weight.abs(), bias.abs() if has_bias else None, "none")  # rounding is relative to this
    y, mean = convolution_and_mean_operator(x, weight, bias, activation)
    assert ((y - expected).abs() <= 1e-6 * scale).all()
    assert ((mean - expected.mean(dim=(1, 2))).abs() <= 1e-6 * scale.mean(dim=(1, 2))).all()
    assert torch.equal(convolution_operator(x, weight, bias, activation), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameter_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 11, 37), (1, 1, 15, 16), (3, 6, 1, 5)], ids=str)
def test_maps_of_16_bits(shape, parameter_dtype, dtype):
    """The kernel computes in float32, and rounds once."""
    x, weight, bias = (tensor.to(dtype) for tensor in arguments(*shape))
    weight, bias = weight.to(parameter_dtype or dtype), bias.to(parameter_dtype or dtype)
    expected = exact(x, weight, bias, "gelu")
    y, mean = convolution_and_mean_operator(x, weight, bias, "gelu")
    assert y.dtype == mean.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2
    scale = exact(x.abs(), weight.abs(), bias.abs(), "none")
    assert ((y - expected).abs() <= rounding * expected.abs() + 1e-6 * scale).all()
    mean_of_map = expected.mean(dim=(1, 2))
    assert ((mean - mean_of_map).abs() <= rounding * mean_of_map.abs() + 1e-6 * scale.mean(dim=(1, 2))).all()


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_pytorch_form(activation, kernel_size):
    x, weight, bias = arguments(2, 6, 5, 24, kernel_size=kernel_size)
    with use_backend("torch"):
        y, mean = depthwise_conv_and_mean(x, weight, bias, activation)
        assert torch.equal(depthwise_conv(x, weight, bias, activation), y)
    expected = exact(x, weight, bias, activation)
    assert relative_error(y, expected) < 5e-7
    assert relative_error(mean, expected.mean(dim=(1, 2))) < 1e-6


@pytest.mark.parametrize("make_view", STRIDED_MAPS.values(), ids=STRIDED_MAPS)
def test_strided_maps(make_view):
    x, weight, bias = arguments(2, 5, 9, 24)
    x = make_view(x)
    expected = depthwise_conv(x.contiguous(), weight, bias, "silu")
    assert torch.equal(depthwise_conv(x, weight, bias, "silu"), expected)


def test_the_order_of_the_weight_in_memory_changes_nothing():
    x, weight, bias = arguments(2, 5, 9, 24)
    ordered = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    assert torch.equal(depthwise_conv(x, ordered, bias), depthwise_conv(x, weight, bias))
    assert torch.equal(
        depthwise_conv(x, weight, bias.repeat(2)[::2]), depthwise_conv(x, weight, bias.repeat(2)[::2].clone())
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_of_any_size(activation):
    """Infinities and NaN stay in place, as with PyTorch's activations."""
    x = torch.tensor([torch.nan, torch.inf, -1e30, -200, -1, 0, 1e-30, 1e30]).repeat_interleave(3)[None, None, :, None]
    x[:, :, 0::3] = x[:, :, 2::3] = 0
    weight, bias = torch.zeros(1, 1, 3, 3), torch.zeros(1)
    weight[0, 0, 1, 1] = 1
    y = depthwise_conv(x, weight, bias, activation)[0, 0, 1::3, 0]
    expected = ACTIVATIONS[activation](x[0, 0, 1::3, 0])
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"hidden_states": torch.randn(3, 4, 16)},
            r"hidden_states must have the shape \(B, H, W, D\), got \(3, 4, 16",
        ),
        (
            {"weight": torch.randn(8, 1, 3, 3)},
            r"weight must have the shape \(16, 1, 3, 3\) for hidden_states .* got \(8",
        ),
        ({"weight": torch.randn(16, 1, 5, 3)}, r"weight must have the shape \(16, 1, 3, 3\)"),
        ({"weight": torch.randn(16, 1, 4, 4)}, r"kernel_size\) with an odd size, got \(16, 1, 4, 4\)"),
        ({"weight": torch.tensor(1.0)}, r"kernel_size\) with an odd size, got \(\)"),
        ({"bias": torch.randn(32)}, r"bias must have the shape \(16,\)"),
        ({"bias": torch.randn(16, device="meta")}, "bias must be on cpu, like hidden_states, got meta"),
        ({"activation": "tanh"}, "activation must be one of none, relu, silu, gelu, got 'tanh'"),
    ],
)
@pytest.mark.parametrize("function", [depthwise_conv, depthwise_conv_and_mean])
def test_broken_contracts_are_refused(function, changed, message):
    tensors = dict(zip(("hidden_states", "weight", "bias"), arguments(2, 3, 4, 16), strict=True))
    with pytest.raises(ValueError, match=message):
        function(**tensors | changed)


def test_every_element_is_written(monkeypatch):
    tensors = arguments(3, 70, 15, 37)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *size: new_empty(tensor, *size).fill_(torch.nan))
    assert all(y.isfinite().all() for y in convolution_and_mean_operator(*tensors, "gelu"))


def test_the_number_of_threads_changes_nothing(num_threads):
    tensors = arguments(3, 70, 15, 37)
    y, mean = depthwise_conv_and_mean(*tensors, "gelu")
    torch.set_num_threads(1)
    expected, expected_mean = depthwise_conv_and_mean(*tensors, "gelu")
    assert torch.equal(y, expected) and torch.equal(mean, expected_mean)


def test_nothing_is_read_beside_the_map():
    """The feature map is in the middle of memory that holds NaN."""
    x, weight, bias = arguments(1, 9, 8, 21)
    memory = torch.full((3 * x.numel(),), torch.nan)
    inside = memory[x.numel() : 2 * x.numel()].view_as(x).copy_(x)
    assert torch.equal(depthwise_conv(inside, weight, bias), depthwise_conv(x, weight, bias))


@pytest.mark.parametrize("function", [depthwise_conv, depthwise_conv_and_mean])
def test_what_runs(function):
    check_kernel_is_for_inference(function.__name__, function, arguments(2, 4, 5, 20))
    assert not is_run(function.__name__, function, arguments(2, 4, 5, 20, kernel_size=5))


def test_empty_batches():
    x, weight, bias = arguments(0, 5, 4, 20)
    y, mean = depthwise_conv_and_mean(x, weight, bias, "relu")
    assert y.shape == depthwise_conv(x, weight, bias).shape == (0, 5, 4, 20)
    assert mean.shape == (0, 20)


def test_gradients():
    tensors = [tensor.requires_grad_() for tensor in arguments(2, 3, 4, 5, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: depthwise_conv_and_mean(*tensors, "silu"), tensors)


def test_forward_mode():
    """Derivatives are those of PyTorch operators."""
    x, weight, bias = arguments(2, 5, 6, 24)
    tangent = torch.randn_like(x)
    _, derivative = torch.func.jvp(lambda x: depthwise_conv(x, weight, bias, "silu"), (x,), (tangent,))
    with use_backend("torch"):
        expected = torch.func.jvp(lambda x: depthwise_conv(x, weight, bias, "silu"), (x,), (tangent,))[1]
    torch.testing.assert_close(derivative, expected)
    assert derivative.abs().max() > 0.1


@pytest.mark.parametrize("operator", [convolution_operator, convolution_and_mean_operator])
@pytest.mark.parametrize("has_bias", [True, False])
def test_operator_registration(operator, has_bias):
    x, weight, bias = arguments(2, 3, 4, 20)
    torch.library.opcheck(operator, (x, weight, bias if has_bias else None, "relu"))
