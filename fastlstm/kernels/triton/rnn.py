"""nn.RNN: h = act(W_ih x + b_ih + W_hh h + b_hh), forward and backward.

Regimes, letters and rows as in the kernels of the LSTM, but for one gate. Nothing but y is kept
for backward: the derivative of act follows from its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlstm.operands import input_gradient, project, weight_gradients
from fastlstm.reference import Weights
from fastlstm.rows import Rows

from .backward_steps import start_gradient
from .config import Plan, rnn_plan
from .forward_steps import add_start, final_states
from .launch import device_of, dot_precision, is_fast, launch, rnn_shape_of
from .primitives import first_row, load_bias, multiply_add, operand, tanh


@triton.jit
def _act(x, RELU: tl.constexpr, FAST: tl.constexpr):
    if RELU:
        result = tl.where(x < 0, 0.0, x)  # NaN stays
    else:
        result = tanh(x, FAST)
    return result


@triton.jit
def _act_gradient(d, h, RELU: tl.constexpr):
    """From the gradient of h = act(x) to that of x."""
    if RELU:
        result = tl.where(h <= 0, 0.0, d)
    else:
        result = d * (1.0 - h * h)
    return result


@triton.jit(
    do_not_specialize=["rows", "T", "B"],
    do_not_specialize_on_alignment=["h0", "offsets", "lengths", "reset"],
)
def rnn_fwd_sequence_kernel(
    projected,  # float32 [D, rows, H]: x through w_ih
    w_hh,  # [H, H], direction 0
    b_ih,  # [H] or None
    b_hh,
    w_hh_reverse,  # the same of direction 1; None if there is none
    b_ih_reverse,
    b_hh_reverse,
    h0,  # [D, B, H] or None
    offsets,  # int64 [T], the first row of each step of packed rows; None for [T, B]
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    y,  # [rows, D*H]
    h_n,  # [D, B, H]
    rows,
    T,
    B,
    H: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # H, rounded up to a power of two
    N: tl.constexpr,
    RELU: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """N sequences in one direction, from the first step to the last; the weights stay on chip."""
    direction = tl.program_id(1)
    if D == 2:
        if direction == 1:
            w_hh, b_ih, b_hh = w_hh_reverse, b_ih_reverse, b_hh_reverse
    dtype: tl.constexpr = w_hh.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    real = n < B
    unit = tl.arange(0, UNITS)
    inside = unit < H
    w = tl.load(w_hh + unit[:, None] * H + unit, inside[:, None] & inside, 0)
    w = operand(w, dtype, PRECISION)
    bias = load_bias(b_ih, b_hh, unit, inside)[:, None]
    h_at = (direction * B + n) * H + unit[:, None]
    h_real = inside[:, None] & real
    h = tl.zeros([UNITS, N], dtype)
    if h0 is not None:
        h = tl.load(h0 + h_at, h_real, 0)
    steps = T
    length = tl.full([N], T, tl.int32)
    if lengths is not None:
        length = tl.load(lengths + n, real, 0)
        steps = tl.max(length, 0).to(tl.int32)
    x_tile = projected + direction.to(tl.int64) * rows * H + unit[:, None] + n * H
    y_tile = y + direction * H + unit[:, None] + n * (D * H)

    t = (steps - 1) * direction
    for _ in tl.range(steps, num_stages=STAGES):
        row = first_row(t, offsets, B)
        active = real & (t < length)
        if reset is not None:
            keep = tl.load(reset + t.to(tl.int64) * B + n, active, 0) == 0
            h = tl.where(keep, h, tl.zeros_like(h))
        total = tl.load(x_tile + row * H, inside[:, None] & active, 0) + bias
        total = tl.dot(w, operand(h, dtype, PRECISION), total, PRECISION)
        h_new = _act(total, RELU, FAST).to(dtype)
        if H != UNITS:  # an infinite h makes NaN of units that only fill the tile: 0 * inf
            h_new = tl.where(inside[:, None], h_new, tl.zeros_like(h_new))
        tl.store(y_tile + row * (D * H), h_new, inside[:, None] & active)
        if lengths is None:
            h = h_new
        else:
            h = tl.where(active, h_new, h)
        t += 1 - 2 * direction
    tl.store(h_n + h_at, h, h_real)


@triton.jit(
    do_not_specialize=["rows", "T", "B", "dy_t", "dy_b"],
    do_not_specialize_on_alignment=["offsets", "lengths", "reset", "dh_n"],
)
def rnn_bwd_sequence_kernel(
    w_hh,  # as in forward
    w_hh_reverse,
    offsets,
    lengths,
    reset,
    y,  # [rows, D*H]
    dy,  # [rows, D*H] of strides dy_t, dy_b, or None
    dh_n,  # [D, B, H] or None
    d_total,  # [D, rows, H], written: gradients of what act was applied to
    dh0,  # [D, B, H] or None
    rows,
    T,
    B,
    dy_t,  # elements from a step to the next; with offsets from a row to the next
    dy_b,  # and from a sequence to the next
    H: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,
    N: tl.constexpr,
    RELU: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """N sequences in one direction, from the last step to the first; the weights stay on chip."""
    direction = tl.program_id(1)
    if D == 2:
        if direction == 1:
            w_hh = w_hh_reverse
    dtype: tl.constexpr = w_hh.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    real = n < B
    unit = tl.arange(0, UNITS)
    inside = unit < H
    w = tl.load(w_hh + unit[None, :] * H + unit[:, None], inside[:, None] & inside, 0)
    w = operand(w, dtype, PRECISION)
    h_at = (direction * B + n) * H + unit[:, None]
    h_real = inside[:, None] & real
    dh = tl.zeros([UNITS, N], tl.float32)
    if dh_n is not None:
        dh = tl.load(dh_n + h_at, h_real, 0).to(tl.float32)
    steps = T
    length = tl.full([N], T, tl.int32)
    if lengths is not None:
        length = tl.load(lengths + n, real, 0)
        steps = tl.max(length, 0).to(tl.int32)
    y_tile = y + direction * H + unit[:, None] + n * (D * H)
    d_tile = d_total + direction.to(tl.int64) * rows * H + unit[:, None] + n * H

    t = (steps - 1) * (1 - direction)
    for _ in tl.range(steps, num_stages=STAGES):
        row = first_row(t, offsets, B)
        active = real & (t < length)
        h_active = inside[:, None] & active
        h = tl.load(y_tile + row * (D * H), h_active, 0).to(tl.float32)
        d = dh
        if dy is not None:
            at = row if offsets is not None else t.to(tl.int64)
            dy_at = dy + at * dy_t + n * dy_b + direction * H + unit[:, None]
            d += tl.load(dy_at, h_active, 0).to(tl.float32)
        d = _act_gradient(d, h, RELU).to(dtype)
        if H != UNITS:  # as in forward
            d = tl.where(inside[:, None], d, tl.zeros_like(d))
        tl.store(d_tile + row * H, d, h_active)
        zero = tl.zeros([UNITS, N], tl.float32)
        dh_new = tl.dot(w, operand(d, dtype, PRECISION), zero, PRECISION)
        if reset is not None:
            keep = tl.load(reset + t.to(tl.int64) * B + n, active, 0) == 0
            dh_new = tl.where(keep, dh_new, 0.0)
        if lengths is None:
            dh = dh_new
        else:
            dh = tl.where(active, dh_new, dh)
        t += 2 * direction - 1
    if dh0 is not None:
        tl.store(dh0 + h_at, dh.to(dh0.dtype.element_ty), h_real)


@triton.jit(
    do_not_specialize=["step", "rows", "T", "B"],
    do_not_specialize_on_alignment=["offsets", "lengths", "reset"],
)
def rnn_fwd_step_kernel(
    projected,  # float32 [D, rows, H]: x through w_ih, and h0 through w_hh in the first rows
    w_hh,  # as above
    b_ih,
    b_hh,
    w_hh_reverse,
    b_ih_reverse,
    b_hh_reverse,
    offsets,
    lengths,
    reset,
    y,  # [rows, D*H], read and written
    step,  # in the order of each direction
    rows,
    T,
    B,
    H: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """U units of N sequences in one direction, for a step."""
    direction = tl.program_id(2)
    if D == 2:
        if direction == 1:
            w_hh, b_ih, b_hh = w_hh_reverse, b_ih_reverse, b_hh_reverse
    n = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = unit < H
    k = tl.arange(0, K)
    backwards = direction == 1
    length = tl.full([N], T, tl.int32)
    if lengths is not None:
        length = tl.load(lengths + n, n < B, 0)
    t = tl.where(backwards, T - 1 - step, step)
    row = first_row(t, offsets, B)
    active = (n < B) & (t < length)
    total = load_bias(b_ih, b_hh, unit, inside)[:, None]
    x_at = (direction.to(tl.int64) * rows + row + n) * H + unit[:, None]
    total += tl.load(projected + x_at, inside[:, None] & active, 0)
    before = tl.where(backwards, t + 1, t - 1)
    begins = tl.where(backwards, length - 1 - before, before) < 0
    known = active & (begins == 0)
    if reset is not None:
        known = known & (tl.load(reset + t.to(tl.int64) * B + n, active, 0) == 0)
    source = first_row(tl.maximum(tl.minimum(before, T - 1), 0), offsets, B)
    h_tile = y + (source + n) * (D * H) + direction * H + k[:, None]
    w_tile = w_hh + unit[:, None].to(tl.int64) * H + k
    total = multiply_add(
        total, None, w_tile, inside, h_tile, known, 1, H, K, False, STAGES, PRECISION
    )
    at = (row + n) * (D * H) + direction * H + unit[:, None]
    h = _act(total, RELU, FAST).to(y.dtype.element_ty)
    tl.store(y + at, h, inside[:, None] & active)


@triton.jit(
    do_not_specialize=["step", "rows", "T", "B", "dy_t", "dy_b"],
    do_not_specialize_on_alignment=["offsets", "lengths", "reset", "dh_n"],
)
def rnn_bwd_step_kernel(
    w_hh,  # as above
    w_hh_reverse,
    offsets,
    lengths,
    reset,
    y,
    dy,
    dh_n,
    d_total,  # [D, rows, H], read and written
    step,  # in the order of each direction's backward pass
    rows,
    T,
    B,
    dy_t,
    dy_b,
    H: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """U units of N sequences in one direction, for a step from the last to the first."""
    direction = tl.program_id(2)
    if D == 2:
        if direction == 1:
            w_hh = w_hh_reverse
    n = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = unit < H
    k = tl.arange(0, K)
    backwards = direction == 1
    length = tl.full([N], T, tl.int32)
    if lengths is not None:
        length = tl.load(lengths + n, n < B, 0)
    t = tl.where(backwards, step, T - 1 - step)
    row = first_row(t, offsets, B)
    active = (n < B) & (t < length)
    u_active = inside[:, None] & active
    at = (row + n) * (D * H) + direction * H + unit[:, None]
    h = tl.load(y + at, u_active, 0).to(tl.float32)
    d = tl.zeros([UNITS, N], tl.float32)
    if dy is not None:
        stride_at = row if offsets is not None else t.to(tl.int64)
        dy_at = dy + stride_at * dy_t + n * dy_b + direction * H + unit[:, None]
        d += tl.load(dy_at, u_active, 0).to(tl.float32)
    ends = tl.where(backwards, t, length - 1 - t) == 0
    if dh_n is not None:
        state_at = (direction * B + n) * H + unit[:, None]
        d += tl.load(dh_n + state_at, u_active & ends, 0).to(tl.float32)
    # through w_hh from the step after, unless the sequence ends here or is reset there
    after = tl.where(backwards, tl.maximum(t - 1, 0), tl.minimum(t + 1, T - 1))
    follows = active & (ends == 0)
    if reset is not None:
        follows = follows & (tl.load(reset + after.to(tl.int64) * B + n, follows, 0) == 0)
    after_row = direction.to(tl.int64) * rows + first_row(after, offsets, B)
    d_tile = d_total + (after_row + n) * H + k[:, None]
    w_tile = w_hh + k[None, :].to(tl.int64) * H + unit[:, None]
    d = multiply_add(d, None, w_tile, inside, d_tile, follows, H, H, K, False, STAGES, PRECISION)
    d = _act_gradient(d, h, RELU).to(d_total.dtype.element_ty)
    d_at = (direction.to(tl.int64) * rows + row + n) * H + unit[:, None]
    tl.store(d_total + d_at, d, u_active)


def launch_rnn_fwd(
    x: Tensor,
    groups: Sequence[Weights],
    rows: Rows,
    h0: Tensor | None,
    relu: bool,
    y: Tensor,
    h_n: Tensor,
) -> None:
    """Write the outputs of one layer; shapes as in :mod:`fastlstm.ops`."""
    plan = rnn_plan(rnn_shape_of(x, groups, rows.T, rows.B), device_of(x))
    projected = project(x.reshape(-1, x.shape[-1]), groups)
    if rows.padded:
        y.zero_()
    forward, reverse = groups[0], groups[1] if len(groups) == 2 else None
    arguments = _arguments(plan, x, groups, rows, relu) | {
        "projected": projected,
        "b_ih": forward.b_ih,
        "b_hh": forward.b_hh,
        "b_ih_reverse": reverse.b_ih if reverse else None,
        "b_hh_reverse": reverse.b_hh if reverse else None,
        "y": y,
        "FAST": is_fast(x),
    }
    if plan.regime == "sequence":
        launch(
            rnn_fwd_sequence_kernel, _grid(plan, groups, rows), plan, h0=h0, h_n=h_n, **arguments
        )
        return
    for direction, group in enumerate(groups):
        add_start(projected[direction], h0, group, rows, direction)
    for step in range(rows.T):
        launch(
            rnn_fwd_step_kernel,
            _grid(plan, groups, rows),
            plan,
            step=step,
            K=plan.chunk,
            **arguments,
        )
    final_states(h_n, y.view(rows.count, -1), h0, rows)


def launch_rnn_bwd(
    x: Tensor,
    groups: Sequence[Weights],
    rows: Rows,
    h0: Tensor | None,
    relu: bool,
    y: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dx: Tensor | None,
    dh0: Tensor | None,
    dweights: Sequence[Weights] | None,
) -> None:
    """Write the gradients of one layer; shapes as in :mod:`fastlstm.ops`."""
    plan = rnn_plan(rnn_shape_of(x, groups, rows.T, rows.B), device_of(x))
    D, H = len(groups), groups[0].w_hh.shape[0]
    # Padding adds nothing to sums over rows.
    empty = torch.zeros if rows.padded else torch.empty
    d_total = empty(D, rows.count, H, dtype=x.dtype, device=x.device)
    dy_t, dy_b = (0, 0) if dy is None else (dy.stride(0), dy.stride(-2))
    arguments = _arguments(plan, x, groups, rows, relu) | {
        "y": y,
        "dy": dy,
        "dh_n": dh_n,
        "d_total": d_total,
        "dy_t": dy_t,
        "dy_b": dy_b,
    }
    if plan.regime == "sequence":
        launch(rnn_bwd_sequence_kernel, _grid(plan, groups, rows), plan, dh0=dh0, **arguments)
    else:
        for step in range(rows.T):
            launch(
                rnn_bwd_step_kernel, _grid(plan, groups, rows), plan,
                step=step, K=plan.chunk, **arguments,
            )  # fmt: skip
        if dh0 is not None:
            start_gradient(dh0, d_total, groups, rows, dh_n)
    x_rows = x.reshape(-1, x.shape[-1])
    if dx is not None:
        input_gradient(dx.view(x_rows.shape), d_total, groups)
    if dweights is None:
        return
    if rows.padded:  # whatever x holds there must not meet the zeros of d_total
        x_rows = torch.where(rows.real(), x_rows, 0)
    h_before = rows.states_before(y.view(rows.count, D * H), h0, D)
    for target, d, h in zip(dweights, d_total, h_before, strict=True):
        weight_gradients(target, d, x_rows, h)


def _grid(plan: Plan, groups: Sequence[Weights], rows: Rows) -> tuple[int, ...]:
    tiles, D = -(-rows.B // plan.batch), len(groups)
    if plan.regime == "sequence":
        return tiles, D
    return -(-groups[0].w_hh.shape[0] // plan.units), tiles, D


def _arguments(
    plan: Plan, x: Tensor, groups: Sequence[Weights], rows: Rows, relu: bool
) -> dict[str, Any]:
    """What all kernels of this file are told."""
    return {
        "w_hh": groups[0].w_hh,
        "w_hh_reverse": groups[1].w_hh if len(groups) == 2 else None,
        "offsets": rows.offsets,
        "lengths": rows.lengths,
        "reset": rows.reset,
        "rows": rows.count,
        "T": rows.T,
        "B": rows.B,
        "H": groups[0].w_hh.shape[0],
        "D": len(groups),
        "UNITS": plan.units,
        "N": plan.batch,
        "RELU": relu,
        "STAGES": plan.stages,
        "PRECISION": dot_precision(x),
    }
