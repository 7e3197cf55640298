"""Numbers of threads for the tests of the CPU kernels."""

import pytest
import torch


@pytest.fixture(params=["1 thread", "2 of OpenMP", "7 of OpenMP", "2 of our own", "7 of our own"])
def num_threads(request, monkeypatch):
    threads = pytest.importorskip(
        "evmamba_kernels.numba_threads", reason="needs numba: pip install numba", exc_type=ImportError
    )
    number = int(request.param.split()[0])
    if "OpenMP" in request.param and threads.openmp is None:
        pytest.skip("this PyTorch computes without an OpenMP runtime that has GNU's interface")
    if "own" in request.param:
        monkeypatch.setattr(threads, "openmp", None)
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield number
    torch.set_num_threads(before)
