"""The Triton kernels beyond the operator's contract: memory, chunks, blocks of states, offsets, functions.

In Triton's interpreter (`make test-triton`) or on a GPU (`make test-gpu`).
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from devices import BACKENDS, DEVICE, IS_INTERPRETED, sized
from evmamba_kernels.atrous_selective_scan_reference import atrous_selective_scan_reference, random_arguments
from golden_values import load_cases, relative_error


if "triton" not in BACKENDS:
    pytest.skip("runs on a GPU or in Triton's interpreter: make test-gpu, make test-triton", allow_module_level=True)

import triton
import triton.language as tl

from evmamba_kernels import atrous_selective_scan_triton as kernels
from evmamba_kernels import atrous_selective_scan_triton_fwd as triton_functions


CASES = load_cases("atrous_scan_fp64.safetensors")
NAMES = ["hidden_states", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D"]


def make_arguments(batch_size, height, width, channels, state_size=2, rank=2):
    return random_arguments(batch_size, height, width, channels, state_size, rank, device=DEVICE)


def run(arguments, grad):
    return [kernels.forward(*arguments), *kernels.backward(grad, *arguments)]


def run_reference(arguments, grad):
    """Return the exact results, in float64 on the CPU."""
    exact = [argument.cpu().double().requires_grad_() for argument in arguments]
    y = atrous_selective_scan_reference(*exact)
    return [y.detach(), *torch.autograd.grad(y, exact, grad.cpu().double())]


def assert_close(results, expected, bound=2e-6):
    for name, result, exact in zip(["y", *NAMES], results, expected, strict=True):
        assert relative_error(result, exact, floor=1e-6) < bound, name
        assert result.is_contiguous(), name  # like the fake tensors that compilers see


@pytest.mark.parametrize("name", CASES)
def test_golden_values_and_gradients(name):
    case = CASES[name]
    num_groups, channels, _ = case["dt_projs_weight"].shape
    if IS_INTERPRETED and case["x"].numel() > 600:
        pytest.skip("too large for the interpreter")

    def in_our_layout(prefix):
        names = ("x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
        x, *parameters, A_log, D = (case[prefix + name] for name in names)
        return [x.permute(0, 2, 3, 1), *parameters, A_log.view(num_groups, channels, -1), D.view(num_groups, channels)]

    y, grad_y = (case[key].permute(0, 2, 3, 1) for key in ("y", "grad_y"))
    results = run([argument.float().to(DEVICE) for argument in in_our_layout("")], grad_y.float().to(DEVICE))
    assert_close(results, [y, *in_our_layout("grad.")])


@pytest.fixture(params=[1, 3, 100], ids=["one chunk", "three chunks", "chunks of a tile"])
def prepare(request, monkeypatch):
    """Return arguments whose sequences take the given number of chunks, or one chunk per tile."""

    def make(*sizes, **more_sizes):
        arguments = make_arguments(*sizes, **more_sizes)
        make_plan = kernels.make_plan

        def make_plan_in_chunks(*maps, **options):
            plan = make_plan(*maps, **options)
            chunk_tiles = triton.cdiv(plan.num_tiles, request.param)
            return plan._replace(chunk_tiles=chunk_tiles, num_chunks=triton.cdiv(plan.num_tiles, chunk_tiles))

        monkeypatch.setattr(kernels, "make_plan", make_plan_in_chunks)
        plan = kernels.make_plan(arguments[0], is_backward=True)
        assert plan.num_chunks == min(request.param, plan.num_tiles)
        return arguments

    return make


@pytest.mark.parametrize(
    "batch_size, forward_chunks, backward_chunks", [(1, 49, 49), (16, 7, 8), (64, 1, 2), (128, 1, 1)]
)
def test_chunks_fill_the_device(monkeypatch, batch_size, forward_chunks, backward_chunks):
    """A device such as an H100 fits 1452 programs of scan_fwd_kernel, and 1056 of scan_bwd_kernel."""
    config = kernels.Config(
        states=16,
        forward_tile=8,
        forward_channels=32,
        backward_tile=8,
        backward_channels=64,
        projected_steps=64,
        precision="ieee",
        forward_programs=11,
        backward_programs=8,
    )
    monkeypatch.setattr(kernels, "find_config", lambda _: config)
    monkeypatch.setattr(kernels, "CHUNK_COST", 1 / 16)
    monkeypatch.setattr(kernels, "describe_device", lambda _: kernels.Device("cuda", 32, 90, multiprocessors=132))
    u = torch.empty(batch_size, 56, 56, 96, device="meta")
    assert kernels.make_plan(u).num_chunks == forward_chunks
    assert kernels.make_plan(u, is_backward=True).num_chunks == backward_chunks


@pytest.mark.parametrize("shape", [(1, 9, 8, 3), (2, 3, 11, 9)], ids=str)
def test_chunks_change_nothing(prepare, shape):
    arguments = prepare(*shape)
    grad = torch.randn_like(arguments[0])
    assert_close(run(arguments, grad), run_reference(arguments, grad))


def test_states_that_decay_through_many_chunks(prepare):
    """Some products of decays underflow in float32, and some states do not decay."""
    arguments = prepare(1, 9, 8, 3)
    arguments[3] += torch.tensor([-12.0, 0.0, 12.0], device=DEVICE)  # dt_proj_bias
    arguments[4] *= 5  # A_log
    grad = torch.randn_like(arguments[0])
    assert_close(run(arguments, grad), run_reference(arguments, grad), bound=5e-6)


def test_every_element_is_written(prepare, monkeypatch):
    """Allocated memory holds NaN, so memory that is not written, or read before it is written, shows."""
    arguments = prepare(1, 9, 8, 9)  # three chunks: of two, two and one tile in the interpreter
    grad = torch.randn_like(arguments[0])
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda tensor, *size, **options: new_empty(tensor, *size, **options).fill_(torch.nan),
    )
    monkeypatch.setattr(torch, "empty_like", lambda tensor: empty_like(tensor).fill_(torch.nan))
    for result in run(arguments, grad):
        assert result.isfinite().all()


@pytest.mark.parametrize("state_size", [1, 3])
def test_states_that_do_not_fit_at_once(prepare, monkeypatch, state_size):
    device = kernels.describe_device(DEVICE)
    key = next(key for key, config in kernels.CONFIGS.items() if config is kernels.find_config(device))
    monkeypatch.setitem(kernels.CONFIGS, key, kernels.CONFIGS[key]._replace(states=2))
    arguments = prepare(1, 5, 5, 2, state_size=state_size)
    arguments[0] = arguments[0].bfloat16()
    grad = torch.randn_like(arguments[0])
    results, expected = run(arguments, grad), run_reference(arguments, grad)
    # one rounding to bfloat16, not one per block of states
    assert relative_error(results[0], expected[0]) < 4e-3
    for name, result, exact in zip(NAMES[1:], results[2:], expected[2:], strict=True):
        assert relative_error(result, exact, floor=1e-6) < 2e-6, name


def test_backward_keeps_few_states(monkeypatch):
    """It keeps states between segments, and between the tiles of one segment, but not between all tiles."""
    state_size, channels = 3, 5
    arguments = make_arguments(1, *sized((56, 56), (24, 16)), channels, state_size=state_size)
    monkeypatch.setattr(kernels, "CHUNK_COST", math.inf)
    plan = kernels.make_plan(arguments[0], is_backward=True)
    assert plan.num_chunks == 1
    rows = []
    new_buffer = kernels.new_buffer

    def record(like, *shape):
        if shape[:3] == (1, kernels.NUM_GROUPS, plan.num_chunks) and shape[-1] == channels:  # of each group and chunk
            rows.append(math.prod(shape[3:-1]))
        return new_buffer(like, *shape)

    monkeypatch.setattr(kernels, "new_buffer", record)
    kernels.backward(torch.ones_like(arguments[0]), *arguments)
    assert max(rows) > state_size
    assert sum(rows) < 0.7 * plan.num_tiles * state_size


def test_offsets_of_64_bits(monkeypatch):
    """The code for feature maps beyond 2^31 elements runs on a small one. `make test-gpu` has a large one."""
    arguments = make_arguments(1, 5, 6, 3)
    grad = torch.randn_like(arguments[0])
    narrow = run(arguments, grad)
    make_plan = kernels.make_plan
    monkeypatch.setattr(
        kernels, "make_plan", lambda *maps, **options: make_plan(*maps, **options)._replace(is_wide=True)
    )
    for wide, result in zip(run(arguments, grad), narrow, strict=True):
        assert torch.equal(wide, result)


def test_large_strides_ask_for_offsets_of_64_bits():
    u = torch.empty_strided((1, 2, 2, 8), (2**33, 2**32, 8, 1), device="meta")
    device = kernels.describe_device(DEVICE)
    assert kernels.find_config(device)
    assert kernels.make_plan(torch.empty(1, 4, 4, 8, device=DEVICE)).is_wide is False
    assert kernels.make_plan(u).is_wide


def test_too_many_images_are_refused():
    with pytest.raises(ValueError, match="up to 16383 images at once, got 16384: split them"):
        kernels.make_plan(torch.empty(2**14, 1, 1, 1, device="meta"))


def test_devices_without_a_configuration_are_refused():
    with pytest.raises(ValueError, match="no configuration for abacus with 7 lanes: choose the backend 'torch'"):
        kernels.find_config(kernels.Device("abacus", 7, 0, 1))


@triton.jit
def apply_kernel(x, softplus, sigmoid, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x + o_x)
    tl.store(softplus + o_x, triton_functions.softplus(b_x))
    tl.store(sigmoid + o_x, triton_functions.sigmoid(b_x))


def test_softplus_and_sigmoid_are_accurate():
    positive = torch.logspace(-30, 2, 2**14)
    x = torch.cat([-positive.clamp(max=80), torch.linspace(-80, 100, 2**15), positive]).to(DEVICE)
    softplus, sigmoid = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    apply_kernel[(len(x) // 1024,)](x, softplus, sigmoid, BLOCK=1024)
    exact = x.cpu().double()
    for result, expected in [(softplus, torch.logaddexp(exact, exact * 0)), (sigmoid, torch.sigmoid(exact))]:
        # ex2 is within 2 units in the last place on GPUs, and its argument is rounded: |x| half units more
        bound = 2e-6 + 1e-7 * exact.abs()
        assert ((result.cpu().double() - expected).abs() / expected < bound).all()


def test_softplus_beyond_its_range():
    x = torch.tensor([-torch.inf, -1000.0, 1000.0, torch.nan] * 256, device=DEVICE)
    softplus, sigmoid = torch.empty_like(x), torch.empty_like(x)
    apply_kernel[(1,)](x, softplus, sigmoid, BLOCK=1024)
    assert softplus[:3].tolist() == [0, 0, 1000] and softplus[3].isnan()
    assert sigmoid[:3].tolist() == [0, 0, 1] and sigmoid[3].isnan()


def test_old_versions_of_triton_are_refused():
    script = """
import sys, torch, triton
triton.__version__ = "3.2.0"
import evmamba_kernels
evmamba_kernels.choose_backend(sys.argv[1], torch.float32, "triton")
"""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, DEVICE.type]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert "need triton 3.4 or newer, found 3.2.0: install a newer PyTorch" in run.stderr
