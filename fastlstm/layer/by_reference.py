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

__all__ = ["by_reference", "pull_back", "second", "third"]


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


def second(
    call: Call,
    needed: Sequence[bool],
    inputs: MaybeTensors,
    incoming: MaybeTensors,
    along: MaybeTensors,
    wanted: Sequence[bool],
    create_graph: bool,
) -> list[Any]:
    """Return what goes back through the gradients of a layer.

    Args:
        call: what was computed.
        needed: of which inputs it has computed gradients.
        inputs: ``(x, h0, c0, *weights)``.
        incoming: the gradients of the results that the layer had, None for zeros.
        along: what comes back into the gradient of each input; None where it is not needed.
        wanted: of which inputs and incoming gradients the results are wanted.
        create_graph: whether the results can be derived.

    Returns:
        The gradients of the inputs, then of what was incoming; None where they are not wanted.
    """
    with torch.enable_grad():
        own = _own(*inputs, *incoming)
        found = pull_back(call, needed, own[: len(inputs)], (), own[len(inputs) :])
        given = [v for v, need in zip(along, needed, strict=True) if need]
        return _derive(found, given, own, wanted, create_graph)


def third(
    call: Call,
    needed: Sequence[bool],
    tensors: tuple[MaybeTensors, MaybeTensors, MaybeTensors],
    wanted: Sequence[bool],
    grads: MaybeTensors,
) -> list[Any]:
    """Return what goes back through the results of :func:`second`.

    Args:
        call: what was computed.
        needed: of which inputs the layer has computed gradients.
        tensors: the inputs, the incoming gradients and `along` of :func:`second`.
        wanted: of which of all of these the results are wanted.
        grads: what comes back into the results of :func:`second`, None for zeros.

    Returns:
        The gradients of `tensors`, in one list; None where they are not wanted.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs, incoming, along = (_own(*group) for group in tensors)
        derived = [_requires_grad(t) for t in (*inputs, *incoming)]
        found = second(call, needed, inputs, incoming, along, derived, True)
        return _derive(found, grads, (*inputs, *incoming, *along), wanted, create_graph)


def _own(*tensors: Tensor | None) -> list[Any]:
    """Views, which cut the graph at a layer: x may itself depend on the weights."""
    return [None if t is None else t.view_as(t) for t in tensors]


def _requires_grad(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


def _derive(
    found: MaybeTensors,
    grads: MaybeTensors,
    tensors: MaybeTensors,
    wanted: Sequence[bool],
    create_graph: bool,
) -> list[Any]:
    """Return what goes back from `found` to the tensors that are wanted, None for the others."""
    # What was found may be a constant: c_n of one step has nothing to do with a gain.
    pairs = zip(found, grads, strict=True)
    varying = [(t, g) for t, g in pairs if g is not None and _requires_grad(t)]
    if not varying:
        return [None] * len(tensors)
    rest = iter(
        torch.autograd.grad(
            [t for t, _ in varying],
            [t for t, want in zip(tensors, wanted, strict=True) if want],
            [g for _, g in varying],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(rest) if want else None for want in wanted]
