"""LayerNorm with a gate in Triton: against float64, its gradients, and when it computes.

In Triton's interpreter (`make test-triton`) or on a GPU (`make test-gpu`).
"""

import pytest
import torch
import torch.nn.functional as F

from devices import BACKENDS, DEVICE
from evmamba_kernels import layer_norm_gated, use_backend
from golden_values import relative_error
from kernel_choice import is_run
from strided_maps import STRIDED_MAPS


if "triton" not in BACKENDS:
    pytest.skip("runs on a GPU or in Triton's interpreter: make test-gpu, make test-triton", allow_module_level=True)

from evmamba_kernels import layer_norm
from evmamba_kernels.layer_norm import gated_on_gpu_bwd_operator, gated_on_gpu_operator


EPS = 1e-5
NAMES = ["hidden_states", "gate", "weight", "bias"]


def make_arguments(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape, shape, shape[-1:], shape[-1:])
    return [torch.randn(size, generator=generator).to(DEVICE, dtype).requires_grad_() for size in sizes]


def run(function, tensors, grad):
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, grad)]


def ours(*tensors):
    return gated_on_gpu_operator(*tensors, EPS)


def exact(hidden_states, gate, weight, bias):
    return F.layer_norm(hidden_states, weight.shape, weight, bias, EPS) * F.silu(gate)


def check(tensors, bound=2e-6):
    grad = torch.randn_like(tensors[0])
    exact_tensors = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
    expected = run(exact, exact_tensors, grad.cpu().double())
    for name, result, reference in zip(["y", *NAMES], run(ours, tensors, grad), expected, strict=True):
        assert relative_error(result, reference, floor=1e-6) < bound, name
        assert result.is_contiguous(), name


@pytest.mark.parametrize("shape", [(1, 3), (5, 7), (2, 9, 11, 96), (40, 128), (3, 1000), (2, 1024)], ids=str)
def test_shapes(shape):
    check(make_arguments(*shape))


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str)
def test_lower_dtypes(dtype, bound):
    tensors = make_arguments(70, 96, dtype=dtype)
    check(tensors, bound)
    check([*tensors[:2], *(tensor.detach().float().requires_grad_() for tensor in tensors[2:])], bound)


@pytest.mark.parametrize("make_view", STRIDED_MAPS.values(), ids=STRIDED_MAPS)
def test_strided_maps(make_view):
    x, gate, *others = make_arguments(2, 5, 6, 24)
    check([make_view(x.detach()).requires_grad_(), make_view(gate.detach()).requires_grad_(), *others])


def test_half_of_a_projection_is_a_gate():
    x, _, *others = make_arguments(2, 3, 4, 24)
    _, gate = torch.randn(2, 3, 4, 48, device=DEVICE).chunk(2, dim=-1)
    check([x, gate.requires_grad_(), *others])


def test_large_means_and_gates_of_any_size():
    x, gate, *others = make_arguments(8, 50)
    with torch.no_grad():
        x += 1000
        gate.copy_(torch.linspace(-200, 200, gate.numel()).view_as(gate))
    check([x, gate, *others], bound=2e-4)


def test_rows_beside_the_map_count_for_nothing():
    """Padded rows are zeros, whose deviation is zero if eps is zero."""
    tensors = make_arguments(5, 96)
    y = gated_on_gpu_operator(*tensors, 0.0)
    for gradient in torch.autograd.grad(y, tensors, torch.ones_like(y)):
        assert gradient.isfinite().all()


def test_second_derivatives():
    tensors = make_arguments(5, 7)
    gradients = []
    for function, device, dtype in ((ours, DEVICE, torch.float32), (exact, "cpu", torch.float64)):
        copies = [tensor.detach().to(device).to(dtype).requires_grad_() for tensor in tensors]
        first = torch.autograd.grad(function(*copies).square().sum(), copies, create_graph=True)
        gradients.append(torch.autograd.grad(sum(each.square().sum() for each in first), copies))
    for name, result, reference in zip(NAMES, *gradients, strict=True):
        assert relative_error(result, reference) < 1e-5, name


def test_two_runs_give_the_same_bits():
    tensors = make_arguments(100, 96)
    grad = torch.randn_like(tensors[0])
    assert all(map(torch.equal, run(ours, tensors, grad), run(ours, tensors, grad)))


def test_what_runs(monkeypatch):
    def function(*tensors):
        layer_norm_gated(*tensors, EPS)

    def is_ours(tensors):
        return is_run("layer_norm_gated_on_gpu", function, tensors)

    tensors = make_arguments(4, 16)
    with use_backend("triton"):
        assert not is_ours(tensors)
        monkeypatch.setattr(layer_norm, "SMALLEST_MAP_ON_GPU", 4 * 16 * 4)
        assert is_ours(tensors)
        assert not is_ours([tensor.detach().cpu().double() for tensor in tensors])
        x, gate, *others = tensors
        assert not is_ours([x, gate.detach().bfloat16(), *others])
    with use_backend("torch"):
        assert not is_ours(tensors)


def test_only_maps_and_parameters_are_kept(monkeypatch):
    monkeypatch.setattr(layer_norm, "SMALLEST_MAP_ON_GPU", 0)
    tensors = make_arguments(4, 16)
    kept = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        layer_norm_gated(*tensors, EPS)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in tensors]


def test_exported_for_small_and_large_maps(monkeypatch):
    class Norm(torch.nn.Module):
        def forward(self, *tensors):
            return layer_norm_gated(*tensors, EPS)

    monkeypatch.setattr(layer_norm, "SMALLEST_MAP_ON_GPU", 4 * 16 * 100)
    sizes = {0: torch.export.Dim.DYNAMIC}
    small, large = ([tensor.detach() for tensor in make_arguments(rows, 16)] for rows in (7, 300))
    with use_backend("triton"):
        program = torch.export.export(Norm(), tuple(small), dynamic_shapes=((sizes, sizes, None, None),))
        assert relative_error(program.module()(*large), exact(*large)) < 1e-6


def test_operator_registration():
    tensors = make_arguments(4, 20)
    torch.library.opcheck(gated_on_gpu_operator, (*tensors, EPS))
    torch.library.opcheck(gated_on_gpu_bwd_operator, (torch.ones_like(tensors[0]).requires_grad_(), *tensors, EPS))
