"""The Triton kernels, compiled ahead of time without a GPU: no register spills, and all lanes get the same sums."""

import csv
from types import SimpleNamespace

import pytest
import torch

from devices import IS_INTERPRETED


if IS_INTERPRETED:
    pytest.skip("nothing is compiled in Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed, which there are no wheels of for this system")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import triton_report
from benchmarks.triton_report import KERNELS, TARGETS, compile_kernel
from evmamba_kernels import atrous_selective_scan_triton as kernels
from evmamba_kernels import layer_norm_triton
from evmamba_kernels.atrous_selective_scan_reference import random_arguments
from evmamba_kernels.layer_norm import LARGEST_CHANNELS_ON_GPU
from evmamba_kernels.triton_device import describe_device


def read_committed_report() -> dict[tuple[str, str], int]:
    """Return the committed registers of each kernel and target in float32, or nothing for other versions of Triton."""
    version = triton.__version__
    path = triton_report.RESULTS_DIR / f"triton_report_{version.rpartition('.')[0]}.csv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if f"# triton: {version}" not in lines:
        return {}
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {(row["kernel"], row["target"]): int(row["registers"]) for row in rows if row["dtype"] == "fp32"}


COMMITTED_REPORT = read_committed_report()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_spills_and_lanes_agree(kernel, target, capsys):
    """Lanes store a sum to one address, so bits depend on their order if the sums of lanes differ."""
    report = compile_kernel(kernel, target)
    with capsys.disabled():
        print(
            f"\n{kernel} on {target}: {report.registers} registers, {report.shared_bytes} bytes of shared memory, "
            f"{report.spilled_bytes} bytes spilled",
            end=" ",
        )
    assert report.spilled_bytes == 0
    assert report.unequal_sums == 0
    if COMMITTED_REPORT:
        assert report.registers == COMMITTED_REPORT.get((kernel, target)), "renew it with benchmarks/triton_report.py"


@pytest.mark.parametrize("channels", [33, 50, 100, LARGEST_CHANNELS_ON_GPU - 1])
@pytest.mark.parametrize("kernel", ["layer_norm_gated_fwd", "layer_norm_gated_bwd"])
def test_lanes_agree_with_odd_channels(kernel, channels, monkeypatch):
    """A lane then holds one channel, whose product the compiler would fuse into the sum with another lane."""
    monkeypatch.setattr(triton_report, "NORM_CHANNELS", channels)
    for target in ("sm_80", "sm_90"):
        report = compile_kernel(kernel, target)
        assert report.spilled_bytes == report.unequal_sums == 0


def test_a_product_in_a_sum_of_two_lanes_counts():
    @triton.jit
    def unequal_kernel(x, y):
        o_x = tl.arange(0, 32)
        b_x = tl.load(x + o_x)
        tl.store(y, tl.sum(b_x * tl.load(x + 32 + o_x), 0))

    source = ASTSource(fn=unequal_kernel, signature={"x": "*fp32", "y": "*fp32"}, constexprs={})
    compiled = triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": 1, "enable_fp_fusion": True})
    *_, code = triton_report.read_cubin(compiled.asm["cubin"])
    assert triton_report.count_unequal_sums(code) == 1


@pytest.mark.parametrize(
    "names, count",
    [
        (["FFMA R4, R5, R6, R3"], 1),
        (["FFMA2 R4, R6.F32x2.HI_LO, R8.F32x2.HI_LO, R2.F32x2.HI_LO"], 1),
        (["FADD2 R4, R4.F32x2.HI_LO, R2.F32x2.HI_LO", "FFMA R4, R5, R6, R3"], 0),
        (["FMUL2 R2, R6.F32x2.HI_LO, R8.F32x2.HI_LO", "FFMA R4, R5, R6, R3"], 0),
        (["FADD R3, R3, R1", "FFMA R4, R5, R6, R3"], 0),
        (["FFMA R4, R5, R6, R30"], 0),
    ],
)
def test_the_first_use_of_a_received_value_counts(names, count):
    lines = ["SHFL.BFLY PT, R3, R1, 0x1, 0x1f", *names]
    code = [triton_report.Instruction(i, *line.split(" ", 1)) for i, line in enumerate(lines)]
    assert triton_report.count_unequal_sums(code) == count


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kernel", ["scan_fwd", "scan_bwd", "layer_norm_gated_bwd"])
def test_nothing_spills_in_lower_dtypes(kernel, dtype):
    report = compile_kernel(kernel, "sm_90", dtype)
    assert report.spilled_bytes == report.unequal_sums == 0


def test_nothing_spills_with_the_most_channels(monkeypatch):
    monkeypatch.setattr(triton_report, "NORM_CHANNELS", LARGEST_CHANNELS_ON_GPU)
    assert compile_kernel("layer_norm_gated_bwd", "sm_90").spilled_bytes == 0


@pytest.mark.parametrize("state_size, rank", [(1, 1), (64, 12)])
def test_nothing_spills_with_other_sizes(state_size, rank):
    assert compile_kernel("scan_fwd", "sm_90", state_size=state_size, rank=rank).spilled_bytes == 0


def test_a_state_takes_one_exponential_and_no_shuffle():
    """States are in the registers of one thread. Softplus and its division take 2 of 32 exponentials."""
    report = compile_kernel("scan_fwd", "sm_90")
    assert 1 <= report.per_state("exp") < 1.1
    assert report.loop["shuffle"] == report.loop["local"] == 0


@pytest.fixture
def launches():
    """Replace Triton's driver by that of an H100 that loads and launches nothing. Kernels still compile.

    Returns a list of the launches.
    """
    launched = []
    device = object()  # Triton keeps loaded kernels by device: those of a real one must not run

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
        get_current_device=lambda: device,
        get_current_stream=lambda _: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    before = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(driver)
    describe_device.cache_clear()
    yield launched
    vars(triton.runtime.driver).update(before)
    describe_device.cache_clear()


PROJECT_BWD = ["project_bwd_input", "project_bwd_weight"]
ONE_CHUNK = ["project_fwd", "scan_fwd", "project_fwd", "chunk_state_fwd", "scan_bwd", *PROJECT_BWD]
CHUNKS = [
    "project_fwd",
    "chunk_state_fwd",
    "state_passing",
    "scan_fwd",
    "project_fwd",
    "chunk_state_fwd",
    "state_passing",
    "chunk_state_bwd",
    "state_passing",
    "scan_bwd",
    *PROJECT_BWD,
]


@pytest.mark.parametrize(
    "shape, dtype, expected",
    [((1, 1, 1, 1), torch.float32, ONE_CHUNK), ((2, 9, 81, 40), torch.bfloat16, CHUNKS)],
    ids=["one pixel", "chunks"],
)
def test_what_the_host_asks_for_compiles(launches, shape, dtype, expected):
    """Triton specializes arguments that are 1, and those that 16 divides."""
    u, *parameters = random_arguments(*shape, state_size=2, rank=1, dtype=dtype)
    channels = shape[-1]
    for arguments in ([u, *parameters], [u.transpose(1, 2), *parameters]):
        launches.clear()
        y = kernels.forward(*arguments)
        gradients = kernels.backward(y, *arguments)
        assert launches == [f"{name}_kernel" for name in expected]
        assert [gradient.shape for gradient in gradients] == [argument.shape for argument in arguments]

    launches.clear()
    norm = [u, u, torch.randn(channels), torch.randn(channels), 1e-5]
    layer_norm_triton.layer_norm_gated_bwd(layer_norm_triton.layer_norm_gated_fwd(*norm), *norm)
    assert launches == ["layer_norm_gated_fwd_kernel", "layer_norm_gated_bwd_kernel"]
