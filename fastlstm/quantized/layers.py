"""``fastlstm.QuantizedLSTM`` and ``fastlstm.QuantizedRNN``: stacks of layers of small weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlstm import functional
from fastlstm.functional import State
from fastlstm.kernels.onnx import ONNX
from fastlstm.layer.checks import (
    check_input,
    check_lengths,
    check_pair,
    check_reset,
    check_states,
    check_steps,
    check_unbatched,
    is_pair,
    size,
)
from fastlstm.modules import LSTM, RNN
from fastlstm.quantized import onnx
from fastlstm.quantized.base import Quantized
from fastlstm.quantized.direct import infer
from fastlstm.quantized.operators import INFER
from fastlstm.spec import LayerSpec

__all__ = ["QuantizedLSTM", "QuantizedRNN"]


class _Layers(Quantized):
    """What both stacks share: their arguments, and a call."""

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        bidirectional: bool,
        proj_size: int,
        dtype: str,
    ) -> None:
        self.__dict__.update(
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            batch_first=batch_first,
            bidirectional=bidirectional,
            proj_size=proj_size,
        )
        first = LayerSpec(mode, input_size, hidden_size, proj_size, 1 + bidirectional, bias)
        super().__init__(dtype, mode, bias, self._stack(first))

    input_size: int
    hidden_size: int
    num_layers: int
    batch_first: bool
    bidirectional: bool
    proj_size: int

    def _stack(self, first: LayerSpec) -> tuple[LayerSpec, ...]:
        deeper = first._replace(input_size=first.directions * first.state_size)
        return first, *(deeper,) * (self.num_layers - 1)

    def specs(self) -> tuple[LayerSpec, ...]:
        """Return what each layer is."""
        sizes = self.input_size, self.hidden_size, self.proj_size, 1 + self.bidirectional
        return self._stack(LayerSpec(self.mode, *sizes, self.bias))

    def extra_repr(self) -> str:
        """The arguments that are not at their defaults."""
        shown = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "bidirectional": False,
            "proj_size": 0,
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                shown += f", {name}={getattr(self, name)}"
        return f"{shown}, dtype={self.dtype}"

    def _call(
        self, input: Any, states: Sequence[Tensor] | None, lengths: Any, reset: Any
    ) -> tuple[Any, Tensor, Tensor]:
        """Compute a call; the states are ``(h_0, c_0)``, or ``(h_0,)``."""
        if not isinstance(input, Tensor):
            return self._call_packed(input, states, (lengths, reset))
        kind, dims = type(self).__name__, input.dim()
        if dims not in (2, 3):
            raise ValueError(f"{kind}: expected input to be 2-D or 3-D, got {size(input)}")
        if dims == 2:
            input = input.unsqueeze(1)
            states = None if states is None else check_unbatched(kind, states)
        elif self.batch_first:
            input = input.transpose(0, 1)
        check_steps(kind, input.shape[0], input)
        if lengths is not None:
            lengths = check_lengths(kind, lengths, input, dims == 3)
        if reset is not None:
            reset = check_reset(kind, reset, input, dims == 3, self.batch_first)
        y, h_n, c_n = self._infer(input, states, lengths=lengths, reset=reset)
        if dims == 2:
            return y.squeeze(1), h_n.squeeze(1), c_n.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y, h_n, c_n

    def _call_packed(
        self, input: Any, states: Sequence[Tensor] | None, options: tuple[Any, Any]
    ) -> tuple[PackedSequence, Tensor, Tensor]:
        kind = type(self).__name__
        check_input(kind, input)
        if any(option is not None for option in options):
            raise ValueError(f"{kind}: lengths and reset have no meaning for a PackedSequence")
        rows, batch_sizes, order, restore = input
        if states is not None and order is not None:
            layers = self.num_layers * (1 + self.bidirectional)
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)
            shapes = [(layers, order.shape[0], n) for n in sizes]
            check_states(kind, states, shapes, packed=True)
            states = [state.index_select(1, order) for state in states]
        y, h_n, c_n = self._infer(rows, states, batch_sizes=batch_sizes)
        if restore is not None:
            h_n, c_n = h_n.index_select(1, restore), c_n.index_select(1, restore)
        return PackedSequence(y, batch_sizes, order, restore), h_n, c_n

    def _infer(
        self,
        x: Tensor,
        states: Sequence[Tensor] | None,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check(x, states)
        if x.stride(-1) != 1:
            x = x.contiguous()
        if ONNX.is_exporting():
            return self._export(x, states, batch_sizes, lengths, reset)
        h0, c0 = (
            (None, None) if states is None else states if len(states) == 2 else (*states, None)
        )
        return INFER(x, self._weights(), *self._config, h0, c0, batch_sizes, lengths, reset)

    def _export(
        self, x: Tensor, states: Sequence[Tensor] | None, *options: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let ONNX compute a call."""
        batch_sizes, lengths, reset = options
        plain = self.mode == "LSTM" and not self.proj_size
        if self.dtype == "int8" and plain and batch_sizes is None and reset is None:
            return onnx.stack(self.specs(), x, self._weights(), states, lengths)
        warnings.warn(
            "ONNX has a node for an int8 LSTM without projection, packed rows and resets, not for "
            "this call: it is exported with float32 weights",
            stacklevel=2,
        )
        places = self._places(self.specs())
        weights = [w for place in places for w in self._floats(*place).values()]
        given: dict[str, Any] = {
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "batch_sizes": batch_sizes,
            "lengths": lengths,
            "reset": reset,
        }
        if self.mode == "LSTM":
            pair = None if states is None else (states[0], states[1])
            y, (h_n, c_n), *_ = functional.lstm(x, pair, weights, **given)
            return y, h_n, c_n
        activation = self.mode.removeprefix("RNN_").lower()
        h_0 = None if states is None else states[0]
        y, h_n = functional.rnn(x, h_0, weights, nonlinearity=activation, **given)
        return y, h_n, h_n


class QuantizedLSTM(_Layers):
    """An LSTM with weights of 8 bits, or of 16, for inference on CPUs.

    :func:`fastlstm.quantize` makes them from ``nn.LSTM`` and ``fastlstm.LSTM``, or
    :meth:`from_float`. Input, states and output are float32, bfloat16 or float16; inside, states
    and gates are float32. It has no dropout, and no gradients.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: L, each layer reads the outputs of the one before.
        bias: whether the gates have biases.
        batch_first: input and output are ``[B, T, ...]`` instead of ``[T, B, ...]``.
        bidirectional: D is 2 if True, else 1.
        proj_size: P, features of the output of each direction; 0 for no projection (P = H).
        dtype: "int8": integers with a scale for each row of the weights; a row of the input and of
            h becomes integers at run time. "bfloat16": the weights are rounded. Some CPUs also
            round x and h for the products: Intel's with AVX-512 FP16 to float16, which hardly
            changes errors, AMD's with AVX-512 BF16 and ARM's with BF16 to bfloat16, which makes
            them 1.3 to 1.4 times as large.

    Raises:
        ValueError: another dtype.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        proj_size: int = 0,
        dtype: str = "int8",
    ) -> None:
        sizes = input_size, hidden_size, num_layers
        super().__init__("LSTM", *sizes, bias, batch_first, bidirectional, proj_size, dtype)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Any, State]:
        """Run the sequence; arguments and results are those of :meth:`fastlstm.LSTM.forward`.

        Raises:
            RuntimeError: a gradient is wanted; a tensor has a shape, dtype or device that does
                not fit.
        """
        if lengths is None and reset is None:
            found = infer(self, input, hx, 3, self.batch_first)
            if found is not None:
                return found
        if hx is not None and not is_pair(hx):
            hx = check_pair(hx, 3)
        y, h_n, c_n = self._call(input, hx, lengths, reset)
        return y, (h_n, c_n)

    @classmethod
    def from_float(cls, source: nn.LSTM | LSTM, dtype: str = "int8") -> QuantizedLSTM:
        """Quantise the weights of an LSTM.

        Raises:
            ValueError: the LSTM has an option that quantised ones lack, trains, or has weights
                that are not finite.
        """
        lacking = source.beyond_torch() if isinstance(source, LSTM) else []
        if lacking:
            raise ValueError(f"quantize: QuantizedLSTM has no {', '.join(lacking)}")
        made = cls(
            source.input_size,
            source.hidden_size,
            source.num_layers,
            source.bias,
            source.batch_first,
            source.bidirectional,
            source.proj_size,
            dtype,
        )
        made._read(source)
        return made.eval()

    def dequantize(self) -> LSTM:
        """Return a float32 LSTM with the weights of this one; all of the bias is in bias_ih."""
        made = LSTM(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.bias,
            self.batch_first,
            bidirectional=self.bidirectional,
            proj_size=self.proj_size,
            dtype=torch.float32,
        )
        self._write(made)
        return made.eval()


class QuantizedRNN(_Layers):
    """An ``nn.RNN`` with small weights, as :class:`QuantizedLSTM` is an LSTM.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: L.
        nonlinearity: "tanh" or "relu".
        bias: whether there are biases.
        batch_first: input and output are ``[B, T, ...]`` instead of ``[T, B, ...]``.
        bidirectional: D is 2 if True, else 1.
        dtype: "int8" or "bfloat16".
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        dtype: str = "int8",
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        mode, sizes = f"RNN_{nonlinearity.upper()}", (input_size, hidden_size, num_layers)
        super().__init__(mode, *sizes, bias, batch_first, bidirectional, 0, dtype)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """Run the sequence; arguments and results are those of :meth:`fastlstm.RNN.forward`."""
        states = None if hx is None else (hx,)
        if lengths is None and reset is None:
            found = infer(self, input, states, 3, self.batch_first)
            if found is not None:
                return found
        y, h_n, _ = self._call(input, states, lengths, reset)
        return y, h_n

    def extra_repr(self) -> str:
        """The arguments that are not at their defaults."""
        return super().extra_repr() + ", nonlinearity=relu" * (self.mode == "RNN_RELU")

    @classmethod
    def from_float(cls, source: nn.RNN | RNN, dtype: str = "int8") -> QuantizedRNN:
        """Quantise the weights of an RNN; see :meth:`QuantizedLSTM.from_float`."""
        made = cls(
            source.input_size,
            source.hidden_size,
            source.num_layers,
            source.mode.removeprefix("RNN_").lower(),
            source.bias,
            source.batch_first,
            source.bidirectional,
            dtype,
        )
        made._read(source)
        return made.eval()

    def dequantize(self) -> RNN:
        """Return a float32 RNN with the weights of this one; all of the bias is in bias_ih."""
        made = RNN(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.mode.removeprefix("RNN_").lower(),
            self.bias,
            self.batch_first,
            bidirectional=self.bidirectional,
            dtype=torch.float32,
        )
        self._write(made)
        return made.eval()
