"""The operators of this backend; their contract is in :mod:`fastlstm.ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.library import impl

from fastlstm.operands import cell_of, gradient_groups, groups
from fastlstm.ops import contiguous, plainly, zero
from fastlstm.reference import Cell, Weights
from fastlstm.rows import Rows, layout

from .backward import launch_lstm_bwd
from .config import Shape, backward_plan, forward_plan, rnn_plan
from .config import obstacle as obstacle_of
from .forward import launch_lstm_fwd
from .launch import INTERPRETED, device_of, kind_of, precision_of, shape_of
from .rnn import launch_rnn_bwd, launch_rnn_fwd

_DISPATCH_KEYS = ["CUDA", "CPU"] if INTERPRETED else ["CUDA"]


@plainly
def lstm_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    c_all: Tensor | None,
    gates: Tensor | None,
    cache: Tensor | None,
    **options: Any,
) -> None:
    """Write the outputs of one layer."""
    cell = cell_of(**options)
    rows = layout(x, batch_sizes, lengths, reset)
    if rows.count == 0:
        return
    found = groups(weights, directions, cell)
    _refuse(x, found, rows, cell)
    launch_lstm_fwd(
        x, found, cell, rows, contiguous(h0), contiguous(c0),
        y, h_n, c_n, c_all, gates,
    )  # fmt: skip


@plainly
def lstm_bwd(
    x: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
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
    dweights: Sequence[Tensor],
    cache: Tensor | None,
    **options: Any,
) -> None:
    """Write the gradients of one layer."""
    cell = cell_of(**options)
    rows = layout(x, batch_sizes, lengths, reset)
    if rows.count == 0:
        zero(dx, dh0, dc0, *dweights)
        return
    found = groups(weights, directions, cell)
    _refuse(x, found, rows, cell)
    launch_lstm_bwd(
        x, found, cell, rows, contiguous(h0), contiguous(c0), y, c_all, gates,
        dy, contiguous(dh_n), contiguous(dc_n), dc_all,
        dx, dh0, dc0, gradient_groups(dweights, found),
    )  # fmt: skip


@plainly
def rnn_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    relu: bool,
    y: Tensor,
    h_n: Tensor,
    cache: Tensor | None,
) -> None:
    """Write the outputs of one layer of nn.RNN."""
    rows = layout(x, batch_sizes, lengths, reset)
    if rows.count > 0:
        launch_rnn_fwd(x, groups(weights, directions), rows, contiguous(h0), relu, y, h_n)


@plainly
def rnn_bwd(
    x: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    relu: bool,
    y: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dx: Tensor | None,
    dh0: Tensor | None,
    dweights: Sequence[Tensor],
    cache: Tensor | None,
) -> None:
    """Write the gradients of one layer of nn.RNN."""
    rows = layout(x, batch_sizes, lengths, reset)
    if rows.count == 0:
        zero(dx, dh0, *dweights)
        return
    found = groups(weights, directions)
    launch_rnn_bwd(
        x, found, rows, contiguous(h0), relu, y, dy, contiguous(dh_n),
        dx, dh0, gradient_groups(dweights, found),
    )  # fmt: skip


def describe(x: Tensor, T: int, B: int, I: int, H: int, P: int, D: int, cell: Cell | None) -> str:
    """How a layer of these sizes, of nn.RNN without a cell, would run on the device of x."""
    sizes = T, B, I, H, P, D, x.element_size(), precision_of(x)
    device = device_of(x)
    if cell is None:
        plan = rnn_plan(Shape(*sizes), device)
        return f"forward and backward {plan.described(gates=1)} ({plan.reason})"
    shape = Shape(*sizes, kind_of(cell))
    forward, backward = forward_plan(shape, device), backward_plan(shape, device)
    return f"forward {forward} ({forward.reason}); backward {backward}"


def obstacle(T: int, B: int, I: int, H: int, P: int, D: int, x: Tensor, cell: Cell) -> str | None:
    """Why these kernels cannot compute a layer of these sizes on the device of x; None if so."""
    shape = Shape(T, B, I, H, P, D, x.element_size(), precision_of(x), kind_of(cell))
    return obstacle_of(shape, device_of(x), cell)


def _refuse(x: Tensor, found: Sequence[Weights], rows: Rows, cell: Cell) -> None:
    if cell.is_plain:
        return
    error = obstacle_of(shape_of(x, found, rows.T, rows.B, cell), device_of(x), cell)
    if error:
        raise ValueError(f"the triton kernels cannot compute this layer: {error}")


for _function in (lstm_fwd, lstm_bwd, rnn_fwd, rnn_bwd):
    for _key in _DISPATCH_KEYS:
        impl(f"fastlstm::{_function.__name__}_triton", _key, _function)
