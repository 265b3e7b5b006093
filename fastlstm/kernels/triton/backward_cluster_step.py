"""One step of the backward pass over a cluster, and where its numbers lie.

Rows of the tile of products are ``[unit / 256, unit / 2 % 2, unit / 32 % 8, unit % 2,
unit / 4 % 8]`` of each block: what a thread has of a column are four units that follow each other,
so that a store has 16 bytes, and what a warp has of a tile goes to one block. A thread of 128
units has but two, ``[unit / 16, unit % 2, unit / 2 % 8]``.
"""

import math

from .gluon import async_store, gl, gluon, mbarrier, mma_v2
from .register_tiles import (
    activated,
    apart,
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


@gluon.constexpr_function
def layout_of(what, UNITS, N, C, WIDE):
    """Return where numbers lie in a cluster of C blocks; `what` is a name in the kernel.

    16 bytes have WIDE of the numbers that are multiplied.
    """
    U = UNITS // C
    block_bits, unit_bits = range(int(math.log2(C))), range(int(math.log2(U)))
    n_bits = range(int(math.log2(N)))
    rows = [[1 << b, 0] for b in block_bits]
    units = [[1 << b, 0] for b in unit_bits]
    columns = [[0, 1 << b] for b in n_bits]
    blocks = [[U << b, 0] for b in block_bits]
    found = {
        "tile": gl.NVMMADistributedLayout([2, 0], [N, 1], [16, 8], cga_layout=rows),
        "tall": gl.BlockedLayout([WIDE, 1], [32, 1], [1, N], [0, 1], cga_layout=rows),
        # A warp has a sequence, a thread one of its cells.
        "cells": gl.DistributedLinearLayout([], units, columns, blocks, [UNITS, N]),
        "parts": gl.DistributedLinearLayout(
            [[1 << b, 0, 0] for b in block_bits],
            *([[0, *base] for base in bases] for bases in (units, columns, blocks)),
            [C, UNITS, N],
        ),
        # Columns begin in the same bank, so where 16 bytes lie in one differs from each to the
        # next: see state_layout.
        "own": gl.SwizzledSharedLayout(WIDE, 1, 8, [0, 1], cga_layout=rows),
        "here": gl.SwizzledSharedLayout(
            WIDE, 1, 8, [0, 1], cga_layout=[[0, 0] for _ in block_bits]
        ),
        "sums": gl.SwizzledSharedLayout(
            4, 1, 8, [1, 2, 0], cga_layout=[[0, 1 << b, 0] for b in block_bits]
        ),
    }
    return found[what]


@gluon.jit
def own_weights(
    w,  # [4H, H]
    FIRST: gl.constexpr,
    H: gl.constexpr,
    UNITS: gl.constexpr,
    N: gl.constexpr,
    C: gl.constexpr,
):
    """Load what all units have of a block's gates, by unit, from FIRST on, half of them.

    The operand ``[C * UNITS, 2 U]`` of the products.
    """
    U: gl.constexpr = UNITS // C
    BYTES: gl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
    WIDE: gl.constexpr = 16 // BYTES
    TILES: gl.constexpr = 1 if UNITS == 128 else 2  # of those side by side
    tall: gl.constexpr = layout_of("tall", UNITS, N, C, WIDE)
    tile: gl.constexpr = layout_of("tile", UNITS, N, C, WIDE)
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 4 // BYTES)
    row = gl.arange(0, C * UNITS, gl.SliceLayout(1, tall))
    k = FIRST + gl.arange(0, 2 * U, gl.SliceLayout(0, tall))
    unit = row % UNITS
    own = (row // UNITS * U)[:, None] + (k // 4)[None, :]
    at = w + ((k % 4 * H)[None, :] + own) * H + unit[:, None]
    if fills(H, UNITS):
        found = gl.load(at)
    else:
        found = gl.load(at, (unit < H)[:, None] & (own < H), 0)
    ordered = gl.permute(
        gl.reshape(found, [C, UNITS // (128 * TILES), 8, 8, TILES, 2, 2 * U]),
        [0, 1, 4, 2, 5, 3, 6],
    )
    return gl.convert_layout(rounded(gl.reshape(ordered, [C * UNITS, 2 * U])), left)


@gluon.jit
def factors(
    g_now, bias, c, c_before, dtype: gl.constexpr, UNITS: gl.constexpr, N: gl.constexpr,
    KEPT: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    """Return what the gradients of h and c are multiplied with, all ``[UNITS, N]``.

    The gradient of c by that of h; those of i, f, g before activation and of c_before by that of
    c, and that of o by that of h.
    """
    cells: gl.constexpr = c.type.layout
    i, f, g, o = apart(g_now.to(gl.float32) + bias, UNITS, N, cells)
    if not KEPT:
        i, f, g, o = activated(i, f, g, o, dtype, FAST)
    tanh_c = tanh(c, FAST)
    by_c = o * (1.0 - tanh_c * tanh_c)
    by_i, by_f = g * i * (1.0 - i), c_before * f * (1.0 - f)
    by_g, by_o = i * (1.0 - g * g), tanh_c * o * (1.0 - o)
    return by_c, by_i, by_f, by_g, by_o, f


@gluon.jit
def cluster_step_back(
    to,  # buffer [4 UNITS, N], the gradients of each block's own gates by unit, written
    there,  # buffers [C, UNITS, N]: what each block adds to dh, written in others and read
    arrived,  # the barrier that counts the bytes of them
    arrives_next,  # that of the next step
    phase,  # of that barrier
    s,  # how many steps were taken
    left,  # how many follow
    weights,  # two of own_weights, and without KEPT the bias [UNITS, 1, 4]
    state,  # [UNITS, N]: the gradients of h and c that come from the steps after
    places,  # pointers: c three steps on, gates two steps on, gradients of this step's gates, then
    # dy and dc_all two steps on; with lengths all of them at step 0
    firsts,  # the first row of this step and of the three that follow, with offsets
    read,  # dy, dc_all and flags of a reset, each of this step and the next one; gates of the next
    # one, its c and that before it
    factor,  # of factors: this step
    strides,  # of c, gates, dy and dc_all from a step to the next
    tile,  # what is real of [UNITS, N]; offsets in c_all, gates, dy and dc_all
    order,  # the number of steps, the first one, +1 or -1, n [N], lengths [N]
    call,  # c0 as [UNITS, N]; c0, offsets, lengths, reset, dy, dc_all, T, B
    H: gl.constexpr,
    UNITS: gl.constexpr,
    N: gl.constexpr,
    C: gl.constexpr,
    KEPT: gl.constexpr,
    FAST: gl.constexpr,
):
    """Take one step back; return the next one's state, places, firsts, read and factor.

    What does not depend on the other blocks is computed while their parts travel.
    """
    w_low, w_high, bias = weights
    dh, dc = state
    c_at, g_at, d_at, dy_at, dca_at = places
    row, row_1, row_2, row_3 = firsts
    dy_now, dy_next, dca_now, dca_next, reset_now, reset_next, g_next, c, c_before = read
    by_c, by_i, by_f, by_g, by_o, f = factor
    c_step, g_step, dy_step, dca_step = strides
    real, at, at4, dy_off, dca_off = tile
    steps, begin, forth, n, length = order
    c_start, c0, offsets, lengths, reset, dy, dc_all, T, B = call
    t = begin + forth * s
    cells: gl.constexpr = dc.type.layout
    flat: gl.constexpr = gl.SliceLayout(2, at4.type.layout)
    WIDE: gl.constexpr = 128 // to.dtype.primitive_bitwidth
    stacked: gl.constexpr = layout_of("tile", UNITS, N, C, WIDE)
    right: gl.constexpr = gl.DotOperandLayout(1, stacked, w_low.type.layout.k_width)
    TILES: gl.constexpr = 1 if UNITS == 128 else 2
    U: gl.constexpr = UNITS // C
    dh_new, dc_new = dh, dc
    if dy is not None:
        dh_new += dy_now.to(gl.float32)
    if dc_all is not None:
        dc_new += dca_now.to(gl.float32)
    dc_new += dh_new * by_c
    d_i, d_f, d_g, d_o = dc_new * by_i, dc_new * by_f, dc_new * by_g, dh_new * by_o
    dc_new = dc_new * f
    if reset is not None:
        dc_new = only((reset_now == 0)[None, :], dc_new)
    if lengths is not None:
        dc_new = gl.where(at_step(t, length), dc_new, dc)
    if not fills(H, UNITS):  # as in forward
        unit = gl.arange(0, UNITS, gl.SliceLayout(1, cells))
        inside = (unit < H)[:, None]
        d_i, d_f, d_g, d_o = (
            only(inside, d_i),
            only(inside, d_f),
            only(inside, d_g),
            only(inside, d_o),
        )
    d_gates = beside(d_i, d_f, d_g, d_o, UNITS, N).to(to.dtype)
    to.store(gl.reshape(gl.permute(rounded(d_gates), [0, 2, 1]), [4 * UNITS, N]))
    mbarrier.expect(arrives_next, UNITS * N * 4)  # at a barrier of all warps anyway
    here = to.reinterpret(to.dtype, [4 * U, N], layout_of("here", UNITS, N, C, WIDE))
    zero = gl.zeros([C * UNITS, N], gl.float32, stacked)
    part = mma_v2(w_low, here.slice(0, 2 * U).load(right), zero, "tf32")
    if UNITS > 256:  # there are chains enough
        part = mma_v2(w_high, here.slice(2 * U, 2 * U).load(right), part, "tf32")
    else:
        part += mma_v2(w_high, here.slice(2 * U, 2 * U).load(right), zero, "tf32")
    parts = gl.permute(
        gl.reshape(part, [C, UNITS // (128 * TILES), TILES, 8, 2, 8, N]), [0, 1, 3, 5, 2, 4, 6]
    )
    async_store(there, gl.reshape(parts, [C, UNITS, N]), arrived)
    # What the steps that follow will read is asked for when this one has sent what the others wait
    # for. Where these loads come first, products may be made one after the other.
    if lengths is None:
        d_now, dy_2, dca_2, g_2, c_3 = d_at, dy_at, dca_at, g_at, c_at
    else:
        at_0, at_2, at_3 = row, row_2, row_3
        if offsets is None:
            at_0, at_2, at_3 = t, t + 2 * forth, t + 3 * forth
        d_now, c_3 = d_at + elements(at_0, g_step), c_at + elements(at_3, c_step)
        g_2, dy_2 = g_at + elements(at_2, g_step), dy_at + elements(at_2, dy_step)
        dca_2 = dca_at + elements(at_2, dca_step)
    real_now, real_2, real_3 = real, real & (left > 1), real & (left > 2)
    if lengths is not None:
        real_now = real & at_step(t, length)
        real_2 = real & at_step(t + 2 * forth, length)
        real_3 = real & at_step(t + 3 * forth, length)
    real4 = gl.convert_layout(real_now, flat, assert_trivial=True)[:, :, None]
    real4_2 = gl.convert_layout(real_2, flat, assert_trivial=True)[:, :, None]
    gl.store(d_now + at4, d_gates, real4)
    g_later = gl.load(g_2 + at4, real4_2, 0)
    c_later = gl.load(c_3 + at, real_3, 0)
    dy_later, dca_later, reset_later = dy_next, dca_next, reset_next
    if dy is not None:
        dy_later = gl.load(dy_2 + dy_off, real_2 & given(dy, H), 0)
    if dc_all is not None:
        dca_later = gl.load(dca_2 + dca_off, real_2 & given(dc_all, H), 0)
    if reset is not None:
        reset_later = flags(reset, s + 2, steps, t + 2 * forth, n, length, lengths, B, H)
    before = c_before
    if c0 is not None:
        if lengths is None:
            before = gl.where(left > 1, c_before, c_start)
        else:
            before = gl.where(at_step(t + 2 * forth, length), c_before, c_start)
    if reset is not None:
        before = only((reset_next == 0)[None, :], before)
    factor = factors(g_next, bias, c, before, to.dtype, UNITS, N, KEPT, FAST)
    mbarrier.wait(arrived, phase)
    dh_new = gl.sum(there.load(layout_of("parts", UNITS, N, C, WIDE)), 0)
    dh_new = gl.convert_layout(dh_new, cells, assert_trivial=True)
    if reset is not None:
        dh_new = only((reset_now == 0)[None, :], dh_new)
    if lengths is not None:
        dh_new = gl.where(at_step(t, length), dh_new, dh)
    if offsets is not None:
        row, row_1, row_2, row_3 = row_1, row_2, row_3, first_row(t + 4 * forth, offsets, T)
    elif lengths is None:
        c_at += c_step
        g_at += g_step
        d_at += g_step
        dy_at += dy_step
        dca_at += dca_step
    places, firsts = (c_at, g_at, d_at, dy_at, dca_at), (row, row_1, row_2, row_3)
    read = (
        dy_next, dy_later, dca_next, dca_later, reset_next, reset_later,
        g_later, c_before, c_later,
    )  # fmt: skip
    return (dh_new, dc_new), places, firsts, read, factor
