"""The compiled library: loads it, or says why it cannot."""

import functools
from pathlib import Path

import torch

from . import ops

_FOLDER = Path(__file__).parent
_INSTALL = 'pip install --no-build-isolation -e ".[test]"'


class ExtensionError(RuntimeError):
    """The compiled kernels are missing on this machine; says why and what to do."""


@functools.cache
def error() -> str | None:
    """Why the compiled kernels are missing; None if they are loaded, which the first call does."""
    libraries = sorted(_FOLDER.glob("_C*.so")) + sorted(_FOLDER.glob("_C*.dylib"))
    if not libraries:
        report = _FOLDER / "_build_error.txt"  # written by setup.py: the reason, then the details
        why = "the extension has not been built"
        if report.exists():
            why = report.read_text().partition("\n")[0]
        return f"{why}; to build it, run: {_INSTALL}"
    try:
        torch.ops.load_library(libraries[0])
    except (OSError, RuntimeError) as failure:
        return f"{libraries[0].name} cannot be loaded: {failure}"
    ops.cpu_isa()  # raises for a FASTLSTM_ISA that this machine does not have
    return None


def load() -> None:
    """Loads the compiled kernels, or raises ExtensionError with the reason why it cannot."""
    reason = error()
    if reason is not None:
        raise ExtensionError(reason)


def isa() -> str:
    """Instruction set of the CPU kernels in use: "avx512", "avx2" or "portable"."""
    load()
    return ops.cpu_isa()


def plan(T: int, B: int, I: int, H: int, P: int, D: int, threads: int, gates: int = 4) -> str:
    """How the CPU kernels spread one layer of these sizes over `threads` threads, in one line.

    P is the projected size, equal to H without projection. Units with one gate (of nn.RNN) are as
    much work as a quarter of so many with four.
    """
    load()
    units = -(-H * gates // 4)
    return ops.cpu_plan(T, B, I, units, P if units != P else 0, D, threads)


ops.load_on_first_use((ops.lstm_fwd_cpu, ops.lstm_bwd_cpu, ops.rnn_fwd_cpu, ops.rnn_bwd_cpu), load)
