"""The backends: each line below registers one, in the order in which ``auto`` asks them.

:mod:`fastlstm.kernels.base` says what a backend is; README.md in this folder says how to add one.
"""

from fastlstm.kernels import reference  # isort: skip
from fastlstm.kernels import cpu  # isort: skip
from fastlstm.kernels import triton  # isort: skip
from fastlstm.kernels import cuda  # isort: skip
from fastlstm.kernels import onnx

__all__ = ["cpu", "cuda", "onnx", "reference", "triton"]
