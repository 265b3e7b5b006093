"""Weights from Keras and TensorFlow, and to Keras; neither has to be installed.

Letters: I input size, H hidden size, P projected size (H without projection), L layers, D
directions. PyTorch has gates i, f, g, o, matrices ``[4H, I]`` and ``[4H, P]``, and two biases.

- Keras 2 and 3: ``kernel [I, 4H]``, ``recurrent_kernel [H, 4H]``, ``bias [4H]``, gates in the
  order of PyTorch. ``unit_forget_bias`` is an initial value: its 1 is in the bias.
  (keras/src/layers/rnn/lstm.py)
- TensorFlow 1, ``LSTMCell``, ``BasicLSTMCell``, ``LSTMBlockCell``: one ``kernel [I+P, 4H]`` and
  ``bias [4H]``, gates i, j, f, o, where j is g. ``forget_bias`` is not in the bias: the cell adds
  it at every step. (tensorflow/python/ops/rnn_cell_impl.py)

One bias goes into two: ``bias_ih`` gets it and ``bias_hh`` zeros. As both train, a step of SGD
moves their sum twice as far as it would the one; ``bias_hh.requires_grad_(False)`` prevents that.

Modules are read and filled by the names of their parameters, so those of ``torch.nn`` will do.
"""

from fastlstm.weights.keras import from_keras, to_keras
from fastlstm.weights.tensorflow import from_tensorflow

__all__ = ["from_keras", "from_tensorflow", "to_keras"]
