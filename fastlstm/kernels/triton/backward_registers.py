"""Backward: a whole sequence in one program, the mirror of ``forward_registers.py``."""

from collections.abc import Sequence

from fastlstm.spec import Gradients, Incoming, Saved, Weights

from .backward_by_unit import GatesByUnit, incoming_arguments
from .backward_registers_step import backward_step, prepared, read_at, steps_ahead
from .call import Call, row_arguments, weight_arguments
from .gluon import block_barrier, gl, gluon
from .launch import is_fast, launch, precision_of
from .plan import Plan
from .register_products import biases, columns_of_gates, gate_buffers, layout_of_cells, tanh_of
from .register_tiles import (
    at_step,
    beside,
    elements,
    first_row,
    given,
    is_crowded,
    load_lengths,
    row_of,
)


@gluon.jit(
    do_not_specialize=["rows", "T", "B", "dy_t", "dy_b", "dc_t", "dc_b"],
    do_not_specialize_on_alignment=[
        *("c0", "offsets", "lengths", "reset", "dc_all", "dh_n", "dc_n"),
    ],
)
def lstm_bwd_registers_kernel(
    gates,  # [D, rows, H, 4]: with KEPT after activation; else float32, before it, without biases
    w_hh,  # [4H, H], direction 0
    b_ih,  # [4H] or None
    b_hh,  # [4H] or None
    w_hh_reverse,  # [4H, H], direction 1; None if there is none
    b_ih_reverse,  # [4H] or None
    b_hh_reverse,  # [4H] or None
    c0,  # [D, B, H] or None
    c_all,  # float32 [rows, D*H]
    offsets,  # int64 [T], the first row of each step of packed rows; None for [T, B]
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    dy,  # [rows, D*H] of strides dy_t, dy_b, or None
    dc_all,  # [rows, D*H] of strides dc_t, dc_b, or None
    dh_n,  # [D, B, H] or None
    dc_n,  # [D, B, H] or None
    dgates,  # [D, rows, H, 4], written: gradients of the gates before activation
    dh0,  # [D, B, H] or None, written
    dc0,  # [D, B, H] or None, written
    rows,  # how many rows there are, padding included
    T,
    B,
    dy_t,  # DY_UNIT elements of dy from a step to the next; with offsets from a row to the next
    dy_b,  # DY_UNIT elements of dy from a sequence to the next
    dc_t,  # elements of dc_all from a step to the next; with offsets from a row to the next
    dc_b,  # elements of dc_all from a sequence to the next
    H: gl.constexpr,
    D: gl.constexpr,
    U: gl.constexpr,  # H, rounded up to a power of two
    N: gl.constexpr,  # sequences of a program: 8 or 4, of exact numbers 4 or 2
    DY_UNIT: gl.constexpr,  # elements; it divides both strides of dy
    KEPT: gl.constexpr,  # whether forward has kept the gates
    EXACT: gl.constexpr,  # whether float32 is multiplied as such
    FAST: gl.constexpr,  # whether activations are approximate
):
    """N sequences in one direction, from the last step to the first; the weights stay on chip."""
    dtype: gl.constexpr = w_hh.dtype.element_ty
    direction = 0
    if D == 2:
        direction = gl.program_id(1)
        if direction == 1:
            w_hh, b_ih, b_hh = w_hh_reverse, b_ih_reverse, b_hh_reverse
    first = gl.program_id(0).to(gl.int64) * N

    w = columns_of_gates(w_hh, H, U, N, EXACT)
    bias = 0.0
    if not KEPT:
        bias = biases(b_ih, b_hh, H, U, N, EXACT)

    cells: gl.constexpr = layout_of_cells(U, N, EXACT)
    zero = gl.zeros([U, N], gl.float32, cells)
    unit = gl.arange(0, U, gl.SliceLayout(1, cells))
    n = first + gl.arange(0, N, gl.SliceLayout(0, cells))
    real = (n < B)[None, :] & (unit < H)[:, None]
    fours: gl.constexpr = beside(zero, zero, zero, zero, U, N).type.layout
    n4 = first + gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, fours)))
    unit4 = gl.arange(0, U, gl.SliceLayout(1, gl.SliceLayout(2, fours)))
    gate = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, fours)))
    real4 = ((n4 < B)[None, :] & (unit4 < H)[:, None])[:, :, None]
    state_at = (direction * B + n)[None, :] * H + unit[:, None]
    dh, dc, c_start = zero, zero, 0.0
    if dh_n is not None:
        dh = gl.load(dh_n + state_at, real & given(dh_n, H), 0).to(gl.float32)
    if dc_n is not None:
        dc = gl.load(dc_n + state_at, real & given(dc_n, H), 0).to(gl.float32)
    if c0 is not None:
        c_start = gl.load(c0 + state_at, real & given(c0, H), 0).to(gl.float32)
    weights, state = (w, bias), (dh, dc)

    # Offsets within the tile, where it lies at step 0, and how far it is to the next step.
    own = gl.arange(0, N, gl.SliceLayout(0, cells))
    own4 = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, fours)))
    at = own[None, :] * (D * H) + unit[:, None]
    at1 = own[None, :] * H + unit[:, None]
    at4 = ((own4[None, :] * H + unit4[:, None]) * 4)[:, :, None] + gate[None, None, :]
    corner4 = (direction * rows.to(gl.int64) + first) * (4 * H)
    c_at = c_all + (first * (D * H) + direction * H)
    g_at, d_at = gates + corner4, dgates + corner4
    c_step, g_step, dy_step, dca_step = D * H, 4 * H, 0, 0
    dy_at, dca_at, dy_off, dca_off = c_at, c_at, 0, 0
    pair: gl.constexpr = 32 // dtype.primitive_bitwidth
    plain: gl.constexpr = lengths is None and reset is None
    MOVES: gl.constexpr = offsets is None and (plain or not is_crowded(U, pair, EXACT))
    if MOVES:
        c_step, g_step = B.to(gl.int64) * (D * H), B.to(gl.int64) * (4 * H)
    if dy is not None:
        dy_step = dy_t.to(gl.int64) * DY_UNIT
        dy_b = dy_b.to(gl.int64) * DY_UNIT
        dy_off = own[None, :] * dy_b + unit[:, None]
        dy_at = dy + (first * dy_b + direction * H)
    if dc_all is not None:
        dca_step = dc_t.to(gl.int64)
        dca_off = own[None, :] * dc_b.to(gl.int64) + unit[:, None]
        dca_at = dc_all + (first * dc_b.to(gl.int64) + direction * H)

    steps, length, length4 = T, 0, 0
    if lengths is not None:
        length = load_lengths(lengths, n, T, B, H)
        steps = gl.max(length, 0).to(gl.int32)
        length = length.to(gl.int32)
        length4 = load_lengths(lengths, n4, T, B, H).to(gl.int32)
    forth = 2 * direction - 1
    last = (steps - 1) * (1 - direction)
    far = last.to(gl.int64)
    AHEAD: gl.constexpr = steps_ahead(U, N, pair, reset is not None, EXACT)
    firsts = 0, 0, 0, 0
    if MOVES:
        c_at += far * c_step
        g_at += far * g_step
        d_at += far * g_step
        dy_at += far * dy_step
        dca_at += far * dca_step
        c_step, g_step = c_step * forth, g_step * forth
        dy_step, dca_step = dy_step * forth, dca_step * forth
    elif offsets is not None:
        row = first_row(last, offsets, T)
        row_1 = first_row(last + forth, offsets, T)
        row_2 = first_row(last + 2 * forth, offsets, T)
        firsts = row, row_1, row_2, 0
        if AHEAD == 2:
            firsts = row, row_1, row_2, first_row(last + 3 * forth, offsets, T)
    real_0 = real & (steps > 0)
    if lengths is not None:
        real_0 = real & at_step(last, length)
    c_0 = c_at
    if offsets is not None:
        c_0 = c_at + elements(firsts[0], c_step)
    elif not MOVES:
        c_0 = c_at + elements(row_of(last, B), c_step)
    else:
        c_at += c_step
    tanh_c = tanh_of(gl.load(c_0 + at, real_0, 0), FAST, EXACT)
    places, strides = (c_at, g_at, dy_at, dca_at), (c_step, g_step, dy_step, dca_step)
    tile = real, real4, at, at1, at4, dy_off, dca_off
    order = steps, last, forth, n, length, length4
    call = c_start, c0, offsets, lengths, reset, dy, dc_all, T, B
    now = 0
    read, places = read_at(
        places, strides, 0, last, firsts[0], firsts[1], tile, order, call, H, MOVES
    )
    if AHEAD == 2:
        now, tanh_c = prepared(
            read, tanh_c, bias, 0, last, order, call, dtype, U, N, KEPT, EXACT, FAST
        )
        read, places = read_at(
            places, strides, 1, last + forth, firsts[1], firsts[2], tile, order, call, H, MOVES
        )

    even, odd = gate_buffers(dtype, U, N, EXACT), gate_buffers(dtype, U, N, EXACT)
    block_barrier()  # else the loop has one more, for what shared memory held before
    if steps % 2 == 1:
        state, d_at, firsts, tanh_c, places, now, read = backward_step(
            odd, 0, weights, state, d_at, firsts, tanh_c, places, now, read,
            strides, tile, order, call, H, U, N, KEPT, EXACT, FAST, AHEAD, MOVES,
        )  # fmt: skip
    for s in range(steps % 2, steps, 2):
        state, d_at, firsts, tanh_c, places, now, read = backward_step(
            even, s, weights, state, d_at, firsts, tanh_c, places, now, read,
            strides, tile, order, call, H, U, N, KEPT, EXACT, FAST, AHEAD, MOVES,
        )  # fmt: skip
        state, d_at, firsts, tanh_c, places, now, read = backward_step(
            odd, s + 1, weights, state, d_at, firsts, tanh_c, places, now, read,
            strides, tile, order, call, H, U, N, KEPT, EXACT, FAST, AHEAD, MOVES,
        )  # fmt: skip
    dh, dc = state
    if dh0 is not None:
        gl.store(dh0 + state_at, dh.to(dh0.dtype.element_ty), real & given(dh0, H))
    if dc0 is not None:
        gl.store(dc0 + state_at, dc.to(dc0.dtype.element_ty), real & given(dc0, H))


def launch_lstm_bwd_registers(
    call: Call,
    plan: Plan,
    then: Sequence[Weights],
    saved: Saved,
    incoming: Incoming,
    gradients: Gradients,
) -> None:
    """Write the gradients of one layer; `then`: the weights of the forward pass."""
    by_unit = GatesByUnit.of(call, then, saved, gradients)
    launch(
        lstm_bwd_registers_kernel,
        (-(-call.rows.B // plan.batch), call.spec.directions),
        plan,
        gates=by_unit.gates,
        **weight_arguments(call.weights, "w_hh"),
        **weight_arguments(then, "b_ih", "b_hh"),
        c0=call.state.c,
        c_all=saved.c_all,
        **row_arguments(call, plan),
        **incoming_arguments(incoming),
        dgates=by_unit.dgates,
        dh0=gradients.dh0,
        dc0=gradients.dc0,
        KEPT=saved.gates is not None,
        EXACT=precision_of(call.x) == "ieee",
        FAST=is_fast(call.x),
    )
    by_unit.finish(gradients)
