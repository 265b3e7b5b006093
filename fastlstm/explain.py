"""What a call would run, and why, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlstm.backends import AUTO, candidates, choice, first_obstacle, higher_derivative, select
from fastlstm.kernels.base import Backend
from fastlstm.kernels.reference import REFERENCE
from fastlstm.modules import LSTM, RNN, LSTMCell
from fastlstm.spec import LayerSpec

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
        x: the input of the call. hx and options are accepted so that a call can be pasted in; they
            do not change the choice.

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
    data = x.data if isinstance(x, PackedSequence) else x
    T, B = _steps_and_batch(module, x)
    specs = module.specs()
    backend = select(data, specs)
    plan = tuple(backend.describe(spec, T, B, data) for spec in specs)
    return Explanation(backend.name, backend.kernel(), plan, _reason(backend, data, specs))


def _reason(backend: Backend, x: Tensor, specs: tuple[LayerSpec, ...]) -> str:
    """Why that backend computes the layers."""
    asked = f'backend("{choice.name}") asks for it'
    if backend is not REFERENCE:
        if choice.name != AUTO:
            return asked
        return f"auto: {x.dtype} on {'a CUDA device' if x.is_cuda else 'the CPU'}"
    derivative = higher_derivative()
    if derivative is not None:
        return f"{derivative}, which is the reference's on every backend"
    if choice.name != AUTO:
        return asked
    others = candidates(AUTO, x)
    obstacles = filter(None, (first_obstacle(other, x, specs) for other in others))
    return f"auto: {'; '.join(obstacles) or f'no backend has kernels for {x.device.type} tensors'}"


def _steps_and_batch(module: nn.Module, x: Tensor | PackedSequence) -> tuple[int, int]:
    """T and B of a call."""
    if isinstance(x, PackedSequence):
        return len(x.batch_sizes), int(x.batch_sizes[0])
    if isinstance(module, LSTMCell):
        return 1, x.shape[0] if x.dim() == 2 else 1
    if x.dim() == 2:
        return x.shape[0], 1
    return (x.shape[1], x.shape[0]) if module.batch_first else (x.shape[0], x.shape[1])
