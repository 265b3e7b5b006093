"""Forward: a whole sequence in one program, the weights in registers.

Letters as in ``forward_sequence.py``; U units of a program are H rounded up to a power of two. A
step has one barrier: h goes through two buffers in shared memory by turns. What x adds to the
gates is made a step ahead, of inputs that were asked for two steps ahead: no step waits for it.
"""

import math

from fastlstm.spec import Outputs

from .call import Call, row_arguments, strides_of, weight_arguments
from .gluon import gl, gluon
from .input_products import products_by_unit
from .launch import is_fast, launch, precision_of
from .plan import Plan, padded
from .register_products import (
    activate,
    biases,
    gates_before,
    input_side,
    layout_of_cells,
    operand_layout,
    put,
    rows_of_gates,
    state,
    tanh_of,
    x_there,
)
from .register_tiles import (
    COLUMNS,
    at_step,
    beside,
    elements,
    fills,
    first_row,
    flags,
    given,
    is_crowded,
    load_lengths,
    only,
    row_of,
    row_of_gate,
    weight_tile,
)


@gluon.jit
def forward_step(
    here,  # buffer of h
    there,  # buffer, written
    s,  # how many steps were taken
    weights,  # of rows_of_gates, [4U, I_TILE] with FUSED, of biases
    state,  # c and h [U, N]
    places,  # pointers to y, c_all, gates, and to the input two steps on; without MOVES at row 0
    firsts,  # the first row of this step and of the two that follow, with offsets
    read,  # flags of the next step [N], the next input, what x adds to the gates of this step
    strides,  # of x, of y and c_all, of gates, from a step to the next
    tile,  # what is real of [U, N] and [U, N, 4], the offsets of both; what is real of the input,
    # its offsets, what is read where there is none
    order,  # the number of steps, the first one, +1 or -1, n [N], lengths for [N], input and gates
    call,  # offsets, lengths, reset, c_all, gates, T, B
    D: gl.constexpr,
    H: gl.constexpr,
    U: gl.constexpr,
    N: gl.constexpr,
    FUSED: gl.constexpr,
    EXACT: gl.constexpr,
    FAST: gl.constexpr,
    MOVES: gl.constexpr,  # whether places move on from step to step; else rows say where they are
):
    """Take one step; return the next one's state, places, firsts and read."""
    w, w_x, start = weights
    c, h = state
    y_at, c_at, g_at, x_at = places
    row, row_1, row_2 = firsts
    starts, x_next, ahead = read
    x_step, y_step, g_step = strides
    real, at, real4, at4, x_real, x_off, x_else = tile
    steps, begin, forth, n, length, length_x, length4 = order
    offsets, lengths, reset, c_all, gates, T, B = call
    t = begin + forth * s
    cells: gl.constexpr = c.type.layout
    # The load comes first, though two steps ahead: a warp has six counters of what is outstanding,
    # so that what waits for tanh may wait for a load as well.
    y_now, c_now, g_now, x_now = y_at, c_at, g_at, x_at
    if offsets is not None:
        x_now = x_at + elements(row_2, x_step)
    if not MOVES:
        row_now = row if offsets is not None else row_of(t, B)
        y_now, c_now = y_at + elements(row_now, D * H), c_at + elements(row_now, D * H)
        g_now = g_at + elements(row_now, 4 * H)
    if lengths is None:
        x_later = gl.load(x_now + x_off, x_real & (s + 2 < steps), x_else)
    else:
        x_later = gl.load(x_now + x_off, x_real & x_there(t + 2 * forth, length_x, FUSED), x_else)
    i, f, g, o = gates_before(w, here, ahead, U, N, EXACT)
    ahead = input_side(x_next, w_x, start, U, N, FUSED, EXACT)
    i, f, g, o = activate(i, f, g, o, there.dtype, FAST, EXACT)
    c_new = f * c + i * g
    h_new = (o * tanh_of(c_new, FAST, EXACT)).to(there.dtype)
    if not fills(H, U):  # an infinite x makes NaN of units that only fill the tile: 0 * inf
        unit = gl.arange(0, U, gl.SliceLayout(1, cells))
        h_new = only((unit < H)[:, None], h_new)
    h_next, c_next = h_new, c_new
    if lengths is not None:
        active = (t < length)[None, :]
        real = real & active
        h_next, c_next = gl.where(active, h_new, h), gl.where(active, c_new, c)
    if reset is not None:
        h_next = only((starts == 0)[None, :], h_next)
        c_next = only((starts == 0)[None, :], c_next)
        starts = flags(reset, s + 2, steps, t + 2 * forth, n, length, lengths, B, H)
    put(there, h_next, U, N, EXACT)
    gl.store(y_now + at, h_new, real)
    if gates is not None:
        together = beside(i, f, g, o, U, N).to(gates.dtype.element_ty)
        if lengths is not None:
            real4 = real4 & at_step(t, length4)[:, :, None]
        gl.store(g_now + at4, together, real4 & given(gates, H))
    if c_all is not None:
        gl.store(c_now + at, c_new, real & given(c_all, H))
    if offsets is not None:
        row, row_1, row_2 = row_1, row_2, first_row(t + 3 * forth, offsets, T)
    else:
        x_at += x_step
    if MOVES:
        y_at += y_step
        c_at += y_step
        g_at += g_step
    places, firsts = (y_at, c_at, g_at, x_at), (row, row_1, row_2)
    return (c_next, h_next), places, firsts, (starts, x_later, ahead)


@gluon.jit(
    do_not_specialize=["rows", "T", "B", "x_t", "x_b"],
    do_not_specialize_on_alignment=["h0", "c0", "offsets", "lengths", "reset"],
)
def lstm_fwd_registers_kernel(
    x,  # with FUSED [rows, I] of strides x_t, x_b; else float32 [D, rows, H, 4], its products
    w_ih,  # [4H, I], direction 0; None unless FUSED
    w_hh,  # [4H, H]
    b_ih,  # [4H] or None
    b_hh,  # [4H] or None
    w_ih_reverse,  # [4H, I], direction 1; None unless FUSED, or if there is no direction 1
    w_hh_reverse,  # [4H, H] or None
    b_ih_reverse,  # [4H] or None
    b_hh_reverse,  # [4H] or None
    h0,  # [D, B, H] or None
    c0,  # [D, B, H] or None
    offsets,  # int64 [T], the first row of each step of packed rows; None for [T, B]
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    y,  # [rows, D*H]
    h_n,  # [D, B, H]
    c_n,  # [D, B, H]
    c_all,  # float32 [rows, D*H] or None
    gates,  # [D, rows, H, 4] or None: after activation
    rows,  # how many rows there are, padding included
    T,
    B,
    x_t,  # X_UNIT elements of x from a step to the next; with offsets from a row to the next
    x_b,  # X_UNIT elements of x from a sequence to the next
    I: gl.constexpr,
    H: gl.constexpr,
    D: gl.constexpr,
    I_TILE: gl.constexpr,  # I and H, rounded up to powers of two
    U: gl.constexpr,
    N: gl.constexpr,  # sequences of a program: 8 or 4, of exact numbers 4 or 2
    FUSED: gl.constexpr,  # whether x goes through w_ih here
    ONES: gl.constexpr,  # whether the biases are weights of two inputs more, which are always 1
    X_UNIT: gl.constexpr,  # elements; it divides both strides of x
    EXACT: gl.constexpr,  # whether float32 is multiplied as such
    FAST: gl.constexpr,  # whether activations are approximate
):
    """N sequences in one direction, from the first step to the last; the weights stay on chip."""
    dtype: gl.constexpr = w_hh.dtype.element_ty
    pair: gl.constexpr = 32 // dtype.primitive_bitwidth
    direction = 0
    if D == 2:
        direction = gl.program_id(1)
        if direction == 1:
            w_ih, w_hh, b_ih, b_hh = w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse
    first = gl.program_id(0).to(gl.int64) * N

    w = rows_of_gates(w_hh, H, U, N, EXACT)
    start = biases(None if ONES else b_ih, b_hh, H, U, N, EXACT)
    cells: gl.constexpr = layout_of_cells(U, N, EXACT)
    unit = gl.arange(0, U, gl.SliceLayout(1, cells))
    n = first + gl.arange(0, N, gl.SliceLayout(0, cells))
    real = (n < B)[None, :] & (unit < H)[:, None]
    state_at = (direction * B + n)[None, :] * H + unit[:, None]
    c = gl.zeros([U, N], gl.float32, cells)
    h = gl.zeros([U, N], dtype, cells)
    if h0 is not None:
        h = gl.load(h0 + state_at, real & given(h0, H), 0)
    if c0 is not None:
        c = gl.load(c0 + state_at, real & given(c0, H), 0).to(gl.float32)
    fours: gl.constexpr = beside(c, c, c, c, U, N).type.layout
    n4 = first + gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, fours)))
    unit4 = gl.arange(0, U, gl.SliceLayout(1, gl.SliceLayout(2, fours)))
    gate = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, fours)))
    real4 = ((n4 < B)[None, :] & (unit4 < H)[:, None])[:, :, None]

    # Where everything lies at step 0, and how far it is to the next step.
    at = gl.arange(0, N, gl.SliceLayout(0, cells))[None, :] * (D * H) + unit[:, None]
    corner = first * (D * H) + direction * H
    corner4 = (direction * rows.to(gl.int64) + first) * (4 * H)
    at4 = (
        gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, fours)))[None, :] * H + unit4[:, None]
    ) * 4
    at4 = at4[:, :, None] + gate[None, None, :]
    y_at, y_step, g_step = y + corner, B.to(gl.int64) * (D * H), B.to(gl.int64) * (4 * H)
    c_at, g_at = y_at, y_at
    if c_all is not None:
        c_at = c_all + corner
    if gates is not None:
        g_at = gates + corner4
    if FUSED:
        left: gl.constexpr = operand_layout(0, U, pair)
        right: gl.constexpr = operand_layout(1, U, pair)
        w_x = weight_tile(w_ih, H, I, U, I_TILE, left)
        k = gl.arange(0, I_TILE, gl.SliceLayout(1, right))
        nx = first + gl.arange(0, COLUMNS, gl.SliceLayout(0, right)) // (COLUMNS // N)
        x_off = (nx - first)[None, :] * (x_b.to(gl.int64) * X_UNIT) + k[:, None]
        x_at = x + first * (x_b.to(gl.int64) * X_UNIT)
        # Pointers take more registers than offsets, and fewer cycles.
        if U < 128 and fills(H, U) and I_TILE < 64 and pair == 2:
            x_at, x_off = x_at + x_off, 0
        x_real = (nx < B)[None, :] & (k < I)[:, None]
        x_step = x_t.to(gl.int64) * X_UNIT
        x_else = gl.zeros([I_TILE, COLUMNS], dtype, right)
        if ONES:
            r = gl.arange(0, 4 * U, gl.SliceLayout(1, left))
            k = gl.arange(0, I_TILE, gl.SliceLayout(0, left))
            row_b, real_b = row_of_gate(r, H, U)
            at_b = row_b[:, None] + gl.zeros_like(k)[None, :]
            is_b = (real_b & given(b_ih, H))[:, None]
            w_x = gl.load(b_ih + at_b, is_b & (k == I)[None, :], w_x)
            w_x = gl.load(b_hh + at_b, is_b & (k == I + 1)[None, :], w_x)
            k = gl.arange(0, I_TILE, gl.SliceLayout(1, right))
            x_else = gl.where((k >= I)[:, None] & (nx >= 0)[None, :], x_else + 1, x_else)
    else:
        w_x = 0
        nx = n4
        x_off, x_at, x_step, x_real, x_else = at4, x + corner4, g_step, real4, 0.0
    steps, length, length_x, length4 = T, 0, 0, 0
    if lengths is not None:
        length = load_lengths(lengths, n, T, B, H)
        steps = gl.max(length, 0).to(gl.int32)
        length = length.to(gl.int32)
        length_x = load_lengths(lengths, nx, T, B, H).to(gl.int32)
        length4 = load_lengths(lengths, n4, T, B, H).to(gl.int32)
    last = (steps - 1) * direction
    forth = 1 - 2 * direction
    row, row_1, row_2 = 0, 0, 0
    plain: gl.constexpr = lengths is None and reset is None
    MOVES: gl.constexpr = offsets is None and (plain or not is_crowded(U, pair, EXACT))
    if offsets is not None:
        if not FUSED:
            x_step = 4 * H
        row = first_row(last, offsets, T)
        row_1 = first_row(last + forth, offsets, T)
        row_2 = first_row(last + 2 * forth, offsets, T)
    elif D == 2:
        x_at += last * x_step
        x_step = x_step * forth
        if MOVES:
            y_at += last * y_step
            c_at += last * y_step
            g_at += last * g_step
            y_step, g_step = y_step * forth, g_step * forth

    starts = 0
    if reset is not None:
        starts = flags(reset, 0, steps, last, n, length, lengths, B, H)
        h = only((starts == 0)[None, :], h)
        c = only((starts == 0)[None, :], c)
        starts = flags(reset, 1, steps, last + forth, n, length, lengths, B, H)
    even, odd = state(dtype, U, N, EXACT), state(dtype, U, N, EXACT)
    put(even, h, U, N, EXACT)
    put(odd, h, U, N, EXACT)
    x_0, x_1 = x_real & (steps > 0), x_real & (steps > 1)
    if lengths is not None:
        x_0 = x_real & x_there(last, length_x, FUSED)
        x_1 = x_real & x_there(last + forth, length_x, FUSED)
    if offsets is None:
        x_now = gl.load(x_at + x_off, x_0, x_else)
        x_at += x_step
        x_next = gl.load(x_at + x_off, x_1, x_else)
        x_at += x_step
    else:
        x_now = gl.load(x_at + elements(row, x_step) + x_off, x_0, x_else)
        x_next = gl.load(x_at + elements(row_1, x_step) + x_off, x_1, x_else)
    ahead = input_side(x_now, w_x, start, U, N, FUSED, EXACT)
    weights, held, places = (w, w_x, start), (c, h), (y_at, c_at, g_at, x_at)
    firsts, read, strides = (row, row_1, row_2), (starts, x_next, ahead), (x_step, y_step, g_step)
    tile = real, at, real4, at4, x_real, x_off, x_else
    order = steps, last, forth, n, length, length_x, length4
    call = offsets, lengths, reset, c_all, gates, T, B
    if steps % 2 == 1:
        held, places, firsts, read = forward_step(
            odd, even, 0, weights, held, places, firsts, read, strides, tile, order, call,
            D, H, U, N, FUSED, EXACT, FAST, MOVES,
        )  # fmt: skip
    for s in range(steps % 2, steps, 2):
        held, places, firsts, read = forward_step(
            even, odd, s, weights, held, places, firsts, read, strides, tile, order, call,
            D, H, U, N, FUSED, EXACT, FAST, MOVES,
        )  # fmt: skip
        held, places, firsts, read = forward_step(
            odd, even, s + 1, weights, held, places, firsts, read, strides, tile, order, call,
            D, H, U, N, FUSED, EXACT, FAST, MOVES,
        )  # fmt: skip
    c, h = held
    gl.store(h_n + state_at, h, real)
    gl.store(c_n + state_at, c.to(c_n.dtype.element_ty), real)


def launch_lstm_fwd_registers(call: Call, plan: Plan, outputs: Outputs) -> None:
    """Write the outputs of one layer; padding of y, c_all and gates is left as it is."""
    spec, x, weights = call.spec, call.x, call.weights
    x_t, x_b = strides_of(x)
    # In units of what divides both strides, as the compiler cannot know.
    x_unit = math.gcd(x_t, x_b, 16)
    features = padded(spec.input_size)
    w_ih = weight_arguments(weights, "w_ih")
    launch(
        lstm_fwd_registers_kernel,
        (-(-call.rows.B // plan.batch), spec.directions),
        plan,
        x=x if plan.fused else products_by_unit(call),
        **(w_ih if plan.fused else dict.fromkeys(w_ih)),
        **weight_arguments(weights, "w_hh", "b_ih", "b_hh"),
        h0=call.state.h,
        c0=call.state.c,
        **row_arguments(call, plan),
        y=outputs.y,
        h_n=outputs.h_n,
        c_n=outputs.c_n,
        c_all=outputs.c_all,
        gates=outputs.gates,
        x_t=x_t // x_unit,
        x_b=x_b // x_unit,
        I=spec.input_size,
        I_TILE=features,
        FUSED=plan.fused,
        ONES=plan.fused and _takes_ones(call, features),
        X_UNIT=x_unit,
        EXACT=precision_of(x) == "ieee",
        FAST=is_fast(x),
    )


def _takes_ones(call: Call, features: int) -> bool:
    """Return whether the tile of inputs has room for two more, whose weights the biases are.

    Nothing has to be added then, nor set up for the matrix instructions. In TF32 the biases would
    be rounded, 16-bit ones are not.
    """
    spec = call.spec
    return spec.bias and call.x.element_size() == 2 and spec.input_size + 2 <= features
