"""Two processes of a run, forked from this one, which start at once."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from io import StringIO
from queue import Empty

import pytest
from accelerate.state import AcceleratorState

from evmamba_hub.cli.main import main
from evmamba_hub.inference.evaluation import join_processes


needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks the process")


def join_pair(rank: int, place: dict[str, str], function: Callable[[int], object], results, end) -> None:
    # accelerate takes OMP_NUM_THREADS. With more, PyTorch would wait for threads that a fork does not copy.
    settings = {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    os.environ.update(place | settings)
    AcceleratorState._reset_state(reset_partial_state=True)  # left by the last run in the parent
    assert join_processes().num_processes == 2
    try:
        result = function(rank)
    except BaseException:
        result = traceback.format_exc()
    results.put((rank, result))
    end.wait()


def run_on_two_processes(function: Callable[[int], object], timeout: float = 150) -> list:
    """Return what a function of the rank returns on each process, or the traceback of what it raises.

    A process lives until the other one has returned. So the test fails if one waits for what the other never does.
    Both may compile kernels first, for up to a minute on a busy machine.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    results, end = context.Queue(), context.Event()
    processes = [context.Process(target=join_pair, args=(rank, place, function, results, end)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=timeout) for _ in processes)
    except Empty:
        pytest.fail("a process waits for the other one")
    finally:
        end.set()
        for process in processes:
            process.join(5)
            process.kill()
    return [found[rank] for rank in (0, 1)]


def show_in_two_processes(*arguments) -> list[str]:
    """Run the command line on two processes. Return what each of them shows on stderr."""

    def show(rank: int) -> str:
        sys.argv, sys.stderr = ["evmamba", *map(str, arguments)], StringIO()
        with pytest.raises(SystemExit):
            main()
        return sys.stderr.getvalue()

    return run_on_two_processes(show)
