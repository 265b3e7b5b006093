"""Backward: the units of a layer spread over the blocks of a cluster, as ``forward_cluster.py``.

Each of C blocks owns H / C units. It turns their gradients of h and c into those of their gates,
multiplies these with its own rows of W_hh, which gives it a part of the gradient of all units' h a
step before, and sends each block what that one owns of it (``async_store``), as float32. A barrier
in each block counts the bytes that arrive; the parts are added up in the order of blocks, so
results repeat to the bit. All gates' gradients instead would be twice as many bytes.

Two buffers are enough: a block sends what it has of step t - 1 only after it has received step t
from everybody, so everybody has read what it was sent of step t + 1.

All blocks take as many steps as the longest of the N sequences has; a sequence that has no such
step keeps its gradients of h and c meanwhile.
"""

from collections.abc import Sequence

from fastlstm.spec import Gradients, Incoming, Saved, Weights

from .backward_by_unit import GatesByUnit, incoming_arguments
from .backward_cluster_step import cluster_step_back, factors, layout_of, own_weights
from .call import Call, cluster_arguments, weight_arguments
from .gluon import cluster, gl, gluon, mbarrier
from .launch import is_fast, launch
from .plan import Plan
from .register_tiles import (
    at_step,
    beside,
    elements,
    first_row,
    flags,
    given,
    load_lengths,
    longest,
    only,
)


@gluon.jit(
    do_not_specialize=["rows", "T", "B", "dy_t", "dy_b", "dc_t", "dc_b"],
    do_not_specialize_on_alignment=[
        *("c0", "offsets", "lengths", "reset", "dc_all", "dh_n", "dc_n"),
    ],
)
def lstm_bwd_cluster_kernel(
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
    UNITS: gl.constexpr,  # H, rounded up to a power of two
    N: gl.constexpr,  # sequences of a cluster
    C: gl.constexpr,  # blocks of a cluster
    DY_UNIT: gl.constexpr,  # elements; it divides both strides of dy
    KEPT: gl.constexpr,  # whether forward has kept the gates
    FAST: gl.constexpr,  # whether activations are approximate
):
    """N sequences in one direction, from the last step to the first."""
    dtype: gl.constexpr = w_hh.dtype.element_ty
    WIDE: gl.constexpr = 128 // dtype.primitive_bitwidth
    cells: gl.constexpr = layout_of("cells", UNITS, N, C, WIDE)
    direction = 0
    if D == 2:
        direction = gl.program_id(1)
        if direction == 1:
            w_hh, b_ih, b_hh = w_hh_reverse, b_ih_reverse, b_hh_reverse
    first = gl.program_id(0).to(gl.int64) * N

    w_low = own_weights(w_hh, 0, H, UNITS, N, C)
    w_high = own_weights(w_hh, 2 * (UNITS // C), H, UNITS, N, C)

    zero = gl.zeros([UNITS, N], gl.float32, cells)
    cells4: gl.constexpr = beside(zero, zero, zero, zero, UNITS, N).type.layout
    flat: gl.constexpr = gl.SliceLayout(2, cells4)
    unit = gl.arange(0, UNITS, gl.SliceLayout(1, cells))
    own = gl.arange(0, N, gl.SliceLayout(0, cells))
    gate = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, cells4)))
    n = first + own
    real = (n < B)[None, :] & (unit < H)[:, None]
    bias = 0.0
    if not KEPT:
        if b_ih is not None:
            unit4 = gl.arange(0, UNITS, gl.SliceLayout(1, flat))[:, None][:, :, None]
            b_at = gate[None, None, :] * H + unit4
            has = (unit4 < H) & given(b_ih, H)
            bias = gl.load(b_ih + b_at, has, 0).to(gl.float32)
            bias += gl.load(b_hh + b_at, has, 0).to(gl.float32)
    state_at = (direction * B + n)[None, :] * H + unit[:, None]
    dh, dc, c_start = zero, zero, 0.0
    if dh_n is not None:
        dh = gl.load(dh_n + state_at, real & given(dh_n, H), 0).to(gl.float32)
    if dc_n is not None:
        dc = gl.load(dc_n + state_at, real & given(dc_n, H), 0).to(gl.float32)
    if c0 is not None:
        c_start = gl.load(c0 + state_at, real & given(c0, H), 0).to(gl.float32)

    # Offsets within the tile, where it lies at step 0, and how far it is to the next step.
    at = own[None, :] * (D * H) + unit[:, None]
    at4 = (own[None, :] * H + unit[:, None]) * 4
    at4 = gl.convert_layout(at4, flat, assert_trivial=True)[:, :, None] + gate[None, None, :]
    corner4 = (direction * rows.to(gl.int64) + first) * (4 * H)
    c_at = c_all + (first * (D * H) + direction * H)
    g_at, d_at = gates + corner4, dgates + corner4
    c_step, g_step, dy_step, dca_step = D * H, 4 * H, 0, 0
    dy_at, dca_at, dy_off, dca_off = c_at, c_at, 0, 0
    if offsets is None:
        c_step, g_step = B.to(gl.int64) * (D * H), B.to(gl.int64) * (4 * H)
    if dy is not None:
        dy_step, dy_b = dy_t.to(gl.int64) * DY_UNIT, dy_b.to(gl.int64) * DY_UNIT
        dy_off = own[None, :] * dy_b + unit[:, None]
        dy_at = dy + (first * dy_b + direction * H)
    if dc_all is not None:
        dca_step, dc_b = dc_t.to(gl.int64), dc_b.to(gl.int64)
        dca_off = own[None, :] * dc_b + unit[:, None]
        dca_at = dc_all + (first * dc_b + direction * H)

    n = n.to(gl.int32)
    steps, length = T, 0
    if lengths is not None:
        steps = longest(lengths, first, T, B, H, N)
        length = load_lengths(lengths, n, T, B, H).to(gl.int32)
    last = (steps - 1) * (1 - direction)
    forth = 2 * direction - 1
    row, row_1, row_2, row_3 = 0, 0, 0, 0
    real_0, real_1, real_2 = real, real & (steps > 1), real & (steps > 2)
    if lengths is not None:
        real_0 = real & at_step(last, length)
        real_1 = real & at_step(last + forth, length)
        real_2 = real & at_step(last + 2 * forth, length)
    # Where the first steps lie, and what they read.
    at_0, at_1, at_2 = last, last + forth, last + 2 * forth
    if offsets is not None:
        at_0, at_1 = first_row(last, offsets, T), first_row(last + forth, offsets, T)
        at_2 = first_row(last + 2 * forth, offsets, T)
        row, row_1, row_2 = at_0, at_1, at_2
        row_3 = first_row(last + 3 * forth, offsets, T)
    g_0, g_1 = g_at + elements(at_0, g_step), g_at + elements(at_1, g_step)
    dy_0, dy_1 = dy_at + elements(at_0, dy_step), dy_at + elements(at_1, dy_step)
    dca_0, dca_1 = dca_at + elements(at_0, dca_step), dca_at + elements(at_1, dca_step)
    c_0, c_1 = c_at + elements(at_0, c_step), c_at + elements(at_1, c_step)
    c_2 = c_at + elements(at_2, c_step)
    if lengths is None:
        d_at += elements(last, g_step)
        c_step, g_step = c_step * forth, g_step * forth
        dy_step, dca_step = dy_step * forth, dca_step * forth
        c_at, g_at, dy_at, dca_at = c_2 + c_step, g_1 + g_step, dy_1 + dy_step, dca_1 + dca_step
    dy_now, dy_next, dca_now, dca_next, reset_now, reset_next = 0.0, 0.0, 0.0, 0.0, 0, 0
    if dy is not None:
        dy_now = gl.load(dy_0 + dy_off, real_0 & given(dy, H), 0)
        dy_next = gl.load(dy_1 + dy_off, real_1 & given(dy, H), 0)
    if dc_all is not None:
        dca_now = gl.load(dca_0 + dca_off, real_0 & given(dc_all, H), 0)
        dca_next = gl.load(dca_1 + dca_off, real_1 & given(dc_all, H), 0)
    real4_0 = gl.convert_layout(real_0, flat, assert_trivial=True)[:, :, None]
    real4_1 = gl.convert_layout(real_1, flat, assert_trivial=True)[:, :, None]
    g_now, g_next = gl.load(g_0 + at4, real4_0, 0), gl.load(g_1 + at4, real4_1, 0)
    c_now, c = gl.load(c_0 + at, real_0, 0), gl.load(c_1 + at, real_1, 0)
    c_before, before = gl.load(c_2 + at, real_2, 0), c
    if c0 is not None:
        if lengths is None:
            before = gl.where(steps > 1, c, c_start)
        else:
            before = gl.where(at_step(last + forth, length), c, c_start)
    if reset is not None:
        reset_now = flags(reset, 0, steps, last, n, length, lengths, B, H)
        reset_next = flags(reset, 1, steps, last + forth, n, length, lengths, B, H)
        before = only((reset_now == 0)[None, :], before)
    now = factors(g_now, bias, c_now, before, dtype, UNITS, N, KEPT, FAST)

    even = gl.allocate_shared_memory(dtype, [4 * UNITS, N], layout_of("own", UNITS, N, C, WIDE))
    odd = gl.allocate_shared_memory(dtype, [4 * UNITS, N], layout_of("own", UNITS, N, C, WIDE))
    sums: gl.constexpr = layout_of("sums", UNITS, N, C, WIDE)
    buffers = gl.allocate_shared_memory(gl.float32, [2, C, UNITS, N], sums)
    arrived = mbarrier.allocate_mbarrier(batch=2)
    for which in gl.static_range(2):
        mbarrier.init(arrived.index(which), count=1)
    at_even, at_odd = arrived.index(0), arrived.index(1)
    mbarrier.expect(at_even, UNITS * N * 4)
    cluster.barrier()

    weights = w_low, w_high, bias
    state, places, firsts = (dh, dc), (c_at, g_at, d_at, dy_at, dca_at), (row, row_1, row_2, row_3)
    read = dy_now, dy_next, dca_now, dca_next, reset_now, reset_next, g_next, c, c_before
    factor = now
    strides, tile = (c_step, g_step, dy_step, dca_step), (real, at, at4, dy_off, dca_off)
    order = steps, last, forth, n, length
    call = c_start, c0, offsets, lengths, reset, dy, dc_all, T, B
    for pair in range(steps // 2):
        s = 2 * pair
        state, places, firsts, read, factor = cluster_step_back(
            even, buffers.index(0), at_even, at_odd, pair % 2, s, steps - 1 - s,
            weights, state, places, firsts, read, factor, strides, tile, order, call,
            H, UNITS, N, C, KEPT, FAST,
        )  # fmt: skip
        s += 1
        state, places, firsts, read, factor = cluster_step_back(
            odd, buffers.index(1), at_odd, at_even, pair % 2, s, steps - 1 - s,
            weights, state, places, firsts, read, factor, strides, tile, order, call,
            H, UNITS, N, C, KEPT, FAST,
        )  # fmt: skip
    if steps % 2 == 1:
        state, places, firsts, read, factor = cluster_step_back(
            even, buffers.index(0), at_even, at_odd, steps // 2 % 2, steps - 1, 0,
            weights, state, places, firsts, read, factor, strides, tile, order, call,
            H, UNITS, N, C, KEPT, FAST,
        )  # fmt: skip
    cluster.barrier()  # nobody leaves while others still send
    dh, dc = state
    if dh0 is not None:
        gl.store(dh0 + state_at, dh.to(dh0.dtype.element_ty), real & given(dh0, H))
    if dc0 is not None:
        gl.store(dc0 + state_at, dc.to(dc0.dtype.element_ty), real & given(dc0, H))


def launch_lstm_bwd_cluster(
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
        lstm_bwd_cluster_kernel,
        (-(-call.rows.B // plan.batch), call.spec.directions),
        plan,
        gates=by_unit.gates,
        **weight_arguments(call.weights, "w_hh"),
        **weight_arguments(then, "b_ih", "b_hh"),
        c0=call.state.c,
        c_all=saved.c_all,
        **cluster_arguments(call, plan),
        **incoming_arguments(incoming),
        dgates=by_unit.dgates,
        dh0=gradients.dh0,
        dc0=gradients.dc0,
        KEPT=saved.gates is not None,
        FAST=is_fast(call.x),
    )
    by_unit.finish(gradients)
