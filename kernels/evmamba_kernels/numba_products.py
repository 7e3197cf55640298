"""Matrix products in bfloat16 and 8-bit integers, for kernels that fuse them with what comes before and after.

A product multiplies a tile, some rows of a feature map, by the weight of a linear layer. `fill_row` stores a row in
the dtype of the product, and `multiply_block` multiplies all rows by a block of columns. The sums are float32. An
instruction for pairs of bfloat16 numbers computes twice as many products as one for float32. One for groups of four
integers computes four times as many. Processors without them use other instructions, with the same sums.

Integers are quantized dynamically. A row of the tile has a scale and a minimum of its own, and a column of the weight
has a scale. With x = s q + m and w = t p:

    sum x w = t (s sum q p + m sum p)
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F


try:
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("the CPU kernels need numba: pip install numba") from error

from .numba_simd import (
    FEATURES,
    HAS_AVX2,
    HAS_AVX512,
    HAS_AVX512_BF16,
    HAS_AVX512BW,
    INTEGERS,
    LANES,
    VECTOR,
    Vector,
    activate,
    add,
    bfloat16_pointer,
    broadcast,
    call_llvm,
    compiled,
    divide,
    float32,
    float_pointer,
    integer_pointer,
    keep_last,
    lane_maximum,
    lane_minimum,
    lane_total,
    load,
    load_first,
    load_splat,
    maximum,
    minimum,
    multiply,
    multiply_add,
    pointer_to,
    shuffle,
    splat,
    store,
    store_first,
    subtract,
)
from .numba_threads import allocate


HAS_VNNI = "+avx512vnni" in FEATURES

# Rows and vectors of columns that are multiplied at once. Their sums, the weights and one number of a row fill 25 of
# the 32 registers of AVX-512. Feature maps of 224 x 224 images have multiples of 7 pixels.
ROWS, VECTORS = (7, 3) if HAS_AVX512 else (4, 1)
RESULT_COLUMNS = VECTORS * LANES

byte_pointer = pointer_to(types.int8, ir.IntType(8))
table_pointer = pointer_to(types.int64, ir.IntType(64))


class Linear(NamedTuple):
    """A linear layer. Its weight is in blocks of columns, and in words of two or four numbers of a column."""

    weight: int  # pointer to (vectors of columns, words, 16) 32-bit words, vectors of a block interleaved
    scale: int  # pointer to (out_features), for integers
    offset: int  # pointer to (out_features), sums of the columns, for integers
    bias: int  # pointer to (out_features)
    in_features: int
    out_features: int
    is_integer: int


class Tile(NamedTuple):
    """Rows of a feature map in the dtype of a product, and the sums of a block of columns."""

    address: int
    words: int  # pointer to (rows, row_words)
    row_words: int
    scales: int  # pointer to (rows), for integers
    minima: int  # pointer to (rows), for integers
    sums: int  # pointer to (rows, RESULT_COLUMNS)


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> list[torch.Tensor | int]:
    """Return the fields of a `Linear`.

    Args:
        weight: `(out_features, in_features)`, float32.
        bias: `(out_features)`, or `None`.
        dtype: `torch.bfloat16` or `torch.int8`.
    """
    out_features, in_features = weight.shape
    num_vectors = math.ceil(out_features / LANES)
    padding = num_vectors * LANES - out_features
    scale = weight.new_zeros(num_vectors * LANES)
    offset = torch.zeros_like(scale)
    if dtype == torch.int8:
        scale[:out_features] = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        weight = (weight / scale[:out_features, None]).round()
        offset[:out_features] = weight.sum(dim=1) * scale[:out_features]
    weight = F.pad(weight.to(dtype), (0, -in_features % numbers_per_word(dtype), 0, padding))
    words = weight.contiguous().view(torch.int32)  # (columns, words)
    starts = [LANES * first_vector(block, num_vectors) for block in range(number_of_blocks(num_vectors) + 1)]
    blocks = [words[start:end].T.flatten() for start, end in pairwise(starts)]
    bias = F.pad(weight.new_zeros(out_features, dtype=torch.float32) if bias is None else bias, (0, padding))
    return [aligned(torch.cat(blocks)), scale, offset, bias, in_features, out_features, int(dtype == torch.int8)]


def numbers_per_word(dtype: torch.dtype) -> int:
    return 4 // dtype.itemsize


class Table:
    """Numbers and the addresses of tensors, which kernels read. It keeps the tensors alive."""

    def __init__(self, fields: list[torch.Tensor | int]):
        self.fields = [field.contiguous() if isinstance(field, torch.Tensor) else field for field in fields]
        addresses = [field.data_ptr() if isinstance(field, torch.Tensor) else field for field in self.fields]
        self.entries = torch.tensor(addresses, dtype=torch.int64)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy at an address that is a multiple of 64 bytes, so no vector spans two cache lines."""
    (memory,) = allocate([tensor.nbytes])
    return memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@compiled
def number_of_blocks(num_vectors):
    """Return the number of blocks of columns of a product."""
    return (num_vectors + VECTORS - 1) // VECTORS


@compiled
def first_vector(block, num_vectors):
    """Return the first vector of a block. The last block has at least two vectors, if there are two."""
    start = block * VECTORS
    if VECTORS == 3 and num_vectors % 3 == 1 and num_vectors > 1 and start == num_vectors - 1:
        return start - 1
    return min(start, num_vectors)


LINEAR_FIELDS = len(Linear._fields)


@compiled
def linear_at(table, i):
    """Return the linear layer that starts at field i of a table."""
    return Linear(
        integer_pointer(table[i]),
        float_pointer(table[i + 1]),
        float_pointer(table[i + 2]),
        float_pointer(table[i + 3]),
        table[i + 4],
        table[i + 5],
        table[i + 6],
    )


def tile_bytes(num_rows: int, in_features: int) -> int:
    """Return the bytes of a tile with its sums."""
    row_words = math.ceil(in_features / LANES) * LANES // 2
    return 4 * num_rows * (row_words + 2 + RESULT_COLUMNS)


@compiled
def tile_at(address, num_rows, in_features):
    """Return a tile in the memory at an address."""
    row_words = (in_features + LANES - 1) // LANES * LANES // 2
    scales = address + 4 * num_rows * row_words
    minima, sums = scales + 4 * num_rows, scales + 8 * num_rows
    words = integer_pointer(address)
    return Tile(address, words, row_words, float_pointer(scales), float_pointer(minima), float_pointer(sums))


@intrinsic
def store_bytes(typing_context, pointer, index, vector):
    """Write 16 numbers from 0 to 255 as bytes, without their fractions."""

    def generate(context, builder, signature, arguments):
        integers = builder.fptosi(arguments[2], INTEGERS)
        num_bytes = ir.VectorType(ir.IntType(8), LANES)
        place = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), num_bytes.as_pointer())
        builder.store(builder.trunc(integers, num_bytes), place).align = 1
        return context.get_dummy_value()

    return types.none(pointer, types.intp, Vector), generate


@compiled
def fill_row(tile, row, values, start, linear):
    """Store a row of a tile in the dtype of the product: the `in_features` numbers of `values` from `start`."""
    if linear.is_integer:
        fill_integer_row(tile, row, values, start, linear.in_features)
        return
    halves, at = bfloat16_pointer(tile.address), 2 * row * tile.row_words
    for d in range(0, linear.in_features, LANES):
        store(halves, at + d, load_first(values, start + d, min(LANES, linear.in_features - d)))


@compiled
def fill_integer_row(tile, row, values, start, num_values):
    """Quantize a row to 0, ..., 255, from its least to its largest number. A NaN makes the scale NaN."""
    least, largest, zero = load_splat(values, start), load_splat(values, start), splat(float32(0.0))
    for d in range(0, num_values, LANES):
        count = min(LANES, num_values - d)
        vector = load_first(values, start + d, count)
        zero = multiply_add(vector, splat(float32(0.0)), zero)  # NaN if a number is NaN or infinite
        if count < LANES:
            vector = add(vector, keep_last(least, LANES - count))
        least, largest = minimum(vector, least), maximum(vector, largest)
    least, largest = lane_minimum(least), lane_maximum(largest)
    scale = multiply(subtract(largest, least), splat(float32(1 / 255)))
    inverse = divide(splat(float32(1.0)), maximum(scale, splat(float32(1e-30))))
    store_first(tile.minima, row, least, 1)
    store_first(tile.scales, row, add(scale, lane_total(zero)), 1)
    at, half, all_bytes = 4 * row * tile.row_words, splat(float32(0.5)), byte_pointer(tile.address)
    for d in range(0, num_values, LANES):
        vector = load_first(values, start + d, min(LANES, num_values - d))
        quantized = multiply_add(subtract(vector, least), inverse, half)
        store_bytes(all_bytes, at + d, minimum(quantized, splat(float32(255.0))))


def shift_right(builder, words, count):
    return builder.lshr(words, ir.Constant(words.type, [count] * words.type.count))


def shift_arithmetically(builder, words, count):
    return builder.ashr(words, ir.Constant(words.type, [count] * words.type.count))


def shift_left(builder, words, count):
    return builder.shl(words, ir.Constant(words.type, [count] * words.type.count))


def add_bfloat16_products(builder, total, numbers, weights):
    """Return the sums plus the products of both numbers of each word."""
    if HAS_AVX512_BF16:
        return call_llvm(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VECTOR, total, numbers, weights)
    high = ir.Constant(INTEGERS, [0xFFFF0000] * LANES)
    for select in (lambda words: shift_left(builder, words, 16), lambda words: builder.and_(words, high)):
        operands = (builder.bitcast(select(words), VECTOR) for words in (numbers, weights))
        total = call_llvm(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, *operands, total)
    return total


def add_integer_products(builder, total, numbers, weights):
    """Return the sums plus the products of the four bytes of each word. Those of `numbers` are unsigned."""
    if HAS_VNNI:
        return call_llvm(builder, "llvm.x86.avx512.vpdpbusd.512", INTEGERS, total, numbers, weights)
    if HAS_AVX512BW or HAS_AVX2:
        halves = ir.VectorType(ir.IntType(16), 2 * LANES)
        numbers, weights = builder.bitcast(numbers, halves), builder.bitcast(weights, halves)
        even_weights = shift_arithmetically(builder, shift_left(builder, weights, 8), 8)
        even_numbers = builder.and_(numbers, ir.Constant(halves, [0x00FF] * halves.count))
        odd_weights, odd_numbers = shift_arithmetically(builder, weights, 8), shift_right(builder, numbers, 8)
        total = builder.add(total, sums_of_pairs(builder, even_numbers, even_weights))
        return builder.add(total, sums_of_pairs(builder, odd_numbers, odd_weights))
    byte = ir.Constant(INTEGERS, [0xFF] * LANES)
    for i in range(4):
        weight = shift_arithmetically(builder, shift_left(builder, weights, 24 - 8 * i), 24)
        number = builder.and_(shift_right(builder, numbers, 8 * i), byte)
        total = builder.add(total, builder.mul(number, weight))
    return total


def sums_of_pairs(builder, a, b):
    """Return the products of 32 16-bit integers, summed in pairs."""
    if HAS_AVX512BW:
        return call_llvm(builder, "llvm.x86.avx512.pmaddw.d.512", INTEGERS, a, b)
    sums = []
    for start in (0, LANES):
        half = [shuffle(builder, each, each, range(start, start + LANES)) for each in (a, b)]
        sums.append(call_llvm(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(ir.IntType(32), LANES // 2), *half))
    return shuffle(builder, *sums, range(LANES))


def products_of_rows(num_vectors, is_integer):
    @intrinsic
    def products(typing_context, words, row_words, row, last_row, num_words, weight, start, sums):
        """Multiply `ROWS` rows of a tile by a block of columns. All sums stay in registers.

        Args:
            words: The tile, `(rows, row_words)`.
            row: First row. Rows beyond `last_row` repeat it.
            num_words: Words of a row, and of a column of the weight.
            weight: Weights in blocks.
            start: Index of the first word of the block.
            sums: `(rows, RESULT_COLUMNS)`, receives the sums in float32.
        """

        def generate(context, builder, signature, arguments):
            words, row_words, row, last_row, num_words, weight, start, sums = arguments
            integer = row.type

            def constant(number):
                return ir.Constant(integer, number)

            rows = []
            for i in range(ROWS):
                each = builder.add(row, constant(i))
                rows.append(builder.select(builder.icmp_signed("<", each, last_row), each, last_row))
            starts = [builder.mul(each, row_words) for each in rows]
            kind, add_products = (INTEGERS, add_integer_products) if is_integer else (VECTOR, add_bfloat16_products)
            places = [
                [cgutils.alloca_once_value(builder, ir.Constant(kind, None)) for _ in range(num_vectors)] for _ in rows
            ]
            with cgutils.for_range(builder, num_words) as loop:
                at = builder.add(start, builder.mul(loop.index, constant(LANES * num_vectors)))
                vectors = []
                for i in range(num_vectors):
                    address = builder.gep(weight, [builder.add(at, constant(LANES * i))])
                    vectors.append(builder.load(builder.bitcast(address, INTEGERS.as_pointer()), align=64))
                for first, of_row in zip(starts, places, strict=True):
                    word = builder.load(builder.gep(words, [builder.add(first, loop.index)]))
                    numbers = broadcast(builder, word, INTEGERS)
                    for vector, place in zip(vectors, of_row, strict=True):
                        builder.store(add_products(builder, builder.load(place), numbers, vector), place)
            for each, of_row in zip(rows, places, strict=True):
                at = builder.mul(each, constant(RESULT_COLUMNS))
                for i, place in enumerate(of_row):
                    total = builder.load(place)
                    total = builder.sitofp(total, VECTOR) if is_integer else total
                    address = builder.gep(sums, [builder.add(at, constant(LANES * i))])
                    builder.store(total, builder.bitcast(address, VECTOR.as_pointer()), align=4)
            return context.get_dummy_value()

        arguments = words, row_words, row, last_row, num_words, weight, start, sums
        return types.none(*arguments), generate

    return products


bfloat16_products_1, integer_products_1 = products_of_rows(1, False), products_of_rows(1, True)
bfloat16_products_2, integer_products_2 = products_of_rows(2, False), products_of_rows(2, True)
bfloat16_products_3, integer_products_3 = products_of_rows(3, False), products_of_rows(3, True)


@compiled
def multiply_block(tile, num_rows, linear, block):
    """Multiply the rows of a tile by a block of columns. Writes `tile.sums`.

    Returns:
        The first vector of the block, and its number of vectors.
    """
    num_vectors = (linear.out_features + LANES - 1) // LANES
    first = first_vector(block, num_vectors)
    count = first_vector(block + 1, num_vectors) - first
    words, row_words, sums, weight = tile.words, tile.row_words, tile.sums, linear.weight
    num_words = (linear.in_features + 3) // 4 if linear.is_integer else (linear.in_features + 1) // 2
    start, last = LANES * first * num_words, num_rows - 1
    for row in range(0, num_rows, ROWS):
        if linear.is_integer:
            if count == 3:
                integer_products_3(words, row_words, row, last, num_words, weight, start, sums)
            elif count == 2:
                integer_products_2(words, row_words, row, last, num_words, weight, start, sums)
            else:
                integer_products_1(words, row_words, row, last, num_words, weight, start, sums)
        elif count == 3:
            bfloat16_products_3(words, row_words, row, last, num_words, weight, start, sums)
        elif count == 2:
            bfloat16_products_2(words, row_words, row, last, num_words, weight, start, sums)
        else:
            bfloat16_products_1(words, row_words, row, last, num_words, weight, start, sums)
    return first, count


@compiled
def output_of_row(tile, row, i, linear, column):
    """Return 16 outputs of the linear layer: from the sums of vector i of a block, which starts at `column`."""
    total = load(tile.sums, row * RESULT_COLUMNS + i * LANES)
    if linear.is_integer:
        minimum_of_row = load_splat(tile.minima, row)
        total = multiply(total, multiply(load(linear.scale, column), load_splat(tile.scales, row)))
        total = multiply_add(minimum_of_row, load(linear.offset, column), total)
    return add(total, load(linear.bias, column))


@compiled
def write_linear(tile, num_rows, linear, blocks, activation, out, start, stride):
    """Apply a linear layer and an activation to the rows of a tile.

    Args:
        tile: The rows, filled.
        num_rows: Number of rows.
        linear: The linear layer.
        blocks: First block of columns, and the one after the last.
        activation: Number of the activation.
        out: Pointer to the output.
        start: Index of the first element of the output's first row.
        stride: Distance of its rows.
    """
    for block in range(*blocks):
        first, count = multiply_block(tile, num_rows, linear, block)
        for i in range(count):
            column = LANES * (first + i)
            existing = min(LANES, linear.out_features - column)
            for row in range(num_rows):
                result = activate(output_of_row(tile, row, i, linear, column), activation)
                store_first(out, start + row * stride + column, result, existing)


@compiled
def write_linear_and_residual(tile, num_rows, linear, blocks, residual, out, start, stride):
    """Apply a linear layer to the rows of a tile, and add the residual, which is laid out as `out`."""
    for block in range(*blocks):
        first, count = multiply_block(tile, num_rows, linear, block)
        for i in range(count):
            column = LANES * (first + i)
            existing = min(LANES, linear.out_features - column)
            for row in range(num_rows):
                at = start + row * stride + column
                total = add(output_of_row(tile, row, i, linear, column), load_first(residual, at, existing))
                store_first(out, at, total, existing)


@compiled
def all_blocks(linear):
    return 0, number_of_blocks((linear.out_features + LANES - 1) // LANES)


@compiled
def blocks_of_part(linear, part, num_parts):
    """Return the blocks of columns of one of several parts of a product."""
    num_blocks = number_of_blocks((linear.out_features + LANES - 1) // LANES)
    return num_blocks * part // num_parts, num_blocks * (part + 1) // num_parts


def pack_vector_product(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight `(out_features, in_features)` for `multiply_vector`, as `(vectors, in_features, 16)`."""
    padded = F.pad(weight, (0, 0, 0, -len(weight) % LANES))
    return aligned(padded.unflatten(0, (-1, LANES)).transpose(1, 2).to(dtype).contiguous())


def pack_bias(bias: torch.Tensor) -> torch.Tensor:
    """Return the bias of a linear layer for `multiply_vector`, with zeros up to a multiple of 16."""
    return F.pad(bias, (0, -len(bias) % LANES))


def pack_convolution(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight `(D, 1, 3, 3)` of a depthwise convolution as `(9, D)`, and its bias `(D)`."""
    return weight.flatten(1).t().contiguous(), weight.new_zeros(len(weight)) if bias is None else bias


@compiled
def multiply_vector(vector, in_features, weight, bias, first, last, activation, out):
    """Apply a linear layer to one row: the vectors of outputs from `first` to `last`, in the layout of `weight`."""
    for i in range(first, last):
        start = i * in_features * LANES
        sums = (splat(float32(0.0)), splat(float32(0.0)), splat(float32(0.0)), load(bias, i * LANES))
        in_fours = in_features // 4 * 4
        for d in range(0, in_fours, 4):
            at = start + d * LANES
            sums = (
                multiply_add(load_splat(vector, d), load(weight, at), sums[0]),
                multiply_add(load_splat(vector, d + 1), load(weight, at + LANES), sums[1]),
                multiply_add(load_splat(vector, d + 2), load(weight, at + 2 * LANES), sums[2]),
                multiply_add(load_splat(vector, d + 3), load(weight, at + 3 * LANES), sums[3]),
            )
        total = add(add(sums[0], sums[1]), add(sums[2], sums[3]))
        for d in range(in_fours, in_features):
            total = multiply_add(load_splat(vector, d), load(weight, start + d * LANES), total)
        store(out, i * LANES, activate(total, activation))
