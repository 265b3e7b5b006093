"""The weights of each direction, and what GPU backends compute of matrices outside the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.reference import PLAIN, Cell, Weights


def cell_of(
    peephole: bool = False,
    layer_norm: bool = False,
    h_mask: Tensor | None = None,
    zoneout_c: float = 0.0,
    zoneout_h: float = 0.0,
    seed: Tensor | None = None,
) -> Cell:
    """The cell that the keywords of the operators describe."""
    mask = None if h_mask is None else h_mask.contiguous()
    return Cell(peephole, layer_norm, mask, (zoneout_c, zoneout_h), seed)


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

    def found(name: str, weight: Tensor | None) -> Any:
        return None if weight is None or name == "b_hh" else next(rest)

    return [Weights(*(found(*item) for item in group._asdict().items())) for group in of]


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
    return products([x] * len(groups), [group.w_ih for group in groups])


def products(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """float32 [D, rows, n]: the inputs [rows, m] of each direction through weights [n, m]."""
    x, w = inputs[0], weights[0]
    result = x.new_empty(len(inputs), x.shape[0], w.shape[0], dtype=torch.float32)
    for target, values, weight in zip(result, inputs, weights, strict=True):
        product_into(target, values, weight.T)
    return result


def input_gradient(dx: Tensor, dgates: Tensor, groups: Sequence[Weights]) -> None:
    """dx [rows, I] from the gradients [D, rows, n] of what w_ih was applied to."""
    if len(groups) == 1:
        product_into(dx, dgates[0], groups[0].w_ih)
    else:
        dx.copy_(product(dgates[0], groups[0].w_ih) + product(dgates[1], groups[1].w_ih))


def gates_again(x: Tensor, groups: Sequence[Weights], h_before: Sequence[Tensor]) -> Tensor:
    """float32 [D, rows, 4H]: the gates before activation, without biases, of all steps at once."""
    gates = project(x, groups)
    for target, group, h in zip(gates, groups, h_before, strict=True):
        target += product(h, group.w_hh.T)
    return gates


def weight_gradients(
    target: Weights,
    dgates: Tensor,
    x: Tensor,
    h_before: Tensor,
    through_x: Tensor | None = None,
    through_h: Tensor | None = None,
) -> None:
    """Write those of w_ih, w_hh and the biases from the gradients [rows, n] of the gates.

    Where a product is normalised before it becomes part of a gate, its gradient is another one.
    """
    product_into(target.w_ih, (dgates if through_x is None else through_x).T, x)
    product_into(target.w_hh, (dgates if through_h is None else through_h).T, h_before)
    if target.b_ih is not None:
        torch.sum(dgates, 0, out=target.b_ih)  # adds up in float32


class Normalised(NamedTuple):
    """Rows [..., n] at mean 0 and variance 1."""

    values: Tensor
    factor: Tensor  # [..., 1], which made the variance 1

    @classmethod
    def of(cls, rows: Tensor) -> Normalised:
        """Normalise rows."""
        values, _, factor = torch.native_layer_norm(rows, rows.shape[-1:], None, None, 1e-5)
        return cls(values, factor)

    def gradient(self, d: Tensor) -> Tensor:
        """Of the rows, from that of the values."""
        along = (d * self.values).mean(-1, keepdim=True)
        return (d - d.mean(-1, keepdim=True) - self.values * along) * self.factor
