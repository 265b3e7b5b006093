"""The library that starts compiled kernels, and what it asks of Python: which kernels a GPU gets.

``csrc/triton/`` is the other side. Needs no Triton.
"""

from __future__ import annotations

from functools import cache
from itertools import chain

import torch

from fastlstm import extension
from fastlstm.kernels.measured import precision
from fastlstm.kernels.operators import add_kernel, define_operator
from fastlstm.kernels.triton.config import Device, watch
from fastlstm.spec import LayerSpec

from .manifest import FOLDER, Manifest, ManifestError

__all__ = ["ManifestError", "failed", "gpu", "load", "missing", "plan", "problem_of"]

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

_manifest: Manifest | None = None
_problems: dict[int, str] = {}  # why a GPU has no kernels; "" for those that have


def load() -> Manifest:
    """Load the library and read which kernels there are.

    Raises:
        ManifestError: there are none that can be used.
    """
    global _manifest
    if _manifest is None:
        found = Manifest.read(FOLDER)
        missing = extension.triton_error()
        if missing is not None:
            raise ManifestError(missing)
        _manifest = found
        watch(_pause)
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
    together = tuple(_clusters(device))
    arch, processors = _gpu(device)
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
        _give_kernels(load(), device)
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


def _said_of(device: int) -> str:
    """What C++ asks when it meets a GPU for the first time: why it has no kernels, or ""."""
    return problem_of(device) or ""


def _multiplies_in_tf32() -> bool:
    """What C++ asks of a call in float32."""
    return precision(torch.float32) == "tf32"


add_kernel(_prepare.name(), _said_of, _COMPOSITE)
add_kernel(_tf32.name(), _multiplies_in_tf32, _COMPOSITE)
