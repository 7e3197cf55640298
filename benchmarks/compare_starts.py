"""Start dense models from a classification checkpoint, and from scratch: do they learn the same in the same steps?

The programs of examples/ train on generated shapes. Runs differ in the start and in the seed of weights and order. The
checkpoint is the bundled classifier of digits.
"""

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
    options: list[str]


TASKS = {
    "detection": Task("object_detection.py", "map_50", []),
    "segmentation": Task("semantic_segmentation.py", "mean_iou", []),
}


def list_network_options(start: str) -> list[str]:
    """Return the options that set the network: the checkpoint, or fresh weights of the same network."""
    checkpoint = find_bundled_model()
    if start == "checkpoint":
        return ["--model", str(checkpoint)]
    config = EfficientVMambaConfig.from_pretrained(checkpoint)
    names = ("patch_size", "hidden_sizes", "depths", "state_size")
    return ["--network", json.dumps({name: getattr(config, name) for name in names})]


def train(task: Task, start: str, seed: int, steps: int, size: int, data: Path, folder: Path) -> dict[str, float]:
    """Train, and return the last line of the log about an evaluation."""
    command = [sys.executable, str(EXAMPLES / task.program), "--dataset", str(data), "--output-dir", str(folder)]
    command += ["--steps", str(steps), "--evaluation-steps", str(steps), "--seed", str(seed)]
    command += ["--image-size", str(size), "--num-workers", "0", "--report-to", "none"]
    subprocess.run([*command, *task.options, *list_network_options(start)], check=True)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if task.measure in record][-1]


def summarize(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the mean and the spread of the measure for each task and start."""
    values: dict[tuple[object, object], list[float]] = {}
    for row in rows:
        values.setdefault((row["task"], row["start"]), []).append(row["value"])
    return [
        {"task": task, "start": start, "mean": mean(found), "lowest": min(found), "highest": max(found)}
        for (task, start), found in values.items()
    ]


def main(
    tasks: Annotated[list[str] | None, typer.Option("--task", help="detection or segmentation \\[both]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run.")] = 600,
    size: Annotated[int, typer.Option(min=32, help="Side of the images, a multiple of 16.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Runs from each start.")] = 3,
    training_images: Annotated[int, typer.Option(min=1, help="Images to train on.")] = 400,
    validation_images: Annotated[int, typer.Option(min=1, help="Images to evaluate on.")] = 100,
    output_dir: Annotated[Path, typer.Option(help="Directory for the CSV file.")] = RESULTS_DIR,
) -> None:
    """Compare dense models that start from a classification checkpoint with those that start from scratch."""
    environment = describe_environment()
    rows: list[dict[str, object]] = []
    with TemporaryDirectory() as root:
        data = Path(root) / "shapes"
        draw = ["--training-images", str(training_images), "--validation-images", str(validation_images)]
        draw += ["--size", str(size), str(size)]
        subprocess.run([sys.executable, str(EXAMPLES / "draw_shapes.py"), str(data), *draw], check=True)
        runs = [(name, start, seed) for name in tasks or TASKS for seed in range(seeds) for start in STARTS]
        for name, start, seed in track(runs, "Training"):
            began = time.perf_counter()
            record = train(TASKS[name], start, seed, steps, size, data, Path(root) / f"{name}-{start}-{seed}")
            rows.append(
                {
                    "task": name,
                    "start": start,
                    "seed": seed,
                    "measure": TASKS[name].measure,
                    "value": float(record[TASKS[name].measure]),
                    "seconds": time.perf_counter() - began,
                }
            )
            write_csv(output_dir / "starts.csv", rows, environment)  # keeps finished runs if interrupted
    print_table("Held-out images", summarize(rows))


if __name__ == "__main__":
    with exit_on_user_error():
        typer.run(main)
