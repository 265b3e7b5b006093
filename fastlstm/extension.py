"""The compiled library: loads it, or says why it cannot."""

import functools
from pathlib import Path

import torch

from . import ops

_FOLDER = Path(__file__).parent
_INSTALL = 'pip install --no-build-isolation -e ".[test]"'


class ExtensionError(RuntimeError):
    """The compiled kernels are missing on this machine; says why and what to do."""


def _find(library: str) -> Path | None:
    found = [*_FOLDER.glob(f"{library}*.so"), *_FOLDER.glob(f"{library}*.dylib")]
    return min(found) if found else None


@functools.cache
def _error_of(library: str, report: str, what: str) -> str | None:
    """Why a library cannot be used; None if it is loaded, which the first call does.

    report: the file in which setup.py leaves the reason, then the details.
    """
    file = _find(library)
    if file is None:
        why = f"{what} has not been built"
        if (_FOLDER / report).exists():
            why = (_FOLDER / report).read_text().partition("\n")[0]
        return f"{why}; to build it, run: {_INSTALL}"
    try:
        torch.ops.load_library(file)
    except (OSError, RuntimeError) as failure:
        return f"{file.name} cannot be loaded: {failure}"
    return None


def _load(error: str | None) -> None:
    if error is not None:
        raise ExtensionError(error)


@functools.cache
def error() -> str | None:
    """Why the compiled kernels are missing; None if they are loaded, which the first call does."""
    reason = _error_of("_C", "_build_error.txt", "the extension")
    if reason is None:
        ops.cpu_isa()  # raises for a FASTLSTM_ISA that this machine does not have
    return reason


def cuda_error(emulated: bool) -> str | None:
    """The same of the CUDA kernels, or of the library that emulates them."""
    if emulated:
        return _error_of("_emulator", "_emulator_error.txt", "the emulator of the CUDA kernels")
    return _error_of("_cuda", "_cuda_error.txt", "the CUDA library")


def cuda_library() -> Path | None:
    """The file of the CUDA kernels; None where it has not been built. Loads nothing."""
    return _find("_cuda")


def load() -> None:
    """Loads the compiled kernels, or raises ExtensionError with the reason why it cannot."""
    _load(error())


def load_cuda(emulated: bool) -> None:
    """The same of the CUDA kernels, or of the library that emulates them."""
    _load(cuda_error(emulated))


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
