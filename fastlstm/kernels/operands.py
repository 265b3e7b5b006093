"""The weights of one direction, and products of matrices outside the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """The weights of one direction."""

    w_ih: Tensor  # [4H, I]
    w_hh: Tensor  # [4H, P]
    b_ih: Tensor | None = None  # [4H]
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None  # [P, H]


def groups(weights: Sequence[Tensor], directions: int) -> list[Group]:
    """The flat list of the layer contract, taken apart."""
    each = len(weights) // directions
    found = []
    for start in range(0, len(weights), each):
        group = [w.contiguous() for w in weights[start : start + each]]
        w_hr = group.pop() if each % 2 else None
        found.append(Group(*group)._replace(w_hr=w_hr))
    return found


def gradient_groups(gradients: Sequence[Tensor], of: Sequence[Group]) -> list[Group] | None:
    """The gradients of the weights, taken apart; None if there are none.

    One gradient serves both biases: it stands for b_ih.
    """
    if not gradients:
        return None
    rest = iter(gradients)
    return [
        Group(
            next(rest),
            next(rest),
            None if group.b_ih is None else next(rest),
            None,
            None if group.w_hr is None else next(rest),
        )
        for group in of
    ]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, of factors of any dtype."""
    if a.dtype is torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, summed in float32 and rounded once."""
    if not a.is_cuda:
        out.copy_(product(a, b))
    elif out.dtype is a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def project(x: Tensor, groups: Sequence[Group]) -> Tensor:
    """float32 [D, rows, 4H]: x [rows, I] through w_ih, without the biases."""
    projected = x.new_empty(len(groups), x.shape[0], groups[0].w_ih.shape[0], dtype=torch.float32)
    for target, group in zip(projected, groups, strict=True):
        product_into(target, x, group.w_ih.T)
    return projected
