"""A layer as a node of ONNX, while ``torch.onnx.export`` traces a model.

Letters as in :mod:`fastlstm.reference`. ONNX has gates i, o, f, g, and one tensor for the weights
of both directions: W ``[D, 4H, I]``, R ``[D, 4H, H]``, B ``[D, 8H]``, peepholes P ``[D, 3H]`` of
i, o, f. What its nodes lack is written out step by step as the reference does it, with the T of
the example.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm import reference
from fastlstm.reference import PLAIN, Cell, Weights

__all__ = ["is_exporting", "lstm_layer", "rnn_layer"]

_OPSET = 14  # in which both nodes got their present form


def is_exporting() -> bool:
    """Whether ``torch.onnx.export(..., dynamo=True)`` is at work."""
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


def lstm_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    directions: int = 1,
    lengths: Tensor | None = None,
    cell_states: bool = False,
    cell: Cell = PLAIN,
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Same contract as :func:`fastlstm.reference.lstm_layer`.

    A node has no projections, no ``reset``, no states c of every step, and no cell but the plain
    one and that with peepholes.
    """
    groups = [Weights.of(group, cell) for group in _groups(weights, directions)]
    is_lstm = cell._replace(peephole=False) == PLAIN and groups[0].w_hr is None
    if not is_lstm or cell_states or not _is_dense(others):
        _warn_unrolled()
        return reference.lstm_layer(
            x, weights, h0, c0, directions=directions, lengths=lengths, cell_states=cell_states,
            cell=cell, **others,
        )  # fmt: skip
    H = groups[0].w_hh.shape[1]
    plain = [[_reorder(w, H) for w in group[:4] if w is not None] for group in groups]
    peepholes = [_reorder(w.w_ch, H) for w in groups if w.w_ch is not None]
    extra = torch.stack(peepholes) if peepholes else None
    y, h_n, c_n = _node("LSTM", x, plain, lengths, (h0, c0), extra)
    return y, h_n, c_n, None


def rnn_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    h0: Tensor | None,
    *,
    relu: bool = False,
    directions: int = 1,
    lengths: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`fastlstm.reference.rnn_layer`. A node has no ``reset``."""
    if not _is_dense(others):
        _warn_unrolled()
        return reference.rnn_layer(
            x, weights, h0, relu=relu, directions=directions, lengths=lengths, **others
        )
    activations = ["Relu" if relu else "Tanh"] * directions
    groups = _groups(weights, directions)
    y, h_n = _node("RNN", x, groups, lengths, (h0,), activations=activations)
    return y, h_n


def _warn_unrolled() -> None:
    warnings.warn(
        "ONNX has no node for this layer: it is written out step by step, for as many steps as "
        "the example has, whatever dynamic_shapes says of T",
        stacklevel=4,
    )


def _node(
    kind: str,
    x: Tensor,
    groups: Sequence[Sequence[Tensor]],
    lengths: Tensor | None,
    states: Sequence[Tensor | None],
    *extra: Tensor | None,
    **attributes: Any,
) -> list[Tensor]:
    """y ``[T, B, D*H]`` and the final states ``[D, B, H]`` of a node."""
    D, H = len(groups), groups[0][1].shape[1]
    w_ih, w_hh, *biases = (torch.stack(tensors) for tensors in zip(*groups, strict=True))
    T, B, _ = x.shape
    y, *final = torch.onnx.ops.symbolic_multi_out(
        kind,
        (
            x,
            w_ih,
            w_hh,
            torch.cat(biases, 1) if biases else None,
            None if lengths is None else lengths.to(torch.int32),
            *states,
            *extra,
        ),
        {
            "hidden_size": H,
            "direction": "bidirectional" if D == 2 else "forward",
            **attributes,
        },
        dtypes=[x.dtype] * (1 + len(states)),
        shapes=[(T, D, B, H), *[(D, B, H)] * len(states)],
        version=_OPSET,
    )
    if lengths is not None:  # ONNX Runtime gives zeros for rows without a step
        empty = (lengths == 0)[:, None]
        final = [
            end if start is None else torch.where(empty, start, end)
            for start, end in zip(states, final, strict=True)
        ]
    return [y.transpose(1, 2).flatten(2), *final]


def _groups(weights: Sequence[Tensor], directions: int) -> list[list[Tensor]]:
    each = len(weights) // directions
    return [list(weights[start : start + each]) for start in range(0, len(weights), each)]


def _is_dense(options: dict[str, Any]) -> bool:
    return options.get("batch_sizes") is None and options.get("reset") is None


def _reorder(w: Tensor, H: int) -> Tensor:
    """Gates i, f, g, o of PyTorch -> i, o, f, g; of peepholes i, f, o -> i, o, f."""
    return torch.cat([w[:H], w[-H:], w[H:-H]])
