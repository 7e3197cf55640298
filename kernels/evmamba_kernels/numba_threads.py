"""Threads for compiled kernels.

Numba's `parallel=True` aborts the process if two Python threads enter it at once (layer "workqueue") or after a fork
(layer "omp"). Here, a kernel is a C function that takes a pointer to its work. Each of a few threads calls it, and it
claims jobs until none is left. The threads are:

- those of PyTorch's OpenMP runtime, if it has the interface of GNU's (Linux). They spin between operators, so other
  threads would compete with them for the cores;
- threads of this package elsewhere, and after a fork, which OpenMP threads do not survive.
"""

import ctypes
import math
import os
import platform
import warnings
from collections.abc import Callable
from functools import cache, partial
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import torch


try:
    import numpy as np
    from llvmlite import ir
    from numba import cfunc
    from numba.core import types
    from numba.core.ccallback import CFunc
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("the CPU kernels need numba: pip install numba") from error

from .numba_simd import CONVERTS_FLOAT16, bfloat16, call_llvm, compiled, float16


# The first fields of a work record, each an int64. The first two start at 0, and the threads increment them.
COUNTERS = ("next_job", "jobs_done", "num_jobs")

# Those of kernels with several phases. Each thread has memory of its own, and waits for the jobs of earlier phases.
THREAD_COUNTERS = (*COUNTERS, "next_thread")

PAUSES_BEFORE_YIELD = 4096  # about 100 us: a thread that waits longer may keep another one from its core

# Types of the numbers of a feature map.
ELEMENTS = {torch.float32: types.float32, torch.bfloat16: bfloat16, torch.float16: float16}

CFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def find_openmp() -> ctypes.CDLL | None:
    """Return the OpenMP runtime of this process, or None if it lacks the interface of GNU's."""
    try:
        library = ctypes.CDLL(None)  # importing torch made its symbols global
        library.GOMP_parallel.argtypes = [CFunction, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        library.omp_get_thread_num, library.omp_get_num_threads  # noqa: B018, raises if one is missing
    except (AttributeError, OSError, TypeError):
        return None
    return library


openmp = find_openmp()
calls: SimpleQueue = SimpleQueue()
workers: list[Thread] = []


def forget_threads() -> None:
    """Reset threads and pending work in a forked child, since no thread survives a fork."""
    global openmp, calls
    openmp, calls = None, SimpleQueue()
    workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_threads)


@intrinsic
def claim_job(typing_context, work):
    """Return the number of the next job from the record that `work` points to. No two threads get the same one."""

    def generate(context, builder, signature, arguments):
        return add_atomically(builder, arguments[0], COUNTERS.index("next_job"))

    return types.int64(work), generate


@intrinsic
def finish_job(typing_context, work):
    """Count a finished job. Returns the number of jobs finished before it."""

    def generate(context, builder, signature, arguments):
        return add_atomically(builder, arguments[0], COUNTERS.index("jobs_done"))

    return types.int64(work), generate


@intrinsic
def claim_thread(typing_context, work):
    """Return a number for the calling thread, from 0. The record has `THREAD_COUNTERS`."""

    def generate(context, builder, signature, arguments):
        return add_atomically(builder, arguments[0], THREAD_COUNTERS.index("next_thread"))

    return types.int64(work), generate


@intrinsic
def num_jobs_done(typing_context, work):
    """Return the number of finished jobs. What they wrote is visible to the caller."""

    def generate(context, builder, signature, arguments):
        place = counter_pointer(builder, arguments[0], COUNTERS.index("jobs_done"))
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(work), generate


@intrinsic
def pause(typing_context):
    """Tell the processor that the thread waits in a loop."""

    def generate(context, builder, signature, arguments):
        if platform.machine() in ("x86_64", "AMD64"):
            call_llvm(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def yield_thread(typing_context):
    """Let another thread run on this core, where the system has the function of POSIX."""

    def generate(context, builder, signature, arguments):
        if os.name == "posix":
            call_llvm(builder, "sched_yield", ir.IntType(32))
        return context.get_dummy_value()

    return types.none(), generate


@compiled
def wait_for_jobs(pointer, count):
    """Wait until `count` jobs are done. Other threads have claimed them."""
    num_pauses = 0
    while num_jobs_done(pointer) < count:
        num_pauses += 1
        if num_pauses % PAUSES_BEFORE_YIELD == 0:
            yield_thread()
        pause()


def place(sizes: list[int]) -> tuple[list[int], int]:
    """Return the offsets of parts of memory with the given sizes in bytes, multiples of 64, and their total size."""
    offsets = list(accumulate((math.ceil(size / 64) * 64 for size in sizes), initial=0))
    return offsets[:-1], offsets[-1]


def allocate(sizes: list[int]) -> list[torch.Tensor]:
    """Return parts of new memory with the given sizes in bytes, at addresses that are multiples of 64."""
    offsets, total = place(sizes)
    memory = torch.empty(total + 64, dtype=torch.uint8)
    skipped = -memory.data_ptr() % 64
    return [memory[skipped + offset :] for offset in offsets]


def split_evenly(count: int, most: int, multiple: int) -> tuple[int, int]:
    """Return the number of parts of `count` things, and the size of all parts but the last one.

    Args:
        count: Number of things.
        most: Approximate size of a part.
        multiple: Parts are multiples of it.
    """
    size = math.ceil(count / max(1, round(count / most)) / multiple) * multiple
    return math.ceil(count / size), size


def counter_pointer(builder, pointer, field):
    counters = builder.bitcast(pointer, ir.IntType(64).as_pointer())
    return builder.gep(counters, [ir.Constant(ir.IntType(64), field)])


def add_atomically(builder, pointer, field):
    one = ir.Constant(ir.IntType(64), 1)
    return builder.atomic_rmw("add", counter_pointer(builder, pointer, field), one, "seq_cst")


@cache
def digest_of_sources() -> str:
    """Return a digest of all sources of the kernels. Numba's cache only checks the file of a kernel itself."""
    digest = blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*numba*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def compiled_kernel(do_jobs: Callable, dtype: torch.dtype) -> CFunction:
    """Return a C function that claims jobs until none is left, so no Python runs between threads and jobs.

    Args:
        do_jobs: Takes a pointer to a work record. The type of the pointer names the dtype of feature maps.
        dtype: Dtype of feature maps in memory.
    """
    do_jobs.__qualname__ = f"{do_jobs.__name__}_{digest_of_sources()}"  # part of its name in the cache
    signature = types.void(types.CPointer(ELEMENTS[dtype]))
    compile_with = partial(cfunc, signature, boundscheck=False, error_model="numpy")
    try:
        return callable_from_python(compile_with(cache=True)(do_jobs))
    except Exception as error:  # Numba raises any error of the cache: a read-only or full disk, a truncated file
        warnings.warn(
            f"the compiled CPU kernel {do_jobs.__name__} cannot be cached, so every process compiles it again for "
            f"some seconds ({error}): set NUMBA_CACHE_DIR to a writable directory",
            stacklevel=2,
        )
        return callable_from_python(compile_with()(do_jobs))


def callable_from_python(kernel: CFunc) -> CFunction:
    """Return the kernel as a function that takes the address of its work record."""
    function = CFunction(kernel.address)
    function.kernel = kernel  # keeps the machine code alive
    return function


def readable(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return the feature map, in float32 if the processor cannot convert its dtype."""
    return hidden_states if hidden_states.dtype != torch.float16 or CONVERTS_FLOAT16 else hidden_states.float()


@cache
def structure_of(record_type: np.dtype) -> type[ctypes.Structure]:
    """Return the record type as a C structure, which takes half the time to create."""
    fields = [(name, np.ctypeslib.as_ctypes_type(record_type[name])) for name in record_type.names]
    return type("Work", (ctypes.Structure,), {"_fields_": fields})


def run_jobs(kernel: CFunction, record_type: np.dtype, fields: dict[str, int | float | torch.Tensor]) -> None:
    """Call `kernel` on `torch.get_num_threads()` threads, which share the jobs.

    Any number of Python threads may call this function at once.

    Args:
        kernel: Takes a pointer to a record.
        record_type: Type of the record, which starts with `COUNTERS`.
        fields: Values of the record. A tensor stands for its address.

    Raises:
        MemoryError: If jobs are unfinished because a thread got no memory.
    """
    values = {name: value.data_ptr() if isinstance(value, torch.Tensor) else value for name, value in fields.items()}
    work = structure_of(record_type)(**values)
    num_threads = min(torch.get_num_threads(), work.num_jobs)
    if num_threads == 1:
        kernel(ctypes.addressof(work))
    elif openmp is not None:
        openmp.GOMP_parallel(kernel, ctypes.addressof(work), num_threads, 0)
    else:
        run_in_workers(kernel, work, fields, num_threads)
    if work.jobs_done != work.num_jobs:
        raise MemoryError(f"the CPU kernel finished {work.jobs_done} of {work.num_jobs} jobs")


def run_in_workers(kernel: CFunction, work: ctypes.Structure, fields: dict, num_threads: int) -> None:
    """Call `kernel` with a pointer to `work` on this thread and on threads of this package.

    Every thread keeps a reference to the work and its tensors. Otherwise a `KeyboardInterrupt` in this thread would
    free them while others still compute.
    """
    while len(workers) < num_threads - 1:
        worker = Thread(target=wait_for_work, args=(calls,), name=f"evmamba-kernels-{len(workers)}", daemon=True)
        worker.start()
        workers.append(worker)

    done = SimpleQueue()
    try:
        for _ in range(num_threads - 1):
            calls.put((kernel, work, fields, done))
        kernel(ctypes.addressof(work))
        for _ in range(num_threads - 1):
            done.get()
    except BaseException:
        work.next_job = work.num_jobs  # no thread starts another job
        raise


def wait_for_work(queue: SimpleQueue) -> None:
    while True:
        kernel, work, fields, done = queue.get()
        kernel(ctypes.addressof(work))
        done.put(None)
        del kernel, work, fields, done  # release them before the next call
