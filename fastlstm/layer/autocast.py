"""``torch.autocast``: what it casts, and computing what it has cast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "cast", "cast_dtype", "switched_off"]

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
        return t.to(cast_dtype(t.dtype, dtype))

    return convert(x), None if hx is None else tuple(map(convert, hx)), [*map(convert, weights)]


def cast_dtype(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """Return what becomes of a dtype where autocast asks for another one, or for None."""
    if autocast not in _DTYPES or dtype is torch.float64 or not dtype.is_floating_point:
        return dtype
    return autocast


def switched_off(x: Tensor) -> torch.autocast:
    """Return a block in which autocast is off on the device of x."""
    return torch.autocast(x.device.type, enabled=False)
