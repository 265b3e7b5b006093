"""fastlstm's Triton backend on CPU tensors, through the PTX that Triton compiles its kernels to.

For a process in which Triton does not interpret (TRITON_INTERPRET=0).
"""

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fastlstm
from benchmarks.gpu.variants import PROCESSORS, type_name
from fastlstm.kernels import triton as backend
from fastlstm.kernels.triton import launch, operators
from fastlstm.kernels.triton.config import Device
from fastlstm.kernels.triton.gluon import source_of

from .banks import Banks
from .execute import Found, execute
from .faults import Fault
from .translate import Kernel

_OPERATORS = ("lstm_fwd", "lstm_bwd", "rnn_fwd", "rnn_bwd")
_compiled: dict[Any, tuple[str, int]] = {}  # PTX, and bytes of shared memory


@dataclass
class Log:
    """What was executed."""

    kernels: set[str] = field(default_factory=set)
    races: set[tuple[str, str, str]] = field(default_factory=set)  # kernel, instruction, what
    banks: defaultdict[str, Banks] = field(default_factory=lambda: defaultdict(Banks))  # by kernel

    def add(self, kernel: str, found: Found) -> None:
        """Note what a launch of a kernel has shown."""
        self.kernels.add(kernel)
        self.races |= {(kernel, *race) for race in found.races}
        self.banks[kernel].add(found.banks)


@contextmanager
def executed(arch: int, edit: Callable[[str], str] = str) -> Iterator[Log]:
    """Compute every call in this block by executing PTX for a GPU of that architecture.

    `edit` may change the PTX of a kernel, to see that what is broken shows.
    """
    log = Log()
    with ExitStack() as stack:
        stack.enter_context(executed_at_run_time(log, arch, edit, "triton", _OPERATORS))
        for name in ("_error", "_input_obstacle"):
            stack.enter_context(mock.patch.object(backend, name, lambda *_: None))
        stack.enter_context(fastlstm.backend("triton"))
        yield log


@contextmanager
def executed_at_run_time(
    log: Log, arch: int, edit: Callable[[str], str], ending: str, names: Iterable[str]
) -> Iterator[None]:
    """Let Triton's operators of these names, with an ending, compile and execute PTX here."""
    device = Device(arch, PROCESSORS[arch])

    def run(kernel: JITFunction, *, grid: tuple[int, ...], warmup: bool, **given: Any) -> None:
        _launch(log, edit, arch, kernel, grid, given)

    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library("fastlstm", "IMPL"))
        for name in names:
            library.impl(f"{name}_{ending}", getattr(operators, name), "CPU")
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(launch, "_ANY_DEVICE", device))
        yield


def _launch(
    log: Log,
    edit: Callable[[str], str],
    arch: int,
    kernel: JITFunction,
    grid: tuple[int, ...],
    given: dict[str, Any],
) -> None:
    options = {name: value for name, value in given.items() if name not in kernel.arg_names}
    arguments = [given[parameter.name] for parameter in kernel.params]
    ptx, shared_bytes = _ptx(kernel, arguments, options, arch)
    passed = [
        value
        for value, parameter in zip(arguments, kernel.params, strict=True)
        if not _is_constant(parameter, value)
    ]
    program = _translated(edit(ptx), kernel.__name__)
    tensors = [value for value in passed if isinstance(value, Tensor)]
    grid = (grid[0] * options.get("num_ctas", 1), *grid[1:])
    found = execute(program, grid, list(map(_bits, passed)), tensors, shared_bytes)
    log.add(kernel.__name__, found)


_translated = lru_cache(maxsize=None)(Kernel)


def _ptx(
    kernel: JITFunction, arguments: list[Any], options: dict[str, Any], arch: int
) -> tuple[str, int]:
    """What Triton compiles for these arguments, as its launcher would; bytes of shared memory."""
    signature, constants, attributes = {}, {}, {}
    for number, (value, parameter) in enumerate(zip(arguments, kernel.params, strict=True)):
        if _is_constant(parameter, value):
            signature[parameter.name], constants[(number,)] = "constexpr", value
            continue
        signature[parameter.name] = type_name(value)
        if _is_aligned(value) and not parameter.do_not_specialize_on_alignment:
            attributes[(number,)] = [["tt.divisibility", 16]]
    name = kernel.__name__
    key = (name, arch, *map(repr, (signature, constants, attributes, options)))
    if key not in _compiled:
        source = source_of(kernel)(kernel, signature, constants, attributes)
        compiled = triton.compile(source, GPUTarget("cuda", arch, 32), options)
        shared, limit = compiled.metadata.shared, Device(arch, 1).shared_bytes
        if shared > limit:
            raise Fault(f"{name}: {shared} bytes of shared memory, and sm_{arch} has {limit}")
        _compiled[key] = compiled.asm["ptx"], shared
    return _compiled[key]


def _is_constant(parameter: Any, value: Any) -> bool:
    return bool(parameter.is_constexpr) or value is None


def _is_aligned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0 and value.data_ptr() % 16 == 0


def _bits(value: Any) -> int:
    """An argument as a number: an address, or the bits of 32."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return struct.unpack("I", struct.pack("f", value))[0]
    return int(value) % 2**32


def tensors_in(arguments: Any) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of an operator, and in lists of them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from tensors_in(argument)
