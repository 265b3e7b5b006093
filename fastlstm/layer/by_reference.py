"""A layer and its gradients in plain PyTorch: for derivatives that no kernel has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastlstm import reference
from fastlstm.layer.call import Call, MaybeTensors, Tensors
from fastlstm.spec import State

__all__ = ["by_reference", "pull_back"]


def by_reference(call: Call, inputs: MaybeTensors) -> Tensors:
    """Return the results of a layer from ``(x, h0, c0, *weights)``."""
    if call.members:
        one = call._replace(members=0)
        dims = tree_map(_first_of_tensors, one)
        dims = dims._replace(sequences=dims.sequences._replace(batch_sizes=None))
        tensors = tuple(inputs)
        return torch.vmap(by_reference, (dims, tree_map(_first_of_tensors, tensors)))(one, tensors)
    x, h0, c0, *weights = inputs
    y, state, c_all = reference.layer(
        call.spec, x, weights, State(h0, c0), call.sequences, call.noise, call.cell_states
    )
    return tuple(t for t in (y, *state, c_all) if t is not None)


def _first_of_tensors(leaf: Any) -> int | None:
    """The dimension for torch.vmap."""
    return 0 if isinstance(leaf, Tensor) else None


def pull_back(
    call: Call,
    needed: Sequence[bool],
    inputs: MaybeTensors,
    kept: MaybeTensors,
    incoming: MaybeTensors,
) -> Tensors:
    """Return the gradients of a layer's inputs, as :func:`fastlstm.layer.compute.gradients`."""

    def run(*wanted: Tensor) -> Tensors:
        rest = iter(wanted)
        own = [next(rest) if need else t for t, need in zip(inputs, needed, strict=True)]
        found = by_reference(call, own)
        return tuple(t for t, g in zip(found, incoming, strict=True) if g is not None)

    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    pull = torch.func.vjp(run, *wanted)[1]
    return pull(tuple(g for g in incoming if g is not None))
