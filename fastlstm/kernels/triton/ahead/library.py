"""The library that starts compiled kernels, and what it asks of Python: which kernels a GPU gets.

``csrc/triton/`` is the other side. Needs no Triton for what was compiled ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from fastlstm import extension
from fastlstm.kernels.measured import precision
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
    "why_not_ahead",
]

_COMPOSITE = "CompositeExplicitAutograd"
_gpu = define_operator("triton_gpu", "(int device) -> int[]")
_add = define_operator(
    "triton_add", "(int device, Tensor images, int[] kernels, str names, int[] plans) -> ()"
)
_plan = define_operator(
    "triton_plan",
    "(int device, bool back, int kind, int I, int H, int D, int B) -> int[]",
)
_clusters = define_operator("triton_clusters", "(int device) -> int[]")
failed = define_operator("triton_failed", "(str why) -> ()")
_pause = define_operator("triton_pause", "(bool paused) -> ()")
_prepare = define_operator("triton_prepare", "(int device) -> str")
_tf32 = define_operator("triton_tf32", "() -> bool")

_compile = define_operator("triton_compile", "(int device, int kernel) -> (Tensor, Tensor)")

_manifest: Manifest | None = None  # None where the installed Triton compiles what is called
_problems: dict[int, str] = {}  # why a GPU has no kernels; "" for those that have


def load(problem_of_triton: Callable[[], str | None]) -> str | None:
    """Load the library, and what was compiled ahead; say why it cannot be used.

    Args:
        problem_of_triton: says why Triton cannot compile at run time. If it can, what was not
            compiled ahead is compiled when it is first called.
    """
    reason = why_not_ahead()
    if reason is not None and problem_of_triton() is None:
        from .on_demand import problem

        reason = problem()
    reason = reason or extension.triton_error()
    if reason is None:
        watch(_pause)
    return reason


def why_not_ahead() -> str | None:
    """Read what was compiled ahead; say why there are no kernels."""
    global _manifest
    try:
        _manifest = Manifest.read(FOLDER)
    except ManifestError as error:
        return str(error)
    return None


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
    """Return what a plan needs to know of a GPU, where what is compiled ahead needs no Triton."""
    arch, processors = _gpu(device)
    if _manifest is None:
        from fastlstm.kernels.triton.launch import GLUON

        return Device(arch, processors, *GLUON)
    together = tuple(_clusters(device))
    return Device(arch, processors, clusters=any(together), together=together)


def missing(device: int, kind: int | None, spec: LayerSpec, B: int) -> str | None:
    """Say why kernels of all calls of a layer of B sequences were not compiled ahead."""
    found = problem_of(device)
    if found is not None or _is_there(device, kind, spec, B):
        return found
    return "no kernel for such a layer was compiled ahead"


def _is_there(device: int, kind: int | None, spec: LayerSpec, B: int) -> bool:
    """Return whether both passes over B sequences were compiled ahead."""
    if kind is None or not spec.is_lstm or spec.is_extended or spec.proj_size:
        return False
    return all(plan(device, back, kind, spec, B) for back in (False, True))


def _find_problem(device: int) -> str:
    try:
        if _manifest is None:
            _give_names(device)
        else:
            _give_kernels(_manifest, device)
    except (ManifestError, RuntimeError) as error:
        return str(error).removeprefix("fastlstm: ")
    return ""


def _give_kernels(manifest: Manifest, device: int) -> None:
    """Hand the library the kernels that a GPU runs; it tries one.

    Raises:
        ManifestError: there are none for it.
        RuntimeError: the library or the driver refuses.
    """
    arch, _ = _gpu(device)
    name = manifest.file_for(arch)
    if name is None:
        raise ManifestError(
            f"the kernels were compiled for {manifest.archs()}, and GPU {device} is sm_{arch}"
        )
    about = manifest.files[name]
    numbers, names = [], []
    for kernel, (begin, count, shared) in zip(manifest.kernels, about["places"], strict=True):
        if not count:  # such GPUs do not have it
            continue
        numbers += [kernel["key"], begin, count, shared]
        numbers += [kernel["warps"], kernel["batch"], kernel["blocks"]]
        names.append(f"{kernel['name']} {kernel['entry']} {kernel['arguments']}")
    plans = list(chain.from_iterable(manifest.plans[about["arch"]]))
    _add(device, manifest.content(name), numbers, "\n".join(names), plans)


def _give_names(device: int) -> None:
    """Hand the library the kernels that a GPU may ask Triton to compile."""
    from .on_demand import kernels

    found, plans = kernels(_gpu(device)[0])
    numbers, names = [], []
    for key, (entry, arguments) in found.items():
        numbers += [key.number, 0, 0, 0, key.warps, key.batch, key.blocks]
        sizes = " ".join(f"{name}:{size}" for name, size in arguments)
        names.append(f"{key.name} {entry} {sizes}")
    nothing = torch.empty(0, dtype=torch.uint8)
    _add(device, nothing, numbers, "\n".join(names), list(chain.from_iterable(plans)))


def _compiled(device: int, kernel: int) -> tuple[Tensor, Tensor]:
    """What C++ asks when a kernel without code is first started: the code, its shared memory.

    Both are tensors, since the results of an operator that C++ calls must be of one type.
    """
    from .on_demand import image

    try:
        code, shared = image(_gpu(device)[0], kernel)
        return code, torch.tensor(shared)
    except Exception as error:
        failed(f"fastlstm: Triton cannot compile a kernel for GPU {device}: {error}")
        raise


def _said_of(device: int) -> str:
    """What C++ asks when it meets a GPU for the first time: why it has no kernels, or ""."""
    return problem_of(device) or ""


def _multiplies_in_tf32() -> bool:
    """What C++ asks of a call in float32."""
    return precision(torch.float32) == "tf32"


add_kernel(_compile.name(), _compiled, _COMPOSITE)
add_kernel(_prepare.name(), _said_of, _COMPOSITE)
add_kernel(_tf32.name(), _multiplies_in_tf32, _COMPOSITE)
