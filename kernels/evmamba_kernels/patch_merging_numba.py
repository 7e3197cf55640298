"""Numba kernel of patch merging in bfloat16, for inference on CPUs.

A job gathers the cells of 2 x 2 pixels of a band, normalizes them, and projects them. It writes some columns.
"""

import math

import torch


try:
    import numpy as np
    from numba import carray
except ImportError as error:
    raise ImportError("the CPU kernel of patch merging needs numba: pip install numba") from error

from .layer_norm_numba import STATISTICS_BYTES, find_statistics, normalize_row, statistics_at
from .layer_parameters import PatchMergingParameters
from .numba_products import (
    LINEAR_FIELDS,
    ROWS,
    Table,
    blocks_of_part,
    fill_row,
    linear_at,
    number_of_blocks,
    pack_linear,
    table_pointer,
    tile_at,
    tile_bytes,
    write_linear,
)
from .numba_simd import (
    LANES,
    NONE,
    compiled,
    float_pointer,
    load_first,
    store_first,
    untyped,
)
from .numba_threads import (
    THREAD_COUNTERS,
    allocate,
    claim_job,
    claim_thread,
    compiled_kernel,
    finish_job,
    place,
    run_jobs,
    split_evenly,
)


CELLS_PER_BAND = 56  # approximate; a tile of them and its sums stay in the second-level cache

WORK = np.dtype(
    [(field, np.int64) for field in (*THREAD_COUNTERS, "table", "x", "out", "thread_memory", "thread_bytes")]
    + [(field, np.int64) for field in ("values", "statistics", "height", "width", "channels", "num_bands")]
    + [(field, np.int64) for field in ("cells_per_band", "num_parts")]
    + [("eps", np.float64)]
)


@compiled
def gather_cells(x, image, first, count, work, values):
    """Copy the four pixels of `count` cells to `values` `(count, 4C)`, column by column. Odd sides end with zeros."""
    height, width, channels = work.height, work.width, work.channels
    columns = (width + 1) // 2
    for i in range(count):
        row, column = 2 * ((first + i) // columns), 2 * ((first + i) % columns)
        for j in range(4):
            r, c = row + j % 2, column + j // 2
            is_inside = r < height and c < width
            source = ((image * height + r) * width + c) * channels if is_inside else 0
            for d in range(0, channels, LANES):
                existing = min(LANES, channels - d)
                pixel = load_first(x, source + d, existing if is_inside else 0)
                store_first(values, (4 * i + j) * channels + d, pixel, existing)


def patch_merging_jobs(pointer):
    """Process jobs until none is left. `pointer` points to a record `WORK`."""
    work = carray(untyped(pointer), 1, WORK)[0]
    table, x, out = table_pointer(work.table), float_pointer(work.x), float_pointer(work.out)
    reduction, size = linear_at(table, 0), 4 * work.channels
    weight, bias = float_pointer(table[LINEAR_FIELDS]), float_pointer(table[LINEAR_FIELDS + 1])
    start = work.thread_memory + claim_thread(pointer) * work.thread_bytes
    values, statistics = float_pointer(start + work.values), statistics_at(start + work.statistics)
    num_cells = (work.height + 1) // 2 * ((work.width + 1) // 2)
    job = claim_job(pointer)
    while job < work.num_jobs:
        part, band = job % work.num_parts, job // work.num_parts % work.num_bands
        image, first = job // work.num_parts // work.num_bands, band * work.cells_per_band
        count = min(work.cells_per_band, num_cells - first)
        tile = tile_at(start, count, size)
        for group in range(0, count, LANES):
            num_rows = min(LANES, count - group)
            gather_cells(x, image, first + group, num_rows, work, values)
            find_statistics(statistics, values, 0, size, num_rows, size, work.eps)
            for row in range(num_rows):
                normalize_row(statistics, row, values, row * size, size, weight, bias, values, row * size)
                fill_row(tile, group + row, values, row * size, reduction)
        out_features, blocks = reduction.out_features, blocks_of_part(reduction, part, work.num_parts)
        at = (image * num_cells + first) * out_features
        write_linear(tile, count, reduction, blocks, NONE, out, at, out_features)
        finish_job(pointer)
        job = claim_job(pointer)


class PatchMerging:
    """Patch merging whose weights are packed for the kernel."""

    def __init__(self, parameters: PatchMergingParameters):
        self.eps, self.out_features = parameters.eps, len(parameters.reduction[0])
        self.table = Table([*pack_linear(*parameters.reduction, torch.bfloat16), *parameters.norm])

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) -> (B, H / 2, W / 2, C'), float32
        x = hidden_states.contiguous()
        batch_size, height, width, channels = x.shape
        rows, columns, num_threads = math.ceil(height / 2), math.ceil(width / 2), torch.get_num_threads()
        num_bands, cells_per_band = split_evenly(rows * columns, CELLS_PER_BAND, ROWS)
        most_parts = number_of_blocks(math.ceil(self.out_features / LANES))
        num_parts = min(most_parts, math.ceil(2 * num_threads / (batch_size * num_bands)))
        offsets, thread_bytes = place(
            [tile_bytes(cells_per_band, 4 * channels), 4 * LANES * 4 * channels, STATISTICS_BYTES]
        )
        (thread_memory,) = allocate([num_threads * thread_bytes])
        out = x.new_empty(batch_size, rows, columns, self.out_features)
        work = {
            "num_jobs": batch_size * num_bands * num_parts,
            "table": self.table.entries,
            "x": x,
            "out": out,
            "thread_memory": thread_memory,
            "thread_bytes": thread_bytes,
            "values": offsets[1],
            "statistics": offsets[2],
            "height": height,
            "width": width,
            "channels": channels,
            "num_bands": num_bands,
            "cells_per_band": cells_per_band,
            "num_parts": num_parts,
            "eps": self.eps,
        }
        run_jobs(compiled_kernel(patch_merging_jobs, x.dtype), WORK, work)
        return out
