"""The compiled libraries: load them, or say why that is not possible.

Their operators are defined in Python, by :mod:`fastlstm.kernels.cpu` and
:mod:`fastlstm.kernels.cuda`; a library only brings the kernels.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_INSTALL = 'pip install --no-build-isolation -e ".[test]"'


class ExtensionError(RuntimeError):
    """The compiled kernels are missing on this machine; says why and what to do."""


def _find(library: str) -> Path | None:
    found = [*_FOLDER.glob(f"{library}*.so"), *_FOLDER.glob(f"{library}*.dylib")]
    return min(found) if found else None


@functools.cache
def _error_of(library: str, report: str, what: str, how: str = _INSTALL) -> str | None:
    """Load a library; return why it cannot be used, or None.

    Args:
        library: the start of its file's name.
        report: the file in which setup.py leaves the reason, then the details.
        what: the library in words.
        how: the command that builds it.
    """
    file = _find(library)
    if file is None:
        why = f"{what} has not been built"
        if (_FOLDER / report).exists():
            why = (_FOLDER / report).read_text().partition("\n")[0]
        return f"{why}; to build it, run: {how}"
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
    """Load the CPU kernels; return why they are missing, or None."""
    reason = _error_of("_C", "_build_error.txt", "the extension")
    if reason is None:
        isa()  # raises for a FASTLSTM_ISA that this machine does not have
    return reason


def cuda_error(emulated: bool) -> str | None:
    """Load the CUDA kernels, or their emulator; return why they are missing, or None."""
    if emulated:
        what, how = "the emulator of the CUDA kernels", "python setup.py build_emulator"
        return _error_of("_emulator", "_emulator_error.txt", what, how)
    return _error_of("_cuda", "_cuda_error.txt", "the CUDA library")


def triton_error() -> str | None:
    """Load what starts Triton's kernels from C++; return why it is missing, or None."""
    return _error_of("_triton", "_triton_error.txt", "what starts compiled Triton kernels")


def cuda_library() -> Path | None:
    """Return the file of the CUDA kernels; None where it has not been built. Loads nothing."""
    return _find("_cuda")


def load() -> None:
    """Load the CPU kernels; raise ExtensionError with the reason where that is not possible."""
    _load(error())


def load_cuda(emulated: bool) -> None:
    """Load the CUDA kernels, or their emulator; raise ExtensionError where that fails."""
    _load(cuda_error(emulated))


def isa() -> str:
    """Return the instruction set of the loaded CPU kernels, as FASTLSTM_ISA names it.

    "avx512fp16", "avx512bf16", "avx512", "avx2" or "portable". The first two have the kernels of
    the third, but for products of bfloat16 modules, which take pairs of float16 or bfloat16.
    """
    with untraced():
        return str(torch.ops.fastlstm.cpu_isa())


@contextmanager
def untraced() -> Iterator[None]:
    """Hide operators from torch.jit.trace, which can record none that returns text or numbers."""
    c: Any = torch._C
    state = c._get_tracing_state()
    c._set_tracing_state(None)
    try:
        yield
    finally:
        c._set_tracing_state(state)
