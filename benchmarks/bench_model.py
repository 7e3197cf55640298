"""Measure the latency of EfficientVMamba (random weights) against networks of its size, each in several runtimes.

Networks and runtimes take turns in one process. A runtime that fails is named with its reason, and left out.

Example:
    python benchmarks/bench_model.py --networks EfficientVMamba-T DeiT-Ti --runtimes PyTorch optimized ONNX --repeats 3
"""

import argparse
import math
import statistics
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from measure import (
    RESULTS_DIR,
    console,
    describe_environment,
    error_console,
    print_table,
    save_figure,
    times_in_turns,
    write_csv,
)
from networks import NAMES, OURS, PUBLISHED_ACCURACY, Network, create_networks
from rich.progress import track
from runtimes import OUR_RUNTIMES, PEER_RUNTIMES, RUNTIMES, Call
from transformers.utils import logging


MARKERS = {"PyTorch": "o", "bfloat16": "o", "optimized": "o", "compiled": "D", "ONNX": "s"}  # by the first word
LATENCY_TICKS = [2, 5, 10, 20, 50, 100, 200]
LABELS_BELOW = {"EfficientVMamba-T", "MobileViT-S", "Swin-T"}  # a network of about the same accuracy is above

Turn = tuple[str, str]  # network, runtime
Row = dict[str, object]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES, help="default: all")
    parser.add_argument("--batch-size", type=int, default=1, help="default: 1")
    parser.add_argument("--repeats", type=int, default=12, help="rounds to take the median of; default: 12")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=RESULTS_DIR,
        help="directory of the CSV file and the plot; default: benchmarks/results",
    )
    return parser.parse_args()


def build_calls(
    networks: dict[str, Network], runtimes: list[str], batch_size: int, folder: Path
) -> tuple[dict[Turn, Call], dict[Turn, str]]:
    """Return the calls that work, and the reasons why others fail."""
    builds = {
        (name, runtime): build
        for name in networks
        for runtime, build in (OUR_RUNTIMES if name in OURS else PEER_RUNTIMES).items()
        if runtime in runtimes
    }
    calls, failures = {}, {}
    for (name, runtime), build in track(builds.items(), "export, compile", console=error_console, transient=True):
        network = networks[name]
        images = torch.randn(batch_size, 3, network.image_size, network.image_size)
        files = folder / name
        files.mkdir(exist_ok=True)
        try:
            call = build(network.model, images, files)
            call()
        except Exception as error:  # exporters and compilers raise errors of any class
            failures[name, runtime] = f"{type(error).__name__}: {error}".splitlines()[0]
            console.print(f"{name} fails in {runtime}: {failures[name, runtime]}", soft_wrap=True, markup=False)
        else:
            calls[name, runtime] = call
    return calls, failures


def create_rows(
    networks: dict[str, Network], times: dict[Turn, list[float]], failures: dict[Turn, str], batch_size: int
) -> list[Row]:
    """Return a row for each network and runtime, with NaN for those that fail."""
    rows = []
    for name, network in networks.items():
        for runtime in RUNTIMES:
            turn = name, runtime
            if turn in times or turn in failures:
                lower, median, upper = statistics.quantiles(times[turn], n=4) if turn in times else [math.nan] * 3
                rows.append(
                    {
                        "network": name,
                        "runtime": runtime,
                        "from": network.source,
                        "image": network.image_size,
                        "batch": batch_size,
                        "median ms": 1e3 * median,
                        "lower quartile ms": 1e3 * lower,
                        "upper quartile ms": 1e3 * upper,
                        "images/s": batch_size / median,
                        "failure": failures.get(turn),
                    }
                )
    return rows


def find_fastest(rows: list[Row]) -> dict[str, Row]:
    """Return the row of each network with the lowest median."""
    fastest = {}
    for row in rows:
        best = fastest.get(row["network"])
        if not row["failure"] and (best is None or row["median ms"] < best["median ms"]):
            fastest[row["network"]] = row
    return fastest


def shorten(rows: list[Row]) -> list[Row]:
    """Return the columns that fit into a terminal."""
    columns = "network", "runtime", "median ms", "lower quartile ms", "upper quartile ms"
    return [{name: row[name] for name in columns} for row in rows]


def plot(rows: list[Row], environment: dict[str, str]) -> Figure:
    """Draw each network in its fastest runtime, and faintly as loaded."""
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    loaded = {row["network"]: row["median ms"] for row in rows if row["runtime"] == "PyTorch"}
    for name, row in find_fastest(rows).items():
        latency, accuracy = row["median ms"], PUBLISHED_ACCURACY[name][0]
        color = "#ea580c" if name in OURS else "#8b949e"
        if name in loaded:
            ax.plot([latency, loaded[name]], [accuracy] * 2, color=color, alpha=0.35, linewidth=1)
            ax.plot(loaded[name], accuracy, "o", color=color, alpha=0.35, markersize=5, markeredgewidth=0)
        ax.plot(latency, accuracy, MARKERS[row["runtime"].split()[0]], color=color, markersize=8)
        is_below = name in LABELS_BELOW
        ax.annotate(
            f"{name}\n{row['runtime']}, {latency:.1f} ms",
            (latency, accuracy),
            xytext=(-4, -7 if is_below else 7),
            textcoords="offset points",
            color=color,
            fontsize=8,
            va="top" if is_below else "bottom",
        )
    for label, marker in {"PyTorch": "o", "torch.compile": "D", "ONNX Runtime": "s"}.items():
        ax.plot([], [], marker, color="#8b949e", markersize=7, label=label)
    ax.plot([], [], "o", color="#8b949e", alpha=0.35, markersize=5, markeredgewidth=0, label="PyTorch as loaded")
    ax.set_xscale("log")
    ax.set_xticks(LATENCY_TICKS, map(str, LATENCY_TICKS))
    ax.set_xticks([], minor=True)
    ax.margins(y=0.15)
    ax.set(xlabel="median latency of one image in ms (measured)", ylabel="ImageNet-1k top-1 in % (published)")
    ax.set_title(f"{environment['cpu']}, {environment['threads']} threads", fontsize=10)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    arguments = parse_arguments()
    matplotlib.use("Agg")
    logging.disable_progress_bar()
    environment = describe_environment() | {"repeats": str(arguments.repeats)}
    torch.manual_seed(0)
    networks = create_networks(arguments.networks)
    with TemporaryDirectory() as folder:
        calls, failures = build_calls(networks, arguments.runtimes, arguments.batch_size, Path(folder))
        times = times_in_turns(calls, arguments.repeats, f"batches of {arguments.batch_size}")
    rows = create_rows(networks, times, failures, arguments.batch_size)
    print_table("Latency on a CPU", shorten(rows))
    print_table("Fastest runtimes", shorten(list(find_fastest(rows).values())))
    accuracies = {f"top-1 of {name}": f"{value} ({source})" for name, (value, source) in PUBLISHED_ACCURACY.items()}
    write_csv(arguments.output_dir / f"model_batch_{arguments.batch_size}.csv", rows, environment | accuracies)
    if arguments.batch_size == 1:
        save_figure(partial(plot, rows, environment), arguments.output_dir / "accuracy_latency.png")


if __name__ == "__main__":
    main()
