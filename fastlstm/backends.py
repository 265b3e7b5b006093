"""Which backend computes a layer: how to choose it, what there is, and why.

``auto`` takes the compiled CPU kernels on the CPU and PyTorch's own everywhere else, but on GPUs
like those on which kernels of this library were measured: there these compute the calls in which
they were faster, and what PyTorch's lack. Elsewhere they have to be proven first; what is left is
the reference's. A backend that is named explicitly computes every call or raises: it is never
replaced silently. Derivatives that no kernel has (of second order, in forward mode) are the
reference's, except where PyTorch's own kernels were asked for by their name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlstm import automatic, record
from fastlstm.automatic import (
    AUTO,
    AUTOMATIC,
    TUNED,
    Size,
    candidates,
    first_obstacle,
    first_without_doubt,
)
from fastlstm.kernels.base import Backend, get, names, registered
from fastlstm.kernels.onnx import ONNX
from fastlstm.kernels.reference import REFERENCE
from fastlstm.spec import DENSE, LayerSpec, Sequences

__all__ = [
    "backend",
    "backends",
    "choice",
    "higher_derivative",
    "is_automatic",
    "select",
]

_is_transformed = torch._C._are_functorch_transforms_active
_TransformType = torch._C._functorch.TransformType


class Status(NamedTuple):
    """Whether a backend can be used here, and what it is or why it cannot."""

    available: bool
    detail: str


class Report(dict[str, Status]):
    """Backend name to :class:`Status`; prints as a table."""

    def __repr__(self) -> str:
        lines = [
            f"{name:<10}{'yes' if status.available else 'no':<5}{status.detail}"
            for name, status in self.items()
        ]
        return "\n".join([*lines, f"in use here: {choice.name}"])


def backends() -> Report:
    """Return what this machine has, and why something is missing.

    Returns:
        A dict of backend name to ``(available, detail)`` that prints as a table.
    """
    return Report({backend.name: _status(backend) for backend in registered()})


def _status(backend: Backend) -> Status:
    error = backend.error()
    return Status(True, backend.detail()) if error is None else Status(False, error)


def _checked(name: str, source: str) -> str:
    choices = (*AUTOMATIC, *names())
    if name not in choices:
        raise ValueError(
            f"{source}: {name!r} is not a backend, choose one of {', '.join(choices)}"
        )
    return name


_FIRST = _checked(os.environ.get("FASTLSTM_BACKEND") or AUTO, "FASTLSTM_BACKEND")


class _Choice(threading.local):
    """What a thread has chosen."""

    # No values here: Dynamo of torch 2.11 would take them for those of the thread.
    name: str
    fast: Any  # what computes plain calls on the CPU without gradients, for latency
    asks: record.Record | None  # what has a say in what auto takes on the CPU

    def __init__(self) -> None:
        self.set(_FIRST)

    def set(self, name: str) -> None:
        asked = candidates(name, _CPU)
        self.name = name
        self.fast = asked[0] if asked[0].lstm_infer and not automatic.CHECKED else None
        self.asks = None
        if name in AUTOMATIC:
            found = record.known(_CPU) or record.Record({})
            if name == TUNED or not found.always_takes(asked[0].name):
                self.asks = found


def is_automatic() -> bool:
    """Whether nobody has named the backend that computes."""
    return choice.name in AUTOMATIC


_CPU = torch.empty(0, device="cpu")
choice = _Choice()


class backend:
    """Choose the backend: ``backend("cpu")`` from here on, ``with backend("cpu"):`` for a block.

    Like ``torch.set_grad_enabled``, it holds for the thread that calls it; every thread starts
    with ``FASTLSTM_BACKEND``, or "auto" without it.

    Args:
        name: "auto", "reference", "cpu", "torch", "triton" or "cuda"; or "tuned": auto, which
            measures every new shape once (:func:`fastlstm.tune`), as cudnn.benchmark does.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: this machine does not have it; the message says why.
    """

    def __init__(self, name: str) -> None:
        _checked(name, "backend()")
        if name not in AUTOMATIC and (error := get(name).error()) is not None:
            raise RuntimeError(
                f'the "{name}" backend is not available here: {error}. '
                'Use fastlstm.backend("auto"), or see fastlstm.backends()'
            )
        self.name = name
        self._before = choice.name
        choice.set(name)

    def __enter__(self) -> backend:
        choice.set(self.name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        choice.set(self._before)

    def __repr__(self) -> str:
        return f"fastlstm.backend({self.name!r})"


def select(
    x: Tensor,
    specs: Sequence[LayerSpec],
    sequences: Sequences = DENSE,
    cell_states: bool = False,
    size: Size | None = None,
) -> Backend:
    """Return the backend that computes these layers, whose input is like x.

    Args:
        x: the input of the first layer; only its device and dtype matter.
        specs: the layers.
        sequences: which steps there are, as the caller passed them.
        cell_states: whether c of every step is asked for.
        size: how large the call is, if that is known; what was measured counts then.

    Raises:
        RuntimeError: a backend was named explicitly and cannot compute this call.
    """
    if ONNX.is_exporting():
        return ONNX
    derived = _is_transformed() or forward_ad._current_level >= 0
    if derived and higher_derivative() is not None:
        return REFERENCE
    name = choice.name
    backend = candidates(name, x)[0]
    named = name not in AUTOMATIC
    obstacle = None
    if named or _is_settled(backend, x, specs[0], size):
        obstacle = first_obstacle(backend, x, specs, sequences, cell_states)
        if obstacle is None:
            return backend
    if not named:
        return first_without_doubt(name, x, specs, sequences, cell_states, size) or REFERENCE
    raise RuntimeError(
        f'the "{name}" backend cannot compute this call: {obstacle}. '
        'Use fastlstm.backend("auto") or "reference"'
    )


def _is_settled(first: Backend, x: Tensor, spec: LayerSpec, size: Size | None) -> bool:
    """Whether auto takes its first backend, if this can compute such a call: none was faster."""
    if choice.name != AUTO or torch.compiler.is_compiling():
        return False
    if x.is_cpu:
        found = choice.asks
    elif automatic.is_contested(x):
        return False
    else:
        found = record.known(x)
    if found is None or size is None or not size.is_known:
        return found is None
    module = record.module_class(spec, size.layers)
    return size.steps * size.batch < found.rows_for_others(first.name, module)


def higher_derivative() -> str | None:
    """Return what asks for more than vmap and one derivative in reverse mode, if anything does.

    That is for the reference, on every backend: kernels compute the first derivative only.
    """
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    if not _is_transformed():
        return None
    if torch.compiler.is_compiling():  # Dynamo cannot say which transforms
        return "compiled code uses torch.func"
    kinds = [layer.key() for layer in torch._C._functorch.get_interpreter_stack() or ()]
    if kinds.count(_TransformType.Grad) > 1:
        return "torch.func takes a derivative of a derivative"
    if _TransformType.Jvp in kinds:
        return "forward-mode AD is active"
    if _TransformType.Functionalize in kinds:
        return "torch.func.functionalize is active"
    return None
