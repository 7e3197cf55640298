"""Vectors of 16 float32 numbers for Numba, and the functions on them that the kernels need.

LLVM vectorizes Numba's loops well only if it can prove that arrays do not overlap, and if trip counts are long. The
scan offers neither, so its kernels use vectors explicitly. A value of the type `Vector` holds 16 neighboring channels.
LLVM maps it to one register with AVX-512, two with AVX2, and four with NEON or SSE.

Memory may hold bfloat16 or float16 numbers instead. Loads widen them to float32, and stores round them.
"""

import platform


try:
    import numpy as np
    from llvmlite import ir
    from numba import njit
    from numba.core import cgutils, types
    from numba.core.registry import cpu_target
    from numba.extending import intrinsic, models, register_model
except ImportError as error:
    raise ImportError("the CPU kernels need numba: pip install numba") from error


LANES = 16

compiled = njit(boundscheck=False, error_model="numpy")

float32 = np.float32  # for literals in kernels, since Numba would compute in float64 without it

VECTOR = ir.VectorType(ir.FloatType(), LANES)
INTEGERS = ir.VectorType(ir.IntType(32), LANES)

# of the processor, or those of NUMBA_CPU_FEATURES
FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
HAS_AVX2 = "+avx2" in FEATURES
HAS_AVX512 = "+avx512f" in FEATURES
HAS_AVX512BW = "+avx512bw" in FEATURES
HAS_AVX512_BF16 = "+avx512bf16" in FEATURES
# Without such an instruction, LLVM calls a function that Numba does not have.
CONVERTS_FLOAT16 = "+f16c" in FEATURES or platform.machine() in ("arm64", "aarch64", "ARM64")


class VectorType(types.Type):
    def __init__(self):
        super().__init__(name=f"float32x{LANES}")


Vector = VectorType()


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    def __init__(self, data_model_manager, frontend_type):
        super().__init__(data_model_manager, frontend_type, VECTOR)


class HalfType(types.Type):
    """A number of two bytes in memory. Kernels compute with none: loads and stores convert it."""


bfloat16, float16 = HalfType("bfloat16"), HalfType("float16")


@register_model(HalfType)
class HalfModel(models.PrimitiveModel):
    def __init__(self, data_model_manager, frontend_type):
        super().__init__(data_model_manager, frontend_type, ir.IntType(16))


def element_pointer(context, builder, array_type, array, index, pointee):
    """Return the address of an element of a 1D array, or of the memory that a pointer points to."""
    if isinstance(array_type, types.Array):
        array = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(array, [index]), pointee.as_pointer())


def in_memory(element, numbers):
    """Return the LLVM type in memory of `numbers`, a float or a vector of floats, as elements of a Numba type."""
    if element == types.float32:
        return numbers
    return ir.VectorType(ir.IntType(16), numbers.count) if isinstance(numbers, ir.VectorType) else ir.IntType(16)


def widen(builder, element, value, numbers):
    """Convert elements from memory to float32."""
    if element == types.float32:
        return value
    if element == float16:
        halves = ir.VectorType(ir.HalfType(), numbers.count) if isinstance(numbers, ir.VectorType) else ir.HalfType()
        return builder.fpext(builder.bitcast(value, halves), numbers)
    integers = ir.VectorType(ir.IntType(32), numbers.count) if isinstance(numbers, ir.VectorType) else ir.IntType(32)
    sixteen = ir.Constant(integers, [16] * numbers.count if isinstance(numbers, ir.VectorType) else 16)
    return builder.bitcast(builder.shl(builder.zext(value, integers), sixteen), numbers)


def narrow(builder, element, vector):
    """Round a vector to elements in memory, to the nearest, and to even in ties."""
    halves = ir.VectorType(ir.IntType(16), LANES)
    if element == types.float32:
        return vector
    if element == float16:
        return builder.bitcast(builder.fptrunc(vector, ir.VectorType(ir.HalfType(), LANES)), halves)
    if HAS_AVX512_BF16:
        return call_llvm(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", halves, vector)

    def constant(number):
        return ir.Constant(INTEGERS, [number] * LANES)

    bits = builder.bitcast(vector, INTEGERS)
    is_odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(is_odd, constant(0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", vector, vector)
    bits = builder.select(is_nan, builder.or_(bits, constant(0x400000)), rounded)  # rounding could make it infinite
    return builder.trunc(builder.lshr(bits, constant(16)), halves)


def load_vector(context, builder, array_type, array, index):
    kind = in_memory(array_type.dtype, VECTOR)
    vector = builder.load(element_pointer(context, builder, array_type, array, index, kind))
    vector.align = 4 if kind is VECTOR else 2
    return widen(builder, array_type.dtype, vector, VECTOR)


def load_number(context, builder, array_type, array, index):
    kind = in_memory(array_type.dtype, ir.FloatType())
    number = builder.load(element_pointer(context, builder, array_type, array, index, kind))
    return widen(builder, array_type.dtype, number, ir.FloatType())


def masked_type(element):
    """Return the suffix of LLVM's functions for masked vectors, and the alignment of elements."""
    return (f"v{LANES}f32.p0", 4) if element == types.float32 else (f"v{LANES}i16.p0", 2)


def lane_mask(builder, count):
    """Return the mask of the first `count` lanes."""
    lanes = ir.Constant(INTEGERS, list(range(LANES)))
    return builder.icmp_signed("<", lanes, broadcast(builder, builder.trunc(count, ir.IntType(32)), INTEGERS))


def is_full(builder, count):
    """Return whether all lanes count. Without AVX-512BW, masks of two-byte elements take a branch per lane."""
    return builder.icmp_signed(">=", count, ir.Constant(count.type, LANES))


def load_first_lanes(context, builder, array_type, array, index, count):
    element = array_type.dtype
    kind, (suffix, alignment) = in_memory(element, VECTOR), masked_type(element)
    pointer = element_pointer(context, builder, array_type, array, index, kind)
    alignment, zeros = ir.Constant(ir.IntType(32), alignment), ir.Constant(kind, None)

    def masked():
        mask = lane_mask(builder, count)
        return call_llvm(builder, f"llvm.masked.load.{suffix}", kind, pointer, alignment, mask, zeros)

    if element == types.float32 or HAS_AVX512BW:
        return widen(builder, element, masked(), VECTOR)
    place = cgutils.alloca_once(builder, kind)
    with builder.if_else(is_full(builder, count)) as (full, part):
        with full:
            builder.store(builder.load(pointer, align=2), place)
        with part:
            builder.store(masked(), place)
    return widen(builder, element, builder.load(place), VECTOR)


def broadcast(builder, scalar, vector_type):
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(INTEGERS, [0] * LANES))


def shuffle(builder, a, b, lanes):
    """Return the given lanes. Lanes of a count from 0, those of b from 16."""
    lanes = list(lanes)
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def call_llvm(builder, name, result, *arguments):
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def pointer_to(element, llvm_type):
    @intrinsic
    def pointer(typing_context, address):
        """Return a pointer from an integer address. It can replace the array of other functions."""

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], llvm_type.as_pointer())

        return types.CPointer(element)(types.int64), generate

    return pointer


float_pointer = pointer_to(types.float32, ir.FloatType())
bfloat16_pointer = pointer_to(bfloat16, ir.IntType(16))
integer_pointer = pointer_to(types.int32, ir.IntType(32))


@intrinsic
def map_pointer(typing_context, work, address):
    """Return a pointer from an integer address, to numbers of the type that `work` points to.

    A kernel is compiled for each dtype of a feature map. The type of its argument names the dtype.
    """

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

    return types.CPointer(work.dtype)(work, types.int64), generate


@intrinsic
def untyped(typing_context, pointer):
    """Return a pointer without the type of its target."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(pointer), generate


@intrinsic
def load(typing_context, array, index):
    """Return 16 numbers of a 1D array from `index`."""

    def generate(context, builder, signature, arguments):
        return load_vector(context, builder, signature.args[0], *arguments)

    return Vector(array, types.intp), generate


@intrinsic
def store(typing_context, array, index, vector):
    """Write 16 numbers to a 1D array from `index`."""

    def generate(context, builder, signature, arguments):
        element = array.dtype
        pointer = element_pointer(context, builder, array, *arguments[:2], in_memory(element, VECTOR))
        builder.store(narrow(builder, element, arguments[2]), pointer).align = masked_type(element)[1]
        return context.get_dummy_value()

    return types.none(array, types.intp, Vector), generate


@intrinsic
def load_first(typing_context, array, index, count):
    """Return the first `count` of the 16 numbers from `index`, and zeros for the others, without reading them."""

    def generate(context, builder, signature, arguments):
        return load_first_lanes(context, builder, array, *arguments)

    return Vector(array, types.intp, types.intp), generate


@intrinsic
def store_first(typing_context, array, index, vector, count):
    """Write the first `count` of 16 numbers from `index`. The memory of the others is not touched."""

    def generate(context, builder, signature, arguments):
        element = array.dtype
        suffix, alignment = masked_type(element)
        pointer = element_pointer(context, builder, array, *arguments[:2], in_memory(element, VECTOR))
        stored, count = narrow(builder, element, arguments[2]), arguments[3]
        alignment = ir.Constant(ir.IntType(32), alignment)

        def masked():
            mask = lane_mask(builder, count)
            call_llvm(builder, f"llvm.masked.store.{suffix}", ir.VoidType(), stored, pointer, alignment, mask)

        if element == types.float32 or HAS_AVX512BW:
            masked()
        else:
            with builder.if_else(is_full(builder, count)) as (full, part):
                with full:
                    builder.store(stored, pointer, align=2)
                with part:
                    masked()
        return context.get_dummy_value()

    return types.none(array, types.intp, Vector, types.intp), generate


@intrinsic
def keep_first(typing_context, vector, count):
    """Return the first `count` lanes, and zeros for the others."""

    def generate(context, builder, signature, arguments):
        vector, count = arguments
        return builder.select(lane_mask(builder, count), vector, ir.Constant(VECTOR, [0.0] * LANES))

    return Vector(Vector, types.intp), generate


@intrinsic
def keep_last(typing_context, vector, count):
    """Return the last `count` lanes, and zeros for the others."""

    def generate(context, builder, signature, arguments):
        vector, count = arguments
        others = builder.sub(ir.Constant(count.type, LANES), count)
        return builder.select(lane_mask(builder, others), ir.Constant(VECTOR, [0.0] * LANES), vector)

    return Vector(Vector, types.intp), generate


@intrinsic
def load_splat(typing_context, array, index):
    """Return one number of a 1D array in all lanes, without the check for negative indices of Numba's indexing."""

    def generate(context, builder, signature, arguments):
        return broadcast(builder, load_number(context, builder, signature.args[0], *arguments), VECTOR)

    return Vector(array, types.intp), generate


@intrinsic
def splat(typing_context, number):
    """Return a float32 number in all lanes."""

    def generate(context, builder, signature, arguments):
        return broadcast(builder, arguments[0], VECTOR)

    return Vector(types.float32), generate


def binary_operator(instruction):
    @intrinsic
    def operator(typing_context, a, b):
        def generate(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments)

        return Vector(Vector, Vector), generate

    return operator


add = binary_operator("fadd")
subtract = binary_operator("fsub")
multiply = binary_operator("fmul")
divide = binary_operator("fdiv")


@intrinsic
def multiply_add(typing_context, a, b, c):
    """Return a b + c, rounded once if the processor has a fused multiply-add."""

    def generate(context, builder, signature, arguments):
        return call_llvm(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, *arguments)

    return Vector(Vector, Vector, Vector), generate


def select_by_comparison(comparison):
    @intrinsic
    def select(typing_context, a, b):
        def generate(context, builder, signature, arguments):
            return builder.select(builder.fcmp_ordered(comparison, *arguments), *arguments)

        return Vector(Vector, Vector), generate

    return select


# Both return b if one operand is NaN. A NaN exponent must stay NaN, so the bound is the first operand.
maximum = select_by_comparison(">")
minimum = select_by_comparison("<")


def unary_function(name):
    @intrinsic
    def function(typing_context, a):
        def generate(context, builder, signature, arguments):
            return call_llvm(builder, f"llvm.{name}.v{LANES}f32", VECTOR, *arguments)

        return Vector(Vector), generate

    return function


absolute = unary_function("fabs")
square_root = unary_function("sqrt")


def products_of_tile(num_vectors):
    @intrinsic
    def products(typing_context, u, pixels, channels, weight, column, num_columns, out, rows):
        """Multiply the channels of several pixels by columns of a matrix.

        All sums stay in registers, and a vector of weights is loaded once for all pixels.

        Args:
            u: The feature map.
            pixels: Index of the first element of each pixel in `u`.
            channels: Number of channels.
            weight: `(channels, num_columns)`. The product uses the 16, 32 or 48 columns from `column`.
            out: Receives the sums.
            rows: Index in `out` of the row of each pixel.
        """

        def generate(context, builder, signature, arguments):
            u, pixels, channels, weight, column, num_columns, out, rows = arguments
            pixels, rows = cgutils.unpack_tuple(builder, pixels), cgutils.unpack_tuple(builder, rows)
            zeros = ir.Constant(VECTOR, [0.0] * LANES)
            sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(num_vectors)] for _ in pixels]

            def vectors(array, start):
                array_type = signature.args[6] if array is out else signature.args[3]
                starts = [builder.add(start, ir.Constant(start.type, LANES * i)) for i in range(num_vectors)]
                return [element_pointer(context, builder, array_type, array, i, VECTOR) for i in starts]

            with cgutils.for_range(builder, channels) as loop:
                row = builder.add(builder.mul(loop.index, num_columns), column)
                weights = [builder.load(pointer, align=4) for pointer in vectors(weight, row)]
                for pixel, sums_of_pixel in zip(pixels, sums, strict=True):
                    at = builder.add(pixel, loop.index)
                    channel = broadcast(builder, load_number(context, builder, signature.args[0], u, at), VECTOR)
                    for weight_vector, place in zip(weights, sums_of_pixel, strict=True):
                        operands = channel, weight_vector, builder.load(place)
                        builder.store(call_llvm(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, *operands), place)
            for row, sums_of_pixel in zip(rows, sums, strict=True):
                for pointer, place in zip(vectors(out, builder.add(row, column)), sums_of_pixel, strict=True):
                    builder.store(builder.load(place), pointer, align=4)
            return context.get_dummy_value()

        return types.none(u, pixels, channels, weight, column, num_columns, out, rows), generate

    return products


products_of_16_columns = products_of_tile(1)
products_of_32_columns = products_of_tile(2)
products_of_48_columns = products_of_tile(3)


@intrinsic
def products_of_2_columns(typing_context, u, pixels, channels, weight, columns, out, places):
    """Multiply the channels of 8 pixels by two columns of a matrix.

    It sums vectors of 16 channels first, and their lanes at the end.

    Args:
        columns: Index in `weight` of the start of each column.
        places: Index in `out` of each product: those of the 8 pixels with the first column, then with the second.
    """

    def generate(context, builder, signature, arguments):
        u, pixels, channels, weight, columns, out, places = arguments
        pixels, columns, places = (cgutils.unpack_tuple(builder, each) for each in (pixels, columns, places))
        sums = [cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [0.0] * LANES)) for _ in range(LANES)]
        lanes = ir.Constant(channels.type, LANES)
        num_blocks, rest = builder.sdiv(channels, lanes), builder.srem(channels, lanes)

        def add_products(load):
            weights = [load(signature.args[3], weight, column) for column in columns]
            channels_of_pixels = [load(signature.args[0], u, pixel) for pixel in pixels]
            pairs = [(w, c) for w in weights for c in channels_of_pixels]
            for (w, c), place in zip(pairs, sums, strict=True):
                builder.store(
                    call_llvm(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR, w, c, builder.load(place)), place
                )

        with cgutils.for_range(builder, num_blocks) as loop:
            start = builder.mul(loop.index, lanes)
            add_products(
                lambda array_type, array, first: load_vector(
                    context, builder, array_type, array, builder.add(first, start)
                )
            )
        with builder.if_then(builder.icmp_signed(">", rest, ir.Constant(rest.type, 0))):
            start = builder.mul(num_blocks, lanes)
            add_products(
                lambda array_type, array, first: load_first_lanes(
                    context, builder, array_type, array, builder.add(first, start), rest
                )
            )
        products = sums_of_lanes(builder, [builder.load(place) for place in sums])
        for lane, place in enumerate(places):
            pointer = element_pointer(context, builder, signature.args[5], out, place, ir.FloatType())
            builder.store(builder.extract_element(products, ir.Constant(ir.IntType(32), lane)), pointer)
        return context.get_dummy_value()

    return types.none(u, pixels, channels, weight, columns, out, places), generate


def sums_of_lanes(builder, vectors):
    """Return the lane sums of 16 vectors as one vector.

    It merges vectors in pairs. A merged vector holds half as many partial sums of twice as many vectors.
    """
    partial_sums = LANES  # of each vector
    while len(vectors) > 1:
        starts = range(0, 2 * LANES, partial_sums)
        partial_sums //= 2
        low, high = (
            [start + half * partial_sums + i for start in starts for i in range(partial_sums)] for half in (0, 1)
        )
        pairs = zip(vectors[0::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(shuffle(builder, a, b, low), shuffle(builder, a, b, high)) for a, b in pairs]
    return vectors[0]


def combined_lanes(combine):
    @intrinsic
    def function(typing_context, vector):
        """Return the combination of all lanes, in all lanes."""

        def generate(context, builder, signature, arguments):
            (vector,) = arguments
            for distance in (8, 4, 2, 1):
                others = shuffle(builder, vector, vector, [lane ^ distance for lane in range(LANES)])
                vector = combine(builder, vector, others)
            return vector

        return Vector(Vector), generate

    return function


lane_total = combined_lanes(lambda builder, a, b: builder.fadd(a, b))
lane_minimum = combined_lanes(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))
lane_maximum = combined_lanes(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@intrinsic
def lane_sums(typing_context, array, index):
    """Return the lane sums of 16 consecutive vectors as one vector."""

    def generate(context, builder, signature, arguments):
        pointer = element_pointer(context, builder, signature.args[0], *arguments, VECTOR)
        places = [builder.gep(pointer, [ir.Constant(ir.IntType(64), i)]) for i in range(LANES)]
        return sums_of_lanes(builder, [builder.load(place, align=4) for place in places])

    return Vector(array, types.intp), generate


@intrinsic
def add_to_exponent(typing_context, a, integers):
    """Return a 2^n, where n is in the low bits of `integers`. a and the result must be normal numbers."""

    def generate(context, builder, signature, arguments):
        bits, shift = (builder.bitcast(argument, INTEGERS) for argument in arguments)
        shift = builder.shl(shift, ir.Constant(INTEGERS, [23] * LANES))
        return builder.bitcast(builder.add(bits, shift), VECTOR)

    return Vector(Vector, Vector), generate


@compiled
def exp2_of_fraction(f, n):
    """Return 2^(n + f) for |f| <= 1/2, where n is in the low bits of its argument.

    A minimax polynomial of 2^f with the value 1 at 0 (Lawson's iteration). Its relative error is 0.8 ulp.
    """
    p = splat(float32(1.326472690e-03))
    p = multiply_add(p, f, splat(float32(9.671512661e-03)))
    p = multiply_add(p, f, splat(float32(5.550733744e-02)))
    p = multiply_add(p, f, splat(float32(2.402224208e-01)))
    p = multiply_add(p, f, splat(float32(6.931469776e-01)))
    p = multiply_add(p, f, splat(float32(1.0)))
    return add_to_exponent(p, n)


@compiled
def exp2_by_polynomial(x):
    """Return 2^x for x <= 126, within 3 ulp, and 2^-126 for x < -126.

    Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
    """
    x = maximum(splat(float32(-126.0)), x)
    n = add(x, splat(float32(12582912.0)))
    return exp2_of_fraction(subtract(x, subtract(n, splat(float32(12582912.0)))), n)


@intrinsic
def power_of_fraction(typing_context, n):
    """Return 2^(j/16), where j is the low four bits of the argument. One instruction of AVX-512."""

    def generate(context, builder, signature, arguments):
        powers = ir.Constant(VECTOR, [2 ** (j / LANES) for j in range(LANES)])
        j = builder.bitcast(arguments[0], INTEGERS)
        return call_llvm(builder, "llvm.x86.avx512.permvar.sf.512", VECTOR, powers, j)

    return Vector(Vector), generate


@intrinsic
def multiply_by_power(typing_context, a, x):
    """Return a 2^floor(x), or zero if that underflows. One instruction of AVX-512."""

    def generate(context, builder, signature, arguments):
        a, x = arguments
        all_lanes, rounding = ir.Constant(ir.IntType(16), -1), ir.Constant(ir.IntType(32), 4)
        return call_llvm(builder, "llvm.x86.avx512.mask.scalef.ps.512", VECTOR, a, x, a, all_lanes, rounding)

    return Vector(Vector, Vector), generate


@compiled
def exp2_by_table(x):
    """Return 2^x for finite x, within 2 ulp.

    Adding 1.5 * 2^19 leaves the nearest multiple of 1/16 in the low bits of the sum. The remainder f is at most 1/32,
    where the Taylor polynomial of degree 3 is exact to rounding. So is 1 - 2^x for small x, the loss of a slow state.
    """
    n = add(x, splat(float32(786432.0)))
    nearest = subtract(n, splat(float32(786432.0)))
    f = subtract(x, nearest)
    power = power_of_fraction(n)
    p = multiply_add(splat(float32(5.550410866e-02)), f, splat(float32(2.402265070e-01)))
    p = multiply_add(p, f, splat(float32(6.931471806e-01)))
    return multiply_by_power(multiply_add(multiply(power, f), p, power), nearest)


# The table is faster than the polynomial (benchmarks/NOTES.md), but needs instructions of AVX-512.
exp2 = exp2_by_table if HAS_AVX512 else exp2_by_polynomial


@compiled
def exp(x):
    """Return e^x for x <= 87, within 4 ulp, and 2^-126 for x < -87.3. Subtracts log 2 in two parts."""
    x = maximum(splat(float32(-87.33654)), x)
    n = multiply_add(x, splat(float32(1.4426950409)), splat(float32(12582912.0)))
    rounded = subtract(n, splat(float32(12582912.0)))
    rest = multiply_add(rounded, splat(float32(-0.693359375)), x)
    rest = multiply_add(rounded, splat(float32(2.12194440e-4)), rest)
    return exp2_of_fraction(multiply(rest, splat(float32(1.4426950409))), n)


@compiled
def log1p(x):
    """Return log(1 + x) = 2 atanh(s), s = x / (2 + x), for 0 <= x <= 1, within 3 ulp: a minimax polynomial in s^2."""
    s = divide(x, add(x, splat(float32(2.0))))
    q = multiply(s, s)
    p = splat(float32(1.400599368e-01))
    p = multiply_add(p, q, splat(float32(1.400090257e-01)))
    p = multiply_add(p, q, splat(float32(2.001076362e-01)))
    p = multiply_add(p, q, splat(float32(3.333320814e-01)))
    p = multiply_add(p, q, splat(float32(1.0)))
    return multiply(add(s, s), p)


@intrinsic
def select_by_sign(typing_context, x, positive, negative):
    """Return `negative` in the lanes with x < 0, and `positive` in the others."""

    def generate(context, builder, signature, arguments):
        x, positive, negative = arguments
        is_negative = builder.fcmp_ordered("<", x, ir.Constant(VECTOR, [0.0] * LANES))
        return builder.select(is_negative, negative, positive)

    return Vector(Vector, Vector, Vector), generate


@compiled
def softplus(x):
    """Return log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), within 5 ulp."""
    small = exp(subtract(splat(float32(0.0)), absolute(x)))
    return add(maximum(splat(float32(0.0)), x), log1p(small))


@compiled
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), the derivative of softplus, within 5 ulp."""
    small = exp(subtract(splat(float32(0.0)), absolute(x)))
    of_absolute = divide(splat(float32(1.0)), add(small, splat(float32(1.0))))
    return select_by_sign(x, of_absolute, multiply(small, of_absolute))


@compiled
def silu(x):
    """Return x / (1 + exp(-x)), within 4 ulp for x > -1. Below, the error is within 4 ulp of x exp(x / 2)."""
    exponent = minimum(splat(float32(126.0)), multiply(x, splat(float32(-1.4426950409))))
    return divide(x, add(exp2(exponent), splat(float32(1.0))))


@compiled
def gelu(x):
    """Return x Phi(x) with the normal distribution function Phi, within 5 ulp plus 1e-7.

    Phi(-|x|) is exp(-x^2 / 2) times a polynomial in 1 / (1 + 0.29 |x|), as in Abramowitz and Stegun, 7.1.26, with six
    terms (Lawson's iteration).
    """
    exponent = maximum(splat(float32(-126.0)), multiply(multiply(x, x), splat(float32(-0.7213475204))))
    v = divide(splat(float32(1.0)), multiply_add(absolute(x), splat(float32(0.29)), splat(float32(1.0))))
    p = splat(float32(-8.932361007e-02))
    p = multiply_add(p, v, splat(float32(2.860065103e-01)))
    p = multiply_add(p, v, splat(float32(-9.338226914e-02)))
    p = multiply_add(p, v, splat(float32(1.782859862e-01)))
    p = multiply_add(p, v, splat(float32(1.018165424e-01)))
    p = multiply_add(p, v, splat(float32(1.165967658e-01)))
    tail = multiply(multiply(p, v), exp2(exponent))
    return multiply(x, select_by_sign(x, subtract(splat(float32(1.0)), tail), tail))


@compiled
def relu(x):
    return maximum(splat(float32(0.0)), x)


NONE, RELU, SILU, GELU, SIGMOID = range(5)


@compiled
def activate(x, activation):
    if activation == RELU:
        return relu(x)
    if activation == SILU:
        return silu(x)
    if activation == GELU:
        return gelu(x)
    if activation == SIGMOID:
        return sigmoid(x)
    return x


@compiled
def clear_part(sums, part, channels):
    """Set a row of `sums` `(parts, channels)` to zero."""
    for d in range(0, channels, LANES):
        store_first(sums, part * channels + d, splat(float32(0.0)), min(LANES, channels - d))


@compiled
def add_to_sums(sums, at, total, count):
    """Add the first `count` of 16 numbers to those of `sums` from `at`."""
    store_first(sums, at, add(load_first(sums, at, count), total), count)


@compiled
def sum_of_parts(sums, first_part, num_parts, channels, d, count):
    """Return the sums of `count` channels from `d` over `num_parts` rows of `sums` `(parts, channels)`."""
    total = splat(float32(0.0))
    for part in range(first_part, first_part + num_parts):
        total = add(total, load_first(sums, part * channels + d, count))
    return total


@compiled
def mean_of_parts(sums, first_part, num_parts, channels, num_pixels, out, start):
    """Write the means over `num_pixels` pixels, whose sums are rows of `sums` `(parts, channels)`, to `out`."""
    share = splat(float32(1.0 / num_pixels))
    for d in range(0, channels, LANES):
        count = min(LANES, channels - d)
        total = sum_of_parts(sums, first_part, num_parts, channels, d, count)
        store_first(out, start + d, multiply(total, share), count)
