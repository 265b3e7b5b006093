"""LSTM for PyTorch: the interface of ``torch.nn.LSTM``, faster and with fewer limits."""

from fastlstm import functional, weights
from fastlstm.backends import backend, backends, explain
from fastlstm.convert import accelerate
from fastlstm.modules import LSTM, RNN, LSTMCell

__all__ = [
    "LSTM",
    "RNN",
    "LSTMCell",
    "accelerate",
    "backend",
    "backends",
    "explain",
    "functional",
    "weights",
]
