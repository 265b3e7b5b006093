"""The shortest way to a kernel: plain calls without gradients, for streaming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlstm.backends import choice
from fastlstm.kernels.base import Backend
from fastlstm.layer.recorded import PRE_DISPATCH, dispatch_modes, has_key, tracing
from fastlstm.spec import LayerSpec

__all__ = ["fast_backend", "infer"]

_is_autocast = torch._C._is_any_autocast_enabled
_is_transformed = torch._C._are_functorch_transforms_active


def fast_backend(x: Tensor) -> Backend | None:
    """Return the backend that takes x as it is, without any preparation, if there is one.

    No compiler, transform, mode, trace or autocast is at work then. It leaves the dtype to the
    operators.
    """
    backend = choice.fast
    if (
        backend is None
        or not x.is_cpu
        or torch.compiler.is_compiling()
        or _is_transformed()
        or _is_autocast()
        or forward_ad._current_level >= 0
        or dispatch_modes()
        or has_key(PRE_DISPATCH)
        or tracing() is not None
        or backend.error() is not None
    ):
        return None
    return backend


def infer(
    backend: Backend,
    x: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    cache: Any,
    directions: int = 0,
) -> Any:
    """Compute a plain layer or cell, without gradients.

    Args:
        backend: what :func:`fast_backend` returned for x.
        x: ``[T, B, I]`` of a layer, ``[B, I]`` of a cell.
        hx: what the user passed for ``(h_0, c_0)``.
        weights: those of the layer.
        cache: a dict in which the backend keeps packed weights.
        directions: D of a layer; 0 for a cell.

    Returns:
        ``(y, h_n, c_n)``, of a cell ``(h, c)``. What the operator checks itself is not checked
        before: None stands for a call that it refused, which then takes the long way, to an answer
        or a better message.
    """
    h0 = c0 = None
    if hx is not None:
        if type(hx) is not tuple or len(hx) != 2:
            return None
        h0, c0 = hx
        if type(h0) is not Tensor or type(c0) is not Tensor:
            return None
    try:
        packed = cache.get(("forward", weights[0].dtype))
        if packed is None:
            spec = LayerSpec.of("LSTM", weights, directions or 1)
            packed = backend.packed_weights(cache, "forward", weights, spec)
        if directions:
            found = backend.lstm_infer(x, weights, directions, h0, c0, packed)
        else:
            found = backend.lstm_cell_infer(x, weights, h0, c0, packed)
    except (RuntimeError, ValueError):
        return None
    return found if type(found[0]) is Tensor else None  # as it always is after the long way
