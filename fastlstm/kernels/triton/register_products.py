"""The products of a step in the registers regime: of matrix instructions or, EXACT, of FMA.

Also what differs with them: how threads hold cells, how what is multiplied lies in shared memory,
and activations.
"""

from .exact_tiles import (
    backward_weights,
    exact_cells,
    exact_logistic,
    exact_product,
    exact_state,
    exact_tanh,
    forward_weights,
)
from .gluon import gl, gluon, mma_v2
from .register_tiles import (
    COLUMNS,
    activated,
    apart,
    at_step,
    beside,
    by_gate,
    by_unit_of,
    cell_layout,
    columns_of,
    given,
    load_bias,
    rounded,
    stack,
    state_layout,
    tanh,
    turned,
    weight_tile,
)


@gluon.constexpr_function
def matrix_layout(U):
    """Return how the threads hold the result ``[4U, 8]`` of matrix instructions."""
    return gl.NVMMADistributedLayout([2, 0], [U // 16, 1], [16, 8])


@gluon.constexpr_function
def operand_layout(side, U, pair):
    """Return how they hold a factor of numbers that go `pair` to 4 bytes: 0 left, 1 right."""
    return gl.DotOperandLayout(side, matrix_layout(U), pair)


@gluon.constexpr_function
def layout_of_cells(U, N, EXACT):
    """Return how they hold cells ``[U, N]``."""
    return exact_cells(U, N) if EXACT else cell_layout(U, N)


@gluon.jit
def biases(b_ih, b_hh, H, U: gl.constexpr, N: gl.constexpr, EXACT: gl.constexpr):
    """Return b_ih + b_hh as ``[4U, 8]``, EXACT as ``[U, N, 4]``; zeros where there are none."""
    if EXACT:
        zero = gl.zeros([U, N], gl.float32, exact_cells(U, N))
        result = beside(zero, zero, zero, zero, U, N)
        if b_ih is not None:
            four: gl.constexpr = result.type.layout
            unit = gl.arange(0, U, gl.SliceLayout(1, gl.SliceLayout(2, four)))[:, None]
            gate = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, four)))[None, None, :]
            at, has = gate * H + unit[:, :, None], (unit < H)[:, :, None] & given(b_ih, H)
            result += gl.load(b_ih + at, has, 0) + gl.load(b_hh + at, has, 0)
    else:
        result = gl.zeros([4 * U, COLUMNS], gl.float32, matrix_layout(U))
        if b_ih is not None:
            result += load_bias(b_ih, b_hh, H, U, matrix_layout(U))[:, None]
    return result


@gluon.jit
def input_side(
    x, w_x, start, U: gl.constexpr, N: gl.constexpr, FUSED: gl.constexpr, EXACT: gl.constexpr
):
    """Return what x ``[I, 8]``, or its product ``[U, N, 4]``, adds to the gates, as biases are."""
    if FUSED:
        result = mma_v2(w_x, rounded(x), start, "tf32")
    elif EXACT:
        result = start + x
    else:
        tile: gl.constexpr = start.type.layout  # Triton 3.6 hands no layout on without a name
        result = start + stack(x, U, N, tile)
    return result


@gluon.jit
def x_there(t, length, FUSED: gl.constexpr):
    """Return which sequences of these lengths ``[N]`` have an input at step t."""
    has = at_step(t, length)
    if not FUSED:
        has = has[:, :, None]
    return has


@gluon.jit
def rows_of_gates(w, H, U: gl.constexpr, N: gl.constexpr, EXACT: gl.constexpr):
    """Load the weights ``[4H, H]`` that h is multiplied with."""
    if EXACT:
        tile = forward_weights(w, H, U, N)
    else:
        pair: gl.constexpr = 32 // w.dtype.element_ty.primitive_bitwidth
        tile = weight_tile(w, H, H, U, U, operand_layout(0, U, pair))
    return tile


@gluon.jit
def gates_before(w, state, ahead, U: gl.constexpr, N: gl.constexpr, EXACT: gl.constexpr):
    """Return i, f, g, o ``[U, N]`` before activation: w times a buffer of h, and what x adds."""
    if EXACT:
        four: gl.constexpr = ahead.type.layout
        sums = gl.permute(gl.reshape(exact_product(w, state, N), [N, U, 4]), [1, 0, 2])
        cells: gl.constexpr = exact_cells(U, N)
        gates = apart(gl.convert_layout(sums, four, assert_trivial=True) + ahead, U, N, cells)
    else:
        right: gl.constexpr = gl.DotOperandLayout(1, ahead.type.layout, w.type.layout.k_width)
        gates = by_gate(mma_v2(w, state.load(right), ahead, "tf32"), U, N)
    return gates


@gluon.jit
def gates_after(x, bias, U: gl.constexpr, N: gl.constexpr, EXACT: gl.constexpr):
    """Return i, f, g, o ``[U, N]`` before activation, of ``[U, N, 4]`` and biases."""
    if EXACT:
        cells: gl.constexpr = exact_cells(U, N)
        gates = apart(bias + x, U, N, cells)
    else:
        tile: gl.constexpr = bias.type.layout
        gates = by_gate(bias + stack(x, U, N, tile), U, N)
    return gates


@gluon.jit
def state(dtype: gl.constexpr, K: gl.constexpr, N: gl.constexpr, EXACT: gl.constexpr):
    """Return a buffer ``[K, 8]``, EXACT ``[K, N]``, of what weights are multiplied with."""
    shared: gl.constexpr = (
        exact_state(K, N) if EXACT else state_layout(K, 32 // dtype.primitive_bitwidth)
    )
    return gl.allocate_shared_memory(dtype, [K, N if EXACT else COLUMNS], shared)


@gluon.jit
def put(buffer, x, K: gl.constexpr, N: gl.constexpr, EXACT: gl.constexpr):
    """Write x ``[K, N]`` to a buffer as its reader takes it."""
    if not EXACT:
        x = columns_of(rounded(x), K, N)
    buffer.store(x)


@gluon.jit
def columns_of_gates(w, H, U: gl.constexpr, N: gl.constexpr, EXACT: gl.constexpr):
    """Load the weights ``[4H, H]`` that the gradients of gates are multiplied with, transposed."""
    if EXACT:
        tiles = backward_weights(w, H, U, N)
    else:
        pair: gl.constexpr = 32 // w.dtype.element_ty.primitive_bitwidth
        left: gl.constexpr = operand_layout(0, U, pair)
        i, f = turned(w, H, U, left), turned(w + H * H, H, U, left)
        tiles = i, f, turned(w + 2 * H * H, H, U, left), turned(w + 3 * H * H, H, U, left)
    return tiles


@gluon.jit
def gate_buffers(dtype: gl.constexpr, U: gl.constexpr, N: gl.constexpr, EXACT: gl.constexpr):
    """Return a buffer for the gradients of each gate, EXACT one for all of them together."""
    if EXACT:
        buffers = state(dtype, 4 * U, N, EXACT)
    else:
        i, f = state(dtype, U, N, EXACT), state(dtype, U, N, EXACT)
        buffers = i, f, state(dtype, U, N, EXACT), state(dtype, U, N, EXACT)
    return buffers


@gluon.jit
def put_gates(to, i, f, g, o, U: gl.constexpr, N: gl.constexpr, EXACT: gl.constexpr):
    """Write the gradients of gates ``[U, N]`` to their buffers."""
    if EXACT:
        gates = gl.permute(beside(i, f, g, o, U, N), [0, 2, 1])
        put(to, gl.reshape(gates, [4 * U, N]), 4 * U, N, EXACT)
    else:
        put(to[0], i.to(to[0].dtype), U, N, EXACT)
        put(to[1], f.to(to[0].dtype), U, N, EXACT)
        put(to[2], g.to(to[0].dtype), U, N, EXACT)
        put(to[3], o.to(to[0].dtype), U, N, EXACT)


@gluon.jit
def state_gradient(w, d, U: gl.constexpr, N: gl.constexpr, EXACT: gl.constexpr):
    """Return the gradient of h ``[U, N]``, of buffers of those of the gates.

    Of matrix instructions four products, one a gate: their sums are four short chains, which go
    side by side, instead of one long one.
    """
    if EXACT:
        sums = gl.permute(gl.reshape(exact_product(w, d, N), [4, N, U // 4]), [2, 0, 1])
        cells: gl.constexpr = exact_cells(U, N)
        total = gl.convert_layout(gl.reshape(sums, [U, N]), cells, assert_trivial=True)
    else:
        tile: gl.constexpr = w[0].type.layout.parent
        right: gl.constexpr = gl.DotOperandLayout(1, tile, w[0].type.layout.k_width)
        zero = gl.zeros([U, COLUMNS], gl.float32, tile)
        i = mma_v2(w[0], d[0].load(right), zero, "tf32")
        f = mma_v2(w[1], d[1].load(right), zero, "tf32")
        g = mma_v2(w[2], d[2].load(right), zero, "tf32")
        o = mma_v2(w[3], d[3].load(right), zero, "tf32")
        total = by_unit_of((i + f) + (g + o), U, N)
    return total


@gluon.jit
def activate(i, f, g, o, dtype: gl.constexpr, FAST: gl.constexpr, EXACT: gl.constexpr):
    """Return the gates after activation, for results of a type."""
    if EXACT:
        gates = exact_logistic(i), exact_logistic(f), exact_tanh(g), exact_logistic(o)
    else:
        gates = activated(i, f, g, o, dtype, FAST)
    return gates


@gluon.jit
def tanh_of(c, FAST: gl.constexpr, EXACT: gl.constexpr):
    """Return tanh of cells."""
    if EXACT:
        result = exact_tanh(c)
    else:
        result = tanh(c, FAST)
    return result
