"""Measure the latency and the throughput of servers on this machine's cores: worker processes, threads, neighbors.

Every worker process classifies one image at a time, in a loop. A neighbor is a Python process that computes in a loop.
It takes one core. OpenMP reads its settings at the start of a process, so each setting has processes of its own.

Example:
    python benchmarks/bench_serving.py --networks EfficientVMamba-T --settings default passive --seconds 2
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import NamedTuple

import torch
from measure import RESULTS_DIR, describe_environment, error_console, print_table, write_csv
from networks import NAMES, OURS, create_networks, run_model
from rich.progress import track
from torch import nn

from modeling_evmamba import optimize_for_inference


OPTIMIZED = {
    f"{name}, optimized{suffix}": (name, dtype)
    for name in OURS
    for suffix, dtype in {"": None, " bfloat16": torch.bfloat16, " int8": torch.int8}.items()
}
DEFAULT_NETWORKS = [
    "EfficientVMamba-T",
    "EfficientVMamba-T, optimized",
    "EfficientVMamba-T, optimized int8",
    "EfficientNet-B0",
]
SETTINGS = {"default": {}, "passive": {"OMP_WAIT_POLICY": "passive"}}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
WARM_UP_CALLS = 3

model: nn.Module  # of this worker process


class Scenario(NamedTuple):
    workers: int
    threads: int  # of each worker
    neighbors: int = 0


SCENARIOS = [
    *(Scenario(workers, threads) for workers in (1, 2, 4) for threads in (1, 2)),
    *(Scenario(1, threads, neighbors) for neighbors in (1, 2) for threads in (1, 2)),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=[*NAMES, *OPTIMIZED],
        default=DEFAULT_NETWORKS,
        help=f"default: {'; '.join(DEFAULT_NETWORKS)}",
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="duration of each measurement; default: 2")
    parser.add_argument(
        "--output-dir", type=Path, default=RESULTS_DIR, help="directory of the CSV file; default: benchmarks/results"
    )
    return parser.parse_args()


def load_model(name: str) -> None:
    """Load the network of a worker process."""
    global model
    loaded_name, dtype = OPTIMIZED.get(name, (name, None))
    model = create_networks([loaded_name])[loaded_name].model
    if name in OPTIMIZED:
        model = optimize_for_inference(model, dtype=dtype)


def serve(threads: int, seconds: float) -> list[float]:
    """Classify images in a worker process. Returns the seconds of each call."""
    torch.set_num_threads(threads)
    images = torch.randn(1, 3, 224, 224)
    for _ in range(WARM_UP_CALLS):
        run_model(model, images)
    latencies = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        run_model(model, images)
        latencies.append(time.perf_counter() - start)
    return latencies


@contextmanager
def with_variables(variables: dict[str, str]) -> Iterator[None]:
    """Set the variables of OpenMP for processes that start inside, and remove its others."""
    previous = dict(os.environ)
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(previous)


@contextmanager
def with_neighbors(number: int) -> Iterator[None]:
    neighbors = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for neighbor in neighbors:
            neighbor.kill()
            neighbor.wait()


def measure_scenario(pool: Pool, scenario: Scenario, seconds: float) -> dict[str, object]:
    with with_neighbors(scenario.neighbors):
        latencies = pool.starmap(serve, [(scenario.threads, seconds)] * scenario.workers, chunksize=1)
    everything = [latency for each in latencies for latency in each]
    return {
        **scenario._asdict(),
        "images/s": sum(len(each) / sum(each) for each in latencies),
        "median ms": 1e3 * statistics.median(everything),
        "95 % ms": 1e3 * statistics.quantiles(everything, n=20, method="inclusive")[-1],
    }


def measure_server(name: str, setting: str, seconds: float) -> list[dict[str, object]]:
    most = max(scenario.workers for scenario in SCENARIOS)
    with with_variables(SETTINGS[setting]), get_context("spawn").Pool(most, load_model, (name,)) as pool:
        pool.starmap(serve, [(2, 1)] * most, chunksize=1)  # waits until all workers have loaded
        return [
            {"network": name, "setting": setting, **measure_scenario(pool, scenario, seconds)}
            for scenario in track(SCENARIOS, f"{name}, {setting}", console=error_console, transient=True)
        ]


def main() -> None:
    arguments = parse_arguments()
    environment = describe_environment() | {"seconds": f"{arguments.seconds:g}"}
    rows = [
        row
        for name in arguments.networks
        for setting in arguments.settings
        for row in measure_server(name, setting, arguments.seconds)
    ]
    print_table("Servers on a CPU", rows)
    write_csv(arguments.output_dir / "serving.csv", rows, environment)


if __name__ == "__main__":
    main()
