"""The operators of plain layers whose kernels C++ starts: for latency.

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
from fastlstm.kernels.operators import define_operator, define_plain
from fastlstm.spec import LayerSpec, Sequences

__all__ = ["backward", "forward", "infer"]

_INFER = define_operator(
    "lstm_infer_triton",
    "(Tensor x, Tensor[] weights, int layers, int directions, Tensor? h0, Tensor? c0, "
    "Tensor[] caches, bool tf32) -> (Tensor, Tensor, Tensor)",
)
_FORWARD, _BACKWARD = define_plain("triton", "bool tf32")


def infer(x: Tensor, *rest: Any) -> Any:
    """Compute a stack without gradients, as ``Backend.lstm_infer``."""
    return _started(_INFER, x, *rest, _in_tf32(x.dtype))


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    spec: LayerSpec,
    h0: Tensor | None,
    c0: Tensor | None,
    sequences: Sequences,
    cache: Any,
) -> Any:
    """Compute a layer in training, as ``Backend.lstm_plain_fwd``."""
    return _started(_FORWARD, x, weights, spec.directions, h0, c0, _in_tf32(x.dtype))


def backward(
    x: Tensor,
    weights: Sequence[Tensor],
    spec: LayerSpec,
    h0: Tensor | None,
    c0: Tensor | None,
    sequences: Sequences,
    cache: Any,
    *rest: Any,
) -> Any:
    """Compute the gradients of a layer, as ``Backend.lstm_plain_bwd``."""
    return _started(_BACKWARD, x, weights, spec.directions, h0, c0, *rest, _in_tf32(x.dtype))


def _started(operator: Any, *arguments: Any) -> Any:
    """Call an operator; where there is no memory, raise what programs look for.

    Some look for the type, others for the words. In C++ it is csrc/out_of_memory.h.
    """
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if "could not allocate" in str(error):
            raise torch.OutOfMemoryError(f"CUDA out of memory. {error}") from None
        raise


@constant
def _in_tf32(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 and precision(dtype) == "tf32"
