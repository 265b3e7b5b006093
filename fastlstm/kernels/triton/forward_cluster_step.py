"""One step forward over a cluster, and where its numbers lie.

Rows of the stacked tile are ``[block, unit / 4, gate % 2, gate / 2, unit % 4]``: a warp has the 16
rows of four units, and two shuffles give each thread the four gates of one cell. The product is
made in four chains of matrix instructions, a quarter of H each. A warp sends h of all units of its
block to one other block, or to two, in one piece: what goes through a cluster are messages, and
more of them take longer.
"""

import math

from .gluon import async_store, gl, gluon, mbarrier, mma_v2
from .register_tiles import (
    activated,
    at_step,
    beside,
    elements,
    fills,
    first_row,
    flags,
    given,
    only,
    rounded,
    tanh,
)


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
    columns = [[16, 1], [4, 2], [8, 4]] if WIDE == 4 else [[0, 1], [8, 2], [16, 4]]
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
        # What a warp stores is in banks apart, and so is what 8 threads load, 16 bytes each.
        "own": gl.SharedLinearLayout(
            [*([1 << b, 0] for b in range(int(math.log2(U)))), *columns], blocks
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
    here,  # buffer [UNITS, N], this block's copy of all h
    there,  # buffers [C, UNITS, N], one in each block, written
    own,  # buffer [UNITS, N]: h of each block's own units, on its way to those that send it
    arrived,  # the barrier that counts the bytes of them
    arrives_next,  # that of the next step
    phase,  # of that barrier
    s,  # how many steps were taken
    more,  # whether another step follows
    weights,  # four of own_weights, and the bias [4 UNITS, 1]
    state,  # c and h [UNITS, N], what x adds to the gates [4 UNITS, N], flags of the next step [N]
    places,  # pointers to x of the next step, y, c_all and gates, at row 0 with offsets; then the
    # first row of this step and that of the next one
    strides,  # of y and c_all, and of x and gates, from a step to the next
    tile,  # what is real of [UNITS, N] and of x's [4 UNITS, N], offsets in x, in y and in gates
    order,  # the number of steps, the first one, +1 or -1, n [N], lengths for cells and for x
    call,  # offsets, lengths, reset, c_all, gates, T, B
    D: gl.constexpr,
    H: gl.constexpr,
    UNITS: gl.constexpr,
    N: gl.constexpr,
    C: gl.constexpr,
    FAST: gl.constexpr,
):
    """Take one step; return the next one's state and places, when all of its h is here."""
    w0, w1, w2, w3, bias = weights
    c, h, x_now, starts = state
    x_at, y_at, c_at, g_at, row, row_1 = places
    y_step, g_step = strides
    real, x_real, x_off, at, at4 = tile
    steps, begin, forth, n, length, length_x = order
    offsets, lengths, reset, c_all, gates, T, B = call
    t = begin + forth * s
    BYTES: gl.constexpr = there.dtype.primitive_bitwidth // 8
    WIDE: gl.constexpr = 16 // BYTES
    K: gl.constexpr = UNITS // 4
    cells: gl.constexpr = c.type.layout
    stacked: gl.constexpr = x_now.type.layout
    pairs: gl.constexpr = layout_of("pairs", UNITS, N, C, WIDE)
    send: gl.constexpr = layout_of("send", UNITS, N, C, WIDE)
    right: gl.constexpr = gl.DotOperandLayout(1, stacked, w0.type.layout.k_width)
    if offsets is None:
        y_now, c_now, g_now, x_next = y_at, c_at, g_at, x_at
    else:
        y_now, c_now = y_at + elements(row, D * H), c_at + elements(row, D * H)
        g_now, x_next = g_at + elements(row, 4 * H), x_at + elements(row_1, 4 * H)
    if lengths is None:
        x_later = gl.load(x_next + x_off, x_real & more, 0)
    else:
        x_later = gl.load(x_next + x_off, x_real & at_step(t + forth, length_x), 0)
    zero = gl.zeros([4 * UNITS, N], gl.float32, stacked)
    first = mma_v2(w0, here.slice(0, K).load(right), x_now + bias, "tf32")
    second = mma_v2(w1, here.slice(K, K).load(right), zero, "tf32")
    third = mma_v2(w2, here.slice(2 * K, K).load(right), zero, "tf32")
    fourth = mma_v2(w3, here.slice(3 * K, K).load(right), zero, "tf32")
    sums = (first + second) + (third + fourth)
    parts = gl.permute(gl.reshape(sums, [C, UNITS // C // 4, 2, 2, 4, N]), [0, 1, 4, 5, 3, 2])
    i_g, f_o = gl.split(gl.reshape(parts, [UNITS, N, 2, 2]))
    i, g = gl.split(gl.convert_layout(i_g, pairs))  # a shuffle each
    f, o = gl.split(gl.convert_layout(f_o, pairs))
    i = gl.convert_layout(i, cells, assert_trivial=True)
    f = gl.convert_layout(f, cells, assert_trivial=True)
    g = gl.convert_layout(g, cells, assert_trivial=True)
    o = gl.convert_layout(o, cells, assert_trivial=True)
    i, f, g, o = activated(i, f, g, o, there.dtype, FAST)
    c_new = f * c + i * g
    h_new = (o * tanh(c_new, FAST)).to(there.dtype)
    if not fills(H, UNITS):  # as in forward_registers.py
        unit = gl.arange(0, UNITS, gl.SliceLayout(1, cells))
        h_new = only((unit < H)[:, None], h_new)
    h_next, c_next = h_new, c_new
    if lengths is not None:
        active = at_step(t, length)
        real = real & active
        h_next, c_next = gl.where(active, h_new, h), gl.where(active, c_new, c)
    if reset is not None:
        h_next = only((starts == 0)[None, :], h_next)
        c_next = only((starts == 0)[None, :], c_next)
        starts = flags(reset, s + 2, steps, t + 2 * forth, n, length, lengths, B, H)
    own.store(rounded(h_next))
    # At a barrier of all warps anyway.
    mbarrier.expect(arrives_next, UNITS * N * BYTES)
    one = gl.expand_dims(own.load(gl.SliceLayout(0, send)), 0)
    copies, _ = gl.broadcast(one, gl.full([C, UNITS, N], 0, gl.int1, send))
    async_store(there, copies, arrived)
    gl.store(y_now + at, h_new, real)
    if c_all is not None:
        gl.store(c_now + at, c_new, real & given(c_all, H))
    if gates is not None:
        together = beside(i, f, g, o, UNITS, N).to(gates.dtype.element_ty)
        flat: gl.constexpr = gl.SliceLayout(2, together.type.layout)
        real4 = gl.convert_layout(real & given(gates, H), flat, assert_trivial=True)
        gl.store(g_now + at4, together, real4[:, :, None])
    if offsets is not None:
        row, row_1 = row_1, first_row(t + 2 * forth, offsets, T)
    else:
        x_at += g_step
        y_at += y_step
        c_at += y_step
        g_at += g_step
    mbarrier.wait(arrived, phase)
    return (c_next, h_next, x_later, starts), (x_at, y_at, c_at, g_at, row, row_1)
