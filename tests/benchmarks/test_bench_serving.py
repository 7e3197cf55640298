"""The measurement of servers: settings of OpenMP, neighbors, and a short run."""

import os
import subprocess
import sys

import pytest

from benchmarks import bench_serving


def read_variable_of_child(name: str) -> str:
    command = [sys.executable, "-c", f"import os; print(os.environ.get({name!r}))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_processes_get_the_variables_of_their_setting_alone(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    before = dict(os.environ)
    for setting, expected in {"default": "None", "passive": "passive"}.items():
        with bench_serving.with_variables(bench_serving.SETTINGS[setting]):
            assert read_variable_of_child("OMP_WAIT_POLICY") == expected
            assert read_variable_of_child("GOMP_SPINCOUNT") == "None"
        assert dict(os.environ) == before


def test_neighbors_end_with_their_measurement(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *words: started.append(popen(*words)) or started[-1])
    with pytest.raises(KeyboardInterrupt), bench_serving.with_neighbors(2):
        assert [neighbor.poll() for neighbor in started] == [None, None]
        raise KeyboardInterrupt
    assert len(started) == 2 and all(neighbor.poll() is not None for neighbor in started)


@pytest.mark.slow
def test_short_run(monkeypatch):
    scenarios = [bench_serving.Scenario(2, 1), bench_serving.Scenario(1, 2, neighbors=1)]
    monkeypatch.setattr(bench_serving, "SCENARIOS", scenarios)
    two, one = bench_serving.measure_server("EfficientVMamba-T, optimized", "passive", seconds=1)
    assert (two["workers"], two["threads"], two["neighbors"]) == (2, 1, 0)
    assert (one["workers"], one["threads"], one["neighbors"]) == (1, 2, 1)
    for row in (two, one):
        assert 0 < row["median ms"] <= row["95 % ms"]
        assert row["images/s"] > 0
