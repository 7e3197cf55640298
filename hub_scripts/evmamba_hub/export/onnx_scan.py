"""The atrous selective scan in ONNX's standard operators, for feature maps of any size: a `Scan` along the sequences.

`kernels/README.md` defines symbols, sequences and recurrence. The order of the groups is 0, 2, 1, 3 here: the two
row-wise groups are adjacent, and so are the two column-wise groups. Channels are the last dimension of the states
`(B, K, N, D)`, and every operator of a step runs along them. `benchmarks/NOTES.md` says why one loop runs over all
steps.

The functions are traced: their arguments are values of the graph, and sizes are tensors of one element.
"""

from itertools import accumulate, pairwise

from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op


OPSET = 18

GROUP_ORDER = [0, 2, 1, 3]


def to_shape(*sizes):
    """Return a shape from sizes, each of which is a number or a value of the graph."""
    return op.Concat(*(op.Constant(value_ints=[size]) if isinstance(size, int) else size for size in sizes), axis=0)


def halved_sides(hidden_states):
    """Return B, H, W and D of a map, ceil(H / 2) and ceil(W / 2)."""
    batch_size, height, width, channels = (op.Shape(hidden_states, start=i, end=i + 1) for i in range(4))
    return batch_size, height, width, channels, op.Div(op.Add(height, [1]), [2]), op.Div(op.Add(width, [1]), [2])


def to_sequences(hidden_states):
    """Return the four sequences (B, K, L, D) of a map (B, H, W, D). Odd sides are padded with zeros."""
    batch_size, height, width, channels, rows, columns = halved_sides(hidden_states)
    row_pad, column_pad = op.Sub(op.Mul(rows, [2]), height), op.Sub(op.Mul(columns, [2]), width)
    padded = op.Pad(hidden_states, to_shape(0, 0, 0, 0, 0, row_pad, column_pad, 0))
    cells = op.Reshape(padded, to_shape(batch_size, rows, 2, columns, 2, channels))
    even_rows, odd_rows = op.Split(cells, axis=2, num_outputs=2)  # (B, H/2, 1, W/2, 2, D) each
    shape = to_shape(batch_size, 2, -1, channels)
    by_row = op.Reshape(op.Transpose(even_rows, perm=[0, 4, 1, 3, 2, 5]), shape)
    by_column = op.Reshape(op.Transpose(odd_rows, perm=[0, 4, 3, 1, 2, 5]), shape)
    return op.Concat(by_row, by_column, axis=1)


def to_map(sequences, hidden_states):
    """Invert `to_sequences`: (B, K, L, D) -> (B, H, W, D), with the sides of `hidden_states`."""
    batch_size, height, width, channels, rows, columns = halved_sides(hidden_states)
    by_row, by_column = op.Split(sequences, axis=1, num_outputs=2)  # (B, 2, L, D) each
    by_row = op.Reshape(by_row, to_shape(batch_size, 2, rows, columns, 1, channels))
    by_column = op.Reshape(by_column, to_shape(batch_size, 2, columns, rows, 1, channels))
    even_rows = op.Transpose(by_row, perm=[0, 2, 4, 3, 1, 5])  # (B, H/2, 1, W/2, 2, D)
    odd_rows = op.Transpose(by_column, perm=[0, 3, 4, 2, 1, 5])
    cells = op.Concat(even_rows, odd_rows, axis=2)  # (B, H/2, 2, W/2, 2, D)
    padded = op.Reshape(cells, to_shape(batch_size, op.Mul(rows, [2]), op.Mul(columns, [2]), channels))
    return op.Slice(padded, [0, 0], to_shape(height, width), [1, 2])


@script()
def softplus(x) -> FLOAT[...]:
    """Return log(1 + exp(x)) to rounding. The operator of onnxruntime is three times slower (benchmarks/NOTES.md)."""
    one = op.Constant(value_float=1.0)
    z = op.Exp(op.Neg(op.Abs(x)))
    w = one + z
    return op.Relu(x) + op.Log(w) + (z - (w - one)) / w  # the last term restores what w has lost to rounding


@script()
def recur(h_0, delta, delta_u, B, C, A) -> FLOAT[...]:
    """Return h_t C_t of all steps, (B, K, L, 1, D).

    Args:
        h_0: The state before the first step, (B, K, N, D).
        delta, delta_u: (B, K, L, 1, D).
        B: (B, K, L, N, 1).
        C: (B, K, L, 1, N).
        A: (K, N, D).
    """

    # OpenVINO compiles no body whose values have neither a type nor a rank; the sides are of any size
    @graph()
    def advance(
        h: FLOAT[None, None, None, None],
        delta_t: FLOAT[None, None, 1, None],
        delta_u_t: FLOAT[None, None, 1, None],
        B_t: FLOAT[None, None, None, 1],
        C_t: FLOAT[None, None, 1, None],
    ):
        h_t = op.Exp(delta_t * A) * h + delta_u_t * B_t
        y_t = op.MatMul(C_t, h_t)
        return h_t, y_t

    _last, y = op.Scan(
        h_0,
        delta,
        delta_u,
        B,
        C,
        body=advance,
        num_scan_inputs=4,
        scan_input_axes=[2, 2, 2, 2],
        scan_output_axes=[2],
    )
    return y


def scan(hidden_states, x_proj_weight, dt_proj_weight, dt_proj_bias, A_log, D, backend):
    """Translate the operator `evmamba_kernels::atrous_selective_scan`. The argument `backend` has no effect."""

    def ordered(parameter):
        return op.Gather(op.Cast(parameter, to=FLOAT.dtype), GROUP_ORDER)

    x_proj = op.Transpose(ordered(x_proj_weight), perm=[0, 2, 1])  # (K, D, R + 2N)
    dt_proj = op.Transpose(ordered(dt_proj_weight), perm=[0, 2, 1])  # (K, R, D)
    A = op.Neg(op.Exp(op.Transpose(ordered(A_log), perm=[0, 2, 1])))  # (K, N, D)

    u = to_sequences(op.Cast(hidden_states, to=FLOAT.dtype))  # (B, K, L, D)
    rank, state_size = dt_proj_weight.shape[-1], A_log.shape[-1]
    bounds = accumulate([0, rank, state_size, state_size])
    projected = op.MatMul(u, x_proj)  # (B, K, L, R + 2N)
    dt, B, C = (op.Slice(projected, [start], [end], [3]) for start, end in pairwise(bounds))
    delta = softplus(op.Add(op.MatMul(dt, dt_proj), op.Unsqueeze(ordered(dt_proj_bias), [1])))  # (B, K, L, D)

    h_0 = op.Expand(0.0, to_shape(op.Shape(u, start=0, end=1), op.Shape(A)))
    delta_u = op.Mul(delta, u)
    y = recur(h_0, op.Unsqueeze(delta, [3]), op.Unsqueeze(delta_u, [3]), op.Unsqueeze(B, [4]), op.Unsqueeze(C, [3]), A)
    y = op.Add(op.Squeeze(y, [3]), op.Mul(op.Unsqueeze(ordered(D), [1]), u))
    return op.CastLike(to_map(y, hidden_states), hidden_states)
