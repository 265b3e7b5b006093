"""Backward: what comes before and after the kernels, and the choice between them.

The kernels turn the gradients of the outputs into those of the gates before activation, of all
steps. The gradients of weights, biases and input are single products and sums of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlstm.kernels.products import (
    Normalised,
    gates_again,
    input_gradient,
    input_products,
    product_into,
    products,
    weight_gradients,
)
from fastlstm.spec import Gradients, Incoming, Saved, Weights

from .backward_sequence import launch_lstm_bwd_sequence
from .backward_steps import launch_lstm_bwd_steps
from .buffers import Kept, StepGradients
from .call import Call
from .config import backward_plan

__all__ = ["launch_lstm_bwd"]


class _Before(NamedTuple):
    """What is computed again of the forward pass."""

    x: Tensor  # [rows, I]; zeros in padding where that could reach a sum
    h: list[Tensor]  # of each direction [rows, P], before each step and masked; or nothing
    x_side: Normalised | None  # the normalised products of x and of h
    h_side: Normalised | None


def launch_lstm_bwd(
    call: Call,
    then: Sequence[Weights],
    saved: Saved,
    incoming: Incoming,
    gradients: Gradients,
) -> None:
    """Write the gradients of one layer of an LSTM; `then`: the weights of the forward pass."""
    plan = backward_plan(call.problem, call.device)
    if plan.regime == "registers":
        from .backward_registers import launch_lstm_bwd_registers  # an older Triton has no Gluon

        launch_lstm_bwd_registers(call, plan, then, saved, incoming, gradients)
        return
    if plan.regime == "cluster":
        from .backward_cluster import launch_lstm_bwd_cluster

        launch_lstm_bwd_cluster(call, plan, then, saved, incoming, gradients)
        return
    gates = None if plan.regime == "sequence" else saved.gates
    before = _before(call, then, saved.y, gates is None, gradients.weights is not None)
    assert saved.c_all is not None
    factors = None if before.h_side is None else before.h_side.factor
    again = _gates(then, before) if gates is None else gates
    kept = Kept(saved.c_all, again, then, gates is not None, factors)
    steps = StepGradients.empty(call, weights=gradients.weights is not None)
    if plan.regime == "sequence":
        launch_lstm_bwd_sequence(call, plan, kept, incoming, steps, gradients)
    else:
        launch_lstm_bwd_steps(call, plan, kept, incoming, steps, gradients)
    through_x, through_h = _through_norms(call.weights, before, steps.dgates)
    if gradients.dx is not None:
        input_gradient(gradients.dx.view(before.x.shape), through_x, call.weights)
    for d, target in enumerate(gradients.weights or ()):
        h = before.h[d]
        weight_gradients(target, steps.dgates[d], before.x, h, through_x[d], through_h[d])
        _cell_weight_gradients(target, d, before, steps)


def _before(call: Call, then: Sequence[Weights], y: Tensor, gates: bool, weights: bool) -> _Before:
    """Compute what is needed again; `gates`, `weights`: whether gates or dweights will be."""
    spec, rows, x = call.spec, call.rows, call.x_rows()
    if rows.padded and (weights or spec.layer_norm):
        # Whatever x holds there must not meet the zeros of dgates.
        x = torch.where(rows.real(), x, 0)
    h: list[Tensor] = []
    if gates or weights:
        h = rows.states_before(y.view(rows.count, -1), call.state.h, spec.directions)
    if call.noise.h_mask is not None:
        for states, mask in zip(h, call.noise.h_mask, strict=False):
            states *= rows.of_sequences(mask)
    if not spec.layer_norm:
        return _Before(x, h, None, None)
    x_side = Normalised.of(input_products(x, then))
    h_side = Normalised.of(products(h, [each.w_hh for each in then]))
    return _Before(x, h, x_side, h_side)


def _gates(then: Sequence[Weights], before: _Before) -> Tensor:
    """Return the gates of all steps before activation, float32 [D, rows, 4H].

    Where products are normalised, the normalised products of h follow: [D, rows, 8H].
    """
    if before.x_side is None or before.h_side is None:
        return gates_again(before.x, then, before.h)
    both = torch.cat([before.x_side.values, before.h_side.values], -1)
    for part, weights in zip(both, then, strict=True):
        gates, normalised = part.chunk(2, -1)
        gates.mul_(weights.ln_ih).addcmul_(normalised, weights.ln_hh)
    return both


def _through_norms(
    weights: Sequence[Weights], before: _Before, dgates: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients [D, rows, 4H] of the products of x and of h, from those of gates."""
    if before.x_side is None or before.h_side is None:
        return dgates, dgates
    through_x = _through(before.x_side, dgates, [each.ln_ih for each in weights])
    through_h = _through(before.h_side, dgates, [each.ln_hh for each in weights])
    for d_products, h in zip(through_h, before.h, strict=True):
        # Zeros are normalised with a factor of 316: float16 overflows, and 0 * inf is NaN.
        d_products.masked_fill_((h == 0).all(-1, keepdim=True), 0)
    return through_x, through_h


def _through(side: Normalised, dgates: Tensor, gains: Sequence[Tensor | None]) -> Tensor:
    """Return the gradients of products, from those of the gates that they are normalised for."""
    gain = torch.stack([g for g in gains if g is not None])[:, None].float()
    return side.gradient(dgates * gain).to(dgates.dtype)


def _cell_weight_gradients(target: Weights, d: int, before: _Before, steps: StepGradients) -> None:
    """Write the gradients of a direction's weights that a plain cell does not have."""
    if target.w_hr is not None:
        assert steps.dprojected is not None and steps.hidden is not None
        P, H = target.w_hr.shape
        d_out = steps.dprojected[:, d * P : (d + 1) * P]
        product_into(target.w_hr, d_out.T, steps.hidden[:, d * H : (d + 1) * H])
    if steps.dw_ch is not None:
        _set(target.w_ch, steps.dw_ch[d].sum(0))
    if steps.dln_c is not None and before.x_side is not None and before.h_side is not None:
        _set(target.ln_ih, (steps.dgates[d] * before.x_side.values[d]).sum(0))
        _set(target.ln_hh, (steps.dgates[d] * before.h_side.values[d]).sum(0))
        gain, bias = steps.dln_c[d].sum(0).chunk(2)
        _set(target.ln_c, gain)
        _set(target.b_ln_c, bias)


def _set(target: Tensor | None, value: Tensor) -> None:
    if target is not None:
        target.copy_(value)
