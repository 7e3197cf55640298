"""The runtimes of `evmamba check-runtimes`: a short run."""

import csv
import sys

import pytest

from benchmarks import check_runtimes


@pytest.fixture
def tiny_network(monkeypatch) -> None:
    fields = {"hidden_sizes": [16, 32], "depths": [1, 1], "block_types": ["evss", "inverted_residual"]}
    monkeypatch.setitem(check_runtimes.VARIANTS, "tiny", fields)


def test_short_run(tiny_network, monkeypatch, tmp_path, capsys):
    """It stays in this process, where the network is small."""
    monkeypatch.setattr(check_runtimes, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setitem(sys.modules, "openvino", None)
    names = ["PyTorch, optimize_for_inference", "OpenVINO"]
    words = ["check_runtimes.py", "--variants", "tiny", "--repeats", "1", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--runtimes", *names])
    check_runtimes.main()
    assert "tiny: no OpenVINO: this needs the package openvino" in capsys.readouterr().out
    measured = ["PyTorch", "PyTorch, optimize_for_inference"]
    rows = read_rows(tmp_path / "runtimes.csv")
    assert [(row["network"], row["runtime"]) for row in rows] == [("tiny", name) for name in measured]
    assert rows[0]["/ PyTorch"] == "1"
    for row in rows:
        assert 0 < float(row["largest difference"]) < 1e-5 and float(row["median ms"]) > 0
    digits = read_rows(tmp_path / "runtimes_digits.csv")
    assert [(row["runtime"], row["correct"]) for row in digits] == [(name, "595") for name in measured]


def read_rows(path) -> list[dict[str, str]]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
