"""`evmamba check-runtimes` on the bundled model."""

import os
import subprocess
import sys
from itertools import groupby
from operator import itemgetter

import pytest
import torch

from evmamba_demo.bundled import find_bundled_model
from evmamba_hub import info
from evmamba_hub.errors import UserError
from evmamba_hub.export import runtimes


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


def test_runtimes_take_turns_after_all_are_checked(evmamba, monkeypatch):
    calls = []  # the runtime, and the number of images

    def build(name):
        def build_runtime(candidate):
            file = candidate.folder / name
            file.touch()

            def run(pixel_values):
                assert file.exists()
                calls.append((name, len(pixel_values)))
                return candidate.model(pixel_values).logits

            return run

        return build_runtime

    def build_missing(candidate):
        raise UserError("it is not installed")

    fakes = {"first": build("first"), "missing": build_missing, "second": build("second")}
    monkeypatch.setattr(runtimes, "RUNTIMES", fakes)
    exit_code, stdout, stderr = evmamba("check-runtimes", find_bundled_model())
    assert exit_code == 0, stderr
    assert "Skipped: missing: it is not installed" in stdout
    turns = [(name, [size for _, size in turn]) for name, turn in groupby(calls, key=itemgetter(0))]
    checks = [(name, [1, 5, 2]) for name in ("first", "second")]
    round_ = [(name, [1] * (1 + info.CALLS_PER_TURN)) for name in ("first", "second")]
    assert turns == checks + (info.WARM_UP_ROUNDS + runtimes.ROUNDS) * round_


def test_progress_names_the_runtimes():
    shown = []

    def track(items, activity):
        for item in items:
            shown.append(f"{activity} {item}")
            yield item

    names = ["PyTorch", "PyTorch, optimize_for_inference"]
    reports = runtimes.compare_runtimes(str(find_bundled_model()), names, rounds=1, track=track)
    assert [report.runtime for report in reports] == names
    assert shown == [
        *(f"Checking {name}" for name in names),
        *(f"Measuring, round {number}" for number in (1, 2, 3)),
    ]


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
