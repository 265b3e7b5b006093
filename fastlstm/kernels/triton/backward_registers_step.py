"""One step of the backward pass in the registers regime."""

from .gluon import gl, gluon
from .register_products import activate, gates_after, put_gates, state_gradient, tanh_of
from .register_tiles import (
    apart,
    at_step,
    beside,
    elements,
    fills,
    first_row,
    flags,
    given,
    only,
)


@gluon.jit
def cell_gradient(dh, dc, i, f, g, o, tanh_c, c_before):
    """Return the gradients of i, f, g, o before activation and of c_before."""
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    d_o = dh * tanh_c * o * (1.0 - o)
    d_i = dc * g * i * (1.0 - i)
    d_f = dc * c_before * f * (1.0 - f)
    d_g = dc * i * (1.0 - g * g)
    return d_i, d_f, d_g, d_o, dc * f


@gluon.jit
def backward_step(
    to,  # of gate_buffers, written
    w,  # of columns_of_gates
    bias,  # of biases, without KEPT
    dh,  # [U, N]: the gradients that come from the steps after
    dc,
    c,  # [U, N]
    c_before,  # [U, N], or what c0 does not say of it
    c_start,  # [U, N], with c0
    g_now,  # [U, N, 4]
    dy_now,  # [U, N], with dy
    dca_now,  # [U, N], with dc_all
    reset_now,  # [N], with a reset
    real,  # [U, N]
    real4,  # [U, N, 4]
    at,  # [U, N]: offsets within the tile
    at4,  # [U, N, 4]: the same
    dy_off,  # [U, N], with dy
    dca_off,  # [U, N], with dc_all
    c_at,  # pointer to c two steps on; with offsets at row 0, as all the following
    g_at,  # pointer to the gates of the next step
    d_at,  # pointer to the gradients of the gates of this step
    dy_at,  # pointer to dy of the next step, or to anything
    dca_at,  # pointer to dc_all of the next step, or to anything
    c_step,
    g_step,
    dy_step,
    dca_step,
    row,  # the first row of this step and of the two that follow, with offsets
    row_1,
    row_2,
    s,  # how many steps were taken
    steps,
    t,  # the step that this is
    forth,
    n,  # [N]
    length,  # [N], with lengths
    length4,  # the same for tiles [U, N, 4]
    c0,
    offsets,
    lengths,
    reset,
    dy,
    dc_all,
    T,
    B,
    D: gl.constexpr,
    H: gl.constexpr,
    U: gl.constexpr,
    N: gl.constexpr,
    KEPT: gl.constexpr,
    EXACT: gl.constexpr,
    FAST: gl.constexpr,
):
    """Take one step back; return what the next one begins with."""
    cells: gl.constexpr = dc.type.layout
    dtype: gl.constexpr = d_at.dtype.element_ty
    # What the steps that follow will read is asked for now.
    next_real, later_real, next_real4 = real & (s + 1 < steps), real & (s + 2 < steps), real4
    if lengths is not None:
        next_real = real & at_step(t + forth, length)
        later_real = real & at_step(t + 2 * forth, length)
        next_real4 = real4 & at_step(t + forth, length4)[:, :, None]
    else:
        next_real4 = real4 & (s + 1 < steps)
    if offsets is None:
        g_next = gl.load(g_at + at4, next_real4, 0)
        c_later = gl.load(c_at + at, later_real, 0)
        d_now = d_at
    else:
        g_next = gl.load(g_at + elements(row_1, g_step) + at4, next_real4, 0)
        c_later = gl.load(c_at + elements(row_2, c_step) + at, later_real, 0)
        d_now = d_at + elements(row, g_step)
    dy_next, dca_next, reset_next = dy_now, dca_now, reset_now
    dh_total, dc_total = dh, dc
    if dy is not None:
        dy_real = next_real & given(dy, H)
        dh_total += dy_now.to(gl.float32)
        if offsets is None:
            dy_next = gl.load(dy_at + dy_off, dy_real, 0)
        else:
            dy_next = gl.load(dy_at + elements(row_1, dy_step) + dy_off, dy_real, 0)
    if dc_all is not None:
        dca_real = next_real & given(dc_all, H)
        dc_total += dca_now.to(gl.float32)
        if offsets is None:
            dca_next = gl.load(dca_at + dca_off, dca_real, 0)
        else:
            dca_next = gl.load(dca_at + elements(row_1, dca_step) + dca_off, dca_real, 0)
    before = c_before
    if c0 is not None:
        if lengths is None:
            before = gl.where(s + 1 < steps, c_before, c_start)
        else:
            before = gl.where(at_step(t + forth, length), c_before, c_start)
    if reset is not None:
        before = only((reset_now == 0)[None, :], before)
        reset_next = flags(reset, s + 1, steps, t + forth, n, length, lengths, B, H)

    if KEPT:
        i, f, g, o = apart(g_now.to(gl.float32), U, N, cells)
    else:
        i, f, g, o = gates_after(g_now, bias, U, N, EXACT)
        i, f, g, o = activate(i, f, g, o, dtype, FAST, EXACT)
    tanh_c = tanh_of(c, FAST, EXACT)
    d_i, d_f, d_g, d_o, dc_new = cell_gradient(dh_total, dc_total, i, f, g, o, tanh_c, before)
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
    if lengths is not None:
        real4 = real4 & at_step(t, length4)[:, :, None]
    gl.store(d_now + at4, beside(d_i, d_f, d_g, d_o, U, N).to(dtype), real4)
    dh_new = state_gradient(w, to, U, N, EXACT)
    if reset is not None:
        dh_new = only((reset_now == 0)[None, :], dh_new)
        dc_new = only((reset_now == 0)[None, :], dc_new)
    if lengths is not None:
        active = at_step(t, length)
        dh_new, dc_new = gl.where(active, dh_new, dh), gl.where(active, dc_new, dc)
    if offsets is not None:
        row, row_1, row_2 = row_1, row_2, first_row(t + 3 * forth, offsets, T)
    else:
        c_at += c_step
        g_at += g_step
        d_at += g_step
        dy_at += dy_step
        dca_at += dca_step
    return (
        dh_new, dc_new, c_before, c_later, g_next, dy_next, dca_next, reset_next,
        c_at, g_at, d_at, dy_at, dca_at, row, row_1, row_2,
    )  # fmt: skip
