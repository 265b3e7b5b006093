"""``torch.func.vmap`` of a layer: one call of the kernels.

Sequences of a batch know nothing of each other, so a vmapped dimension of data is folded into it:
sequence b of sample v becomes sequence ``b * V + v``, which keeps packed rows packed. Where
weights are vmapped (ensembles), or their gradients wanted of each sample, the CPU operators take
each sample as a member of their own: see ops.py. Triton has no members: its ensembles go through
the reference, whose products are batched ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import autograd
from .rows import layout

Maybe = Sequence[Any]  # of tensors, or None where there is none


def layer(info: Any, in_dims: Any, call: autograd.Call, inputs: Maybe) -> Any:
    """The rule of a layer: its outputs, and their vmapped dimensions."""
    call_dims, *dims = in_dims
    if info.batch_size and _is_foldable(call, call_dims, dims):
        fold = _Fold(info.batch_size)
        outputs = autograd.run_transformed(fold.call(call, call_dims), fold.inputs(inputs, dims))
        return fold.undo(outputs)
    if _has_members(info, call, call_dims):
        models = _Members(info.batch_size, call.members)
        outputs = autograd.run_transformed(
            models.call(call, call_dims), models.tensors(inputs, dims)
        )
        return models.undo(outputs)
    run = torch.vmap(autograd.by_reference, (call_dims, tuple(dims)), randomness=info.randomness)
    outputs = run(call, tuple(inputs))
    return outputs, (0,) * len(outputs)


def gradient(
    info: Any,
    in_dims: Any,
    call: autograd.Call,
    needed: Sequence[bool],
    inputs: Maybe,
    outputs: Maybe,
    incoming: Maybe,
) -> Any:
    """The rule of its gradient; of weights, one gradient for each sample."""
    call_dims, dims, kept_dims, grad_dims = in_dims
    for_weights = any(needed[3:])
    plain = call.cell.is_plain and (len(inputs) - 3) // call.directions % 2 == 0
    members = _has_members(info, call, call_dims)
    foldable = info.batch_size > 0 and _is_foldable(call, call_dims, dims)
    if members and (for_weights or not foldable):
        models = _Members(info.batch_size, call.members)
        found = autograd.gradient(
            models.call(call, call_dims),
            needed,
            models.tensors(inputs, dims),
            models.tensors(outputs, kept_dims),
            models.tensors(incoming, grad_dims),
        )
        return models.undo(found)
    if not foldable or (for_weights and not plain):
        run = torch.vmap(
            autograd.pull_back, (call_dims, None, tuple(dims), None, tuple(grad_dims))
        )
        found = run(call, needed, tuple(inputs), (), tuple(incoming))
        return found, (0,) * len(found)
    fold = _Fold(info.batch_size)
    arguments = (
        fold.call(call, call_dims),
        needed,
        fold.inputs(inputs, dims),
        [fold.rows(t, dim) for t, dim in zip(outputs, kept_dims, strict=True)],
        [fold.rows(t, dim) for t, dim in zip(incoming, grad_dims, strict=True)],
    )
    if for_weights:
        return _per_sample(fold, *arguments)
    return fold.undo(autograd.gradient(*arguments))


def _has_members(info: Any, call: autograd.Call, call_dims: autograd.Call) -> bool:
    """Whether the operators take it in one call, whatever else is vmapped."""
    return call.kernels == "cpu" and call_dims.batch_sizes is None and info.batch_size > 0


class _Members:
    """Makes a vmapped dimension of V models the members of one call, and back.

    Members of the call itself become V times as many.
    """

    def __init__(self, models: int, members: int) -> None:
        self.models, self.members = models, members

    def _first(self, t: Tensor | None, dim: Any) -> Tensor | None:
        if t is None:
            return None
        t = t.expand(self.models, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.flatten(0, 1) if self.members else t

    def call(self, call: autograd.Call, dims: autograd.Call) -> autograd.Call:
        lengths = self._first(call.lengths, dims.lengths)
        cell, cell_dims = call.cell, dims.cell
        return call._replace(
            lengths=None if lengths is None else lengths.contiguous(),
            reset=self._first(call.reset, dims.reset),
            cell=cell._replace(
                h_mask=self._first(cell.h_mask, cell_dims.h_mask),
                seed=self._first(cell.seed, cell_dims.seed),
            ),
            cache=None,
            members=self.models * max(self.members, 1),
        )

    def tensors(self, tensors: Maybe, dims: Sequence[int | None]) -> list[Any]:
        return [self._first(t, dim) for t, dim in zip(tensors, dims, strict=True)]

    def undo(self, outputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if self.members:
            outputs = [t.unflatten(0, (self.models, self.members)) for t in outputs]
        return tuple(outputs), (0,) * len(outputs)


class _Fold:
    """Moves a vmapped dimension of V samples into the batch, and back."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def _into(self, t: Tensor | None, dim: Any, place: int) -> Tensor | None:
        if t is None:
            return None
        if dim is None:
            shape = [*t.shape, self.samples] if place == -1 else [*t.shape[:-1], self.samples, -1]
            t = t.unsqueeze(place).expand(shape)
        else:
            t = t.movedim(dim, place)
        return t.flatten(place - 1, place)

    def rows(self, t: Tensor | None, dim: Any) -> Tensor | None:
        """``[..., B, n]`` of each sample to ``[..., B * V, n]``."""
        return self._into(t, dim, -2)

    def flags(self, t: Tensor | None, dim: Any) -> Tensor | None:
        """``[..., B]`` of each sample to ``[..., B * V]`` of all, dense as kernels read it."""
        folded = self._into(t, dim, -1)
        return None if folded is None else folded.contiguous()

    def apart(self, t: Tensor) -> Tensor:
        """``[..., B * V, n]`` to ``[..., B, V, n]``."""
        return t.unflatten(-2, (-1, self.samples))

    def undo(self, outputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        found = tuple(map(self.apart, outputs))
        return found, tuple(t.dim() - 2 for t in found)

    def call(self, call: autograd.Call, dims: autograd.Call) -> autograd.Call:
        sizes = call.batch_sizes
        h_mask = self.rows(call.cell.h_mask, dims.cell.h_mask)
        return call._replace(
            batch_sizes=None if sizes is None else sizes * self.samples,
            lengths=self.flags(call.lengths, dims.lengths),
            reset=self.flags(call.reset, dims.reset),
            cell=call.cell._replace(h_mask=h_mask),
        )

    def inputs(self, inputs: Maybe, dims: Sequence[int | None]) -> list[Any]:
        """``(x, h0, c0, *weights)``, of weights that are not vmapped."""
        data = [self.rows(t, dim) for t, dim in zip(inputs[:3], dims[:3], strict=True)]
        return [*data, *inputs[3:]]


def _is_foldable(
    call: autograd.Call, call_dims: autograd.Call, dims: Sequence[int | None]
) -> bool:
    """Whether samples differ by their data only; zoneout counts sequences to tell them apart."""
    together = (*dims[3:], call_dims.batch_sizes)
    return call.cell.seed is None and all(dim is None for dim in together)


def _per_sample(
    fold: _Fold,
    call: autograd.Call,
    needed: Sequence[bool],
    inputs: Maybe,
    outputs: Maybe,
    incoming: Maybe,
) -> Any:
    """Gradients of folded inputs, those of weights apart for each sample.

    Without members, kernels add up the gradients of the weights. They are asked for those of the
    gates: as
    the gradient of the input of a layer whose w_ih selects one of its features for each gate.
    """
    x, h0, c0, *weights = inputs
    D, each = call.directions, len(weights) // call.directions
    w_ihs = weights[::each]
    units = w_ihs[0].shape[0]
    select = torch.eye(D * units, dtype=x.dtype, device=x.device).split(units)
    own = list(weights)
    own[::each] = select
    gates = torch.cat([linear(x, w) for w in w_ihs], -1)
    dgates, *dstates = autograd.gradient(
        call,
        (True, *needed[1:3], *(False,) * len(weights)),
        (gates, h0, c0, *own),
        outputs,
        incoming,
    )
    found = [fold.apart(t) for t in dstates]
    if needed[0]:
        found.insert(0, fold.apart(dgates @ torch.cat(w_ihs)))
    rows = layout(x, call.batch_sizes, call.lengths, call.reset)
    if call.lengths is not None:  # whatever x holds there must not meet the zeros of dgates
        x = torch.where(rows.real().view(*x.shape[:-1], 1), x, 0)
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32

    def samples(t: Tensor) -> Tensor:
        """``[..., B * V, n]`` to ``[V, rows, n]``."""
        return fold.apart(t).flatten(0, -3).transpose(0, 1).to(wide)

    y = outputs[0]
    for d in range(D):
        dg = samples(dgates[..., d * units : (d + 1) * units])
        P = y.shape[-1] // D
        start = None if h0 is None else h0[d]
        h = rows.before(y[..., d * P : (d + 1) * P].reshape(-1, P), start, d)
        parts = [dg.mT @ samples(x), dg.mT @ samples(h.view(*x.shape[:-1], P))]
        if each > 2:
            parts += [dg.sum(1)] * 2
        wanted = needed[3 + d * each : 3 + (d + 1) * each]
        found += [t.to(x.dtype) for t, need in zip(parts, wanted, strict=True) if need]
    data = sum(needed[:3])
    dims = [t.dim() - 2 for t in found[:data]] + [0] * (len(found) - data)
    return tuple(found), tuple(dims)
