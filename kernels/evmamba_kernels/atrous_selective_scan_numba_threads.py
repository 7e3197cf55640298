"""Threads for compiled kernels that release the GIL.

Numba's own `parallel=True` aborts the process when two Python threads enter it at once (layer "workqueue") or after a
fork (layer "omp"). Here a kernel is called with a range of jobs by each of a few threads that wait for work. Their
queues are C, so that handing out work takes a fraction of what `concurrent.futures` takes.
"""

import os
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

import torch


work: SimpleQueue = SimpleQueue()
workers: list[Thread] = []


def forget_workers() -> None:
    """Threads do not survive a fork: the child starts without any, and without what they had still to do."""
    global work
    work = SimpleQueue()
    workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_workers)


def wait_for_work(queue: SimpleQueue) -> None:
    while True:
        kernel, arguments, done = queue.get()
        try:
            kernel(*arguments)
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)


def run_jobs(kernel: Callable, num_jobs: int, *arguments) -> None:
    """Calls `kernel(first, last, *arguments)` on ranges that cover `num_jobs`, in `torch.get_num_threads()` threads.

    Any number of threads may call it at once; they share the workers.
    """
    num_threads = min(torch.get_num_threads(), num_jobs)
    while len(workers) < num_threads - 1:
        worker = Thread(target=wait_for_work, args=(work,), name=f"evmamba-scan-{len(workers)}", daemon=True)
        workers.append(worker)
        worker.start()

    done = SimpleQueue()
    for i in range(num_threads - 1):
        bounds = (num_jobs * i // num_threads, num_jobs * (i + 1) // num_threads)
        work.put((kernel, (*bounds, *arguments), done))
    # the calling thread takes the last range itself
    kernel(num_jobs * (num_threads - 1) // num_threads, num_jobs, *arguments)
    errors = [error for error in (done.get() for _ in range(num_threads - 1)) if error is not None]
    if errors:
        raise errors[0]
