"""``fastlstm.RNN``: what ``torch.nn.RNN`` is, and more."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.modules import rnn as torch_rnn  # torch.nn.RNN may be replaced by ours
from torch.nn.utils.rnn import PackedSequence

from fastlstm import convert
from fastlstm.functional import rnn
from fastlstm.layer.checks import check_input, check_nonlinearity
from fastlstm.modules.base import Layers, by_sample, is_by_sample, tensors
from fastlstm.modules.stand_in import drawn

__all__ = ["RNN"]

_MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
_NONLINEARITY = {mode: name for name, mode in _MODES.items()}


class RNN(Layers):
    """``torch.nn.RNN``: the same arguments, parameters, initial values and results, and more.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: L, each layer reads the outputs of the one before.
        nonlinearity: "tanh" or "relu".
        bias: whether there are biases.
        batch_first: input and output are ``[B, T, ...]`` instead of ``[T, B, ...]``.
        dropout: probability of zeroing an output of any layer but the last, in training.
        bidirectional: D is 2 if True, else 1.
        device: of the parameters.
        dtype: of the parameters; float32, float64, bfloat16 or float16.

    Raises:
        TypeError, ValueError: as ``nn.RNN``.
    """

    torch_class = torch_rnn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if "proj_size" in options:
            raise ValueError("RNN: proj_size is an argument of LSTM, an RNN has no projection")
        if options:
            raise TypeError(f"RNN: unexpected argument {', '.join(options)}")
        check_nonlinearity(nonlinearity)
        super().__init__(
            _MODES[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
        )
        self.nonlinearity = nonlinearity

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.nonlinearity = _NONLINEARITY[self.mode]  # nn.RNN once kept only mode

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> Any:
        """Run the sequence; as ``nn.RNN``, and with the keywords that it lacks.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, ``[T, I]`` without a batch,
                or a ``PackedSequence``, sorted or not.
            hx: ``h_0 [L*D, B, H]``, without B for input without a batch; None for zeros.
            lengths: integers ``[B]`` in 0..T, on any device, in any order; output is 0 from there
                on.
            reset: bool ``[T, B]``, ``[B, T]`` with ``batch_first``; True zeroes that row's state
                before the step.

        Returns:
            ``(y, h_n)``: y is ``[T, B, D*H]``, or ``[B, T, D*H]``, ``[T, D*H]`` or a
            ``PackedSequence``, as input; h_n is shaped as hx.

        Raises:
            ValueError, RuntimeError, TypeError: see :func:`fastlstm.functional.rnn`.
        """
        if hx is not None or not isinstance(input, Tensor):
            node = drawn(self, (input, hx), {"lengths": lengths, "reset": reset})
            if node is not None:
                return node
        weights = tensors(self, self._names)
        if lengths is None and reset is None:
            if is_by_sample(weights):
                return by_sample(self, input, hx)
            if isinstance(input, Tensor):
                plain = self._run_plain(input, None if hx is None else (hx,), weights)
                if plain is not None:
                    return plain[0], plain[1][0]
        settings = self._settings()
        settings["nonlinearity"] = _NONLINEARITY[self.mode]
        if isinstance(input, Tensor):
            return rnn(
                input,
                hx,
                weights,
                batch_first=self.batch_first,
                lengths=lengths,
                reset=reset,
                **settings,
            )
        check_input("RNN", input)
        states = self._unpack(
            input, None if hx is None else (hx,), (self.hidden_size,), (lengths, reset)
        )
        rows, batch_sizes, order, restore = input
        h0 = None if states is None else states[0]
        y, h_n = rnn(rows, h0, weights, batch_sizes=batch_sizes, **settings)
        if restore is not None:
            h_n = h_n.index_select(1, restore)
        return PackedSequence(y, batch_sizes, order, restore), h_n

    @classmethod
    def from_torch(cls, source: nn.RNN) -> RNN:
        """A module that shares the parameters of an ``nn.RNN``; see :mod:`fastlstm.convert`."""
        return convert.convert(source, torch_rnn.RNN, cls)

    def to_torch(self) -> nn.RNN:
        """An ``nn.RNN`` that shares these parameters; see :mod:`fastlstm.convert`."""
        return convert.convert(self, RNN, torch_rnn.RNN)
