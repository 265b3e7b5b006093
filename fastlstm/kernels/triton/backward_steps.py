"""Backward, with the units of a layer spread over many programs.

The mirror of :mod:`fastlstm.kernels.forward_steps`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlstm.operands import product
from fastlstm.reference import Cell, Weights
from fastlstm.rows import Rows

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
from .config import Plan
from .launch import dot_precision, is_fast, launch
from .primitives import (
    activate,
    arrive,
    first_row,
    load_bias,
    multiply_add,
    split_gates,
    stack_gates,
    stacked_rows,
    wait_for,
)


@triton.jit
def _add_to(at, value, mask):
    tl.store(at, tl.load(at, mask, 0) + value, mask)


@triton.jit(
    do_not_specialize=[
        "begin",
        "end",
        "rows",
        "T",
        "B",
        "dy_t",
        "dy_b",
        "dc_t",
        "dc_b",
        "zoneout_c",
        "zoneout_h",
    ],
    do_not_specialize_on_alignment=[
        *("c0", "offsets", "lengths", "reset", "dc_all", "dh_n", "h_mask", "seed"),
    ],
)
def lstm_bwd_step_kernel(
    gates,  # [D, rows, 4H]: with ACTIVATED after activation, else before it and without biases
    w_hh,  # [4H, H], direction 0
    b_ih,  # [4H]; None without biases and with ACTIVATED
    b_hh,
    w_hh_reverse,  # the same of direction 1; None if there is none
    b_ih_reverse,
    b_hh_reverse,
    c0,  # [D, B, H] or None
    c_all,  # float32 [rows, D*H]
    offsets,  # int64 [T] or None, as above
    lengths,  # int64 [B] or None
    reset,  # uint8 [T, B] or None
    dy,  # [rows, D*H] of strides dy_t, dy_b, or None
    dc_all,  # [rows, D*H] of strides dc_t, dc_b, or None
    dh_n,  # [D, B, H] or None
    dgates,  # [D, rows, 4H], written and read
    hidden,  # [rows, D*H], written unless RECURRENT: what w_hr was applied to; else None
    dc,  # float32 [D, B, H], read and written: gradients of the cells between launches
    dw_ch,  # float32 [D, B, 3H] or None, read and written: of each sequence so far
    dh_kept,  # float32 [D, B, H], read and written with zoneout_h: what goes past the product
    h_mask,  # these as in forward
    w_ch,
    seed,
    zoneout_c,
    zoneout_h,
    arrived,  # int32 [D, tiles of N], zero: programs that have written their part of a step
    begin,  # the steps [begin, end) in the order of each direction's backward pass
    end,
    rows,
    T,
    B,
    dy_t,  # elements from a step to the next; with offsets from a row to the next
    dy_b,  # and from a sequence to the next
    dc_t,
    dc_b,
    H: tl.constexpr,
    D: tl.constexpr,
    UNITS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    RECURRENT: tl.constexpr,
    ACTIVATED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):
    """U units of N sequences in one direction, for some steps from the last to the first.

    Of a layer with a w_hr it takes one step without the product (not RECURRENT): then dy holds
    all there is of the gradient of h before w_hr, and there is no dh_n.

    What a step needs of the step after it are all 4H gradients of the gates. They are exchanged
    as h is in ``lstm_fwd_step_kernel``.
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

    peep_i, peep_f, peep_o = load_peepholes(w_ch, direction, unit, H)
    base = zoneout_base(seed, direction)
    units_h = zoneout_units(base, unit, 0)
    units_c = zoneout_units(base, unit, 1)
    u_real = u_inside[:, None] & real
    state_at = (direction * B + n) * H + unit[:, None]
    d_cell = tl.load(dc + state_at, u_real, 0)
    length = tl.full([N], T, tl.int32)
    steps = T
    if lengths is not None:
        length = tl.load(lengths + n, real, 0)
        steps = tl.max(length, 0).to(tl.int32)
    if PERSISTENT:
        end = tl.minimum(end, steps)
        counter = arrived + direction * tl.num_programs(1) + tl.program_id(1)
    backwards = direction == 1

    for s in range(begin, end):
        # A launch of one step serves rows of all lengths: those of T count from the end of T.
        last = (steps if PERSISTENT else T) - 1
        t = tl.where(backwards, s, last - s)
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
            if PERSISTENT:
                wait_for(counter, s * tl.num_programs(0))
            total = dh
            if h_mask is not None:
                total = tl.zeros([UNITS, N], tl.float32)
            total = multiply_add(
                total, None, w_tile, u_inside, d_tile, follows,
                H, 4 * H, K, False, STAGES, PRECISION,
            )  # fmt: skip
            if h_mask is None:
                dh = total
            else:
                dh += total * tl.load(h_mask + state_at, u_real, 0)

        if not ACTIVATED:
            if w_ch is None:
                stacked = activate(stacked + bias, is_cell, FAST)
            else:
                i, f, g, o, _ = gates_and_cell(
                    stacked + bias, is_cell, peep_i, peep_f, peep_o, c_before, UNITS, N, FAST
                )
                stacked = stack_gates(i, f, g, o, UNITS, N)
        i, f, g, o = split_gates(stacked, UNITS, N)
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
        if PERSISTENT:
            arrive(counter)
        if reset is not None:
            d_before = tl.where(keep, d_before, 0.0)
        d_cell = tl.where(active, d_before, d_cell)
    tl.store(dc + state_at, d_cell, u_real)


def launch_lstm_bwd_steps(
    plan: Plan,
    x: Tensor,
    groups: Sequence[Weights],
    cell: Cell,
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
    dw_ch: Tensor | None,
) -> None:
    """Write the gradients of gates, h0, c0 and peepholes; padding of dgates is left as it is."""
    D, B, H = len(groups), rows.B, groups[0].w_hh.shape[0] // 4
    forward, reverse = groups[0], groups[-1] if D == 2 else None
    dc = torch.zeros(D, B, H, dtype=torch.float32, device=x.device)
    if dc_n is not None:
        dc.copy_(dc_n)
    if dw_ch is not None:
        dw_ch.zero_()
    dh_kept = torch.zeros_like(dc) if cell.zoneout[1] else None
    through = None
    if dprojected is not None:
        through = _ThroughProjection(groups, cell, rows, dy, dh_n, dgates, dprojected)
    d_hidden = dy if through is None else through.d_hidden
    dy_t, dy_b = (0, 0) if d_hidden is None else (d_hidden.stride(0), d_hidden.stride(-2))
    dc_t, dc_b = (0, 0) if dc_all is None else (dc_all.stride(0), dc_all.stride(-2))
    tiles = -(-B // plan.batch)
    persistent = plan.regime == "persistent"
    arrived = torch.zeros(D, tiles, dtype=torch.int32, device=x.device) if persistent else None
    arguments = cell_arguments(cell, groups)
    if through is not None:
        arguments = arguments | {"h_mask": None}  # the product with w_hh is not in the kernel
    for begin in (0,) if persistent else range(rows.T):
        if through is not None:
            through.step(begin)
        launch(
            lstm_bwd_step_kernel,
            (-(-H // plan.units), tiles, D),
            plan,
            gates=gates,
            w_hh=forward.w_hh,
            b_ih=None if activated else forward.b_ih,
            b_hh=None if activated else forward.b_hh,
            w_hh_reverse=reverse.w_hh if reverse else None,
            b_ih_reverse=reverse.b_ih if reverse and not activated else None,
            b_hh_reverse=reverse.b_hh if reverse and not activated else None,
            c0=c0,
            c_all=c_all,
            offsets=rows.offsets,
            lengths=rows.lengths,
            reset=rows.reset,
            dy=d_hidden,
            dc_all=dc_all,
            dh_n=dh_n if through is None else None,
            dgates=dgates,
            hidden=hidden,
            dc=dc,
            dw_ch=dw_ch,
            dh_kept=dh_kept,
            **arguments,
            arrived=arrived,
            begin=begin,
            end=rows.T if persistent else begin + 1,
            rows=rows.count,
            T=rows.T,
            B=B,
            dy_t=dy_t,
            dy_b=dy_b,
            dc_t=dc_t,
            dc_b=dc_b,
            H=H,
            D=D,
            UNITS=plan.units,
            N=plan.batch,
            K=plan.chunk,
            PERSISTENT=persistent,
            RECURRENT=through is None,
            ACTIVATED=activated,
            STAGES=plan.stages,
            PRECISION=dot_precision(x),
            FAST=is_fast(x),
        )
    if dc0 is not None:
        dc0.copy_(dc)
    if dh0 is not None:
        start_gradient(dh0, dgates, groups, rows, dh_n, cell.h_mask, dh_kept)


def start_gradient(
    dh0: Tensor,
    dgates: Tensor,
    groups: Sequence[Weights],
    rows: Rows,
    dh_n: Tensor | None,
    h_mask: Tensor | None = None,
    dh_kept: Tensor | None = None,
) -> None:
    """Write dh0 [D, B, P] from the gradients [D, rows, n] of what h through w_hh was added to."""
    for direction, group in enumerate(groups):
        first = rows.first(direction)
        start = product(dgates[direction].index_select(0, first), group.w_hh)
        if h_mask is not None:
            start *= h_mask[direction]
        if dh_kept is not None:
            start += dh_kept[direction]
        if rows.reset is not None:
            start.masked_fill_(rows.reset.view(-1)[first].bool()[:, None], 0)
        if rows.padded:
            end = 0 if dh_n is None else dh_n[direction]
            start = torch.where(rows.empty(), end, start)
        dh0[direction] = start


class _ThroughProjection:
    """The product with w_hr, which lies between the steps: from the gradient of y, and of the
    gates of the step after, to that of what w_hr is applied to."""

    def __init__(
        self,
        groups: Sequence[Weights],
        cell: Cell,
        rows: Rows,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dgates: Tensor,
        dprojected: Tensor,
    ) -> None:
        self.groups, self.rows, self.dgates, self.dprojected = groups, rows, dgates, dprojected
        self.h_mask = cell.h_mask
        D, H, P = len(groups), groups[0].w_hh.shape[0] // 4, groups[0].w_hh.shape[1]
        total = torch.zeros(rows.count, D * P, dtype=torch.float32, device=dgates.device)
        if dy is not None:
            dy = dy.reshape(rows.count, D * P)
            # Whatever comes in for padding must not meet the zeros of what w_hr is applied to.
            total += torch.where(rows.real(), dy, 0) if rows.padded else dy
        self.total = [total[:, d * P : (d + 1) * P] for d in range(D)]
        if dh_n is not None:
            for d, part in enumerate(self.total):
                last = rows.first(1 - d)
                end = torch.where(rows.empty(), 0, dh_n[d]) if rows.padded else dh_n[d]
                part.index_copy_(0, last, part.index_select(0, last) + end)
        flat = torch.zeros(rows.count, D * H, dtype=torch.float32, device=dgates.device)
        self._parts = [flat[:, d * H : (d + 1) * H] for d in range(D)]
        packed = rows.sizes is not None
        self.d_hidden = flat if packed else flat.view(rows.T, rows.B, D * H)
        self._steps = rows.steps()

    def step(self, begin: int) -> None:
        """Take the step that the launch after it computes, in every direction."""
        for d, group in enumerate(self.groups):
            assert group.w_hr is not None
            t = self.rows.T - 1 - begin if d == 0 else begin
            at, total = self._steps[t], self.total[d]
            if begin > 0:
                after = t + 1 if d == 0 else t - 1
                # Rows of sequences that end here are not in the step after, or padding of zeros.
                count = min(at.stop - at.start, self._steps[after].stop - self._steps[after].start)
                after_at = slice(self._steps[after].start, self._steps[after].start + count)
                through = product(self.dgates[d][after_at], group.w_hh)
                if self.h_mask is not None:
                    through *= self.h_mask[d, :count]
                if self.rows.reset is not None:
                    through.masked_fill_(self.rows.reset[after].bool()[:, None], 0)
                total[at.start : at.start + count] += through
            P = total.shape[1]
            dprojected = self.dprojected[at, d * P : (d + 1) * P]
            dprojected.copy_(total[at])
            self._parts[d][at] = product(dprojected, group.w_hr)
