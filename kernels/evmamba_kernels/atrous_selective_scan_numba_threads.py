"""Threads for compiled kernels that release the GIL.

Numba's own `parallel=True` aborts the process when two Python threads enter it at once (layer "workqueue") or after a
fork (layer "omp"). Here a kernel is called with a range of jobs by each of a few threads:

- those of the OpenMP runtime that PyTorch computes with, where it is GNU's or one with its interface (Linux). Between
  two operators they wait for work by spinning, and threads of our own would have to share the cores with them;
- threads of our own elsewhere, and after a fork, which OpenMP's threads do not survive.
"""

import ctypes
import os
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

import torch


Job = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def find_openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime in this process, None where it has not the interface of GNU's."""
    try:
        library = ctypes.CDLL(None)  # importing torch made its symbols global
        library.GOMP_parallel.argtypes = [Job, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        library.omp_get_thread_num, library.omp_get_num_threads  # noqa: B018, raises where one is missing
    except (AttributeError, OSError, TypeError):
        return None
    return library


openmp = find_openmp()
work: SimpleQueue = SimpleQueue()
workers: list[Thread] = []


def forget_threads() -> None:
    """No thread survives a fork: the child starts without any, and without what they had still to do."""
    global openmp, work
    openmp, work = None, SimpleQueue()
    workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_threads)


def run_jobs(kernel: Callable, num_jobs: int, *arguments) -> None:
    """Calls `kernel(first, last, *arguments)` on ranges that cover `num_jobs`, in `torch.get_num_threads()` threads.

    Any number of Python threads may call it at once.
    """
    num_threads = min(torch.get_num_threads(), num_jobs)
    errors = []

    def run_part(part: int, num_parts: int) -> None:
        try:
            kernel(num_jobs * part // num_parts, num_jobs * (part + 1) // num_parts, *arguments)
        except BaseException as error:  # to be raised by the caller
            errors.append(error)

    if num_threads == 1:
        run_part(0, 1)
    elif openmp is not None:
        # the team may be smaller than asked for
        body = Job(lambda _: run_part(openmp.omp_get_thread_num(), openmp.omp_get_num_threads()))
        openmp.GOMP_parallel(body, None, num_threads, 0)
    else:
        run_in_workers(run_part, num_threads)
    if errors:
        raise errors[0]


def run_in_workers(run_part: Callable[[int, int], None], num_threads: int) -> None:
    """Calls `run_part(part, num_threads)` for every part, the last one in this thread, the others in our own."""
    while len(workers) < num_threads - 1:
        worker = Thread(target=wait_for_work, args=(work,), name=f"evmamba-scan-{len(workers)}", daemon=True)
        workers.append(worker)
        worker.start()

    done = SimpleQueue()
    for part in range(num_threads - 1):
        work.put((run_part, part, num_threads, done))
    run_part(num_threads - 1, num_threads)
    for _ in range(num_threads - 1):
        done.get()


def wait_for_work(queue: SimpleQueue) -> None:
    while True:
        run_part, part, num_parts, done = queue.get()
        run_part(part, num_parts)
        done.put(part)
