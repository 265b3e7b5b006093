"""One step of the backward pass in the registers regime, and what it reads."""

from .gluon import gl, gluon
from .register_products import activate, gates_after, put_gates, state_gradient, tanh_of
from .register_tiles import (
    COLUMNS,
    apart,
    at_step,
    beside,
    elements,
    fills,
    first_row,
    flags,
    given,
    only,
    row_of,
)


@gluon.constexpr_function
def steps_ahead(U, N, pair, resets, EXACT):
    """Return how many steps ahead a step reads: 1, or 2 where threads have registers left.

    With 2 a step prepares the next one as well, while its own products are under way. Weights
    take 2U / `pair` registers, and N = 4 has half the activations of N = 8; calls with resets
    mostly have lengths and gradients of c too, which take more.
    """
    widest = 16 * pair if resets else 32 * pair
    return 2 if not EXACT and (N < COLUMNS or widest >= U) else 1


@gluon.jit
def read_at(
    places,  # pointers to c of the step after, gates, dy and dc_all; without MOVES at row 0
    strides,  # of each from a step to the next; without MOVES of c and gates from a row to the
    # next, with offsets of all
    s,  # the step that is read: how many come before
    t,  # which one it is
    row,  # its first row and that of the step after, with offsets
    row_1,
    tile,  # as in backward_step, as the two that follow
    order,
    call,
    H: gl.constexpr,
    MOVES: gl.constexpr,  # whether places move on from step to step
):
    """Ask for what a step reads; return it and where the next one finds the same."""
    c_at, g_at, dy_at, dca_at = places
    c_step, g_step, dy_step, dca_step = strides
    real, real4, at, at1, at4, dy_off, dca_off = tile
    steps, _, forth, n, length, length4 = order
    _, _, offsets, lengths, reset, dy, dc_all, _, B = call
    if lengths is None:
        now, now4, after = real & (s < steps), real4 & (s < steps), real & (s + 1 < steps)
    else:
        now, after = real & at_step(t, length), real & at_step(t + forth, length)
        now4 = real4 & at_step(t, length4)[:, :, None]
    c_now, g_now, dy_now, dca_now = c_at, g_at, dy_at, dca_at
    if offsets is not None:
        c_now, g_now = c_at + elements(row_1, c_step), g_at + elements(row, g_step)
        dy_now, dca_now = dy_at + elements(row, dy_step), dca_at + elements(row, dca_step)
    elif not MOVES:
        c_now = c_at + elements(row_of(t + forth, B), c_step)
        g_now = g_at + elements(row_of(t, B), g_step)
        dy_now, dca_now = dy_at + elements(t, dy_step), dca_at + elements(t, dca_step)
    # The four gates of a cell in one number: of parts of registers the loop would make copies.
    if g_at.dtype.element_ty.primitive_bitwidth == 16:
        g = gl.load(g_now.to(gl.pointer_type(gl.int64), bitcast=True) + at1, now, 0)
    else:
        g = gl.load(g_now + at4, now4, 0)
    c = gl.load(c_now + at, after, 0)
    d, dca, starts = 0.0, 0.0, 0
    if dy is not None:
        d = gl.load(dy_now + dy_off, now & given(dy, H), 0)
    if dc_all is not None:
        dca = gl.load(dca_now + dca_off, now & given(dc_all, H), 0)
    if reset is not None:
        starts = flags(reset, s, steps, t, n, length, lengths, B, H)
    if MOVES:
        c_at += c_step
        g_at += g_step
        dy_at += dy_step
        dca_at += dca_step
    return (g, c, d, dca, starts), (c_at, g_at, dy_at, dca_at)


@gluon.jit
def kept_gates(g_now, dtype: gl.constexpr, U: gl.constexpr, N: gl.constexpr, cells: gl.constexpr):
    """Return i, f, g, o ``[U, N]`` in float32, of what was read of them."""
    if g_now.dtype == gl.int64:
        i_f, g_o = g_now.to(gl.int32), (g_now >> 32).to(gl.int32)
        i, f = i_f.to(gl.int16), (i_f >> 16).to(gl.int16)
        g, o = g_o.to(gl.int16), (g_o >> 16).to(gl.int16)
        i, f = i.to(dtype, bitcast=True).to(gl.float32), f.to(dtype, bitcast=True).to(gl.float32)
        g, o = g.to(dtype, bitcast=True).to(gl.float32), o.to(dtype, bitcast=True).to(gl.float32)
    else:
        i, f, g, o = apart(g_now.to(gl.float32), U, N, cells)
    return i, f, g, o


@gluon.jit
def prepared(
    read,  # of read_at
    tanh_c,  # [U, N]
    bias,  # of biases, without KEPT
    s,
    t,
    order,  # as in backward_step, as the next one
    call,
    dtype: gl.constexpr,
    U: gl.constexpr,
    N: gl.constexpr,
    KEPT: gl.constexpr,
    EXACT: gl.constexpr,
    FAST: gl.constexpr,
):
    """Return all of a step that does not depend on those after it, and tanh of c before it.

    What the gradient of h adds to that of c, what that of c makes of those of the gates i, f and
    g, the gradient of h of that of o; f; what dy and dc_all add; the flags of a reset.
    """
    cells: gl.constexpr = tanh_c.type.layout
    steps, _, forth, _, length, _ = order
    c_start, c0, _, lengths, reset, _, _, _, _ = call
    g_now, c_before, dy_now, dca_now, starts = read
    before = c_before
    if c0 is not None:
        if lengths is None:
            before = gl.where(s + 1 < steps, c_before, c_start)
        else:
            before = gl.where(at_step(t + forth, length), c_before, c_start)
    if reset is not None:
        before = only((starts == 0)[None, :], before)
    if KEPT:
        i, f, g, o = kept_gates(g_now, dtype, U, N, cells)
    else:
        i, f, g, o = gates_after(g_now, bias, U, N, EXACT)
        i, f, g, o = activate(i, f, g, o, dtype, FAST, EXACT)
    to_c = o * (1.0 - tanh_c * tanh_c)
    to_i, to_f = g * i * (1.0 - i), before * f * (1.0 - f)
    to_g, to_o = i * (1.0 - g * g), tanh_c * o * (1.0 - o)
    added = dy_now.to(gl.float32), dca_now.to(gl.float32), starts
    return (to_c, to_i, to_f, to_g, to_o, f, added), tanh_of(c_before, FAST, EXACT)


@gluon.jit
def backward_step(
    to,  # of gate_buffers, written
    s,  # how many steps were taken
    weights,  # of columns_of_gates, and without KEPT of biases
    state,  # [U, N]: the gradients of h and c that come from the steps after
    d_at,  # pointer to the gradients of the gates of this step; without MOVES at row 0
    firsts,  # the first row of this step and of AHEAD + 1 that follow, with offsets; four numbers
    tanh_c,  # [U, N]: of this step, or of the next one if this is prepared
    places,  # for read_at
    now,  # of prepared, AHEAD == 2
    read,  # of read_at: this step, or the next one if this is prepared
    strides,  # of c, gates, dy and dc_all from a step to the next
    tile,  # what is real of [U, N] and [U, N, 4]; offsets of c_all, of cells of a step, of their
    # gates, of dy and dc_all
    order,  # the number of steps, the first one, +1 or -1, n [N], lengths [N] and those of gates
    call,  # c0 as [U, N]; c0, offsets, lengths, reset, dy, dc_all, T, B
    H: gl.constexpr,
    U: gl.constexpr,
    N: gl.constexpr,
    KEPT: gl.constexpr,
    EXACT: gl.constexpr,
    FAST: gl.constexpr,
    AHEAD: gl.constexpr,  # of steps_ahead
    MOVES: gl.constexpr,
):
    """Take one step back; return what the next one begins with, from state to read."""
    w, bias = weights
    dh, dc = state
    _, real4, _, _, at4, _, _ = tile
    _, begin, forth, _, length, length4 = order
    _, _, offsets, lengths, reset, dy, dc_all, T, B = call
    t = begin + forth * s
    cells: gl.constexpr = dc.type.layout
    dtype: gl.constexpr = d_at.dtype.element_ty
    this = now
    if AHEAD == 1:
        this, tanh_c = prepared(
            read, tanh_c, bias, s, t, order, call, dtype, U, N, KEPT, EXACT, FAST
        )
    follows, places = read_at(
        places,
        strides,
        s + AHEAD,
        t + AHEAD * forth,
        firsts[AHEAD],
        firsts[AHEAD + 1],
        tile,
        order,
        call,
        H,
        MOVES,
    )
    to_c, to_i, to_f, to_g, to_o, f, added = this
    dh_total, dc_total = dh, dc
    if dy is not None:
        dh_total += added[0]
    if dc_all is not None:
        dc_total += added[1]
    dc_total += dh_total * to_c
    d_i, d_f, d_g, d_o = dc_total * to_i, dc_total * to_f, dc_total * to_g, dh_total * to_o
    dc_new = dc_total * f
    if not fills(H, U):  # as in forward
        unit = gl.arange(0, U, gl.SliceLayout(1, cells))
        inside = (unit < H)[:, None]
        d_i, d_f, d_g, d_o = (
            only(inside, d_i),
            only(inside, d_f),
            only(inside, d_g),
            only(inside, d_o),
        )
    put_gates(to, d_i, d_f, d_g, d_o, U, N, EXACT)
    d_now, store4 = d_at, real4
    if offsets is not None:
        d_now = d_at + elements(firsts[0], strides[1])
    elif not MOVES:
        d_now = d_at + elements(row_of(t, B), strides[1])
    if lengths is not None:
        store4 = real4 & at_step(t, length4)[:, :, None]
    gl.store(d_now + at4, beside(d_i, d_f, d_g, d_o, U, N).to(dtype), store4)
    if AHEAD == 2:
        now, tanh_c = prepared(
            read, tanh_c, bias, s + 1, t + forth, order, call, dtype, U, N, KEPT, EXACT, FAST
        )
    dh_new = state_gradient(w, to, U, N, EXACT)
    if reset is not None:
        dh_new = only((added[2] == 0)[None, :], dh_new)
        dc_new = only((added[2] == 0)[None, :], dc_new)
    if lengths is not None:
        active = at_step(t, length)
        dh_new, dc_new = gl.where(active, dh_new, dh), gl.where(active, dc_new, dc)
    if offsets is not None:
        later = first_row(t + (AHEAD + 2) * forth, offsets, T)
        if AHEAD == 1:
            firsts = firsts[1], firsts[2], later, 0
        else:
            firsts = firsts[1], firsts[2], firsts[3], later
    elif MOVES:
        d_at += strides[1]
    return (dh_new, dc_new), d_at, firsts, tanh_c, places, now, follows
