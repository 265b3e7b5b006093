"""What a call would run, and why, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlstm.backends import (
    candidates,
    choice,
    doubt,
    first_obstacle,
    higher_derivative,
    is_automatic,
    select,
)
from fastlstm.kernels.base import Backend
from fastlstm.kernels.reference import REFERENCE
from fastlstm.modules import LSTM, RNN, LSTMCell
from fastlstm.spec import LayerSpec, Sequences

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What one call would run: the backend, its kernel, its plan for each layer, and why."""

    backend: str
    kernel: str
    plan: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        lines = [f"backend  {self.backend}", f"kernel   {self.kernel}"]
        lines += [f"layer {k}  {plan}" for k, plan in enumerate(self.plan)]
        return "\n".join([*lines, f"reason   {self.reason}"])


def explain(
    module: nn.Module, x: Tensor | PackedSequence, hx: Any = None, **options: Any
) -> Explanation:
    """Say what ``module(x, hx, **options)`` would run, without running it.

    Args:
        module: a ``fastlstm.LSTM``, ``LSTMCell`` or ``RNN``.
        x: the input of the call.
        hx: accepted so that a call can be pasted in; it does not change the choice.
        options: the other arguments of the call, such as ``lengths``.

    Returns:
        An object with ``backend``, ``kernel``, ``plan`` (a line for each layer) and ``reason``;
        it prints as a few lines.

    Raises:
        TypeError: module is not one of this library's.
        RuntimeError: the backend in use cannot compute this call.
    """
    if not isinstance(module, LSTM | LSTMCell | RNN):
        raise TypeError(
            f"explain() takes a fastlstm.LSTM, LSTMCell or RNN, got {type(module).__qualname__}; "
            "convert it with from_torch() or fastlstm.accelerate()"
        )
    data, sizes = (x.data, x.batch_sizes) if isinstance(x, PackedSequence) else (x, None)
    T, B = _steps_and_batch(module, x)
    sequences = Sequences(sizes, options.get("lengths"), options.get("reset"))
    call = data, module.specs(), sequences, bool(options.get("return_cell_states"))
    backend = select(*call)
    plan = tuple(backend.describe(spec, T, B, data) for spec in call[1])
    return Explanation(backend.name, backend.kernel(), plan, _reason(backend, *call))


def _reason(
    backend: Backend,
    x: Tensor,
    specs: Sequence[LayerSpec],
    sequences: Sequences,
    cell_states: bool,
) -> str:
    """Why that backend computes the layers, and in the case of auto what would change that."""
    derivative = higher_derivative()
    if backend is REFERENCE and derivative is not None:
        return f"{derivative}, which is the reference's on every backend"
    if not is_automatic():
        return f'backend("{choice.name}") asks for it'
    before: list[str] = []
    after: list[str] = []
    passed = False
    for other in candidates(choice.name, x):
        obstacle = first_obstacle(other, x, specs, sequences, cell_states) or doubt(other)
        passed = passed or other is backend
        if obstacle is not None:
            (after if passed else before).append(obstacle)
    if backend is REFERENCE:
        return f"auto: {'; '.join(before)}"
    where = "a CUDA device" if x.is_cuda else "the CPU" if x.is_cpu else x.device.type
    return "; ".join([f"auto: {x.dtype} on {where}", *before, *after])


def _steps_and_batch(module: nn.Module, x: Tensor | PackedSequence) -> tuple[int, int]:
    """T and B of a call."""
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes), int(x.batch_sizes[0])
    if isinstance(module, LSTMCell):
        return 1, x.shape[0] if x.dim() == 2 else 1
    if x.dim() == 2:
        return x.shape[0], 1
    return (x.shape[1], x.shape[0]) if module.batch_first else (x.shape[0], x.shape[1])
