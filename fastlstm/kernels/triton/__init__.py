"""The Triton kernels of a layer: importing this package registers them with the operators.

Only :mod:`fastlstm.backends` imports it, when a layer is to run on it: the rest of the library
works without Triton.
"""

from .layer import describe, lstm_bwd, lstm_fwd, obstacle, rnn_bwd, rnn_fwd

__all__ = ["describe", "lstm_bwd", "lstm_fwd", "obstacle", "rnn_bwd", "rnn_fwd"]
