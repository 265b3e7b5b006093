"""Backward: the units of a layer spread over the blocks of a cluster, as ``forward_cluster.py``.

Each of C blocks owns H / C units. It turns their gradients of h and c into those of their gates,
multiplies these with its own rows of W_hh, which gives it a part of the gradient of all units' h a
step before, and sends each block what that one owns of it (``async_store``), as float32. A barrier
in each block counts the bytes that arrive; the parts are added up in the order of blocks, so
results repeat to the bit. All gates' gradients instead would be twice as many bytes.

Two buffers are enough: a block sends what it has of step t - 1 only after it has received step t
from everybody, so everybody has read what it was sent of step t + 1.
"""

from collections.abc import Sequence

from fastlstm.spec import Gradients, Incoming, Saved, Weights

from .backward_by_unit import GatesByUnit, incoming_arguments
from .backward_cluster_step import cluster_step_back, factors, layout_of, own_weights
from .call import Call, cluster_arguments, weight_arguments
from .gluon import cluster, gl, gluon, mbarrier
from .launch import is_fast, launch
from .plan import Plan
from .register_tiles import beside, given


@gluon.jit(
    do_not_specialize=["rows", "T", "B", "dy_t", "dy_b", "dc_t", "dc_b"],
    do_not_specialize_on_alignment=["c0", "dc_all", "dh_n", "dc_n"],
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
    dy,  # [rows, D*H] of strides dy_t, dy_b, or None
    dc_all,  # [rows, D*H] of strides dc_t, dc_b, or None
    dh_n,  # [D, B, H] or None
    dc_n,  # [D, B, H] or None
    dgates,  # [D, rows, H, 4], written: gradients of the gates before activation
    dh0,  # [D, B, H] or None, written
    dc0,  # [D, B, H] or None, written
    rows,
    T,
    B,
    dy_t,  # DY_UNIT elements of dy from a step to the next
    dy_b,  # DY_UNIT elements of dy from a sequence to the next
    dc_t,  # elements of dc_all from a step to the next
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
    real = (first + own < B)[None, :] & (unit < H)[:, None]
    real4 = gl.convert_layout(real, flat, assert_trivial=True)[:, :, None]
    bias = 0.0
    if not KEPT:
        if b_ih is not None:
            unit4 = gl.arange(0, UNITS, gl.SliceLayout(1, flat))[:, None][:, :, None]
            b_at = gate[None, None, :] * H + unit4
            has = (unit4 < H) & given(b_ih, H)
            bias = gl.load(b_ih + b_at, has, 0).to(gl.float32)
            bias += gl.load(b_hh + b_at, has, 0).to(gl.float32)
    state_at = (direction * B + first + own)[None, :] * H + unit[:, None]
    dh, dc, c_start = zero, zero, 0.0
    if dh_n is not None:
        dh = gl.load(dh_n + state_at, real & given(dh_n, H), 0).to(gl.float32)
    if dc_n is not None:
        dc = gl.load(dc_n + state_at, real & given(dc_n, H), 0).to(gl.float32)
    if c0 is not None:
        c_start = gl.load(c0 + state_at, real & given(c0, H), 0).to(gl.float32)

    # Offsets within the tile, where it lies at the last step, and how far it is to the next.
    at = own[None, :] * (D * H) + unit[:, None]
    at4 = (own[None, :] * H + unit[:, None]) * 4
    at4 = gl.convert_layout(at4, flat, assert_trivial=True)[:, :, None] + gate[None, None, :]
    last = ((T - 1) * (1 - direction)).to(gl.int64)
    forth = 2 * direction - 1
    c_step, g_step = B.to(gl.int64) * (D * H), B.to(gl.int64) * (4 * H)
    corner4 = (direction * rows.to(gl.int64) + first) * (4 * H) + last * g_step
    c_at = c_all + (first * (D * H) + direction * H + last * c_step)
    g_at, d_at = gates + corner4, dgates + corner4
    c_step, g_step, dy_step, dca_step = c_step * forth, g_step * forth, 0, 0
    dy_at, dca_at, dy_off, dca_off = c_at, c_at, 0, 0
    dy_now, dy_next, dca_now, dca_next = 0.0, 0.0, 0.0, 0.0
    second = real & (T > 1)
    if dy is not None:
        dy_step, dy_b = dy_t.to(gl.int64) * DY_UNIT, dy_b.to(gl.int64) * DY_UNIT
        dy_off = own[None, :] * dy_b + unit[:, None]
        dy_at = dy + (first * dy_b + direction * H + last * dy_step)
        dy_step *= forth
        dy_now = gl.load(dy_at + dy_off, real & given(dy, H), 0)
        dy_next = gl.load(dy_at + dy_step + dy_off, second & given(dy, H), 0)
        dy_at += 2 * dy_step
    if dc_all is not None:
        dca_step, dc_b = dc_t.to(gl.int64), dc_b.to(gl.int64)
        dca_off = own[None, :] * dc_b + unit[:, None]
        dca_at = dc_all + (first * dc_b + direction * H + last * dca_step)
        dca_step *= forth
        dca_now = gl.load(dca_at + dca_off, real & given(dc_all, H), 0)
        dca_next = gl.load(dca_at + dca_step + dca_off, second & given(dc_all, H), 0)
        dca_at += 2 * dca_step
    g_now = gl.load(g_at + at4, real4, 0)
    g_next = gl.load(g_at + g_step + at4, real4 & (T > 1), 0)
    c_now = gl.load(c_at + at, real, 0)
    c = gl.load(c_at + c_step + at, second, 0)
    c_before = gl.load(c_at + 2 * c_step + at, real & (T > 2), 0)
    c_at += 3 * c_step
    g_at += 2 * g_step
    before = c
    if c0 is not None:
        before = gl.where(T > 1, c, c_start)
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

    for pair in range(T // 2):
        dh, dc, now, dy_now, dca_now, c, c_before, g_next, dy_next, dca_next = cluster_step_back(
            even, buffers.index(0), at_even, at_odd, pair % 2, w_low, w_high, bias,
            dh, dc, now, dy_now, dca_now, c, c_before, c_start, g_next, dy_next, dca_next,
            real, real4, at, at4, dy_off, dca_off, c_at, g_at, d_at, dy_at, dca_at,
            T - 1 - 2 * pair, c0, dy, dc_all, H, UNITS, N, C, KEPT, FAST,
        )  # fmt: skip
        c_at += c_step
        g_at += g_step
        d_at += g_step
        dy_at += dy_step
        dca_at += dca_step
        dh, dc, now, dy_now, dca_now, c, c_before, g_next, dy_next, dca_next = cluster_step_back(
            odd, buffers.index(1), at_odd, at_even, pair % 2, w_low, w_high, bias,
            dh, dc, now, dy_now, dca_now, c, c_before, c_start, g_next, dy_next, dca_next,
            real, real4, at, at4, dy_off, dca_off, c_at, g_at, d_at, dy_at, dca_at,
            T - 2 - 2 * pair, c0, dy, dc_all, H, UNITS, N, C, KEPT, FAST,
        )  # fmt: skip
        c_at += c_step
        g_at += g_step
        d_at += g_step
        dy_at += dy_step
        dca_at += dca_step
    if T % 2 == 1:
        dh, dc, now, dy_now, dca_now, c, c_before, g_next, dy_next, dca_next = cluster_step_back(
            even, buffers.index(0), at_even, at_odd, T // 2 % 2, w_low, w_high, bias,
            dh, dc, now, dy_now, dca_now, c, c_before, c_start, g_next, dy_next, dca_next,
            real, real4, at, at4, dy_off, dca_off, c_at, g_at, d_at, dy_at, dca_at,
            0, c0, dy, dc_all, H, UNITS, N, C, KEPT, FAST,
        )  # fmt: skip
    cluster.barrier()  # nobody leaves while others still send
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
    """Write the gradients of one layer of dense rows; `then`: the weights of the forward pass."""
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
