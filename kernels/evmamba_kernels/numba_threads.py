"""Threads for compiled kernels.

Numba's own `parallel=True` aborts the process when two Python threads enter it at once (layer "workqueue") or after a
fork (layer "omp"). Here a kernel is a C function that takes a pointer to its work and claims one job after the other
from it, called by each of a few threads:

- those of the OpenMP runtime that PyTorch computes with, where it is GNU's or one with its interface (Linux). Between
  two operators they wait for work by spinning, and threads of our own would have to share the cores with them;
- threads of our own elsewhere, and after a fork, which OpenMP's threads do not survive.
"""

import ctypes
import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np
import torch


try:
    from llvmlite import ir
    from numba import cfunc
    from numba.core import types
    from numba.core.ccallback import CFunc
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("the CPU kernels need numba: pip install numba") from error


# The first fields of a work record, each an int64. The first two begin at 0 and are counted up by the threads.
COUNTERS = ("next_job", "jobs_done", "num_jobs")

Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def find_openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime in this process, None where it has not the interface of GNU's."""
    try:
        library = ctypes.CDLL(None)  # importing torch made its symbols global
        library.GOMP_parallel.argtypes = [Kernel, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        library.omp_get_thread_num, library.omp_get_num_threads  # noqa: B018, raises where one is missing
    except (AttributeError, OSError, TypeError):
        return None
    return library


openmp = find_openmp()
calls: SimpleQueue = SimpleQueue()
workers: list[Thread] = []


def forget_threads() -> None:
    """No thread survives a fork: the child starts without any, and without what they had to do still."""
    global openmp, calls
    openmp, calls = None, SimpleQueue()
    workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_threads)


@intrinsic
def claim_job(typing_context, work):
    """The number of the next job, taken from the record that `work` points to. No two threads get the same."""

    def generate(context, builder, signature, arguments):
        return add_atomically(builder, arguments[0], COUNTERS.index("next_job"))

    return types.int64(types.voidptr), generate


@intrinsic
def finish_job(typing_context, work):
    """Counts a job that is done, and returns how many were before."""

    def generate(context, builder, signature, arguments):
        return add_atomically(builder, arguments[0], COUNTERS.index("jobs_done"))

    return types.int64(types.voidptr), generate


def add_atomically(builder, pointer, field):
    counters = builder.bitcast(pointer, ir.IntType(64).as_pointer())
    place = builder.gep(counters, [ir.Constant(ir.IntType(64), field)])
    return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "seq_cst")


@cache
def digest_of_sources() -> str:
    """Of the files that kernels are compiled from. Numba's cache knows of a kernel's own file only."""
    digest = blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*numba*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def compiled_kernel(do_jobs: Callable) -> CFunc:
    """A function that claims jobs until none is left, for C callers: no Python between threads and jobs."""
    do_jobs.__qualname__ = f"{do_jobs.__name__}_{digest_of_sources()}"  # part of its name in the cache
    compile_with = partial(cfunc, types.void(types.voidptr), boundscheck=False, error_model="numpy")
    try:
        return compile_with(cache=True)(do_jobs)
    except Exception as error:  # Numba raises what it meets: a read-only or full disk, a file that is cut short
        warnings.warn(
            f"the compiled CPU kernel {do_jobs.__name__} cannot be kept for the next process, which will compile it "
            f"again for some seconds ({error}). The environment variable NUMBA_CACHE_DIR names a folder to keep it in",
            stacklevel=2,
        )
        return compile_with()(do_jobs)


@cache
def structure_of(record_type: np.dtype) -> type[ctypes.Structure]:
    """The same record in C, which is made in half the time."""
    fields = [(name, np.ctypeslib.as_ctypes_type(record_type[name])) for name in record_type.names]
    return type("Work", (ctypes.Structure,), {"_fields_": fields})


def run_jobs(kernel: CFunc, record_type: np.dtype, fields: dict[str, int | float | torch.Tensor]) -> None:
    """Calls `kernel` with a pointer to its work in `torch.get_num_threads()` threads, which share the jobs.

    The work is a record of `fields`, the addresses of tensors among them, that begins with `COUNTERS`. Any number of
    Python threads may call at once.

    Raises:
        MemoryError: where jobs were left undone, as a thread got no memory.
    """
    values = {name: value.data_ptr() if isinstance(value, torch.Tensor) else value for name, value in fields.items()}
    work = structure_of(record_type)(**values)
    num_threads = min(torch.get_num_threads(), work.num_jobs)
    if num_threads == 1:
        kernel.ctypes(ctypes.addressof(work))
    elif openmp is not None:
        openmp.GOMP_parallel(kernel.ctypes, ctypes.addressof(work), num_threads, 0)
    else:
        run_in_workers(kernel, work, fields, num_threads)
    if work.jobs_done != work.num_jobs:
        raise MemoryError(f"the CPU kernel finished {work.jobs_done} of {work.num_jobs} jobs")


def run_in_workers(kernel: CFunc, work: ctypes.Structure, fields: dict, num_threads: int) -> None:
    """Calls `kernel` with a pointer to `work` in this thread and in threads of our own.

    Each thread holds on to the work and its tensors: an exception, such as an interrupt from the keyboard, takes this
    one out of its wait while others still compute.
    """
    while len(workers) < num_threads - 1:
        worker = Thread(target=wait_for_work, args=(calls,), name=f"evmamba-kernels-{len(workers)}", daemon=True)
        worker.start()
        workers.append(worker)

    done = SimpleQueue()
    try:
        for _ in range(num_threads - 1):
            calls.put((kernel, work, fields, done))
        kernel.ctypes(ctypes.addressof(work))
        for _ in range(num_threads - 1):
            done.get()
    except BaseException:
        work.next_job = work.num_jobs  # nobody begins another job
        raise


def wait_for_work(queue: SimpleQueue) -> None:
    while True:
        kernel, work, fields, done = queue.get()
        kernel.ctypes(ctypes.addressof(work))
        done.put(None)
        del kernel, work, fields, done  # not kept until the next call
