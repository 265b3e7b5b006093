"""The LSTMs that can be timed. A provider makes a contender of any workload that it can do.

All of them but PyTorch and this library are optional. Where a package is not installed, or cannot
do a workload, its provider says why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ..speed.contender import Contender
from ..speed.workload import Workload


class Provider(ABC):
    """One way to compute an LSTM.

    `packages` are those it needs; the version of the first is reported. `remote` is True if it
    brings a runtime with threads and a global state, and so needs a process of its own.
    `own_kernels` is True if it must be as exact as this library promises. `eps` is the spacing, at
    1, of the numbers that it multiplies, where that is not the spacing of the dtype.
    """

    name: str  # on the command line and in results
    label: str  # in tables
    packages: tuple[str, ...]
    remote = False
    own_kernels = False
    eps: float | None = None

    def missing(self) -> str | None:
        """Return why it cannot run on this machine at all; None if it can."""
        absent = [name for name in self.packages if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else None

    def version(self) -> str | None:
        """Return the version of its first package; None if it is not installed."""
        try:
            return version(self.packages[0])
        except PackageNotFoundError:
            return None

    @abstractmethod
    def refuses(self, work: Workload) -> str | None:
        """Return why it cannot do this workload; None if it can. Reads no numbers."""

    @abstractmethod
    def contender(self, work: Workload) -> Contender:
        """Make its contender for the workload, which must not be changed."""


# Where each provider is. A module is imported when its provider is asked for.
_PLACES = {
    "fastlstm": "ours:Ours",
    "fastlstm-cpu": "ours:Cpu",
    "fastlstm-triton": "ours:Triton",
    "fastlstm-cuda": "ours:Cuda",
    "fastlstm-reference": "ours:Reference",
    "fastlstm-compiled": "ours:Compiled",
    "fastlstm-int8": "quantized:Int8",
    "fastlstm-bfloat16": "quantized:Bfloat16",
    "torch": "pytorch:Plain",
    "torch-compiled": "pytorch:Compiled",
    "cell-compiled": "pytorch:CellLoop",
    "torch-int8": "quantized:PyTorchInt8",
    "onnxruntime": "onnx_runtime:OnnxRuntime",
    "onnxruntime-int8": "quantized:OnnxRuntimeInt8",
    "jax": "jax_scan:JaxScan",
    "flax": "flax_rnn:FlaxRNN",
    "keras-torch": "keras_lstm:KerasTorch",
    "keras-jax": "keras_lstm:KerasJax",
    "torchrl": "torchrl_lstm:TorchRL",
    "flashrnn": "flash_rnn:FlashRNN",
    "haste": "haste_lstm:Haste",
}
PROVIDERS = tuple(_PLACES)
# Those that round the weights: a kind of their own, timed where they are asked for.
QUANTIZED = tuple(name for name, place in _PLACES.items() if place.startswith("quantized:"))


@cache
def provider(name: str) -> Provider:
    """Return the provider of that name."""
    module, _, kind = _PLACES[name].partition(":")
    made: Provider = getattr(import_module(f".{module}", __package__), kind)()
    return made
