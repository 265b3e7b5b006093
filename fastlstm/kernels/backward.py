"""Backward: the mirror of :mod:`fastlstm.kernels.forward`.

The kernels turn the gradients of the outputs into those of the gates before activation, of all
steps. The gradients of weights, biases and input are single products and sums of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlstm.reference import Cell, Weights

from .backward_steps import launch_lstm_bwd_steps
from .config import Plan, backward_plan, padded
from .launch import device_of, dot_precision, is_fast, launch, shape_of
from .operands import product, product_into
from .primitives import (
    activate,
    first_row,
    gate_gradients,
    load_bias,
    operand,
    split_gates,
    stack_gates,
    stacked_rows,
    tanh,
)
from .rows import Rows


@triton.jit(
    do_not_specialize=["rows", "T", "B", "dy_t", "dy_b", "dc_t", "dc_b"],
    do_not_specialize_on_alignment=["c0", "offsets", "lengths", "reset", "dc_all", "dh_n", "dc_n"],
)
def lstm_bwd_sequence_kernel(
    gates,  # [D, rows, 4H]: with ACTIVATED after activation, else before it and without biases
    w_hh,  # [4H, P], direction 0
    b_ih,  # [4H]; None without biases and with ACTIVATED
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
    ACTIVATED: tl.constexpr,
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

    h_at = (direction * B + n) * P + out[:, None]
    c_at = (direction * B + n) * H + unit[:, None]
    h_real = (out < P)[:, None] & real
    c_real = (unit < H)[:, None] & real
    dh = tl.zeros([P_TILE, N], tl.float32)
    dc = tl.zeros([UNITS, N], tl.float32)
    c_start = tl.zeros([UNITS, N], tl.float32)
    if dh_n is not None:
        dh = tl.load(dh_n + h_at, h_real, 0).to(tl.float32)
    if dc_n is not None:
        dc = tl.load(dc_n + c_at, c_real, 0).to(tl.float32)
    if c0 is not None:
        c_start = tl.load(c0 + c_at, c_real, 0).to(tl.float32)

    steps = T
    length = tl.full([N], T, tl.int32)
    if lengths is not None:
        length = tl.load(lengths + n, real, 0)
        steps = tl.max(length, 0).to(tl.int32)
    g_tile = gates + direction.to(tl.int64) * rows * (4 * H) + w_row[:, None] + n * (4 * H)
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
        stacked = tl.load(g_tile + row * (4 * H), inside[:, None] & active, 0).to(tl.float32)
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

        if not ACTIVATED:
            stacked = activate(stacked + bias, is_cell, FAST)
        i, f, g, o = split_gates(stacked, UNITS, N)
        d_hidden = dh_total
        if w_hr is not None:
            projected_at = (row + n) * (D * P) + direction * P + out[:, None]
            tl.store(dprojected + projected_at, dh_total.to(dtype), h_active)
            zero = tl.zeros([UNITS, N], tl.float32)
            d_hidden = tl.dot(project, operand(dh_total, dtype, PRECISION), zero, PRECISION)
        d_i, d_f, d_g, d_o, dc_new = gate_gradients(
            i, f, g, o, c, c_before, d_hidden, dc_total, FAST
        )
        if w_hr is not None:
            hidden_at = (row + n) * (D * H) + direction * H + unit[:, None]
            tl.store(hidden + hidden_at, (o * tanh(c, FAST)).to(dtype), c_active)
        stacked = stack_gates(d_i, d_f, d_g, d_o, UNITS, N).to(dtype)
        if H != UNITS:  # as in forward
            stacked = tl.where(inside[:, None], stacked, tl.zeros_like(stacked))
        tl.store(d_tile + row * (4 * H), stacked, inside[:, None] & active)
        zero = tl.zeros([P_TILE, N], tl.float32)
        dh_new = tl.dot(w, operand(stacked, dtype, PRECISION), zero, PRECISION)
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
    h_before = [
        rows.before(y_rows[:, d * P : (d + 1) * P], None if h0 is None else h0[d].to(dtype), d)
        for d in range(D)
        if gates is None or dweights is not None
    ]
    saved = _recompute(x_rows, groups, h_before) if gates is None else gates
    # Padding adds nothing to sums over rows.
    empty = torch.zeros if rows.padded else torch.empty
    dgates = empty(D, rows.count, 4 * H, dtype=dtype, device=x.device)
    dprojected = hidden = None
    if groups[0].w_hr is not None:
        dprojected = empty(rows.count, D * P, dtype=dtype, device=x.device)
        hidden = empty(rows.count, D * H, dtype=dtype, device=x.device)
    plan = backward_plan(shape_of(x, groups, rows.T, rows.B), device_of(x))
    run = _launch_sequence if plan.regime == "sequence" else launch_lstm_bwd_steps
    run(
        plan, x, groups, rows, c0, c_all, saved, gates is not None, dy, dh_n, dc_n, dc_all,
        dgates, dprojected, hidden, dh0, dc0,
    )  # fmt: skip
    if dx is not None:
        _input_gradient(dx.view(x_rows.shape), dgates, groups)
    if dweights is None:
        return
    if rows.padded:  # whatever x holds there must not meet the zeros of dgates
        x_rows = torch.where(rows.real(), x_rows, 0)
    for d, target in enumerate(dweights):
        product_into(target.w_ih, dgates[d].T, x_rows)
        product_into(target.w_hh, dgates[d].T, h_before[d])
        if target.b_ih is not None:
            torch.sum(dgates[d], 0, out=target.b_ih)  # adds up in float32
        if target.w_hr is not None:
            assert dprojected is not None and hidden is not None
            d_out = dprojected[:, d * P : (d + 1) * P]
            product_into(target.w_hr, d_out.T, hidden[:, d * H : (d + 1) * H])


def _recompute(x: Tensor, groups: Sequence[Weights], h_before: Sequence[Tensor]) -> Tensor:
    """float32 [D, rows, 4H]: the gates before activation, without biases, of all steps at once."""
    saved = x.new_empty(len(groups), x.shape[0], groups[0].w_ih.shape[0], dtype=torch.float32)
    for target, group, h in zip(saved, groups, h_before, strict=True):
        product_into(target, x, group.w_ih.T)
        target += product(h, group.w_hh.T)
    return saved


def _input_gradient(dx: Tensor, dgates: Tensor, groups: Sequence[Weights]) -> None:
    if len(groups) == 1:
        product_into(dx, dgates[0], groups[0].w_ih)
    else:
        dx.copy_(product(dgates[0], groups[0].w_ih) + product(dgates[1], groups[1].w_ih))


def _launch_sequence(
    plan: Plan,
    x: Tensor,
    groups: Sequence[Weights],
    rows: Rows,
    c0: Tensor | None,
    c_all: Tensor,
    gates: Tensor,
    activated: bool,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    dgates: Tensor,
    dprojected: Tensor | None,
    hidden: Tensor | None,
    dh0: Tensor | None,
    dc0: Tensor | None,
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
        w_hh=forward.w_hh,
        b_ih=None if activated else forward.b_ih,
        b_hh=None if activated else forward.b_hh,
        w_hr=forward.w_hr,
        w_hh_reverse=reverse.w_hh if reverse else None,
        b_ih_reverse=reverse.b_ih if reverse and not activated else None,
        b_hh_reverse=reverse.b_hh if reverse and not activated else None,
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
        ACTIVATED=activated,
        DY_UNIT=dy_unit,
        STAGES=plan.stages,
        PRECISION=dot_precision(x),
        FAST=is_fast(x),
    )
