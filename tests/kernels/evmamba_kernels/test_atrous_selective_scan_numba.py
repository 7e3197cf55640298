"""The CPU kernels: vector functions, threads, processes, memory."""

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event, current_thread, main_thread

import numpy as np
import pytest
import torch
from numba import njit

from evmamba_kernels import atrous_selective_scan_numba as kernels
from evmamba_kernels import numba_simd as simd
from evmamba_kernels import numba_threads as threads
from evmamba_kernels.atrous_selective_scan_reference import random_arguments


def arguments(batch_size=2, height=17, width=14, channels=40, state_size=16, rank=3, seed=0):
    """Half of the usual, whose gradients reach 10,000: there, the order of a float32 sum shows."""
    tensors = random_arguments(batch_size, height, width, channels, state_size, rank, seed=seed)
    return [tensor / 2 for tensor in tensors]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PyTorch brings other OpenMP runtimes")
def test_openmp_is_found():
    assert threads.openmp is not None


def apply(function, x: np.ndarray) -> np.ndarray:
    """Apply a function of vectors to an array of any length."""

    @njit
    def loop(x, out):
        for i in range(0, len(x), 16):
            count = min(16, len(x) - i)
            simd.store_first(out, i, function(simd.load_first(x, i, count)), count)

    out = np.full_like(x, np.nan)
    loop(x, out)
    return out


FUNCTIONS = {  # name: exact function, range, bound in units in the last place
    "exp2": (np.exp2, -125.9, 126.0, 2),
    "exp2_by_polynomial": (np.exp2, -125.9, 126.0, 3),
    "exp": (np.exp, -87.3, 87.0, 4),
    "log1p": (np.log1p, 0.0, 1.0, 3),
    "softplus": (lambda x: np.logaddexp(0, x), -87.0, 100.0, 5),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -87.0, 100.0, 5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vector_functions_are_accurate(name):
    exact, low, high, bound = FUNCTIONS[name]
    x = np.linspace(low, high, 1_000_003).astype(np.float32)
    x = np.concatenate([x, np.geomspace(1e-30, high, 10_000).astype(np.float32)]).clip(low, high)
    expected = exact(x.astype(np.float64))
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert (np.abs(apply(getattr(simd, name), x) - expected) / ulp).max() < bound


def test_gelu_is_accurate():
    x = np.linspace(-40, 40, 1_000_003).astype(np.float32)
    expected = x * torch.special.ndtr(torch.from_numpy(x).double()).numpy()
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    assert (np.abs(apply(simd.gelu, x) - expected) < 1e-7 + 5 * ulp).all()


def test_vector_functions_beyond_their_ranges():
    x = np.array([np.nan, -np.inf, -1e30, 1e30, 0], dtype=np.float32)
    assert np.isnan(apply(simd.softplus, x)[0]) and np.isnan(apply(simd.exp2, x)[0])
    np.testing.assert_allclose(apply(simd.softplus, x)[1:], [0, 0, 1e30, np.log(2)], atol=1e-37)
    np.testing.assert_allclose(apply(simd.sigmoid, x)[1:], [0, 0, 1, 0.5], atol=1e-37)
    np.testing.assert_allclose(apply(simd.exp2, x)[2], 0, atol=1e-37)
    np.testing.assert_allclose(apply(simd.gelu, x)[2:], [0, 1e30, 0], atol=1e-37)


def test_lane_sums():
    @njit
    def sums(vectors, out):
        simd.store(out, 0, simd.lane_sums(vectors, 0))

    vectors, out = np.random.default_rng(0).standard_normal(256).astype(np.float32), np.empty(16, np.float32)
    sums(vectors, out)
    np.testing.assert_allclose(out, vectors.reshape(16, 16).sum(axis=1), rtol=1e-5)


def test_the_number_of_threads_changes_nothing(num_threads):
    tensors = arguments()
    torch.set_num_threads(1)
    expected = kernels.forward(*tensors)
    gradients = kernels.backward(expected, *tensors)
    torch.set_num_threads(num_threads)
    assert torch.equal(kernels.forward(*tensors), expected)
    for gradient, single in zip(kernels.backward(expected, *tensors), gradients, strict=True):
        torch.testing.assert_close(gradient, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(9, 7, 21, 5), (1, 1, 1, 1), (40, 35, 33, 16)], ids=str)
def test_kept_states_change_no_bit(sizes, dtype):
    """The largest map has ten chunks. All gradients are those of a backward pass that computes the states."""
    height, width, channels, state_size = sizes
    u, *parameters = arguments(height=height, width=width, channels=channels, state_size=state_size)
    u = u.to(dtype).transpose(1, 2)
    y, states = kernels.forward_keeping_states(u, *parameters)
    assert states.shape == kernels.shape_of_states(u, parameters[3]) and states.dtype == torch.float32
    assert torch.equal(y, kernels.forward(u, *parameters))
    grad = torch.randn(y.shape).to(dtype)
    expected = kernels.backward(grad, u, *parameters)
    strided = torch.stack([states, states], dim=-1)[..., 0]
    for kept in (states, strided):
        assert all(map(torch.equal, kernels.backward_from_states(grad, kept, u, *parameters), expected))


def test_kept_states_are_those_of_the_recurrence(num_threads):
    """Without decay, the state before a chunk is the sum of all earlier inputs. Threads split blocks of channels."""
    tensors = arguments(batch_size=1, height=12, width=14, channels=37)
    u, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, _ = tensors
    A_log[:] = -100
    _, states = kernels.forward_keeping_states(*tensors)
    state_size, rank = A_log.shape[-1], dt_proj_weight.shape[-1]
    u_0 = u[0, ::2, ::2].flatten(0, 1).double()  # the pixels of group 0
    dt, B, _ = (u_0 @ x_proj_weight[0].double().T).split([rank, state_size, state_size], dim=-1)
    delta = torch.nn.functional.softplus(dt @ dt_proj_weight[0].double().T + dt_proj_bias[0].double())
    added = torch.einsum("td,tn->tnd", delta * u_0, B)
    assert kernels.CHUNK_LENGTH < len(added) < 2 * kernels.CHUNK_LENGTH
    assert not states[:, :, 0].any()
    actual = states[0, 0, 1].transpose(0, 1).flatten(1)[:, :37]  # (N, D)
    torch.testing.assert_close(actual.double(), added[: kernels.CHUNK_LENGTH].sum(dim=0), rtol=1e-5, atol=1e-6)


def test_every_element_is_written(monkeypatch):
    """Allocated memory holds NaN, so an output that is not written shows."""
    tensors = arguments(height=9, width=7, channels=21, state_size=5)
    new_empty = torch.Tensor.new_empty

    def poisoned(tensor, *size, **options):
        return new_empty(tensor, *size, **options).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    y = kernels.forward(*tensors)
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in kernels.backward(y, *tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_lower_dtypes_are_rounded_once(dtype):
    """The kernel reads both maps in their dtype. Only the gradient of the map is rounded."""
    u, *parameters = arguments()
    u, grad = u.to(dtype), torch.randn(u.shape).to(dtype)
    expected = kernels.backward(grad.float(), u.float(), *parameters)
    actual = kernels.backward(grad, u, *parameters)
    assert torch.equal(actual[0], expected[0].to(dtype))
    assert all(map(torch.equal, actual[1:], expected[1:]))


def test_several_python_threads_at_once(num_threads):
    calls = [arguments(seed=seed) for seed in range(12)]
    expected = [kernels.forward(*tensors) for tensors in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for y, single in zip(pool.map(lambda tensors: kernels.forward(*tensors), calls), expected, strict=True):
                assert torch.equal(y, single)


def leave_all_jobs(pointer):
    pass


def test_undone_jobs_are_an_error(num_threads):
    """A kernel cannot raise. It returns early if it gets no memory."""
    do_nothing = threads.compiled_kernel(leave_all_jobs, torch.float32)
    with pytest.raises(MemoryError, match="finished 0 of 8 jobs"):
        threads.run_jobs(do_nothing, kernels.SCAN_FWD_WORK, {"num_jobs": 8})
    assert kernels.forward(*arguments()).isfinite().all()


@pytest.fixture
def own_threads(monkeypatch):
    """Use two threads, one of them new and of this package."""
    monkeypatch.setattr(threads, "openmp", None)
    monkeypatch.setattr(threads, "calls", SimpleQueue())
    monkeypatch.setattr(threads, "workers", [])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_an_interrupt_frees_no_memory_in_use(own_threads):
    """Ctrl-C ends the calling thread while another still computes. Its memory must stay until that thread is done."""
    computing, interrupted, finished = Event(), Event(), Event()
    counters = []

    def do_jobs(pointer):
        if current_thread() is main_thread():
            computing.wait(10)
            raise KeyboardInterrupt
        computing.set()
        interrupted.wait(10)
        counters.extend(np.ctypeslib.as_array((ctypes.c_int64 * 3).from_address(pointer)).tolist())
        finished.set()

    u = torch.zeros(4)
    memory = weakref.ref(u)
    with pytest.raises(KeyboardInterrupt):
        threads.run_jobs(do_jobs, kernels.SCAN_FWD_WORK, {"num_jobs": 8, "u": u})
    del u
    gc.collect()
    assert memory() is not None
    interrupted.set()
    assert finished.wait(10)
    assert counters == [8, 0, 8]  # no further job is claimed
    for _ in range(100):
        if memory() is None:
            break
        time.sleep(0.01)
    assert memory() is None


def test_a_thread_that_cannot_start_is_tried_again(own_threads, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threads.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            kernels.forward(*arguments())
    assert kernels.forward(*arguments()).isfinite().all()


@pytest.mark.slow
def test_the_form_for_processors_without_avx512():
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_atrous_selective_scan_numba import arguments, kernels, simd
from evmamba_kernels import atrous_selective_scan
assert not simd.HAS_AVX512
tensors = arguments()
y = kernels.forward(*tensors)
gradients = kernels.backward(y, *tensors)
exact = [tensor.double().requires_grad_() for tensor in tensors]
expected = atrous_selective_scan(*exact)
torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-6)
for gradient, exact_gradient in zip(gradients, torch.autograd.grad(expected, exact, y.double()), strict=True):
    torch.testing.assert_close(gradient, exact_gradient.float(), rtol=1e-4, atol=1e-4)

from evmamba_kernels import depthwise_conv_and_mean, layer_norm_gated, layer_norm_mean, use_backend
x, weight, bias = torch.randn(2, 9, 15, 40), torch.randn(40, 1, 3, 3), torch.randn(40)
def others():
    for activation in ("none", "relu", "silu", "gelu"):
        yield from depthwise_conv_and_mean(x, weight, bias, activation)
    yield layer_norm_gated(x, x, bias, bias, 1e-5)
    yield layer_norm_mean(x, bias, bias, 1e-5)
results = list(others())
with use_backend("torch"):
    torch.testing.assert_close(results, list(others()), rtol=1e-5, atol=1e-5)
"""
    command = [sys.executable, "-c", script, os.path.dirname(__file__)]
    variables = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_computes_as_its_parent():
    script = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from test_atrous_selective_scan_numba import arguments, kernels
torch.set_num_threads(2)
tensors = arguments()
expected = kernels.forward(*tensors)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(kernels.forward(*tensors), expected) else 1)
_, status = os.waitpid(child, 0)
assert torch.equal(kernels.forward(*tensors), expected)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    command = [sys.executable, "-c", script, os.path.dirname(__file__)]
    assert subprocess.run(command, timeout=120).returncode == 0


def test_data_loader_workers_compute():
    """A data loader forks workers in a process whose threads are already running."""
    torch.set_num_threads(2)
    expected = kernels.forward(*arguments(seed=3))
    loader = torch.utils.data.DataLoader(ScannedMaps(), batch_size=None, num_workers=2)
    outputs = list(loader)
    torch.set_num_threads(1)
    assert len(outputs) == 6
    assert torch.equal(outputs[3], expected)


class ScannedMaps(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, seed):
        return kernels.forward(*arguments(seed=seed))


def test_compiled_code_is_cached_on_disk():
    """One compilation serves all shapes. A second process loads it from the disk."""
    kernels.forward(*arguments())
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_atrous_selective_scan_numba import arguments, kernels, threads
kernels.forward(*arguments())
print(threads.compiled_kernel(kernels.scan_fwd_jobs, torch.float32).kernel.cache_hits)
"""
    command = [sys.executable, "-c", script, os.path.dirname(__file__)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "1", run.stderr


# runs in a directory with a copy of the kernels
USE_CACHE = """
import torch
from evmamba_kernels import layer_norm_mean, layer_norm_numba
from evmamba_kernels.numba_threads import compiled_kernel
x, weight, bias = torch.randn(1, 3, 2, 20), torch.randn(20), torch.randn(20)
expected = torch.nn.functional.layer_norm(x, (20,), weight, bias).mean(dim=(1, 2))
torch.testing.assert_close(layer_norm_mean(x, weight, bias, 1e-5), expected)
print(compiled_kernel(layer_norm_numba.mean_jobs, torch.float32).kernel.cache_hits)
"""


def use_cache(folder: Path) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", USE_CACHE]
    run = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def used_copy(tmp_path_factory) -> Path:
    """A directory with a copy of the kernels, and what it has compiled."""
    folder = tmp_path_factory.mktemp("copy")
    sources = Path(kernels.__file__).parent
    shutil.copytree(sources, folder / "evmamba_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    assert use_cache(folder).stdout == "0\n"
    return folder


@pytest.mark.slow
def test_a_change_of_any_source_is_compiled(used_copy):
    assert use_cache(used_copy).stdout == "1\n"
    with (used_copy / "evmamba_kernels" / "numba_simd.py").open("a") as file:
        file.write("# a change\n")
    assert use_cache(used_copy).stdout == "0\n"


@pytest.mark.slow
def test_a_cache_that_cannot_be_used_costs_time_only(used_copy):
    contents = {file: file.read_bytes() for file in (used_copy / "cache").rglob("*mean_jobs*.nbc")}
    for file in contents:
        file.write_bytes(b"")  # as after a power loss
    run = use_cache(used_copy)
    for file, content in contents.items():
        file.write_bytes(content)
    assert run.stdout == "0\n"
    assert "the compiled CPU kernel mean_jobs cannot be cached, so every process compiles it again" in run.stderr
