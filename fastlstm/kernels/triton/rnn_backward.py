"""nn.RNN, backward: the mirror of ``rnn_forward.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlstm.kernels.products import input_gradient, weight_gradients
from fastlstm.spec import Gradients, Incoming, Saved

from .call import Call, strides_of
from .config import rnn_plan
from .ends import start_gradient
from .launch import launch
from .primitives import first_row, operand, product
from .rnn import act_gradient, rnn_arguments, rnn_grid

__all__ = ["launch_rnn_bwd"]


@triton.jit(
    do_not_specialize=["rows", "T", "B", "dy_t", "dy_b"],
    do_not_specialize_on_alignment=["offsets", "lengths", "reset", "dh_n"],
)
def rnn_bwd_sequence_kernel(
    w_hh,  # [H, H], direction 0
    w_hh_reverse,  # [H, H], direction 1; None if there is none
    offsets,  # int64 [T], the first row of each step of packed rows; None for [T, B]
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    y,  # [rows, D*H]
    dy,  # [rows, D*H] of strides dy_t, dy_b, or None
    dh_n,  # [D, B, H] or None
    d_total,  # [D, rows, H], written: gradients of what act was applied to
    dh0,  # [D, B, H] or None, written
    rows,  # how many rows there are, padding included
    T,
    B,
    dy_t,  # elements of dy from a step to the next; with offsets from a row to the next
    dy_b,  # elements of dy from a sequence to the next
    H: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # H, rounded up to a power of two
    N: tl.constexpr,  # sequences of a program
    RELU: tl.constexpr,  # whether act is max(x, 0), and not tanh
    STAGES: tl.constexpr,  # of the pipeline that loads
    PRECISION: tl.constexpr,  # of products, "tf32" or "ieee"
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
        d = act_gradient(d, h, RELU).to(dtype)
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
    do_not_specialize=["step", "rows", "T", "B", "dy_t", "dy_b"],
    do_not_specialize_on_alignment=["offsets", "lengths", "reset", "dh_n"],
)
def rnn_bwd_step_kernel(
    w_hh,  # [H, H], direction 0
    w_hh_reverse,  # [H, H], direction 1; None if there is none
    offsets,  # int64 [T], the first row of each step of packed rows; None for [T, B]
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    y,  # [rows, D*H]
    dy,  # [rows, D*H] of strides dy_t, dy_b, or None
    dh_n,  # [D, B, H] or None
    d_total,  # [D, rows, H], read and written: gradients of what act was applied to
    step,  # its number in the order of each direction's backward pass
    rows,  # how many rows there are, padding included
    T,
    B,
    dy_t,  # elements of dy from a step to the next; with offsets from a row to the next
    dy_b,  # elements of dy from a sequence to the next
    H: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # units of a program
    N: tl.constexpr,  # sequences of a program
    K: tl.constexpr,  # terms of a product at a time
    RELU: tl.constexpr,  # whether act is max(x, 0), and not tanh
    STAGES: tl.constexpr,  # of the pipeline that loads
    PRECISION: tl.constexpr,  # of products, "tf32" or "ieee"
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
    d += product(w_tile, inside, d_tile, follows, H, H, K, STAGES, PRECISION)
    d = act_gradient(d, h, RELU).to(d_total.dtype.element_ty)
    d_at = (direction.to(tl.int64) * rows + row + n) * H + unit[:, None]
    tl.store(d_total + d_at, d, u_active)


def launch_rnn_bwd(call: Call, saved: Saved, incoming: Incoming, gradients: Gradients) -> None:
    """Write the gradients of one layer of nn.RNN."""
    plan = rnn_plan(call.problem, call.device)
    spec, rows, weights, x = call.spec, call.rows, call.weights, call.x
    D, H = spec.directions, spec.hidden_size
    # Padding adds nothing to sums over rows.
    empty = torch.zeros if rows.padded else torch.empty
    d_total = empty(D, rows.count, H, dtype=x.dtype, device=x.device)
    dy_t, dy_b = strides_of(incoming.dy)
    grid = rnn_grid(call, plan)
    arguments = {
        **rnn_arguments(call, plan),
        "y": saved.y,
        "dy": incoming.dy,
        "dh_n": incoming.dh_n,
        "d_total": d_total,
        "dy_t": dy_t,
        "dy_b": dy_b,
    }
    if plan.regime == "sequence":
        launch(rnn_bwd_sequence_kernel, grid, plan, **arguments, dh0=gradients.dh0)
    else:
        for step in range(rows.T):
            launch(rnn_bwd_step_kernel, grid, plan, **arguments, step=step, K=plan.chunk)
        if gradients.dh0 is not None:
            start_gradient(gradients.dh0, d_total, weights, rows, incoming.dh_n)
    x_rows = call.x_rows()
    if gradients.dx is not None:
        input_gradient(gradients.dx.view(x_rows.shape), d_total, weights)
    if gradients.weights is None:
        return
    if rows.padded:  # whatever x holds there must not meet the zeros of d_total
        x_rows = torch.where(rows.real(), x_rows, 0)
    h_before = rows.states_before(saved.y.view(rows.count, D * H), call.state.h, D)
    for target, d, h in zip(gradients.weights, d_total, h_before, strict=True):
        weight_gradients(target, d, x_rows, h)
