"""Modules to put in the place of ``torch.nn.LSTM`` and ``torch.nn.LSTMCell``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlstm import convert
from fastlstm.autograd import infer, lstm_layer
from fastlstm.backends import select
from fastlstm.checks import check_pair, check_state
from fastlstm.functional import State, is_plain, lstm, lstm_cell

__all__ = ["LSTM", "LSTMCell"]

_CELL_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class LSTM(nn.RNNBase):
    """``torch.nn.LSTM``: the same arguments, parameters, initial values and results.

    It subclasses ``nn.RNNBase`` and not ``nn.LSTM`` because ``torch.compile`` refuses the latter.
    The weights are read at every call, so parametrizations, ``weight_norm``,
    ``torch.func.functional_call``, assignments and edits of ``.data`` all take effect.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: L, each layer reads the outputs of the one before.
        bias: whether the gates have biases.
        batch_first: input and output are ``[B, T, ...]`` instead of ``[T, B, ...]``.
        dropout: probability of zeroing an output of any layer but the last, in training.
        bidirectional: D is 2 if True, else 1.
        proj_size: P, features of the output of each direction; 0 for no projection (P = H).
        device: of the parameters.
        dtype: of the parameters; float32, float64, bfloat16 or float16.

    Raises:
        TypeError, ValueError: as ``nn.LSTM``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self._caches: list[dict[Any, Any]] = [{} for _ in range(num_layers)]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        """Run the sequence; as ``nn.LSTM``, and with the keywords that it lacks.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, ``[T, I]`` without a batch,
                or a ``PackedSequence``, sorted or not.
            hx: ``(h_0 [L*D, B, P], c_0 [L*D, B, H])``, without B for input without a batch;
                None for zeros.
            lengths: integers ``[B]`` in 0..T, on any device, in any order; see
                :func:`fastlstm.functional.lstm`.
            reset: bool ``[T, B]``, ``[B, T]`` with ``batch_first``; True zeroes that row's state
                before the step.
            return_cell_states: also return ``c_all [T, B, D*H]``, the last layer's c at every
                step, laid out (or packed) as the output.

        Returns:
            ``(y, (h_n, c_n))`` or ``(y, (h_n, c_n), c_all)``: y is ``[T, B, D*P]``, or
            ``[B, T, D*P]``, ``[T, D*P]`` or a ``PackedSequence``, as input; h_n and c_n are
            shaped as hx. Under autocast all of them have autocast's dtype.

        Raises:
            ValueError, RuntimeError, TypeError: see :func:`fastlstm.functional.lstm`.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None or reset is not None:
                raise ValueError(
                    "LSTM: lengths and reset have no meaning for a PackedSequence: pad the input"
                )
            return self._forward_packed(input, hx, return_cell_states)
        weights = _tensors(self, self._flat_weights_names)
        if (
            self.num_layers == 1
            and not torch.is_grad_enabled()
            and lengths is None
            and reset is None
            and not return_cell_states
            and select(input) is lstm_layer
        ):
            result = self._infer(input, hx, weights)
            if result is not None:
                return result
        return lstm(
            input,
            hx,
            weights,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            lengths=lengths,
            reset=reset,
            return_cell_states=return_cell_states,
            caches=self._caches,
        )

    def _infer(
        self, x: Tensor, hx: State | None, weights: list[Tensor]
    ) -> tuple[Tensor, State] | None:
        """One layer without gradients, for latency; None for what `lstm` should look at first."""
        if x.dim() != 3 or not is_plain(hx):
            return None
        h0, c0 = hx or (None, None)
        batch_first = self.batch_first
        H = self.hidden_size
        sizes = 2 if self.bidirectional else 1, H, self.proj_size or H
        result = infer(
            x.transpose(0, 1) if batch_first else x, weights, h0, c0, sizes, self._caches[0]
        )
        if result is None:
            return None
        y, h_n, c_n = result
        return y.transpose(0, 1) if batch_first else y, (h_n, c_n)

    def _forward_packed(
        self, input: PackedSequence, hx: State | None, return_cell_states: bool
    ) -> Any:
        rows, batch_sizes, order, restore = input
        if hx is not None and order is not None:
            extent = self.num_layers * (2 if self.bidirectional else 1), int(batch_sizes[0])
            h_shape = (*extent, self.proj_size or self.hidden_size)
            h0, c0 = check_pair(hx, 3)
            check_state(h0, c0, h_shape, (*extent, self.hidden_size), packed=True)
            hx = h0.index_select(1, order), c0.index_select(1, order)
        y, (h_n, c_n), *c_all = lstm(
            rows,
            hx,
            _tensors(self, self._flat_weights_names),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            batch_sizes=batch_sizes,
            return_cell_states=return_cell_states,
            caches=self._caches,
        )
        if restore is not None:
            h_n, c_n = h_n.index_select(1, restore), c_n.index_select(1, restore)
        packed = (PackedSequence(t, batch_sizes, order, restore) for t in (y, *c_all))
        return next(packed), (h_n, c_n), *packed

    def flatten_parameters(self) -> None:
        """Do nothing: weights are read where they are, there is no flat copy to keep."""

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_caches", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._caches = [{} for _ in range(self.num_layers)]

    @classmethod
    def from_torch(cls, source: nn.LSTM) -> LSTM:
        """A module that shares the parameters of an ``nn.LSTM``; see :mod:`fastlstm.convert`."""
        return convert.convert(source, nn.LSTM, cls)

    def to_torch(self) -> nn.LSTM:
        """An ``nn.LSTM`` that shares these parameters; see :mod:`fastlstm.convert`."""
        return convert.convert(self, LSTM, nn.LSTM)


class LSTMCell(nn.RNNCellBase):
    """``torch.nn.LSTMCell``: one step, with the same arguments, parameters and results.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether the gates have biases.
        device: of the parameters.
        dtype: of the parameters; float32, float64, bfloat16 or float16.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)
        self._cache: dict[Any, Any] = {}

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
        names = _CELL_NAMES if self.bias else _CELL_NAMES[:2]
        return lstm_cell(input, hx, _tensors(self, names), cache=self._cache)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_cache", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cache = {}

    @classmethod
    def from_torch(cls, source: nn.LSTMCell) -> LSTMCell:
        """A cell that shares the parameters of an ``nn.LSTMCell``; see :mod:`fastlstm.convert`."""
        return convert.convert(source, nn.LSTMCell, cls)

    def to_torch(self) -> nn.LSTMCell:
        """An ``nn.LSTMCell`` that shares these parameters; see :mod:`fastlstm.convert`."""
        return convert.convert(self, LSTMCell, nn.LSTMCell)


def _tensors(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    parameters: dict[str, Any] = module._parameters
    try:  # an attribute takes ten times as long, but knows parametrizations and weight_norm
        return list(map(parameters.__getitem__, names))
    except KeyError:
        return [getattr(module, name) for name in names]
