"""``fastlstm.LSTMCell``: what ``torch.nn.LSTMCell`` is."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import rnn as torch_rnn  # torch.nn.LSTMCell may be replaced by ours

from fastlstm import convert
from fastlstm.backends import choice
from fastlstm.functional import State, lstm_cell
from fastlstm.kernels.base import Cache
from fastlstm.layer.fast_path import Layers, fast_backend, infer
from fastlstm.layer.steps import Steps
from fastlstm.layer.taken import Taken
from fastlstm.layer.whole import plain_backend, plain_cell
from fastlstm.modules.base import tensors
from fastlstm.modules.stand_in import StandIn, drawn
from fastlstm.spec import LayerSpec

__all__ = ["LSTMCell"]

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class LSTMCell(StandIn, nn.RNNCellBase):
    """``torch.nn.LSTMCell``: one step, with the same arguments, parameters and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether the gates have biases.
        device: of the parameters.
        dtype: of the parameters; float32, float64, bfloat16 or float16.
    """

    torch_class = torch_rnn.LSTMCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)
        self._cache = Cache()

    def specs(self) -> tuple[LayerSpec]:
        """Describe the cell as a layer."""
        return (LayerSpec("LSTM", self.input_size, self.hidden_size, bias=self.bias),)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Take one step.

        Args:
            input: ``[B, I]``, or ``[I]`` without a batch.
            hx: ``(h [B, H], c [B, H])``, without B for input without a batch; None for zeros.

        Returns:
            The next ``(h, c)``, shaped as hx.

        Raises:
            ValueError, RuntimeError: see :func:`fastlstm.functional.lstm_cell`.
        """
        weights = tensors(self, _NAMES if self.bias else _NAMES[:2])
        is_tensor = isinstance(input, Tensor)
        if is_tensor and input.dim() == 2:
            result = self._step(input, hx, weights)
            if result is not None:
                return result
        if not is_tensor or hx is not None:
            node = drawn(self, (input, hx))
            if node is not None:
                return node
        if is_tensor and input.dim() == 2 and not torch.compiler.is_compiling():
            whole = plain_backend(input, weights, self._taken)
            if whole is not None and whole.cell is not None:
                result = plain_cell(whole, input, hx, weights)
                if result is not None:
                    return result
        # Compiled code would depend on what is in the cache, and makes no use of it.
        cache = None if torch.compiler.is_compiling() else self._cache
        return lstm_cell(input, hx, weights, cache=cache)

    def _step(self, x: Tensor, hx: Any, weights: tuple[Tensor, ...]) -> State | None:
        """A plain step on the CPU, for latency; None for what `lstm_cell` has to look at."""
        backend = fast_backend(x)
        if backend is None or not backend.lstm_cell_infer:
            return None
        grad, record = torch.is_grad_enabled(), choice.asks
        if record and self._taken.backend(record, backend, x, weights, grad) is not backend:
            return None
        if grad:
            return self._steps.run(backend, x, hx, weights)
        return infer(backend, x, hx, weights, self._layers)

    @cached_property
    def _layers(self) -> Layers:
        return Layers.of(self.specs(), [self._cache], cell=True)

    @property
    def _steps(self) -> Steps:
        """The same for all threads, which may ask for it at the same time for the first time."""
        found: Steps | None = self.__dict__.get("_steps")
        return found or self.__dict__.setdefault("_steps", Steps(self.specs()[0], self._cache))

    @cached_property
    def _taken(self) -> Taken:
        return Taken(self.specs(), 0)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Convert or move the parameters; what was kept of the old ones goes."""
        self._cache.clear()
        self.__dict__.pop("_steps", None)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_cache", None)
        state.pop("_layers", None)
        state.pop("_steps", None)
        state.pop("_taken", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cache = Cache()

    @classmethod
    def from_torch(cls, source: nn.LSTMCell) -> LSTMCell:
        """A cell that shares the parameters of an ``nn.LSTMCell``; see :mod:`fastlstm.convert`."""
        return convert.convert(source, torch_rnn.LSTMCell, cls)

    def to_torch(self) -> nn.LSTMCell:
        """An ``nn.LSTMCell`` that shares these parameters; see :mod:`fastlstm.convert`."""
        return convert.convert(self, LSTMCell, torch_rnn.LSTMCell)
