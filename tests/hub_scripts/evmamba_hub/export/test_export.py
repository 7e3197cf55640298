"""`evmamba export`: other runtimes open the files, and compute the logits of PyTorch."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from transformers import BitImageProcessorPil, ResNetConfig, ResNetForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from evmamba_demo.bundled import find_bundled_model
from evmamba_hub.convert.convert import convert_checkpoint
from evmamba_hub.export.export import export_model
from golden_values import image, load_cases, original_state_dict, relative_error
from modeling_evmamba import EfficientVMambaConfig, EfficientVMambaForImageClassification
from training_evmamba.digits import load_splits


LABELS = ["bird", "cat", "dog", "été"]
SMALLEST_SIDE = 4 * (2 + 1)  # two positions per side in the second of two stages


def load_image_processor() -> BitImageProcessorPil:
    return AutoImageProcessor.from_pretrained(find_bundled_model(), backend="pil")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network of both block types, with batch norms that are not the identity, and labels that are not ASCII."""
    config = EfficientVMambaConfig(
        hidden_sizes=[16, 24],
        depths=[1, 1],
        block_types=["evss", "inverted_residual"],
        state_size=5,
        image_size=32,
        id2label=dict(enumerate(LABELS)),
        label2id={label: idx for idx, label in enumerate(LABELS)},
    )
    torch.manual_seed(1)
    model = EfficientVMambaForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    load_image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return EfficientVMambaForImageClassification.from_pretrained(checkpoint).eval()


@pytest.fixture
def exported(evmamba, checkpoint, tmp_path):
    """Export the network. Return the file."""

    def run(*arguments, name="model.onnx"):
        exit_code, _, stderr = evmamba("export", checkpoint, tmp_path / name, *arguments)
        assert exit_code == 0, stderr
        return tmp_path / name

    return run


def colorful(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator) + torch.randn(*shape[:2], 1, 1, generator=generator)


def run_onnx(file, pixel_values: torch.Tensor) -> torch.Tensor:
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])


@torch.no_grad()
def largest_difference(logits: torch.Tensor, model, pixel_values: torch.Tensor) -> float:
    expected = model(pixel_values.float()).logits
    # logits must differ between images, or a file with constant logits would pass
    assert len(expected) == 1 or expected.std(dim=0).min() > 1e-2
    return (logits.float() - expected).abs().max().item()


@pytest.fixture(scope="module")
def onnx_files(checkpoint, tmp_path_factory) -> Callable[[str], Path]:
    """Return the file of a dtype, for images of any size. Each is written once."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def write(dtype: str) -> Path:
        export_model(str(checkpoint), folder / f"{dtype}.onnx", "onnx", dtype=dtype)
        return folder / f"{dtype}.onnx"

    return write


@pytest.fixture
def onnx_file(onnx_files) -> Path:
    return onnx_files("float32")


def test_onnx_takes_any_batch_and_size(onnx_file, model):
    for shape in [(1, 3, 64, 64), (5, 3, 225, 223), (2, 3, 37, 53), (1, 3, SMALLEST_SIDE, 100), (3, 3, 4, 4)]:
        pixel_values = colorful(*shape)
        assert largest_difference(run_onnx(onnx_file, pixel_values), model, pixel_values) < 1e-5, shape


def test_onnx_is_of_standard_operators_and_describes_itself(onnx_file, checkpoint):
    graph_file = onnx.load(onnx_file)
    onnx.checker.check_model(graph_file, full_check=True)
    assert [(opset.domain, opset.version) for opset in graph_file.opset_import] == [("", 18)]
    assert not graph_file.functions
    (pixel_values,), (logits,) = graph_file.graph.input, graph_file.graph.output
    sizes = [size.dim_param or size.dim_value for size in pixel_values.type.tensor_type.shape.dim]
    assert (pixel_values.name, sizes) == ("pixel_values", ["batch", 3, "height", "width"])
    assert logits.name == "logits"
    metadata = {entry.key: json.loads(entry.value) for entry in graph_file.metadata_props}
    assert metadata["labels"] == LABELS
    processor = BitImageProcessorPil(**metadata["preprocessing"])
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    expected = BitImageProcessorPil.from_pretrained(checkpoint)(picture, return_tensors="pt").pixel_values
    assert torch.equal(processor(picture, return_tensors="pt").pixel_values, expected)


def test_onnx_of_one_size(exported, model):
    file = exported("--image-size", 250, 94)
    pixel_values = colorful(3, 3, 250, 94)
    assert largest_difference(run_onnx(file, pixel_values), model, pixel_values) < 1e-5
    with pytest.raises(Exception, match="invalid dimensions"):
        run_onnx(file, colorful(3, 3, 94, 250))


def test_onnx_in_half_precision(exported, onnx_files, onnx_file, model):
    with_half_inputs = exported("--dtype", "float16", "--half-inputs")
    for file, dtype in [(onnx_files("float16"), torch.float32), (with_half_inputs, torch.float16)]:
        pixel_values = colorful(3, 3, 41, 33).to(dtype)
        logits = run_onnx(file, pixel_values)
        assert logits.dtype == dtype
        assert 1e-5 < largest_difference(logits, model, pixel_values) < 1e-2
        assert file.stat().st_size < onnx_file.stat().st_size


# bounds of a difference in float32, and of what a dtype must differ by at least
OPENVINO_BOUNDS = {"float32": (0, 1e-5), "float16": (1e-5, 1e-2), "int8": (1e-5, 0.3)}
RUN_OPENVINO = """
import sys, torch
from pathlib import Path
from evmamba_hub.export.runtimes import load_openvino
logits = {}
for name, (file, batches) in torch.load(sys.argv[1]).items():
    run = load_openvino(Path(file), "f32")
    logits[name] = [run(batch) for batch in batches]
torch.save(logits, sys.argv[1])
"""


@pytest.fixture(scope="module")
def run_openvino(checkpoint, onnx_files, tmp_path_factory) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Batches and logits of a file of each dtype, and of one for half inputs of one size.

    They run in a process of its own. A process that has loaded OpenVINO beside the other runtimes may die at the next
    signal, such as that of a child.
    """
    pytest.importorskip("openvino", reason='needs OpenVINO: run pip install ".[openvino]"')
    folder = tmp_path_factory.mktemp("openvino")
    shapes = [(1, 3, 64, 64), (5, 3, 45, 43), (2, 3, 37, 53), (1, 3, SMALLEST_SIDE, 100), (3, 3, 4, 4)]
    runs = {dtype: (str(onnx_files(dtype)), [colorful(*shape) for shape in shapes]) for dtype in OPENVINO_BOUNDS}
    options = {"dtype": "float16", "half_inputs": True, "image_size": (50, 94)}
    export_model(str(checkpoint), folder / "model.onnx", "onnx", **options)
    half_inputs = [colorful(batch_size, 3, 50, 94).half() for batch_size in (1, 2, 5)]
    runs["half inputs"] = (str(folder / "model.onnx"), half_inputs)
    torch.save(runs, folder / "runs.pt")
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", RUN_OPENVINO, folder / "runs.pt"], env=variables, check=True, timeout=300)
    logits = torch.load(folder / "runs.pt")
    return {name: list(zip(batches, logits[name], strict=True)) for name, (_, batches) in runs.items()}


@pytest.mark.parametrize("dtype", OPENVINO_BOUNDS)
def test_openvino_takes_any_batch_and_size(run_openvino, model, dtype):
    smallest, largest = OPENVINO_BOUNDS[dtype]
    for pixel_values, logits in run_openvino[dtype]:
        assert smallest < largest_difference(logits, model, pixel_values) < largest, pixel_values.shape


def test_openvino_takes_one_size_in_half_precision(run_openvino, model):
    for pixel_values, logits in run_openvino["half inputs"]:
        assert logits.dtype == torch.float16
        assert largest_difference(logits, model, pixel_values) < 1e-2


@pytest.mark.slow
def test_tiny_has_the_logits_of_the_authors(evmamba, tmp_path):
    torch.save(original_state_dict("tiny", 11), tmp_path / "tiny.pth")
    convert_checkpoint(str(tmp_path / "tiny.pth"), tmp_path / "tiny")
    exit_code, stdout, stderr = evmamba("export", tmp_path / "tiny", tmp_path / "tiny.onnx")
    assert exit_code == 0, stderr
    assert all(size in stdout for size in ("1 x 224 x 224", "5 x 225 x 223", "2 x 37 x 53"))
    golden = load_cases("forward.safetensors")["tiny_seed11_1x3x224x224"]["logits"]
    logits = run_onnx(tmp_path / "tiny.onnx", image((1, 3, 224, 224), 11))
    assert relative_error(logits, golden) < 3e-6
    assert (logits - golden).abs().max() < 1e-4


@pytest.mark.slow
def test_digits_in_8_bits(evmamba, tmp_path):
    folder = find_bundled_model()
    exit_code, _, stderr = evmamba("export", folder, tmp_path / "digits.onnx", "--dtype", "int8")
    assert exit_code == 0, stderr
    graph = onnx.load(tmp_path / "digits.onnx").graph
    model = EfficientVMambaForImageClassification.from_pretrained(folder).eval()
    # linear layers, while the scan's matrices stay in float32
    num_layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == num_layers
    _, held_out = load_splits()
    pixel_values = load_image_processor()(held_out.images, return_tensors="pt").pixel_values
    logits = run_onnx(tmp_path / "digits.onnx", pixel_values)
    assert 1e-3 < largest_difference(logits, model, pixel_values) < 0.2
    assert (logits.argmax(dim=-1) == held_out.labels).sum() >= 590  # of 599


@pytest.mark.slow
def test_torch_export_needs_nothing_of_this_package(exported, model, tmp_path):
    file = exported("--format", "torch-export", "--image-size", 37, 53, name="model.pt2")
    pixel_values = colorful(5, 3, 37, 53)
    torch.save(pixel_values, tmp_path / "pixel_values.pt")
    script = """
import sys, torch
labels = {"labels.json": ""}
program = torch.export.load("model.pt2", extra_files=labels)
torch.save(program.module()(torch.load("pixel_values.pt")), "logits.pt")
assert not any("evmamba" in name for name in sys.modules)
print(labels["labels.json"])
"""
    completed = subprocess.run([sys.executable, "-c", script], cwd=file.parent, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout) == LABELS
    logits = torch.load(tmp_path / "logits.pt")
    assert largest_difference(logits.detach(), model, pixel_values) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, dtype",
    [([], torch.float32), (["--half-inputs", "--image-size", 41, 33], torch.float16)],  # any size takes 40 seconds
    ids=str,
)
def test_torch_export_in_half_precision(exported, model, options, dtype):
    file = exported("--format", "torch-export", "--dtype", "float16", *options, name="model.pt2")
    pixel_values = colorful(3, 3, 41, 33).to(dtype)
    with torch.no_grad():
        logits = torch.export.load(file).module()(pixel_values)
    assert logits.dtype == dtype
    assert 1e-5 < largest_difference(logits, model, pixel_values) < 1e-2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_aoti_package(exported, model):
    file = exported("--format", "aoti", "--image-size", 37, 53, name="model.pt2")
    pixel_values = colorful(5, 3, 37, 53)
    logits = torch._inductor.aoti_load_package(str(file))(pixel_values)
    assert largest_difference(logits, model, pixel_values) < 1e-5


def test_without_a_compiler(evmamba, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    exit_code, _, stderr = evmamba("export", checkpoint, tmp_path / "model.pt2", "--format", "aoti")
    assert exit_code == 1
    assert "no C++ compiler" in stderr and not any(tmp_path.iterdir())


def test_a_file_with_other_logits_is_not_left_behind(evmamba, checkpoint, tmp_path):
    """Weights beyond the range of float16 become infinite. The older file stays."""
    model = EfficientVMambaForImageClassification.from_pretrained(checkpoint)
    model.classifier.weight.data *= 1e6
    model.save_pretrained(tmp_path / "large")
    load_image_processor().save_pretrained(tmp_path / "large")
    output = tmp_path / "files" / "model.onnx"
    output.parent.mkdir()
    output.write_text("older")
    exit_code, stdout, stderr = evmamba(
        "export", tmp_path / "large", output, "--dtype", "float16", "--image-size", 32, 32
    )
    assert exit_code == 1
    assert "differ from PyTorch's" in stderr and "nothing was written" in stderr
    assert "Exported" not in stdout
    assert [file.name for file in output.parent.iterdir()] == ["model.onnx"]
    assert output.read_text() == "older"


def test_without_the_extra(evmamba, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    exit_code, _, stderr = evmamba("export", checkpoint, tmp_path / "model.onnx")
    assert exit_code == 1
    assert 'run pip install ".[export]" in a clone of the repository' in stderr


@pytest.mark.parametrize(
    "arguments, expected_code, message",
    [
        (["model.pt2"], 1, "files of the format onnx end in .onnx"),
        (["model.onnx", "--format", "aoti"], 1, "files of the format aoti end in .pt2"),
        (["missing/model.onnx"], 1, "its parent directory does not exist"),
        (["model.pt2", "--format", "torch-export", "--dtype", "int8"], 1, "int8 is for the format onnx"),
        (["model.onnx", "--half-inputs"], 1, "half inputs are for files in float16, and this one is in float32"),
        (["model.onnx", "--image-size", 3, 64], 1, "must have at least 4 x 4 pixels"),
        (["model.onnx", "--image-size", 64], 2, "requires 2 arguments"),
        (["model.onnx", "--dtype", "float8"], 2, "float8"),
    ],
    ids=str,
)
def test_bad_arguments_get_one_message(evmamba, checkpoint, tmp_path, monkeypatch, arguments, expected_code, message):
    monkeypatch.chdir(tmp_path)
    exit_code, _, stderr = evmamba("export", checkpoint, *arguments)
    assert exit_code == expected_code
    assert message in " ".join(stderr.split())
    assert not any(tmp_path.iterdir())


def test_other_networks_are_refused(evmamba, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    load_image_processor().save_pretrained(tmp_path / "resnet")
    exit_code, _, stderr = evmamba("export", tmp_path / "resnet", tmp_path / "model.onnx")
    assert exit_code == 1
    assert "is another kind of network" in stderr
