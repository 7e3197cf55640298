"""The CPU kernels that parallel tests compile first."""

import re
from pathlib import Path

import evmamba_kernels
from kernel_cache import KERNELS


def test_parallel_tests_share_out_the_compilation_of_every_kernel():
    (folder,) = map(Path, evmamba_kernels.__path__)
    kernels_of_sources = {
        (path.stem, name)
        for path in folder.glob("*numba*.py")
        for name in re.findall(r"def (\w+_jobs)\(pointer\)", path.read_text(encoding="utf-8"))
    }
    assert {(module, name) for module, name, _ in KERNELS} == kernels_of_sources
