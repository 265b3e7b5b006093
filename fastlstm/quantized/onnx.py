"""Export of int8 layers to ONNX: a node DynamicQuantizeLSTM of ONNX Runtime for each.

Letters as in :mod:`fastlstm.spec`. The node wants gates i, o, f, g, and the weights of both
directions in one tensor: W ``[D, I, 4H]``, R ``[D, H, 4H]``, their scales ``[D, 4H]``, and B
``[D, 8H]``. It quantises the input of a call with one scale for all rows, where ours has one for
each, so its numbers are a little further from float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlstm.quantized.packing import from_panels, from_rows
from fastlstm.spec import LayerSpec

__all__ = ["stack"]

_NODE = "com.microsoft::DynamicQuantizeLSTM"


def stack(
    specs: Sequence[LayerSpec],
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor] | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a stack of layers by a node each.

    Args:
        specs: what the layers are.
        x: ``[T, B, I]``.
        weights: those of all layers, for each direction weight_ih, weight_hh and rows.
        states: ``(h_0, c_0)``, or None for zeros.
        lengths: int64 ``[B]``, or None.

    Returns:
        y, h_n and c_n.
    """
    D, final = specs[0].directions, []
    for k, spec in enumerate(specs):
        start = None if states is None else [s[k * D : (k + 1) * D] for s in states]
        group = weights[3 * k * D : 3 * (k + 1) * D]
        x, *end = _layer(spec, x, group, start, lengths)
        final.append(end)
    h_n, c_n = (torch.cat(s) for s in zip(*final, strict=True))
    return x, h_n, c_n


def _layer(
    spec: LayerSpec,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor] | None,
    lengths: Tensor | None,
) -> list[Tensor]:
    H, D, (T, B, I) = spec.hidden_size, spec.directions, x.shape
    columns: list[list[Tensor]] = [[], [], [], [], []]
    for d in range(D):
        ih, hh, rows = weights[3 * d : 3 * d + 3]
        scale_ih, _, scale_hh, _, bias = (_reorder(n, H) for n in from_rows(rows, 4, H))
        w_ih, w_hh = (_reorder(from_panels(w, 4, H, K), H) for w, K in ((ih, I), (hh, H)))
        found = w_ih.t(), w_hh.t(), scale_ih, scale_hh, torch.cat([bias, torch.zeros_like(bias)])
        for column, value in zip(columns, found, strict=True):
            column.append(value)
    w, r, w_scale, r_scale, bias = map(torch.stack, columns)
    zero = torch.zeros_like(w_scale, dtype=torch.int8)
    h_0, c_0 = states or (x.new_zeros(D, B, H), x.new_zeros(D, B, H))
    y, *final = torch.onnx.ops.symbolic_multi_out(
        _NODE,
        (
            *(x, w, r, bias),
            None if lengths is None else lengths.to(torch.int32),
            *(h_0, c_0, None, w_scale, zero, r_scale, zero),
        ),
        {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"},
        dtypes=[x.dtype] * 3,
        shapes=[(T, D, B, H), (D, B, H), (D, B, H)],
        version=1,
    )
    if lengths is not None:  # ONNX Runtime gives zeros for rows without a step
        empty = (lengths == 0)[:, None]
        final = [torch.where(empty, a, b) for a, b in zip((h_0, c_0), final, strict=True)]
    return [y.transpose(1, 2).flatten(2), *final]


def _reorder(w: Tensor, H: int) -> Tensor:
    """Reorder gates i, f, g, o of PyTorch to i, o, f, g."""
    return torch.cat([w[:H], w[-H:], w[H:-H]])
