"""Plain calls of quantised modules without their operator, for streaming.

The operator has 14 arguments: to pass them on takes torch longer than a small step takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlstm.kernels.cpu import CPU
from fastlstm.layer import fast_path

__all__ = ["infer"]

_is_watched = fast_path.is_watched  # looked up in every call
_is_whole = fast_path.is_whole
_keeps_gradients = torch.is_grad_enabled


def infer(module: Any, x: Any, hx: Any, dims: int, batch_first: bool = False) -> Any:
    """Compute dense sequences or a step of a cell, with the bits of the operator.

    Args:
        module: a :class:`fastlstm.quantized.base.Quantized`.
        x: ``[T, B, I]``, or ``[B, T, I]`` with batch_first; of a cell ``[B, I]``.
        hx: what the user passed for ``(h_0, c_0)``; of an RNN ``(h_0,)``; None for zeros.
        dims: how many dimensions x has to have.
        batch_first: whether x and y begin with B.

    Returns:
        ``(y, (h_n, c_n))``, of an RNN ``(y, h_n)``, of a cell ``(h, c)``. None stands for a call
        that is unusual or wrong: the operator then computes it, or says what is wrong.
    """
    if type(x) is not Tensor or x.dim() != dims or _is_watched() or not _is_whole(x):
        return None
    direct = CPU.infer_quantized
    if direct is None or (hx is not None and type(hx) is not tuple):
        return None
    weights = module._take(module._buffers)
    if _keeps_gradients() and _want_gradients((x, *(hx or ()), *weights)):
        return None
    low = fast_path.MEMORY_IS_LOW and fast_path.are_there(x, hx, weights)
    if batch_first:
        x = x.transpose(0, 1)
    found = direct(weights, x, hx, module._config, low)
    if found is None and x.stride(-1) != 1:
        found = direct(weights, x.contiguous(), hx, module._config, low)
    if batch_first and found is not None:
        return found[0].transpose(0, 1), found[1]
    return found


def _want_gradients(tensors: tuple[Any, ...]) -> bool:
    """Whether one of them requires a gradient, or is no tensor."""
    try:
        return any([t.requires_grad for t in tensors])
    except AttributeError:
        return True
