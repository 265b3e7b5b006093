"""Forward: the units of a layer spread over the blocks of a cluster, all steps in one launch.

Each of C blocks owns H / C units and has their rows of W_hh in registers. After a step it sends
its part of h into the shared memory of all blocks (``async_store``), and a barrier in each of them
counts the bytes that arrive. Two buffers are enough: a block sends h of step t + 1 only after it
has received h of step t from everybody, so everybody has read h of step t - 1.

Rows of the stacked tile are ``[block, unit / 4, gate % 2, gate / 2, unit % 4]``: a warp has the 16
rows of four units, and two shuffles give each thread the four gates of one cell. The product is
made in four chains of matrix instructions, a quarter of H each. A warp sends h of all units of its
block to one other block, or to two, in one piece: what goes through a cluster are messages, and
more of them take longer.
"""

import math

from fastlstm.spec import Outputs

from .call import Call, cluster_arguments, weight_arguments
from .forward_registers import products_by_unit
from .gluon import async_store, cluster, gl, gluon, mbarrier, mma_v2
from .launch import is_fast, launch
from .plan import Plan
from .register_tiles import activated, beside, fills, given, only, rounded, tanh


@gluon.jit
def gates_and_units(row, U: gl.constexpr):
    """Return the gates and the units of rows of the stacked tile."""
    own = row % (4 * U)
    return own % 16 // 8 + own % 8 // 4 * 2, row // (4 * U) * U + own // 16 * 4 + own % 4


@gluon.constexpr_function
def layout_of(what, UNITS, N, C, WIDE):
    """Return where numbers lie in a cluster of C blocks; `what` is a name in the kernel.

    16 bytes have WIDE of the numbers that are multiplied.
    """
    U = UNITS // C
    warps = U // 4
    block_bits, warp_bits = range(int(math.log2(C))), range(int(math.log2(warps)))
    rows = [[1 << b, 0] for b in block_bits]
    blocks = [[U << b, 0] for b in block_bits]
    same = [[0, 0] for _ in block_bits]
    across = [[4 << b, 0] for b in warp_bits]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [0, 1]]
    own = [[0, 1 << b, 0] for b in range(int(math.log2(U)))]
    vector = int(math.log2(WIDE))
    rest = own[vector + 2 :] + [[1 << b, 0, 0] for b in block_bits]
    tall = min(UNITS // WIDE, 32)
    found = {
        "tile": gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8], cga_layout=rows),
        "wide": gl.BlockedLayout([1, WIDE], [8, 4], [warps, 1], [1, 0], cga_layout=rows),
        "cells": gl.DistributedLinearLayout([], lanes, across, blocks, [UNITS, N]),
        "pairs": gl.DistributedLinearLayout(
            [[0, 0, 1]],
            *([[*base, 0] for base in bases] for bases in (lanes, across, blocks)),
            [UNITS, N, 2],
        ),
        # A thread stores 16 bytes, a warp into one block at a time.
        "send": gl.DistributedLinearLayout(
            own[:vector] + rest[len(warp_bits) :],
            [*own[vector : vector + 2], [0, 0, 1], [0, 0, 2], [0, 0, 4]],
            rest[: len(warp_bits)],
            [[0, *base] for base in blocks],
            [C, UNITS, N],
        ),
        "whole": gl.BlockedLayout(
            [WIDE, 1], [tall, 32 // tall], [1, warps], [0, 1], cga_layout=same
        ),
        # A column begins in the same bank as all others: see state_layout.
        "shared": gl.SwizzledSharedLayout(WIDE, 1, 8, [0, 1], cga_layout=same),
        "copies": gl.SwizzledSharedLayout(
            WIDE, 1, 8, [1, 2, 0], cga_layout=[[1 << b, 0, 0] for b in block_bits]
        ),
    }
    return found[what]


@gluon.jit
def cluster_step(
    h,  # buffer [UNITS, N], this block's copy of all h
    there,  # buffers [C, UNITS, N], one in each block, written
    arrived,  # the barrier that counts the bytes of them
    w0,  # [4 UNITS, UNITS / 4]
    w1,
    w2,
    w3,
    zero,  # [4 UNITS, N]
    c,  # [UNITS, N]
    x_now,  # [4 UNITS, N]: what x adds to the gates, biases included
    H: gl.constexpr,
    UNITS: gl.constexpr,
    N: gl.constexpr,
    C: gl.constexpr,
    right: gl.constexpr,
    pairs: gl.constexpr,
    cells: gl.constexpr,
    send: gl.constexpr,
    FAST: gl.constexpr,
):
    """Take one step; return the gates, c and h."""
    K: gl.constexpr = UNITS // 4
    first = mma_v2(w0, h.slice(0, K).load(right), x_now, "tf32")
    second = mma_v2(w1, h.slice(K, K).load(right), zero, "tf32")
    third = mma_v2(w2, h.slice(2 * K, K).load(right), zero, "tf32")
    fourth = mma_v2(w3, h.slice(3 * K, K).load(right), zero, "tf32")
    gates = (first + second) + (third + fourth)
    parts = gl.permute(gl.reshape(gates, [C, UNITS // C // 4, 2, 2, 4, N]), [0, 1, 4, 5, 3, 2])
    i_g, f_o = gl.split(gl.reshape(parts, [UNITS, N, 2, 2]))
    i, g = gl.split(gl.convert_layout(i_g, pairs))  # a shuffle each
    f, o = gl.split(gl.convert_layout(f_o, pairs))
    i = gl.convert_layout(i, cells, assert_trivial=True)
    f = gl.convert_layout(f, cells, assert_trivial=True)
    g = gl.convert_layout(g, cells, assert_trivial=True)
    o = gl.convert_layout(o, cells, assert_trivial=True)
    i, f, g, o = activated(i, f, g, o, there.dtype, FAST)
    c = f * c + i * g
    out = (o * tanh(c, FAST)).to(there.dtype)
    if not fills(H, UNITS):  # as in forward_registers.py
        unit = gl.arange(0, UNITS, gl.SliceLayout(1, cells))
        out = only((unit < H)[:, None], out)
    one = gl.expand_dims(gl.convert_layout(rounded(out), gl.SliceLayout(0, send)), 0)
    copies, _ = gl.broadcast(
        gl.convert_layout(one, send), gl.full([C, UNITS, N], 0, gl.int1, send)
    )
    async_store(there, copies, arrived)
    return i, f, g, o, c, out


@gluon.jit
def keep(
    y_at, c_at, g_at, y_n, i, f, g, o, c, real, real4, c_all, gates, H: gl.constexpr
):  # fmt: skip
    """Store y, and where they are wanted c and the gates."""
    gl.store(y_at, y_n, real)
    if c_all is not None:
        gl.store(c_at, c, real & given(c_all, H))
    if gates is not None:
        together = beside(i, f, g, o, real.shape[0], real.shape[1])
        gl.store(g_at, together.to(gates.dtype.element_ty), real4 & given(gates, H))


@gluon.jit(
    do_not_specialize=["rows", "T", "B"],
    do_not_specialize_on_alignment=["h0", "c0"],
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
    y,  # [rows, D*H]
    h_n,  # [D, B, H]
    c_n,  # [D, B, H]
    c_all,  # float32 [rows, D*H] or None
    gates,  # [D, rows, H, 4] or None: after activation
    rows,
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
    pairs: gl.constexpr = layout_of("pairs", UNITS, N, C, WIDE)
    cells: gl.constexpr = layout_of("cells", UNITS, N, C, WIDE)
    send: gl.constexpr = layout_of("send", UNITS, N, C, WIDE)
    whole: gl.constexpr = layout_of("whole", UNITS, N, C, WIDE)
    shared: gl.constexpr = layout_of("shared", UNITS, N, C, WIDE)
    copies: gl.constexpr = layout_of("copies", UNITS, N, C, WIDE)
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 4 // BYTES)
    right: gl.constexpr = gl.DotOperandLayout(1, tile, 4 // BYTES)
    direction = 0
    if D == 2:
        direction = gl.program_id(1)
        if direction == 1:
            w_hh, b_ih, b_hh = w_hh_reverse, b_ih_reverse, b_hh_reverse
    forth = 1 - 2 * direction
    first = gl.program_id(0).to(gl.int64) * N
    U: gl.constexpr = UNITS // C
    K: gl.constexpr = UNITS // 4

    gate, unit = gates_and_units(gl.arange(0, 4 * UNITS, gl.SliceLayout(1, wide)), U)
    k = gl.arange(0, K, gl.SliceLayout(0, wide))
    w_at = w_hh + (gate * H + unit)[:, None] * H + k[None, :]
    has = (unit < H)[:, None]
    w0 = gl.convert_layout(rounded(gl.load(w_at, has & (k < H)[None, :], 0)), left)
    w1 = gl.convert_layout(rounded(gl.load(w_at + K, has & (k + K < H)[None, :], 0)), left)
    w2 = gl.convert_layout(rounded(gl.load(w_at + 2 * K, has & (k + 2 * K < H)[None, :], 0)), left)
    w3 = gl.convert_layout(rounded(gl.load(w_at + 3 * K, has & (k + 3 * K < H)[None, :], 0)), left)

    gate, unit = gates_and_units(gl.arange(0, 4 * UNITS, gl.SliceLayout(1, tile)), U)
    n = first + gl.arange(0, N, gl.SliceLayout(0, tile))
    bias = gl.zeros([4 * UNITS], gl.float32, gl.SliceLayout(1, tile))
    if b_ih is not None:
        of_bias = (unit < H) & given(b_ih, H)
        bias = gl.load(b_ih + gate * H + unit, of_bias, 0).to(gl.float32)
        bias += gl.load(b_hh + gate * H + unit, of_bias, 0).to(gl.float32)
    corner = direction * rows.to(gl.int64)
    x_at = x + (((corner + n)[None, :] * H + unit[:, None]) * 4 + gate[:, None])
    x_real = (n < B)[None, :] & (unit < H)[:, None]
    bias = bias[:, None]

    unit = gl.arange(0, UNITS, gl.SliceLayout(1, cells))
    n = first + gl.arange(0, N, gl.SliceLayout(0, cells))
    real = (n < B)[None, :] & (unit < H)[:, None]
    state_at = (direction * B + n)[None, :] * H + unit[:, None]
    c = gl.zeros([UNITS, N], gl.float32, cells)
    if c0 is not None:
        c = gl.load(c0 + state_at, real & given(c0, H), 0).to(gl.float32)
    cells4: gl.constexpr = beside(c, c, c, c, UNITS, N).type.layout
    real4 = gl.convert_layout(real, gl.SliceLayout(2, cells4), assert_trivial=True)[:, :, None]
    y_at = y + (n[None, :] * (D * H) + direction * H + unit[:, None])
    y_step, g_step = B.to(gl.int64) * (D * H * forth), B.to(gl.int64) * (4 * H * forth)
    last = (T - 1) * direction
    x_at += last.to(gl.int64) * g_step * forth
    y_at += last.to(gl.int64) * y_step * forth
    c_at, g_at = y_at, y_at
    if c_all is not None:
        c_at = c_all + (n[None, :] * (D * H) + direction * H + unit[:, None])
        c_at += last.to(gl.int64) * y_step * forth
    if gates is not None:
        g_at = gates + (((corner + n)[None, :] * H + unit[:, None]) * 4)
        g_at = gl.convert_layout(g_at, gl.SliceLayout(2, cells4), assert_trivial=True)[:, :, None]
        gate = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, cells4)))
        g_at += gate[None, None, :]
        g_at += last.to(gl.int64) * g_step * forth

    buffers = gl.allocate_shared_memory(dtype, [2, C, UNITS, N], copies)
    even = buffers.index(0).reinterpret(dtype, [UNITS, N], shared)
    odd = buffers.index(1).reinterpret(dtype, [UNITS, N], shared)
    arrived = mbarrier.allocate_mbarrier(batch=2)
    for which in gl.static_range(2):
        mbarrier.init(arrived.index(which), count=1)
    h = gl.zeros([UNITS, N], dtype, whole)
    if h0 is not None:
        unit = gl.arange(0, UNITS, gl.SliceLayout(1, whole))
        n = first + gl.arange(0, N, gl.SliceLayout(0, whole))
        h_at = h0 + ((direction * B + n)[None, :] * H + unit[:, None])
        h = gl.load(h_at, (n < B)[None, :] & (unit < H)[:, None] & given(h0, H), 0)
    even.store(rounded(h))
    odd.store(rounded(h))
    cluster.barrier()

    zero = gl.zeros([4 * UNITS, N], gl.float32, tile)
    y_n = gl.zeros([UNITS, N], dtype, cells)
    x_now = gl.load(x_at, x_real, 0)
    head = T % 2
    if head == 1:
        mbarrier.expect(arrived.index(0), UNITS * N * BYTES)
        x_at += g_step
        x_next = gl.load(x_at, x_real & (T > 1), 0)
        i, f, g, o, c, y_n = cluster_step(
            odd, buffers.index(0), arrived.index(0), w0, w1, w2, w3, zero, c, x_now + bias,
            H, UNITS, N, C, right, pairs, cells, send, FAST,
        )  # fmt: skip
        keep(y_at, c_at, g_at, y_n, i, f, g, o, c, real, real4, c_all, gates, H)
        x_now = x_next
        y_at += y_step
        c_at += y_step
        g_at += g_step
    for pair in range(T // 2):
        if pair + head > 0:
            mbarrier.wait(arrived.index(0), (pair + head - 1) % 2)
        mbarrier.expect(arrived.index(1), UNITS * N * BYTES)
        x_at += g_step
        x_next = gl.load(x_at, x_real, 0)
        i, f, g, o, c, y_n = cluster_step(
            even, buffers.index(1), arrived.index(1), w0, w1, w2, w3, zero, c, x_now + bias,
            H, UNITS, N, C, right, pairs, cells, send, FAST,
        )  # fmt: skip
        keep(y_at, c_at, g_at, y_n, i, f, g, o, c, real, real4, c_all, gates, H)
        y_at += y_step
        c_at += y_step
        g_at += g_step
        mbarrier.wait(arrived.index(1), pair % 2)
        mbarrier.expect(arrived.index(0), UNITS * N * BYTES)
        x_at += g_step
        x_now = gl.load(x_at, x_real & (pair + 1 < T // 2), 0)
        i, f, g, o, c, y_n = cluster_step(
            odd, buffers.index(0), arrived.index(0), w0, w1, w2, w3, zero, c, x_next + bias,
            H, UNITS, N, C, right, pairs, cells, send, FAST,
        )  # fmt: skip
        keep(y_at, c_at, g_at, y_n, i, f, g, o, c, real, real4, c_all, gates, H)
        y_at += y_step
        c_at += y_step
        g_at += g_step
    # What was sent last has arrived before anybody leaves.
    mbarrier.wait(arrived.index(0), (T // 2 + head - 1) % 2)
    cluster.barrier()
    gl.store(h_n + state_at, y_n, real)
    gl.store(c_n + state_at, c.to(c_n.dtype.element_ty), real)


def launch_lstm_fwd_cluster(call: Call, plan: Plan, outputs: Outputs) -> None:
    """Write the outputs of one layer of dense rows."""
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
