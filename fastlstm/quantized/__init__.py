"""Inference with small weights on CPUs: 8-bit integers or bfloat16."""

from fastlstm.quantized.cell import QuantizedLSTMCell
from fastlstm.quantized.layers import QuantizedLSTM, QuantizedRNN
from fastlstm.quantized.replace import quantize

__all__ = ["QuantizedLSTM", "QuantizedLSTMCell", "QuantizedRNN", "quantize"]
