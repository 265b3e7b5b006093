"""Forward: a whole sequence in one program.

Letters as in the rest of the library; further U units and N sequences of a tile. Rows of
``[T, B, ...]`` and of packed tensors are addressed alike: step t of sequence b is row
``first_row(t) + b``.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fastlstm.kernels.products import Normalised, input_products
from fastlstm.spec import Outputs

from .call import Call, call_arguments, strides_of, weight_arguments
from .cells import (
    cell_arguments,
    gates_and_cell,
    load_norms,
    load_peepholes,
    norm_arguments,
    normalise,
    zone,
    zoneout_base,
    zoneout_rows,
    zoneout_units,
)
from .launch import is_fast, launch
from .plan import Plan, padded
from .primitives import first_row, load_bias, operand, stacked_rows, tanh


@triton.jit(
    do_not_specialize=["rows", "T", "B", "x_t", "x_b", "zoneout_c", "zoneout_h"],
    do_not_specialize_on_alignment=["h0", "c0", "offsets", "lengths", "reset", "h_mask", "seed"],
)
def lstm_fwd_sequence_kernel(
    x,  # with FUSED [rows, I] of strides x_t, x_b; else float32 [D, rows, 4H], its input products
    w_ih,  # [4H, I], direction 0; None unless FUSED
    w_hh,  # [4H, P]
    b_ih,  # [4H] or None
    b_hh,  # [4H] or None
    w_hr,  # [P, H] or None
    w_ih_reverse,  # [4H, I], direction 1; None unless FUSED, or if there is no direction 1
    w_hh_reverse,  # [4H, P] or None
    b_ih_reverse,  # [4H] or None
    b_hh_reverse,  # [4H] or None
    w_hr_reverse,  # [P, H] or None
    h0,  # [D, B, P] or None
    c0,  # [D, B, H] or None
    offsets,  # int64 [T], the first row of each step of packed rows; None for [T, B]
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    y,  # [rows, D*P]
    h_n,  # [D, B, P]
    c_n,  # [D, B, H]
    c_all,  # float32 [rows, D*H] or None
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
    x_t,  # X_UNIT elements of x from a step to the next; with offsets from a row to the next
    x_b,  # X_UNIT elements of x from a sequence to the next
    I: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    I_TILE: tl.constexpr,  # I, H and P, rounded up to powers of two
    UNITS: tl.constexpr,
    P_TILE: tl.constexpr,
    N: tl.constexpr,  # sequences of a program
    FUSED: tl.constexpr,  # whether x goes through w_ih here
    X_UNIT: tl.constexpr,  # elements; it divides both strides of x
    STAGES: tl.constexpr,  # of the pipeline that loads
    PRECISION: tl.constexpr,  # of products, "tf32" or "ieee"
    FAST: tl.constexpr,  # whether activations are approximate
):
    """N sequences in one direction, from the first step to the last; the weights stay on chip."""
    direction = tl.program_id(1)
    if D == 2:
        if direction == 1:
            w_ih, w_hh, w_hr = w_ih_reverse, w_hh_reverse, w_hr_reverse
            b_ih, b_hh = b_ih_reverse, b_hh_reverse
    dtype: tl.constexpr = w_hh.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    real = n < B
    unit = tl.arange(0, UNITS)
    out = tl.arange(0, P_TILE)
    w_row, inside, is_cell = stacked_rows(0, UNITS, H)
    w = tl.load(w_hh + w_row[:, None] * P + out, inside[:, None] & (out < P), 0)
    w = operand(w, dtype, PRECISION)
    bias = load_bias(b_ih, b_hh, w_row, inside)[:, None]
    if FUSED:
        feature = tl.arange(0, I_TILE)
        w_x = tl.load(w_ih + w_row[:, None] * I + feature, inside[:, None] & (feature < I), 0)
        w_x = operand(w_x, dtype, PRECISION)
        start = tl.broadcast_to(bias, [4 * UNITS, N])
        x_t, x_b = x_t.to(tl.int64) * X_UNIT, x_b.to(tl.int64) * X_UNIT
        x_tile = x + feature[:, None] + n * x_b
        x_real = (feature < I)[:, None] & real
    else:
        x_tile = x + direction.to(tl.int64) * rows * (4 * H) + w_row[:, None] + n * (4 * H)
        x_real = inside[:, None] & real
    if w_hr is not None:
        project = tl.load(w_hr + out[:, None] * H + unit, (out < P)[:, None] & (unit < H), 0)
        project = operand(project, dtype, PRECISION)

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
    h = tl.zeros([P_TILE, N], dtype)
    c = tl.zeros([UNITS, N], tl.float32)
    if h_mask is not None:
        mask = tl.load(h_mask + h_at, h_real, 0)
    if h0 is not None:
        h = tl.load(h0 + h_at, h_real, 0)
    if c0 is not None:
        c = tl.load(c0 + c_at, c_real, 0).to(tl.float32)

    steps = T
    length = tl.full([N], T, tl.int32)
    if lengths is not None:
        length = tl.load(lengths + n, real, 0)
        steps = tl.max(length, 0).to(tl.int32)

    t = (steps - 1) * direction
    for _ in tl.range(steps, num_stages=STAGES):
        row = first_row(t, offsets, B)
        active = real & (t < length)
        if reset is not None:
            keep = tl.load(reset + t.to(tl.int64) * B + n, active, 0) == 0
            h = tl.where(keep, h, tl.zeros_like(h))
            c = tl.where(keep, c, 0.0)
        # Read here, copied to shared memory STAGES - 1 steps ahead by the compiler's pipeline.
        if FUSED:
            x_at = row if offsets is not None else t.to(tl.int64)
            x_now = tl.load(x_tile + x_at * x_t, x_real & (t < length), 0)
            stacked = tl.dot(w_x, operand(x_now, dtype, PRECISION), start, PRECISION)
        else:
            x_now = tl.load(x_tile + row * (4 * H), x_real & (t < length), 0)
            stacked = x_now + bias
        h_in = h
        if h_mask is not None:
            h_in = h * mask
        h_in = operand(h_in, dtype, PRECISION)
        if ln_hh is None:
            stacked = tl.dot(w, h_in, stacked, PRECISION)
        else:
            products = tl.dot(w, h_in, tl.zeros([4 * UNITS, N], tl.float32), PRECISION)
            normalised, _ = normalise(products, inside[:, None], 4 * H)
            stacked += normalised * gain
        _i, _f, _g, o, c_new = gates_and_cell(
            stacked, is_cell, peep_i, peep_f, peep_o, c, UNITS, N, FAST
        )
        c_out = c_new
        if ln_c is not None:
            c_out, _ = normalise(c_new, (unit < H)[:, None], H)
            c_out = c_out * gain_c + bias_c
        h_new = (o * tanh(c_out, FAST)).to(dtype)
        if H != UNITS:  # an infinite x makes NaN of units that only fill the tile: 0 * inf
            h_new = tl.where((unit < H)[:, None], h_new, tl.zeros_like(h_new))
        if w_hr is not None:
            zero = tl.zeros([P_TILE, N], tl.float32)
            h_new = tl.dot(project, operand(h_new, dtype, PRECISION), zero, PRECISION).to(dtype)
        keys = None
        if seed is not None:
            keys = zoneout_rows(base, t, n)
        if zoneout_h is not None:
            h_new = zone(h, h_new, zoneout_h, keys, units_h).to(dtype)
        if zoneout_c is not None:
            c_new = zone(c, c_new, zoneout_c, keys, units_c)
        y_at = row * (D * P) + direction * P + n * (D * P) + out[:, None]
        tl.store(y + y_at, h_new, (out < P)[:, None] & active)
        if c_all is not None:
            c_all_at = row * (D * H) + direction * H + n * (D * H) + unit[:, None]
            tl.store(c_all + c_all_at, c_new, (unit < H)[:, None] & active)
        if lengths is None:
            h, c = h_new, c_new
        else:
            h, c = tl.where(active, h_new, h), tl.where(active, c_new, c)
        t += 1 - 2 * direction
    tl.store(h_n + h_at, h.to(h_n.dtype.element_ty), h_real)
    tl.store(c_n + c_at, c.to(c_n.dtype.element_ty), c_real)


def launch_lstm_fwd_sequence(call: Call, plan: Plan, outputs: Outputs) -> None:
    """Write the outputs of one layer but for gates; padding of y and c_all is left as it is."""
    spec, x, weights = call.spec, call.x, call.weights
    x_t, x_b = strides_of(x)
    # In units of what divides both strides, as the compiler cannot know.
    x_unit = math.gcd(x_t, x_b, 16)
    values = x if plan.fused else input_products(call.x_rows(), weights)
    if spec.layer_norm:
        values = Normalised.of(values).values
        for part, each in zip(values, weights, strict=True):
            part *= each.ln_ih
    w_ih = weight_arguments(weights, "w_ih")
    launch(
        lstm_fwd_sequence_kernel,
        (-(-call.rows.B // plan.batch), spec.directions),
        plan,
        x=values,
        **(w_ih if plan.fused else dict.fromkeys(w_ih)),
        **weight_arguments(weights, "w_hh", "b_ih", "b_hh", "w_hr"),
        h0=call.state.h,
        c0=call.state.c,
        y=outputs.y,
        h_n=outputs.h_n,
        c_n=outputs.c_n,
        c_all=outputs.c_all,
        **cell_arguments(spec, weights, call.noise),
        **norm_arguments(weights),
        **call_arguments(call, plan),
        x_t=x_t // x_unit,
        x_b=x_b // x_unit,
        I=spec.input_size,
        P=spec.state_size,
        I_TILE=padded(spec.input_size),
        P_TILE=padded(spec.state_size),
        FUSED=plan.fused,
        X_UNIT=x_unit,
        FAST=is_fast(x),
    )
