"""The short way through plain layers: what is usual is checked at a glance, the rest is left."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.overrides import has_torch_function

from fastlstm.automatic import first_obstacle
from fastlstm.kernels.base import Backend
from fastlstm.kernels.reference import REFERENCE
from fastlstm.layer.input import Input
from fastlstm.layer.options import Options
from fastlstm.layer.stack import Final, walk
from fastlstm.layer.whole import compute_whole
from fastlstm.spec import LayerSpec

__all__ = ["run_plain"]


def run_plain(
    backend: Backend,
    x: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    specs: Sequence[LayerSpec],
    options: Options,
) -> tuple[Tensor, Final] | None:
    """Compute plain layers on a backend that :func:`.whole.plain_backend` returned, for latency.

    Args:
        backend: it.
        x: ``[T, B, I]``, or ``[B, T, I]`` with batch_first.
        hx: the states, or None.
        weights: those of all layers.
        specs: the layers.
        options: everything else; dense rows, and no option that nn.LSTM lacks.

    Returns:
        y and the final states; None for a call that :func:`.stack.run_stack` has to look at, or
        that the backend refused, to find a better message.
    """
    if x.is_nested or x.dim() != 3 or has_torch_function((x, *weights)):
        return None
    if options.batch_first:
        x = x.transpose(0, 1)
    spec = specs[0]
    steps, batch, features = x.shape
    if features != spec.input_size or not steps or not _are_like(x, weights):
        return None
    if len(weights) != len(specs) * spec.directions * spec.weights_per_direction:
        return None
    if hx is not None:
        if type(hx) is not tuple or len(hx) != 1 + spec.is_lstm or not _are_like(x, hx):
            return None
        rows = options.num_layers * spec.directions
        shapes = (rows, batch, spec.state_size), (rows, batch, spec.hidden_size)
        for state, shape in zip(hx, shapes, strict=False):
            if type(state) is not Tensor or state.shape != shape:
                return None
    # Operators check the sizes of weights, PyTorch's operations may expand them instead.
    if backend.layer is not None or first_obstacle(backend, x, specs) is not None:
        return None

    def compute(
        backend: Backend, x: Tensor, hx: Any, weights: Sequence[Tensor]
    ) -> tuple[Tensor, Final, Any]:
        return walk(backend, specs, Input(x, steps, batch, False, False), hx, weights, options)

    try:
        if backend.stack is None:
            y, final, _ = compute(backend, x, hx, weights)
        else:
            again = partial(compute, REFERENCE)
            y, final = compute_whole(backend, spec, x, hx, weights, options, again)
    except (RuntimeError, ValueError):
        return None
    return y.transpose(0, 1) if options.batch_first else y, final


def _are_like(x: Tensor, tensors: Sequence[Any]) -> bool:
    """Whether all of them are of the dtype of x, and on its device."""
    dtype, device = x.dtype, x.device
    return all(
        [isinstance(t, Tensor) and t.dtype is dtype and t.device == device for t in tensors]
    )
