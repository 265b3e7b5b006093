"""LSTM for PyTorch: the interface of ``torch.nn.LSTM``, faster and with fewer limits."""

from fastlstm import functional
from fastlstm.backends import backend, backends, explain
from fastlstm.convert import accelerate
from fastlstm.modules import LSTM, LSTMCell

__all__ = ["LSTM", "LSTMCell", "accelerate", "backend", "backends", "explain", "functional"]
