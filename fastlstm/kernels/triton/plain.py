"""The operators of plain layers whose kernels were compiled ahead: for latency.

They make their outputs, and are told whether float32 is multiplied in TF32: C++ would have to ask
Python, which takes longer than the rest of such a call. ``csrc/triton/`` computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.kernels.base import constant
from fastlstm.kernels.measured import precision
from fastlstm.kernels.operators import add_fake, define_operator
from fastlstm.spec import LayerSpec

__all__ = ["backward", "forward", "infer"]

_INPUTS = "Tensor x, Tensor[] weights, int directions, Tensor? h0, Tensor? c0"
_INFER = define_operator(
    "lstm_infer_triton",
    "(Tensor x, Tensor[] weights, int layers, int directions, Tensor? h0, Tensor? c0, "
    "Tensor[] caches, bool tf32) -> (Tensor, Tensor, Tensor)",
)
_FORWARD = define_operator(
    "lstm_plain_fwd_triton", f"({_INPUTS}, bool tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = define_operator(
    "lstm_plain_bwd_triton",
    f"({_INPUTS}, Tensor y, Tensor c_all, Tensor gates, Tensor? dy, Tensor? dh_n, Tensor? dc_n, "
    "bool dx, bool dh0, bool dc0, bool dweights, bool tf32) -> Tensor[]",
)


def _fake_forward(
    x: Tensor, weights: Sequence[Tensor], directions: int, *rest: Any
) -> tuple[Tensor, ...]:
    (T, B, _), H = x.shape, weights[1].shape[1]
    y, state = x.new_empty(T, B, directions * H), x.new_empty(directions, B, H)
    c_all, gates = y.new_empty(y.shape, dtype=torch.float32), x.new_empty(directions, T, B, 4 * H)
    return y, state, torch.empty_like(state), c_all, gates


def _fake_backward(
    x: Tensor, weights: Sequence[Tensor], directions: int, *rest: Any
) -> list[Tensor]:
    *_, dx, dh0, dc0, dweights, _ = rest
    state = x.new_empty(directions, x.shape[1], weights[1].shape[1])
    found = [x] * dx + [state] * (dh0 + dc0) + list(weights) * dweights
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in found]


add_fake(_FORWARD.name(), _fake_forward)
add_fake(_BACKWARD.name(), _fake_backward)


def infer(x: Tensor, *rest: Any) -> Any:
    """Compute a stack without gradients, as ``Backend.lstm_infer``."""
    return _INFER(x, *rest, _in_tf32(x.dtype))


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    spec: LayerSpec,
    h0: Tensor | None,
    c0: Tensor | None,
    cache: Any,
) -> Any:
    """Compute a layer in training, as ``Backend.lstm_plain_fwd``."""
    return _FORWARD(x, weights, spec.directions, h0, c0, _in_tf32(x.dtype))


def backward(
    x: Tensor,
    weights: Sequence[Tensor],
    spec: LayerSpec,
    h0: Tensor | None,
    c0: Tensor | None,
    cache: Any,
    *rest: Any,
) -> Any:
    """Compute the gradients of a layer, as ``Backend.lstm_plain_bwd``."""
    return _BACKWARD(x, weights, spec.directions, h0, c0, *rest, _in_tf32(x.dtype))


@constant
def _in_tf32(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 and precision(dtype) == "tf32"
