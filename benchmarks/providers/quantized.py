"""LSTMs with small weights: ours, ONNX Runtime's and PyTorch's, for inference on CPUs.

They are not as exact as float32, and are not checked as such; ``python -m benchmarks quantized``
says how exact they are.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastlstm

from ..speed.contender import Contender
from ..speed.workload import Workload
from . import onnx_runtime
from .ours import Ours
from .pytorch import Plain, copy, from_module


class Int8(Ours):
    """fastlstm.quantize(lstm, "int8")."""

    name, label, weights = "fastlstm-int8", "fastlstm, int8", "int8"
    own_kernels = False
    eps = 2**-7

    def refuses(self, work: Workload) -> str | None:
        return _refuses(work) or super().refuses(work)

    def prepare(self, module: Any) -> Callable[..., Any]:
        small: Callable[..., Any] = fastlstm.quantize(module.eval(), self.weights)
        return small


class Bfloat16(Int8):
    """fastlstm.quantize(lstm, "bfloat16")."""

    name, label, weights = "fastlstm-bfloat16", "fastlstm, bfloat16", "bfloat16"
    eps = 2**-8


class OnnxRuntimeInt8(onnx_runtime.OnnxRuntime):
    """DynamicQuantizeLSTM, as quantize_dynamic makes it, with a scale for each row."""

    name, label = "onnxruntime-int8", "ONNX Runtime, int8"
    eps = 2**-7

    def refuses(self, work: Workload) -> str | None:
        return _refuses(work) or super().refuses(work)

    def model(self, work: Workload) -> bytes:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
            source.write_bytes(super().model(work))
            logging.disable(logging.WARNING)  # it advises to optimise the graph first: one node
            try:
                quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
            finally:
                logging.disable(logging.NOTSET)
            return target.read_bytes()


class PyTorchInt8(Plain):
    """torch.ao.quantization.quantize_dynamic, which PyTorch has deprecated."""

    name, label = "torch-int8", "PyTorch, qint8"
    eps = 2**-7

    def missing(self) -> str | None:
        has = hasattr(torch.ao.quantization, "quantize_dynamic")
        return super().missing() if has else "gone from this version of PyTorch"

    def refuses(self, work: Workload) -> str | None:
        return _refuses(work) or super().refuses(work)

    def contender(self, work: Workload) -> Contender:
        module = copy(work.lstm).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = torch.ao.quantization.quantize_dynamic(
                nn.ModuleList([module]), {nn.LSTM}, dtype=torch.qint8
            )[0]
        return from_module(module, work, call)


def _refuses(work: Workload) -> str | None:
    if work.mode == "train":
        return "inference only"
    if not work.on_cpu:
        return "for CPUs"
    return "float32 input only here" if work.dtype != torch.float32 else None
