"""`evmamba check-runtimes` on the bundled model."""

import os
import subprocess
import sys

import pytest
import torch

from evmamba_demo.bundled import find_bundled_model


# the largest difference of a logit, of 5 or so
BOUNDS = {
    "PyTorch": 1e-5,
    "PyTorch, optimize_for_inference": 1e-5,
    "PyTorch, optimized in bfloat16": 0.1,
    "PyTorch, optimized in int8": 0.3,
    "PyTorch, scan in plain operators": 1e-5,
    "PyTorch, bfloat16": 0.2,
    "ONNX Runtime": 1e-5,
    "OpenVINO": 1e-5,
    "OpenVINO, precision of its choice": 0.2,
    "OpenVINO, float16": 0.02,
    "OpenVINO, int8": 0.3,
}


@pytest.mark.slow
def test_table_of_runtimes():
    """The command runs in a process of its own: see `run_openvino` in `test_export.py`."""
    options = [option for name in [*BOUNDS, "PyTorch, accelerator"] for option in ("--only", name)]
    command = [sys.executable, "-m", "evmamba_hub.cli", "check-runtimes", find_bundled_model(), *options]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    stdout = run.stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in stdout.splitlines() if line.startswith("│")]
    measured = {runtime: (float(difference), float(milliseconds)) for runtime, difference, milliseconds in rows}
    for name, bound in BOUNDS.items():
        difference, milliseconds = measured.pop(name)
        assert 0 < difference < bound, name
        assert milliseconds > 0, name
    if torch.accelerator.is_available():
        assert measured["PyTorch, accelerator"][0] < 1e-3
    else:
        assert not measured and "Skipped: PyTorch, accelerator: PyTorch finds no accelerator" in stdout


def test_without_openvino(evmamba, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    exit_code, stdout, stderr = evmamba("check-runtimes", find_bundled_model(), "--only", "OpenVINO")
    assert exit_code == 0, stderr
    reason = 'this needs the package openvino: run pip install ".[openvino]" in a clone of the repository'
    assert f"Skipped: OpenVINO: {reason}" in stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([find_bundled_model(), "--only", "TensorFlow"], "unknown runtime 'TensorFlow': choose one of 'PyTorch'"),
        (["no/such/folder"], "'no/such/folder' is neither a path nor a valid repository id"),
    ],
    ids=["runtime", "model"],
)
def test_bad_arguments_get_one_message(evmamba, arguments, message):
    exit_code, _, stderr = evmamba("check-runtimes", *arguments)
    assert exit_code == 1
    assert message in stderr
