"""The operators of the CUDA C++ backend: importing this file registers their kernels.

The compiled library (csrc/cuda) has the recurrence, one launch for all steps of both directions;
the products before and after it are PyTorch's. :mod:`fastlstm.kernels.operators` has the contract
of the operators.

With ``FASTLSTM_EMULATE=1`` the same kernels, compiled for the host, run on CPU tensors, to check
them: slowly, and float32 without rounding to TF32 unless :func:`.plan.override` asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.kernels.operators import add_kernel, contiguous, plainly, read_cell_options, zero
from fastlstm.kernels.products import (
    gates_again,
    gradient_groups,
    groups_then,
    input_gradient,
    input_products,
    weight_gradients,
    weight_groups,
)
from fastlstm.kernels.rows import Rows, layout
from fastlstm.spec import LayerSpec, Sequences, Weights

from . import lacks, library, plan

__all__ = ["lstm_bwd", "lstm_fwd"]


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
    rows = layout(x, Sequences(batch_sizes, lengths, reset))
    if rows.count == 0:
        return
    spec, _ = read_cell_options(weights, directions, **options)
    _refuse(spec, x)
    D, H, groups = directions, spec.hidden_size, weight_groups(weights, spec)
    if rows.padded:
        zero(y, c_all)
    library.lstm_recur_fwd(
        input_products(x.reshape(-1, x.shape[-1]), groups),
        [group.w_hh for group in groups],
        _biases(groups),
        contiguous(h0),
        contiguous(c0),
        rows.offsets,
        contiguous(rows.lengths),
        rows.reset,
        rows.T,
        rows.B,
        y.view(rows.count, D * H),
        h_n,
        c_n,
        None if c_all is None else c_all.view(rows.count, D * H),
        None if gates is None else gates.view(D, rows.count, 4 * H),
        *_launch(spec, x, rows, backward=False),
    )


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
    rows = layout(x, Sequences(batch_sizes, lengths, reset))
    if rows.count == 0:
        zero(dx, dh0, dc0, *dweights)
        return
    spec, _ = read_cell_options(weights, directions, **options)
    _refuse(spec, x)
    D, H, groups = directions, spec.hidden_size, weight_groups(weights, spec)
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.view(rows.count, D * H)
    targets = gradient_groups(dweights, groups)
    if rows.padded and (targets or gates is None):
        # Whatever x holds there must not meet the zeros of dgates.
        x_rows = torch.where(rows.real(), x_rows, 0)
    h_before = rows.states_before(y_rows, h0, D) if targets or gates is None else []
    if gates is None:
        gates = _gates(x_rows, groups_then(cache, groups, spec), h_before)
    # Padding adds nothing to sums over rows.
    empty = torch.zeros if rows.padded else torch.empty
    dgates = empty(D, rows.count, 4 * H, dtype=x.dtype, device=x.device)
    library.lstm_recur_bwd(
        y_rows,
        [group.w_hh for group in groups],
        rows.offsets,
        contiguous(rows.lengths),
        rows.reset,
        rows.T,
        rows.B,
        gates.view(D, rows.count, 4 * H),
        c_all.view(rows.count, D * H),
        None if c0 is None else c0.float().contiguous(),
        dy,
        contiguous(dh_n),
        contiguous(dc_n),
        dc_all,
        dgates,
        dh0,
        dc0,
        *_launch(spec, x, rows, backward=True),
    )
    if dx is not None:
        input_gradient(dx.view(x_rows.shape), dgates, groups)
    for target, d, h in zip(targets or (), dgates, h_before, strict=False):
        weight_gradients(target, d, x_rows, h)


def _refuse(spec: LayerSpec, x: Tensor) -> None:
    """Raise ValueError for a layer that the kernels cannot compute."""
    error = lacks(spec) or plan.obstacle(spec, x)
    if error:
        raise ValueError(f"the cuda kernels cannot compute this layer: {error}")


def _launch(spec: LayerSpec, x: Tensor, rows: Rows, *, backward: bool) -> tuple[Any, ...]:
    """Return what the recurrence takes besides the layer's numbers: see ``_LAUNCH`` there."""
    kind = plan.kind_of(x)
    chosen = plan.plan_of(kind, backward, rows.B, spec, plan.device_of(x))
    words = torch.empty(0, dtype=torch.int32, device=x.device)
    exchange = arrived = rest = None
    if chosen.exchange_words:
        exchange = words.new_empty(chosen.exchange_words)
        arrived = words.new_zeros(spec.directions * -(-rows.B // chosen.batch))
    if chosen.rest_words:
        rest = words.new_empty(chosen.rest_words)
    index = x.device.index if x.is_cuda else 0
    stream = torch._C._cuda_getCurrentRawStream(index) if x.is_cuda else 0
    return exchange, arrived, rest, chosen.numbers, kind == "tf32", index, stream


def _biases(groups: Sequence[Weights]) -> list[Tensor]:
    return [b for group in groups for b in (group.b_ih, group.b_hh) if b is not None]


def _gates(x: Tensor, groups: Sequence[Weights], h_before: Sequence[Tensor]) -> Tensor:
    """Return the gates after activation as the forward kernel keeps them: [D, rows, H, 4]."""
    gates = gates_again(x, groups, h_before)
    for target, group in zip(gates, groups, strict=True):
        if group.b_ih is not None and group.b_hh is not None:
            target += group.b_ih.float() + group.b_hh.float()
    i, f, g, o = gates.chunk(4, -1)
    return torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], -1).to(x.dtype)


for _function in (lstm_fwd, lstm_bwd):
    add_kernel(
        f"fastlstm::{_function.__name__}_cuda", _function, "CPU" if plan.EMULATED else "CUDA"
    )
