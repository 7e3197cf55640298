"""Growing images: latency on each backend, and memory of a fresh process."""

import pytest

from benchmarks import bench_image_sizes


@pytest.mark.slow
def test_short_run(monkeypatch):
    names = [("EfficientVMamba-T", "numba"), ("EfficientVMamba-T, optimized", "numba")]
    monkeypatch.setattr(bench_image_sizes, "METHODS", names)
    rows = bench_image_sizes.measure_image_sizes([64, 128], repeats=1)
    assert [(row["network"], row["image"]) for row in rows] == [
        (name, side) for name, _ in names for side in (64, 128)
    ]
    small, large, *optimized = rows
    assert small["relative to 64"] == 1 and large["median ms"] > 0
    assert 0 < small["peak MiB"] < large["peak MiB"]
    assert 0 < optimized[0]["peak MiB"] < optimized[1]["peak MiB"]
