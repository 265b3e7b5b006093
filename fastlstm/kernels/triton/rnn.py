"""nn.RNN: h = act(W_ih x + b_ih + W_hh h + b_hh); what its two passes share.

Regimes, letters and rows as in the kernels of the LSTM, but for one gate. Nothing but y is kept
for backward: the derivative of act follows from its value.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .call import Call, call_arguments, weight_arguments
from .plan import Plan
from .primitives import tanh
from .steps import spread_grid

__all__ = ["act", "act_gradient", "rnn_arguments", "rnn_grid"]


@triton.jit
def act(x, RELU: tl.constexpr, FAST: tl.constexpr):
    """Return max(x, 0) or tanh(x), ``[U, N]``."""
    if RELU:
        result = tl.where(x < 0, 0.0, x)  # NaN stays
    else:
        result = tanh(x, FAST)
    return result


@triton.jit
def act_gradient(d, h, RELU: tl.constexpr):
    """Return the gradient of x from d, that of h = act(x); all ``[U, N]``."""
    if RELU:
        result = tl.where(h <= 0, 0.0, d)
    else:
        result = d * (1.0 - h * h)
    return result


def rnn_grid(call: Call, plan: Plan) -> tuple[int, ...]:
    """Return the programs of a launch."""
    if plan.regime != "sequence":
        return spread_grid(call, plan)
    return -(-call.rows.B // plan.batch), call.spec.directions


def rnn_arguments(call: Call, plan: Plan) -> dict[str, Any]:
    """Return what all four kernels are told."""
    return {
        **weight_arguments(call.weights, "w_hh"),
        **call_arguments(call, plan),
        "RELU": call.spec.mode == "RNN_RELU",
    }
