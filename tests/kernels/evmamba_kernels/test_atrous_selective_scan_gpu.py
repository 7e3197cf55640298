"""Tests of the operator on a CUDA GPU, beyond the tests of all backends: `make test-gpu`."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from devices import DEVICE
from evmamba_kernels import atrous_selective_scan
from evmamba_kernels.atrous_selective_scan_reference import random_arguments
from golden_values import relative_error


if DEVICE.type != "cuda":
    pytest.skip("runs on a CUDA GPU: make test-gpu", allow_module_level=True)


def make_arguments(batch_size, height, width, channels, state_size=16, rank=3, dtype=torch.float32, seed=0):
    arguments = random_arguments(
        batch_size, height, width, channels, state_size, rank, dtype=dtype, device=DEVICE, seed=seed
    )
    return [argument.requires_grad_() for argument in arguments]


def run(arguments, grad, backend="triton", function=atrous_selective_scan):
    y = function(*arguments, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, arguments, grad)]


# stages 1 and 2 of T, S and B at 224 x 224, odd sides, and a high resolution
SHAPES = [
    (1, 56, 56, 96),
    (128, 56, 56, 96),
    (1, 28, 28, 192),
    (16, 56, 56, 128),
    (16, 28, 28, 256),
    (16, 56, 56, 192),
    (16, 28, 28, 384),
    (3, 57, 31, 100),
    (1, 257, 255, 96),
]
BOUNDS = {torch.float32: (2e-6, 2e-5), torch.bfloat16: (4e-3, 8e-3), torch.float16: (1e-3, 2e-3)}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_of_networks_against_float64(shape, dtype):
    arguments = make_arguments(*shape, dtype=dtype)
    grad = torch.randn_like(arguments[0])
    results = run(arguments, grad)
    # image by image, and summed, since float64 does not fit into memory all at once
    exact = [argument.detach().double().requires_grad_() for argument in arguments]
    for i in range(shape[0]):
        y = atrous_selective_scan(exact[0][i : i + 1], *exact[1:], backend="torch")
        y.backward(grad[i : i + 1].double())
        assert relative_error(results[0][i : i + 1], y.detach()) < BOUNDS[dtype][0]
    for result, argument in zip(results[1:], exact, strict=True):
        assert relative_error(result, argument.grad, floor=1e-6) < BOUNDS[dtype][1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_runs_give_the_same_bits(shape):
    arguments = make_arguments(*shape)
    grad = torch.randn_like(arguments[0])
    for first, second in zip(run(arguments, grad), run(arguments, grad), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(1, 4736, 4737, 96), (48, 1184, 1184, 32)], ids=["one image", "many images"])
def test_maps_beyond_2_to_the_31_elements(shape):
    """The last image, and its last rows, match separate calls. bfloat16 and N = 1 fit into 80 GB."""
    arguments = make_arguments(*shape, state_size=1, rank=1, dtype=torch.bfloat16)
    needed = 20 * arguments[0].numel()
    free, _ = torch.cuda.mem_get_info()
    assert arguments[0].numel() >= 2**31
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    y, grad_u, *_ = run(arguments, arguments[0].detach())
    u, *parameters = (argument.detach() for argument in arguments)
    if shape[0] > 1:
        alone = u[-1:].clone().requires_grad_()
        expected = atrous_selective_scan(alone, *parameters, backend="triton")
        assert torch.equal(y[-1:], expected)
        (expected_grad,) = torch.autograd.grad(expected, alone, u[-1:])
        assert relative_error(grad_u[-1:], expected_grad) < 1e-5  # other chunks: few elements round differently
    else:
        # channels only mix in the projection: with all others zero, the first 4 scan like a separate feature map
        few = torch.zeros_like(parameters[0])
        few[..., :4] = parameters[0][..., :4]
        y = atrous_selective_scan(u, few, *parameters[1:], backend="triton")[..., :4]
        narrow = [u[..., :4].contiguous(), few[..., :4], *(parameter[:, :4] for parameter in parameters[1:])]
        expected = atrous_selective_scan(*narrow, backend="triton")
        assert relative_error(y, expected) < 1e-3
        assert relative_error(y[:, -9:], expected[:, -9:]) < 1e-3


def test_in_a_cuda_graph():
    arguments = make_arguments(2, 28, 28, 96)
    grad = torch.randn_like(arguments[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(arguments, grad)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = run(arguments, grad)
    with torch.no_grad():
        arguments[0].copy_(torch.randn_like(arguments[0]))
    graph.replay()
    torch.cuda.synchronize()
    for result, expected in zip(results, run(arguments, grad), strict=True):
        assert torch.equal(result, expected)


def test_on_several_streams():
    streams = [torch.cuda.Stream() for _ in range(2)]
    problems = [make_arguments(4, 56, 56, 96, seed=seed) for seed in range(2)]
    expected = [run(arguments, arguments[0].detach()) for arguments in problems]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, arguments in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(arguments, arguments[0].detach()))
        torch.cuda.synchronize()
        for of_stream, alone in zip(results, expected, strict=True):
            assert all(map(torch.equal, of_stream, alone))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    arguments = make_arguments(1, 14, 14, 96)
    moved = [argument.detach().to("cuda:1").requires_grad_() for argument in arguments]
    grad = torch.randn_like(arguments[0])
    for result, expected in zip(run(moved, grad.to("cuda:1")), run(arguments, grad), strict=True):
        assert torch.equal(result.to(DEVICE), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_by_torch(dtype):
    arguments = make_arguments(2, 15, 14, 96, dtype=dtype)
    grad = torch.randn_like(arguments[0])
    compiled = torch.compile(atrous_selective_scan, fullgraph=True)
    for result, expected in zip(run(arguments, grad, function=compiled), run(arguments, grad), strict=True):
        assert torch.equal(result, expected)


def test_under_autocast():
    arguments = make_arguments(1, 15, 14, 96)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = atrous_selective_scan(*arguments, backend="triton")
    assert torch.equal(y, atrous_selective_scan(*arguments, backend="triton"))


def test_compute_sanitizer_finds_nothing():
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not installed")
    script = """
import sys
from test_atrous_selective_scan_gpu import make_arguments, run
for shape in [(1, 57, 31, 100), (3, 5, 8, 33)]:
    arguments = make_arguments(*shape)
    run(arguments, arguments[0].detach())
"""
    # PyTorch's memory pool would hide an access to the neighbor
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path]),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script]
        run_ = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
        assert run_.returncode == 0, run_.stdout[-4000:] + run_.stderr[-4000:]
