"""nn.RNN, forward: a whole sequence in one program, or a launch for every step."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlstm.kernels.products import input_products
from fastlstm.spec import Outputs

from .call import Call, weight_arguments
from .config import rnn_plan
from .ends import add_start, final_states
from .launch import is_fast, launch
from .primitives import first_row, load_bias, operand, product
from .rnn import act, rnn_arguments, rnn_grid

__all__ = ["launch_rnn_fwd"]


@triton.jit(
    do_not_specialize=["rows", "T", "B"],
    do_not_specialize_on_alignment=["h0", "offsets", "lengths", "reset"],
)
def rnn_fwd_sequence_kernel(
    products,  # float32 [D, rows, H]: input products
    w_hh,  # [H, H], direction 0
    b_ih,  # [H] or None
    b_hh,  # [H] or None
    w_hh_reverse,  # [H, H], direction 1; None if there is none
    b_ih_reverse,  # [H] or None
    b_hh_reverse,  # [H] or None
    h0,  # [D, B, H] or None
    offsets,  # int64 [T], the first row of each step of packed rows; None for [T, B]
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    y,  # [rows, D*H], written
    h_n,  # [D, B, H], written
    rows,  # how many rows there are, padding included
    T,
    B,
    H: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # H, rounded up to a power of two
    N: tl.constexpr,  # sequences of a program
    RELU: tl.constexpr,  # whether act is max(x, 0), and not tanh
    STAGES: tl.constexpr,  # of the pipeline that loads
    PRECISION: tl.constexpr,  # of products, "tf32" or "ieee"
    FAST: tl.constexpr,  # whether tanh is approximate
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
    x_tile = products + direction.to(tl.int64) * rows * H + unit[:, None] + n * H
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
        h_new = act(total, RELU, FAST).to(dtype)
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
    do_not_specialize=["step", "rows", "T", "B"],
    do_not_specialize_on_alignment=["offsets", "lengths", "reset"],
)
def rnn_fwd_step_kernel(
    products,  # float32 [D, rows, H]: input products, and h0 through w_hh in the first rows
    w_hh,  # [H, H], direction 0
    b_ih,  # [H] or None
    b_hh,  # [H] or None
    w_hh_reverse,  # [H, H], direction 1; None if there is none
    b_ih_reverse,  # [H] or None
    b_hh_reverse,  # [H] or None
    offsets,  # int64 [T], the first row of each step of packed rows; None for [T, B]
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    y,  # [rows, D*H], read and written
    step,  # its number in the order of each direction
    rows,  # how many rows there are, padding included
    T,
    B,
    H: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,  # units of a program
    N: tl.constexpr,  # sequences of a program
    K: tl.constexpr,  # terms of a product at a time
    RELU: tl.constexpr,  # whether act is max(x, 0), and not tanh
    STAGES: tl.constexpr,  # of the pipeline that loads
    PRECISION: tl.constexpr,  # of products, "tf32" or "ieee"
    FAST: tl.constexpr,  # whether tanh is approximate
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
    total += tl.load(products + x_at, inside[:, None] & active, 0)
    before = tl.where(backwards, t + 1, t - 1)
    begins = tl.where(backwards, length - 1 - before, before) < 0
    known = active & (begins == 0)
    if reset is not None:
        known = known & (tl.load(reset + t.to(tl.int64) * B + n, active, 0) == 0)
    source = first_row(tl.maximum(tl.minimum(before, T - 1), 0), offsets, B)
    h_tile = y + (source + n) * (D * H) + direction * H + k[:, None]
    w_tile = w_hh + unit[:, None].to(tl.int64) * H + k
    total += product(w_tile, inside, h_tile, known, 1, H, K, STAGES, PRECISION)
    at = (row + n) * (D * H) + direction * H + unit[:, None]
    h = act(total, RELU, FAST).to(y.dtype.element_ty)
    tl.store(y + at, h, inside[:, None] & active)


def launch_rnn_fwd(call: Call, outputs: Outputs) -> None:
    """Write the outputs y and h_n of one layer of nn.RNN."""
    plan = rnn_plan(call.problem, call.device)
    rows, h0, y = call.rows, call.state.h, outputs.y
    products = input_products(call.x_rows(), call.weights)
    if rows.padded:
        y.zero_()
    grid = rnn_grid(call, plan)
    arguments = {
        **rnn_arguments(call, plan),
        **weight_arguments(call.weights, "b_ih", "b_hh"),
        "products": products,
        "y": y,
        "FAST": is_fast(call.x),
    }
    if plan.regime == "sequence":
        launch(rnn_fwd_sequence_kernel, grid, plan, **arguments, h0=h0, h_n=outputs.h_n)
        return
    for direction, weights in enumerate(call.weights):
        add_start(products[direction], h0, weights, rows, direction)
    for step in range(rows.T):
        launch(rnn_fwd_step_kernel, grid, plan, **arguments, step=step, K=plan.chunk)
    final_states(outputs.h_n, y.view(rows.count, -1), h0, rows)
