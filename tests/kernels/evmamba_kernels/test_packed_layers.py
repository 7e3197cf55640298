"""Layers in lower precision: products and whole layers against float64, also on processors without the units."""

import importlib
import json
import os
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from evmamba_kernels import atrous_selective_scan, numba_simd, use_backend
from evmamba_kernels import numba_products as products
from evmamba_kernels.layer_parameters import EVSSParameters, InvertedResidualParameters, PatchMergingParameters
from evmamba_kernels.numba_simd import NONE, float_pointer
from evmamba_kernels.numba_threads import allocate
from evmamba_kernels.packed_layers import pack_layer
from golden_values import relative_error


DTYPES = (torch.bfloat16, torch.int8)


@njit(boundscheck=False, error_model="numpy")
def fill_and_multiply(table, x, out, num_rows, memory):
    linear = products.linear_at(table, 0)
    tile = products.tile_at(memory, num_rows, linear.in_features)
    for row in range(num_rows):
        products.fill_row(tile, row, float_pointer(x), row * linear.in_features, linear)
    blocks = products.all_blocks(linear)
    products.write_linear(tile, num_rows, linear, blocks, NONE, float_pointer(out), 0, linear.out_features)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    table = products.Table(products.pack_linear(weight, bias, dtype))
    out = torch.full((len(x), len(weight)), torch.nan)
    (memory,) = allocate([products.tile_bytes(*x.shape)])
    memory.fill_(255)  # NaN in each dtype
    fill_and_multiply(table.entries.numpy(), x.data_ptr(), out.data_ptr(), len(x), memory.data_ptr())
    return out


def quantized_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the rows of x after quantization to 255 steps between their least and largest numbers, in float64."""
    least, largest = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    scale = ((largest - least) * torch.tensor(1 / 255)).double()
    return ((x.double() - least) / scale.clamp(min=1e-30)).round() * scale + least


def quantized_columns(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round().double() * scale.double()


def random_linear(num_rows: int, in_features: int, out_features: int, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(size) for size in ((num_rows, in_features), (out_features, in_features), (out_features,))]


SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 130), st.integers(1, 200))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=SHAPES, has_bias=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_bfloat16_products(shape, has_bias, seed):
    """The sums are those of exact products of rounded numbers."""
    num_rows, in_features, out_features = shape
    torch.manual_seed(seed)
    x, weight, bias = (
        torch.randn(num_rows, in_features),
        torch.randn(out_features, in_features),
        torch.randn(out_features),
    )
    actual = multiply(x, weight, bias if has_bias else None, torch.bfloat16)
    x, weight = x.bfloat16().double(), weight.bfloat16().double()
    expected = x @ weight.T + (bias if has_bias else 0)
    scale = x.abs() @ weight.abs().T + bias.abs()
    assert ((actual - expected).abs() <= 1e-6 * scale).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=SHAPES, has_bias=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_integer_products(shape, has_bias, seed):
    """Few numbers fall between two steps in another way, so the bound is that of one step per row."""
    num_rows, in_features, out_features = shape
    torch.manual_seed(seed)
    x, weight, bias = (
        torch.randn(num_rows, in_features),
        torch.randn(out_features, in_features),
        torch.randn(out_features),
    )
    actual = multiply(x, weight, bias if has_bias else None, torch.int8)
    columns = quantized_columns(weight)
    expected = quantized_rows(x) @ columns.T + (bias if has_bias else 0)
    scale = x.double().abs() @ columns.abs().T + bias.abs()
    step = (x.amax(dim=1) - x.amin(dim=1))[:, None] / 255 * columns.abs().amax(dim=1)
    assert ((actual - expected).abs() <= 2e-6 * scale + step).all()
    assert relative_error(actual, expected) < 3e-3


def test_rows_that_quantize_badly():
    """Constant rows are exact. Rows with NaN or an infinity have no number."""
    weight = torch.randn(20, 33)
    x = torch.randn(5, 33)
    x[0], x[1], x[2, 3], x[3, 7] = 0, 2.5, torch.nan, torch.inf
    y = multiply(x, weight, None, torch.int8)
    torch.testing.assert_close(y[0], torch.zeros(20))
    assert relative_error(y[1], 2.5 * quantized_columns(weight).sum(dim=1)) < 1e-5
    assert not y[2].isfinite().any() and not y[3].isfinite().any()
    assert y[4].isfinite().all()


@pytest.mark.parametrize("num_vectors", range(1, 20))
def test_blocks_of_columns(num_vectors):
    starts = [products.first_vector(i, num_vectors) for i in range(products.number_of_blocks(num_vectors) + 1)]
    sizes = [end - start for start, end in pairwise(starts)]
    assert starts[0] == 0 and starts[-1] == num_vectors
    assert set(sizes) <= {1, 2, 3} and (num_vectors == 1 or products.VECTORS == 1 or 1 not in sizes)


def affine(*shape: int, channels: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape) / max(1, np.prod(shape[1:])) ** 0.5, 0.3 * torch.randn(channels or shape[0])


def norm(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 1 + 0.2 * torch.randn(channels), 0.2 * torch.randn(channels)


def evss_parameters(channels: int, expand: int = 2, rank: int = 3, state_size: int = 16) -> EVSSParameters:
    inner, squeezed = expand * channels, max(1, channels // 8)
    return EVSSParameters(
        norm(channels),
        (affine(2 * inner, channels)[0], None),
        affine(inner, 1, 3, 3),
        affine(4 * (rank + 2 * state_size), inner)[0].unflatten(0, (4, -1)),
        (torch.randn(4, inner, rank) / rank**0.5, torch.rand(4, inner) * 4 - 6),
        torch.arange(1.0, state_size + 1).log().expand(4, inner, state_size).contiguous(),
        torch.ones(4, inner),
        norm(inner),
        (affine(channels, inner)[0], None),
        affine(channels, 1, 3, 3),
        affine(channels, channels),
        norm(channels),
        affine(squeezed, channels),
        affine(channels, squeezed),
        (1e-5, 1e-5, 1e-5),
    )


def to_double(parameters):
    def convert(value):
        if isinstance(value, tuple):
            return tuple(map(convert, value))
        return value.double() if isinstance(value, torch.Tensor) else value

    return type(parameters)(*map(convert, parameters))


def normalize(x: torch.Tensor, weight_and_bias: tuple, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], *weight_and_bias, eps)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1)


def exact_evss(x: torch.Tensor, p: EVSSParameters) -> torch.Tensor:
    """Return what the block adds to its input."""
    normalized = normalize(x, p.norm, p.eps[0])
    u, z = F.linear(normalized, *p.in_proj).chunk(2, dim=-1)
    with use_backend("torch"):
        y = atrous_selective_scan(F.silu(convolve(u, *p.conv2d)), p.x_proj_weight, *p.dt_proj, p.A_log, p.D)
    mixed = F.linear(normalize(y, p.mixer_norm, p.eps[1]) * F.silu(z), *p.output_proj)
    local = F.linear(F.gelu(convolve(normalized, *p.local_conv)), *p.pointwise_conv)
    total = 0
    for branch in (mixed, local):
        mean = normalize(branch, p.gate_norm, p.eps[2]).mean(dim=(1, 2), keepdim=True)
        total = total + branch * torch.sigmoid(F.linear(F.gelu(F.linear(mean, *p.squeeze)), *p.expand))
    return total


def inverted_residual_parameters(channels: int, ratio: int = 4) -> InvertedResidualParameters:
    size = ratio * channels
    squeezed = max(1, size // 8)
    return InvertedResidualParameters(
        affine(size, channels),
        affine(size, 1, 3, 3),
        affine(squeezed, size),
        affine(size, squeezed),
        affine(channels, size),
    )


def exact_inverted_residual(x: torch.Tensor, p: InvertedResidualParameters) -> torch.Tensor:
    """Return what the block adds to its input."""
    expanded = F.relu(convolve(F.relu(F.linear(x, *p.expand_conv)), *p.depthwise_conv))
    mean = expanded.mean(dim=(1, 2), keepdim=True)
    factors = torch.sigmoid(F.linear(F.relu(F.linear(mean, *p.squeeze)), *p.expand))
    return F.linear(expanded * factors, *p.project_conv)


def exact_patch_merging(x: torch.Tensor, p: PatchMergingParameters) -> torch.Tensor:
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    cells = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
    return F.linear(normalize(cells, p.norm, p.eps), *p.reduction)


def patch_merging_parameters(channels: int) -> PatchMergingParameters:
    return PatchMergingParameters(norm(4 * channels), (affine(2 * channels + 3, 4 * channels)[0], None), 1e-5)


LAYERS = {
    "evss": (evss_parameters, lambda x, p: x + exact_evss(x, p)),
    "inverted_residual": (inverted_residual_parameters, lambda x, p: x + exact_inverted_residual(x, p)),
    "patch_merging": (patch_merging_parameters, exact_patch_merging),
}
# relative errors of what the layer adds
BOUNDS = {torch.bfloat16: 8e-3, torch.int8: 2.5e-2}
MAPS = [(2, 7, 9, 24), (1, 14, 14, 48), (1, 1, 1, 16), (3, 5, 2, 21), (1, 2, 90, 8), (1, 33, 3, 40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer, shape, dtype):
    make_parameters, exact = LAYERS[layer]
    torch.manual_seed(0)
    parameters, x = make_parameters(shape[-1]), torch.randn(shape)
    actual, expected = pack_layer(parameters, dtype)(x), exact(x.double(), to_double(parameters))
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    residual = x if layer != "patch_merging" else 0
    assert relative_error(actual - residual, expected - residual) < BOUNDS[dtype]


@pytest.mark.parametrize(
    "changes", [{"expand": 1}, {"rank": 1}, {"state_size": 1}, {"state_size": 21, "rank": 9}], ids=str
)
def test_sizes_of_the_scan(changes):
    torch.manual_seed(0)
    parameters, x = evss_parameters(20, **changes), torch.randn(2, 6, 5, 20)
    expected = exact_evss(x.double(), to_double(parameters))
    assert relative_error(pack_layer(parameters, torch.bfloat16)(x) - x, expected) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_element_is_written(layer, monkeypatch):
    """New memory holds NaN. Maps of any strides give the same bits."""
    torch.manual_seed(0)
    compute, x = pack_layer(LAYERS[layer][0](21), torch.bfloat16), torch.randn(2, 5, 9, 21)
    expected = compute(x)
    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(255 if tensor.dtype == torch.uint8 else torch.nan)

    monkeypatch.setattr(torch, "empty", lambda *size, **options: poison(empty(*size, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda tensor: poison(empty_like(tensor)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *size: poison(new_empty(tensor, *size)))
    assert torch.equal(compute(x), expected)
    assert torch.equal(compute(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)), expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_threads_keep_the_memory(layer, monkeypatch):
    """`run_jobs` gets each part of memory as a tensor, since other threads may outlive an interrupted call."""
    kept = []
    module = importlib.import_module(type(pack_layer(LAYERS[layer][0](16), torch.bfloat16)).__module__)
    run_jobs = module.run_jobs

    def record(kernel, record_type, fields):
        kept.append([name for name, value in fields.items() if isinstance(value, torch.Tensor)])
        run_jobs(kernel, record_type, fields)

    monkeypatch.setattr(module, "run_jobs", record)
    pack_layer(LAYERS[layer][0](16), torch.bfloat16)(torch.randn(1, 3, 3, 16))
    assert {"table", "x", "out", "thread_memory", *getattr(module, "MAPS", ())} <= set(kept[0])


def test_other_backends_are_refused():
    with (
        use_backend("torch"),
        pytest.raises(ValueError, match=r"torch.int8 needs the backend 'numba', and 'torch' is"),
    ):
        pack_layer(patch_merging_parameters(4), torch.int8)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"compute in torch.bfloat16 or torch.int8, got torch.float16"):
        pack_layer(patch_merging_parameters(4), torch.float16)


SCRIPT = """
import json, sys, torch
from test_packed_layers import LAYERS, DTYPES, UNITS, numba_simd, pack_layer
sums = {}
for name in sys.argv[1].split(","):
    make_parameters, _ = LAYERS[name]
    for dtype in DTYPES:
        torch.manual_seed(0)
        sums[f"{name} {dtype}"] = pack_layer(make_parameters(40), dtype)(torch.randn(1, 7, 6, 40)).flatten().tolist()
print(json.dumps({"sums": sums, "units": [unit for unit in UNITS if f"+{unit}" in numba_simd.FEATURES]}))
"""


@cache
def outputs_without(*instructions: str, layers: str = ",".join(LAYERS)) -> dict:
    """Return the outputs of layers on a processor without the instruction sets whose names start so."""
    features = [
        f"-{feature[1:]}" if feature[1:].startswith(instructions) else feature for feature in numba_simd.FEATURES
    ]
    variables = {"NUMBA_CPU_FEATURES": ",".join(features)} if instructions else {}
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path} | variables
    command = [sys.executable, "-c", SCRIPT, layers]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


UNITS = ["avx512f", "avx512bf16", "avx512vnni", "avx2"]


@pytest.mark.slow
@pytest.mark.skipif("+avx512bf16" not in numba_simd.FEATURES, reason="this processor lacks AVX512-BF16")
@pytest.mark.parametrize(
    "missing, units, layers",
    [
        # each unit is asked for on its own, so one layer shows that VNNI does not need BF16
        (("avx512bf16",), ["avx512f", "avx512vnni", "avx2"], "patch_merging"),
        (("avx512bf16", "avx512vnni"), ["avx512f", "avx2"], ",".join(LAYERS)),
        (("avx512", "avx10"), ["avx2"], ",".join(LAYERS)),
        (("avx", "vaes", "vpclmul", "gfni", "fma", "f16c"), [], ",".join(LAYERS)),
    ],
    ids=["no BF16", "no VNNI", "AVX2", "SSE"],
)
def test_processors_without_the_units(missing, units, layers):
    """Integers give the same sums. Sums of bfloat16 products round in another order."""
    here, there = outputs_without(), outputs_without(*missing, layers=layers)
    assert here["units"] == UNITS and there["units"] == units
    for name, outputs in there["sums"].items():
        assert relative_error(torch.tensor(outputs), torch.tensor(here["sums"][name])) < 1e-3, name
