"""Kernels that were compiled ahead, on CPU tensors: the production path from Python to a launch.

The operators in C++ (csrc/triton) choose a kernel and start it on a stand-in for NVIDIA's driver
(tests/libcuda_stub.cpp), which refuses what a driver refuses and hands the launch over: the PTX of
the kernel is executed here. The folder of kernels has all of them, each as a line of text that
says which it is; it is compiled when it is started. For a process in which Triton does not
interpret.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastlstm
from fastlstm import extension
from fastlstm.kernels import triton as backend
from fastlstm.kernels.triton import plain
from fastlstm.kernels.triton.ahead import manifest
from fastlstm.kernels.triton.ahead.build import write
from fastlstm.kernels.triton.ahead.compiling import Image, compiled, interface
from fastlstm.kernels.triton.ahead.keys import Key, keys
from fastlstm.kernels.triton.ahead.plans import table

from .backend import Log, executed_at_run_time, tensors_in
from .execute import execute
from .faults import Fault
from .parse import parse
from .translate import Kernel

_RUNNER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)
)
_OF_TRITON = 2  # pointers that it adds to the arguments of a kernel
# Where an allocation begins, its size: tensors that C++ makes are seen by their address alone.
_usable_size = ctypes.CDLL(None).malloc_usable_size
_usable_size.argtypes, _usable_size.restype = [ctypes.c_void_p], ctypes.c_size_t


def folder_of_names(folder: Path, arch: int, wanted: Sequence[Key] = ()) -> None:
    """Write kernels, each as text that names it: all, or those that are given."""
    wanted = wanted or keys(table(arch))
    images = {
        (key, arch): Image(*interface(key), 1024, b"", named(key, arch).encode()) for key in wanted
    }
    write(folder, (), (arch,), wanted, images)


def named(key: Key, arch: int) -> str:
    """Return the text that stands for a kernel; the stand-in for the driver reads it."""
    text = f"//{key.name}\n.target sm_{arch} {interface(key)[0]}"
    return text + f" .reqnctapercluster {key.blocks}" * (key.blocks > 1)


@contextmanager
def executed(
    library: Path,
    folder: Path,
    arch: int,
    edit: Callable[[str], str] = str,
    processors: int = 132,
) -> Iterator[Log]:
    """Compute every call in this block by what was compiled ahead for a GPU of that architecture.

    The rest is compiled by Triton when it is called, and executed too. Once in a process, since a
    GPU stays what it is.

    Args:
        library: csrc/triton on the stand-in for the driver (tests/ahead_host.py).
        folder: for the kernels.
        arch: 80 or 90.
        edit: may change the PTX of a kernel, to see that what is broken shows.
        processors: of the GPU. Where there are few, programs have more sequences.
    """
    stub = ctypes.CDLL(str(library.parent / "libcuda_stub.so"))
    stub.stub_gpu(arch, 227 << 10, 12080)
    stub.stub_processors(processors)
    if not (folder / manifest.NAME).exists():
        folder_of_names(folder, arch)
    launches = _Launches(arch, edit)
    with ExitStack() as stack:
        change = lambda *where: stack.enter_context(mock.patch.object(*where))  # noqa: E731
        change(extension, "triton_error", loaded(library))
        change(torch.cuda, "is_available", lambda: True)
        change(backend, "_input_obstacle", lambda x: None)
        from fastlstm.kernels.triton.ahead import library as ahead

        change(ahead, "FOLDER", folder)
        change(backend.TritonBackend, "infers_on_cpu", True)
        for name in ("lstm_fwd", "lstm_bwd"):
            operator = getattr(torch.ops.fastlstm, f"{name}_triton").default
            change(backend.TritonBackend, name, launches.watched(operator))
        change(plain, "infer", launches.watched(plain.infer))
        for name in ("lstm_plain_fwd", "lstm_plain_bwd"):
            change(backend.TritonBackend, name, launches.watched(getattr(backend.TRITON, name)))
        stack.enter_context(mock.patch.dict(os.environ, FASTLSTM_TRITON="auto"))
        change(backend, "_jit_problem", lambda: None)
        rest = executed_at_run_time(
            launches.log, arch, edit, "triton_jit", ("lstm_fwd", "lstm_bwd")
        )
        stack.enter_context(rest)
        callback = _RUNNER(launches.run)
        stub.stub_runner(callback)
        stack.callback(stub.stub_runner, None)
        stack.enter_context(fastlstm.backend("triton"))
        yield launches.log


def loaded(library: Path) -> Callable[[], None]:
    """Load the library; return what the extension then says of it."""
    torch.ops.load_library(library)
    return lambda: None


class _Launches:
    """Executes what operators launch."""

    def __init__(self, arch: int, edit: Callable[[str], str]) -> None:
        self.log = Log()
        self._arch, self._edit = arch, edit
        self._keys = {key.name: key for key in keys(table(arch))}
        self._tensors: list[Tensor] = []
        self._error: BaseException | None = None

    def watched(self, operator: Callable[..., Any]) -> Any:
        """An operator whose tensors its kernel may touch; raises the kernel's faults."""

        def call(*arguments: Any, **options: Any) -> Any:
            self._tensors = list(tensors_in(arguments))
            found = operator(*arguments, **options)
            error, self._error = self._error, None
            if error is not None:
                raise error
            return found

        return staticmethod(call)

    def run(self, image: int, name: bytes, line: bytes, arguments: Any) -> None:
        """Execute a launch. A callback of C cannot raise."""
        try:
            self._run(ctypes.string_at(image).decode(), name.decode(), json.loads(line), arguments)
        except BaseException as error:
            self._error = error

    def _run(self, image: str, name: str, launch: dict[str, int], arguments: Any) -> None:
        key = self._keys[image[2 : image.index("\n")]]
        ptx, shared = _compiled(key, self._arch)
        kernel = _translated(self._edit(ptx), name)
        sizes = [parameter.size for parameter in kernel.source.parameters]
        given = list(_until_null(arguments))
        if len(given) != len(sizes):
            raise Fault(f"{key.name} takes {len(sizes)} arguments, and was given {len(given)}")
        if launch["threads"] != kernel.source.threads:
            raise Fault(f"{key.name} has {kernel.source.threads} threads, not {launch['threads']}")
        if launch["cluster"] != kernel.source.cluster:
            clusters = f"clusters of {kernel.source.cluster}, not of {launch['cluster']}"
            raise Fault(f"{key.name} has {clusters} blocks")
        values = [
            int.from_bytes(ctypes.string_at(at, size), "little")
            for at, size in zip(given, sizes, strict=True)
        ]
        names = [name for name, _ in interface(key)[1]]
        pointers = {
            name: value
            for name, value, size in zip(names, values, sizes, strict=False)
            if size == 8
        }
        grid = launch["x"], launch["y"], launch["z"]
        found = execute(kernel, grid, values, self._reachable(pointers), shared)
        self.log.add(key.name, found)

    def _reachable(self, pointers: dict[str, int]) -> list[Tensor]:
        """The operator's tensors, and those that C++ made: of these the memory is known.

        The states of all layers are one tensor, which the first launch sees from its beginning.
        """
        found = list(self._tensors)
        ranges = [(s.data_ptr(), s.nbytes()) for s in (t.untyped_storage() for t in found)]
        for name, pointer in pointers.items():
            if not pointer or any(begin <= pointer < begin + size for begin, size in ranges):
                continue
            size = _usable_size(pointer)
            memory = (ctypes.c_uint8 * size).from_address(pointer)
            found.append(torch.frombuffer(memory, dtype=torch.uint8))
            ranges.append((pointer, size))
            if name in ("h_n", "c_n"):
                self._tensors.append(found[-1])
        return found


@cache
def _compiled(key: Key, arch: int) -> tuple[str, int]:
    found = compiled(key, arch)
    described = [size for _, size in found.arguments] + [8] * _OF_TRITON
    taken = [each.size for each in parse(found.ptx.decode(), found.entry).parameters]
    if taken != described:
        raise Fault(f"{key.name}: the manifest says {described}, the kernel takes {taken}")
    return found.ptx.decode(), found.shared


_translated = cache(Kernel)


def _until_null(arguments: Any) -> Iterator[int]:
    number = 0
    while arguments[number]:
        yield arguments[number]
        number += 1
