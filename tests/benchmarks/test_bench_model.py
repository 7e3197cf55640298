"""The comparison of networks: failing runtimes, fastest runtimes, and a short run."""

import csv
import math
import sys

import pytest
import torch
from torch import nn

from benchmarks import bench_model
from benchmarks.networks import Network


class Untraceable(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images if images.sum().item() > 0 else -images


def test_a_runtime_that_fails_is_named_and_left_out(tmp_path, capsys):
    networks = {"DeiT-Ti": Network("test", Untraceable(), 8)}
    calls, failures = bench_model.build_calls(networks, ["PyTorch", "ONNX"], 2, tmp_path)
    assert list(calls) == [("DeiT-Ti", "PyTorch")]
    assert calls["DeiT-Ti", "PyTorch"]().shape == (2, 3, 8, 8)
    (reason,) = failures.values()
    assert reason and "\n" not in reason
    assert f"DeiT-Ti fails in ONNX: {reason}" in capsys.readouterr().out

    times = {turn: [0.001, 0.002, 0.003] for turn in calls}
    measured, failed = bench_model.create_rows(networks, times, failures, 2)
    assert (measured["runtime"], measured["median ms"], measured["images/s"]) == ("PyTorch", 2, 1000)
    assert measured["failure"] is None
    assert (failed["runtime"], failed["failure"]) == ("ONNX", reason)
    assert math.isnan(failed["median ms"])
    assert bench_model.find_fastest([failed, measured]) == {"DeiT-Ti": measured}


def test_the_fastest_runtime_has_the_lowest_median():
    medians = {("a", "PyTorch"): 3.0, ("a", "ONNX"): 2.0, ("a", "compiled"): 2.5, ("b", "ONNX"): 9.0}
    rows = [{"network": n, "runtime": r, "median ms": ms, "failure": None} for (n, r), ms in medians.items()]
    fastest = bench_model.find_fastest(rows)
    assert {name: row["runtime"] for name, row in fastest.items()} == {"a": "ONNX", "b": "ONNX"}


def test_every_runtime_has_a_marker():
    assert {runtime.split()[0] for runtime in bench_model.RUNTIMES} == set(bench_model.MARKERS)


@pytest.mark.parametrize("batch_size, has_plot", [(1, True), (2, False)])
def test_short_run(batch_size, has_plot, tmp_path, monkeypatch):
    words = f"--networks EfficientVMamba-T --runtimes PyTorch optimized --repeats 1 --batch-size {batch_size}"
    monkeypatch.setattr(sys, "argv", ["bench_model.py", *words.split(), "--output-dir", str(tmp_path)])
    bench_model.main()
    with (tmp_path / f"model_batch_{batch_size}.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [row["runtime"] for row in rows] == ["PyTorch", "optimized"]
    for row in rows:
        lower, median, upper = (float(row[f"{name} ms"]) for name in ("lower quartile", "median", "upper quartile"))
        assert 0 < lower <= median <= upper
        assert float(row["images/s"]) == pytest.approx(1000 * batch_size / median, rel=1e-3)
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert plots == (["accuracy_latency-dark.png", "accuracy_latency-light.png"] if has_plot else [])
