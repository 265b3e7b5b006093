"""What comes before and after the backward kernels whose gates lie by unit, ``[rows, H, 4]``.

The gradients of the gates lie so too, and the weights that they are multiplied with, which are
few, are brought to that order; what comes out is brought back to the order of gates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.kernels.products import gates_again, input_gradient, product
from fastlstm.spec import Gradients, Incoming, Saved, Weights

from .call import Call, strides_of
from .register_tiles import by_gate_again, by_unit
from .weight_gradients import launch_weight_gradients, takes

__all__ = ["GatesByUnit", "incoming_arguments"]


class GatesByUnit(NamedTuple):
    """The gates of a layer, room for their gradients, and what other gradients follow from."""

    call: Call
    x: Tensor  # [rows, I]; zeros in padding where that could reach a sum
    y: Tensor  # [rows, D*H]
    h: list[Tensor]  # of each direction [rows, H], before each step; or nothing
    gates: Tensor  # [D, rows, 4H] after activation; or float32, before it and without biases
    dgates: Tensor  # [D, rows, 4H], of the gates before activation
    apart: bool  # whether each gradient of a weight is a product of its own

    @classmethod
    def of(
        cls, call: Call, then: Sequence[Weights], saved: Saved, gradients: Gradients
    ) -> GatesByUnit:
        """Compute what was not kept; `then`: the weights of the forward pass."""
        spec, rows = call.spec, call.rows
        x, y = call.x_rows(), saved.y.view(rows.count, -1)
        apart = gradients.weights is not None and not takes(call)
        if rows.padded and apart:
            # Whatever x holds there must not meet the zeros of dgates.
            x = torch.where(rows.real(), x, 0)
        h: list[Tensor] = []
        if saved.gates is None or apart:
            h = rows.states_before(y, call.state.h, spec.directions)
        gates = saved.gates
        if gates is None:
            gates = gates_again(x, [_by_unit(each) for each in then], h)
        empty = torch.zeros if rows.padded else torch.empty
        size = spec.directions, rows.count, 4 * spec.hidden_size
        dgates = empty(size, dtype=x.dtype, device=x.device)
        return cls(call, x, y, h, gates, dgates, apart)

    def finish(self, gradients: Gradients) -> None:
        """Write the gradients of x and the weights from those of the gates."""
        call, x, dgates = self.call, self.x, self.dgates
        if gradients.dx is not None:
            by_unit = [_by_unit(each) for each in call.weights]
            input_gradient(gradients.dx.view(x.shape), dgates, by_unit)
        if gradients.weights is not None and not self.apart:
            launch_weight_gradients(call, self.y, dgates, gradients.weights)
            return
        for d, target in enumerate(gradients.weights or ()):
            _set(target.w_ih, product(dgates[d].T, x))
            _set(target.w_hh, product(dgates[d].T, self.h[d]))
            if target.b_ih is not None:
                _set(target.b_ih, torch.sum(dgates[d], 0))  # adds up in float32


def incoming_arguments(incoming: Incoming) -> dict[str, Any]:
    """Return the gradients of results as kernels are given them."""
    dy_t, dy_b = strides_of(incoming.dy)
    # In units of what divides both strides, as the compiler cannot know.
    dy_unit = math.gcd(dy_t, dy_b, 16)
    dc_t, dc_b = strides_of(incoming.dc_all)
    return {
        "dy": incoming.dy,
        "dc_all": incoming.dc_all,
        "dh_n": incoming.dh_n,
        "dc_n": incoming.dc_n,
        "dy_t": dy_t // dy_unit,
        "dy_b": dy_b // dy_unit,
        "dc_t": dc_t,
        "dc_b": dc_b,
        "DY_UNIT": dy_unit,
    }


def _by_unit(weights: Weights) -> Weights:
    """Return the weights whose rows belong to gates by unit; the biases are left as they are."""
    return weights._replace(w_ih=by_unit(weights.w_ih), w_hh=by_unit(weights.w_hh))


def _set(target: Tensor, by_unit: Tensor) -> None:
    """Write the gradient of a weight from that of its rows by unit."""
    by_gate = by_gate_again(by_unit)
    target.view(by_gate.shape).copy_(by_gate)
