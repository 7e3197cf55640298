"""The operator against golden float64 values, and its contract. Golden values: `tests/golden_values.py`."""

import pytest
import torch

from evmamba_kernels import atrous_selective_scan
from evmamba_kernels.atrous_selective_scan_reference import atrous_selective_scan_reference, group_pixels
from golden_values import load_cases, relative_error


CASES = load_cases("atrous_scan_fp64.safetensors")
ORIGINAL_NAMES = ["x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"]


def golden_arguments(case: dict[str, torch.Tensor], prefix: str = "") -> list[torch.Tensor]:
    """The operator's arguments, or with "grad." their gradients, in its own layout: maps (B, H, W, D), K first."""
    num_groups, channels, _ = case["dt_projs_weight"].shape
    x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D = (case[prefix + name] for name in ORIGINAL_NAMES)
    x = x.permute(0, 2, 3, 1)
    A_log, D = A_log.view(num_groups, channels, -1), D.view(num_groups, channels)
    return [x, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D]


def random_arguments(batch_size, height, width, channels, state_size=4, rank=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        normal(batch_size, height, width, channels),
        normal(4, rank + 2 * state_size, channels) / channels**0.5,
        normal(4, channels, rank) / rank**0.5,
        normal(4, channels) - 2,
        normal(4, channels, state_size).abs(),
        normal(4, channels),
    ]


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
    arguments = random_arguments(*shape, state_size, rank)
    assert relative_error(atrous_selective_scan(*arguments), atrous_selective_scan_reference(*arguments)) < 1e-12


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)], ids=str
)
def test_lower_dtypes_run_the_recurrence_in_float32(dtype, bound):
    arguments = random_arguments(1, 40, 40, 8)
    arguments[0] = arguments[0].to(dtype)
    y = atrous_selective_scan(*[arguments[0], *(argument.float() for argument in arguments[1:])])
    expected = atrous_selective_scan_reference(*[arguments[0].double(), *arguments[1:]])
    assert y.dtype == dtype
    assert relative_error(y.double(), expected) < bound


def test_autocast_leaves_the_recurrence_in_float32():
    arguments = random_arguments(1, 12, 12, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = atrous_selective_scan(*arguments)
    assert torch.equal(y, atrous_selective_scan(*arguments))


def test_extreme_values_stay_finite_and_right():
    arguments = random_arguments(1, 32, 32, 4, dtype=torch.float32)
    arguments[3].uniform_(-20, 50)  # dt_proj_bias
    arguments[4].uniform_(-8, 8)  # A_log
    arguments = [argument.requires_grad_() for argument in arguments]
    y = atrous_selective_scan(*arguments)
    expected = atrous_selective_scan_reference(*(argument.detach().double() for argument in arguments))
    assert relative_error(y.double(), expected) < 1e-5
    for gradient in torch.autograd.grad(y.sum(), arguments):
        assert gradient.isfinite().all()


def test_non_contiguous_and_expanded_maps():
    arguments = random_arguments(2, 7, 6, 5)
    permuted = arguments[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not permuted.is_contiguous()
    assert torch.equal(atrous_selective_scan(permuted, *arguments[1:]), atrous_selective_scan(*arguments))
    expanded = arguments[0][:1].expand(3, -1, -1, -1)
    expected = atrous_selective_scan(expanded.contiguous(), *arguments[1:])
    assert torch.equal(atrous_selective_scan(expanded, *arguments[1:]), expected)


def test_gradcheck():
    arguments = [argument.requires_grad_() for argument in random_arguments(1, 3, 4, 2, state_size=2, rank=1)]
    assert torch.autograd.gradcheck(atrous_selective_scan, arguments)


def test_export_with_dynamic_sizes():
    class Scan(torch.nn.Module):
        def forward(self, u, parameters):
            return atrous_selective_scan(u, *parameters)

    arguments = random_arguments(2, 24, 20, 4, dtype=torch.float32)
    batch, height, width = (torch.export.Dim(name, min=2, max=512) for name in ("batch", "height", "width"))
    sizes = ({0: batch, 1: height, 2: width}, [None] * 5)
    program = torch.export.export(Scan(), (arguments[0], arguments[1:]), dynamic_shapes=sizes)
    for shape in [(2, 24, 20, 4), (3, 101, 67, 4), (2, 2, 3, 4)]:
        u = torch.randn(shape)
        assert relative_error(program.module()(u, arguments[1:]), atrous_selective_scan(u, *arguments[1:])) < 1e-6


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({0: torch.zeros(3, 4, 5)}, ValueError, r"hidden_states must have the shape \(B, H, W, D\)"),
        ({0: torch.zeros(1, 0, 4, 5)}, ValueError, "hidden_states must not be empty"),
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
    arguments = random_arguments(1, 4, 4, 5, state_size=4, rank=2, dtype=torch.float32)
    for index, tensor in changed.items():
        arguments[index] = tensor
    with pytest.raises(error, match=message):
        atrous_selective_scan(*arguments)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'.*torch"):
        atrous_selective_scan(*random_arguments(1, 2, 2, 2), backend="cuda")
