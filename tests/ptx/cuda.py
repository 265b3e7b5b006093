"""fastlstm's CUDA backend on CPU tensors, through the PTX that nvcc compiles its kernels to.

csrc/cuda/bindings.cpp starts the kernels on a stub of the CUDA runtime (tests/cudart_stub.cpp),
which hands over each launch: what a GPU would be asked for, and the argument as bytes. For a
process that has not loaded the emulator of csrc/cuda, since both register the same operators.
"""

import ctypes
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastlstm
from benchmarks.gpu.cuda_kernels import FOLDER, KINDS, REGIMES, nvcc
from fastlstm import extension

from .backend import Log, tensors_in
from .execute import execute
from .translate import Kernel

_OPERATORS = ("lstm_recur_fwd", "lstm_recur_bwd")
_RUNNER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
_TYPES = {"bf16": "Bf16", "f16": "F16", "tf32": "Tf32", "exact": "Exact"}  # of element.h


@contextmanager
def executed(
    library: Path, arch: int, edit: Callable[[str], str] = str, **wishes: Any
) -> Iterator[Log]:
    """Compute every call in this block by executing PTX for a GPU of that architecture.

    Args:
        library: the host's part of the kernels on the stub (tests/cuda_stub.py).
        arch: as nvcc has it, 80 or 90.
        edit: may change the PTX of a pair of kernels, to see that what is broken shows.
        wishes: as plan.override() takes them.
    """
    torch.ops.load_library(library)
    extension.cuda_error = lambda emulated: None
    from fastlstm.kernels.cuda import operators, plan

    launches = _Launches(arch, edit)
    stub = ctypes.CDLL(str(library))
    with ExitStack() as stack:
        for name in _OPERATORS:
            wrapped = launches.watched(getattr(operators.library, name))
            stack.enter_context(mock.patch.object(operators.library, name, wrapped))
        stack.enter_context(plan.override(**wishes))
        stack.enter_context(fastlstm.backend("cuda"))
        callback = _RUNNER(launches.run)
        stub.stub_runner(callback)
        stack.callback(stub.stub_runner, None)
        yield launches.log


class _Launches:
    """Executes what operators launch."""

    def __init__(self, arch: int, edit: Callable[[str], str]) -> None:
        self.log = Log()
        self._arch, self._edit = arch, edit
        self._tensors: list[Tensor] = []
        self._error: BaseException | None = None

    def watched(self, operator: Callable[..., None]) -> Callable[..., None]:
        """An operator whose tensors are what its kernel may touch; raises the kernel's faults."""

        def call(*arguments: Any) -> None:
            self._tensors = list(tensors_in(arguments))
            operator(*arguments)
            error, self._error = self._error, None
            if error is not None:
                raise error

        return call

    def run(self, line: bytes, argument: int, size: int) -> None:
        """Execute a launch. A callback of C cannot raise."""
        try:
            self._run(json.loads(line), ctypes.string_at(argument, size))
        except BaseException as error:
            self._error = error

    def _run(self, launch: dict[str, Any], argument: bytes) -> None:
        regime, kind = REGIMES[launch["regime"]], [*KINDS][launch["kind"]]
        tail = f"{regime}_{kind}_n{launch['batch'] // 8}_r{launch['resident']}"
        name = f"lstm_{'bwd' if launch['backward'] else 'fwd'}_{tail}"
        kernel = _translated(self._edit(_ptx(tail, self._arch)), name)
        found = execute(
            kernel,
            (launch["grid"],),
            [argument],
            self._tensors,
            launch["shared"],
            launch["block"],
            launch["cluster"],
        )
        self.log.add(name, found)


@cache
def _translated(ptx: str, name: str) -> Kernel:
    return Kernel(ptx, name, divides=True)


@cache
def _ptx(tail: str, arch: int) -> str:
    """The PTX of a pair of kernels, which kernels.h defines by their names."""
    regime, kind, batch, resident = tail.split("_")
    if regime == "wide":
        define = f"FASTLSTM_DEFINE_WIDE({kind}, {_TYPES[kind]}, {resident[1:]})"
    else:
        names = regime, f"In{regime.capitalize()}", kind, _TYPES[kind], batch[1:], resident[1:]
        define = f"FASTLSTM_DEFINE({', '.join(names)})"
    pair = f"namespace fastlstm::cuda {{\n{define}\n}}\n"
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "pair.cu"), Path(folder, "pair.ptx")
        source.write_text(f'#include "cuda/kernels.h"\n{pair}')
        flags = ["-std=c++17", "-O3", "-ptx", f"-arch=sm_{arch}", f"-I{FOLDER.parent}"]
        subprocess.run([*nvcc(), *flags, source, "-o", target], check=True)
        return target.read_text()
