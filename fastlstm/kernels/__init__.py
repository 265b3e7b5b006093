"""The backends, in the order in which ``auto`` asks those that have the device of the input.

:mod:`fastlstm.kernels.base` says what a backend is; README.md in this folder says how to add one.
"""

from fastlstm.kernels import reference  # isort: skip
from fastlstm.kernels import cpu  # isort: skip
from fastlstm.kernels import pytorch  # isort: skip
from fastlstm.kernels import triton  # isort: skip
from fastlstm.kernels import cuda  # isort: skip
from fastlstm.kernels import onnx

__all__ = ["cpu", "cuda", "onnx", "pytorch", "reference", "triton"]
