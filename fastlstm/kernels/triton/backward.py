"""Backward: the mirror of :mod:`fastlstm.kernels.forward`.

The kernels turn the gradients of the outputs into those of the gates before activation, of all
steps. The gradients of weights, biases and input are single products and sums of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlstm.operands import (
    Normalised,
    gates_again,
    input_gradient,
    product_into,
    products,
    project,
    weight_gradients,
)
from fastlstm.reference import Cell, Weights
from fastlstm.rows import Rows

from .backward_steps import launch_lstm_bwd_steps
from .cells import (
    cell_arguments,
    cell_gradients,
    gates_and_cell,
    load_norms,
    load_peepholes,
    norm_arguments,
    normalise_gradient,
    zone_gradient,
    zoneout_base,
    zoneout_rows,
    zoneout_units,
)
from .config import Plan, backward_plan, padded
from .launch import device_of, dot_precision, is_fast, launch, shape_of
from .primitives import first_row, load_bias, operand, stack_gates, stacked_rows


@triton.jit(
    do_not_specialize=["rows", "T", "B", "dy_t", "dy_b", "dc_t", "dc_b", "zoneout_c", "zoneout_h"],
    do_not_specialize_on_alignment=[
        *("c0", "offsets", "lengths", "reset", "dc_all", "dh_n", "dc_n", "h_mask", "seed"),
    ],
)
def lstm_bwd_sequence_kernel(
    gates,  # float32 [D, rows, 4H]: before activation, without biases and peepholes; with ln_hh
    # [D, rows, 8H]: then the normalised products with w_hh, in the same tile of pointers
    factors,  # float32 [D, rows]: which normalised them; None without ln_hh
    w_hh,  # [4H, P], direction 0
    b_ih,  # [4H] or None
    b_hh,
    w_hr,  # [P, H] or None
    w_hh_reverse,  # the same of direction 1; None if there is none
    b_ih_reverse,
    b_hh_reverse,
    w_hr_reverse,
    c0,  # [D, B, H] or None
    c_all,  # float32 [rows, D*H]
    offsets,  # int64 [T], the first row of each step of packed rows; None for [T, B]
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    dy,  # [rows, D*P] of strides dy_t, dy_b, or None
    dc_all,  # [rows, D*H] of strides dc_t, dc_b, or None
    dh_n,  # [D, B, P] or None
    dc_n,  # [D, B, H] or None
    dgates,  # [D, rows, 4H], written: gradients of the gates before activation
    dprojected,  # [rows, D*P], written with a w_hr: gradients of its results; else None
    hidden,  # [rows, D*H], written with a w_hr: what it was applied to; else None
    dh0,  # [D, B, P] or None
    dc0,  # [D, B, H] or None
    dw_ch,  # float32 [D, B, 3H] or None: of each sequence
    dln_c,  # float32 [D, B, 2H] or None: of each sequence, of ln_c and b_ln_c
    h_mask,  # these as in forward
    w_ch,
    ln_hh,
    ln_c,
    b_ln_c,
    seed,
    zoneout_c,
    zoneout_h,
    rows,
    T,
    B,
    dy_t,  # DY_UNIT elements from a step to the next; with offsets from a row to the next
    dy_b,  # and from a sequence to the next
    dc_t,  # the same of dc_all, in single elements
    dc_b,
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # H and P, rounded up to powers of two
    P_TILE: tl.constexpr,
    N: tl.constexpr,
    DY_UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """N sequences in one direction, from the last step to the first; the weights stay on chip."""
    direction = tl.program_id(1)
    if D == 2:
        if direction == 1:
            w_hh, w_hr = w_hh_reverse, w_hr_reverse
            b_ih, b_hh = b_ih_reverse, b_hh_reverse
    dtype: tl.constexpr = w_hh.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    real = n < B
    unit = tl.arange(0, UNITS)
    out = tl.arange(0, P_TILE)
    w_row, inside, is_cell = stacked_rows(0, UNITS, H)
    w = tl.load(w_hh + w_row[None, :] * P + out[:, None], inside & (out < P)[:, None], 0)
    w = operand(w, dtype, PRECISION)
    if w_hr is not None:
        project = tl.load(w_hr + out * H + unit[:, None], (out < P) & (unit < H)[:, None], 0)
        project = operand(project, dtype, PRECISION)
    bias = load_bias(b_ih, b_hh, w_row, inside)[:, None]

    peep_i, peep_f, peep_o = load_peepholes(w_ch, direction, unit, H)
    gain, gain_c, bias_c = load_norms(ln_hh, ln_c, b_ln_c, direction, w_row, inside, unit, H)
    base = zoneout_base(seed, direction)
    units_h = zoneout_units(base, out, 0)
    units_c = zoneout_units(base, unit, 1)

    h_at = (direction * B + n) * P + out[:, None]
    c_at = (direction * B + n) * H + unit[:, None]
    h_real = (out < P)[:, None] & real
    c_real = (unit < H)[:, None] & real
    dh = tl.zeros([P_TILE, N], tl.float32)
    dc = tl.zeros([UNITS, N], tl.float32)
    c_start = tl.zeros([UNITS, N], tl.float32)
    if h_mask is not None:
        mask = tl.load(h_mask + h_at, h_real, 0)
    if dh_n is not None:
        dh = tl.load(dh_n + h_at, h_real, 0).to(tl.float32)
    if dc_n is not None:
        dc = tl.load(dc_n + c_at, c_real, 0).to(tl.float32)
    if c0 is not None:
        c_start = tl.load(c0 + c_at, c_real, 0).to(tl.float32)
    if dw_ch is not None:
        d_peep_i = tl.zeros([UNITS, N], tl.float32)
        d_peep_f = tl.zeros([UNITS, N], tl.float32)
        d_peep_o = tl.zeros([UNITS, N], tl.float32)
    if dln_c is not None:
        d_gain_c = tl.zeros([UNITS, N], tl.float32)
        d_bias_c = tl.zeros([UNITS, N], tl.float32)

    steps = T
    length = tl.full([N], T, tl.int32)
    if lengths is not None:
        length = tl.load(lengths + n, real, 0)
        steps = tl.max(length, 0).to(tl.int32)
    SAVED: tl.constexpr = 4 * H if ln_hh is None else 8 * H
    g_tile = gates + direction.to(tl.int64) * rows * SAVED + w_row[:, None] + n * SAVED
    if ln_hh is not None:
        factor_tile = factors + direction.to(tl.int64) * rows + n
    d_tile = dgates + direction.to(tl.int64) * rows * (4 * H) + w_row[:, None] + n * (4 * H)
    c_tile = c_all + direction * H + unit[:, None] + n * (D * H)
    if dy is not None:
        dy_t, dy_b = dy_t.to(tl.int64) * DY_UNIT, dy_b.to(tl.int64) * DY_UNIT
        dy_tile = dy + direction * P + out[:, None] + n * dy_b
    if dc_all is not None:
        dc_tile = dc_all + direction * H + unit[:, None] + n * dc_b

    t = (steps - 1) * (1 - direction)
    for _ in tl.range(steps, num_stages=STAGES):
        row = first_row(t, offsets, B)
        active = real & (t < length)
        c_active = (unit < H)[:, None] & active
        h_active = (out < P)[:, None] & active
        # Read here, copied to shared memory STAGES - 1 steps ahead by the compiler's pipeline.
        stacked = tl.load(g_tile + row * SAVED, inside[:, None] & active, 0).to(tl.float32)
        c = tl.load(c_tile + row * (D * H), c_active, 0)
        before = t - 1 + 2 * direction
        begins = tl.where(direction == 1, length - 1 - before, before) < 0
        source = tl.maximum(tl.minimum(before, T - 1), 0)
        c_before = tl.load(
            c_tile + first_row(source, offsets, B) * (D * H), c_active & (begins == 0), 0
        )
        if c0 is not None:
            c_before = tl.where(begins, c_start, c_before)
        if reset is not None:
            keep = tl.load(reset + t.to(tl.int64) * B + n, active, 0) == 0
            c_before = tl.where(keep, c_before, 0.0)
        at = row if offsets is not None else t.to(tl.int64)
        dh_total = dh
        if dy is not None:
            dh_total += tl.load(dy_tile + at * dy_t, h_active, 0).to(tl.float32)
        dc_total = dc
        if dc_all is not None:
            dc_total += tl.load(dc_tile + at * dc_t, c_active, 0).to(tl.float32)

        i, f, g, o, c_new = gates_and_cell(
            stacked + bias, is_cell, peep_i, peep_f, peep_o, c_before, UNITS, N, FAST
        )
        keys = zoneout_rows(base, t, n)
        if zoneout_h is not None:
            dh_stays, dh_total = zone_gradient(dh_total, zoneout_h, keys, units_h)
        if zoneout_c is not None:
            dc_stays, dc_total = zone_gradient(dc_total, zoneout_c, keys, units_c)
            c = c_new
        d_hidden = dh_total
        if w_hr is not None:
            projected_at = (row + n) * (D * P) + direction * P + out[:, None]
            tl.store(dprojected + projected_at, dh_total.to(dtype), h_active)
            zero = tl.zeros([UNITS, N], tl.float32)
            d_hidden = tl.dot(project, operand(dh_total, dtype, PRECISION), zero, PRECISION)
        d_i, d_f, d_g, d_o, dc_new, tanh_c, d_out, c_normalised = cell_gradients(
            i, f, g, o, c, c_before, d_hidden, dc_total,
            peep_i, peep_f, peep_o, gain_c, bias_c, unit, H, FAST,
        )  # fmt: skip
        if w_hr is not None:
            hidden_at = (row + n) * (D * H) + direction * H + unit[:, None]
            tl.store(hidden + hidden_at, (o * tanh_c).to(dtype), c_active)
        if dw_ch is not None:
            d_peep_i += tl.where(c_active, d_i * c_before, 0.0)
            d_peep_f += tl.where(c_active, d_f * c_before, 0.0)
            d_peep_o += tl.where(c_active, d_o * c, 0.0)
        if dln_c is not None:
            d_gain_c += tl.where(c_active, d_out * c_normalised, 0.0)
            d_bias_c += tl.where(c_active, d_out, 0.0)
        stacked = stack_gates(d_i, d_f, d_g, d_o, UNITS, N)
        through = stacked
        stacked = stacked.to(dtype)
        if H != UNITS:  # as in forward
            stacked = tl.where(inside[:, None], stacked, tl.zeros_like(stacked))
        tl.store(d_tile + row * (4 * H), stacked, inside[:, None] & active)
        if ln_hh is not None:
            h_normalised = tl.load(g_tile + row * SAVED + 4 * H, inside[:, None] & active, 0)
            factor = tl.load(factor_tile + row, active, 0)[None, :]
            scaled = tl.where(inside[:, None], through * gain, 0.0)
            through = normalise_gradient(scaled, h_normalised, factor, inside[:, None], 4 * H)
        else:
            through = stacked
        zero = tl.zeros([P_TILE, N], tl.float32)
        dh_new = tl.dot(w, operand(through, dtype, PRECISION), zero, PRECISION)
        if h_mask is not None:
            dh_new *= mask
        if zoneout_h is not None:
            dh_new += dh_stays
        if zoneout_c is not None:
            dc_new += dc_stays
        if reset is not None:
            dh_new = tl.where(keep, dh_new, 0.0)
            dc_new = tl.where(keep, dc_new, 0.0)
        if lengths is None:
            dh, dc = dh_new, dc_new
        else:
            dh, dc = tl.where(active, dh_new, dh), tl.where(active, dc_new, dc)
        t += 2 * direction - 1
    if dh0 is not None:
        tl.store(dh0 + h_at, dh.to(dh0.dtype.element_ty), h_real)
    if dc0 is not None:
        tl.store(dc0 + c_at, dc.to(dc0.dtype.element_ty), c_real)
    if dw_ch is not None:
        dw_ch += (direction * B + n) * (3 * H) + unit[:, None]
        tl.store(dw_ch, d_peep_i, c_real)
        tl.store(dw_ch + H, d_peep_f, c_real)
        tl.store(dw_ch + 2 * H, d_peep_o, c_real)
    if dln_c is not None:
        dln_c += (direction * B + n) * (2 * H) + unit[:, None]
        tl.store(dln_c, d_gain_c, c_real)
        tl.store(dln_c + H, d_bias_c, c_real)


def launch_lstm_bwd(
    x: Tensor,
    groups: Sequence[Weights],
    cell: Cell,
    rows: Rows,
    h0: Tensor | None,
    c0: Tensor | None,
    y: Tensor,
    c_all: Tensor,
    gates: Tensor | None,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    dx: Tensor | None,
    dh0: Tensor | None,
    dc0: Tensor | None,
    dweights: Sequence[Weights] | None,
) -> None:
    """Write the gradients of one layer; shapes as in :mod:`fastlstm.ops`."""
    D, H, P = len(groups), groups[0].w_hh.shape[0] // 4, groups[0].w_hh.shape[1]
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.view(rows.count, D * P)
    dtype = x.dtype
    plan = backward_plan(shape_of(x, groups, rows.T, rows.B, cell), device_of(x))
    if plan.regime == "sequence":
        gates = None
    if rows.padded and (dweights is not None or cell.layer_norm):
        # Whatever x holds there must not meet the zeros of dgates.
        x_rows = torch.where(rows.real(), x_rows, 0)
    h_before = []
    if gates is None or dweights is not None:
        h_before = rows.states_before(y_rows, h0, D)
    if cell.h_mask is not None:
        for h, mask in zip(h_before, cell.h_mask, strict=False):
            h *= rows.of_sequences(mask)
    x_side = h_side = None
    if cell.layer_norm:
        x_side = Normalised.of(project(x_rows, groups))
        h_side = Normalised.of(products(h_before, [group.w_hh for group in groups]))
        saved = _join_normalised(x_side, h_side, groups)
    else:
        saved = gates_again(x_rows, groups, h_before) if gates is None else gates
    # Padding adds nothing to sums over rows.
    empty = torch.zeros if rows.padded else torch.empty
    dgates = empty(D, rows.count, 4 * H, dtype=dtype, device=x.device)
    dprojected = hidden = None
    if groups[0].w_hr is not None:
        dprojected = empty(rows.count, D * P, dtype=dtype, device=x.device)
        hidden = empty(rows.count, D * H, dtype=dtype, device=x.device)
    dw_ch = dln_c = None
    if dweights is not None:
        new = partial(x.new_empty, D, rows.B, dtype=torch.float32)
        dw_ch = new(3 * H) if cell.peephole else None
        dln_c = new(2 * H) if cell.layer_norm else None
    if plan.regime == "sequence":
        _launch_sequence(
            plan, x, groups, cell, rows, c0, c_all, saved, h_side, dy, dh_n, dc_n, dc_all,
            dgates, dprojected, hidden, dh0, dc0, dw_ch, dln_c,
        )  # fmt: skip
    else:
        launch_lstm_bwd_steps(
            plan, x, groups, cell, rows, c0, c_all, saved, gates is not None,
            dy, dh_n, dc_n, dc_all, dgates, dprojected, hidden, dh0, dc0, dw_ch,
        )  # fmt: skip
    through_x = through_h = dgates
    if x_side is not None and h_side is not None:
        through_x = _through(x_side, dgates, [group.ln_ih for group in groups])
        through_h = _through(h_side, dgates, [group.ln_hh for group in groups])
        for d_products, h in zip(through_h, h_before, strict=True):
            # Zeros are normalised with a factor of 316: float16 overflows, and 0 * inf is NaN.
            d_products.masked_fill_((h == 0).all(-1, keepdim=True), 0)
    if dx is not None:
        input_gradient(dx.view(x_rows.shape), through_x, groups)
    if dweights is None:
        return
    for d, target in enumerate(dweights):
        weight_gradients(target, dgates[d], x_rows, h_before[d], through_x[d], through_h[d])
        if target.w_hr is not None:
            assert dprojected is not None and hidden is not None
            d_out = dprojected[:, d * P : (d + 1) * P]
            product_into(target.w_hr, d_out.T, hidden[:, d * H : (d + 1) * H])
        if dw_ch is not None:
            _set(target.w_ch, dw_ch[d].sum(0))
        if dln_c is not None and x_side is not None and h_side is not None:
            _set(target.ln_ih, (dgates[d] * x_side.values[d]).sum(0))
            _set(target.ln_hh, (dgates[d] * h_side.values[d]).sum(0))
            for part, total in zip(
                (target.ln_c, target.b_ln_c), dln_c[d].sum(0).chunk(2), strict=True
            ):
                _set(part, total)


def _set(target: Tensor | None, value: Tensor) -> None:
    if target is not None:
        target.copy_(value)


def _join_normalised(x: Normalised, h: Normalised, groups: Sequence[Weights]) -> Tensor:
    """float32 [D, rows, 8H]: the same of normalised products; then those of h."""
    saved = torch.cat([x.values, h.values], -1)
    for both, group in zip(saved, groups, strict=True):
        gates, normalised = both.chunk(2, -1)
        gates.mul_(group.ln_ih).addcmul_(normalised, group.ln_hh)
    return saved


def _through(side: Normalised, dgates: Tensor, gains: Sequence[Tensor | None]) -> Tensor:
    """The gradients of products, from those of the gates that they are normalised for."""
    gain = torch.stack([g for g in gains if g is not None])[:, None].float()
    return side.gradient(dgates * gain).to(dgates.dtype)


def _launch_sequence(
    plan: Plan,
    x: Tensor,
    groups: Sequence[Weights],
    cell: Cell,
    rows: Rows,
    c0: Tensor | None,
    c_all: Tensor,
    gates: Tensor,
    h_side: Normalised | None,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    dgates: Tensor,
    dprojected: Tensor | None,
    hidden: Tensor | None,
    dh0: Tensor | None,
    dc0: Tensor | None,
    dw_ch: Tensor | None,
    dln_c: Tensor | None,
) -> None:
    D, H, P = len(groups), groups[0].w_hh.shape[0] // 4, groups[0].w_hh.shape[1]
    forward, reverse = groups[0], groups[-1] if D == 2 else None
    dy_t, dy_b = (0, 0) if dy is None else (dy.stride(0), dy.stride(-2))
    # In units of what divides both strides, as the compiler cannot know.
    dy_unit = math.gcd(dy_t, dy_b, 16)
    dc_t, dc_b = (0, 0) if dc_all is None else (dc_all.stride(0), dc_all.stride(-2))
    launch(
        lstm_bwd_sequence_kernel,
        (-(-rows.B // plan.batch), D),
        plan,
        gates=gates,
        factors=h_side.factor if h_side else None,
        w_hh=forward.w_hh,
        b_ih=forward.b_ih,
        b_hh=forward.b_hh,
        w_hr=forward.w_hr,
        w_hh_reverse=reverse.w_hh if reverse else None,
        b_ih_reverse=reverse.b_ih if reverse else None,
        b_hh_reverse=reverse.b_hh if reverse else None,
        w_hr_reverse=reverse.w_hr if reverse else None,
        c0=c0,
        c_all=c_all,
        offsets=rows.offsets,
        lengths=rows.lengths,
        reset=rows.reset,
        dy=dy,
        dc_all=dc_all,
        dh_n=dh_n,
        dc_n=dc_n,
        dgates=dgates,
        dprojected=dprojected,
        hidden=hidden,
        dh0=dh0,
        dc0=dc0,
        dw_ch=dw_ch,
        dln_c=dln_c,
        **cell_arguments(cell, groups),
        **norm_arguments(groups),
        rows=rows.count,
        T=rows.T,
        B=rows.B,
        dy_t=dy_t // dy_unit,
        dy_b=dy_b // dy_unit,
        dc_t=dc_t,
        dc_b=dc_b,
        H=H,
        P=P,
        D=D,
        UNITS=plan.units,
        P_TILE=padded(P),
        N=plan.batch,
        DY_UNIT=dy_unit,
        STAGES=plan.stages,
        PRECISION=dot_precision(x),
        FAST=is_fast(x),
    )
