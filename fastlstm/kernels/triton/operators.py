"""The operators of the Triton backend, where kernels are compiled when they are called.

:mod:`fastlstm.kernels.operators` has their contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import Tensor

from fastlstm.kernels.operators import add_kernel, contiguous, plainly, read_cell_options, zero
from fastlstm.kernels.products import gradient_groups, groups_then, weight_groups
from fastlstm.kernels.rows import layout
from fastlstm.spec import (
    NO_NOISE,
    Gradients,
    Incoming,
    LayerSpec,
    Outputs,
    Saved,
    Sequences,
    State,
)

from .backward import launch_lstm_bwd
from .call import Call
from .config import obstacle
from .forward import launch_lstm_fwd
from .launch import INTERPRETED
from .rnn_backward import launch_rnn_bwd
from .rnn_forward import launch_rnn_fwd

__all__ = ["lstm_bwd", "lstm_fwd", "register_kernels", "rnn_bwd", "rnn_fwd"]

_DISPATCH_KEYS = ["CUDA", "CPU"] if INTERPRETED else ["CUDA"]


@plainly
def lstm_fwd(
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
    """Write the outputs of one layer."""
    rows = layout(x, Sequences(batch_sizes, lengths, reset))
    if rows.count == 0:
        return
    spec, noise = read_cell_options(weights, directions, **options)
    state = State(contiguous(h0), contiguous(c0))
    call = Call(spec, x, weight_groups(weights, spec), state, rows, noise)
    _refuse(call)
    launch_lstm_fwd(call, Outputs(y, h_n, c_n, c_all, gates))


@plainly
def lstm_bwd(
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
    """Write the gradients of one layer."""
    rows = layout(x, Sequences(batch_sizes, lengths, reset))
    if rows.count == 0:
        zero(dx, dh0, dc0, *dweights)
        return
    spec, noise = read_cell_options(weights, directions, **options)
    groups = weight_groups(weights, spec)
    call = Call(spec, x, groups, State(contiguous(h0), contiguous(c0)), rows, noise)
    _refuse(call)
    launch_lstm_bwd(
        call,
        groups_then(cache, groups, spec),
        Saved(y, c_all, gates),
        Incoming(dy, contiguous(dh_n), contiguous(dc_n), dc_all),
        Gradients(dx, dh0, dc0, gradient_groups(dweights, groups)),
    )


@plainly
def rnn_fwd(
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
    """Write the outputs of one layer of nn.RNN."""
    rows = layout(x, Sequences(batch_sizes, lengths, reset))
    if rows.count == 0:
        return
    spec = _rnn_spec(weights, directions, relu)
    groups = weight_groups(weights, spec)
    call = Call(spec, x, groups, State(contiguous(h0)), rows, NO_NOISE)
    launch_rnn_fwd(call, Outputs(y, h_n))


@plainly
def rnn_bwd(
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
    """Write the gradients of one layer of nn.RNN."""
    rows = layout(x, Sequences(batch_sizes, lengths, reset))
    if rows.count == 0:
        zero(dx, dh0, *dweights)
        return
    spec = _rnn_spec(weights, directions, relu)
    groups = weight_groups(weights, spec)
    call = Call(spec, x, groups, State(contiguous(h0)), rows, NO_NOISE)
    launch_rnn_bwd(
        call,
        Saved(y),
        Incoming(dy, contiguous(dh_n)),
        Gradients(dx, dh0, weights=gradient_groups(dweights, groups)),
    )


def _rnn_spec(weights: Sequence[Tensor], directions: int, relu: bool) -> LayerSpec:
    return LayerSpec.of("RNN_RELU" if relu else "RNN_TANH", weights, directions)


def _refuse(call: Call) -> None:
    """Raise ValueError for a cell that the kernels cannot compute."""
    if not call.spec.is_extended:
        return
    error = obstacle(call.problem, call.device)
    if error:
        raise ValueError(f"the triton kernels cannot compute this layer: {error}")


def register_kernels(ahead: bool) -> None:
    """Let these functions compute the operators, on the GPU or in the interpreter.

    Args:
        ahead: whether kernels were compiled ahead, and these compute what those do not.
    """
    for function in (lstm_fwd, lstm_bwd, rnn_fwd, rnn_bwd):
        instead = ahead and function in (lstm_fwd, lstm_bwd)
        ending = "triton_jit" if instead else "triton"
        for key in _DISPATCH_KEYS:
            add_kernel(
                f"fastlstm::{function.__name__}_{ending}",
                _telling(function) if instead else function,
                key,
            )


def _telling(function: Callable[..., None]) -> Callable[..., None]:
    """Tell C++, which calls it, of what it raises: only that it failed gets there by itself."""
    from .ahead.library import failed

    @wraps(function)
    def told(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except Exception as error:
            failed(str(error))
            raise

    return told
