"""Backward: a whole sequence in one program, the mirror of ``forward_sequence.py``."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fastlstm.spec import Gradients, Incoming

from .buffers import Kept, StepGradients
from .call import Call, call_arguments, strides_of, weight_arguments
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
from .launch import is_fast, launch
from .plan import Plan, padded
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
    factors,  # float32 [D, rows]: the factors that normalised them; None without ln_hh
    w_hh,  # [4H, P], direction 0
    b_ih,  # [4H] or None
    b_hh,  # [4H] or None
    w_hr,  # [P, H] or None
    w_hh_reverse,  # [4H, P], direction 1; None if there is none
    b_ih_reverse,  # [4H] or None
    b_hh_reverse,  # [4H] or None
    w_hr_reverse,  # [P, H] or None
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
    dh0,  # [D, B, P] or None, written
    dc0,  # [D, B, H] or None, written
    dw_ch,  # float32 [D, B, 3H] or None, written: gradients of w_ch, of each sequence
    dln_c,  # float32 [D, B, 2H] or None, written: of ln_c and b_ln_c, of each sequence
    h_mask,  # float32 [D, B, P] or None: the factors of h on its way into w_hh
    w_ch,  # [D, 3H] or None: peepholes of i, f, o
    ln_hh,  # [D, 4H] or None: gains of normalised products
    ln_c,  # [D, H] or None: gain of the normalised c
    b_ln_c,  # [D, H] or None: bias of the normalised c
    seed,  # int64 [1] or None: of zoneout
    zoneout_c,  # None, or a probability, or an int32 threshold of hashes: see zone() in cells.py
    zoneout_h,  # as zoneout_c
    rows,  # how many rows there are, padding included
    T,
    B,
    dy_t,  # DY_UNIT elements of dy from a step to the next; with offsets from a row to the next
    dy_b,  # DY_UNIT elements of dy from a sequence to the next
    dc_t,  # elements of dc_all from a step to the next; with offsets from a row to the next
    dc_b,  # elements of dc_all from a sequence to the next
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # H and P, rounded up to powers of two
    P_TILE: tl.constexpr,
    N: tl.constexpr,  # sequences of a program
    DY_UNIT: tl.constexpr,  # elements; it divides both strides of dy
    STAGES: tl.constexpr,  # of the pipeline that loads
    PRECISION: tl.constexpr,  # of products, "tf32" or "ieee"
    FAST: tl.constexpr,  # whether activations are approximate
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

    peep_i, peep_f, peep_o = None, None, None
    if w_ch is not None:
        peep_i, peep_f, peep_o = load_peepholes(w_ch, direction, unit, H)
    gain, gain_c, bias_c = None, None, None
    if ln_hh is not None:
        gain, gain_c, bias_c = load_norms(ln_hh, ln_c, b_ln_c, direction, w_row, inside, unit, H)
    base, units_h, units_c = None, None, None
    if seed is not None:
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
        keys = None
        if seed is not None:
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


def launch_lstm_bwd_sequence(
    call: Call,
    plan: Plan,
    kept: Kept,
    incoming: Incoming,
    steps: StepGradients,
    gradients: Gradients,
) -> None:
    """Write the gradients of every step, h0 and c0; padding of the former is left as it is."""
    spec, weights = call.spec, call.weights
    dy_t, dy_b = strides_of(incoming.dy)
    # In units of what divides both strides, as the compiler cannot know.
    dy_unit = math.gcd(dy_t, dy_b, 16)
    dc_t, dc_b = strides_of(incoming.dc_all)
    launch(
        lstm_bwd_sequence_kernel,
        (-(-call.rows.B // plan.batch), spec.directions),
        plan,
        gates=kept.gates,
        factors=kept.factors,
        **weight_arguments(weights, "w_hh", "w_hr"),
        **weight_arguments(kept.then, "b_ih", "b_hh"),
        c0=call.state.c,
        c_all=kept.c_all,
        dy=incoming.dy,
        dc_all=incoming.dc_all,
        dh_n=incoming.dh_n,
        dc_n=incoming.dc_n,
        **steps._asdict(),
        dh0=gradients.dh0,
        dc0=gradients.dc0,
        **cell_arguments(spec, weights, call.noise),
        **norm_arguments(weights),
        **call_arguments(call, plan),
        dy_t=dy_t // dy_unit,
        dy_b=dy_b // dy_unit,
        dc_t=dc_t,
        dc_b=dc_b,
        P=spec.state_size,
        P_TILE=padded(spec.state_size),
        DY_UNIT=dy_unit,
        FAST=is_fast(call.x),
    )
