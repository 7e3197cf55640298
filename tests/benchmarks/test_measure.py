"""The description of the machine in CSV files."""

import subprocess
from pathlib import Path

from benchmarks import measure


def commit_all(folder: Path) -> str:
    """Commit all files of a directory. Returns the start of the commit's hash."""
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "Measure"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_results_name_their_commit(tmp_path):
    """Results of an earlier script are no change of the sources."""
    scripts = tmp_path / "benchmarks"
    scripts.mkdir()
    (scripts / "bench.py").write_text("first\n")
    (tmp_path / "network.py").write_text("first\n")
    (scripts / "results.csv").write_text("first\n")
    assert measure.read_commit(scripts) == "unknown"
    commit = commit_all(tmp_path)
    (scripts / "results.csv").write_text("second\n")
    assert measure.read_commit(scripts) == commit
    (tmp_path / "network.py").write_text("second\n")
    assert measure.read_commit(scripts) == f"{commit}, with changes"


def test_results_name_the_backend_alone():
    """The words of the reason change with the code."""
    environment = measure.describe_environment()
    assert environment["scan"] in {"numba", "triton", "torch"}
    assert list(environment)[:2] == ["date", "commit"]
