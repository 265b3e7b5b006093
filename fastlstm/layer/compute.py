"""Calls the operators of a backend, forward and backward; no derivatives here.

A layer has the inputs ``(x, h0, c0, *weights)``, of an ``nn.RNN`` with None for c0, and the
outputs ``(y, h_n, c_n, c_all, gates)``, of an ``nn.RNN`` ``(y, h_n)``; c_all and gates only where
somebody wants them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm import kernels  # noqa: F401 (registers the backends)
from fastlstm.kernels.base import compute_dtype, get
from fastlstm.kernels.operators import cell_options
from fastlstm.layer.call import Call, MaybeTensors, Tensors

__all__ = ["apart", "flat", "forward", "gradients", "outputs"]


def forward(call: Call, inputs: MaybeTensors, save: bool) -> Tensors:
    """Compute a layer.

    Args:
        call: what to compute, and on which backend.
        inputs: ``(x, h0, c0, *weights)``.
        save: whether backward will follow.

    Returns:
        The results, then, with ``save``, what backward needs besides them.
    """
    x, h0, c0, *weights = inputs
    backend, spec = get(call.backend), call.spec
    if save and call.short and not call.members:
        found: Tensors = backend.lstm_plain_fwd(
            x, weights, spec, h0, c0, call.sequences, call.cache
        )
        return found
    packed = _packed_weights(call, "forward", inputs)
    found = outputs(call, inputs, save)
    arguments = _dense(x), _contiguous(weights, call), spec.directions, _dense(h0)
    if spec.is_lstm:
        backend.lstm_fwd(*arguments, _dense(c0), *_rows(call), *found, packed, **_options(call))
        return tuple([t for t in found if t is not None])
    relu = spec.mode == "RNN_RELU"
    backend.rnn_fwd(*arguments, *_rows(call), relu, *found, packed, **_options(call))
    return found


def outputs(call: Call, inputs: MaybeTensors, save: bool) -> tuple[Any, ...]:
    """Allocate what :func:`forward` returns; of an LSTM with None for what nobody wants."""
    x, h0, *_ = inputs
    spec = call.spec
    D, H, P = spec.directions, spec.hidden_size, spec.state_size
    shape = x.shape[:-1]
    lead = shape[:1] if call.members else ()
    B = shape[-1] if call.sequences.batch_sizes is None else _batch(call, h0)
    # Sizes as plain arguments: the parser takes a tuple half a microsecond longer.
    y = x.new_empty(*shape, D * P)
    h_n = x.new_empty(*lead, D, B, P)
    if not spec.is_lstm:
        return y, h_n
    c_n = x.new_empty(*lead, D, B, H)
    c_all = gates = None
    if save or call.cell_states:
        c_all = x.new_empty(*shape, D * H, dtype=compute_dtype(x.dtype))
    if save and not call.recompute and not spec.layer_norm:
        backend = get(call.backend)
        if backend.keeps_gates(spec):
            kept = compute_dtype(x.dtype) if backend.wide else x.dtype
            gates = x.new_empty(*lead, D, *shape[len(lead) :], 4 * H, dtype=kept)
    return y, h_n, c_n, c_all, gates


def gradients(
    call: Call,
    needed: Sequence[bool],
    inputs: MaybeTensors,
    kept: MaybeTensors,
    incoming: MaybeTensors,
    then: Tensor | None = None,
) -> Tensors:
    """Compute the gradients of a layer's inputs.

    Args:
        call: what was computed, and on which backend.
        needed: for every input, whether its gradient is wanted.
        inputs: ``(x, h0, c0, *weights)``.
        kept: ``(y, c_all, gates)`` of the outputs, of an ``nn.RNN`` ``(y,)``.
        incoming: the gradients of the results, None for zeros.
        then: the weights of the forward pass, where gates have to be computed again and the
            weights may have changed; see :func:`flat`.

    Returns:
        One gradient for each input that needs one.
    """
    x, h0, c0, *weights = inputs
    backend, spec = get(call.backend), call.spec
    if call.short and not (call.members or torch.compiler.is_compiling()):
        return _short_gradients(call, needed, inputs, kept, incoming)
    dtype = compute_dtype(x.dtype) if backend.wide else x.dtype
    arriving = [
        None if grad is None else _dense(_as(grad, dtype if place else x.dtype))
        for place, grad in enumerate(incoming)  # that of y comes first
    ]
    dx, dh0, dc0 = (
        _empty(t, dtype) if wanted and t is not None else None
        for t, wanted in zip((x, h0, c0), needed[:3], strict=True)
    )
    dweights = _weight_gradients(call, weights) if any(needed[3:]) else []
    purpose = "both" if spec.is_lstm and len(kept) < 3 else "backward"
    packed = then
    if then is None or not backend.takes_weights_of_forward:
        if then is not None and spec.layer_norm:  # which keeps no gates: all of it as it was then
            weights = apart(then, weights)
        packed = _packed_weights(call, purpose, (x, h0, c0, *weights))
    arguments = _dense(x), _contiguous(weights, call), spec.directions, _dense(h0)
    if spec.is_lstm:
        y, c_all, *gates = kept
        gates = list(_contiguous(gates, call)) or [None]
        backend.lstm_bwd(
            *arguments, _dense(c0), *_rows(call), y, c_all, *gates,
            *arriving, *(() if call.cell_states else (None,)),
            dx, dh0, dc0, dweights, packed, **_options(call),
        )  # fmt: skip
    else:
        backend.rnn_bwd(
            *arguments, *_rows(call), spec.mode == "RNN_RELU", kept[0], *arriving,
            dx, dh0, dweights, packed, **_options(call),
        )  # fmt: skip
    grads = [dx, dh0, dc0, *_both_biases(call, dweights)]
    return tuple(
        _as(grad, x.dtype)
        for grad, wanted in zip(grads, needed, strict=False)
        if wanted and grad is not None
    )


def _short_gradients(
    call: Call,
    needed: Sequence[bool],
    inputs: MaybeTensors,
    kept: MaybeTensors,
    incoming: MaybeTensors,
) -> Tensors:
    """The same by the operator for plain layers, which makes the gradients."""
    x, h0, c0, *weights = inputs
    of_weights = needed[3:]
    wanted = *needed[:3], any(of_weights)
    found: list[Tensor] = get(call.backend).lstm_plain_bwd(
        x,
        weights,
        call.spec,
        h0,
        c0,
        call.sequences,
        call.cache,
        *kept,
        *incoming,
        *wanted,
    )
    if all(of_weights) or not wanted[3]:
        return tuple(found)
    first = len(found) - len(weights)
    pairs = zip(found[first:], of_weights, strict=True)
    return *found[:first], *(g for g, need in pairs if need)


def flat(weights: Sequence[Tensor]) -> Tensor:
    """Copy the weights into one tensor, one after the other."""
    with torch.no_grad():
        return torch.cat([w.reshape(-1) for w in weights])


def apart(copies: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the weights in a tensor of :func:`flat`, shaped as `like`."""
    parts = copies.split([w.numel() for w in like])
    return [part.view(w.shape) for part, w in zip(parts, like, strict=True)]


def _weight_gradients(call: Call, weights: Sequence[Tensor]) -> list[Tensor]:
    """Allocate the gradients of the weights; one serves both biases."""
    each = call.spec.weights_per_direction
    found = []
    for start in range(0, len(weights), each):
        group = list(weights[start : start + each])
        if call.spec.bias:
            del group[2]
        found += [_empty(w, w.dtype) for w in group]
    return found


def _both_biases(call: Call, dweights: list[Tensor]) -> list[Tensor]:
    """The gradients of the weights, with a copy of those of the biases for the other bias."""
    if not call.spec.bias:
        return dweights
    each = call.spec.weights_per_direction - 1
    found = []
    for start in range(0, len(dweights), each):
        group = dweights[start : start + each]
        group.insert(3, group[2].clone())
        found += group
    return found


def _options(call: Call) -> dict[str, Any]:
    options = cell_options(call.spec, call.noise)
    if call.members:
        options["members"] = call.members
    return options


def _rows(call: Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """batch_sizes, lengths and reset, as an operator takes them."""
    sizes, lengths, reset = call.sequences
    if sizes is not None and call.members:
        sizes = sizes.expand(call.members, -1)
    return sizes, lengths, reset


def _batch(call: Call, h0: Tensor | None) -> int:
    """B of packed rows."""
    sizes = call.sequences.batch_sizes
    assert sizes is not None
    return int(sizes[0]) if h0 is None else h0.shape[-2]


def _packed_weights(call: Call, purpose: str, inputs: MaybeTensors) -> Tensor | None:
    """The buffer for packed weights of a pass; see :meth:`Backend.packed_weights`."""
    if call.cache is None:
        return None
    x, h0, _, *weights = inputs
    sizes = call.sequences.batch_sizes
    shape = x.shape[-3:-1] if sizes is None else (sizes.shape[0], _batch(call, h0))
    return get(call.backend).packed_weights(call.cache, purpose, weights, call.spec, shape)


def _dense(t: Tensor | None) -> Tensor | None:
    """The tensor itself when its last dimension is dense, all that kernels need; else a copy."""
    if t is None or t.is_contiguous() or t.stride(-1) == 1 or t.shape[-1] <= 1:
        return t
    return t.contiguous()


def _contiguous(tensors: Sequence[Tensor], call: Call) -> Sequence[Tensor]:
    """Contiguous tensors; of a call with members it is enough that each one's share is."""
    if all(map(Tensor.is_contiguous, tensors)):
        return tensors
    if call.members:
        return [t if t[0].is_contiguous() else t.contiguous() for t in tensors]
    return [t.contiguous() for t in tensors]


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which takes its time to find that there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)
