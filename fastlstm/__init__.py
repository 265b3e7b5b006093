"""LSTM for PyTorch: the interface of ``torch.nn.LSTM``, faster and with fewer limits."""

from importlib.metadata import version as _version

from fastlstm import functional, weights
from fastlstm.accelerate import accelerate, restore
from fastlstm.backends import backend, backends
from fastlstm.explain import explain
from fastlstm.modules import LSTM, RNN, LSTMCell
from fastlstm.proof import tune, verify
from fastlstm.quantized import QuantizedLSTM, QuantizedLSTMCell, QuantizedRNN, quantize

__version__ = _version("fastlstm")

__all__ = [
    "LSTM",
    "RNN",
    "LSTMCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedRNN",
    "__version__",
    "accelerate",
    "backend",
    "backends",
    "explain",
    "functional",
    "quantize",
    "restore",
    "tune",
    "verify",
    "weights",
]
