"""``fastlstm.QuantizedLSTMCell``: one step with small weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlstm.functional import State
from fastlstm.layer.checks import check_pair, is_pair, size
from fastlstm.modules import LSTMCell
from fastlstm.quantized.base import Quantized
from fastlstm.quantized.direct import infer
from fastlstm.quantized.operators import INFER
from fastlstm.spec import LayerSpec

__all__ = ["QuantizedLSTMCell"]


class QuantizedLSTMCell(Quantized):
    """An ``nn.LSTMCell`` with weights of 8 bits, or of 16, for inference on CPUs.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether the gates have biases.
        dtype: "int8" or "bfloat16"; see :class:`fastlstm.QuantizedLSTM`.
    """

    _is_cell = True

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, dtype: str = "int8"
    ) -> None:
        self.__dict__.update(input_size=input_size, hidden_size=hidden_size)
        spec = LayerSpec("LSTM", input_size, hidden_size, bias=bias)
        super().__init__(dtype, "LSTM", bias, (spec,))

    input_size: int
    hidden_size: int

    def specs(self) -> tuple[LayerSpec, ...]:
        """Describe the cell as a layer."""
        return (LayerSpec("LSTM", self.input_size, self.hidden_size, bias=self.bias),)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Take one step; arguments and results are those of :meth:`fastlstm.LSTMCell.forward`.

        Raises:
            RuntimeError: a gradient is wanted; a tensor has a shape, dtype or device that does
                not fit.
        """
        found = infer(self, input, hx, 2)
        if found is not None:
            return found
        h, c = (None, None) if hx is None else hx if is_pair(hx) else check_pair(hx, None)
        self._check(input, (h, c))
        if input.dim() == 1:
            h, c = (None if s is None else s.unsqueeze(0) for s in (h, c))
            h, c = self(input.unsqueeze(0), None if h is None or c is None else (h, c))
            return h.squeeze(0), c.squeeze(0)
        if input.dim() != 2:
            raise ValueError(
                f"QuantizedLSTMCell: expected input to be 1-D or 2-D, got {size(input)}"
            )
        x = input if input.stride(-1) == 1 else input.contiguous()
        _, h, c = INFER(x, self._weights(), *self._config, h, c, None, None, None)
        return h, c

    def extra_repr(self) -> str:
        """The arguments that are not at their defaults."""
        bias = "" if self.bias else ", bias=False"
        return f"{self.input_size}, {self.hidden_size}{bias}, dtype={self.dtype}"

    @classmethod
    def from_float(cls, source: nn.LSTMCell | LSTMCell, dtype: str = "int8") -> QuantizedLSTMCell:
        """Quantise the weights of a cell; see :meth:`fastlstm.QuantizedLSTM.from_float`."""
        made = cls(source.input_size, source.hidden_size, source.bias, dtype)
        made._read(source)
        return made.eval()

    def dequantize(self) -> LSTMCell:
        """Return a float32 cell with the weights of this one; all of the bias is in bias_ih."""
        made = LSTMCell(self.input_size, self.hidden_size, self.bias, dtype=torch.float32)
        self._write(made)
        return made.eval()
