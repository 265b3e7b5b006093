"""The library that starts compiled kernels, and what it asks of Python: which kernels a GPU gets.

``csrc/triton/`` is the other side. Needs no Triton for what was compiled ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastlstm import extension
from fastlstm.kernels.measured import multiplies_in_tf32, precision
from fastlstm.kernels.operators import add_kernel, define_operator
from fastlstm.kernels.triton.config import Device, watch
from fastlstm.spec import LayerSpec

from .manifest import FOLDER, Manifest, ManifestError

__all__ = [
    "ManifestError",
    "failed",
    "gpu",
    "load",
    "manifest",
    "missing",
    "plan",
    "problem_of",
]

_COMPOSITE = "CompositeExplicitAutograd"
_gpu = define_operator("triton_gpu", "(int device) -> int[]")
_add = define_operator(
    "triton_add", "(int device, int[] kernels, str names, int[] plans, int[] together) -> ()"
)
_plan = define_operator(
    "triton_plan",
    "(int device, bool back, int kind, int I, int H, int D, int B) -> int[]",
)
_clusters = define_operator("triton_clusters", "(int device) -> int[]")
failed = define_operator("triton_failed", "(str why) -> ()")
_pause = define_operator("triton_pause", "(bool paused) -> ()")
_prepare = define_operator("triton_prepare", "(int device) -> str")
_tf32 = define_operator("triton_tf32", "(bool matmul) -> bool")
_image = define_operator("triton_image", "(int device, int kernel) -> (Tensor, Tensor)")

CLUSTER_SIZES = 1, 2, 4, 8, 16  # as csrc/triton/kernels.h has them
_manifest: Manifest | None = None  # None where the installed Triton compiles what is called
_names: dict[int, str] = {}  # of kernels, by their keys
_interrupted: list[BaseException] = []  # what has ended the last attempt, if it was no error
_problems: dict[int, str] = {}  # why a GPU has no kernels; "" for those that have


def load(problem_of_triton: Callable[[], str | None]) -> str | None:
    """Load the library, and what was compiled ahead; say why it cannot be used.

    Args:
        problem_of_triton: says why Triton cannot compile at run time. If it can, what was not
            compiled ahead is compiled when it is first called.
    """
    global _manifest
    reason = None
    try:
        _manifest = Manifest.read(FOLDER)
    except ManifestError as error:
        reason = _problem_on_demand(problem_of_triton)
        reason = reason and f"{error}; {reason}"
    reason = reason or extension.triton_error()
    if reason is None:
        watch(_pause)
    return reason


def _problem_on_demand(problem_of_triton: Callable[[], str | None]) -> str | None:
    """Say why the installed Triton cannot compile what is called; None if it can."""
    reason = problem_of_triton()
    if reason is None:
        from fastlstm.kernels.triton.gluon import PROBLEM

        reason = PROBLEM
    return reason


def manifest() -> Manifest | None:
    """Return what was compiled ahead; None where the installed Triton compiles what is called."""
    return _manifest


def problem_of(device: int) -> str | None:
    """Say why a GPU does not run the compiled kernels; None if it does, which this tries."""
    if device not in _problems:
        _problems[device] = _find_problem(device)
    return _problems[device] or None


def plan(device: int, back: bool, kind: int, spec: LayerSpec, B: int) -> list[int]:
    """Return the row of :mod:`.plans` by which a layer is computed; empty if there is none.

    Args:
        device: the index of the GPU.
        back: whether it is the backward pass.
        kind: of numbers, an index of ``KINDS``.
        spec: a plain layer.
        B: sequences.
    """
    sizes = spec.input_size, spec.hidden_size, spec.directions
    found: list[int] = _plan(device, back, kind, *sizes, B)
    return found


@cache
def gpu(device: int) -> Device:
    """Return what a plan needs to know of a GPU, where C++ starts kernels."""
    together = tuple(_clusters(device))
    arch, processors = _gpu(device)
    return Device(arch, processors, clusters=any(together), together=together)


def missing(device: int, kind: int | None, spec: LayerSpec, B: int) -> str | None:
    """Say why C++ has no kernels for all calls of a layer of B sequences; None if it has."""
    found = problem_of(device)
    if found is not None or _is_there(device, kind, spec, B):
        return found
    if _manifest is None:
        return "Triton's own launcher starts the kernels of such a layer"
    return "no kernel for such a layer was compiled ahead"


def _is_there(device: int, kind: int | None, spec: LayerSpec, B: int) -> bool:
    """Return whether there are kernels for both passes over B sequences."""
    if kind is None or not spec.is_lstm or spec.is_extended or spec.proj_size:
        return False
    return all(plan(device, back, kind, spec, B) for back in (False, True))


def _find_problem(device: int) -> str:
    _interrupted.clear()  # of an attempt that nobody asked about
    try:
        _give_kernels(device)
    except (ManifestError, RuntimeError) as error:
        if _interrupted:  # by Ctrl-C, which says nothing about the GPU
            raise _interrupted.pop() from None
        return str(error).removeprefix("fastlstm: ")
    return ""


def _give_kernels(device: int) -> None:
    """Tell the library which kernels a GPU runs; it tries one.

    Raises:
        ManifestError: there are none for it.
        RuntimeError: the library or the driver refuses.
    """
    arch, processors = _gpu(device)
    kernels, plans = _kernels(arch, device)
    numbers, names = [], []
    for kernel in kernels:
        numbers += [kernel["key"], kernel["warps"], kernel["batch"], kernel["blocks"]]
        names.append(f"{kernel['name']} {kernel['entry']} {kernel['arguments']}")
        _names[kernel["key"]] = kernel["name"]
    together = []  # the driver says of kernels that are there how many clusters have room
    if _manifest is None:  # at least so many, but Triton may compile none
        some = any(kernel["blocks"] > 1 for kernel in kernels)
        together = [some * Device(arch, processors).at_once(n) for n in CLUSTER_SIZES]
    _add(device, numbers, "\n".join(names), list(chain.from_iterable(plans)), together)


def _kernels(arch: int, device: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return what is to be said of kernels, as the manifest does, and the plans that take them."""
    if _manifest is None:
        from .on_demand import kernels

        return kernels(arch)
    about = _manifest.files[_file(arch, device)]
    pairs = zip(_manifest.kernels, about["places"], strict=True)
    found = [kernel for kernel, (_, _, count, _) in pairs if count]  # which such GPUs have
    return found, _manifest.plans[about["arch"]]


def _file(arch: int, device: int) -> str:
    """Return the name of the file of a GPU; raise ManifestError if there is none for it."""
    assert _manifest is not None
    name = _manifest.file_for(arch)
    if name is None:
        raise ManifestError(
            f"the kernels were compiled for {_manifest.archs()}, and GPU {device} is sm_{arch}"
        )
    return name


def _image_of(device: int, kernel: int) -> tuple[Tensor, Tensor]:
    """What C++ asks when a kernel is first started: its code, its bytes of shared memory.

    Both are tensors, since the results of an operator that C++ calls must be of one type.
    """
    try:
        code, shared = _read(_gpu(device)[0], device, kernel)
    except BaseException as error:
        what = f"{type(error).__name__}: {error}"
        failed(f"fastlstm: {_names[kernel]} for GPU {device} could not be had: {what}")
        if not isinstance(error, Exception):  # C++ makes a RuntimeError of it
            _interrupted[:] = [error]
        raise
    with _disable_current_modes():  # a first call may be one of fake tensors
        numbers = torch.frombuffer(bytearray(code), dtype=torch.uint8)
        return numbers, torch.tensor(shared, device="cpu")


def _read(arch: int, device: int, kernel: int) -> tuple[bytes, int]:
    if _manifest is None:
        from .on_demand import image

        return image(arch, kernel)
    return _manifest.image(_file(arch, device), _manifest.places[kernel])


def _said_of(device: int) -> str:
    """What C++ asks when it meets a GPU for the first time: why it has no kernels, or ""."""
    return problem_of(device) or ""


def _multiplies_in_tf32(matmul: bool) -> bool:
    """What C++ asks of a call in float32: about cuDNN's RNNs, or PyTorch's products."""
    return multiplies_in_tf32() if matmul else precision(torch.float32) == "tf32"


add_kernel(_image.name(), _image_of, _COMPOSITE)
add_kernel(_prepare.name(), _said_of, _COMPOSITE)
add_kernel(_tf32.name(), _multiplies_in_tf32, _COMPOSITE)
