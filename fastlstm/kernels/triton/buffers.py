"""What the backward kernels of an LSTM read and write besides the tensors of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlstm.spec import Weights

from .call import Call

__all__ = ["Kept", "StepGradients"]


class Kept(NamedTuple):
    """What is known of the forward pass."""

    c_all: Tensor  # float32 [rows, D*H]
    gates: Tensor  # [D, rows, 4H], or [D, rows, 8H] with layer normalisation: see the kernels
    then: Sequence[Weights]  # the weights of the forward pass
    activated: bool  # whether the gates are after activation
    factors: Tensor | None  # float32 [D, rows, 1], of the normalised products with w_hh


class StepGradients(NamedTuple):
    """The gradients of single steps or sequences, of which the others are products and sums.

    Fields have the names of kernel arguments. What has rows is zero in padding, which thus adds
    nothing to sums over rows.
    """

    dgates: Tensor  # [D, rows, 4H], of the gates before activation
    dprojected: Tensor | None  # [rows, D*P], of the results of w_hr
    hidden: Tensor | None  # [rows, D*H], what w_hr was applied to
    dw_ch: Tensor | None  # float32 [D, B, 3H]
    dln_c: Tensor | None  # float32 [D, B, 2H], of ln_c and b_ln_c

    @classmethod
    def empty(cls, call: Call, weights: bool) -> StepGradients:
        """Make those that a layer needs; `weights`: whether gradients of weights are wanted."""
        spec, rows, x = call.spec, call.rows, call.x
        D, H = spec.directions, spec.hidden_size
        empty = torch.zeros if rows.padded else torch.empty
        dgates = empty(D, rows.count, 4 * H, dtype=x.dtype, device=x.device)
        dprojected = hidden = dw_ch = dln_c = None
        if spec.proj_size:
            dprojected = empty(rows.count, D * spec.proj_size, dtype=x.dtype, device=x.device)
            hidden = empty(rows.count, D * H, dtype=x.dtype, device=x.device)
        if weights and spec.peephole:
            dw_ch = x.new_empty(D, rows.B, 3 * H, dtype=torch.float32)
        if weights and spec.layer_norm:
            dln_c = x.new_empty(D, rows.B, 2 * H, dtype=torch.float32)
        return cls(dgates, dprojected, hidden, dw_ch, dln_c)
