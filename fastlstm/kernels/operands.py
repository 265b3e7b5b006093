"""The weights of one direction, and products of matrices outside the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlstm.reference import PLAIN, Cell, Weights


def groups(weights: Sequence[Tensor], directions: int, cell: Cell = PLAIN) -> list[Weights]:
    """The flat list of the layer contract, taken apart by direction."""
    each = len(weights) // directions
    dense = [w.contiguous() for w in weights]
    return [Weights.of(dense[at : at + each], cell) for at in range(0, len(dense), each)]


def gradient_groups(gradients: Sequence[Tensor], of: Sequence[Weights]) -> list[Weights] | None:
    """The gradients of the weights, taken apart; None if there are none.

    One gradient serves both biases: it stands for b_ih.
    """
    if not gradients:
        return None
    rest = iter(gradients)
    return [
        Weights(
            *(
                None if weight is None or name == "b_hh" else next(rest)
                for name, weight in group._asdict().items()
            )
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


def project(x: Tensor, groups: Sequence[Weights]) -> Tensor:
    """float32 [D, rows, 4H]: x [rows, I] through w_ih, without the biases."""
    projected = x.new_empty(len(groups), x.shape[0], groups[0].w_ih.shape[0], dtype=torch.float32)
    for target, group in zip(projected, groups, strict=True):
        product_into(target, x, group.w_ih.T)
    return projected
