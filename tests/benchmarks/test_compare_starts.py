"""Starts from a checkpoint and from scratch: the compared networks, the file of runs, and a short run."""

import json
import subprocess

import pytest

from benchmarks import compare_starts
from evmamba_demo.bundled import find_bundled_model
from modeling_evmamba import EfficientVMambaBackbone, EfficientVMambaConfig


RUNS = [
    compare_starts.Run("detection", "checkpoint", 0, 200, "map_50", 0.5, 0.625, 90.0),
    compare_starts.Run("detection", "checkpoint", 1, 200, "map_50", 0.25, 0.75, 90.0),
    compare_starts.Run("detection", "scratch", 0, 200, "map_50", 0.125, 0.5, 90.0),
]


def test_both_starts_have_one_network():
    option, fields = compare_starts.list_network_options("scratch")
    assert option == "--network"
    fresh = EfficientVMambaBackbone(EfficientVMambaConfig(**json.loads(fields))).state_dict()
    trained = EfficientVMambaBackbone.from_pretrained(find_bundled_model()).state_dict()
    assert {name: each.shape for name, each in fresh.items()} == {name: each.shape for name, each in trained.items()}


def test_runs_come_back_from_the_file(tmp_path):
    assert compare_starts.read_runs(tmp_path / "starts.csv") == []
    compare_starts.write_csv(tmp_path / "starts.csv", [run._asdict() for run in RUNS], {"date": "today"})
    assert compare_starts.read_runs(tmp_path / "starts.csv") == RUNS


def test_summary_has_mean_and_range_of_the_seeds():
    summary = compare_starts.summarize(RUNS)
    assert [(row["start"], row["moment"], row["runs"]) for row in summary] == [
        ("checkpoint", "halfway", 2),
        ("checkpoint", "end", 2),
        ("scratch", "halfway", 1),
        ("scratch", "end", 1),
    ]
    assert [summary[1][name] for name in ("mean", "lowest", "highest")] == [0.6875, 0.625, 0.75]


@pytest.mark.slow
@pytest.mark.parametrize("task", compare_starts.TASKS)
def test_short_run_is_resumed(task, tmp_path, monkeypatch):
    short = {"steps": 2, "size": 64, "seeds": 1, "training_images": 8, "validation_images": 2, "output_dir": tmp_path}
    compare_starts.main(tasks=[task], resume=False, **short)
    runs = compare_starts.read_runs(tmp_path / "starts.csv")
    assert [(run.task, run.start, run.seed, run.steps) for run in runs] == [
        (task, "checkpoint", 0, 2),
        (task, "scratch", 0, 2),
    ]
    assert all(0 <= run.halfway <= 1 and 0 <= run.end <= 1 and run.seconds > 0 for run in runs)
    commands, run_command = [], subprocess.run

    def record(command, **options):
        commands.append(command)
        return run_command(command, **options)

    monkeypatch.setattr(compare_starts.subprocess, "run", record)
    compare_starts.main(tasks=[task], resume=True, **short)
    assert not any(compare_starts.TASKS[task].program in word for command in commands for word in command)
    assert compare_starts.read_runs(tmp_path / "starts.csv") == runs
