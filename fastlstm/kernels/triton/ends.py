"""The first and the last states of sequences, where kernels of one step cannot reach them.

These are few rows, which PyTorch's own operations pick out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlstm.kernels.products import product
from fastlstm.kernels.rows import Rows
from fastlstm.spec import Weights

__all__ = ["add_start", "final_states", "start_gradient"]


def add_start(
    products: Tensor, h0: Tensor | None, weights: Weights, rows: Rows, direction: int
) -> None:
    """Add h0 through w_hh to the row where each sequence begins, unless it is reset.

    Args:
        products: float32 [rows, n], the input products of a direction, written.
        h0: [D, B, P], or None for zeros.
        weights: those of the direction.
        rows: where sequences begin.
        direction: 0 or 1.
    """
    if h0 is None:
        return
    first = rows.first(direction)
    start = product(h0[direction], weights.w_hh.T)
    if rows.reset is not None:
        start.masked_fill_(rows.reset.view(-1)[first].bool()[:, None], 0)
    products.index_copy_(0, first, products.index_select(0, first) + start)


def final_states(h_n: Tensor, y: Tensor, h0: Tensor | None, rows: Rows) -> None:
    """Write h_n [D, B, P] from y [rows, D*P] and, for sequences without steps, h0 [D, B, P]."""
    for direction, states in enumerate(y.chunk(len(h_n), 1)):
        h_n[direction] = states.index_select(0, rows.first(1 - direction))
        if rows.padded:
            start = 0 if h0 is None else h0[direction]
            h_n[direction] = torch.where(rows.empty(), start, h_n[direction])


def start_gradient(
    dh0: Tensor,
    dgates: Tensor,
    weights: Sequence[Weights],
    rows: Rows,
    dh_n: Tensor | None,
    h_mask: Tensor | None = None,
    dh_kept: Tensor | None = None,
) -> None:
    """Write dh0 [D, B, P].

    Args:
        dh0: written.
        dgates: [D, rows, n], the gradients of what h through w_hh was added to.
        weights: one entry for each direction.
        rows: where sequences begin.
        dh_n: [D, B, P] or None, which sequences without steps pass on.
        h_mask: [D, B, P] or None, the factors of h on its way into w_hh.
        dh_kept: [D, B, P] or None, what went past w_hh at the first step.
    """
    for direction, each in enumerate(weights):
        first = rows.first(direction)
        start = product(dgates[direction].index_select(0, first), each.w_hh)
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
