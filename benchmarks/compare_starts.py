"""Start dense models from a classification checkpoint, and from scratch: do they learn the same in the same steps?

The programs of examples/ train on generated shapes. Runs differ in the start and in the seed of weights and order. The
checkpoint is the bundled classifier of digits.

Example:
    python benchmarks/compare_starts.py --task detection --seeds 1
    python benchmarks/compare_starts.py --resume
"""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import typer
from measure import RESULTS_DIR, describe_environment, print_table, write_csv
from rich.progress import track

from evmamba_demo.bundled import find_bundled_model
from evmamba_hub.errors import exit_on_user_error
from modeling_evmamba import EfficientVMambaConfig


EXAMPLES = Path(__file__).parents[1] / "examples"
STARTS = ("checkpoint", "scratch")


class Task(NamedTuple):
    program: str
    measure: str  # its name in the log
    steps: int
    options: list[str]


TASKS = {
    "detection": Task("object_detection.py", "map_50", 200, []),
    "segmentation": Task("semantic_segmentation.py", "mean_iou", 150, ["--hidden-size", "64"]),
}


class Run(NamedTuple):
    """A row of the CSV file. The measure is that on held-out images."""

    task: str
    start: str
    seed: int
    steps: int
    measure: str
    halfway: float
    end: float
    seconds: float


def list_network_options(start: str) -> list[str]:
    """Return the options that set the network: the checkpoint, or fresh weights of the same network."""
    checkpoint = find_bundled_model()
    if start == "checkpoint":
        return ["--model", str(checkpoint)]
    config = EfficientVMambaConfig.from_pretrained(checkpoint)
    names = ("patch_size", "hidden_sizes", "depths", "state_size")
    return ["--network", json.dumps({name: getattr(config, name) for name in names})]


def train(name: str, task: Task, start: str, seed: int, size: int, data: Path, folder: Path) -> Run:
    """Train, and evaluate halfway and at the end."""
    command = [sys.executable, str(EXAMPLES / task.program), "--dataset", str(data), "--output-dir", str(folder)]
    command += ["--steps", str(task.steps), "--evaluation-steps", str(task.steps // 2)]
    command += ["--image-size", str(size), "--seed", str(seed), "--num-workers", "0", "--report-to", "none"]
    began = time.perf_counter()
    subprocess.run([*command, *task.options, *list_network_options(start)], check=True)
    seconds = time.perf_counter() - began
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    halfway, end = (record[task.measure] for record in records if task.measure in record)
    return Run(name, start, seed, task.steps, task.measure, halfway, end, seconds)


def read_runs(file: Path) -> list[Run]:
    """Return the runs of a CSV file."""
    if not file.exists():
        return []
    lines = (line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    types = Run.__annotations__
    return [Run(**{name: types[name](value) for name, value in row.items()}) for row in csv.DictReader(lines)]


def summarize(runs: list[Run]) -> list[dict[str, object]]:
    """Return the mean and the range of the measure for each task, start and moment."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.start), []).append(run)
    summary: list[dict[str, object]] = []
    for (task, start), group in groups.items():
        for moment in ("halfway", "end"):
            found = [getattr(run, moment) for run in group]
            about = {"task": task, "start": start, "moment": moment, "runs": len(found)}
            summary.append(about | {"mean": mean(found), "lowest": min(found), "highest": max(found)})
    return summary


def main(
    tasks: Annotated[list[str] | None, typer.Option("--task", help="detection or segmentation \\[both]")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Steps of a run \\[200 and 150]")] = None,
    size: Annotated[int, typer.Option(min=32, help="Side of the images, a multiple of 16.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Runs from each start.")] = 3,
    training_images: Annotated[int, typer.Option(min=1, help="Images to train on.")] = 400,
    validation_images: Annotated[int, typer.Option(min=1, help="Images to evaluate on.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs of the CSV file, do the others.")] = False,
    output_dir: Annotated[Path, typer.Option(help="Directory for the CSV file.")] = RESULTS_DIR,
) -> None:
    """Compare dense models that start from a classification checkpoint with those that start from scratch."""
    environment = describe_environment()
    file = output_dir / "starts.csv"
    runs = read_runs(file) if resume else []
    finished = {(run.task, run.seed, run.start) for run in runs}
    planned = [(name, seed, start) for name in tasks or TASKS for seed in range(seeds) for start in STARTS]
    with TemporaryDirectory() as root:
        data = Path(root) / "shapes"
        draw = ["--training-images", str(training_images), "--validation-images", str(validation_images)]
        draw += ["--size", str(size), str(size)]
        subprocess.run([sys.executable, str(EXAMPLES / "draw_shapes.py"), str(data), *draw], check=True)
        for name, seed, start in track([each for each in planned if each not in finished], "Training"):
            task = TASKS[name]._replace(steps=steps or TASKS[name].steps)
            runs.append(train(name, task, start, seed, size, data, Path(root) / f"{name}-{start}-{seed}"))
            write_csv(file, [run._asdict() for run in runs], environment)  # keeps finished runs if interrupted
    print_table("Held-out images", summarize(runs))


if __name__ == "__main__":
    with exit_on_user_error():
        typer.run(main)
