"""The Triton kernels compiled ahead of time for GPUs that need not be here: nothing may spill out of the registers."""

from types import SimpleNamespace

import pytest
import torch

from devices import IS_INTERPRETED


if IS_INTERPRETED:
    pytest.skip("nothing is compiled in Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed, which there are no wheels of for this system")

import triton
from triton.backends.compiler import GPUTarget

from benchmarks import triton_report
from benchmarks.triton_report import KERNELS, TARGETS, compile_kernel
from evmamba_kernels import atrous_selective_scan_triton as kernels
from evmamba_kernels import layer_norm_triton
from evmamba_kernels.layer_norm import LARGEST_CHANNELS_ON_GPU


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_spills(kernel, target, capsys):
    report = compile_kernel(kernel, target)
    with capsys.disabled():
        print(
            f"\n{kernel} on {target}: {report.registers} registers, {report.shared_bytes} bytes of shared memory, "
            f"{report.spilled_bytes} bytes spilled",
            end=" ",
        )
    assert report.spilled_bytes == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kernel", ["scan", "adjoint", "gated_backward"])
def test_nothing_spills_in_lower_dtypes(kernel, dtype):
    assert compile_kernel(kernel, "sm_90", dtype).spilled_bytes == 0


def test_nothing_spills_with_the_most_channels(monkeypatch):
    monkeypatch.setattr(triton_report, "NORM_CHANNELS", LARGEST_CHANNELS_ON_GPU)
    assert compile_kernel("gated_backward", "sm_90").spilled_bytes == 0


@pytest.mark.parametrize("state_size, rank", [(1, 1), (64, 12)])
def test_nothing_spills_with_other_sizes(state_size, rank):
    assert compile_kernel("scan", "sm_90", state_size=state_size, rank=rank).spilled_bytes == 0


def test_a_state_takes_one_exponential_and_no_shuffle():
    """States lie in the registers of one thread. 2 of 32 exponentials are those of softplus and its division."""
    report = compile_kernel("scan", "sm_90")
    assert 1 <= report.per_state("exp") < 1.1
    assert report.loop["shuffle"] == report.loop["local"] == 0


@pytest.fixture
def launches():
    """Triton with a driver of an H100 that loads and launches nothing: kernels are compiled as the host asks for them.
    A list of what would have been launched."""
    launched = []

    class IdleLauncher:
        launch_cooperative_grid = False

        def __init__(self, source, metadata):
            self.name = metadata.name

        def __call__(self, *_):
            launched.append(self.name)

    utils = SimpleNamespace(
        get_device_properties=lambda _: {"multiprocessor_count": 132, "max_shared_mem": 232448},
        load_binary=lambda *_: (0, 0, 0, 0, 1024),  # module, function, registers, spills, threads
    )
    driver = SimpleNamespace(
        utils=utils,
        launcher_cls=IdleLauncher,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(driver)
    kernels.describe_device.cache_clear()
    yield launched
    vars(triton.runtime.driver).update(before)
    kernels.describe_device.cache_clear()


ONE_CHUNK = ["project", "scan", "project", "states", "adjoint", "unproject", "weight"]
CHUNKS = [
    *("project", "states", "carry", "scan"),
    *("project", "states", "carry", "chunk_adjoints", "carry", "adjoint", "unproject", "weight"),
]


@pytest.mark.parametrize(
    "shape, dtype, expected",
    [((1, 1, 1, 1), torch.float32, ONE_CHUNK), ((2, 9, 11, 40), torch.bfloat16, CHUNKS)],
    ids=["one pixel", "chunks"],
)
def test_what_the_host_asks_for_compiles(launches, shape, dtype, expected):
    """Triton makes code of its own for arguments that are 1, and for those that 16 divides."""
    channels, state_size, rank = shape[-1], 2, 1
    sizes = [(rank + 2 * state_size, channels), (channels, rank), (channels,), (channels, state_size), (channels,)]
    u, *parameters = [torch.randn(shape, dtype=dtype), *(torch.randn(4, *size) for size in sizes)]
    for arguments in ([u, *parameters], [u.transpose(1, 2), *parameters]):
        launches.clear()
        y = kernels.forward(*arguments)
        gradients = kernels.backward(y, *arguments)
        assert launches == [f"{name}_kernel" for name in expected]
        assert [gradient.shape for gradient in gradients] == [argument.shape for argument in arguments]

    launches.clear()
    norm = [u, u, torch.randn(channels), torch.randn(channels), 1e-5]
    layer_norm_triton.gated_backward(layer_norm_triton.gated(*norm), *norm)
    assert launches == ["gated_kernel", "gated_backward_kernel"]
