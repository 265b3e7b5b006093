"""A call of a whole stack of layers: check it, choose a backend, walk through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm import automatic
from fastlstm.automatic import Size
from fastlstm.backends import select
from fastlstm.kernels.base import Backend
from fastlstm.kernels.pytorch import TORCH
from fastlstm.kernels.reference import REFERENCE
from fastlstm.layer import autograd
from fastlstm.layer.autocast import autocast_dtype, cast, switched_off
from fastlstm.layer.call import Call
from fastlstm.layer.checks import (
    check_cell_state,
    check_features,
    check_lengths,
    check_like,
    check_pair,
    check_reset,
    check_states,
    check_steps,
    check_unbatched,
    check_weights,
    dense,
    is_pair,
    size,
)
from fastlstm.layer.input import Input
from fastlstm.layer.options import Options
from fastlstm.layer.recorded import is_recorded, tracing
from fastlstm.layer.whole import compute_whole, is_whole
from fastlstm.spec import DENSE, NO_NOISE, LayerSpec, Noise, Sequences, State

__all__ = ["calls_of", "run_cell", "run_stack", "walk"]

Final = tuple[Tensor, ...]  # (h_n, c_n), of an nn.RNN (h_n,)


def run_stack(
    input: Tensor, hx: tuple[Tensor, ...] | None, weights: Sequence[Tensor], options: Options
) -> tuple[Tensor, Final, Tensor | None]:
    """Check a call and compute it.

    Args:
        input: ``[T, B, I]``, ``[B, T, I]`` with batch_first, ``[T, I]``, or packed ``[N, I]``.
        hx: ``(h_0, c_0)``, of an ``nn.RNN`` ``(h_0,)``; None for zeros.
        weights: those of all layers, in the order of ``nn.LSTM``.
        options: everything else.

    Returns:
        y, the final states, and c of every step of the last layer or None.

    Raises:
        ValueError, RuntimeError, TypeError: see :func:`fastlstm.functional.lstm`.
    """
    kind, sequences = options.kind, options.sequences
    input, hx, weights = dense(kind, input, hx, weights)
    given = None
    dtype = autocast_dtype(input)
    if dtype:
        if sequences.batch_sizes is not None and kind == "LSTM" and input.is_cpu:
            dtype = _dtype_of_state(input, hx)  # as nn.LSTM, which rounds no packed sequence
        given = input, hx
        input, hx, _ = cast(dtype, input, hx, ())
    whole = Input.of(input, hx, options)
    x = whole.x
    packed = sequences.batch_sizes is not None
    check_features(kind, input, weights, RuntimeError if packed or dtype else ValueError, dtype)
    spec = check_weights(weights, x, options, dtype)
    specs: tuple[LayerSpec, ...] = (spec,)
    if options.num_layers > 1:  # all others are alike
        specs = spec, spec._replace(input_size=spec.directions * spec.state_size)
    extent = Size(options.num_layers, whole.steps, whole.batch, weights)
    backend = select(x, specs, sequences, options.return_cell_states, extent)
    check_steps(kind, whole.steps, input)
    if hx is not None:
        if whole.unbatched:
            hx = check_unbatched(kind, hx)
        rows = options.num_layers * spec.directions
        shapes = (rows, whole.batch, spec.state_size), (rows, whole.batch, spec.hidden_size)
        check_states(kind, hx, shapes, packed)
        check_like(hx, x)
    if sequences.lengths is not None or sequences.reset is not None:
        options = options._replace(sequences=_check_sequences(options, x, whole.unbatched))
    if automatic.CHECKED:
        _examine(backend, specs, whole, hx, weights, options)
    if is_whole(backend):
        if sequences.lengths is not None:  # where the caller has them: a copy would wait for x
            lengths = sequences.lengths.to(torch.int64).view(whole.batch)
            sequences = sequences._replace(lengths=lengths)
        y, final = _compute_whole(backend, specs, whole, hx, weights, options, sequences, given)
        c_all = None
    elif dtype:
        _, _, weights = cast(dtype, x, None, weights)
        with switched_off(x):
            y, final, c_all = walk(backend, specs, whole.for_kernels(), hx, weights, options)
    else:
        y, final, c_all = walk(backend, specs, whole.for_kernels(), hx, weights, options)
    if whole.unbatched:
        final = tuple(state.squeeze(1) for state in final)
    return whole.undo(y), final, None if c_all is None else whole.undo(c_all)


def _dtype_of_state(input: Tensor, hx: Sequence[Tensor] | None) -> torch.dtype:
    """The dtype that a state has under autocast where that does not round it at every step."""
    return input.dtype if hx is None else torch.promote_types(hx[0].dtype, hx[1].dtype)


def _check_sequences(options: Options, x: Tensor, unbatched: bool) -> Sequences:
    """Check the lengths and resets of a call; return them on the device of x."""
    kind, (sizes, lengths, reset) = options.kind, options.sequences
    if sizes is not None:
        raise ValueError(f"{kind}: lengths and reset have no meaning for packed input")
    if lengths is not None:
        lengths = check_lengths(kind, lengths, x, not unbatched)
    if reset is not None:
        if options.bidirectional:
            raise ValueError(f"{kind}: reset has no meaning for a bidirectional {kind}")
        reset = check_reset(kind, reset, x, not unbatched, options.batch_first)
    return Sequences(None, lengths, reset)


def calls_of(backend: Backend, specs: Sequence[LayerSpec], options: Options) -> tuple[Call, ...]:
    """Return the call of each layer, but for what is random.

    Args:
        backend: computes them.
        specs: the layers, or the first two: all others are alike.
        options: everything else.
    """
    L = options.num_layers
    short = (
        not (options.recompute or options.return_cell_states)
        and not torch.compiler.is_compiling()
        and backend.takes_plain(specs[0], options.sequences)
    )
    return tuple(
        [
            Call(
                backend.name,
                specs[min(k, 1)],
                options.sequences,
                NO_NOISE,
                options.return_cell_states and k == L - 1,
                options.recompute,
                options.caches[k] if options.caches else None,
                short=short,
            )
            for k in range(L)
        ]
    )


def walk(
    backend: Backend,
    specs: Sequence[LayerSpec],
    whole: Input,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    options: Options,
    calls: Sequence[Call] = (),
) -> tuple[Tensor, Final, Tensor | None]:
    """Compute one layer after the other.

    Args:
        backend: computes them.
        specs: the layers, or the first two: all others are alike.
        whole: the input.
        hx: the states, or None.
        weights: those of all layers.
        options: everything else.
        calls: what :func:`calls_of` makes of these, if it has been asked before.

    Returns:
        As :func:`run_stack`, but y and c as layers have them.
    """
    L, x = options.num_layers, whole.x
    each = len(weights) // L
    if hx is None and options.sequences.batch_sizes is not None and _needs_batch():
        hx = _zeros(specs[0], whole, options)
    if hx is None:
        states: Sequence[State] = (State(),) * L
    elif L == 1:
        states = (State(*hx),)
    else:
        split = (state.split(options.directions) for state in hx)
        states = [State(*layer) for layer in zip(*split, strict=True)]
    finals = []
    c_all = None
    for k, call in enumerate(calls or calls_of(backend, specs, options)):
        if k and options.dropout:
            x = torch.dropout(x, options.dropout, True)
        own = weights if L == 1 else weights[k * each : (k + 1) * each]
        if options.random_zoneout or options.recurrent_dropout or options.weight_dropout:
            noise, own = _draw(call.spec, x, whole.batch, own, options)
            call = call._replace(noise=noise)
        x, final, c_all = _compute(backend, call, x, states[k], own)
        finals.append(final)
    if L == 1:
        autograd.part(x, finals[0])
        return x, finals[0], c_all
    return x, tuple(map(torch.cat, zip(*finals, strict=True))), c_all


examine: Any = None  # what fastlstm.proof.checking puts here


def _examine(
    backend: Backend,
    specs: Sequence[LayerSpec],
    whole: Input,
    hx: Any,
    weights: Sequence[Tensor],
    options: Options,
) -> None:
    """Compare a call with what others make of it, unless chance or somebody else has a part."""
    chance = options.recurrent_dropout or options.weight_dropout or options.random_zoneout
    if chance or options.dropout or not is_whole(TORCH):
        return

    def compute(backend: Backend, x: Tensor, hx: Any, weights: Sequence[Tensor]) -> Any:
        plain = options._replace(caches=None)
        return walk(backend, specs, whole._replace(x=x), hx, weights, plain)

    dtype, x = whole.x.dtype, whole.x
    with switched_off(x):
        tensors = x, hx, [w.to(dtype) for w in weights]
        every = options.sequences, options.return_cell_states
        examine(backend, compute, tensors, specs, *every)


def _compute_whole(
    backend: Backend,
    specs: Sequence[LayerSpec],
    whole: Input,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    options: Options,
    sequences: Sequences,
    given: tuple[Tensor, Any] | None,
) -> tuple[Tensor, Final]:
    """Compute all layers in one call of the backend.

    Args:
        sequences: as the caller passed them.
        given: under autocast, the input and hx as they were; the backend casts them itself.
    """
    dtype = whole.x.dtype

    def again(x: Tensor, hx: Any, weights: Sequence[Tensor]) -> tuple[Tensor, Final, Any]:
        """Compute the same with every derivative."""
        x, hx, weights = cast(dtype, x, hx, weights)
        plain = options._replace(dropout=0.0, weight_dropout=0.0)
        with switched_off(x):
            return walk(REFERENCE, specs, whole._replace(x=x), hx, weights, plain)

    x = whole.x
    if given is not None:
        x, hx = Input.of(*given, options).x, given[1]
        if hx is not None and whole.unbatched:
            hx = check_unbatched(options.kind, hx)
    options = options._replace(sequences=sequences)
    return compute_whole(backend, specs[0], x, hx, weights, options, again)


def _needs_batch() -> bool:
    """Whether the operator of a layer has to be told B of packed rows, which is a value there."""
    return is_recorded() and tracing() is None


def _zeros(spec: LayerSpec, whole: Input, options: Options) -> tuple[Tensor, ...]:
    """The states that None stands for."""
    rows = options.num_layers * spec.directions, whole.batch
    h_0 = whole.x.new_zeros(*rows, spec.state_size)
    return (h_0, whole.x.new_zeros(*rows, spec.hidden_size)) if spec.is_lstm else (h_0,)


def _compute(
    backend: Backend, call: Call, x: Tensor, state: State, weights: Sequence[Tensor]
) -> tuple[Tensor, Final, Tensor | None]:
    """Compute one layer: y, the final states, and c of every step or None."""
    spec = call.spec
    if backend.layer is not None:
        y, final, c_all = backend.layer(
            spec, x, weights, state, call.sequences, call.noise, call.cell_states
        )
        return y, final if spec.is_lstm else final[:1], c_all
    outputs = autograd.run(call, (x, *state, *weights))
    if not spec.is_lstm:
        return outputs[0], (outputs[1],), None
    c_all = None
    if call.cell_states:
        c_all = outputs[3] if outputs[3].dtype is x.dtype else outputs[3].to(x.dtype)
    return outputs[0], (outputs[1], outputs[2]), c_all


def _draw(
    spec: LayerSpec, x: Tensor, batch: int, weights: Sequence[Tensor], options: Options
) -> tuple[Noise, Sequence[Tensor]]:
    """Draw what is random in one layer in training; return it, and its weights after dropout."""
    seed = h_mask = None
    if any(spec.zoneout):
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    if options.recurrent_dropout:
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        ones = x.new_ones(spec.directions, batch, spec.state_size, dtype=wide)
        h_mask = torch.dropout(ones, options.recurrent_dropout, True)
    if options.weight_dropout:
        weights, each = list(weights), spec.weights_per_direction
        weights[1::each] = [
            torch.dropout(w, options.weight_dropout, True) for w in weights[1::each]
        ]
    return Noise(h_mask, seed), weights


_CELL = Options("LSTM")


def run_cell(
    input: Tensor, hx: tuple[Tensor, Tensor] | None, weights: Sequence[Tensor], cache: Any
) -> tuple[Tensor, Tensor]:
    """Check a step of an LSTM cell and compute it; see :func:`fastlstm.functional.lstm_cell`."""
    if hx is not None and not is_pair(hx):
        hx = check_pair(hx, None)
    input, hx, weights = dense("LSTMCell", input, hx, weights)
    dims = input.dim()
    if dims not in (1, 2):
        raise ValueError(f"LSTMCell: expected input to be 1-D or 2-D, got {size(input)}")
    autocast, given = autocast_dtype(input), (input, hx, weights)
    if autocast:
        input, hx, weights = cast(_dtype_of_state(input, hx), input, hx, weights)
    check_features("LSTMCell", input, weights)
    spec = check_weights(weights, input, _CELL)
    hidden = spec.hidden_size
    shape = (*input.shape[:-1], hidden)
    batch = shape[0] if dims == 2 else 1
    backend = select(input, (spec,), size=Size(0, 1, batch, weights))
    state = State()
    if hx is not None:
        h0, c0 = hx
        check_cell_state(h0, c0, shape)
        check_like((h0, c0), input)
        state = State(h0.view(1, batch, hidden), c0.view(1, batch, hidden))
    if automatic.CHECKED:
        whole = Input(input.view(1, batch, input.shape[-1]), 1, batch, False, False)
        states = None if hx is None else (state.h, state.c)
        _examine(backend, (spec,), whole, states, weights, _CELL)
    if is_whole(backend):  # it casts for itself
        return _whole_cell(backend, *given)
    x = input.view(1, batch, input.shape[-1])
    call = Call(backend.name, spec, DENSE, NO_NOISE, cache=cache)
    if autocast:
        with switched_off(x):
            _, (h, c), _ = _compute(backend, call, x, state, weights)
    else:
        _, (h, c), _ = _compute(backend, call, x, state, weights)
    return h.reshape(shape), c.reshape(shape)


def _whole_cell(
    backend: Backend, x: Tensor, hx: Any, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Take a step by the cell of a backend."""
    if x.dim() == 2:
        return backend.cell(x, hx, weights)
    states = None if hx is None else tuple(state.unsqueeze(0) for state in hx)
    h, c = backend.cell(x.unsqueeze(0), states, weights)
    return h.squeeze(0), c.squeeze(0)
