"""The backends: each line below registers one, in the order in which ``auto`` asks them.

:mod:`fastlstm.kernels.base` says what a backend is; README.md in this folder says how to add one.
"""

from fastlstm.kernels import reference, cpu, triton, cuda, onnx  # noqa: F401, I001 (their order)
