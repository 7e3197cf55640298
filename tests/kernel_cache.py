"""The CPU kernels in Numba's cache, which take a minute to compile."""

import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


FEATURE_MAPS = ("float32", "bfloat16", "float16")

# (module, kernel, dtypes of its feature maps), the slowest first
KERNELS = [
    ("atrous_selective_scan_numba", "scan_bwd_jobs", FEATURE_MAPS),
    ("evss_layer_numba", "evss_layer_jobs", FEATURE_MAPS[:1]),
    ("inverted_residual_layer_numba", "inverted_residual_layer_jobs", FEATURE_MAPS[:1]),
    ("atrous_selective_scan_numba", "scan_fwd_jobs", FEATURE_MAPS),
    ("layer_norm_numba_bwd", "gated_bwd_jobs", FEATURE_MAPS),
    ("depthwise_conv_numba", "depthwise_conv_jobs", FEATURE_MAPS),
    ("patch_merging_numba", "patch_merging_jobs", FEATURE_MAPS[:1]),
    ("layer_norm_numba_bwd", "mean_bwd_jobs", FEATURE_MAPS),
    ("layer_norm_numba", "gated_jobs", FEATURE_MAPS),
    ("layer_norm_numba", "mean_jobs", FEATURE_MAPS),
]


def compile_kernels(index: int, count: int) -> None:
    """Compile one of `count` parts of the kernels. The dtypes of a kernel share a file of the cache, and a part."""
    if find_spec("numba") is None:
        return
    import torch

    from evmamba_kernels.numba_threads import compiled_kernel

    for module, name, dtypes in KERNELS[index::count]:
        kernel = getattr(import_module(f"evmamba_kernels.{module}"), name)
        for dtype in dtypes:
            compiled_kernel(kernel, getattr(torch, dtype))


def copy_compiled_kernels(folder: Path) -> None:
    """Put the compiled kernels into a copy of `evmamba_kernels`. Numba takes them if times of the sources agree."""
    if find_spec("numba") is None:
        return
    from evmamba_kernels import numba_threads

    package = Path(numba_threads.__file__).parent
    (folder / "__pycache__").mkdir(exist_ok=True)
    for source in package.glob("*.py"):
        shutil.copystat(source, folder / source.name)
    for file in package.glob(f"__pycache__/*_{numba_threads.digest_of_sources()}-*"):
        shutil.copy2(file, folder / "__pycache__")
