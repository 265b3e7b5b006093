"""The short way through plain layers: what is usual is checked at a glance, the rest is left."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import has_torch_function

from fastlstm.automatic import first_obstacle
from fastlstm.kernels.base import Backend
from fastlstm.kernels.reference import REFERENCE
from fastlstm.layer.call import Call
from fastlstm.layer.input import Input, batch_major
from fastlstm.layer.options import Options
from fastlstm.layer.stack import Final, calls_of, walk
from fastlstm.layer.whole import compute_whole
from fastlstm.spec import LayerSpec

__all__ = ["Plain", "run_plain"]


class Plain:
    """What :func:`run_plain` has to know of a module, as long as its settings stay.

    Args:
        specs: the layers, none of which is extended.
        options: everything else; dense rows, and no option that nn.LSTM lacks.
    """

    def __init__(self, specs: Sequence[LayerSpec], options: Options) -> None:
        self.specs, self.options = specs, options
        self.count = len(specs) * specs[0].directions * specs[0].weights_per_direction
        self._calls: dict[str, tuple[Call, ...]] = {}

    def calls(self, backend: Backend) -> tuple[Call, ...]:
        """Return the call of each layer."""
        found = self._calls.get(backend.name)
        if found is None:
            found = self._calls[backend.name] = calls_of(backend, self.specs, self.options)
        return found


def run_plain(
    backend: Backend,
    x: Tensor,
    hx: tuple[Tensor, ...] | None,
    weights: Sequence[Tensor],
    plain: Plain,
) -> tuple[Tensor, Final] | None:
    """Compute plain layers on a backend that :func:`.whole.plain_backend` returned, for latency.

    Args:
        backend: it.
        x: ``[T, B, I]``, or ``[B, T, I]`` with batch_first.
        hx: the states, or None.
        weights: those of all layers.
        plain: everything else.

    Returns:
        y and the final states; None for a call that :func:`.stack.run_stack` has to look at, or
        that the backend refused, to find a better message.
    """
    if x.is_nested or x.dim() != 3 or has_torch_function((x, *weights)):
        return None
    specs, options, spec = plain.specs, plain.options, plain.specs[0]
    if options.batch_first:
        x = x.transpose(0, 1)
    steps, batch, features = x.shape
    if features != spec.input_size or not steps or not _are_like(x, weights):
        return None
    if len(weights) != plain.count:
        return None
    # The weights say what the layer is, not what its attributes have become.
    rows_of_w = (4 if spec.is_lstm else 1) * spec.hidden_size
    if weights[1].shape != (rows_of_w, spec.state_size):
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

    whole = Input(x, steps, batch, False, options.batch_first)
    try:
        if backend.stack is None:
            whole, calls = whole.for_kernels(), plain.calls(backend)
            y, final, _ = walk(backend, specs, whole, hx, weights, options, calls)
        else:
            again = partial(_by_reference, specs, whole, options)
            y, final = compute_whole(backend, spec, x, hx, weights, options, again)
    except (RuntimeError, ValueError):
        return None
    return batch_major(y) if options.batch_first else y, final


def _by_reference(
    specs: Sequence[LayerSpec],
    whole: Input,
    options: Options,
    x: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Final, Any]:
    return walk(REFERENCE, specs, whole._replace(x=x), hx, weights, options)


_ORDINARY = frozenset({Tensor, nn.Parameter})  # FakeTensor, for one, has nothing to compute with


def _are_like(x: Tensor, tensors: Sequence[Any]) -> bool:
    """Whether all of them are ordinary tensors of the dtype of x, on its device."""
    dtype, device = x.dtype, x.device
    return all([type(t) in _ORDINARY and t.dtype is dtype and t.device == device for t in tensors])
