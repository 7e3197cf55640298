"""The Triton kernels compiled ahead of time for GPUs that need not be here: nothing may spill out of the registers."""

import pytest

from devices import IS_INTERPRETED


if IS_INTERPRETED:
    pytest.skip("nothing is compiled in Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed, which there are no wheels of for this system")

from benchmarks import triton_report
from benchmarks.triton_report import KERNELS, TARGETS, compile_kernel
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
