"""The operators of a layer, for what records calls: compiled code, exports, transforms.

PyTorch's kernels keep for backward what only its own graph can hold, so the backward operator
computes the layer once more, with a graph. :mod:`fastlstm.kernels.operators` has the contract.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastlstm.kernels.operators import add_kernel, define, plainly
from fastlstm.spec import LayerSpec, Sequences, State

from . import calls

__all__ = ["OPERATORS"]

OPERATORS = define("torch")


@plainly
def _lstm_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    c_all: Tensor | None,
    gates: Tensor | None,
    cache: Tensor | None,
    **options: Any,
) -> None:
    """Write the results of a layer of an LSTM; c_all, which backward does not read, stays."""
    spec = LayerSpec.of("LSTM", weights, directions)
    rows = Sequences(batch_sizes, lengths, reset)
    _write((y, h_n, c_n), _layer(spec, x, State(h0, c0), weights, rows))


@plainly
def _rnn_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    relu: bool,
    y: Tensor,
    h_n: Tensor,
    cache: Tensor | None,
) -> None:
    """Write the results of a layer of an ``nn.RNN``."""
    spec = LayerSpec.of(_mode(relu), weights, directions)
    rows = Sequences(batch_sizes, lengths, reset)
    _write((y, h_n), _layer(spec, x, State(h0), weights, rows))


@plainly
def _lstm_bwd(
    x: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    c_all: Tensor,
    gates: Tensor | None,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    dx: Tensor | None,
    dh0: Tensor | None,
    dc0: Tensor | None,
    dweights: Sequence[Tensor],
    cache: Tensor | None,
    **options: Any,
) -> None:
    """Write the gradients of a layer of an LSTM."""
    spec = LayerSpec.of("LSTM", weights, directions)
    rows = Sequences(batch_sizes, lengths, reset)
    places = (dx, dh0, dc0), dweights
    _pull_back(spec, (x, h0, c0), weights, rows, (dy, dh_n, dc_n), places)


@plainly
def _rnn_bwd(
    x: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    relu: bool,
    y: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dx: Tensor | None,
    dh0: Tensor | None,
    dweights: Sequence[Tensor],
    cache: Tensor | None,
) -> None:
    """Write the gradients of a layer of an ``nn.RNN``."""
    spec = LayerSpec.of(_mode(relu), weights, directions)
    rows = Sequences(batch_sizes, lengths, reset)
    _pull_back(spec, (x, h0), weights, rows, (dy, dh_n), ((dx, dh0), dweights))


def _mode(relu: bool) -> str:
    return "RNN_RELU" if relu else "RNN_TANH"


def _layer(
    spec: LayerSpec, x: Tensor, state: State, weights: Sequence[Tensor], sequences: Sequences
) -> tuple[Tensor, ...]:
    """Return y and the final states of one layer."""
    sizes = sequences.batch_sizes
    batch = x.shape[1] if sizes is None else int(sizes[0])
    starts = calls.zeros(spec, 1, x, batch)
    hx = [zero if h is None else h for h, zero in zip(state, starts, strict=False)]
    y, final = calls.stack(spec, 1, x, hx, weights, sequences, 0.0, False, None)
    return y, *final


def _pull_back(
    spec: LayerSpec,
    data: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    sequences: Sequences,
    incoming: Sequence[Tensor | None],
    places: tuple[Sequence[Tensor | None], Sequence[Tensor]],
) -> None:
    """Compute a layer once more, with a graph, and write the gradients of its inputs.

    Args:
        spec: the layer.
        data: x and the initial states.
        weights: D groups, see :class:`fastlstm.spec.Weights`.
        sequences: which steps there are.
        incoming: the gradients of the results.
        places: where to write the gradients of data, and of the weights: one for both biases.
    """
    of_data, of_weights = places
    with _graph():
        own = [_leaf(t, place is not None) for t, place in zip(data, of_data, strict=True)]
        second_bias = range(3, len(weights), spec.weights_per_direction) if spec.bias else ()
        ours = [_leaf(w, bool(of_weights) and k not in second_bias) for k, w in enumerate(weights)]
        x, *state = own
        found = _layer(spec, x, State(*state), ours, sequences)
        wanted = [t for t in (*own, *ours) if t is not None and t.requires_grad]
        pairs = [(t, g) for t, g in zip(found, incoming, strict=True) if g is not None]
        if pairs:
            results, arriving = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(
                results, wanted, arriving, allow_unused=True, materialize_grads=True
            )
        else:
            gradients = tuple(map(torch.zeros_like, wanted))
    _write([place for place in (*of_data, *of_weights) if place is not None], gradients)


def _leaf(t: Any, wanted: bool) -> Any:
    return None if t is None else t.detach().requires_grad_(wanted)


def _write(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


_AUTOGRAD = [
    getattr(torch._C.DispatchKey, name)
    for name in dir(torch._C.DispatchKey)
    if name.startswith("Autograd")
]


@contextmanager
def _graph() -> Iterator[None]:
    """Let autograd see what happens inside an operator, where it is told to look away."""
    c: Any = torch._C
    with c._PreserveDispatchKeyGuard(), torch.enable_grad():
        for key in _AUTOGRAD:
            c._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield


for _operator, _kernel in zip(OPERATORS, (_lstm_fwd, _lstm_bwd, _rnn_fwd, _rnn_bwd), strict=True):
    add_kernel(_operator.name(), _kernel, "CompositeExplicitAutograd")
