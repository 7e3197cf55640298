"""`evmamba check-runtimes`: run one checkpoint in every installed runtime."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from evmamba_hub.errors import UserError, require
from evmamba_hub.export.export import (
    FORMATS,
    Logits,
    Runtime,
    choose_check_sizes,
    create_check_images,
    load_exportable,
    quiet_exporters,
    require_compiler,
    write_file,
)
from evmamba_hub.files import staged
from evmamba_hub.info import WARM_UP_ROUNDS, measure_in_turns
from evmamba_kernels import use_backend
from modeling_evmamba import EfficientVMambaForImageClassification, optimize_for_inference


ROUNDS = 5  # that are measured


@dataclass
class RuntimeReport:
    """The result of a runtime, or the reason why it did not run."""

    runtime: str
    difference: float | None = None  # largest difference of a logit
    milliseconds: float | None = None  # median latency of one image
    missing: str | None = None


@dataclass
class Candidate:
    """A directory or Hub id, its classifier in float32, and a directory for its exported files."""

    name: str
    revision: str | None
    model: EfficientVMambaForImageClassification
    folder: Path

    def export(self, format: str, dtype: str) -> Path:
        """Write an exported file, unless another runtime has done so."""
        file = self.folder / f"{format}-{dtype}{FORMATS[format].suffix}"
        if not file.exists():
            source = self.export(format, "float32") if dtype == "int8" else None
            with staged(file) as staging:
                write_file(self.name, format, staging, dtype=dtype, revision=self.revision, float32_file=source)
        return file


def build_eager(candidate: Candidate) -> Runtime:
    return Logits(candidate.model)


def build_plain_scan(candidate: Candidate) -> Runtime:
    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        with use_backend("torch"):
            return candidate.model(pixel_values).logits

    return run


def build_optimized(dtype: torch.dtype) -> Callable[[Candidate], Runtime]:
    def build(candidate: Candidate) -> Runtime:
        try:
            return Logits(optimize_for_inference(candidate.model, dtype))
        except (ImportError, ValueError) as error:
            raise UserError(str(error)) from error

    return build


def build_bfloat16(candidate: Candidate) -> Runtime:
    model = load_exportable(candidate.name, "bfloat16", candidate.revision).model
    return lambda pixel_values: model(pixel_values.bfloat16()).logits.float()


def build_accelerator(candidate: Candidate) -> Runtime:
    if not torch.accelerator.is_available():
        raise UserError("PyTorch finds no accelerator")
    device = torch.device(str(torch.accelerator.current_accelerator()))
    model = Logits(deepcopy(candidate.model)).to(device)
    return lambda pixel_values: model(pixel_values.to(device)).cpu()


def build_compiled(candidate: Candidate) -> Runtime:
    require_compiler()
    return torch.compile(Logits(candidate.model), fullgraph=True, dynamic=True)


def build_from_file(format: str, dtype: str = "float32") -> Callable[[Candidate], Runtime]:
    return lambda candidate: FORMATS[format].load(candidate.export(format, dtype))


def build_openvino(dtype: str = "float32", precision: str | None = "f32") -> Callable[[Candidate], Runtime]:
    def build(candidate: Candidate) -> Runtime:
        require("openvino", extra="openvino")
        return load_openvino(candidate.export("onnx", dtype), precision)

    return build


def load_openvino(file: Path, precision: str | None) -> Runtime:
    """Compile an ONNX file in OpenVINO for the CPU.

    Args:
        file: The ONNX file.
        precision: OpenVINO's name of the dtype to compute in, such as "f32". None leaves the choice to OpenVINO, which
            takes bfloat16 on processors that multiply in it.
    """
    import openvino

    options: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if precision is not None:
        options["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(file, "CPU", options)
    return lambda pixel_values: torch.from_numpy(compiled(pixel_values.numpy())[0])


# name -> builder, which raises a UserError if the runtime is not available
RUNTIMES: dict[str, Callable[[Candidate], Runtime]] = {
    "PyTorch": build_eager,
    "PyTorch, optimize_for_inference": build_optimized(torch.float32),
    "PyTorch, optimized in bfloat16": build_optimized(torch.bfloat16),
    "PyTorch, optimized in int8": build_optimized(torch.int8),
    "PyTorch, scan in plain operators": build_plain_scan,
    "PyTorch, bfloat16": build_bfloat16,
    "PyTorch, accelerator": build_accelerator,
    "torch.compile": build_compiled,
    "torch.export": build_from_file("torch-export"),
    "AOTInductor": build_from_file("aoti"),
    "ONNX Runtime": build_from_file("onnx"),
    "ONNX Runtime, float16": build_from_file("onnx", "float16"),
    "ONNX Runtime, int8": build_from_file("onnx", "int8"),
    "OpenVINO": build_openvino(),
    "OpenVINO, precision of its choice": build_openvino(precision=None),
    "OpenVINO, float16": build_openvino("float16"),
    "OpenVINO, int8": build_openvino("int8"),
}


def compare_runtimes(
    model: str,
    names: Iterable[str] = tuple(RUNTIMES),
    revision: str | None = None,
    *,
    rounds: int = ROUNDS,
    track: Callable[[Sequence, str], Iterable] = lambda items, activity: items,
) -> list[RuntimeReport]:
    """Compare each runtime with PyTorch in float64 on images of several sizes, and measure the latency of one image.

    All runtimes are built and checked first. Those that are available then take turns, as `measure_in_turns` says. So
    all of them are in memory at the same time.

    Args:
        model: Directory or Hub id.
        names: Keys of `RUNTIMES`.
        revision: Branch, tag or commit on the Hub.
        rounds: The number of measured rounds, each with a turn of every runtime.
        track: A function that yields the items of a sequence, and shows the progress. It is called with the names and
            "Checking", then with the numbers of all rounds and "Measuring, round".

    Raises:
        UserError: If the model cannot be loaded, or is another network.
    """
    classifier = load_exportable(model, "float32", revision).model
    exact = deepcopy(classifier).double()
    batches = []
    for size in choose_check_sizes(exact.config, None):
        images = create_check_images(exact.config, size)
        with torch.inference_mode():
            batches.append((images, exact(images.double()).logits))
    del exact
    reports, calls = {}, {}
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps the files that a runtime has open
        candidate = Candidate(model, revision, classifier, Path(folder))
        for name in track(list(names), "Checking"):
            try:
                runtime = RUNTIMES[name](candidate)
            except UserError as error:
                reports[name] = RuntimeReport(name, missing=str(error))
                continue
            with quiet_exporters():  # compilers run at the first call
                reports[name] = RuntimeReport(name, find_largest_difference(runtime, batches))
            calls[name] = partial(runtime, batches[0][0])
        with torch.inference_mode():
            seconds = measure_in_turns(calls, track(range(1, WARM_UP_ROUNDS + rounds + 1), "Measuring, round"))
    for name in calls:
        reports[name].milliseconds = 1e3 * statistics.median(seconds[name])
    return list(reports.values())


@torch.inference_mode()
def find_largest_difference(runtime: Runtime, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the largest difference over all logits. It is NaN if a logit is NaN."""
    return torch.stack([(runtime(images) - expected).abs().max() for images, expected in batches]).max().item()
