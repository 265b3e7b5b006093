"""Modules to put in the place of those of ``torch.nn``: LSTM, LSTMCell and RNN."""

from fastlstm.modules.cell import LSTMCell
from fastlstm.modules.lstm import LSTM
from fastlstm.modules.rnn import RNN

__all__ = ["LSTM", "RNN", "LSTMCell"]
