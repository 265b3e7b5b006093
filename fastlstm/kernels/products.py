"""The products of matrices that GPU backends leave to PyTorch: before and after their kernels.

"Input products" are x through w_ih, of all steps ahead of the loop. Letters: see
:mod:`fastlstm.spec`; n is the number of results of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.reference import LAYER_NORM_EPSILON
from fastlstm.spec import LayerSpec, Weights

__all__ = [
    "Normalised",
    "gates_again",
    "gradient_groups",
    "groups_then",
    "input_gradient",
    "input_products",
    "product",
    "product_into",
    "products",
    "weight_gradients",
    "weight_groups",
]


def weight_groups(weights: Sequence[Tensor], spec: LayerSpec) -> list[Weights]:
    """Take the flat list of a layer's weights apart by direction, each of them contiguous."""
    return Weights.split([w.contiguous() for w in weights], spec)


def groups_then(cache: Tensor | None, groups: Sequence[Weights], spec: LayerSpec) -> list[Weights]:
    """Take the weights of the forward pass apart as `groups`, which they are if cache is None."""
    if cache is None:
        return list(groups)
    like = [w for group in groups for w in group if w is not None]
    parts = cache.split([w.numel() for w in like])
    return Weights.split([t.view(w.shape) for t, w in zip(parts, like, strict=True)], spec)


def gradient_groups(
    gradients: Sequence[Tensor], groups: Sequence[Weights]
) -> list[Weights] | None:
    """Take the flat list of gradients apart by direction; None if it is empty.

    One gradient serves both biases: it stands for b_ih.
    """
    if not gradients:
        return None
    rest = iter(gradients)

    def found(name: str, weight: Tensor | None) -> Any:
        return None if weight is None or name == "b_hh" else next(rest)

    return [Weights(*(found(*item) for item in group._asdict().items())) for group in groups]


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32, of factors of any dtype."""
    if a.dtype is torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write out = a b, summed in float32 and rounded once.

    On a GPU a 16-bit result would not do: where cuBLAS splits a sum it then adds up the parts in
    16 bits, unless the whole process forbids it.
    """
    if a.is_cuda and out.dtype is torch.float32:
        of = {} if a.dtype is torch.float32 else {"out_dtype": torch.float32}
        torch.mm(a, b, **of, out=out)
    else:
        out.copy_(product(a, b))


def input_products(x: Tensor, groups: Sequence[Weights]) -> Tensor:
    """Return x [rows, I] through w_ih, without the biases: float32 [D, rows, 4H]."""
    return products([x] * len(groups), [group.w_ih for group in groups])


def products(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return float32 [D, rows, n]: each direction's inputs [rows, m] through weights [n, m]."""
    x, w = inputs[0], weights[0]
    result = x.new_empty(len(inputs), x.shape[0], w.shape[0], dtype=torch.float32)
    for target, values, weight in zip(result, inputs, weights, strict=True):
        product_into(target, values, weight.T)
    return result


def input_gradient(dx: Tensor, dgates: Tensor, groups: Sequence[Weights]) -> None:
    """Write dx [rows, I] from the gradients [D, rows, n] of the input products."""
    if len(groups) == 1:
        product_into(dx, dgates[0], groups[0].w_ih)
    else:
        dx.copy_(product(dgates[0], groups[0].w_ih) + product(dgates[1], groups[1].w_ih))


def gates_again(x: Tensor, groups: Sequence[Weights], h_before: Sequence[Tensor]) -> Tensor:
    """Return the gates of all steps before activation, without biases: float32 [D, rows, 4H].

    x is [rows, I]; h_before [rows, P] of each direction.
    """
    gates = input_products(x, groups)
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
    """Write the gradients of w_ih, w_hh and the biases of a direction.

    Args:
        target: written.
        dgates: [rows, n], the gradients of the gates.
        x: [rows, I].
        h_before: [rows, P].
        through_x: [rows, n], the gradients of the input products; None where they are dgates, as
            they are unless products are normalised before they become part of a gate.
        through_h: [rows, n], the gradients of the products with w_hh, or None.
    """
    product_into(target.w_ih, (dgates if through_x is None else through_x).T, x)
    product_into(target.w_hh, (dgates if through_h is None else through_h).T, h_before)
    if target.b_ih is not None:
        torch.sum(dgates, 0, out=target.b_ih)  # adds up in float32


class Normalised(NamedTuple):
    """Rows at mean 0 and variance 1."""

    values: Tensor  # [..., n]
    factor: Tensor  # [..., 1], which made the variance 1

    @classmethod
    def of(cls, rows: Tensor) -> Normalised:
        """Normalise rows."""
        values, _, factor = torch.native_layer_norm(
            rows, rows.shape[-1:], None, None, LAYER_NORM_EPSILON
        )
        return cls(values, factor)

    def gradient(self, d: Tensor) -> Tensor:
        """Return the gradient of the rows from d, that of the values; all [..., n]."""
        along = (d * self.values).mean(-1, keepdim=True)
        return (d - d.mean(-1, keepdim=True) - self.values * along) * self.factor
