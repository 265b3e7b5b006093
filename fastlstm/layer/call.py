"""One call of one layer: everything about it that has no derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastlstm.spec import DENSE, NO_NOISE, LayerSpec, Noise, Sequences

__all__ = [
    "Call",
    "MaybeTensors",
    "Tensors",
    "call_tensors",
    "count_results",
    "with_tensors",
    "without_tensors",
]

Tensors = tuple[Tensor, ...]
MaybeTensors = Sequence[Any]
"""Tensors, or None where there is none."""


class Call(NamedTuple):
    """What a layer computes and on what, without its input, states and weights."""

    backend: str  # the name: Dynamo takes no objects as arguments of an autograd.Function
    spec: LayerSpec
    sequences: Sequences
    noise: Noise
    cell_states: bool = False  # of an LSTM: whether c of every step is a result
    recompute: bool = False  # of an LSTM: whether gates are computed again for backward
    cache: Any = None  # a dict for packed weights
    save: bool = True  # under torch.func: whether to return what backward needs
    members: int = 0  # E: all tensors but batch_sizes have a leading dimension, one for each model
    short: bool = False  # whether the operators for plain layers compute it


def call_tensors(call: Call) -> tuple[Tensor | None, ...]:
    """Return the tensors of a call, which autograd has to keep; () if there are none."""
    if call.sequences is DENSE and call.noise is NO_NOISE:  # most calls
        return ()
    tensors = (*call.sequences, *call.noise)
    return tensors if any(t is not None for t in tensors) else ()


def without_tensors(call: Call) -> Call:
    """Return the call without what :func:`call_tensors` finds in it."""
    return with_tensors(call, (None,) * 5) if call_tensors(call) else call


def with_tensors(call: Call, tensors: MaybeTensors) -> Call:
    """Return the call with what :func:`call_tensors` found in it."""
    if not tensors:
        return call
    return call._replace(sequences=Sequences(*tensors[:3]), noise=Noise(*tensors[3:]))


def count_results(call: Call) -> int:
    """Return how many outputs have a derivative; those that follow them are for backward."""
    return 3 + call.cell_states if call.spec.mode == "LSTM" else 2
