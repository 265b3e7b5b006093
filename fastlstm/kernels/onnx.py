"""The backend of a model that is being exported to ONNX: a layer becomes a node.

Letters as in :mod:`fastlstm.spec`. ONNX has gates i, o, f, g, and one tensor for the weights of
both directions: W ``[D, 4H, I]``, R ``[D, 4H, H]``, B ``[D, 8H]``, peepholes P ``[D, 3H]`` of
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
from fastlstm.kernels.base import Backend
from fastlstm.spec import DENSE, NO_NOISE, LayerSpec, Noise, Sequences, State, Weights

__all__ = ["ONNX"]

_OPSET = 14  # in which both nodes got their present form


def _layer(
    spec: LayerSpec,
    x: Tensor,
    weights: Sequence[Tensor],
    state: State = State(),  # noqa: B008
    sequences: Sequences = DENSE,
    noise: Noise = NO_NOISE,
    cell_states: bool = False,
) -> tuple[Tensor, State, Tensor | None]:
    """Return what :func:`fastlstm.reference.layer` does, by a node where ONNX has one."""
    if not _has_node(spec, sequences, cell_states):
        warnings.warn(
            "ONNX has no node for this layer: it is written out step by step, for as many steps "
            "as the example has, whatever dynamic_shapes says of T",
            stacklevel=3,
        )
        return reference.layer(spec, x, weights, state, sequences, noise, cell_states)
    groups = Weights.split(weights, spec)
    if spec.is_lstm:
        H = spec.hidden_size
        plain = [[_reorder(w, H) for w in group[:4] if w is not None] for group in groups]
        peepholes = [_reorder(group.w_ch, H) for group in groups if group.w_ch is not None]
        extra = torch.stack(peepholes) if peepholes else None
        y, *final = _node("LSTM", x, plain, sequences.lengths, state, extra)
    else:
        plain = [[w for w in group[:4] if w is not None] for group in groups]
        activations = ["Relu" if spec.mode == "RNN_RELU" else "Tanh"] * spec.directions
        lengths, states = sequences.lengths, state[:1]
        y, *final = _node("RNN", x, plain, lengths, states, activations=activations)
    return y, State(*final), None


def _has_node(spec: LayerSpec, sequences: Sequences, cell_states: bool) -> bool:
    """Whether a node computes it: no projection, no resets, no c of every step, a known cell."""
    known = not spec._replace(peephole=False).is_extended
    dense = sequences.batch_sizes is None and sequences.reset is None
    return known and dense and not spec.proj_size and not cell_states


def _node(
    kind: str,
    x: Tensor,
    groups: Sequence[Sequence[Tensor]],
    lengths: Tensor | None,
    states: Sequence[Tensor | None],
    *extra: Tensor | None,
    **attributes: Any,
) -> list[Tensor]:
    """Make a node; return y ``[T, B, D*H]`` and the final states ``[D, B, H]``."""
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


def _reorder(w: Tensor, H: int) -> Tensor:
    """Reorder gates i, f, g, o of PyTorch to i, o, f, g; peepholes i, f, o to i, o, f."""
    return torch.cat([w[:H], w[-H:], w[H:-H]])


class OnnxBackend(Backend):
    """Computes every layer of a model that is being exported. Users do not choose it."""

    name = "onnx"
    layer = staticmethod(_layer)

    def is_exporting(self) -> bool:
        """Whether ``torch.onnx.export(..., dynamo=True)`` is at work."""
        return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


ONNX = OnnxBackend()
