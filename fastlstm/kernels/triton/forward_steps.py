"""Forward, with the units of a layer spread over many programs.

Letters and rows as in ``forward_sequence.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlstm.kernels.products import input_products
from fastlstm.spec import Outputs

from .call import Call, call_arguments, weight_arguments
from .cells import (
    cell_arguments,
    gates_and_cell,
    load_peepholes,
    zone,
    zoneout_base,
    zoneout_rows,
    zoneout_units,
)
from .ends import add_start, final_states
from .launch import is_fast
from .plan import Plan
from .primitives import (
    activate,
    first_row,
    load_bias,
    product,
    split_gates,
    stack_gates,
    stacked_rows,
    tanh,
)
from .projection import Projection
from .steps import launch_steps


@triton.jit(
    do_not_specialize=["step", "rows", "T", "B", "zoneout_c", "zoneout_h"],
    do_not_specialize_on_alignment=["offsets", "lengths", "reset", "h0", "h_mask", "seed"],
)
def lstm_fwd_step_kernel(
    products,  # float32 [D, rows, 4H]: input products, and h0 through w_hh in the first rows
    w_hh,  # [4H, P], direction 0
    b_ih,  # [4H] or None
    b_hh,  # [4H] or None
    w_hh_reverse,  # [4H, P], direction 1; None if there is none
    b_ih_reverse,  # [4H] or None
    b_hh_reverse,  # [4H] or None
    offsets,  # int64 [T], the first row of each step of packed rows; None for [T, B]
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    h_all,  # [rows, D*P], read: the states of all steps, as they go into w_hh
    out,  # [rows, D*H], written: the states, or with a w_hr what it is applied to; is read
    # only for zoneout_h
    c,  # float32 [D, B, H], read and written: the cells between launches
    c_all,  # float32 [rows, D*H], written, or None
    gates,  # [D, rows, 4H], written after activation, or None
    h0,  # [D, B, H] or None; only for zoneout_h
    h_mask,  # float32 [D, B, H] or None: times the states it is h_all, written
    w_ch,  # [D, 3H] or None: peepholes of i, f, o
    seed,  # int64 [1] or None: of zoneout
    zoneout_c,  # None, or a probability, or an int32 threshold of hashes: see zone() in cells.py
    zoneout_h,  # as zoneout_c
    step,  # its number in the order of each direction
    rows,  # how many rows there are, padding included
    T,
    B,
    H: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # units of a program
    N: tl.constexpr,  # sequences of a program
    K: tl.constexpr,  # terms of a product at a time
    STAGES: tl.constexpr,  # of the pipeline that loads
    PRECISION: tl.constexpr,  # of products, "tf32" or "ieee"
    FAST: tl.constexpr,  # whether activations are approximate
):
    """U units of N sequences in one direction, for a step; the next launch sees what it wrote.

    The weights stream through in chunks of K.
    """
    direction = tl.program_id(2)
    if D == 2:
        if direction == 1:
            w_hh, b_ih, b_hh = w_hh_reverse, b_ih_reverse, b_hh_reverse
    dtype: tl.constexpr = w_hh.dtype.element_ty
    n = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    real = n < B
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    w_row, inside, is_cell = stacked_rows(tl.program_id(0) * UNITS, UNITS, H)
    k = tl.arange(0, K)
    w_tile = w_hh + w_row[:, None].to(tl.int64) * P + k
    bias = load_bias(b_ih, b_hh, w_row, inside)[:, None]

    peep_i, peep_f, peep_o = None, None, None
    if w_ch is not None:
        peep_i, peep_f, peep_o = load_peepholes(w_ch, direction, unit, H)
    base, units_h, units_c = None, None, None
    if seed is not None:
        base = zoneout_base(seed, direction)
        units_h = zoneout_units(base, unit, 0)
        units_c = zoneout_units(base, unit, 1)
    u_real = (unit < H)[:, None] & real
    state_at = (direction * B + n) * H + unit[:, None]
    cell = tl.load(c + state_at, u_real, 0)
    length = tl.full([N], T, tl.int32)
    if lengths is not None:
        length = tl.load(lengths + n, real, 0)
    backwards = direction == 1

    t = tl.where(backwards, T - 1 - step, step)
    row = first_row(t, offsets, B)
    active = real & (t < length)

    # h of the step before: 0 where the sequence begins or is reset
    before = tl.where(backwards, t + 1, t - 1)
    begins = tl.where(backwards, length - 1 - before, before) < 0
    source = tl.maximum(tl.minimum(before, T - 1), 0)
    h_tile = h_all + (first_row(source, offsets, B) + n) * (D * P) + direction * P + k[:, None]
    known = active & (begins == 0)
    if reset is not None:
        keep = tl.load(reset + t.to(tl.int64) * B + n, active, 0) == 0
        known = known & keep
        cell = tl.where(keep, cell, 0.0)
    stacked = product(w_tile, inside, h_tile, known, 1, P, K, STAGES, PRECISION)
    # Loaded now and not before the product, which needs the registers.
    g_at = (direction.to(tl.int64) * rows + row) * (4 * H) + w_row[:, None] + n * (4 * H)
    stacked += tl.load(products + g_at, inside[:, None] & active, 0) + bias
    if w_ch is None:
        stacked = activate(stacked, is_cell, FAST)
    else:
        i, f, g, o, _ = gates_and_cell(
            stacked, is_cell, peep_i, peep_f, peep_o, cell, UNITS, N, FAST
        )
        stacked = stack_gates(i, f, g, o, UNITS, N)
    if gates is not None:
        tl.store(gates + g_at, stacked.to(gates.dtype.element_ty), inside[:, None] & active)
    i, f, g, o = split_gates(stacked, UNITS, N)
    c_new = f * cell + i * g
    h_new = (o * tanh(c_new, FAST)).to(dtype)
    at = (row + n) * (D * H) + direction * H + unit[:, None]
    u_active = (unit < H)[:, None] & active
    keys = None
    if seed is not None:
        keys = zoneout_rows(base, t, n)
    if zoneout_h is not None:
        before_at = (first_row(source, offsets, B) + n) * (D * H) + direction * H
        h = tl.load(out + before_at + unit[:, None], u_active & known, 0)
        if h0 is not None:
            starts = active & begins
            if reset is not None:
                starts = starts & keep
            h += tl.load(h0 + state_at, u_active & starts, 0)
        h_new = zone(h, h_new, zoneout_h, keys, units_h).to(dtype)
    if zoneout_c is not None:
        c_new = zone(cell, c_new, zoneout_c, keys, units_c)
    tl.store(out + at, h_new, u_active)
    if h_mask is not None:
        mask = tl.load(h_mask + state_at, u_real, 0)
        tl.store(h_all + at, (h_new * mask).to(dtype), u_active)
    if c_all is not None:
        tl.store(c_all + at, c_new, u_active)
    cell = tl.where(active, c_new, cell)
    tl.store(c + state_at, cell, u_real)


def launch_lstm_fwd_steps(call: Call, plan: Plan, outputs: Outputs) -> None:
    """Write the outputs of one layer; padding of y and c_all is left as it is."""
    spec, rows, weights, noise = call.spec, call.rows, call.weights, call.noise
    D, H, P = spec.directions, spec.hidden_size, spec.state_size
    h0, c0 = call.state
    y = outputs.y.view(rows.count, D * P)
    masked, start = y, h0
    if noise.h_mask is not None:
        masked = torch.empty_like(y)
        start = None if h0 is None else (h0 * noise.h_mask).to(h0.dtype)
    products = input_products(call.x_rows(), weights)
    for direction, each in enumerate(weights):
        add_start(products[direction], start, each, rows, direction)
    # What a projection is applied to, or h itself.
    out = y.new_zeros(rows.count, D * H) if spec.proj_size else y
    assert outputs.c_n is not None
    c = torch.zeros_like(outputs.c_n, dtype=torch.float32)
    if c0 is not None:
        c.copy_(c0)
    arguments = {
        "products": products,
        **weight_arguments(weights, "w_hh", "b_ih", "b_hh"),
        "h_all": masked,
        "out": out,
        "c": c,
        "c_all": outputs.c_all,
        "gates": outputs.gates,
        "h0": h0 if any(spec.zoneout) else None,
        **cell_arguments(spec, weights, noise),
        **call_arguments(call, plan),
        "P": P,
        "K": plan.chunk,
        "FAST": is_fast(call.x),
    }
    if spec.proj_size:
        arguments["h_mask"] = None  # h is not known before the product with w_hr
        projection = Projection(call, out, y, masked)
        launch_steps(lstm_fwd_step_kernel, call, plan, arguments, after=projection.step)
    else:
        launch_steps(lstm_fwd_step_kernel, call, plan, arguments)
    outputs.c_n.copy_(c)
    final_states(outputs.h_n, y, h0, rows)
