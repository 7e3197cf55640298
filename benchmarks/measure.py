"""Shared code of the benchmarks: timing in rounds, peak memory, description of the machine, tables and CSV files."""

import argparse
import csv
import ctypes
import math
import statistics
import subprocess
from collections.abc import Callable, Hashable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from evmamba_hub import info
from evmamba_kernels.backends import BACKENDS


if TYPE_CHECKING:
    from matplotlib.figure import Figure


console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)

RESULTS_DIR = Path(__file__).parent / "results"


def parse_device(text: str) -> torch.device:
    """Parse a device of the command line.

    Raises:
        argparse.ArgumentTypeError: If PyTorch does not find the device.
    """
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"PyTorch does not find the device {text!r}: {reason}") from error


def parse_gpu(text: str) -> torch.device:
    """Parse a device of the command line that runs the GPU kernels.

    Raises:
        argparse.ArgumentTypeError: If PyTorch does not find the device, or the kernels do not run on it.
    """
    device = parse_device(text)
    if device.type not in BACKENDS["triton"].device_types:
        raise argparse.ArgumentTypeError(f"the GPU kernels do not run on {text!r}: name a GPU, such as cuda")
    return device


def times_in_turns(
    methods: dict[Hashable, Callable[[], object]],
    repeats: int,
    description: str,
    warm_up_rounds: int = info.WARM_UP_ROUNDS,
    **turns: float,
) -> dict[Hashable, list[float]]:
    """Show the progress of `measure_in_turns`, whose other arguments are `turns`. Return its times in seconds."""
    rounds = track(range(warm_up_rounds + repeats), description, console=error_console, transient=True)
    return info.measure_in_turns(methods, rounds, warm_up_rounds=warm_up_rounds, **turns)


def pause_for(device: torch.device) -> float:
    """Return the pause before each turn of methods that run on a device, in seconds."""
    return info.PAUSE if device.type == "cpu" else 0


def median_times(
    methods: dict[Hashable, Callable[[], object]], repeats: int, description: str, **turns: float
) -> dict[Hashable, float]:
    """Return the medians of `times_in_turns`, which describes the arguments."""
    times = times_in_turns(methods, repeats, description, **turns)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def in_fresh_process(function: Callable, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def return_freed_memory() -> None:
    """Make glibc return freed memory to the system. An optimized copy keeps some, which would hide its peak."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def peak_memory(function: Callable[[], object], device: torch.device) -> float:
    """Return the peak memory of one call in bytes, beyond the memory before it. NaN if the system does not report it.

    Call it in a fresh process: a call reuses memory that earlier work has freed, which does not count. On a CPU, this
    is Linux's high-water mark of the resident memory, reset before the call. `ru_maxrss` cannot be reset, and a child
    inherits it from its parent.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    clear_refs = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not clear_refs.exists():
        return math.nan
    clear_refs.write_text("5", encoding="utf-8")
    before = read_process_status("VmRSS")
    function()
    return read_process_status("VmHWM") - before


def read_process_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no field {field}")


def describe_environment() -> dict[str, str]:
    """Return the date, the commit, the machine and the versions, those of compared packages among them."""
    environment = info.describe_environment((*info.PACKAGES, "openvino", "mambapy", "mamba_ssm"))
    backend, _, _ = environment["scan"].partition(":")  # without the reason, whose words change with the code
    return {"date": date.today().isoformat(), "commit": read_commit(), **environment, "scan": backend}


def read_commit(folder: Path = Path(__file__).parent) -> str:
    """Return the commit of the sources around a directory, and whether sources differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("diff", "--name-only", "HEAD", "--", ":/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}, with changes" if changed else commit


def print_table(title: str, rows: list[dict[str, object]]) -> None:
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*map(format_value, row.values()))
    console.print(table)


def format_value(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: list[dict[str, object]], environment: dict[str, str]) -> None:
    """Write a CSV file. Its first lines start with `#` and describe the environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in environment.items())
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow(rounded)
    console.print(f"written: {path}", soft_wrap=True)


def save_figure(draw: Callable[[], "Figure"], path: Path) -> None:
    """Draw a figure for light and for dark pages. Save it with `-light` and `-dark` in the name."""
    from matplotlib import pyplot as plt

    for theme, style in {"light": "default", "dark": "dark_background"}.items():
        file = path.with_stem(f"{path.stem}-{theme}")
        with plt.style.context(style):
            figure = draw()
            figure.savefig(file, dpi=150)
            plt.close(figure)
        console.print(f"written: {file}", soft_wrap=True)
