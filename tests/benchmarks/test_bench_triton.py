"""The benchmarks that settle the estimates of the GPU kernels: their candidates, and what they say without a GPU."""

import csv
import math
import os
import subprocess
import sys

import pytest
import torch


pytest.importorskip("triton", reason="triton is not installed, which there are no wheels of for this system")

from benchmarks import bench_layer_norm, bench_triton_configs
from evmamba_kernels import atrous_selective_scan_triton as kernels


SCRIPTS = [bench_layer_norm, bench_triton_configs]
H100 = ("cuda", 32, 90)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    "options, message",
    [
        ([], "PyTorch does not find the device 'cuda'"),
        (["--device", "meta"], "the GPU kernels do not run on 'meta': name a GPU, such as cuda"),
    ],
)
def test_other_devices_are_refused(script, options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    with pytest.raises(SystemExit) as refusal:
        script.main()
    assert refusal.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert message in last


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 0
    assert "default: cuda" in capsys.readouterr().out


@pytest.mark.parametrize("field", bench_triton_configs.VARIATIONS)
def test_candidates_change_one_constant(field):
    committed, *others = bench_triton_configs.find_candidates(H100, field).values()
    assert committed == (kernels.CONFIGS[H100], kernels.CHUNK_COST)
    assert others
    for candidate in others:
        if field == "chunk_cost":
            assert candidate.config == committed.config and candidate.chunk_cost != committed.chunk_cost
        else:
            assert candidate.config != committed.config and candidate.chunk_cost == committed.chunk_cost


def test_cost_of_a_chunk_changes_the_number_of_chunks(monkeypatch):
    config = kernels.CONFIGS[H100]._replace(forward_tile=8, forward_channels=32, forward_programs=11)
    monkeypatch.setitem(kernels.CONFIGS, H100, config)
    monkeypatch.setattr(kernels, "describe_device", lambda _: kernels.Device(*H100, multiprocessors=132))
    for shape in bench_triton_configs.default_shapes("chunk_cost"):
        candidates = bench_triton_configs.find_candidates(H100, "chunk_cost").values()
        u = torch.empty(shape, device="meta")
        chunks = [
            bench_triton_configs.run_with(candidate, H100, kernels.make_plan, u).num_chunks for candidate in candidates
        ]
        assert len(set(chunks)) > 2, shape


def test_committed_constants_return_after_an_error():
    before = kernels.CONFIGS[H100], kernels.CHUNK_COST
    other = bench_triton_configs.Candidate(before[0]._replace(forward_tile=4), math.inf)
    with pytest.raises(ZeroDivisionError):
        bench_triton_configs.run_with(other, H100, lambda: 1 / 0)
    assert (kernels.CONFIGS[H100], kernels.CHUNK_COST) == before


@pytest.mark.parametrize(
    "times, expected",
    [
        ([(9, 3), (9, 4), (9, 10), (10, 20)], 4),
        ([(1, 3), (9, 4), (9, 10), (10, 20)], 4),  # faster by chance
        ([(1, 3), (2, 4), (3, 5), (4, 6)], 1),
        ([(9, 3), (9, 4), (9, 5), (9, 9)], None),
    ],
    ids=["crossing", "a fast small map", "always", "never"],
)
def test_threshold_of_the_gated_layer_norm(times, expected):
    rows = [{"KiB": 2**i, "kernel us": ours, "PyTorch us": theirs} for i, (ours, theirs) in enumerate(times)]
    assert bench_layer_norm.find_threshold(rows) == expected


def test_one_slow_row_moves_the_threshold():
    rows = [{"KiB": kib, "kernel us": 1, "PyTorch us": 2} for kib in (1, 2, 4)]
    rows.append({"KiB": 2, "kernel us": 3, "PyTorch us": 2})
    assert bench_layer_norm.find_threshold(rows) == 4


def test_maps_have_their_size():
    for dtype in (torch.float32, torch.bfloat16):
        x, gate, weight, bias = bench_layer_norm.make_tensors(96, 96, dtype, torch.device("cpu"))
        assert x.nbytes == gate.nbytes == 96 * 2**10
        assert weight.shape == bias.shape == (96,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, options, file, columns",
    [
        (
            bench_layer_norm,
            "--kib 1 2 --channels 8 --dtypes float32",
            "layer_norm_cpu.csv",
            ["kernel us", "PyTorch us"],
        ),
        (
            bench_triton_configs,
            "--vary precision --shapes 1,4,4,3 --state-size 1",
            "triton_precision_cpu.csv",
            ["forward ms", "backward ms"],
        ),
        (
            bench_triton_configs,
            "--vary precision --shapes 1,4,4,3 --state-size 1 --dtype bfloat16",
            "triton_precision_cpu_bfloat16.csv",
            ["forward ms", "backward ms"],
        ),
    ],
)
def test_short_run_in_the_interpreter(script, options, file, columns, tmp_path):
    command = [script.__file__, "--device", "cpu", "--repeats", "1", "--output-dir", str(tmp_path), *options.split()]
    subprocess.run([sys.executable, *command], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    lines = (tmp_path / file).read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert rows
    assert all(float(row[column]) > 0 for row in rows for column in columns)
