"""``torch.autocast``: what it casts, and computing what it has cast."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "cast", "switched_off"]

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_is_any_enabled = torch._C._is_any_autocast_enabled


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks for on the device of x, None where it is off."""
    if not _is_any_enabled():
        return None
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def cast(
    dtype: torch.dtype, x: Tensor, hx: Any, weights: Sequence[Tensor]
) -> tuple[Tensor, Any, Sequence[Tensor]]:
    """Return all of them in dtype; as in autocast, float64 and integers neither change nor spread.

    Args:
        dtype: that of autocast.
        x: the input.
        hx: a tuple of states, or None.
        weights: any tensors.
    """

    def convert(t: Tensor) -> Tensor:
        eligible = t.is_floating_point() and t.dtype is not torch.float64
        return t.to(dtype) if eligible and dtype in _DTYPES else t

    return convert(x), None if hx is None else tuple(map(convert, hx)), [*map(convert, weights)]


def switched_off(x: Tensor, active: bool) -> AbstractContextManager[Any]:
    """Return a block in which autocast is off on the device of x, if it is active."""
    return torch.autocast(x.device.type, enabled=False) if active else nullcontext()
