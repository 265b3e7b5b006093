"""Calls of the functions that the modules of ``torch.nn`` call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF, Tensor

from fastlstm.spec import LayerSpec, Sequences

__all__ = ["cell", "stack", "zeros"]

_FUNCTIONS: dict[str, Any] = {
    "LSTM": _VF.lstm,
    "RNN_TANH": _VF.rnn_tanh,
    "RNN_RELU": _VF.rnn_relu,
}
_CUDNN_MODES = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2}
Results = tuple[Tensor, ...]


def stack(
    spec: LayerSpec,
    layers: int,
    x: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    sequences: Sequences,
    dropout: float,
    training: bool,
    cache: Any,
) -> tuple[Tensor, Results]:
    """Compute a stack of layers in one call, with PyTorch's own derivative.

    Args:
        spec: the first layer.
        layers: L.
        x: ``[T, B, I]``, or packed ``[N, I]``.
        hx: the initial states ``[L*D, B, ...]``; None for zeros.
        weights: those of all layers.
        sequences: which steps there are.
        dropout: probability of zeroing an output of any layer but the last, 0 in evaluation.
        training: whether ``nn.LSTM`` would be in training.
        cache: a dict of the module, or None.

    Returns:
        y, laid out as x, and the final states.
    """
    if x.is_cuda:
        # cuDNN has a backward pass in training only.
        training = training or (torch.is_grad_enabled() and any(w.requires_grad for w in weights))
        training = training or (torch.is_grad_enabled() and x.requires_grad)
        weights = _flattened(spec, layers, x, weights, cache)
    if hx is None:
        sizes = sequences.batch_sizes
        hx = zeros(spec, layers, x, x.shape[1] if sizes is None else int(sizes[0]))
    settings = spec.bias, layers, dropout, training, spec.directions == 2
    if sequences.lengths is not None:
        return _by_lengths(spec, x, hx, weights, sequences.lengths, settings)
    return _call(spec, x, hx, weights, sequences.batch_sizes, settings)


def cell(
    x: Tensor, hx: tuple[Tensor, Tensor] | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Take one step from x ``[B, I]`` and hx ``([B, H], [B, H])``, as ``nn.LSTMCell``."""
    if hx is None:
        zero = torch.zeros(x.shape[0], weights[1].shape[1], dtype=x.dtype, device=x.device)
        hx = zero, zero
    found: tuple[Tensor, Tensor] = _VF.lstm_cell(x, hx, *weights)
    return found


def zeros(spec: LayerSpec, layers: int, x: Tensor, batch: int) -> Results:
    """Return the states that None stands for."""
    rows = layers * spec.directions
    h = torch.zeros(rows, batch, spec.state_size, dtype=x.dtype, device=x.device)
    if not spec.is_lstm:
        return (h,)
    if not spec.proj_size:
        return h, h
    return h, torch.zeros(rows, batch, spec.hidden_size, dtype=x.dtype, device=x.device)


def _call(
    spec: LayerSpec,
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    settings: tuple[Any, ...],
) -> tuple[Tensor, Results]:
    """Call PyTorch's function for dense or packed rows."""
    function = _FUNCTIONS[spec.mode]
    states = hx if spec.is_lstm else hx[0]
    if batch_sizes is None:
        y, *final = function(x, states, weights, *settings, False)
    else:
        y, *final = function(x, batch_sizes, states, weights, *settings)
    return y, tuple(final)


def _by_lengths(
    spec: LayerSpec,
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor,
    settings: tuple[Any, ...],
) -> tuple[Tensor, Results]:
    """Pack the rows that have a step, and lay the results out as x: 0 past the end."""
    descending, order = lengths.cpu().sort(descending=True, stable=True)
    count = int((descending > 0).sum())
    y = x.new_zeros(*x.shape[:2], spec.directions * spec.state_size)
    if not count:
        return y, tuple(state.clone() for state in hx)
    rows = order[:count].to(x.device)
    given, batch_sizes = _VF._pack_padded_sequence(
        x.index_select(1, rows), descending[:count], False
    )
    states = [state.index_select(1, rows) for state in hx]
    found, final = _call(spec, given, states, weights, batch_sizes, settings)
    padded, _ = _VF._pad_packed_sequence(found, batch_sizes, False, 0.0, x.shape[0])
    # Under autocast results have another dtype than x.
    ends = (s.to(f.dtype).index_copy(1, rows, f) for s, f in zip(hx, final, strict=True))
    return y.to(padded.dtype).index_copy(1, rows, padded), tuple(ends)


def _flattened(
    spec: LayerSpec, layers: int, x: Tensor, weights: Sequence[Tensor], cache: Any
) -> Sequence[Tensor]:
    """Return the weights in one chunk of memory, without which cuDNN copies them and warns.

    The parameters of a module move into it, as those of ``nn.LSTM`` do: an edit in place is an
    edit of the chunk. They move again when one of them has got other memory, by an assignment to
    its ``.data`` or a new parameter. Weights that are not a module's are copied in every call.
    """
    if not torch.backends.cudnn.is_acceptable(weights[0]):
        return weights
    places = [w.data_ptr() for w in weights]
    if cache is not None and cache.get("flat") == places:
        return weights
    own = cache is not None and len({*places}) == len(places) and all(map(_may_move, weights))
    moved = list(weights) if own else [w.clone() for w in weights]
    with torch.cuda.device_of(x), torch.no_grad():
        torch._cudnn_rnn_flatten_weight(
            moved,
            spec.weights_per_direction,
            spec.input_size,
            _CUDNN_MODES[spec.mode],
            spec.hidden_size,
            spec.proj_size,
            layers,
            False,
            spec.directions == 2,
        )
    if own:
        cache["flat"] = [w.data_ptr() for w in weights]
    return moved


def _may_move(w: Tensor) -> bool:
    """Whether a weight is somebody's parameter, which may get other memory."""
    return type(w) is torch.nn.Parameter and not torch.is_inference(w)
