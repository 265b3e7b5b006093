"""Backward, with the units of a layer spread over many programs: the mirror of
``forward_steps.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlstm.spec import Gradients, Incoming

from .buffers import Kept, StepGradients
from .call import Call, call_arguments, strides_of, weight_arguments
from .cells import (
    cell_arguments,
    cell_gradients,
    gates_and_cell,
    load_peepholes,
    zone_gradient,
    zoneout_base,
    zoneout_rows,
    zoneout_units,
)
from .ends import start_gradient
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
)
from .projection import ProjectionGradient
from .steps import launch_steps


@triton.jit
def _add_to(at, value, mask):
    """Add values ``[U, N]`` to what is at pointers ``[U, N]``."""
    tl.store(at, tl.load(at, mask, 0) + value, mask)


@triton.jit(
    do_not_specialize=[
        *("step", "rows", "T", "B", "dy_t", "dy_b", "dc_t", "dc_b"),
        *("zoneout_c", "zoneout_h"),
    ],
    do_not_specialize_on_alignment=[
        *("c0", "offsets", "lengths", "reset", "dc_all", "dh_n", "h_mask", "seed"),
    ],
)
def lstm_bwd_step_kernel(
    gates,  # [D, rows, 4H]: with ACTIVATED after activation, else before it and without biases
    w_hh,  # [4H, H], direction 0
    b_ih,  # [4H]; None without biases and with ACTIVATED
    b_hh,  # [4H] or None, as b_ih
    w_hh_reverse,  # [4H, H], direction 1; None if there is none
    b_ih_reverse,  # [4H] or None
    b_hh_reverse,  # [4H] or None
    c0,  # [D, B, H] or None
    c_all,  # float32 [rows, D*H]
    offsets,  # int64 [T], the first row of each step of packed rows; None for [T, B]
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    dy,  # [rows, D*H] of strides dy_t, dy_b, or None
    dc_all,  # [rows, D*H] of strides dc_t, dc_b, or None
    dh_n,  # [D, B, H] or None
    dgates,  # [D, rows, 4H], written and read: gradients of the gates before activation
    hidden,  # [rows, D*H], written unless RECURRENT: what w_hr was applied to; else None
    dc,  # float32 [D, B, H], read and written: gradients of the cells between launches
    dw_ch,  # float32 [D, B, 3H] or None, read and written: of each sequence so far
    dh_kept,  # float32 [D, B, H], read and written with zoneout_h: what goes past the product
    h_mask,  # float32 [D, B, H] or None: the factors of h on its way into w_hh
    w_ch,  # [D, 3H] or None: peepholes of i, f, o
    seed,  # int64 [1] or None: of zoneout
    zoneout_c,  # None, or a probability, or an int32 threshold of hashes: see zone() in cells.py
    zoneout_h,  # as zoneout_c
    step,  # its number in the order of each direction's backward pass
    rows,  # how many rows there are, padding included
    T,
    B,
    dy_t,  # elements of dy from a step to the next; with offsets from a row to the next
    dy_b,  # elements of dy from a sequence to the next
    dc_t,  # elements of dc_all from a step to the next; with offsets from a row to the next
    dc_b,  # elements of dc_all from a sequence to the next
    H: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # units of a program
    N: tl.constexpr,  # sequences of a program
    K: tl.constexpr,  # terms of a product at a time
    RECURRENT: tl.constexpr,
    ACTIVATED: tl.constexpr,
    STAGES: tl.constexpr,  # of the pipeline that loads
    PRECISION: tl.constexpr,  # of products, "tf32" or "ieee"
    FAST: tl.constexpr,  # whether activations are approximate
):
    """U units of N sequences in one direction, for a step; the first launch takes the last one.

    Of a layer with a w_hr it leaves out the product (not RECURRENT): then dy holds all there is
    of the gradient of h before w_hr, and there is no dh_n.

    What a step needs of the step after it are all 4H gradients of the gates, which the launch
    before has written.
    """
    direction = tl.program_id(2)
    if D == 2:
        if direction == 1:
            w_hh, b_ih, b_hh = w_hh_reverse, b_ih_reverse, b_hh_reverse
    dtype: tl.constexpr = w_hh.dtype.element_ty
    n = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    real = n < B
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    u_inside = unit < H
    w_row, inside, is_cell = stacked_rows(tl.program_id(0) * UNITS, UNITS, H)
    bias = load_bias(b_ih, b_hh, w_row, inside)[:, None]
    k = tl.arange(0, K)
    w_tile = w_hh + k[None, :].to(tl.int64) * H + unit[:, None]

    peep_i, peep_f, peep_o = None, None, None
    if w_ch is not None:
        peep_i, peep_f, peep_o = load_peepholes(w_ch, direction, unit, H)
    base, units_h, units_c = None, None, None
    if seed is not None:
        base = zoneout_base(seed, direction)
        units_h = zoneout_units(base, unit, 0)
        units_c = zoneout_units(base, unit, 1)
    u_real = u_inside[:, None] & real
    state_at = (direction * B + n) * H + unit[:, None]
    d_cell = tl.load(dc + state_at, u_real, 0)
    length = tl.full([N], T, tl.int32)
    if lengths is not None:
        length = tl.load(lengths + n, real, 0)
    backwards = direction == 1

    t = tl.where(backwards, step, T - 1 - step)
    row = first_row(t, offsets, B)
    active = real & (t < length)
    u_active = u_inside[:, None] & active
    g_at = (direction.to(tl.int64) * rows + row) * (4 * H) + w_row[:, None] + n * (4 * H)
    stacked = tl.load(gates + g_at, inside[:, None] & active, 0).to(tl.float32)
    at = (row + n) * (D * H) + direction * H + unit[:, None]
    c = tl.load(c_all + at, u_active, 0)
    before = tl.where(backwards, t + 1, t - 1)
    begins = tl.where(backwards, length - 1 - before, before) < 0
    source = first_row(tl.maximum(tl.minimum(before, T - 1), 0), offsets, B)
    c_before_at = (source + n) * (D * H) + direction * H + unit[:, None]
    c_before = tl.load(c_all + c_before_at, u_active & (begins == 0), 0)
    if c0 is not None:
        c_before += tl.load(c0 + state_at, u_active & begins, 0).to(tl.float32)
    if reset is not None:
        keep = tl.load(reset + t.to(tl.int64) * B + n, active, 0) == 0
        c_before = tl.where(keep, c_before, 0.0)
    stride_at = row if offsets is not None else t.to(tl.int64)
    dh = tl.zeros([UNITS, N], tl.float32)
    if dy is not None:
        dy_at = dy + stride_at * dy_t + n * dy_b + direction * H + unit[:, None]
        dh += tl.load(dy_at, u_active, 0).to(tl.float32)
    if dc_all is not None:
        dc_at = dc_all + stride_at * dc_t + n * dc_b + direction * H
        d_cell += tl.load(dc_at + unit[:, None], u_active, 0).to(tl.float32)
    ends = tl.where(backwards, t, length - 1 - t) == 0
    if dh_n is not None:
        dh += tl.load(dh_n + state_at, u_active & ends, 0).to(tl.float32)

    if RECURRENT:
        # through w_hh from the step after, unless the sequence ends here or is reset there
        after = tl.where(backwards, tl.maximum(t - 1, 0), tl.minimum(t + 1, T - 1))
        follows = active & (ends == 0)
        if reset is not None:
            follows = follows & (tl.load(reset + after.to(tl.int64) * B + n, follows, 0) == 0)
        after_row = direction.to(tl.int64) * rows + first_row(after, offsets, B)
        d_tile = dgates + (after_row + n) * (4 * H) + k[:, None]
        total = product(w_tile, u_inside, d_tile, follows, H, 4 * H, K, STAGES, PRECISION)
        if h_mask is not None:
            total *= tl.load(h_mask + state_at, u_real, 0)
        dh += total

    if not ACTIVATED:
        if w_ch is None:
            stacked = activate(stacked + bias, is_cell, FAST)
        else:
            i, f, g, o, _ = gates_and_cell(
                stacked + bias, is_cell, peep_i, peep_f, peep_o, c_before, UNITS, N, FAST
            )
            stacked = stack_gates(i, f, g, o, UNITS, N)
    i, f, g, o = split_gates(stacked, UNITS, N)
    keys = None
    if seed is not None:
        keys = zoneout_rows(base, t, n)
    if zoneout_h is not None:
        dh += tl.load(dh_kept + state_at, u_active, 0)
        kept, dh = zone_gradient(dh, zoneout_h, keys, units_h)
        if reset is not None:
            kept = tl.where(keep, kept, 0.0)
        tl.store(dh_kept + state_at, kept, u_active)
    d_after = d_cell
    if zoneout_c is not None:
        dc_stays, d_after = zone_gradient(d_cell, zoneout_c, keys, units_c)
        c = f * c_before + i * g
    d_i, d_f, d_g, d_o, d_before, tanh_c, _, _ = cell_gradients(
        i, f, g, o, c, c_before, dh, d_after, peep_i, peep_f, peep_o, None, None, unit, H, FAST
    )
    if zoneout_c is not None:
        d_before += dc_stays
    if dw_ch is not None:
        w_ch_at = dw_ch + (direction * B + n) * (3 * H) + unit[:, None]
        _add_to(w_ch_at, d_i * c_before, u_active)
        _add_to(w_ch_at + H, d_f * c_before, u_active)
        _add_to(w_ch_at + 2 * H, d_o * c, u_active)
    stacked = stack_gates(d_i, d_f, d_g, d_o, UNITS, N).to(dtype)
    tl.store(dgates + g_at, stacked, inside[:, None] & active)
    if hidden is not None:
        tl.store(hidden + at, (o * tanh_c).to(dtype), u_active)
    if reset is not None:
        d_before = tl.where(keep, d_before, 0.0)
    d_cell = tl.where(active, d_before, d_cell)
    tl.store(dc + state_at, d_cell, u_real)


def launch_lstm_bwd_steps(
    call: Call,
    plan: Plan,
    kept: Kept,
    incoming: Incoming,
    steps: StepGradients,
    gradients: Gradients,
) -> None:
    """Write the gradients of every step, h0 and c0; padding of the former is left as it is."""
    spec, rows, weights, noise = call.spec, call.rows, call.weights, call.noise
    shape = spec.directions, rows.B, spec.hidden_size
    dc = torch.zeros(shape, dtype=torch.float32, device=call.x.device)
    if incoming.dc_n is not None:
        dc.copy_(incoming.dc_n)
    if steps.dw_ch is not None:
        steps.dw_ch.zero_()
    dh_kept = torch.zeros_like(dc) if spec.zoneout[1] else None
    through = ProjectionGradient(call, incoming, steps) if spec.proj_size else None
    d_hidden = incoming.dy if through is None else through.d_hidden
    biases = weight_arguments(kept.then, "b_ih", "b_hh")
    arguments = {
        "gates": kept.gates,
        **weight_arguments(weights, "w_hh"),
        **(dict.fromkeys(biases) if kept.activated else biases),
        "c0": call.state.c,
        "c_all": kept.c_all,
        "dy": d_hidden,
        "dc_all": incoming.dc_all,
        "dh_n": incoming.dh_n if through is None else None,
        "dgates": steps.dgates,
        "hidden": steps.hidden,
        "dc": dc,
        "dw_ch": steps.dw_ch,
        "dh_kept": dh_kept,
        **cell_arguments(spec, weights, noise),
        **call_arguments(call, plan),
        **dict(zip(("dy_t", "dy_b"), strides_of(d_hidden), strict=True)),
        **dict(zip(("dc_t", "dc_b"), strides_of(incoming.dc_all), strict=True)),
        "K": plan.chunk,
        "RECURRENT": through is None,
        "ACTIVATED": kept.activated,
        "FAST": is_fast(call.x),
    }
    if through is None:
        launch_steps(lstm_bwd_step_kernel, call, plan, arguments)
    else:
        arguments["h_mask"] = None  # the product with w_hh is not in the kernel
        launch_steps(lstm_bwd_step_kernel, call, plan, arguments, before=through.step)
    if gradients.dc0 is not None:
        gradients.dc0.copy_(dc)
    if gradients.dh0 is not None:
        dgates = steps.dgates
        start_gradient(gradients.dh0, dgates, weights, rows, incoming.dh_n, noise.h_mask, dh_kept)
