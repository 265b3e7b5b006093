"""Forward: the units of a layer spread over the blocks of a cluster, all steps in one launch.

Each of C blocks owns H / C units and has their rows of W_hh in registers. After a step it sends
its part of h into the shared memory of all blocks (``async_store``), and a barrier in each of them
counts the bytes that arrive. Two buffers are enough: a block sends h of step t + 1 only after it
has received h of step t from everybody, so everybody has read h of step t - 1.

All blocks take as many steps as the longest of the N sequences has. A sequence that has ended, or
has not begun, keeps its h and c meanwhile, and its h is sent as it is.
"""

from fastlstm.spec import Outputs

from .call import Call, cluster_arguments, weight_arguments
from .forward_cluster_step import cluster_step, gates_and_units, layout_of
from .gluon import cluster, gl, gluon, mbarrier
from .input_products import products_by_unit
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
    rounded,
)


@gluon.jit
def own_weights(
    w,  # [4H, H]
    H: gl.constexpr,
    UNITS: gl.constexpr,
    C: gl.constexpr,
    wide: gl.constexpr,
    left: gl.constexpr,
):
    """Load what all gates have of each quarter of the units.

    Four operands ``[4 UNITS, UNITS / 4]``.
    """
    K: gl.constexpr = UNITS // 4
    gate, unit = gates_and_units(gl.arange(0, 4 * UNITS, gl.SliceLayout(1, wide)), UNITS // C)
    k = gl.arange(0, K, gl.SliceLayout(0, wide))
    at = w + (gate * H + unit)[:, None] * H + k[None, :]
    has = (unit < H)[:, None]
    w0 = gl.convert_layout(rounded(gl.load(at, has & (k < H)[None, :], 0)), left)
    w1 = gl.convert_layout(rounded(gl.load(at + K, has & (k + K < H)[None, :], 0)), left)
    w2 = gl.convert_layout(rounded(gl.load(at + 2 * K, has & (k + 2 * K < H)[None, :], 0)), left)
    w3 = gl.convert_layout(rounded(gl.load(at + 3 * K, has & (k + 3 * K < H)[None, :], 0)), left)
    return w0, w1, w2, w3


@gluon.jit(
    do_not_specialize=["rows", "T", "B"],
    do_not_specialize_on_alignment=["h0", "c0", "offsets", "lengths", "reset"],
)
def lstm_fwd_cluster_kernel(
    x,  # float32 [D, rows, H, 4]: the input products
    w_hh,  # [4H, H], direction 0
    b_ih,  # [4H] or None
    b_hh,  # [4H] or None
    w_hh_reverse,  # [4H, H], direction 1; None if there is none
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
    H: gl.constexpr,
    D: gl.constexpr,
    UNITS: gl.constexpr,  # H, rounded up to a power of two
    N: gl.constexpr,  # sequences of a cluster
    C: gl.constexpr,  # blocks of a cluster
    FAST: gl.constexpr,  # whether activations are approximate
):
    """N sequences in one direction, from the first step to the last."""
    dtype: gl.constexpr = w_hh.dtype.element_ty
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    WIDE: gl.constexpr = 16 // BYTES
    tile: gl.constexpr = layout_of("tile", UNITS, N, C, WIDE)
    wide: gl.constexpr = layout_of("wide", UNITS, N, C, WIDE)
    cells: gl.constexpr = layout_of("cells", UNITS, N, C, WIDE)
    whole: gl.constexpr = layout_of("whole", UNITS, N, C, WIDE)
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 4 // BYTES)
    direction = 0
    if D == 2:
        direction = gl.program_id(1)
        if direction == 1:
            w_hh, b_ih, b_hh = w_hh_reverse, b_ih_reverse, b_hh_reverse
    forth = 1 - 2 * direction
    first = gl.program_id(0).to(gl.int64) * N
    w0, w1, w2, w3 = own_weights(w_hh, H, UNITS, C, wide, left)

    gate, unit = gates_and_units(gl.arange(0, 4 * UNITS, gl.SliceLayout(1, tile)), UNITS // C)
    own = gl.arange(0, N, gl.SliceLayout(0, tile))
    bias = gl.zeros([4 * UNITS], gl.float32, gl.SliceLayout(1, tile))
    if b_ih is not None:
        of_bias = (unit < H) & given(b_ih, H)
        bias = gl.load(b_ih + gate * H + unit, of_bias, 0).to(gl.float32)
        bias += gl.load(b_hh + gate * H + unit, of_bias, 0).to(gl.float32)
    bias = bias[:, None]
    x_off = (own[None, :] * H + unit[:, None]) * 4 + gate[:, None]
    x_real = (first + own < B)[None, :] & (unit < H)[:, None]
    n_x = first + own

    unit = gl.arange(0, UNITS, gl.SliceLayout(1, cells))
    own = gl.arange(0, N, gl.SliceLayout(0, cells))
    n = first + own
    real = (n < B)[None, :] & (unit < H)[:, None]
    state_at = (direction * B + n)[None, :] * H + unit[:, None]
    c = gl.zeros([UNITS, N], gl.float32, cells)
    h = gl.zeros([UNITS, N], dtype, cells)
    if c0 is not None:
        c = gl.load(c0 + state_at, real & given(c0, H), 0).to(gl.float32)
    if h0 is not None:
        if lengths is not None:
            h = gl.load(h0 + state_at, real & given(h0, H), 0)
    unit_w = gl.arange(0, UNITS, gl.SliceLayout(1, whole))
    n_w = first + gl.arange(0, N, gl.SliceLayout(0, whole))
    h_start = gl.zeros([UNITS, N], dtype, whole)
    if h0 is not None:
        h_at = h0 + ((direction * B + n_w)[None, :] * H + unit_w[:, None])
        h_start = gl.load(h_at, (n_w < B)[None, :] & (unit_w < H)[:, None] & given(h0, H), 0)

    # Offsets within the tile, where it lies at the first step, and how far it is to the next.
    at = own[None, :] * (D * H) + unit[:, None]
    cells4: gl.constexpr = beside(c, c, c, c, UNITS, N).type.layout
    flat: gl.constexpr = gl.SliceLayout(2, cells4)
    gate = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, cells4)))
    at4 = gl.convert_layout((own[None, :] * H + unit[:, None]) * 4, flat, assert_trivial=True)
    at4 = at4[:, :, None] + gate[None, None, :]
    corner = first * (D * H) + direction * H
    corner4 = (direction * rows.to(gl.int64) + first) * (4 * H)
    x_at, y_at = x + corner4, y + corner
    c_at, g_at = y_at, y_at
    if c_all is not None:
        c_at = c_all + corner
    if gates is not None:
        g_at = gates + corner4
    y_step, g_step = B.to(gl.int64) * (D * H), B.to(gl.int64) * (4 * H)
    steps, length, length_x = T, 0, 0
    if lengths is not None:
        steps = longest(lengths, first, T, B, H, N)
        length = load_lengths(lengths, n, T, B, H).to(gl.int32)
        length_x = load_lengths(lengths, n_x, T, B, H).to(gl.int32)
    last = (steps - 1) * direction
    starts, row, row_1 = 0, 0, 0
    if offsets is None:
        far = last.to(gl.int64)
        x_at += far * g_step
        y_at += far * y_step
        c_at += far * y_step
        g_at += far * g_step
        y_step, g_step = y_step * forth, g_step * forth
        x_first = x_at
        x_at += g_step
    else:
        row = first_row(last, offsets, T)
        row_1 = first_row(last + forth, offsets, T)
        x_first = x_at + elements(row, 4 * H)
    if reset is not None:
        starts = flags(reset, 0, steps, last, n, length, lengths, B, H)
        c, h = only((starts == 0)[None, :], c), only((starts == 0)[None, :], h)
        length_w = 0
        if lengths is not None:
            length_w = load_lengths(lengths, n_w, T, B, H).to(gl.int32)
        starts_w = flags(reset, 0, steps, last, n_w, length_w, lengths, B, H)
        h_start = only((starts_w == 0)[None, :], h_start)
        starts = flags(reset, 1, steps, last + forth, n, length, lengths, B, H)
    real_0 = x_real
    if lengths is not None:
        real_0 = x_real & at_step(last, length_x)
    x_now = gl.load(x_first + x_off, real_0, 0)

    copies: gl.constexpr = layout_of("copies", UNITS, N, C, WIDE)
    shared: gl.constexpr = layout_of("shared", UNITS, N, C, WIDE)
    to_send = gl.allocate_shared_memory(dtype, [UNITS, N], layout_of("own", UNITS, N, C, WIDE))
    buffers = gl.allocate_shared_memory(dtype, [2, C, UNITS, N], copies)
    to_even, to_odd = buffers.index(0), buffers.index(1)
    even = to_even.reinterpret(dtype, [UNITS, N], shared)
    odd = to_odd.reinterpret(dtype, [UNITS, N], shared)
    arrived = mbarrier.allocate_mbarrier(batch=2)
    for which in gl.static_range(2):
        mbarrier.init(arrived.index(which), count=1)
    at_even, at_odd = arrived.index(0), arrived.index(1)
    mbarrier.expect(at_odd, UNITS * N * BYTES)
    even.store(rounded(h_start))
    cluster.barrier()

    weights = w0, w1, w2, w3, bias
    state, places = (c, h, x_now, starts), (x_at, y_at, c_at, g_at, row, row_1)
    strides, of_tile = (y_step, g_step), (real, x_real, x_off, at, at4)
    order = steps, last, forth, n, length, length_x
    call = offsets, lengths, reset, c_all, gates, T, B
    for pair in range(steps // 2):
        s = 2 * pair
        state, places = cluster_step(
            even, to_odd, to_send, at_odd, at_even, pair % 2, s, True,
            weights, state, places, strides, of_tile, order, call, D, H, UNITS, N, C, FAST,
        )  # fmt: skip
        s += 1
        state, places = cluster_step(
            odd, to_even, to_send, at_even, at_odd, pair % 2, s, s + 1 < steps,
            weights, state, places, strides, of_tile, order, call, D, H, UNITS, N, C, FAST,
        )  # fmt: skip
    if steps % 2 == 1:
        state, places = cluster_step(
            even, to_odd, to_send, at_odd, at_even, steps // 2 % 2, steps - 1, False,
            weights, state, places, strides, of_tile, order, call, D, H, UNITS, N, C, FAST,
        )  # fmt: skip
    cluster.barrier()  # nobody leaves while others still send
    c, h, _, _ = state
    gl.store(h_n + state_at, h, real)
    gl.store(c_n + state_at, c.to(c_n.dtype.element_ty), real)


def launch_lstm_fwd_cluster(call: Call, plan: Plan, outputs: Outputs) -> None:
    """Write the outputs of one layer; padding of y, c_all and gates is left as it is."""
    launch(
        lstm_fwd_cluster_kernel,
        (-(-call.rows.B // plan.batch), call.spec.directions),
        plan,
        x=products_by_unit(call),
        **weight_arguments(call.weights, "w_hh", "b_ih", "b_hh"),
        h0=call.state.h,
        c0=call.state.c,
        **cluster_arguments(call, plan),
        y=outputs.y,
        h_n=outputs.h_n,
        c_n=outputs.c_n,
        c_all=outputs.c_all,
        gates=outputs.gates,
        FAST=is_fast(call.x),
    )
