"""``torch.func.vmap`` of a layer: one call of the operators.

Sequences of a batch know nothing of each other, so a vmapped dimension of data is folded into it:
sequence b of sample v becomes sequence ``b * V + v``, which keeps packed rows packed. Where
weights are vmapped (ensembles), or their gradients are wanted of each sample, a backend with
``members`` takes each sample as a member of its own; any other backend's ensembles go through the
reference, whose products are batched ones.

The two rules are functions of what they apply to (``run``, ``differentiate``), which is in
:mod:`fastlstm.layer.autograd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlstm.kernels.base import compute_dtype, get
from fastlstm.kernels.rows import layout
from fastlstm.layer.by_reference import by_reference, pull_back
from fastlstm.layer.call import Call, MaybeTensors, Tensors
from fastlstm.spec import Noise, Sequences

__all__ = ["gradient_rule", "layer_rule"]

Run = Callable[[Call, MaybeTensors], Tensors]
Differentiate = Callable[[Call, Sequence[bool], MaybeTensors, MaybeTensors, MaybeTensors], Tensors]


def layer_rule(run: Run, info: Any, in_dims: Any, call: Call, inputs: MaybeTensors) -> Any:
    """Return the outputs of a vmapped layer, and their vmapped dimensions."""
    call_dims, *dims = in_dims
    if info.batch_size and _is_foldable(call, call_dims, dims):
        fold = _Fold(info.batch_size)
        return fold.undo(run(fold.call(call, call_dims), fold.inputs(inputs, dims)))
    if _has_members(info, call, call_dims):
        models = _Members(info.batch_size, call.members)
        return models.undo(run(models.call(call, call_dims), models.tensors(inputs, dims)))
    each = torch.vmap(by_reference, (call_dims, tuple(dims)), randomness=info.randomness)
    outputs = each(call, tuple(inputs))
    return outputs, (0,) * len(outputs)


def gradient_rule(
    differentiate: Differentiate,
    info: Any,
    in_dims: Any,
    call: Call,
    needed: Sequence[bool],
    tensors: tuple[MaybeTensors, MaybeTensors, MaybeTensors],
) -> Any:
    """Return the gradients of a vmapped layer, and their dimensions; of weights one a sample.

    Args:
        differentiate: what computes gradients.
        info: of vmap.
        in_dims: the vmapped dimensions of the call and of each group of tensors.
        call: the call of one sample.
        needed: for every input, whether its gradient is wanted.
        tensors: the inputs, what was kept of the outputs, and the gradients of the results.
    """
    call_dims, *all_dims = in_dims
    dims, kept_dims, grad_dims = all_dims
    inputs, kept, incoming = tensors
    for_weights = any(needed[3:])
    members = _has_members(info, call, call_dims)
    foldable = info.batch_size > 0 and _is_foldable(call, call_dims, dims)
    if members and (for_weights or not foldable):
        models = _Members(info.batch_size, call.members)
        moved = (models.tensors(t, d) for t, d in zip(tensors, all_dims, strict=True))
        return models.undo(differentiate(models.call(call, call_dims), needed, *moved))
    plain = not call.spec.is_extended and not call.spec.proj_size
    if not foldable or (for_weights and not plain):
        each = torch.vmap(pull_back, (call_dims, None, tuple(dims), None, tuple(grad_dims)))
        found = each(call, needed, tuple(inputs), (), tuple(incoming))
        return found, (0,) * len(found)
    fold = _Fold(info.batch_size)
    arguments = (
        fold.call(call, call_dims),
        needed,
        fold.inputs(inputs, dims),
        [fold.rows(t, dim) for t, dim in zip(kept, kept_dims, strict=True)],
        [fold.rows(t, dim) for t, dim in zip(incoming, grad_dims, strict=True)],
    )
    if for_weights:
        return _per_sample(differentiate, fold, *arguments)
    return fold.undo(differentiate(*arguments))


def _has_members(info: Any, call: Call, call_dims: Call) -> bool:
    """Whether the operators take it in one call, whatever else is vmapped."""
    shared_sizes = call_dims.sequences.batch_sizes is None
    return get(call.backend).members and shared_sizes and info.batch_size > 0


def _is_foldable(call: Call, call_dims: Call, dims: Sequence[int | None]) -> bool:
    """Whether samples differ by their data only; zoneout counts sequences to tell them apart."""
    together = (*dims[3:], call_dims.sequences.batch_sizes)
    return call.noise.seed is None and all(dim is None for dim in together)


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

    def call(self, call: Call, dims: Call) -> Call:
        sizes, lengths, reset = call.sequences
        lengths = self._first(lengths, dims.sequences.lengths)
        reset = self._first(reset, dims.sequences.reset)
        return call._replace(
            sequences=Sequences(sizes, None if lengths is None else lengths.contiguous(), reset),
            noise=Noise(*self.tensors(call.noise, dims.noise)),
            cache=None,
            members=self.models * max(self.members, 1),
        )

    def tensors(self, tensors: MaybeTensors, dims: Sequence[Any]) -> list[Any]:
        return [self._first(t, dim) for t, dim in zip(tensors, dims, strict=True)]

    def undo(self, outputs: Sequence[Tensor]) -> tuple[Tensors, tuple[int, ...]]:
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

    def by_sample(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """``[..., B * V, n]`` to ``[V, rows, n]``."""
        return self.apart(t).flatten(0, -3).transpose(0, 1).to(dtype)

    def undo(self, outputs: Sequence[Tensor]) -> tuple[Tensors, tuple[int, ...]]:
        found = tuple(map(self.apart, outputs))
        return found, tuple(t.dim() - 2 for t in found)

    def call(self, call: Call, dims: Call) -> Call:
        sizes, lengths, reset = call.sequences
        sequences = Sequences(
            None if sizes is None else sizes * self.samples,
            self.flags(lengths, dims.sequences.lengths),
            self.flags(reset, dims.sequences.reset),
        )
        h_mask = self.rows(call.noise.h_mask, dims.noise.h_mask)
        return call._replace(sequences=sequences, noise=call.noise._replace(h_mask=h_mask))

    def inputs(self, inputs: MaybeTensors, dims: Sequence[int | None]) -> list[Any]:
        """``(x, h0, c0, *weights)``, of weights that are not vmapped."""
        data = [self.rows(t, dim) for t, dim in zip(inputs[:3], dims[:3], strict=True)]
        return [*data, *inputs[3:]]


def _per_sample(
    differentiate: Differentiate,
    fold: _Fold,
    call: Call,
    needed: Sequence[bool],
    inputs: MaybeTensors,
    kept: MaybeTensors,
    incoming: MaybeTensors,
) -> Any:
    """Gradients of folded inputs, those of weights apart for each sample; of a plain cell.

    Without members, kernels add up the gradients of the weights. They are asked for those of the
    gates: as the gradient of the input of a layer whose w_ih selects one of its features for each
    gate.
    """
    x, h0, c0, *weights = inputs
    D, each = call.spec.directions, call.spec.weights_per_direction
    w_ihs = weights[::each]
    units = w_ihs[0].shape[0]
    select = torch.eye(D * units, dtype=x.dtype, device=x.device).split(units)
    own = list(weights)
    own[::each] = select
    gates = torch.cat([linear(x, w) for w in w_ihs], -1)
    dgates, *dstates = differentiate(
        call._replace(spec=call.spec._replace(input_size=D * units), cache=None),
        (True, *needed[1:3], *(False,) * len(weights)),
        (gates, h0, c0, *own),
        kept,
        incoming,
    )
    found = [fold.apart(t) for t in dstates]
    if needed[0]:
        found.insert(0, fold.apart(dgates @ torch.cat(w_ihs)))
    data = len(found)
    dims = [t.dim() - 2 for t in found]
    for d, parts in enumerate(_weight_gradients(fold, call, (x, h0), kept[0], dgates)):
        wanted = needed[3 + d * each : 3 + (d + 1) * each]
        found += [t.to(x.dtype) for t, need in zip(parts, wanted, strict=True) if need]
    return tuple(found), (*dims, *(0,) * (len(found) - data))


def _weight_gradients(
    fold: _Fold, call: Call, inputs: MaybeTensors, y: Tensor, dgates: Tensor
) -> list[list[Tensor]]:
    """The gradients of each direction's weights from those of its gates, one for each sample."""
    x, h0 = inputs
    P, units = call.spec.state_size, call.spec.gates * call.spec.hidden_size
    rows = layout(x, call.sequences)
    if call.sequences.lengths is not None:  # what x holds there must not meet zeros of dgates
        x = torch.where(rows.real().view(*x.shape[:-1], 1), x, 0)
    wide = compute_dtype(x.dtype)
    found = []
    for d in range(call.spec.directions):
        dg = fold.by_sample(dgates[..., d * units : (d + 1) * units], wide)
        start = None if h0 is None else h0[d]
        h = rows.before(y[..., d * P : (d + 1) * P].reshape(-1, P), start, d)
        parts = [
            dg.mT @ fold.by_sample(x, wide),
            dg.mT @ fold.by_sample(h.view(*x.shape[:-1], P), wide),
        ]
        found.append(parts + [dg.sum(1)] * 2 * call.spec.bias)
    return found
